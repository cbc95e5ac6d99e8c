"""Image models whose convolutions are masked, each in another hand."""

# As users write: attributes of submodules are not annotated.
# mypy: disable-error-code="no-any-return,arg-type,index,operator,call-overload,no-untyped-call"

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastgen.heads import Bernoulli, Categorical
from tests.cases import Case, noise, randomise


def raster_mask(kind: str, rows: int, cols: int) -> Tensor:
    """[rows, cols] mask of the pixels before the centre, "B" with the centre."""
    mask = torch.zeros(rows, cols)
    mask[: rows // 2] = 1
    mask[rows // 2, : cols // 2 + (kind == "B")] = 1
    return mask


class MaskedConv2d(nn.Conv2d):
    """Mask multiplied into the weight at every call."""

    mask: Tensor

    def __init__(self, kind: str, *args: int, **kwargs: int) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("mask", raster_mask(kind, *self.kernel_size))

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * self.mask, self.bias)


class Arctangent(nn.Module):
    """An activation that is no layer of torch's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = MaskedConv2d("A", 1, width, 5, padding=2)
        self.out = nn.Conv2d(width, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(2 / torch.pi * torch.atan(self.first(x)))


def sequential() -> nn.Module:
    """The textbook PixelCNN: one nn.Sequential with BatchNorm."""
    net = nn.Sequential(
        MaskedConv2d("A", 1, 12, 7, padding=3),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        MaskedConv2d("B", 12, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        MaskedConv2d("B", 12, 12, 3, padding=1),
        nn.ELU(alpha=0.5),
        nn.Conv2d(12, 16, 1),
    )
    return randomise(net, 1, 2.0)


class InPlaceMask(nn.Conv2d):
    """Mask multiplied into `weight.data` in place, in forward."""

    mask: Tensor

    def __init__(self, kind: str, *args: int, **kwargs: int) -> None:
        super().__init__(*args, **kwargs)
        assert kind in "AB"
        self.register_buffer("mask", torch.ones_like(self.weight.data))
        _, _, kh, kw = self.weight.shape
        self.mask[:, :, kh // 2, kw // 2 + (kind == "B") :] = 0
        self.mask[:, :, kh // 2 + 1 :] = 0

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data *= self.mask
        return super().forward(x)


class BinaryNet(nn.Module):
    """Binary image; dropout, and left in train mode as it came from training."""

    def __init__(self) -> None:
        super().__init__()
        self.first = InPlaceMask("A", 1, 10, 5, padding=2)
        self.blocks = nn.ModuleList(InPlaceMask("B", 10, 10, 3, padding=1) for _ in range(3))
        self.drop = nn.Dropout2d(0.5)
        self.last = nn.Conv2d(10, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu_(self.first(x), 0.2)
        for block in self.blocks:
            h += self.drop(F.leaky_relu_(block(h), 0.2))
        return self.last(F.dropout(h, 0.3, self.training))


class OnlyBefore(nn.Module):
    """A parametrization: what the convolution sees as its weight is masked already."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight.masked_fill(self.mask == 0, 0.0)


class ResidualNet(nn.Module):
    """1x1 - masked 3x3 - 1x1 residual blocks with GELU; integers in, scaled inside."""

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.levels = levels
        self.first = self.masked("A", nn.Conv2d(1, 16, 5, padding=2))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.GELU(),
                nn.Conv2d(16, 8, 1),
                nn.GELU(approximate="tanh"),
                self.masked("B", nn.Conv2d(8, 8, 3, padding=1, bias=False)),
                nn.SiLU(),
                nn.Conv2d(8, 16, 1),
            )
            for _ in range(2)
        )
        self.head = nn.Conv2d(16, levels, 1)

    @staticmethod
    def masked(kind: str, conv: nn.Conv2d) -> nn.Module:
        kh, kw = conv.kernel_size
        return parametrize.register_parametrization(conv, "weight", OnlyBefore(raster_mask(kind, kh, kw)))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(2 * x.float() / (self.levels - 1) - 1)
        for block in self.blocks:
            h = h + block(h)
        return self.head(F.gelu(h))


