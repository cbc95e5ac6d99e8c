"""Transposed convolutions cropped so that no output reads what comes after it: the way up in a PixelCNN++.

They have no kernel of their own: a network has two of them for dozens of other layers.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import conv_transpose2d

from fastgen.errors import ShapeError
from fastgen.nn.choice import Layer
from fastgen.nn.conv2d import pair
from fastgen.nn.run import Pair, check_input
from fastgen.ops import KernelChoice

_TORCH = KernelChoice("torch", "transposed convolutions have no kernel of their own")


class _ShiftedConvTranspose2d(Layer, nn.ConvTranspose2d):
    """[B, in_channels, H, W] -> [B, out_channels, H*stride, W*stride]: what falls outside of that is cropped."""

    centred: bool

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        *,
        stride: int | Pair = 2,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        (kh, kw), steps = pair(kernel_size), pair(stride)
        if self.centred and kw % 2 == 0:
            raise ShapeError(f"{type(self).__name__}: kernel_size={(kh, kw)}, expected an odd width: it is centred")
        left = kw // 2 if self.centred else 0
        # Torch makes (n - 1) * stride + k - 2 * padding + output_padding of n; wanted are n * stride.
        self_padding = (0, left)
        missing = (steps[0] - kh, steps[1] + 2 * left - kw)
        super().__init__(
            in_channels, out_channels, (kh, kw), stride=steps, padding=self_padding,
            output_padding=(max(0, missing[0]), max(0, missing[1])), bias=bias, device=device, dtype=dtype,
        )  # fmt: skip
        self._surplus = any(n < 0 for n in missing)
        self._finish()

    def _fastgen_choice(self, weight: Tensor) -> KernelChoice:
        return _TORCH

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """x [B, in_channels, H, W]; output_size can only be the default, and is there for nn.ConvTranspose2d's sake."""
        name = type(self).__name__
        check_input(name, x, self.weight.transpose(0, 1), "[B, Cin, H, W]", False)
        steps = pair(self.stride)
        size = [x.shape[2] * steps[0], x.shape[3] * steps[1]]
        if output_size is not None and list(output_size)[-2:] != size:
            raise ShapeError(f"{name}: output_size={list(output_size)}, expected {size}: nothing else is causal")
        y = conv_transpose2d(
            x, self.weight, self.bias, self.stride, pair(self.padding), pair(self.output_padding)  # type: ignore[arg-type]
        )  # fmt: skip
        return y[:, :, : size[0], : size[1]].contiguous() if self._surplus else y


class DownShiftedConvTranspose2d(_ShiftedConvTranspose2d):
    """Transposed convolution whose output row o reads input rows up to o // stride, columns to both sides alike.

    kernel_size (kh, kw), kw odd. `weight` is that of nn.ConvTranspose2d, [in_channels, out_channels, kh, kw].
    forward: [B, in_channels, H, W] -> [B, out_channels, H*stride, W*stride]. Raises ShapeError.
    """

    centred = True


class DownRightShiftedConvTranspose2d(_ShiftedConvTranspose2d):
    """Transposed convolution whose output (o, p) reads input rows up to o // stride and columns up to p // stride.

    `weight` is that of nn.ConvTranspose2d, [in_channels, out_channels, kh, kw]. forward: [B, in_channels, H, W] ->
    [B, out_channels, H*stride, W*stride]. Raises ShapeError.
    """

    centred = False
