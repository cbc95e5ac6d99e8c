"""WaveNet: van den Oord et al. 2016, "WaveNet: A Generative Model for Raw Audio".

Stacks of dilated causal convolutions with gated activations (equation 2), residual and skip connections
(Figure 4), global and local conditioning (section 2.5). Output: mu-law softmax (section 2.2), or a mixture of
logistics as in Parallel WaveNet (van den Oord et al. 2017, section 2.2).
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.errors import ShapeError
from fastgen.heads import Categorical, LogisticMixture
from fastgen.models.base import ReferenceModel, check_cond
from fastgen.nn import CausalConv1d, GatedResidual1d


class Upsample(nn.Module):
    """Local features to the sample rate: per scale a nearest stretch in time, then a smoothing convolution.

    [B, C, frames] -> [B, C, frames * product(scales)]. The convolution (2s+1 taps, one set for all channels,
    no bias) starts as a moving average.
    """

    def __init__(self, scales: tuple[int, ...]) -> None:
        super().__init__()
        self.scales = tuple(scales)
        self.convs = nn.ModuleList(nn.Conv1d(1, 1, 2 * s + 1, padding=s, bias=False) for s in scales)
        for conv in self.convs:
            nn.init.constant_(conv.get_parameter("weight"), 1.0 / conv.get_parameter("weight").numel())

    def forward(self, c: Tensor) -> Tensor:
        batch, channels, _ = c.shape
        c = c.reshape(batch * channels, 1, -1)
        for scale, conv in zip(self.scales, self.convs, strict=True):
            c = conv(c.repeat_interleave(scale, dim=2))
        return c.reshape(batch, channels, -1)


class WaveNetLayer(GatedResidual1d):
    """One dilated layer with conditioning: x [B, R, T] -> (residual [B, R, T], skip [B, S, T]) (Figure 4, section
    2.5). gate: channels of both halves; local, speaker: channels of the conditioning, 0 without."""

    def __init__(
        self, residual: int, gate: int, skip: int, kernel: int, dilation: int, local: int, speaker: int, scale: float
    ) -> None:
        super().__init__(residual, gate // 2, skip, kernel, dilation, residual_scale=scale)
        self.local = nn.Conv1d(local, gate, 1, bias=False) if local else None
        self.speaker = nn.Conv1d(speaker, gate, 1, bias=False) if speaker else None

    def forward(  # type: ignore[override]  # conditioning in its own channels
        self, x: Tensor, local: Tensor | None, speaker: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        cond = self.local(local) if self.local is not None else None
        if self.speaker is not None:
            shift = self.speaker(speaker)
            cond = shift if cond is None else cond + shift
        return super().forward(x, cond)


class WaveNet(ReferenceModel):
    """WaveNet over audio samples.

    layers, stacks: `layers/stacks` layers of dilation 1, 2, 4, .. a stack. residual, gate, skip, hidden:
    channels of the layers' in- and output, of the gate (both halves), of the skip sum, and between the two
    last 1x1 convolutions (None: as skip). kernel_size: taps of a dilated layer; input_kernel: of the first
    convolution. output: "mol", `mixtures` logistics on samples in [-1, 1]; or "softmax" on `classes` (mu-law)
    classes. local_channels: of local features (mel bands), 0 without; upsample_scales: their product is the
    hop in samples. global_channels: size of the speaker embedding, 0 without; speakers: how many. scaled:
    multiply residual sums by sqrt(1/2) and the skip sum by sqrt(1/layers), which keeps variances even; False
    is the paper's plain sum. length: T of one sample by default; forward takes any.

    forward(x, local?, speaker?) *predicts the next* sample: x is the signal delayed by one with `start` in
    front, [B, 1, T] float for "mol", [B, classes, T] one-hot for "softmax"; local [B, local_channels,
    ceil(T/hop)], speaker [B] int64. Returns at every t the parameters of sample t: [B, 3*mixtures, T] or [B,
    classes, T]. Raises ShapeError.
    """

    predicts = "next"
    layout = "CT"

    def __init__(
        self,
        layers: int = 24,
        stacks: int = 4,
        residual: int = 128,
        gate: int = 256,
        skip: int = 128,
        hidden: int | None = None,
        kernel_size: int = 3,
        input_kernel: int = 1,
        output: str = "mol",
        mixtures: int = 10,
        classes: int = 256,
        local_channels: int = 0,
        upsample_scales: tuple[int, ...] = (4, 4, 4, 4),
        global_channels: int = 0,
        speakers: int = 0,
        scaled: bool = True,
        length: int = 16000,
    ) -> None:
        super().__init__()
        self._check_sizes(layers, stacks, gate, output, global_channels, speakers)
        self.config: dict[str, Any] = dict(
            model="wavenet", layers=layers, stacks=stacks, residual=residual, gate=gate, skip=skip,
            hidden=hidden, kernel_size=kernel_size, input_kernel=input_kernel, output=output,
            mixtures=mixtures, classes=classes, local_channels=local_channels,
            upsample_scales=list(upsample_scales), global_channels=global_channels, speakers=speakers,
            scaled=scaled, length=length,
        )  # fmt: skip
        if output == "mol":
            self.head, self.channels, self.start = LogisticMixture(mixtures, levels=None), 1, 0.0
        else:
            # Class 127 of 256 is mu-law silence, seen from below.
            self.head, self.channels = Categorical(classes, encode="onehot"), classes
            self.start = float((classes - 1) // 2)
        self.sample_shape = (self.channels, length)
        self.local_channels, self.hop = local_channels, math.prod(upsample_scales)
        self.residual_scale = math.sqrt(0.5) if scaled else 1.0
        self.skip_scale = math.sqrt(1.0 / layers) if scaled else 1.0
        hidden = hidden or skip
        self.first = CausalConv1d(self.channels, residual, input_kernel)
        self.layers = nn.ModuleList(
            WaveNetLayer(
                residual,
                gate,
                skip,
                kernel_size,
                2 ** (i % (layers // stacks)),
                local_channels,
                global_channels,
                self.residual_scale,
            )
            for i in range(layers)
        )
        self.hidden = nn.Conv1d(skip, hidden, 1)
        self.params = nn.Conv1d(hidden, 3 * mixtures if output == "mol" else classes, 1)
        self.upsample = Upsample(tuple(upsample_scales)) if local_channels else None
        self.speaker = nn.Embedding(speakers, global_channels) if global_channels else None

    @staticmethod
    def _check_sizes(layers: int, stacks: int, gate: int, output: str, global_channels: int, speakers: int) -> None:
        if output not in ("mol", "softmax"):
            raise ValueError(f"WaveNet: output={output!r}, expected 'mol' or 'softmax'")
        if layers % stacks:
            raise ValueError(f"WaveNet: layers={layers} does not divide into stacks={stacks}")
        if gate % 2:
            raise ValueError(f"WaveNet: gate={gate}, expected an even number (two halves)")
        if bool(global_channels) != bool(speakers):
            raise ValueError(f"WaveNet: global_channels={global_channels} and speakers={speakers} go together")

    @property
    def receptive_field(self) -> int:
        """How many past samples an output reads."""
        return 1 + sum(m.reach for m in self.modules() if isinstance(m, CausalConv1d))

    def example_cond(self, batch: int = 1, length: int | None = None) -> tuple[Tensor, ...]:
        """Conditioning inputs of the right shapes, all zero, for `length` samples, on the model's device."""
        device = self.hidden.weight.device
        frames = -(-(length or self.sample_shape[1]) // self.hop)
        cond: tuple[Tensor, ...] = ()
        if self.local_channels:
            cond += (torch.zeros(batch, self.local_channels, frames, device=device),)
        if self.speaker is not None:
            cond += (torch.zeros(batch, dtype=torch.int64, device=device),)
        return cond

    def forward(self, x: Tensor, *cond: Tensor) -> Tensor:
        local, speaker = self._check(x, cond)
        if self.upsample is not None:
            local = self.upsample(local)[:, :, : x.shape[2]]
        if self.speaker is not None:
            speaker = self.speaker(speaker)[:, :, None]
        x = self.first(x)
        total: Tensor | None = None
        for layer in self.layers:
            x, skip = layer(x, local, speaker)
            total = skip if total is None else total + skip
        assert total is not None
        y: Tensor = self.params(F.relu(self.hidden(F.relu(total * self.skip_scale))))
        return y

    def _check(self, x: Tensor, cond: tuple[Tensor, ...]) -> tuple[Tensor | None, Tensor | None]:
        if x.dim() != 3 or x.shape[1] != self.channels or not x.is_floating_point():
            raise ShapeError(f"WaveNet: x is {x.dtype} {list(x.shape)}, expected float [B, {self.channels}, T]")
        expected: dict[str, tuple[int, ...]] = {}
        if self.local_channels:
            expected["local"] = (x.shape[0], self.local_channels, -(-x.shape[2] // self.hop))
        if self.speaker is not None:
            expected["speaker"] = (x.shape[0],)
        check_cond(self, cond, expected)
        return (cond[0] if self.local_channels else None), (cond[-1] if self.speaker is not None else None)
