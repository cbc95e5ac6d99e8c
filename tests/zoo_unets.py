"""Image models with strides: down and up again, in the manner of PixelCNN++, and mixtures of logistics."""

# As users write: attributes of submodules are not annotated.
# mypy: disable-error-code="no-any-return,arg-type,index,operator,call-overload,no-untyped-call"

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import weight_norm as old_weight_norm
from torch.nn.utils.parametrizations import weight_norm

from fastgen.heads import Categorical, GaussianMixture, LogisticMixture
from tests.cases import Case, labels, narrow, noise, randomise


def concat_elu(x: Tensor) -> Tensor:
    """ELU of x and of -x."""
    return F.elu(torch.cat([x, -x], dim=1))


def down(x: Tensor) -> Tensor:
    """One row down, zeros in front."""
    return F.pad(x, (0, 0, 1, 0))[:, :, :-1]


def right(x: Tensor) -> Tensor:
    """One column to the right, zeros in front."""
    return torch.cat([x.new_zeros(x[..., :1].shape), x[..., :-1]], dim=-1)


class Down(nn.Module):
    """Down-shifted (`right=False`) or down-right-shifted convolution, maybe strided, with weight norm."""

    def __init__(
        self, i: int, o: int, k: tuple[int, int], right: bool = False, stride: int = 1, old: bool = True
    ) -> None:
        super().__init__()
        side = (k[1] - 1, 0) if right else (k[1] // 2, k[1] // 2)
        self.pad = (*side, k[0] - 1, 0)
        norm: Any = old_weight_norm if old else weight_norm
        self.conv = norm(nn.Conv2d(i, o, k, stride=stride))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.pad))


class Gate(nn.Module):
    """PixelCNN++ residual: concat_elu, conv, plus a skip, concat_elu, conv, gate."""

    def __init__(self, width: int, right: bool, skip: int) -> None:
        super().__init__()
        k = (2, 2) if right else (2, 3)
        self.first = Down(2 * width, width, k, right)
        self.skip = nn.Conv2d(2 * skip * width, width, 1) if skip else None
        self.second = Down(2 * width, 2 * width, k, right)

    def forward(self, x: Tensor, *skips: Tensor) -> Tensor:
        y = self.first(concat_elu(x))
        if self.skip is not None:
            y += self.skip(concat_elu(torch.cat(skips, 1)))
        a, b = torch.chunk(self.second(F.dropout(concat_elu(y), 0.5, self.training)), 2, dim=1)
        return x + a * torch.sigmoid(b)


