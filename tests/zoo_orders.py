"""Orders other than raster: of planes, of colours within a pixel, of rows and columns, of sublattices, of a vector's values
and of time.
"""

# As users write: attributes of submodules are not annotated.
# mypy: disable-error-code="no-any-return,arg-type,index,operator,call-overload,no-untyped-call"

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.heads import Bernoulli, Categorical, GaussianMixture, LogisticMixture
from tests.cases import Case, narrow, randomise
from tests.zoo_colour import colour_mask
from tests.zoo_masked import MaskedConv2d


class Planes(nn.Module):
    """One colour plane after another: each by its own raster context, and by all of the planes before it."""

    def __init__(self, width: int, n: int) -> None:
        super().__init__()
        self.own = nn.ModuleList(MaskedConv2d("A", 1, width, 3, padding=1) for _ in range(3))
        self.before = nn.ModuleList(nn.Conv2d(c, width, 3, padding=1) for c in (1, 2))
        self.out = nn.ModuleList(nn.Conv2d(width, n, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        planes = []
        for c in range(3):
            h = self.own[c](x[:, c : c + 1])
            if c:
                h = h + self.before[c - 1](x[:, :c])
            planes.append(self.out[c](torch.tanh(h)))
        return torch.stack(planes, 2)


class LastColourFirst(nn.Module):
    """Pixels in raster order, their colours backwards."""

    def __init__(self, width: int, n: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3 * n, 1)
        colour, wide = 2 - torch.arange(3), 2 - torch.arange(width) % 3
        self.register_buffer("mask_a", colour_mask(self.a, "A", colour, wide))
        self.register_buffer("mask_b", colour_mask(self.b, "B", wide, colour.repeat_interleave(n)))

    def forward(self, x: Tensor) -> Tensor:
        h = F.elu(F.conv2d(x, self.a.weight * self.get_buffer("mask_a"), self.a.bias, padding=1))
        return F.conv2d(h, self.b.weight * self.get_buffer("mask_b"), self.b.bias)


class Turned(nn.Module):
    """A masked network whose masks are turned with the order: rows from below, or columns before rows."""

    def __init__(self, width: int, n_mix: int, columns: bool) -> None:
        super().__init__()
        self.columns = columns
        self.first = MaskedConv2d("A", 1, width, 5, padding=2)
        self.deep = nn.ModuleList(MaskedConv2d("B", width, width, 3, padding=1) for _ in range(2))
        self.out = nn.Conv2d(width, 3 * n_mix, 1)

    def turned(self, conv: nn.Module, x: Tensor) -> Tensor:
        mask = conv.mask.t() if self.columns else conv.mask.flip(0)
        return F.conv2d(x, conv.weight * mask, conv.bias, padding=conv.padding)

    def forward(self, x: Tensor) -> Tensor:
        h = self.turned(self.first, x)
        for conv in self.deep:
            h = h + self.turned(conv, F.relu(h))
        return self.out(F.relu(h))


class Checkerboard(nn.Module):
    """Spins of a lattice: the even sublattice by rows, then every odd spin by its neighbours."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.rows = MaskedConv2d("A", 1, 1, 5, padding=2)
        self.a, self.b = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, 1, 1)
        self.register_buffer("odd", (torch.arange(size)[:, None] + torch.arange(size)).remainder(2).float())

    def forward(self, x: Tensor) -> Tensor:
        odd = self.get_buffer("odd")
        h = self.b(torch.tanh(self.a(x * (1 - odd))))
        return torch.where(odd.bool(), h, self.rows(x * (1 - odd)))


class PermutedVector(nn.Module):
    """A masked network over a vector whose values come in an order of their own."""

    def __init__(self, order: Tensor, width: int) -> None:
        super().__init__()
        d = len(order)
        self.a, self.b = nn.Linear(d, width), nn.Linear(width, d)
        degree = torch.arange(width) % (d - 1)
        self.register_buffer("ma", (degree[:, None] >= order).float())
        self.register_buffer("mb", (order[:, None] > degree).float())

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(F.linear(x, self.get_buffer("ma") * self.a.weight, self.a.bias))
        return F.linear(h, self.get_buffer("mb") * self.b.weight, self.b.bias)


class Backwards(nn.Module):
    """A causal network of dilated convolutions in the other direction of time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, width, 1)
        self.convs = nn.ModuleList(nn.Conv1d(width, width, 2, dilation=2**k) for k in range(3))
        self.out = nn.Conv1d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(F.pad(x[..., 1:], (0, 1)))
        for k, conv in enumerate(self.convs):
            h = h + torch.tanh(conv(F.pad(h, (0, 2**k))))
        mean, log_scale = self.out(h).chunk(2, 1)
        return torch.cat([mean.tanh(), log_scale.clamp(-4, 0)], 1)


class PlanesOfTime(nn.Module):
    """Two series, the one after the other, fed delayed: the second reads all of the first, and itself before."""

    def __init__(self, width: int, n: int) -> None:
        super().__init__()
        self.own = nn.ModuleList(nn.Conv1d(1, width, 2) for _ in range(2))
        self.first, self.out = (
            nn.Conv1d(1, width, 3, padding=1),
            nn.ModuleList(nn.Conv1d(width, n, 1) for _ in range(2)),
        )

    def forward(self, x: Tensor) -> Tensor:
        a, b = (own(F.pad(x[:, c : c + 1], (1, 0))) for c, own in enumerate(self.own))
        return torch.stack([self.out[0](torch.tanh(a)), self.out[1](torch.tanh(b + self.first(x[:, :1])))], 2)


def turned(columns: bool, seed: int) -> nn.Module:
    net = Turned(8, 2, columns)
    randomise(net, seed)
    narrow(net.out.bias, 2)
    return net


def raster(height: int, width: int) -> Tensor:
    return torch.arange(height * width).view(height, width)


VECTOR = torch.tensor([6, 2, 9, 0, 5, 3, 8, 1, 7, 4])
ODD = (torch.arange(6)[:, None] + torch.arange(6)).remainder(2)
SUBLATTICES = torch.argsort(torch.argsort((ODD * 36 + raster(6, 6)).reshape(-1))).view(6, 6)

CASES = [
    Case(
        "order-planes",
        lambda: randomise(Planes(6, 5), 60, 2.0),
        (3, 5, 4),
        Categorical(5, encode="symmetric", params="BnC*"),
        order=torch.arange(60).view(3, 5, 4),
    ),
    Case(
        "order-last-colour-first",
        lambda: randomise(LastColourFirst(12, 4), 61, 2.0),
        (3, 4, 5),
        Categorical(4, encode="unit", params="B(C*n)*"),
        order=raster(4, 5)[None] * 3 + torch.tensor([2, 1, 0])[:, None, None],
    ),
    Case("order-bottom-up", lambda: turned(False, 62), (1, 6, 5), LogisticMixture(2), order=raster(6, 5).flip(0)),
    Case("order-columns", lambda: turned(True, 63), (1, 5, 6), LogisticMixture(2), order=raster(6, 5).t()),
    Case(
        "order-sublattices",
        lambda: randomise(Checkerboard(6, 7), 64, 3.0),
        (1, 6, 6),
        Bernoulli(),
        order=SUBLATTICES,
    ),
    Case(
        "order-vector",
        lambda: randomise(PermutedVector(VECTOR, 30), 65, 2.5),
        (10,),
        Bernoulli(),
        order=VECTOR,
    ),
    Case(
        "order-planes-next",
        lambda: randomise(PlanesOfTime(6, 4), 67, 2.0),
        (2, 9),
        Categorical(4, encode="symmetric", params="BnC*"),
        predicts="next",
        start=2.0,
        order=torch.arange(18).view(2, 9),
    ),
    Case(
        "order-backwards",
        lambda: randomise(Backwards(6), 66),
        (1, 20),
        GaussianMixture(1),
        order=torch.arange(19, -1, -1),
    ),
]
