"""Convolutions with everything around them in one kernel: concat_elu in front, gate, conditioning and residual behind."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgen.errors import ShapeError
from fastgen.ops import checks
from fastgen.ops.conv_op import gated_conv
from fastgen.ops.skip_op import residual_skip


def gated_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    cond: Tensor | None = None,
    residual: Tensor | None = None,
    pads: Sequence[int] = (0, 0, 0, 0),
    stride: Sequence[int] = (1, 1),
    dilation: Sequence[int] = (1, 1),
    gate: str = "tanh",
    elu: bool = False,
) -> Tensor:
    """residual + gate(conv2d(pad(act(x)), weight) + bias + cond), in one kernel.

    x [B, Cin, H, W], contiguous or channels-last, which y follows (channels-last is the fast one on a GPU).
    weight [2C, Cin, kh, kw]; with elu [2C, 2 Cin, kh, kw], and act is concat_elu. bias [2C]. cond [B, 2C, 1, 1]
    or [B, 2C, H', W']. residual and y [B, C, H', W']; residual may be float32 beside a 16-bit x, and y then is.
    gate of the halves a, b of the 2C channels: "tanh" tanh(a) sigmoid(b) (Gated PixelCNN, van den Oord et al.
    2016, eq. 2), "linear" a sigmoid(b) (PixelCNN++, Salimans et al. 2017), "none": C channels stay C. pads
    (left, right, top, bottom): zeros, or cropping where negative, so shifted and masked convolutions are this
    one; a mask is multiplied into weight. stride, dilation: (rows, columns).

    Equivalent to `gated_conv2d_reference`, with the sum and gate in float32; products of float32 follow
    `torch.backends.cudnn.conv.fp32_precision` as torch's own do, so are TF32 unless told otherwise. cond and
    residual of another memory format than x are copied. Under autocast x, weight, bias and cond are converted
    first. Raises ShapeError, ValueError (gate, stride, dilation).
    """
    op = "gated_conv2d"
    x, weight, bias, cond = autocast(x, weight, bias, cond)
    checks.check_gate(op, gate)
    checks.check_float(op, "x", x, 4, "[B, Cin, H, W]")
    pads, stride = checks.ints(op, "pads", pads, 4, None), checks.ints(op, "stride", stride, 2, 1)
    dilation = checks.ints(op, "dilation", dilation, 2, 1)
    _check_weight(op, x, weight, bias, gate, elu, 4)
    channels_last = checks.layout_of(op, x)
    size = checks.output_size(op, x.shape[2:], weight.shape[2:], pads, stride, dilation)
    checks.check_size(op, "x", *x.shape[1:])
    checks.check_size(op, "the result", weight.shape[0], *size)
    _check_added(op, x, weight, cond, residual, gate, size)
    return _run(x, weight, bias, cond, residual, [*pads, *stride, *dilation, 0], gate, elu, channels_last)


def gated_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    cond: Tensor | None = None,
    dilation: int = 1,
    gate: str = "tanh",
) -> Tensor:
    """gate(causal conv1d(x, weight) + bias + cond): output t reads t, t - dilation, ..; zeros before the start.

    x [B, Cin, T], contiguous or with contiguous channels; weight [2C, Cin, k], bias [2C], cond [B, 2C, T] or [B,
    2C, 1] -> [B, C, T]. gate as in `gated_conv2d` (WaveNet, van den Oord et al. 2016, eq. 2 and 3); "none": [C,
    Cin, k]. Equivalent to `gated_conv1d_reference`. Raises ShapeError, ValueError (gate, dilation).
    """
    op = "gated_conv1d"
    x, weight, bias, cond = autocast(x, weight, bias, cond)
    checks.check_gate(op, gate)
    checks.check_float(op, "x", x, 3, "[B, Cin, T]")
    checks.ints(op, "dilation", (dilation,), 1, 1)
    _check_weight(op, x, weight, bias, gate, False, 3)
    checks.check_size(op, "x", *x.shape[1:])
    checks.check_size(op, "the result", weight.shape[0], x.shape[2])
    pads = [(weight.shape[2] - 1) * dilation, 0, 0, 0]
    checks.output_size(op, (1, x.shape[2]), (1, weight.shape[2]), pads, (1, 1), (1, dilation))
    if cond is not None:
        shape = (x.shape[0], weight.shape[0])
        checks.check_shape(op, "cond", cond, (*shape, 1), (*shape, x.shape[2]))
        checks.check_like(op, x, {"cond": cond})
    channels_last = checks.layout_of(op, x.unsqueeze(2))
    row = None if cond is None else cond.unsqueeze(2)
    y = _run(
        x.unsqueeze(2), weight.unsqueeze(2), bias, row, None, [*pads, 1, 1, 1, dilation, 0], gate, False, channels_last
    )
    return y.squeeze(2)


def wavenet_layer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    *,
    cond: Tensor | None = None,
    dilation: int = 1,
    residual_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """One layer of a WaveNet (Figure 4): gated_conv1d, then one 1x1 product for residual and skip together.

    x [B, R, T], weight [2C, R, k], bias [2C], cond [B, 2C, T] or [B, 2C, 1]; out_weight [R + S, C] or [R + S, C,
    1], out_bias [R + S]. With z = out_weight h + out_bias: returns ((x + z[:, :R]) * residual_scale [B, R, T],
    z[:, R:] [B, S, T]). Equivalent to `wavenet_layer_reference`. Raises ShapeError, ValueError.
    """
    op = "wavenet_layer"
    x_in = x
    x, weight, bias, cond = autocast(x, weight, bias, cond)
    _, out_weight, out_bias, _ = autocast(x, out_weight, out_bias, None)
    if out_weight.dim() == 2:
        out_weight = out_weight.unsqueeze(2)
    channels = weight.shape[0] // 2
    if out_weight.dim() != 3 or x.dim() != 3 or out_weight.shape[0] <= x.shape[1]:
        raise ShapeError(
            f"{op}: out_weight is {checks.describe(out_weight)}, expected [R + S, {channels}] with S > 0, for x [B, R, T] "
            f"{checks.describe(x)}"
        )
    checks.check_shape(op, "out_weight", out_weight, (out_weight.shape[0], channels, 1))
    checks.check_size(op, "residual and skip", out_weight.shape[0], x.shape[2])
    if out_bias is not None:
        checks.check_shape(op, "out_bias", out_bias, (out_weight.shape[0],))
    checks.check_like(op, x, {"out_weight": out_weight, "out_bias": out_bias})
    h = gated_conv1d(x, weight, bias, cond=cond, dilation=dilation, gate="tanh")
    channels_last = checks.layout_of(op, h.unsqueeze(2))
    out, skip = residual_skip(
        h.unsqueeze(2), out_weight.unsqueeze(3), out_bias, x_in.unsqueeze(2), float(residual_scale), channels_last
    )
    return out.squeeze(2), skip.squeeze(2)


def _run(
    x: Tensor, weight: Tensor, bias: Tensor | None, cond: Tensor | None, residual: Tensor | None,
    geometry: list[int], gate: str, elu: bool, channels_last: bool,
) -> Tensor:  # fmt: skip
    save = gate != "none" and torch.is_grad_enabled()
    save = save and any(t is not None and t.requires_grad for t in (x, weight, bias, cond))
    y: Tensor = gated_conv(x, weight, bias, cond, residual, geometry, gate, elu, channels_last, save)[0]
    return y


def autocast(
    x: Tensor, weight: Tensor, bias: Tensor | None, cond: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Under autocast what a convolution takes in the dtype of autocast, as torch's own convolutions do."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x, weight, bias, cond
    dtype = torch.get_autocast_dtype(device)
    x = x.to(dtype)
    # Into the kernels' memory order in the same pass.
    weight = weight.to(dtype, memory_format=torch.channels_last) if weight.dim() == 4 else weight.to(dtype)
    return x, weight, None if bias is None else bias.to(dtype), None if cond is None else cond.to(dtype)


def _check_weight(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, gate: str, elu: bool, rank: int) -> None:
    cin = x.shape[1] * (2 if elu else 1)
    kernel = "kh, kw" if rank == 4 else "k"
    if weight.dim() != rank or weight.shape[1] != cin or 0 in weight.shape or (gate != "none" and weight.shape[0] % 2):
        out = "C" if gate == "none" else "2C"
        why = f" (concat_elu of {x.shape[1]} channels)" if elu else ""
        raise ShapeError(f"{op}: weight is {checks.describe(weight)}, expected [{out}, {cin}, {kernel}]{why}")
    if bias is not None:
        checks.check_shape(op, "bias", bias, (weight.shape[0],))
    checks.check_like(op, x, {"weight": weight, "bias": bias})


def _check_added(
    op: str, x: Tensor, weight: Tensor, cond: Tensor | None, residual: Tensor | None, gate: str, size: tuple[int, int]
) -> None:
    outputs = weight.shape[0]
    if cond is not None:
        checks.check_shape(op, "cond", cond, (x.shape[0], outputs, 1, 1), (x.shape[0], outputs, *size))
        checks.check_like(op, x, {"cond": cond})
    if residual is not None:
        checks.check_shape(op, "residual", residual, (x.shape[0], outputs // (1 if gate == "none" else 2), *size))
        checks.check_like(op, x, {"residual": residual}, dtype=residual.dtype != torch.float32)
