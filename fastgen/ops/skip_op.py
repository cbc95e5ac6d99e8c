"""The custom op of a WaveNet layer's end, torch.ops.fastgen.residual_skip: one product for residual and skip together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.ops.conv_op import conv_gradients, empty, like
from fastgen.ops.dispatch import on_device, uses_kernel


@torch.library.custom_op("fastgen::residual_skip", mutates_args=())
def residual_skip(
    h: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor, scale: float, channels_last: bool
) -> tuple[Tensor, Tensor]:
    """With z = conv2d(h, weight) + bias: ((x + z[:, :R]) * scale, z[:, R:]).

    h [B, C, H, W] in the layout that is named, weight [R + S, C, 1, 1], bias [R + S], x [B, R, H, W].
    """
    out, skip = _residual_skip_fake(h, weight, bias, x, scale, channels_last)
    if h.numel() == 0:
        return out, skip
    if uses_kernel(h):
        from fastgen.kernels import conv

        with on_device(h):
            h, x = like(h, channels_last), like(x, channels_last)
            conv.residual_skip(h, weight, bias, x, out, skip, scale, channels_last)
        return out, skip
    z = F.conv2d(h, weight, bias)
    out.copy_((x + z[:, : x.shape[1]]) * scale)
    skip.copy_(z[:, x.shape[1] :])
    return out, skip


def _residual_skip_fake(
    h: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor, scale: float, channels_last: bool
) -> tuple[Tensor, Tensor]:
    skip = (h.shape[0], weight.shape[0] - x.shape[1], *h.shape[2:])
    return empty(h, x.shape, channels_last, x.dtype), empty(h, skip, channels_last)


@torch.library.custom_op("fastgen::residual_skip_backward", mutates_args=())
def residual_skip_backward(
    grad_out: Tensor, grad_skip: Tensor, h: Tensor, weight: Tensor, scale: float, channels_last: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of h, weight and bias (float32); `needs` says which, the others are empty."""
    grads = _residual_skip_backward_fake(grad_out, grad_skip, h, weight, scale, channels_last, needs)
    if h.numel() == 0:
        for empty_grad in grads:
            empty_grad.zero_()
        return grads
    point = (0, 0, 0, 0, 1, 1, 1, 1, 0)
    if uses_kernel(h):
        from fastgen.kernels import conv_grad as kernels

        with on_device(h):
            h, grad_out, grad_skip = (like(t, channels_last) for t in (h, grad_out, grad_skip))
            z, sums = kernels.split_backward(grad_out, grad_skip, h.dtype, scale, channels_last)
            if needs[0]:
                kernels.grad_input(z, h, weight, grads[0], point, False, channels_last)
            if needs[1]:
                kernels.grad_weight(z, h, grads[1], point, False, channels_last)
    else:
        z = torch.cat((grad_out.to(h.dtype) * scale, grad_skip), dim=1)
        sums = z.sum((2, 3), dtype=grads[2].dtype)
        for into, g in zip(grads, conv_gradients(z, h, weight, point, False, needs), strict=False):
            if g is not None:
                into.copy_(g)
    if needs[2]:
        grads[2].copy_(sums.sum(0))
    return grads


def _residual_skip_backward_fake(
    grad_out: Tensor, grad_skip: Tensor, h: Tensor, weight: Tensor, scale: float, channels_last: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        empty(h, h.shape, channels_last) if needs[0] else h.new_empty(0),
        torch.empty_like(weight) if needs[1] else h.new_empty(0),
        h.new_empty(weight.shape[0] if needs[2] else 0, dtype=torch.promote_types(h.dtype, torch.float32)),
    )


residual_skip.register_fake(_residual_skip_fake)
residual_skip_backward.register_fake(_residual_skip_backward_fake)


def _setup_skip(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    h, weight, bias, _, ctx.scale, ctx.channels_last = inputs
    ctx.save_for_backward(h, weight)
    ctx.dtypes = [h.dtype, weight.dtype, None if bias is None else bias.dtype]


def _backward_skip(ctx: Any, grad_out: Tensor, grad_skip: Tensor) -> tuple[Tensor | None, ...]:
    h, weight = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    grads: list[Tensor | None] = [None] * 3
    if any(needs):
        found = residual_skip_backward(grad_out, grad_skip, h, weight, ctx.scale, ctx.channels_last, needs)
        grads = [g.to(dtype) if need else None for g, need, dtype in zip(found, needs, ctx.dtypes, strict=True)]
    return (*grads, grad_out * ctx.scale if ctx.needs_input_grad[3] else None, None, None)


residual_skip.register_autograd(_backward_skip, setup_context=_setup_skip)
