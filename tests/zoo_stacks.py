"""Image models that are causal by shifting, padding, cropping or gathering, and gated stacks."""

# As users write: attributes of submodules are not annotated.
# mypy: disable-error-code="no-any-return,arg-type,index,operator,call-overload,no-untyped-call"

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from fastgen.heads import Bernoulli, Categorical, GaussianMixture
from tests.cases import Case, both, labels, noise, randomise


class GatedLayer(nn.Module):
    """Vertical and horizontal stack with tanh * sigmoid gates; causal by padding, valid convolutions and a
    shift.
    """

    def __init__(self, width: int, n_classes: int, first: bool) -> None:
        super().__init__()
        self.first = first
        self.vertical = nn.Conv2d(width, 2 * width, (2, 3))
        self.to_horizontal = nn.Conv2d(2 * width, 2 * width, 1)
        self.horizontal = nn.Conv2d(width, 2 * width, (1, 2))
        self.residual = nn.Conv2d(width, width, 1)
        self.label = nn.Embedding(n_classes, 2 * width)

    def forward(self, v: Tensor, h: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        term = self.label(label)[:, :, None, None]
        up = self.vertical(F.pad(v, (1, 1, 1, 0)))
        below = F.pad(up, (0, 0, 1, 0))[:, :, :-1]  # the horizontal stack sees the rows above only
        left = self.horizontal(F.pad(h, (2, -1, 0, 0) if self.first else (1, 0, 0, 0)))
        a, b = (left + self.to_horizontal(below) + term).chunk(2, 1)
        out = self.residual(torch.tanh(a) * torch.sigmoid(b))
        va, vb = (up + term).chunk(2, 1)
        return torch.tanh(va) * torch.sigmoid(vb), out if self.first else out + h


class GatedEmbedding(nn.Module):
    """Gated PixelCNN on integers [B, H, W], class-conditional by embedding in every layer."""

    def __init__(self, n: int, width: int, n_classes: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(n, width)
        self.layers = nn.ModuleList(GatedLayer(width, n_classes, i == 0) for i in range(3))
        self.out = nn.Sequential(nn.Conv2d(width, 24, 1), nn.ReLU(True), nn.Conv2d(24, n, 1))

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        v = self.embed(x.view(-1)).view(*x.shape, -1).permute(0, 3, 1, 2)
        h = v
        for layer in self.layers:
            v, h = layer(v, h, label)
        return self.out(h)


class GatedCropped(nn.Module):
    """Gated stacks whose convolutions pad on all sides and crop; a class by one-hot and a map by 1x1,
    weight norm.
    """

    def __init__(self, width: int, n: int, n_classes: int) -> None:
        super().__init__()
        self.n_classes = n_classes
        self.v = nn.ModuleList(
            weight_norm(nn.Conv2d(1 if i == 0 else width, 2 * width, 3, padding=(2, 1))) for i in range(2)
        )
        self.h = nn.ModuleList(
            weight_norm(nn.Conv2d(1 if i == 0 else width, 2 * width, (1, 3), padding=(0, 3 if i == 0 else 2)))
            for i in range(2)
        )
        self.v2h = nn.ModuleList(nn.Conv2d(2 * width, 2 * width, 1, bias=False) for _ in range(2))
        self.of_class = nn.Linear(n_classes, 2 * width, bias=False)
        self.of_map = nn.Conv2d(3, 2 * width, 1)
        self.last = nn.Conv2d(width, n, 1)

    def forward(self, x: Tensor, label: Tensor, features: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        onehot = F.one_hot(label, self.n_classes).to(x.dtype)
        bias = self.of_class(onehot)[..., None, None] + self.of_map(features)
        v = h = x
        for i in range(2):
            v = self.v[i](v)[:, :, : height + (i == 0)]
            if i == 0:
                v = F.pad(v, (0, 0, 1, 0))[:, :, :height]  # row i of the stack has seen rows < i
            side = self.h[i](h)[..., :width] + self.v2h[i](v)
            v = F.glu(v + bias, 1)
            new = F.glu(side + bias, dim=1)
            h = new if i == 0 else h + new
        return self.last(F.elu(h))


class Shifted(nn.Module):
    """Rows and columns moved by slice assignment into zeros; everything in place that can be."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.rows = nn.Conv2d(1, width, 3)
        self.cols = nn.Conv2d(1, width, (1, 2))
        self.deep = nn.ModuleList(nn.Conv2d(width, width, (2, 2)) for _ in range(2))
        self.last = nn.Conv2d(width, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        above = torch.zeros_like(x)
        above[:, :, 1:] = x[:, :, :-1]
        left = x.new_zeros(x.shape)
        left[..., 1:].copy_(x[..., :-1])
        h = self.rows(F.pad(above, (1, 1, 2, 0)))
        h += self.cols(F.pad(left, [1, 0]))
        for conv in self.deep:
            y = torch.zeros(h.shape[0], h.shape[1], h.shape[2] + 1, h.shape[3] + 1, device=x.device)
            y[:, :, 1:, 1:] = h
            h.add_(conv(y).relu_().mul_(0.5))
        logits, means, log_scales = self.last(h.tanh_()).split(2, dim=1)
        log_scales = log_scales.sub_(1.5)
        return torch.cat((logits, means, log_scales), 1)


class ChannelsLast(nn.Module):
    """[B, H, W, C] throughout: neighbours are padded and sliced copies side by side, nn.Linear is the 1x1."""

    def __init__(self, n: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(n, width)
        self.inp = nn.Linear(3 * width, width)
        self.mix = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(2))
        self.norm = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.out = nn.Linear(width, n)

    @staticmethod
    def moved(x: Tensor, down: int, right: int) -> Tensor:
        _, h, w, _ = x.shape
        return F.pad(x, (0, 0, max(right, 0), max(-right, 0), down, 0))[:, :h, max(-right, 0) :][:, :, :w]

    def forward(self, x: Tensor) -> Tensor:
        e = self.table(x)
        h = self.inp(torch.cat([self.moved(e, 0, 1), self.moved(e, 1, 0), self.moved(e, 1, -1)], -1))
        for mix, norm in zip(self.mix, self.norm, strict=True):
            y = norm(h)
            near = [y, self.moved(y, 0, 1), self.moved(y, 1, -1), self.moved(y, 1, 1)]
            h = h + F.gelu(mix(torch.cat(near, dim=-1)))
        return self.out(h)


class Unfolded(nn.Module):
    """Convolution as im2col and matmul, keeping only the columns of pixels that are known."""

    def __init__(self, width: int, n: int) -> None:
        super().__init__()
        sizes = [(12, width), (13 * width, width), (13 * width, n)]
        self.weight = nn.ParameterList(torch.empty(o, i) for i, o in sizes)
        self.bias = nn.ParameterList(torch.empty(o) for _, o in sizes)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        for i, (weight, bias) in enumerate(zip(self.weight, self.bias, strict=True)):
            cols = F.unfold(x, 5, padding=2).view(b, -1, 25, h * w)
            known = cols[:, :, : 12 + (i > 0)].flatten(1, 2)
            x = torch.matmul(weight, known).add(bias[:, None]).view(b, -1, h, w)
            if i < 2:
                x = F.silu(x)
        return x


class SqueezedIndex(nn.Module):
    """Integers with a channel axis [B, 1, H, W], embedded after squeeze; one-sided pads and dilation;
    einsum at the end.
    """

    def __init__(self, n: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(n, width)
        self.first = nn.Conv2d(width, width, (1, 3))
        self.above = nn.Conv2d(width, width, (2, 5))
        self.wide = nn.ModuleList(nn.Conv2d(width, width, 2, dilation=d) for d in (1, 2))
        self.codes = nn.Parameter(torch.empty(n, width))

    def forward(self, x: Tensor) -> Tensor:
        e = self.embed(x.squeeze(1)).movedim(-1, 1)
        left = self.first(F.pad(e, (3, -1)))
        above = self.above(F.pad(e, (2, 2, 2, -1)))
        h = left + above
        for conv, d in zip(self.wide, (1, 2), strict=True):
            h = h + conv(F.leaky_relu(F.pad(h, (d, 0, d, 0)), 0.1)) * 0.7
        return torch.einsum("bchw,nc->bnhw", h, self.codes)


class HighwayBits(nn.Module):
    """Binary image in {-1, 1}; groups of channels by view; a mask of rows known beforehand; a learned start
    pixel.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.empty(1, 1, 1, 1))
        self.inp = nn.Conv2d(1, width, (1, 3))
        self.vert = nn.Conv2d(1, width, (2, 3), padding=(0, 1), groups=1)
        self.gate = nn.ModuleList(nn.Conv2d(width, 2 * width, (1, 2), groups=2) for _ in range(3))
        self.out = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, _, height, width = x.shape
        seen = torch.cat([self.start.expand(b, 1, height, 1), x[..., :-1]], dim=3)
        h = self.inp(F.pad(seen, (2, 0))) + self.vert(F.pad(x, (0, 0, 2, -1)))
        for conv in self.gate:
            y = conv(F.pad(h, (1, 0)))
            t, keep = y.view(b, 2, -1, height, width).transpose(1, 2).flatten(1, 2).chunk(2, 1)
            keep = torch.sigmoid(keep + 1)
            h = keep * h + (1 - keep) * torch.tanh(t)
        off, on = self.out(h).unbind(1)
        return (on - off)[:, None]


CASES = [
    Case(
        "gated-embedding",
        lambda: randomise(GatedEmbedding(12, 8, 4), 20),
        (6, 7),
        Categorical(12),
        conds=labels(4),
        layout="HW",
    ),
    Case(
        "gated-cropped",
        lambda: randomise(GatedCropped(10, 6, 3), 21),
        (1, 7, 6),
        Categorical(6, encode="unit"),
        conds=both(labels(3), noise(3, 7, 6)),
    ),
    Case("shifted-inplace", lambda: randomise(Shifted(12), 22, 1.0), (1, 8, 7), GaussianMixture(2)),
    Case("channels-last", lambda: randomise(ChannelsLast(9, 10), 23), (6, 6), Categorical(9), layout="HW"),
    Case("unfolded", lambda: randomise(Unfolded(8, 5), 24, 1.6), (1, 6, 7), Categorical(5, encode="symmetric")),
    Case(
        "squeezed-index",
        lambda: randomise(SqueezedIndex(7, 9), 25),
        (1, 7, 7),
        Categorical(7, params="B(n*C)*"),
    ),
    Case("highway-bits", lambda: randomise(HighwayBits(8), 26), (1, 6, 8), Bernoulli(encode="symmetric")),
]
