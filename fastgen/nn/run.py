"""From a layer's decision to its computation: the registered op, or the plain torch composite that specifies it.

The ops check their arguments themselves. Here the same is done for the plain path, so that a mistake reads alike on the
CPU: one message with the layer's name, what was given and what was expected.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fastgen import ops
from fastgen.errors import ShapeError
from fastgen.ops import KernelChoice
from fastgen.ops.checks import check_float, check_shape, describe, output_size

Gate = Literal["tanh", "linear", "none"]
Pair = tuple[int, int]
Pads = tuple[int, int, int, int]  # left, right, top, bottom


def conv2d(
    kernel: KernelChoice,
    name: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    cond: Tensor | None = None,
    residual: Tensor | None = None,
    pads: Pads = (0, 0, 0, 0),
    stride: Pair = (1, 1),
    dilation: Pair = (1, 1),
    gate: Gate = "none",
    elu: bool = False,
) -> Tensor:
    """`fastgen.ops.gated_conv2d` by `kernel`, for the layer `name`."""
    check_input(name, x, weight, "[B, Cin, H, W]", elu)
    options: dict[str, Any] = dict(pads=pads, stride=stride, dilation=dilation, gate=gate, elu=elu)
    if kernel.name == "triton":
        return ops.gated_conv2d(x, weight, bias, cond=cond, residual=residual, **options)
    if cond is not None or residual is not None:
        size = output_size(name, x.shape[2:], weight.shape[2:], pads, stride, dilation)
        _check_added(name, x, weight, gate, size, cond, residual)
    return ops.gated_conv2d_reference(x, weight, bias, cond=cond, residual=residual, **options)


def conv1d(
    kernel: KernelChoice,
    name: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    cond: Tensor | None = None,
    dilation: int = 1,
    gate: Gate = "none",
) -> Tensor:
    """`fastgen.ops.gated_conv1d` by `kernel`, for the layer `name`."""
    check_input(name, x, weight, "[B, Cin, T]", False)
    if kernel.name == "triton":
        return ops.gated_conv1d(x, weight, bias, cond=cond, dilation=dilation, gate=gate)
    _check_added(name, x, weight, gate, x.shape[2:], cond, None)
    return ops.gated_conv1d_reference(x, weight, bias, cond=cond, dilation=dilation, gate=gate)


def linear(
    kernel: KernelChoice,
    name: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gate: Gate = "none",
    elu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """`fastgen.ops.linear_elu` by `kernel`, for the layer `name`, over any number of leading axes."""
    features = weight.shape[1] // (2 if elu else 1)
    if x.dim() == 0 or x.shape[-1] != features or not x.is_floating_point():
        raise ShapeError(f"{name}: x is {describe(x)}, expected floating-point [..., {features}]")
    check_like(name, x, weight)
    outputs = weight.shape[0] // (1 if gate == "none" else 2)
    rows = x.reshape(-1, features)
    added = None if residual is None else residual.reshape(-1, outputs)
    run = ops.linear_elu if kernel.name == "triton" else ops.linear_elu_reference
    return run(rows, weight, bias, gate=gate, elu=elu, residual=added).reshape(*x.shape[:-1], outputs)


def check_input(name: str, x: Tensor, weight: Tensor, axes: str, elu: bool) -> None:
    check_float(name, "x", x, weight.dim(), axes)
    channels = weight.shape[1] // (2 if elu else 1)
    if x.shape[1] != channels:
        raise ShapeError(f"{name}: x is {describe(x)}, expected {channels} channels, {axes}")
    check_like(name, x, weight)


def check_like(name: str, x: Tensor, weight: Tensor) -> None:
    if x.device != weight.device:
        raise ShapeError(f"{name}: x is on {x.device} and the weights on {weight.device}, expected one device")
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ShapeError(
            f"{name}: x is {describe(x)} and the weights {weight.dtype}, expected one dtype; "
            "convert one, or run under torch.autocast"
        )


def _check_added(
    name: str, x: Tensor, weight: Tensor, gate: Gate, size: Sequence[int], cond: Tensor | None, residual: Tensor | None
) -> None:
    outputs = weight.shape[0]
    if cond is not None:
        one = [1] * len(size)
        check_shape(name, "cond", cond, (x.shape[0], outputs, *one), (x.shape[0], outputs, *size))
    if residual is not None:
        gated = outputs // (1 if gate == "none" else 2)
        check_shape(name, "residual", residual, (x.shape[0], gated, *size))
