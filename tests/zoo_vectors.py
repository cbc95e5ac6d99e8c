"""Vectors, autoregressive by masks on linear layers; and odd ones: data in a form that is not the obvious
one.
"""

# As users write: attributes of submodules are not annotated.
# mypy: disable-error-code="no-any-return,arg-type,index,operator,call-overload,no-untyped-call"

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.heads import Bernoulli, Categorical, GaussianMixture, LogisticMixture
from tests.cases import Case, labels, narrow, randomise


class MaskedMLP(nn.Module):
    """Binary vector [B, D]; natural order, degrees spread over the hidden units; a direct path from input
    to output.
    """

    def __init__(self, d: int, width: int) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(d, width), nn.Linear(width, d), nn.Linear(d, d, bias=False)
        degree = torch.arange(width) % (d - 1)
        order = torch.arange(d)
        self.register_buffer("ma", (degree[:, None] >= order).float())
        self.register_buffer("mb", (order[:, None] > degree).float())
        self.register_buffer("mc", (order[:, None] > order).float())

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(F.linear(x, self.get_buffer("ma") * self.a.weight, self.a.bias))
        out = F.linear(h, self.get_buffer("mb") * self.b.weight, self.b.bias)
        return out + x @ (self.c.weight * self.get_buffer("mc")).t()


class MaskedTable(nn.Module):
    """Integers [B, D] through embeddings, a block-triangular matrix, a class term; logits flat as [B, D *
    n].
    """

    def __init__(self, d: int, n: int, width: int, n_classes: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(n, width)
        self.hidden, self.out = (
            nn.Parameter(torch.empty(d * width, d * width)),
            nn.Parameter(torch.empty(d * n, d * width)),
        )
        self.label = nn.Embedding(n_classes, d * width)
        self.d, self.n, self.width = d, n, width

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        site, value = (
            torch.arange(self.d).repeat_interleave(self.width),
            torch.arange(self.d).repeat_interleave(self.n),
        )
        h = F.linear(self.embed(x).flatten(1), self.hidden * (site[None] < site[:, None]))
        h = torch.tanh(h + self.label(label))
        return F.linear(h, torch.where(site[None] <= value[:, None], self.out, 0.0))


class Stereo(nn.Module):
    """Two channels, right given left: the second half of the network also reads the left value of its own
    position.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.past = nn.ModuleList(nn.Conv1d(2 if i == 0 else width, width, 2, dilation=2**i) for i in range(3))
        self.left = nn.Conv1d(width, 2, 1)
        self.right = nn.Conv1d(width + 1, 2, 1)
        self.hidden = nn.Conv1d(width + 1, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.pad(x, (1, -1))
        for i, conv in enumerate(self.past):
            h = torch.tanh(conv(F.pad(h, (2**i, 0))))
        now = x[:, :1]
        right = self.right(torch.cat([self.hidden(torch.cat([h, now], 1)).tanh(), now], 1))
        return torch.cat([self.left(h), right], dim=1) - 0.5


class AsImageOfOneRow(nn.Module):
    """A WaveNet of Conv2d on [B, C, 1, T], its weights standardised in forward, output squeezed."""

    def __init__(self, width: int, n_mix: int) -> None:
        super().__init__()
        self.inp = nn.Conv2d(1, width, (1, 3))
        self.convs = nn.ModuleList(nn.Conv2d(width, 2 * width, (1, 2), dilation=(1, 2**i)) for i in range(4))
        self.out = nn.Conv2d(width, 3 * n_mix, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(F.pad(x.unsqueeze(2), (2, 0)))
        for i, conv in enumerate(self.convs):
            std, mean = torch.std_mean(conv.weight, (1, 2, 3), keepdim=True)
            weight = (conv.weight - mean) / (std + 1e-5) * 0.25
            y = F.conv2d(F.pad(h, (2**i, 0)), weight, conv.bias, dilation=(1, 2**i))
            a, b = y[:, ::2], y[:, 1::2]
            h = h + a.tanh() * (0.5 * b.tanh() + 0.5)
        return self.out(F.leaky_relu(h)).squeeze(2)


def one_row() -> nn.Module:
    net = AsImageOfOneRow(8, 3)
    randomise(net, 53)
    narrow(net.out.bias, 3)
    return net


CASES = [
    Case("masked-mlp", lambda: randomise(MaskedMLP(14, 40), 50, 2.5), (14,), Bernoulli()),
    Case(
        "masked-table",
        lambda: randomise(MaskedTable(8, 5, 4, 3), 51, 2.0),
        (8,),
        Categorical(5, params="B(*n)"),
        conds=labels(3),
    ),
    Case("stereo", lambda: randomise(Stereo(8), 48), (2, 40), GaussianMixture(1, params="B(C*n)*")),
    Case("wavenet-one-row", one_row, (1, 48), LogisticMixture(3), predicts="next", start=0.0),
]
