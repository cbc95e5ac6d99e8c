"""The custom op behind `fastgen.ops.conv` and `linear`: torch.ops.fastgen.gated_conv, its fake kernel and autograd.

The forward keeps what stands in front of the gate, 2C values a pixel, in the dtype of x. Making it again in the
backward would cost a whole convolution, about ten times the time of writing and reading it; what plain torch keeps for
the same layer (concat_elu, padded input, two halves, sigmoid) is two to four times as much.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.ops.checks import output_size
from fastgen.ops.dispatch import on_device, uses_kernel
from fastgen.ops.reference import concat_elu, gated, pre_activation

_NONE, _SAMPLE, _MAP = 0, 1, 2  # conditioning: none, [B, 2C, 1, 1], [B, 2C, H', W']


def empty(x: Tensor, shape: Sequence[int], channels_last: bool, dtype: torch.dtype | None = None) -> Tensor:
    form = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(tuple(shape), dtype=dtype or x.dtype, device=x.device, memory_format=form)


def like(x: Tensor, channels_last: bool) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _size(x: Tensor, weight: Tensor, geometry: Sequence[int]) -> tuple[int, int]:
    if x.shape[3] == 0:  # no rows of a row product
        return x.shape[2], 0
    return output_size("gated_conv", x.shape[2:], weight.shape[2:], geometry[:4], geometry[4:6], geometry[6:8])


@torch.library.custom_op("fastgen::gated_conv", mutates_args=())
def gated_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, cond: Tensor | None, residual: Tensor | None, geometry: Sequence[int],
    gate: str, elu: bool, channels_last: bool, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, pre): see `gated_conv2d`; pre [B, 2C, H', W'] in front of the gate if `save`, else empty.

    geometry: left, right, top, bottom pads, stride and dilation by rows and columns; 0 for a convolution or 1 for a
    matrix product, whose settings of float32 precision the kernel follows. One list, as every argument of an
    op costs microseconds a call.
    """
    y, pre = _gated_conv_fake(
        x, weight, bias, cond, residual, geometry, gate, elu, channels_last, save
    )  # fmt: skip
    if y.numel() == 0:
        return y, pre
    if uses_kernel(x):
        from fastgen.kernels import conv

        with on_device(x):
            # x is so already, unless a compiler in between chose other strides.
            cond, residual = (None if t is None else like(t, channels_last) for t in (cond, residual))
            conv.forward(
                like(x, channels_last), weight, bias, cond, residual, y, pre, geometry, gate, elu, channels_last
            )
        return y, pre
    full = pre_activation(x, weight, bias, cond, geometry, elu)
    result = gated(full, gate)
    y.copy_(result if residual is None else residual + result)
    return y, pre.copy_(full) if save else pre


def _gated_conv_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, cond: Tensor | None, residual: Tensor | None, geometry: Sequence[int],
    gate: str, elu: bool, channels_last: bool, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    size = _size(x, weight, geometry)
    outputs = weight.shape[0]
    channels = outputs if gate == "none" else outputs // 2
    y = empty(x, (x.shape[0], channels, *size), channels_last, None if residual is None else residual.dtype)
    return y, empty(x, (x.shape[0], outputs, *size), channels_last) if save else x.new_empty(0)


