"""What sampled values and conditioning share: tensors, batches, layers. Of conditioning every number is kept; of sampled values
none is frozen. Against the slow loop, without the proof, for labels that are not the example's."""

# As users write: modules are not annotated in full.
# mypy: ignore-errors

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastgen
from fastgen.heads import Categorical
from fastgen.nn import MaskedConv2d

CLASSES, N, WIDTH = 4, 5, 6
HEAD = Categorical(N, encode="symmetric", params="B(n*C)*")
LABELS = (torch.tensor([0, 1, 2, 3, 3]),)


class Mixed(nn.Module):
    """A causal layer h, a label's e of the same shape [B, T, C], and a use of both; what it gives goes through a nonlinearity."""

    def __init__(self, use) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.use = nn.Conv1d(1, WIDTH, 2), use
        self.lin, self.norm = nn.Linear(WIDTH, WIDTH, bias=False), nn.LayerNorm(WIDTH)
        self.conv, self.table = nn.Conv2d(WIDTH, WIDTH, 1, bias=False), nn.Embedding(CLASSES, WIDTH)
        self.out = nn.Conv1d(WIDTH, N, 1)
        self.many = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        h = torch.tanh(self.first(F.pad(x, (2, -1)))).mT
        e = self.table(label)[:, None].expand_as(h)
        return 2 * self.out(self.use(self, h, e).mT)


def gated(parts) -> Tensor:
    a, b, c = parts
    return a * torch.sigmoid(3 * torch.tanh(b)) + c


def token(m, h: Tensor, e: Tensor) -> Tensor:
    """A class token in front that scales the rest."""
    y = torch.tanh(2 * torch.cat([e[:, :1], h], 1))
    return y[:, 1:] * y[:, :1]


def overwritten(m, h: Tensor, e: Tensor) -> Tensor:
    """The first site written over through a view, if a reshape is one."""
    h = torch.tanh(m.lin(h.mT.mT))
    flat = h.reshape(len(h), -1)
    flat[:, :WIDTH] = e[:, 0]
    h = flat.view_as(h)
    return h * torch.sigmoid(3 * h[:, :1].exp())


def several_layers(m, h: Tensor, e: Tensor) -> Tensor:
    """Two sites of every second channel of a layer and of the label, and another layer from there on."""
    mixed = torch.zeros_like(h)
    mixed[..., ::2], mixed[..., 1::2] = h[..., ::2], e[..., 1::2]
    y = torch.cat([mixed[:, :2], torch.tanh(m.lin(h))[:, 2:]], 1)
    return torch.tanh(2 * (y + 0.3 * h)) + 0.2 * mixed


def swapped(h: Tensor) -> Tensor:
    return torch.tensor([2, 1, 0])[None, :, None, None].expand(len(h), 3, *h.shape[1:])


