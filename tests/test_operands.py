"""What an operation reads: between which numbers, and constants beside conditioning."""

# As users write: modules are not annotated in full.
# mypy: disable-error-code="no-any-return,no-untyped-def"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastgen
from fastgen import UnsupportedError
from fastgen.capture.fit import Irregular
from fastgen.capture.ranges import check_index
from fastgen.graph.bounds import range_of_map, union
from fastgen.heads import Categorical
from tests.test_closed_world import Floats, law
from tests.test_conditioning import each, followed


class Labelled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.out, self.table = nn.Conv1d(1, 4, 2), nn.Conv1d(4, 5, 1), nn.Embedding(4, 4)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return self.out(torch.tanh(self.first(F.pad(x, (2, -1)))) + self.table(label)[:, :, None])


HEAD = Categorical(5, encode="symmetric", params="B(n*C)*")


# ---- ranges ------------------------------------------------------------------------------------------------------
def test_arithmetic_of_ranges() -> None:
    assert range_of_map("remainder", [(-9.0, 9.0), (-4.0, -4.0)], ()) == (-4.0, 0.0)
    assert range_of_map("remainder", [(-9.0, 9.0), (5.0, 5.0)], (1.0,)) == (0.0, 4.0)
    assert range_of_map("remainder", [(-9.0, 9.0), (-5.0, -5.0)], (1.0,)) == (-4.0, 0.0)
    assert range_of_map("remainder", [(0.0, 1.0), (-1.0, 1.0)], ()) is None
    assert range_of_map("where", [(0.0, 1.0), (0.0, 1.0), (5.0, 9.0)], ()) == (0.0, 9.0)
    assert range_of_map("div", [(1.0, 2.0), (0.0, 4.0)], ()) is None and range_of_map(
        "div", [(1.0, 2.0), (2.0, 4.0)], ()
    ) == (0.25, 1.0)
    assert range_of_map("abs", [(-3.0, 2.0)], ()) == (0.0, 3.0) and range_of_map("abs", [(-3.0, -2.0)], ()) == (
        2.0,
        3.0,
    )
    assert range_of_map("affine", [(0.0, 4.0)], (-2.0, 1.0)) == (-7.0, 1.0)
    assert range_of_map("clamp", [None], (0.0, 6.0)) == (0.0, 6.0) and range_of_map("exp", [(0.0, 1.0)], ()) is None
    assert union([(0.0, 1.0), None]) is None and union([]) is None
    for found in ((-1.0, 2.0), (0.0, 3.0), None):
        with pytest.raises(Irregular):
            check_index(found, 3)
    check_index((0.0, 2.0), 3)


class Looked(nn.Module):
    """Indices, some arithmetic, and a table."""

    def __init__(self, use: Callable[[Tensor], Tensor], rows: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.use, self.table, self.conv, self.out = use, nn.Embedding(rows, 4), nn.Conv1d(4, 4, 2), nn.Conv1d(4, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.conv(F.pad(self.table(self.use(x)).mT, (2, -1)))))


@pytest.mark.parametrize(
    ("use", "rows", "taken"),
    [
        (lambda x: F.pad(x, (1, -1), value=9), 10, True), (lambda x: F.pad(x, (1, -1), value=9), 9, False),
        (lambda x: F.pad(x, (1, 0), value=9)[:, :-1].clamp(max=6), 7, True), (lambda x: x + 1, 6, True), (lambda x: x + 1, 5, False),
        (lambda x: torch.where(x > 2, x, 7), 8, True), (lambda x: torch.where(x > 2, x, 7), 7, False),
        (lambda x: x - 1, 5, False), (lambda x: (x - 2).abs(), 3, True), (lambda x: (x - 2).abs(), 2, False),
    ],
)  # fmt: skip
def test_lookups_stay_in_their_table(use: Callable[[Tensor], Tensor], rows: int, taken: bool) -> None:
    head = Categorical(5, encode="index", params="B(n*C)*")
    model = Looked(use, rows + (0 if taken else 3)).eval()
    if not taken:
        model.table.weight = nn.Parameter(model.table.weight[:rows].detach())
        model.use = use
        with pytest.raises(
            (UnsupportedError, fastgen.errors.ShapeError), match="lookup by integers|index out of range"
        ):
            fastgen.compile(model, (9,), head, threads=1, verify=False)
        return
    naive = fastgen.compile(model, (9,), head, backend="naive")
    assert torch.equal(fastgen.compile(model, (9,), head, threads=1, verify=False).sample(8), naive.sample(8))


