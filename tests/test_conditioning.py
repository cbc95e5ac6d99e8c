"""Uses of conditioning that no rule follows: refused by name, not frozen at the example's value."""

# As users write: modules are not annotated in full.
# mypy: disable-error-code="no-any-return,operator"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastgen
from fastgen import UnsupportedError
from fastgen.heads import Categorical

CLASSES, N, WIDTH = 4, 5, 6


class Labelled(nn.Module):
    """A causal layer, and a use of the label between it and the output."""

    def __init__(self, use: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.use = nn.Conv1d(1, WIDTH, 2), use
        self.out = nn.Conv1d(WIDTH, N, 1)
        self.table = nn.Parameter(torch.randn(CLASSES, WIDTH))
        self.many = nn.Parameter(torch.randn(CLASSES, WIDTH, WIDTH))

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        h = torch.tanh(self.first(F.pad(x, (2, -1))))
        return self.out(self.use(self, h, label))


def running(m: Any) -> tuple[Tensor, Tensor]:
    return torch.zeros(WIDTH), torch.ones(WIDTH)


def copies_scaled(m: Any, h: Tensor, label: Tensor) -> Tensor:
    """Shifted copies, each times a number of its own: copies of one site differ in nothing else."""
    wide = F.conv1d(F.pad(h, (3, 0)), torch.eye(WIDTH)[:, :, None].repeat(1, 1, 2))
    copies = torch.stack([wide[..., k : k + h.shape[2]] for k in range(3)], 1)
    return (copies * m.table[label][:, :3, None, None]).sum(1)


def filled(m: Any, h: Tensor, label: Tensor) -> Tensor:
    """Channel 1 filled with a number of the first label."""
    h = h.clone()
    h[:, 1].fill_(m.table[label][0, 0])
    return h


def zeroed(m: Any, h: Tensor, label: Tensor) -> Tensor:
    h = h + m.table[label][:, :, None]
    h[:, 1:3].zero_()
    return h


FROZEN: dict[str, Callable[..., Tensor]] = {
    "bias of a convolution": lambda m, h, c: F.conv1d(h, torch.eye(WIDTH)[:, :, None], m.table[c][0]),
    "weight of a convolution": lambda m, h, c: F.conv1d(h, m.many[c][0][:, :, None]),
    "matrix of a hypernetwork": lambda m, h, c: torch.bmm(m.many[c], h),
    "scale of batch norm": lambda m, h, c: F.batch_norm(h, *running(m), m.table[c][0], torch.zeros(WIDTH)),
    "shift of batch norm": lambda m, h, c: F.batch_norm(h, *running(m), torch.ones(WIDTH), m.table[c][0]),
    "scale of layer norm": lambda m, h, c: F.layer_norm(h.transpose(1, 2), (WIDTH,), m.table[c][0]).transpose(1, 2),
    "expert by index": lambda m, h, c: torch.stack([h, -h, 2 * h, h * h], 1)[torch.arange(len(h)), c],
    "expert by index_select": lambda m, h, c: torch.stack([h, -h, 2 * h, h * h], 0).index_select(0, c)[0],
    "channels by gather": lambda m, h, c: h.gather(1, c[:, None, None].expand(-1, WIDTH, h.shape[2])),
    "maximum with conditioning": lambda m, h, c: (
        h + torch.cat([h, m.table[c][:, :, None].expand_as(h)], 1).amax(1, keepdim=True)
    ),
    "a table by sampled index": lambda m, h, c: m.many[c][0][(h[:, 0] > 0).long()].transpose(1, 2),
}
FOLLOWED: dict[str, Callable[..., Tensor]] = {
    "bias of a linear layer": lambda m, h, c: F.linear(h.transpose(1, 2), torch.eye(WIDTH), m.table[c][0]).transpose(
        1, 2
    ),
    "added": lambda m, h, c: h + m.table[c][:, :, None],
    "gate": lambda m, h, c: h * torch.sigmoid(m.table[c])[:, :, None],
    "one-hot experts": lambda m, h, c: (torch.stack([h, -h, 2 * h, h * h], 1) * F.one_hot(c, CLASSES)[:, :, None, None]).sum(1),
    "shifted copies": copies_scaled,
    "a patch": lambda m, h, c: torch.slice_scatter(h, m.table[c][:, :2, None].expand(-1, -1, h.shape[2]), 1, 1, 3),
    "a channel": lambda m, h, c: torch.select_scatter(h, m.table[c][:, :1].expand(-1, h.shape[2]), 1, 2),
    "filled in place": filled,
    "filled aside": lambda m, h, c: h + filled(m, torch.zeros_like(h), c),
    "zeroed in place": zeroed,
    "truncated by a copy": lambda m, h, c: torch.zeros(h.shape, dtype=torch.int64).copy_(3 * h) + h * m.table[c][:, :, None],
    "sampled values patched": lambda m, h, c: torch.slice_scatter(h, h[:, :2] * m.table[c][:, :2, None], 1, 3, 5),
    "times a fresh tensor": lambda m, h, c: h + torch.full_like(h, 2.0) * m.table[c][:, :, None],
    "times new ones": lambda m, h, c: h + h.new_ones(1, WIDTH, 1) * m.table[c][:, :, None],
    "branch": lambda m, h, c: torch.where((c == 1)[:, None, None], h, -h),
}  # fmt: skip


def compiled(use: Callable[..., Tensor]) -> fastgen.Sampler:
    head = Categorical(N, encode="symmetric", params="B(n*C)*")
    return fastgen.compile(Labelled(use).eval(), (1, 12), head, (torch.tensor([1]),), threads=1)


@pytest.mark.parametrize("use", FROZEN)
def test_what_would_be_frozen_is_refused(use: str) -> None:
    with pytest.raises(UnsupportedError, match="conditioning"):
        compiled(FROZEN[use])


@pytest.mark.parametrize("use", FOLLOWED)
def test_what_is_followed_is_followed_for_every_label(use: str) -> None:
    sampler = compiled(FOLLOWED[use])
    labels = torch.arange(CLASSES)
    samples = sampler.sample(CLASSES, seed=3, cond=(labels,))
    naive = fastgen.compile(sampler.model, (1, 12), sampler.spec.head, (torch.tensor([1]),), backend="naive")
    slow = [naive.sample(1, seed=3, first=k, cond=(labels[k : k + 1],)) for k in range(CLASSES)]  # some mix a batch
    assert torch.equal(samples, torch.cat(slow)) and len(samples.unique(dim=0)) > 1


ARGUMENTS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "decimals of round": (lambda m, h, c: torch.round(h, decimals=1), "its argument decimals="),
    "value of addcmul": (lambda m, h, c: torch.addcmul(h, h, h, value=0.5), "its argument value"),
}


@pytest.mark.parametrize("use", ARGUMENTS)
def test_an_argument_that_a_rule_does_not_know_is_refused(use: str) -> None:
    function, match = ARGUMENTS[use]
    with pytest.raises(UnsupportedError, match=match):
        compiled(function)
