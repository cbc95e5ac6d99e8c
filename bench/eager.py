"""The peer: what a careful PyTorch user writes for WaveNet, Fast WaveNet (Le Paine et al. 2016).

Every dilated layer keeps a queue of its past inputs, so a step computes one column per layer. All that eager
PyTorch allows is done: taps of a layer in one matrix, residual and skip in one matrix, conditioning projected
once for all steps, one-hot inputs looked up instead of multiplied, no allocation of state inside the loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.models.wavenet import CausalConv1d, WaveNet

TOLERANCE = 1e-4


class Queue:
    """The last inputs of one convolution, a ring of [reach + 1, B, C]; zeros before the first step."""

    def __init__(self, conv: CausalConv1d, batch: int) -> None:
        kernel, self.dilation = conv.kernel_size[0], conv.dilation[0]
        self.back = [j * self.dilation for j in reversed(range(kernel))]  # oldest first, as the weight has it
        self.ring = torch.zeros(conv.reach + 1, batch, conv.in_channels)

    def push(self, t: int, x: Tensor) -> Tensor:
        """Stores x [B, C] as input t and returns what the taps read: [B, kernel * C]."""
        size = self.ring.shape[0]
        self.ring[t % size] = x
        return torch.cat([self.ring[(t - d) % size] for d in self.back], 1)


@dataclass
class Layer:
    """One layer's matrices and state."""

    queue: Queue
    dilated: Tensor  # [G, kernel * R]
    outputs: Tensor  # [R + S, G / 2]
    outputs_bias: Tensor  # [R + S]
    bias: Tensor  # [T, B, G] with the conditioning in it, or [1, 1, G]


class EagerWaveNet:
    """Steps a fastgen WaveNet in plain PyTorch; cond as forward takes it, for `steps` samples."""

    def __init__(self, model: WaveNet, batch: int, cond: tuple[Tensor, ...], steps: int) -> None:
        self.model, self.batch, self.steps = model, batch, steps
        self.classes = model.channels if model.channels > 1 else 0
        with torch.no_grad():
            self.layers = self._layers(cond)
            first = model.first
            self.tables = [first.weight[:, :, k].t().contiguous() for k in range(first.weight.shape[2])]
            self.hidden, self.params = (c.weight[:, :, 0] for c in (model.hidden, model.params))
        self.reset()

    def _layers(self, cond: tuple[Tensor, ...]) -> list[Layer]:
        model = self.model
        local = model.upsample(cond[0])[:, :, : self.steps] if model.upsample is not None else None
        speaker = model.speaker(cond[-1])[:, :, None] if model.speaker is not None else None
        layers = []
        for module in model.layers:
            m: Any = module
            bias = m.dilated.bias[None, :, None]
            bias = bias if local is None else bias + m.local(local)
            bias = bias if speaker is None else bias + m.speaker(speaker)
            layers.append(
                Layer(
                    Queue(m.dilated, self.batch),
                    m.dilated.weight.permute(0, 2, 1).flatten(1).contiguous(),
                    torch.cat([m.residual.weight[:, :, 0], m.skip.weight[:, :, 0]]),
                    torch.cat([m.residual.bias, m.skip.bias]),
                    bias.permute(2, 0, 1).contiguous(),
                )
            )
        return layers

    def reset(self) -> None:
        """Back to the first step."""
        self.t = 0
        self.recent: list[Tensor] = []  # inputs of the first convolution, newest last
        for layer in self.layers:
            layer.queue.ring.zero_()

    def start(self) -> Tensor:
        """The input in front of the first sample: class indices [B], or values [B, 1]."""
        if self.classes:
            return torch.full((self.batch,), int(self.model.start or 0))
        return torch.full((self.batch, 1), float(self.model.start or 0))

    def _first(self, value: Tensor) -> Tensor:
        self.recent = [*self.recent[-(len(self.tables) - 1) :], value] if len(self.tables) > 1 else [value]
        assert self.model.first.bias is not None
        x: Tensor = self.model.first.bias
        for table, v in zip(reversed(self.tables), reversed(self.recent), strict=False):
            x = x + (table[v] if self.classes else v * table)
        return x.expand(self.batch, -1)

    @torch.no_grad()
    def step(self, value: Tensor) -> Tensor:
        """The previous value (class indices [B], or [B, 1]) -> parameters [B, P] of the next."""
        model, width = self.model, self.model.first.out_channels
        x = self._first(value)
        total: Any = 0.0
        for layer in self.layers:
            bias = layer.bias[self.t] if len(layer.bias) > 1 else layer.bias[0]
            y = F.linear(layer.queue.push(self.t, x), layer.dilated) + bias
            a, b = y.chunk(2, 1)
            out = F.linear(torch.tanh(a) * torch.sigmoid(b), layer.outputs, layer.outputs_bias)
            x = (x + out[:, :width]) * model.residual_scale
            total = total + out[:, width:]
        self.t += 1
        y = F.relu(F.linear(F.relu(total * model.skip_scale), self.hidden, model.hidden.bias))
        return F.linear(y, self.params, model.params.bias)

    def draw(self, params: Tensor) -> Tensor:
        """The next value from its parameters [B, P]."""
        if self.classes:
            return torch.multinomial(params.softmax(1), 1)[:, 0]
        logits, means, log_scales = params.chunk(3, 1)
        k = (logits - torch.empty_like(logits).exponential_().log()).argmax(1, keepdim=True)
        u = torch.rand(self.batch, 1).clamp(1e-5, 1 - 1e-5)
        scale = log_scales.gather(1, k).clamp(min=-7.0).exp()
        return (means.gather(1, k) + scale * (u.log() - (1 - u).log())).clamp(-1, 1)

    @torch.no_grad()
    def run(self, steps: int) -> Tensor:
        """`steps` values from a fresh start: [B, steps]."""
        self.reset()
        value, values = self.start(), []
        for _ in range(steps):
            value = self.draw(self.step(value))
            values.append(value.view(self.batch))
        return torch.stack(values, 1)


@torch.no_grad()
def error_against_forward(model: WaveNet, steps: int, cond: tuple[Tensor, ...], batch: int = 2) -> float:
    """Largest difference of the stepped parameters from forward's on the same values, over `steps` sites."""
    peer = EagerWaveNet(model, batch, cond, steps)
    values = [peer.start()]
    stepped = []
    for _ in range(steps):
        stepped.append(peer.step(values[-1]))
        values.append(peer.draw(stepped[-1]))
    x = torch.stack(values[:-1], -1)  # [B, T] classes or [B, 1, T] values
    if peer.classes:
        x = F.one_hot(x, peer.classes).transpose(1, 2).float()
    return float((model(x, *cond) - torch.stack(stepped, -1)).abs().max())