class Normalised(nn.Module):
    """LayerNorm over the channels by permute, a residual block around each masked conv; logits of the bit
    last.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = MaskedConv2d("A", 1, width, 7, padding=3)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.convs = nn.ModuleList(MaskedConv2d("B", width, width, 5, padding=2, bias=False) for _ in range(2))
        self.out = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x * 2 - 1)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            h = h + conv(F.relu(norm(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()))
        return self.out(h.permute(0, 2, 3, 1)).log_softmax(-1)


class NumpyMasks(nn.Module):
    """No conv modules at all: a list of parameters, and masks made by NumPy in every forward."""

    def __init__(self, width: int, n: int) -> None:
        super().__init__()
        sizes = [(width, 1, 5, 5), (width, width, 3, 3), (width, width, 3, 3), (n, width, 1, 1)]
        self.ws = nn.ParameterList(torch.empty(s) for s in sizes)
        self.bs = nn.ParameterList(torch.empty(s[0]) for s in sizes)

    def forward(self, x: Tensor) -> Tensor:
        for i, (w, b) in enumerate(zip(self.ws, self.bs, strict=True)):
            k = w.shape[-1]
            flat = np.arange(k * k) < k * k // 2 + (i > 0)
            mask = torch.from_numpy(flat.reshape(k, k).astype(np.float32)).to(x.device)
            x = F.conv2d(x if i == 0 else F.elu(x), w * mask, b, padding=k // 2)
        return x


class DepthwiseDilated(nn.Module):
    """Separable blocks: masked depthwise conv with growing dilation, then 1x1; a map is concatenated to the
    features.
    """

    def __init__(self, n: int) -> None:
        super().__init__()
        self.first = MaskedConv2d("A", 1, 10, 3, padding=1)
        self.depth = nn.ModuleList(MaskedConv2d("B", 12, 12, 3, padding=d, dilation=d, groups=12) for d in (1, 2, 3))
        self.point = nn.ModuleList(nn.Conv2d(12, 10, 1) for _ in self.depth)
        self.mixed = MaskedConv2d("B", 10, 10, 3, padding=2, dilation=2, groups=2)
        self.last = nn.Conv2d(10, n, 1)

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        h = self.first(x)
        for depth, point in zip(self.depth, self.point, strict=True):
            h = point(F.silu(depth(torch.cat([h, features], dim=1)))) + h
        return self.last(F.relu6(self.mixed(h)))


class TiedOneHot(nn.Module):
    """Integers [B, H, W] made one-hot in forward; the same masked layer runs three times."""

    def __init__(self, n: int, width: int) -> None:
        super().__init__()
        self.n = n
        self.inp = InPlaceMask("A", n, width, 3, padding=1)
        self.shared = InPlaceMask("B", width, width, 3, padding=1)
        self.out = nn.Conv2d(width, n, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(F.one_hot(x, self.n).permute(0, 3, 1, 2).float())
        for _ in range(3):
            h = h + torch.tanh(self.shared(h))
        return self.out(h)


CASES = [
    Case(
        "masked-arctangent",
        lambda: randomise(Arctangent(8), 70, 2.0),
        (1, 6, 7),
        Categorical(5, encode="symmetric"),
    ),
    Case("masked-sequential", sequential, (1, 8, 8), Categorical(16, encode="unit")),
    Case("masked-inplace-binary", lambda: randomise(BinaryNet(), 2).train(), (1, 8, 8), Bernoulli()),
    Case("masked-parametrized", lambda: randomise(ResidualNet(8), 3), (1, 7, 9), Categorical(8)),
    Case(
        "masked-numpy",
        lambda: randomise(NumpyMasks(10, 6), 4, 2.0),
        (1, 6, 8),
        Categorical(6, encode="symmetric"),
    ),
    Case(
        "masked-layernorm",
        lambda: randomise(Normalised(9), 11),
        (1, 7, 7),
        Categorical(2, encode="unit", params="B*n"),
    ),
    Case(
        "depthwise-dilated",
        lambda: randomise(DepthwiseDilated(5), 9, 1.7),
        (1, 8, 8),
        Categorical(5, encode="symmetric"),
        conds=noise(2, 8, 8),
    ),
    Case("tied-onehot", lambda: randomise(TiedOneHot(6, 10), 10), (7, 7), Categorical(6), layout="HW"),
]
