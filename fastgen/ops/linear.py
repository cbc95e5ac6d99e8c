"""Products of rows: the 1x1 convolution of `gated_conv2d` over rows that are no image."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen.errors import ShapeError
from fastgen.ops import checks
from fastgen.ops.conv import autocast
from fastgen.ops.conv_op import gated_conv


def linear_elu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gate: str = "none",
    elu: bool = True,
    residual: Tensor | None = None,
) -> Tensor:
    """residual + gate(act(x) weight^T + bias), in one kernel; with elu, act is concat_elu, else nothing.

    x [N, K] contiguous, weight [M, 2K], or [M, K] without elu; bias [M]. residual and y [N, M], or [N, M / 2] with
    a gate ("tanh", "linear"; see `gated_conv2d`); residual may be float32 beside a 16-bit x, and y then is. The bytes
    of a row do not depend on how many rows there are. Products of float32 are exact unless
    `torch.backends.cuda.matmul.fp32_precision` allows TF32.
    Equivalent to `linear_elu_reference`. Raises ShapeError, ValueError (gate).
    """
    op = "linear_elu"
    x, weight, bias, _ = autocast(x, weight, bias, None)
    checks.check_gate(op, gate)
    checks.check_float(op, "x", x, 2, "[N, K]")
    if not x.is_contiguous():
        raise ShapeError(f"{op}: x {list(x.shape)} has strides {list(x.stride())}, expected a contiguous tensor")
    rows, inputs = x.shape[0], x.shape[1] * (2 if elu else 1)
    if weight.dim() != 2 or weight.shape[1] != inputs or 0 in weight.shape or (gate != "none" and weight.shape[0] % 2):
        wanted = f"[{'M' if gate == 'none' else '2C'}, {inputs}]"
        raise ShapeError(f"{op}: weight is {checks.describe(weight)}, expected {wanted}")
    checks.check_size(op, "x", *x.shape)  # all rows are one sample
    checks.check_size(op, "the result", rows, weight.shape[0])
    outputs = weight.shape[0] // (1 if gate == "none" else 2)
    if bias is not None:
        checks.check_shape(op, "bias", bias, (weight.shape[0],))
    checks.check_like(op, x, {"weight": weight, "bias": bias})
    if residual is not None:
        checks.check_shape(op, "residual", residual, (rows, outputs))
        checks.check_like(op, x, {"residual": residual}, dtype=residual.dtype != torch.float32)
    save = gate != "none" and torch.is_grad_enabled()
    save = save and any(t is not None and t.requires_grad for t in (x, weight, bias))
    y: Tensor = gated_conv(
        _image(x), weight[:, :, None, None], bias, None, None if residual is None else _image(residual),
        [0, 0, 0, 0, 1, 1, 1, 1, 1], gate, elu, True, save,
    )[0]  # fmt: skip
    return y[0, :, 0].t()


def _image(x: Tensor) -> Tensor:
    """Rows [N, K] as one image of a single row of pixels, channels last: [1, K, 1, N]."""
    return x.t()[None, :, None, :]
