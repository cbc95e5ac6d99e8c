"""WaveNets, each in another hand: where the padding goes, how taps are made, what goes in and what
conditions them.
"""

# As users write: attributes of submodules are not annotated.
# mypy: disable-error-code="no-any-return,arg-type,index,operator,call-overload,no-untyped-call"

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import weight_norm as old_weight_norm
from torch.nn.utils.parametrizations import weight_norm

from fastgen.heads import Categorical, GaussianMixture, LogisticMixture
from tests.cases import Case, both, labels, narrow, noise, randomise


class OneHotWaveNet(nn.Module):
    """Kernel size 2, padding on the left, gates in two convolutions, skip sums; one-hot in, softmax out."""

    def __init__(self, n: int, width: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.dilations = dilations
        self.causal = nn.Conv1d(n, width, 2)
        self.filter = nn.ModuleList(nn.Conv1d(width, width, 2, dilation=d) for d in dilations)
        self.gate = nn.ModuleList(nn.Conv1d(width, width, 2, dilation=d) for d in dilations)
        self.res = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in dilations)
        self.skip = nn.ModuleList(nn.Conv1d(width, 2 * width, 1) for _ in dilations)
        self.end = nn.Sequential(nn.ReLU(), nn.Conv1d(2 * width, width, 1), nn.ReLU(), nn.Conv1d(width, n, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.causal(F.pad(x, (1, 0)))
        total: Tensor | int = 0
        for f, g, res, skip, d in zip(self.filter, self.gate, self.res, self.skip, self.dilations, strict=True):
            padded = F.pad(h, (d, 0))
            z = torch.tanh(f(padded)) * torch.sigmoid(g(padded))
            total = total + skip(z)
            h = h + res(z)
        return self.end(total)


class EmbeddedWaveNet(nn.Module):
    """Kernel size 3, mu-law indices [B, T] through an embedding; skips collected in a list, stacked and
    summed.
    """

    def __init__(self, n: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(n, width)
        self.convs = nn.ModuleList(nn.Conv1d(width, 2 * width, 3, dilation=3**i) for i in range(3))
        self.outs = nn.ModuleList(nn.Conv1d(width, 2 * width, 1) for _ in range(3))
        self.logits = nn.Linear(width, n)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens).transpose(1, 2)
        skips = []
        for i, (conv, out) in enumerate(zip(self.convs, self.outs, strict=True)):
            y = F.glu(conv(torch.cat([h.new_zeros(*h.shape[:2], 2 * 3**i), h], 2)), dim=1)
            residual, skip = out(y).split(h.shape[1], dim=1)
            skips.append(skip)
            h = (h + residual) * math.sqrt(0.5)
        return self.logits(F.relu(torch.stack(skips).sum(0)).transpose(1, 2))


class VocoderLayer(nn.Module):
    """A convolution padded on both sides and cropped, weight norm of old, conditioning by 1x1."""

    def __init__(self, width: int, gate: int, skip: int, local: int, dilation: int) -> None:
        super().__init__()
        self.conv = old_weight_norm(nn.Conv1d(width, gate, 3, padding=2 * dilation, dilation=dilation))
        self.local = old_weight_norm(nn.Conv1d(local, gate, 1, bias=False))
        self.speaker = old_weight_norm(nn.Conv1d(6, gate, 1, bias=False))
        self.out = old_weight_norm(nn.Conv1d(gate // 2, width, 1))
        self.skip = old_weight_norm(nn.Conv1d(gate // 2, skip, 1))

    def forward(self, x: Tensor, c: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)[:, :, : x.size(-1)]
        a, b = y.split(y.size(1) // 2, dim=1)
        ca, cb = self.local(c).chunk(2, 1)
        ga, gb = self.speaker(g).chunk(2, 1)
        z = torch.tanh(a + ca + ga) * torch.sigmoid(b + cb + gb)
        return (self.out(z) + x) * math.sqrt(0.5), self.skip(z)


class Vocoder(nn.Module):
    """Scalar in, mixture of logistics out, frames upsampled by nearest stretch and a smoothing conv, a
    speaker.
    """

    def __init__(self, n_mix: int) -> None:
        super().__init__()
        self.first = old_weight_norm(nn.Conv1d(1, 12, 1))
        self.layers = nn.ModuleList(VocoderLayer(12, 16, 10, 5, 2**i) for i in range(4))
        self.speakers = nn.Embedding(3, 6)
        self.smooth = nn.Conv2d(1, 1, (1, 9), padding=(0, 4), bias=False)
        self.last = nn.ModuleList([nn.ReLU(), nn.Conv1d(10, 10, 1), nn.ReLU(), nn.Conv1d(10, 3 * n_mix, 1)])

    def forward(self, x: Tensor, frames: Tensor, speaker: Tensor) -> Tensor:
        c = self.smooth(F.interpolate(frames.unsqueeze(1), scale_factor=(1, 8), mode="nearest")).squeeze(1)
        g = self.speakers(speaker.view(-1, 1)).transpose(1, 2).expand(-1, -1, x.size(-1))
        h, skips = self.first(x), 0
        for layer in self.layers:
            h, s = layer(h, c, g)
            skips = skips + s
        h = skips * math.sqrt(1.0 / len(self.layers))
        for f in self.last:
            h = f(h)
        return h


class BatchFolded(nn.Module):
    """Dilation d as a plain convolution on every d-th sample: time is folded into the batch and back."""

    def __init__(self, width: int, n_mix: int) -> None:
        super().__init__()
        self.inp = nn.Conv1d(1, width, 1)
        self.convs = nn.ModuleList(nn.Conv1d(width, 2 * width, 2) for _ in range(4))
        self.outs = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(4))
        self.head = nn.Conv1d(width, 3 * n_mix, 1)

    @staticmethod
    def to_batch(x: Tensor, d: int) -> Tensor:
        b, c, t = x.shape
        x = F.pad(x, (0, -t % d))
        return x.view(b, c, -1, d).permute(3, 0, 1, 2).reshape(d * b, c, -1)

    @staticmethod
    def to_time(x: Tensor, d: int, length: int) -> Tensor:
        db, c, t = x.shape
        return x.view(d, db // d, c, t).permute(1, 2, 3, 0).reshape(db // d, c, t * d)[:, :, :length]

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        for i, (conv, out) in enumerate(zip(self.convs, self.outs, strict=True)):
            folded = self.to_batch(h, 2**i)
            a, b = self.to_time(conv(F.pad(folded, (1, 0))), 2**i, h.shape[2]).chunk(2, 1)
            h = h + out(a.tanh() * b.sigmoid())
        return self.head(h)


class RepeatedFrames(nn.Module):
    """Mu-law decoded scalar in; frames repeated and concatenated to the signal; a convolution in two
    groups.
    """

    def __init__(self, n: int, width: int, hop: int) -> None:
        super().__init__()
        self.hop = hop
        self.inp = nn.Conv1d(1 + 4, width, 2)
        self.convs = nn.ModuleList(nn.Conv1d(width, width, 3, dilation=2**i, groups=2) for i in range(3))
        self.mix = nn.ModuleList(weight_norm(nn.Conv1d(width, width, 1)) for _ in range(3))
        self.out = nn.Conv1d(width, n, 1)

    def forward(self, x: Tensor, frames: Tensor) -> Tensor:
        up = torch.repeat_interleave(frames, self.hop, dim=-1)
        h = self.inp(F.pad(torch.cat((x, up), 1), (1, 0)))
        for conv, mix in zip(self.convs, self.mix, strict=True):
            h = h + mix(F.leaky_relu(conv(F.pad(h, (2 * conv.dilation[0], 0))), 0.3))
        return self.out(F.elu_(h))


class TransposedFrames(nn.Module):
    """Frames through ConvTranspose1d; predicts its own position by a delay inside forward; scalar in, 1
    Gaussian out.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Sequential(nn.ConvTranspose1d(3, 6, 8, stride=4, padding=2), nn.LeakyReLU(0.4))
        self.inp = nn.Conv1d(1, width, 4)
        self.convs = nn.ModuleList(nn.Conv1d(width + 6, 2 * width, 2, dilation=d) for d in (1, 2, 4, 8))
        self.out = nn.Conv1d(width, 2, 1)

    def forward(self, x: Tensor, frames: Tensor) -> Tensor:
        c = self.up(frames)
        h = self.inp(F.pad(x, (4, -1)))
        for conv in self.convs:
            y = conv(F.pad(torch.cat([h, c], 1), (conv.dilation[0], 0)))
            gate, new = y.tensor_split(2, dim=1)
            gate = gate.sigmoid()
            h = gate * h + (1 - gate) * new.tanh()
        mean, log_std = self.out(h).unbind(1)
        return torch.stack((mean, F.logsigmoid(log_std) - 1.0), 1)


class ChannelsLastWaveNet(nn.Module):
    """[B, T, C] one-hot in and out: delayed copies stacked, nn.Linear taps, LayerNorm."""

    def __init__(self, n: int, width: int) -> None:
        super().__init__()
        self.inp = nn.Linear(n, width)
        self.taps = nn.ModuleList(nn.Linear(2 * width, 2 * width) for _ in range(4))
        self.norm = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.out = nn.Linear(width, n)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        for i, (tap, norm) in enumerate(zip(self.taps, self.norm, strict=True)):
            before = F.pad(h, (0, 0, 2**i, 0))[:, : h.shape[1]]
            y = tap(torch.stack([before, h], dim=2).flatten(2))
            h = norm(h + F.glu(y, -1))
        return self.out(h)


class UnfoldedWaveNet(nn.Module):
    """Taps as a strided window over the padded signal and an einsum; token indices, position by position
    output.
    """

    def __init__(self, n: int, width: int, speakers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(n, width)
        self.who = nn.Linear(speakers, width)
        self.kernel = nn.ParameterList(torch.empty(width, 4 * width) for _ in range(2))
        self.bias = nn.ParameterList(torch.empty(width) for _ in range(2))
        self.out = nn.Linear(width, n)

    def forward(self, tokens: Tensor, speaker: Tensor) -> Tensor:
        h = self.embed(tokens) + self.who(speaker)[:, None]
        for i, (kernel, bias) in enumerate(zip(self.kernel, self.bias, strict=True)):
            step = 4**i
            windows = F.pad(h, (0, 0, 3 * step, 0)).unfold(1, 3 * step + 1, 1)[..., ::step]
            h = h + F.silu(torch.einsum("btck,ock->bto", windows, kernel.unflatten(1, (-1, 4))) + bias)
        return self.out(h)


def vocoder() -> nn.Module:
    net = Vocoder(3)
    randomise(net, 42, 1.2)
    narrow(net.last[3].bias, 3)
    return net


def batch_folded() -> nn.Module:
    net = BatchFolded(8, 2)
    randomise(net, 43, 1.2)
    narrow(net.head.bias, 2, by=1.5)
    return net


T = 48
CASES = [
    Case(
        "wavenet-onehot",
        lambda: randomise(OneHotWaveNet(16, 8, (1, 2, 4, 1, 2, 4)), 40, 1.2),
        (16, T),
        Categorical(16, encode="onehot"),
        predicts="next",
        start=7,
    ),
    Case(
        "wavenet-embedded",
        lambda: randomise(EmbeddedWaveNet(20, 8), 41),
        (T,),
        Categorical(20, params="B*n"),
        predicts="next",
        start=9,
    ),
    Case(
        "wavenet-vocoder",
        vocoder,
        (1, T),
        LogisticMixture(3, levels=None),
        conds=both(noise(5, T // 8), labels(3)),
        predicts="next",
        start=0.0,
    ),
    Case(
        "wavenet-batch-folded",
        batch_folded,
        (1, 50),
        GaussianMixture(2, value_range=(-1.0, 1.0)),
        predicts="next",
    ),
    Case(
        "wavenet-repeated-frames",
        lambda: randomise(RepeatedFrames(12, 8, 6), 44, 1.2),
        (1, T),
        Categorical(12, encode="mulaw"),
        conds=noise(4, T // 6),
        predicts="next",
        start=6,
    ),
    Case(
        "wavenet-transposed-frames",
        lambda: randomise(TransposedFrames(8), 45),
        (1, T),
        GaussianMixture(1),
        conds=noise(3, T // 4),
    ),
    Case(
        "wavenet-channels-last",
        lambda: randomise(ChannelsLastWaveNet(10, 8), 46),
        (T, 10),
        Categorical(10, encode="onehot", params="B*n"),
        predicts="next",
        layout="TC",
        start=0,
    ),
    Case(
        "wavenet-unfolded",
        lambda: randomise(UnfoldedWaveNet(11, 8, 4), 47),
        (T,),
        Categorical(11, params="B*n"),
        conds=lambda n: (F.one_hot(torch.arange(n) % 4, 4).float(),),
        predicts="next",
        start=3,
    ),
]