@torch.library.custom_op("fastgen::gated_conv_backward", mutates_args=())
def gated_conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, pre: Tensor, cond: int, geometry: Sequence[int], gate: str,
    elu: bool, channels_last: bool, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight, bias (float32) and cond; `needs` says which, the others are empty.

    grad [B, C, H', W'] of y; cond 0 for none, 1 for [B, 2C, 1, 1] (float32), 2 for [B, 2C, H', W'].
    """
    grads = _gated_conv_backward_fake(
        grad, x, weight, pre, cond, geometry, gate, elu, channels_last, needs
    )  # fmt: skip
    if grad.numel() == 0:
        for empty_grad in grads:
            empty_grad.zero_()
        return grads
    sums: Tensor | None = None  # of the front over pixels, [B, 2C]
    grad = like(grad.to(x.dtype), channels_last)
    if uses_kernel(x):
        from fastgen.kernels import conv_grad as kernels

        with on_device(x):
            front, x = grad, like(x, channels_last)
            if gate != "none":
                front, sums = kernels.gate_backward(grad, like(pre, channels_last), gate, channels_last)
            if needs[0]:
                kernels.grad_input(front, x, weight, grads[0], geometry, elu, channels_last)
            if needs[1]:
                kernels.grad_weight(front, x, grads[1], geometry, elu, channels_last)
    else:
        front = gate_backward(grad, pre, gate)
        found = conv_gradients(front, x, weight, geometry, elu, needs)
        for into, g in zip(grads, found, strict=False):
            if g is not None:
                into.copy_(g)
    if sums is None:
        sums = front.sum((2, 3), dtype=grads[2].dtype)
    if needs[2]:
        grads[2].copy_(sums.sum(0))
    if needs[3]:
        grads[3].copy_(front if cond == _MAP else sums[..., None, None])
    return grads


def _gated_conv_backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, pre: Tensor, cond: int, geometry: Sequence[int], gate: str,
    elu: bool, channels_last: bool, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    wide = torch.promote_types(x.dtype, torch.float32)
    outputs = weight.shape[0]
    size = (1, 1) if cond == _SAMPLE else tuple(grad.shape[2:])
    return (
        empty(x, x.shape, channels_last) if needs[0] else x.new_empty(0),
        torch.empty_like(weight) if needs[1] else x.new_empty(0),
        x.new_empty(outputs if needs[2] else 0, dtype=wide),
        empty(x, (x.shape[0], outputs, *size), channels_last, wide if cond == _SAMPLE else None)
        if needs[3]
        else x.new_empty(0),
    )


gated_conv.register_fake(_gated_conv_fake)
gated_conv_backward.register_fake(_gated_conv_backward_fake)


def gate_backward(grad: Tensor, pre: Tensor, gate: str) -> Tensor:
    """Gradient of what stands in front of the gate: [B, C, ...], [B, 2C, ...] -> [B, 2C, ...]."""
    if gate == "none":
        return grad
    a, b = pre.chunk(2, dim=1)
    s = torch.sigmoid(b)
    if gate == "linear":
        return torch.cat((grad * s, grad * a * s * (1 - s)), dim=1)
    t = torch.tanh(a)
    return torch.cat((grad * s * (1 - t * t), grad * t * s * (1 - s)), dim=1)


def conv_gradients(
    front: Tensor, x: Tensor, weight: Tensor, geometry: Sequence[int], elu: bool, needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of x and weight from that of the convolution's output [B, 2C, H', W']."""
    padded = F.pad(concat_elu(x) if elu else x, tuple(geometry[:4]))
    mask = [bool(needs[0]), bool(needs[1]), False]
    gx, gw, _ = torch.ops.aten.convolution_backward(
        front, padded, weight, None, list(geometry[4:6]), [0, 0], list(geometry[6:8]), False, [0, 0], 1, mask
    )
    if gx is not None:
        gx = F.pad(gx, tuple(-p for p in geometry[:4]))
        if elu:
            first, second = gx.chunk(2, dim=1)
            gx = first * _elu_slope(x) - second * _elu_slope(-x)
    return gx, gw


def _elu_slope(x: Tensor) -> Tensor:
    return x.clamp(max=0).exp()


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, cond, residual, *how, save = inputs
    ctx.save_for_backward(x, weight, output[1] if save else None)
    ctx.how = tuple(how)
    ctx.dtypes = [None if t is None else t.dtype for t in (x, weight, bias, cond, residual)]
    ctx.cond = _NONE if cond is None else _SAMPLE if math.prod(cond.shape[2:]) == 1 else _MAP
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    count = 10
    if grad is None:
        return (None,) * count
    x, weight, pre = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:4])
    grads: list[Tensor | None] = [None] * 4
    if any(needs):
        pre = x.new_empty(0) if pre is None else pre
        found = gated_conv_backward(grad, x, weight, pre, ctx.cond, *ctx.how, needs)
        grads = [g.to(dtype) if need else None for g, need, dtype in zip(found, needs, ctx.dtypes[:4], strict=True)]
    residual = grad.to(ctx.dtypes[4]) if ctx.needs_input_grad[4] else None
    return (*grads, residual, *[None] * (count - 5))


gated_conv.register_autograd(_backward, setup_context=_setup)
