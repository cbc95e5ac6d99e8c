"""RGB models with sub-pixel steps, R then G then B: by masked channel groups, by unrolling, by a masked
head.
"""

# As users write: attributes of submodules are not annotated.
# mypy: disable-error-code="no-any-return,arg-type,index,operator,call-overload,no-untyped-call"

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.heads import Categorical, GaussianMixture
from tests.cases import Case, randomise
from tests.zoo_masked import MaskedConv2d, raster_mask


def colour_mask(conv: nn.Conv2d, kind: str, colour_in: Tensor, colour_out: Tensor) -> Tensor:
    """Full mask [O, I, kh, kw] in the order R, G, B: "A" sees earlier colours of its pixel, "B" its own
    too.
    """
    _, _, kh, kw = conv.weight.shape
    mask = raster_mask("A", kh, kw).expand_as(conv.weight).clone()
    less = colour_in[None] < colour_out[:, None]
    mask[:, :, kh // 2, kw // 2] = (less if kind == "A" else less | (colour_in[None] == colour_out[:, None])).float()
    return mask


class ThirdsRGB(nn.Module):
    """Colours as contiguous thirds of the channels; output [B, 3 * n, H, W], a colour's parameters
    together.
    """

    def __init__(self, width: int, n: int) -> None:
        super().__init__()
        sizes = [("A", 3, width, 5), ("B", width, width, 3), ("B", width, 3 * n, 1)]
        self.convs = nn.ModuleList(nn.Conv2d(i, o, k, padding=k // 2) for _, i, o, k in sizes)
        for m, (kind, i, o, _) in enumerate(sizes):
            conv = self.convs[m]
            assert isinstance(conv, nn.Conv2d)
            mask = colour_mask(conv, kind, torch.arange(i) * 3 // i, torch.arange(o) * 3 // o)
            self.register_buffer(f"mask{m}", mask)

    def forward(self, x: Tensor) -> Tensor:
        for m, conv in enumerate(self.convs):
            x = F.conv2d(x, conv.weight * self.get_buffer(f"mask{m}"), conv.bias, padding=conv.padding)
            if m < 2:
                x = torch.relu_(x)
        return x


class InterleavedRGB(nn.Module):
    """Colour of channel c is c % 3; output viewed as [B, n, 3, H, W]."""

    def __init__(self, width: int, n: int) -> None:
        super().__init__()
        self.n = n
        self.a = nn.Conv2d(3, width, 3, padding=1)
        self.b = nn.Conv2d(width, width, 3, padding=1)
        self.c = nn.Conv2d(width, 3 * n, 1)
        for kind, conv in zip("ABB", (self.a, self.b, self.c), strict=True):
            mask = colour_mask(conv, kind, *(torch.arange(s) % 3 for s in (conv.in_channels, conv.out_channels)))
            conv.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a._conv_forward(x, self.a.weight * self.a.mask, self.a.bias)
        y = self.b._conv_forward(x.tanh(), self.b.weight * self.b.mask, self.b.bias)
        y = F.silu(y) + x
        return F.conv2d(y, self.c.weight * self.c.mask, self.c.bias).unflatten(1, (self.n, 3))


class UnrolledRGB(nn.Module):
    """Colours folded into the width: a grey image [H, 3 W] in raster order, so that R, G, B need no channel
    masks.
    """

    def __init__(self, n: int) -> None:
        super().__init__()
        self.first = MaskedConv2d("A", 1, 12, 5, padding=2)
        self.deep = MaskedConv2d("B", 12, 12, 5, padding=2)
        self.out = nn.Conv2d(12, n, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        y = F.softplus(self.first(x.permute(0, 2, 3, 1).reshape(b, 1, h, w * c)))
        y = self.out(F.hardtanh(self.deep(y), -2, 2))
        return y.view(b, -1, h, w, c).permute(0, 1, 4, 2, 3)


class GaussianRGB(nn.Module):
    """Mean and log-scale per colour, output [B, 2, 3, H, W]."""

    def __init__(self, per_colour: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 3 * per_colour, 3, padding=1)
        self.b = nn.Conv2d(3 * per_colour, 6, 3, padding=1)
        c = torch.arange(3)
        thirds = c.repeat_interleave(per_colour)
        self.register_buffer("mask_a", colour_mask(self.a, "A", c, thirds))
        self.register_buffer("mask_b", colour_mask(self.b, "B", thirds, c.repeat(2)))

    def forward(self, x: Tensor) -> Tensor:
        h = F.conv2d(x, self.a.weight * self.get_buffer("mask_a"), self.a.bias, padding=1)
        h = F.conv2d(torch.tanh(h), self.b.weight * self.get_buffer("mask_b"), self.b.bias, padding=1)
        mean, log_scale = h.chunk(2, dim=1)
        return torch.stack([mean, log_scale.clamp(-5, 2) - 1], dim=1)


class ColoursLast(nn.Module):
    """An image [B, H, W, 3]; past pixels in one trunk, then a masked linear layer over the colours of the
    pixel.
    """

    def __init__(self, width: int, n: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.ZeroPad2d((1, 1, 2, -1)), nn.Conv2d(3, width, (2, 3)), nn.ELU())
        self.left = nn.Conv2d(3, width, (1, 2))
        self.norm = nn.LayerNorm(width)
        self.colour = nn.Linear(3, 3 * n, bias=False)
        self.out = nn.Linear(width, 3 * n)
        self.n = n

    def forward(self, x: Tensor) -> Tensor:
        y = x.permute(0, 3, 1, 2)
        h = self.trunk(y) + self.left(F.pad(y, (2, -1)))
        h = F.gelu(self.norm(h.permute(0, 2, 3, 1)))
        earlier = torch.ones(3, 3).tril(-1).to(x)[None].expand(self.n, 3, 3).reshape(-1, 3)  # output k * 3 + c
        out = self.out(h) + F.linear(x, self.colour.weight * earlier)
        return out.permute(0, 3, 1, 2)


CASES = [
    Case(
        "rgb-thirds",
        lambda: randomise(ThirdsRGB(18, 6), 5, 2.0),
        (3, 5, 6),
        Categorical(6, encode="symmetric", params="B(C*n)*"),
    ),
    Case(
        "rgb-interleaved",
        lambda: randomise(InterleavedRGB(15, 7), 6, 2.0),
        (3, 6, 5),
        Categorical(7, encode="unit", params="BnC*"),
    ),
    Case(
        "rgb-unrolled",
        lambda: randomise(UnrolledRGB(5), 7, 2.0),
        (3, 5, 5),
        Categorical(5, encode="symmetric"),
    ),
    Case("rgb-gaussian", lambda: randomise(GaussianRGB(4), 8), (3, 6, 6), GaussianMixture(1, params="BnC*")),
    Case(
        "rgb-colours-last",
        lambda: randomise(ColoursLast(10, 5), 52),
        (5, 6, 3),
        Categorical(5, encode="symmetric", params="B(n*C)*"),
        layout="HWC",
    ),
]