# ---- operands ----------------------------------------------------------------------------------------------------
class Between(nn.Module):
    """Conditioning that fills sites of a channel whose other sites are padding or constants of their own."""

    def __init__(self, use: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.use, self.first, self.out = use, nn.Conv1d(1, 4, 2), nn.Conv1d(4, 5, 1)
        self.hyper, self.table = nn.Linear(3, 4 * 8 * 3), nn.Linear(3, 4)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.out(torch.tanh(self.use(self, torch.tanh(self.first(F.pad(x, (2, -1)))), c)))


def padded_beside(m: Any, h: Tensor, c: Tensor) -> Tensor:
    """A kernel of conditioning over samples and conditioning, zeros around both."""
    both = torch.cat([h, m.table(c)[:, :, None].expand_as(h)], 1)
    kernel = m.hyper(c).view(-1, 4, 8, 3) * torch.tensor([1.0, 1.0, 0.0])
    return torch.cat([F.conv1d(both[k : k + 1], kernel[k], padding=1) for k in range(len(h))])


def token_and_constants(m: Any, h: Tensor, c: Tensor) -> Tensor:
    """A constant, a token, samples."""
    return torch.cat([torch.full_like(h[..., :1], 0.7), m.table(c)[:, :, None], h], 2)[..., : h.shape[2]]


def written_and_padded(m: Any, h: Tensor, c: Tensor) -> Tensor:
    h = F.pad(h, (1, -1), value=0.3)
    h[..., 4:6] = m.table(c)[:, :, None]
    return h * 1.5


@pytest.mark.parametrize("use", [padded_beside, token_and_constants, written_and_padded])
def test_constants_beside_conditioning(use: Callable[..., Tensor]) -> None:
    g = torch.Generator().manual_seed(2)
    model, cond = Between(use).eval(), torch.randn(6, 3, generator=g)
    sampler = fastgen.compile(model, (1, 12), HEAD, (cond[:1],), threads=1, verify=False)
    naive = fastgen.compile(model, (1, 12), HEAD, (cond[:1],), backend="naive")
    assert sampler.verify().ok and torch.equal(sampler.sample(6, cond=(cond,)), naive.sample(6, cond=(cond,)))


def test_a_scatter_onto_numbers_is_no_one_hot() -> None:
    model = Looked(lambda x: x, 5).eval()
    model.use = lambda x: torch.ones(len(x), x.shape[1], 5, dtype=torch.int64).scatter_(2, x[..., None], 3).sum(-1) % 5
    head = Categorical(5, encode="index", params="B(n*C)*")
    with pytest.raises(UnsupportedError, match="scatter other than a one-hot"):
        fastgen.compile(model, (9,), head, threads=1)


def test_conditioning_written_between_two_reads() -> None:
    class Twice(Labelled):
        def forward(self, x: Tensor, label: Tensor) -> Tensor:
            e = self.table(label)[:, :, None].clone()
            h = torch.tanh(self.first(F.pad(x, (2, -1)))) + e
            e.mul_(-3.0)
            return self.out(h * e)

    model, labels = Twice().eval(), torch.arange(4)
    sampler = fastgen.compile(model, (1, 12), HEAD, (torch.tensor([1]),), threads=1, verify=False)
    naive = fastgen.compile(model, (1, 12), HEAD, (torch.tensor([1]),), backend="naive")
    assert torch.equal(sampler.sample(4, cond=(labels,)), naive.sample(4, cond=(labels,)))


def _conv(m, h, c):
    both = torch.cat([h, m.table[c][:, :, None].expand_as(h)], 1)
    w = torch.cat([m.many[c][0], m.many[c][0].T], 1)
    return F.conv1d(both, torch.stack([w, -w], -1), padding=1)[..., : h.shape[2]]


def test_padding_around_conditioning():
    followed(each(_conv))


def _token(m, h, c):
    t = torch.cat([m.table[c][:, :, None], h], 2)[..., :-1]
    return F.conv1d(t, torch.stack([m.many[c][0], m.many[c][0].T], -1), padding=1)[..., : h.shape[2]]


def test_padding_in_front_of_a_token():
    followed(each(_token))


def test_copies_times_constants():
    def use(h):
        wide = F.conv1d(F.pad(h, (3, 0)), torch.eye(8)[:, :, None].repeat(1, 1, 2))
        copies = torch.stack([wide[..., k : k + h.shape[2]] for k in range(3)], 1)
        return (copies * torch.tensor([1.0, 2.0, 3.0])[:, None, None]).sum(1)

    law(Floats(use))


def test_conditioning_written_between_samples():
    def use(m, h, c):
        h = h.clone()
        for k in range(len(h)):
            h[k, 1].fill_(m.table[c][k, 0])
        if not (h[:, 2:4].abs() > 0).any():
            raise ValueError("nothing there")
        return h + m.table[c][:, :, None]

    followed(use)


@pytest.mark.parametrize(
    "use",
    [
        lambda z, e: torch.clamp(z, min=e),
        lambda z, e: torch.clamp(z, max=e),
        lambda z, e: z + e,
        lambda z, e: torch.add(z, e, alpha=2),
    ],
)
def test_functions_of_constants_and_conditioning_depend_on_it(use: Callable[..., Tensor]) -> None:
    followed(lambda m, h, c: h + use(torch.zeros(1, h.shape[1], 1), m.table[c][:, :, None]))


@pytest.mark.parametrize(
    "zero",
    [lambda e: e * 0, lambda e: 0.0 * e, lambda e: e * torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 1.0])[:, None] * 0],
)
def test_conditioning_times_zero_is_nothing(zero: Callable[..., Tensor]) -> None:
    """A kernel of it may be led to any site."""
    followed(each(lambda m, h, c: h + F.conv1d(h, zero(m.many[c][0])[..., None].expand(-1, -1, 3), padding=1)))