MIXED = {
    "linear": lambda m, h, e: gated(m.lin(torch.stack([h, e, torch.tanh(2 * h)], 1)).unbind(1)),
    "matrix": lambda m, h, e: gated((torch.stack([h, e, -h], 1) @ m.many).unbind(1)),
    "product of three": lambda m, h, e: gated(torch.einsum("bkti,io->bkto", torch.stack([h, e, -h], 1), m.many).unbind(1)),
    "sum": lambda m, h, e: h * torch.sigmoid(torch.stack([h, e, -h], 1).sum(3, keepdim=True)[:, 1]),
    "mean": lambda m, h, e: h * torch.sigmoid(torch.stack([e, h], 1).mean(3, keepdim=True)[:, 0].exp()),
    "index": lambda m, h, e: gated(torch.stack([h, e, torch.tanh(2 * h)], 1)[:, [0, 1, 2]].unbind(1)),
    "index_select": lambda m, h, e: gated(torch.stack([e, h, -h], 1).index_select(1, torch.tensor([1, 0, 2])).unbind(1)),
    "gather": lambda m, h, e: gated(torch.stack([h, e, -h], 1).gather(1, swapped(h)).unbind(1)),
    "glu": lambda m, h, e: gated(F.glu(torch.stack([h, e, -h], 1).repeat(1, 1, 1, 2), 3).unbind(1)),
    "log sigmoid": lambda m, h, e: gated(F.logsigmoid(torch.stack([h, e, -h], 1)).unbind(1)),
    "largest": lambda m, h, e: h * torch.sigmoid(torch.stack([h, e], 1).amax(3, keepdim=True)[:, 1].exp()),
    "convolution": lambda m, h, e: gated(
        m.conv(torch.stack([h, e, -h], 1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).unbind(1)
    ),
    "token": token,
    "overwritten": overwritten,
    "several layers": several_layers,
    "glu of the label": lambda m, h, e: F.glu(torch.cat([h, e], 2), 2),
    "glu of a constant": lambda m, h, e: F.glu(torch.cat([h + e, torch.linspace(-1, 1, WIDTH).expand_as(h)], 2), 2),
    "log sigmoid beside a constant": lambda m, h, e: F.logsigmoid(torch.cat([h + e, torch.ones_like(h[..., :2])], 2))[..., 2:],
}  # fmt: skip


def slow(model: nn.Module, shape, labels: Tensor, **options) -> Tensor:
    return fastgen.compile(model, shape, HEAD, (labels[:1],), backend="naive", **options).sample(
        len(labels), cond=(labels,)
    )


@pytest.mark.parametrize("use", MIXED)
def test_a_tensor_of_both(use: str) -> None:
    model = Mixed(MIXED[use]).eval()
    one = (torch.tensor([1]),)
    unproved = fastgen.compile(model, (1, 10), HEAD, one, threads=1, verify=False)
    assert torch.equal(unproved.sample(5, cond=LABELS), slow(model, (1, 10), LABELS[0]))
    assert unproved.verify().ok


# ---- a batch inside of forward ---------------------------------------------------------------------------------------
class Image(nn.Module):
    def __init__(self, norm) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = MaskedConv2d(1, 8, 3, "A") if norm == "masked" else nn.Conv2d(1, 8, (2, 3)), norm
        self.between = {"batch": nn.BatchNorm2d(8), "depthwise": nn.Conv2d(8, 8, 1, groups=8)}.get(norm, nn.Identity())
        self.out, self.label = nn.Conv2d(8, N, 1), nn.Embedding(CLASSES + 1, 8)
        nn.init.normal_(self.out.bias)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        x = x if self.norm == "masked" else F.pad(x, (1, 1, 2, -1))
        return self.out(torch.relu(self.between(self.first(x)) + self.label(label)[:, :, None, None]))


GUIDED = {
    "joined": lambda m, x, y: _guide(m(torch.cat([x, x]), torch.cat([y, torch.full_like(y, CLASSES)]))),
    "repeated": lambda m, x, y: _guide(m(x.repeat(2, 1, 1, 1), torch.cat([y, torch.full_like(y, CLASSES)]))),
    "one of both": lambda m, x, y: m(x.repeat(2, 1, 1, 1), y.repeat(2))[: len(x)],
    "twice": lambda m, x, y: 3 * m(x, y) - 2 * m(x, torch.full_like(y, CLASSES)),
}


def _guide(both: Tensor) -> Tensor:
    with_label, without = both.chunk(2)
    return 3 * with_label - 2 * without


class Guided(nn.Module):
    def __init__(self, norm: str, how: str) -> None:
        super().__init__()
        self.net, self.how = Image(norm), how

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return GUIDED[self.how](self.net, x, y)


@pytest.mark.parametrize("how", GUIDED)
@pytest.mark.parametrize("norm", ["none", "batch", "depthwise", "masked"])
def test_a_batch_doubled_inside(norm: str, how: str) -> None:
    """Classifier-free guidance (Ho and Salimans 2022), in one forward."""
    model = Guided(norm, how).eval()
    sampler = fastgen.compile(model, (1, 5, 6), HEAD, (torch.tensor([2]),), threads=1)
    assert torch.equal(sampler.sample(5, cond=LABELS), slow(model, (1, 5, 6), LABELS[0]))


def test_copies_are_computed_once() -> None:
    sampler = fastgen.compile(Guided("none", "one of both").eval(), (1, 5, 6), HEAD, (torch.tensor([2]),), threads=1)
    alone = fastgen.compile(Image("none").eval(), (1, 5, 6), HEAD, (torch.tensor([2]),), threads=1)
    assert len(sampler.plan.graph.nodes) <= len(alone.plan.graph.nodes) + 1


# ---- constants beside sampled values ---------------------------------------------------------------------------------
class Bordered(nn.Module):
    """The first site of every channel is a constant of that channel."""

    def __init__(self, then) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.out, self.then = nn.Conv1d(1, WIDTH, 2), nn.Conv1d(WIDTH, N, 1), then
        self.border = nn.Parameter(torch.randn(1, WIDTH, 2))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(F.pad(x, (1, -1))))
        return self.out(self.then(torch.cat([self.border.expand(len(x), -1, -1), h], 2)[..., : x.shape[2]]))


@pytest.mark.parametrize(
    "then",
    [
        torch.tanh,
        lambda h: torch.stack([h, -h], 1).flatten(1, 2)[:, ::2],
        lambda h: F.layer_norm(h.mT, (WIDTH,)).mT,
        lambda h: F.glu(torch.cat([h, h], 1), 1),
    ],
)
def test_constants_of_a_channel_each(then) -> None:
    model = Bordered(then).eval()
    sampler = fastgen.compile(model, (1, 12), HEAD, threads=1)
    assert torch.equal(sampler.sample(5), fastgen.compile(model, (1, 12), HEAD, backend="naive").sample(5))
