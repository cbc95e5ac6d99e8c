"""Convolutions of images that read only what comes before, with their gate, conditioning and residual in one kernel.

All keep one `weight` and `bias` by torch.nn's names and initialisation, so that their state_dicts are those of nn.Conv2d
of the same sizes. A layer of C gated features has 2C weight outputs: the halves a and b of the gate, a first.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastgen.errors import ShapeError
from fastgen.nn import run
from fastgen.nn.choice import Layer
from fastgen.nn.constant import Constant
from fastgen.nn.run import Gate, Pads, Pair
from fastgen.ops.checks import GATES

Mask = Literal["A", "B"]


def pair(value: int | tuple[int, ...]) -> Pair:
    """(rows, columns) of one number or two."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def check_mask(name: str, mask: str) -> None:
    if mask not in ("A", "B"):
        raise ValueError(f"{name}: mask={mask!r}, expected 'A' or 'B'")


class GatedConv2d(Layer, nn.Conv2d):
    """residual + gate(conv2d(pad(x)) + cond), optionally of concat_elu(x): `fastgen.ops.gated_conv2d` with weights.

    in_channels: channels of x. out_channels: features after the gate. gate: "tanh", tanh(a) sigmoid(b) (van den
    Oord et al. 2016, eq. 2); "linear", a sigmoid(b) (Salimans et al. 2017; nn.GLU); "none". elu: x enters as
    concat_elu(x). padding: zeros at all sides, one number, (rows, columns), or (left, right, top, bottom).
    mask: [kh, kw], or anything that broadcasts to the weight, is multiplied into the weight in every forward;
    it is no part of the state_dict. `weight` is [out_channels * (1 or 2), in_channels * (1 or 2), kh, kw], and
    the attributes in_channels and out_channels are, as in nn.Conv2d, those of the weight.

    forward(x, cond?, residual?): x [B, in_channels, H, W]; cond [B, 2 out_channels, 1, 1] or [B, 2 out_channels,
    H', W'] is added in front of the gate; residual [B, out_channels, H', W'] behind it. activated=True: x is
    concat_elu of something already, or what dropout left of it, and has 2 in_channels. Returns [B, out_channels,
    H', W']. Raises ShapeError; the constructor ValueError.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        *,
        stride: int | Pair = 1,
        padding: int | Pair | Pads = 0,
        dilation: int | Pair = 1,
        bias: bool = True,
        gate: Gate = "tanh",
        elu: bool = False,
        mask: Tensor | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if gate not in GATES:
            raise ValueError(f"{type(self).__name__}: gate={gate!r}, expected one of {', '.join(map(repr, GATES))}")
        super().__init__(
            in_channels * (2 if elu else 1), out_channels * (1 if gate == "none" else 2), pair(kernel_size),
            stride=pair(stride), dilation=pair(dilation), bias=bias, device=device, dtype=dtype,
        )  # fmt: skip
        self.gate: Gate = gate
        self.elu = elu
        self.pads = _pads(padding)
        self._mask = None if mask is None else Constant(mask)
        self._finish()

    def forward(
        self, x: Tensor, cond: Tensor | None = None, residual: Tensor | None = None, *, activated: bool = False
    ) -> Tensor:
        return run.conv2d(
            self._fastgen_kernel, type(self).__name__, x, self._masked(), self.bias, cond=cond, residual=residual,
            pads=self.pads, stride=pair(self.stride), dilation=pair(self.dilation), gate=self.gate,
            elu=self.elu and not activated,
        )  # fmt: skip

    @property
    def mask(self) -> Tensor | None:
        """What the weight is multiplied by, on its device and of its dtype; None: it is read as it is."""
        return None if self._mask is None else self._mask.like(self.weight)

    def _masked(self) -> Tensor:
        mask = self.mask
        return self.weight if mask is None else self.weight * mask

    def extra_repr(self) -> str:
        gate = f", gate={self.gate}" if self.gate != "none" else ""
        return f"{super().extra_repr()}, pads={self.pads}{gate}{', elu' if self.elu else ''}"  # type: ignore[no-untyped-call]


def _pads(padding: int | Pair | Pads) -> Pads:
    if isinstance(padding, int):
        padding = (padding, padding)
    if len(padding) == 2:
        rows, cols = padding
        return cols, cols, rows, rows
    return padding


class MaskedConv2d(GatedConv2d):
    """Convolution centred on its pixel that reads what precedes it in raster order (van den Oord et al. 2016a).

    mask: "A" hides the pixel itself, "B" shows it. channel_groups: the channels are so many equal blocks, drawn
    in turn (3 for red, green, blue); at the pixel itself a block reads the blocks before it ("A"), or also its
    own ("B"). Both sides of the kernel are odd. The output has the size of the input (over the stride). `weight`
    is that of nn.Conv2d with padding (kh // 2, kw // 2); the half that the mask hides is neither read nor
    multiplied. Otherwise as GatedConv2d, without a gate unless one is asked for.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        mask: Mask = "B",
        *,
        channel_groups: int = 1,
        stride: int | Pair = 1,
        dilation: int | Pair = 1,
        bias: bool = True,
        gate: Gate = "none",
        elu: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        check_mask("MaskedConv2d", mask)
        kernel, (down, across) = pair(kernel_size), pair(dilation)
        if kernel[0] % 2 == 0 or kernel[1] % 2 == 0:
            raise ShapeError(f"MaskedConv2d: kernel_size={kernel}, expected odd sides: an even kernel has no centre")
        if channel_groups < 1 or in_channels % channel_groups or out_channels % channel_groups:
            raise ShapeError(
                f"MaskedConv2d: {in_channels} and {out_channels} channels, expected multiples of "
                f"channel_groups={channel_groups}"
            )
        # A row kernel reads nothing to its right; any other reads nothing below.
        cols = kernel[1] // 2 + 1 if kernel[0] == 1 else kernel[1]
        pads = (kernel[1] // 2 * across, (cols - 1 - kernel[1] // 2) * across, kernel[0] // 2 * down, 0)
        super().__init__(
            in_channels, out_channels, kernel, stride=stride, padding=pads, dilation=dilation, bias=bias, gate=gate,
            elu=elu, device=device, dtype=dtype,
        )  # fmt: skip
        self.mask_type: Mask = mask
        with torch.device("cpu"):  # wherever modules are made
            self._mask = Constant(self._causal(channel_groups, (kernel[0] // 2 + 1, cols)))
        self._fastgen_decide()

    def _causal(self, groups: int, size: Pair) -> Tensor:
        """[outputs, inputs, rows, cols] of ones where the weight may be read, rows below left out."""
        outputs, inputs = self.weight.shape[:2]
        block_out = torch.arange(outputs // (1 if self.gate == "none" else 2)) // (self._gated(outputs) // groups)
        block_in = torch.arange(inputs // (2 if self.elu else 1)) // (inputs // (2 if self.elu else 1) // groups)
        block_out, block_in = block_out.repeat(outputs // len(block_out)), block_in.repeat(inputs // len(block_in))
        centre = self.kernel_size[1] // 2
        mask = torch.ones(outputs, inputs, *size)
        mask[:, :, -1, centre + 1 :] = 0.0
        later = block_in[None] >= block_out[:, None] if self.mask_type == "A" else block_in[None] > block_out[:, None]
        mask[:, :, -1, centre][later] = 0.0
        return mask

    def _gated(self, outputs: int) -> int:
        return outputs // (1 if self.gate == "none" else 2)

    def _masked(self) -> Tensor:
        mask = self.mask
        assert mask is not None
        return self.weight[:, :, : mask.shape[2], : mask.shape[3]] * mask


class DownShiftedConv2d(GatedConv2d):
    """Convolution that reads its own row and the rows above: output row i the rows i*stride - (kh-1)*dilation ..
    i*stride, columns to both sides alike (the vertical stack of van den Oord et al. 2016b and Salimans et al. 2017).

    kernel_size (kh, kw), kw odd. mask: "A" hides the output's own row, "B" shows it. The output has the size of
    the input (over the stride). Otherwise as GatedConv2d, without a gate unless one is asked for.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        *,
        mask: Mask = "B",
        stride: int | Pair = 1,
        dilation: int | Pair = 1,
        bias: bool = True,
        gate: Gate = "none",
        elu: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        check_mask("DownShiftedConv2d", mask)
        (kh, kw), (down, across) = pair(kernel_size), pair(dilation)
        if kw % 2 == 0:
            raise ShapeError(f"DownShiftedConv2d: kernel_size={(kh, kw)}, expected an odd width: it is centred")
        hidden = torch.ones(kh, kw, device="cpu")
        hidden[-1] = 0.0
        side = kw // 2 * across
        super().__init__(
            in_channels, out_channels, (kh, kw), stride=stride, padding=(side, side, (kh - 1) * down, 0),
            dilation=dilation, bias=bias, gate=gate, elu=elu, mask=hidden if mask == "A" else None, device=device,
            dtype=dtype,
        )  # fmt: skip


class DownRightShiftedConv2d(GatedConv2d):
    """Convolution that reads rows above and columns to the left: output (i, j) the rows as DownShiftedConv2d, the
    columns j*stride - (kw-1)*dilation .. j*stride (the horizontal stack).

    mask: "A" hides the output's own pixel, the last tap, "B" shows it. The output has the size of the input (over
    the stride). Otherwise as GatedConv2d, without a gate unless one is asked for.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        *,
        mask: Mask = "B",
        stride: int | Pair = 1,
        dilation: int | Pair = 1,
        bias: bool = True,
        gate: Gate = "none",
        elu: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        check_mask("DownRightShiftedConv2d", mask)
        (kh, kw), (down, across) = pair(kernel_size), pair(dilation)
        hidden = torch.ones(kh, kw, device="cpu")
        hidden[-1, -1] = 0.0
        super().__init__(
            in_channels, out_channels, (kh, kw), stride=stride, padding=((kw - 1) * across, 0, (kh - 1) * down, 0),
            dilation=dilation, bias=bias, gate=gate, elu=elu, mask=hidden if mask == "A" else None, device=device,
            dtype=dtype,
        )  # fmt: skip