class TinyPixelCNNpp(nn.Module):
    """Two resolutions, two stacks, a ones channel, ConvTranspose2d up with a crop; 10 parameters per
    mixture of RGB.
    """

    def __init__(self, width: int, n_mix: int) -> None:
        super().__init__()
        self.v0, self.h0 = Down(4, width, (2, 3)), Down(4, width, (2, 1), True)
        self.v1, self.h1 = Gate(width, False, 0), Gate(width, True, 1)
        self.v_down = Down(width, width, (2, 3), stride=2)
        self.h_down = Down(width, width, (2, 2), True, stride=2)
        self.v2, self.h2 = Gate(width, False, 0), Gate(width, True, 1)
        self.v_up = old_weight_norm(nn.ConvTranspose2d(width, width, (2, 3), 2, (0, 1), (0, 1)))
        self.h_up = old_weight_norm(nn.ConvTranspose2d(width, width, (2, 2), 2))
        self.v3, self.h3 = Gate(width, False, 1), Gate(width, True, 2)
        self.nin = nn.Conv2d(width, 10 * n_mix, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        v = down(self.v0(x))
        h = v + right(self.h0(x))
        v = self.v1(v)
        h = self.h1(h, v)
        keep_v, keep_h = v, h
        v, h = self.v_down(v), self.h_down(h)
        v = self.v2(v)
        h = self.h2(h, v)
        rows, cols = x.shape[-2:]
        v, h = self.v_up(v)[..., :rows, :cols], self.h_up(h)[..., :rows, :cols]
        v = self.v3(v, keep_v)
        return self.nin(F.elu(self.h3(h, v, keep_h)))


class NearestUp(nn.Module):
    """Grey U-Net: strided conv down, nearest upsampling, shift by the stride; new weight norm; class by
    embedding.
    """

    def __init__(self, width: int, n_mix: int, n_classes: int) -> None:
        super().__init__()
        self.inp = Down(1, width, (3, 3), old=False)
        self.left = Down(1, width, (1, 2), True, old=False)
        self.coarse = Down(width, width, (2, 2), True, stride=2, old=False)
        self.deep = Down(width, 2 * width, (2, 2), True, old=False)
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.fuse = nn.Conv2d(2 * width, width, 1)
        self.label = nn.Embedding(n_classes, width)
        self.last = nn.Conv2d(width, 3 * n_mix, 1)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        h = down(self.inp(x)) + right(self.left(x)) + self.label(label)[:, :, None, None]
        low = F.glu(self.deep(F.relu(self.coarse(h))), 1)
        low = F.interpolate(low, scale_factor=2, mode="nearest") + self.up(low).tanh()
        return self.last(F.softplus(self.fuse(torch.cat([h, low], 1))))


class PixelShuffle(nn.Module):
    """Space to depth and back: coarse blocks of 2x2 pixels, moved down or right by a block, condition fine
    layers.
    """

    def __init__(self, width: int, n: int) -> None:
        super().__init__()
        self.above = nn.Conv2d(4, width, (2, 3), padding=(0, 1))
        self.expand = nn.Conv2d(width, 4 * width, 1)
        self.fine = nn.Conv2d(1, width, (1, 2))
        self.mix = nn.Conv2d(width, width, (1, 2))
        self.last = nn.Conv2d(width, n, 1)

    def forward(self, x: Tensor) -> Tensor:
        blocks = F.pixel_unshuffle(x, 2)
        above = self.above(F.pad(blocks, (0, 0, 2, -1)))  # whole rows of blocks are known, blocks to the left are not
        before = F.pad(x[:, :, :, :-1], (2, 0))
        fine = self.fine(before)
        low = F.pixel_shuffle(self.expand(F.elu(above)), 2)
        h = F.elu(fine + low)
        return self.last(h + self.mix(F.pad(h, (1, 0))).tanh())


class AveragedRows(nn.Module):
    """Context from average pooling of finished pairs of rows; a map is added by 1x1; a learned constant
    log-scale.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.left = nn.Conv2d(1, width, (1, 3))
        self.above = nn.Conv2d(1, width, (2, 3), padding=(0, 1))
        self.pooled = nn.Conv2d(1, width, (1, 3), padding=(0, 1))
        self.map = nn.Conv2d(2, width, 1)
        self.mean, self.spread = nn.Conv2d(width, 1, 1), nn.Parameter(torch.empty(1))

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        pooled = F.pad(F.avg_pool2d(x, 2), (0, 0, 1, -1)).repeat_interleave(2, 2).repeat_interleave(2, 3)
        h = self.left(F.pad(x, (3, -1))) + self.above(F.pad(x, (0, 0, 2, -1)))
        h = (h + self.pooled(pooled) + self.map(features)).sin()
        mean = self.mean(h)
        return torch.cat([mean, (self.spread - 1).view(1, 1, 1, 1).expand_as(mean)], dim=1)


def tiny_pixelcnnpp() -> nn.Module:
    net = TinyPixelCNNpp(8, 2)
    randomise(net, 30, 1.0)
    narrow(net.nin.bias, 2, colours=3)
    return net


def nearest_up() -> nn.Module:
    net = NearestUp(8, 3, 5)
    randomise(net, 31, 1.3)
    narrow(net.last.bias, 3)
    return net


CASES = [
    Case("unet-pixelcnnpp", tiny_pixelcnnpp, (3, 6, 8), LogisticMixture(2)),
    Case("unet-nearest", nearest_up, (1, 8, 8), LogisticMixture(3, levels=32), conds=labels(5)),
    Case(
        "pixel-shuffle",
        lambda: randomise(PixelShuffle(8, 6), 32),
        (1, 6, 8),
        Categorical(6, encode="symmetric"),
    ),
    Case(
        "pooled-rows",
        lambda: randomise(AveragedRows(8), 33),
        (1, 8, 6),
        GaussianMixture(1),
        conds=noise(2, 8, 6),
    ),
]
