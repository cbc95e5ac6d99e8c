"""Causal convolutions of sequences and the residual layer of a WaveNet (van den Oord et al. 2016)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastgen import ops
from fastgen.nn import run
from fastgen.nn.choice import Layer
from fastgen.nn.run import Gate
from fastgen.ops.checks import GATES


class CausalConv1d(Layer, nn.Conv1d):
    """Convolution padded on the left only: output t reads t, t - dilation, .. t - (kernel_size - 1) dilation.

    gate: "none", or as in GatedConv2d, whose 2 out_channels weight outputs are the halves a and b. forward(x,
    cond?): x [B, in_channels, T]; cond [B, 2 out_channels, T] or [B, 2 out_channels, 1] is added in front of the
    gate. Returns [B, out_channels, T]. `weight` is that of nn.Conv1d. Raises ShapeError; the constructor
    ValueError.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        dilation: int = 1,
        *,
        bias: bool = True,
        gate: Gate = "none",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if gate not in GATES:
            raise ValueError(f"CausalConv1d: gate={gate!r}, expected one of {', '.join(map(repr, GATES))}")
        outputs = out_channels * (1 if gate == "none" else 2)
        super().__init__(in_channels, outputs, kernel_size, dilation=dilation, bias=bias, device=device, dtype=dtype)
        self.gate: Gate = gate
        self.reach = (kernel_size - 1) * dilation
        self._finish()

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        options: dict[str, Any] = dict(dilation=self.dilation[0], gate=self.gate)
        return run.conv1d(self._fastgen_kernel, "CausalConv1d", x, self.weight, self.bias, cond=cond, **options)

    def extra_repr(self) -> str:
        gate = f", gate={self.gate}" if self.gate != "none" else ""
        return f"{super().extra_repr()}{gate}"  # type: ignore[no-untyped-call]


class GatedResidual1d(Layer):
    """One dilated layer of a WaveNet (Figure 4): gate(causal convolution), then 1x1 to a residual and a skip.

    residual, gate, skip: channels of x, features after the gate, channels of the skip output. Parameters:
    `dilated`, `residual` and `skip`, each a convolution with torch.nn's names. residual_scale multiplies the
    residual sum; sqrt(1/2) keeps variances even, 1 is the paper's.

    forward(x, cond?): x [B, residual, T]; cond [B, 2 gate, T] or [B, 2 gate, 1] is added in front of the gate.
    Returns ((x + residual(h)) * residual_scale [B, residual, T], skip(h) [B, skip, T]). Raises ShapeError.
    """

    def __init__(
        self,
        residual: int,
        gate: int,
        skip: int,
        kernel_size: int,
        dilation: int = 1,
        *,
        residual_scale: float = 1.0,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        kind: dict[str, Any] = dict(bias=bias, device=device, dtype=dtype)
        self.dilated = CausalConv1d(residual, gate, kernel_size, dilation, gate="tanh", **kind)
        self.residual = nn.Conv1d(gate, residual, 1, **kind)
        self.skip = nn.Conv1d(gate, skip, 1, **kind)
        self.residual_scale = residual_scale
        self._finish()

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self._fastgen_kernel.name == "triton":
            return self._fused(x, cond)
        h = self.dilated(x, cond)
        x = x + self.residual(h)
        return x if self.residual_scale == 1.0 else x * self.residual_scale, self.skip(h)

    def _fused(self, x: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor]:
        dilated = self.dilated
        weight = torch.cat((self.residual.weight, self.skip.weight))
        bias = None
        if self.residual.bias is not None and self.skip.bias is not None:
            bias = torch.cat((self.residual.bias, self.skip.bias))
        return ops.wavenet_layer(
            x, dilated.weight, dilated.bias, weight, bias, cond=cond, dilation=dilated.dilation[0],
            residual_scale=self.residual_scale,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"residual_scale={self.residual_scale:g}"
