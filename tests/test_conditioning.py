"""Conditioning in every role: followed for every sample of a batch, or refused by name; never frozen at the example's value."""

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
from fastgen import NotCausalError, UnsupportedError
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
    for k in range(len(h)):
        h[k, 1].fill_(m.table[label][k, 0])
    return h


def zeroed(m: Any, h: Tensor, label: Tensor) -> Tensor:
    h = h + m.table[label][:, :, None]
    h[:, 1:3].zero_()
    return h


def each(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A use for one sample (batch 1), made one for each of a batch."""
    return lambda m, h, c: torch.cat([function(m, h[k : k + 1], c[k : k + 1]) for k in range(len(h))])


def folded_groups(m: Any, h: Tensor, label: Tensor) -> Tensor:
    """A convolution with weights of each sample's own, the batch folded into groups."""
    b, c, t = h.shape
    weight = torch.stack([m.many[label], m.many[label].mT], -1).reshape(b * c, c, 2)
    padded = F.pad(h, (1, 0)).reshape(1, b * c, t + 1)
    return F.conv1d(padded, weight, m.table[label].reshape(-1), groups=b).view(b, c, t)


def masked_weight(m: Any, h: Tensor, label: Tensor) -> Tensor:
    """Taps into the future, masked: a weight of conditioning times zero is none."""
    weight = m.many[label][0][..., None] * torch.tensor([0.5, 1.0, 0.0])
    return F.conv1d(h, weight, padding=1)


def front(m: Any, h: Tensor, label: Tensor) -> Tensor:
    """A class token in front."""
    return torch.cat([m.table[label][:, :, None], h], 2)[..., :-1]


def mixed_by_token(m: Any, h: Tensor, label: Tensor) -> Tensor:
    return torch.tanh(F.conv1d(F.pad(front(m, h, label), (1, 0)), m.many[:2].permute(1, 2, 0)))


def normed_with_label(m: Any, h: Tensor, label: Tensor) -> Tensor:
    both = torch.cat([h, m.table[label][:, :, None].expand_as(h)], 1).transpose(1, 2)
    return F.layer_norm(both, (2 * WIDTH,)).transpose(1, 2)[:, :WIDTH]


def linear_of_both(m: Any, h: Tensor, label: Tensor) -> Tensor:
    both = torch.cat([h, m.table[label][:, :, None].expand_as(h)], 1).transpose(1, 2)
    return torch.tanh(F.linear(both, torch.cat([m.many[0], m.many[1]], 1))).transpose(1, 2)


def tokens(m: Any, h: Tensor, label: Tensor) -> Tensor:
    """A table a label, as one: the index of a sampled value is led into its part of it."""
    return m.many.reshape(CLASSES * WIDTH, WIDTH)[(h[:, 0] * 3).abs().long().clamp(max=2) + WIDTH * label[:, None]].mT


def by_rank(m: Any, h: Tensor, label: Tensor) -> Tensor:
    order = m.table[label].argsort(1)
    return h.gather(1, order[:, :, None].expand_as(h))


def lags(h: Tensor) -> Tensor:
    return torch.stack([F.pad(h, (k, 0))[..., : h.shape[-1]] for k in range(CLASSES)], 1)


def swapped(m: Any, h: Tensor, label: Tensor) -> Tensor:
    """Storages that tensors leave, and that others may take."""
    other = torch.zeros_like(h) + h
    other.set_(h * 2.0)  # type: ignore[call-overload]
    third = h.clone()
    third.data = h.data * m.table[label].data[:, :, None]
    t = m.table[label]
    for _ in range(4):
        t = torch.tanh(t * 1.1 + 0.1)
    return torch.tanh(other) * t[:, :, None] + third


EXPERTS: Callable[[Tensor], Tensor] = lambda h: torch.stack([h, -h, 2 * h, h * h], 1)  # noqa: E731
FROZEN: dict[str, Callable[..., Tensor]] = {
    "transposed weight": each(lambda m, h, c: F.conv_transpose1d(h, m.many[c][0][:, :, None])),
    "sites by gather": lambda m, h, c: h.gather(2, c[:, None, None].expand(-1, WIDTH, h.shape[2])),
    "two labels as indices": lambda m, h, c: h + EXPERTS(h)[torch.arange(len(h)), c, c][:, None],
}


def causal_kernel(mask: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """A kernel of conditioning whose tap into the future is masked, in some way."""
    return each(lambda m, h, c: F.conv1d(h, mask(torch.stack([m.many[c][0]] * 3, -1)), padding=1))


def set_to_zero(k: Tensor) -> Tensor:
    k = k.clone()
    k[..., 2] = 0
    return k


FUTURE = torch.tensor([1.0, 1.0, 0.0])
MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "a product": lambda k: k * FUTURE, "set": set_to_zero, "a product in place": lambda k: k.clone().mul_(FUTURE),
    "filled in place": lambda k: k.clone().masked_fill_(FUTURE == 0, 0.0), "filled": lambda k: k.masked_fill(FUTURE == 0, 0.0),
    "where": lambda k: torch.where(FUTURE > 0, k, 0.0), "scaled after": lambda k: k * FUTURE * 0.5,
    "normed after": lambda k: k * FUTURE / k.norm(), "cast after": lambda k: (k * FUTURE).double().float(),
    "added to nothing": lambda k: k * FUTURE + torch.zeros(3), "moved": lambda k: (k.movedim(-1, 0) * FUTURE[:, None, None]).movedim(0, -1),
}  # fmt: skip
LED_IN: dict[str, Callable[..., Tensor]] = {
    "indexed": lambda m, c: (m.many[..., None] * FUTURE)[c][0],
    "selected": lambda m, c: (m.many[..., None] * FUTURE).index_select(0, c)[0],
    "embedded": lambda m, c: F.embedding(c, (m.many[..., None] * FUTURE).flatten(1)).view(WIDTH, WIDTH, 3),
    "mixed": lambda m, c: torch.einsum("bk,kijt->bijt", F.one_hot(c, CLASSES).float(), m.many[..., None] * FUTURE)[0],
    "a linear layer": lambda m, c: F.linear(F.one_hot(c, CLASSES).float(), (m.many[..., None] * FUTURE).flatten(1).T).view(WIDTH, WIDTH, 3),
}  # fmt: skip


@pytest.mark.parametrize("name", [*MASKS, *LED_IN])
def test_masked_kernels_of_conditioning_read_no_later_site(name: str) -> None:
    if name in MASKS:
        followed(causal_kernel(MASKS[name]))
    else:
        followed(each(lambda m, h, c: F.conv1d(h, LED_IN[name](m, c), padding=1)))


MIXED: dict[str, Callable[..., Tensor]] = {  # the first sample's label for all
    "bias of a convolution": lambda m, h, c: F.conv1d(h, torch.eye(WIDTH)[:, :, None], m.table[c][0]),
    "weight of a convolution": lambda m, h, c: F.conv1d(h, m.many[c][0][:, :, None]),
    "shift": lambda m, h, c: h + m.table[c[:1]][:, :, None],
    "labels in order": lambda m, h, c: h + m.table[c.sort()[0]][:, :, None],
    "any of them": lambda m, h, c: h * torch.where((c == 1).any(), 1.0, 2.0),
    "a mean of samples": lambda m, h, c: h + 0.01 * h.mean(0, keepdim=True) + m.table[c][:, :, None],
}
FOLLOWED: dict[str, Callable[..., Tensor]] = {
    "bias of a linear layer": each(
        lambda m, h, c: F.linear(h.transpose(1, 2), torch.eye(WIDTH), m.table[c][0]).transpose(1, 2)
    ),
    "bias of a convolution": each(lambda m, h, c: F.conv1d(h, torch.eye(WIDTH)[:, :, None], m.table[c][0])),
    "weight of a convolution": each(lambda m, h, c: F.conv1d(h, m.many[c][0][:, :, None])),
    "weights in groups": folded_groups,
    "a masked weight": each(masked_weight),
    "matrix of a hypernetwork": lambda m, h, c: torch.bmm(m.many[c], h),
    "matrix on the right": lambda m, h, c: (h.mT @ m.many[c]).mT,
    "matrix and bias": lambda m, h, c: torch.baddbmm(m.table[c][:, :, None], m.many[c], h),
    "einsum": lambda m, h, c: torch.einsum("bji,bit->bjt", m.many[c], h),
    "scale of batch norm": each(lambda m, h, c: F.batch_norm(h, *running(m), m.table[c][0], torch.zeros(WIDTH))),
    "shift of batch norm": each(lambda m, h, c: F.batch_norm(h, *running(m), torch.ones(WIDTH), m.table[c][0])),
    "scale of layer norm": each(lambda m, h, c: F.layer_norm(h.mT, (WIDTH,), m.table[c][0], m.table[c][0]).mT),
    "norm with it": normed_with_label,
    "linear layer of both": linear_of_both,
    "expert by index": lambda m, h, c: EXPERTS(h)[torch.arange(len(h)), c],
    "expert by index_select": each(lambda m, h, c: EXPERTS(h).index_select(1, c)[:, 0]),
    "expert by take_along_dim": lambda m, h, c: torch.take_along_dim(EXPERTS(h), c[:, None, None, None], 1)[:, 0],
    "expert by sums": lambda m, h, c: torch.einsum("bkct,bk->bct", EXPERTS(h), F.one_hot(c, CLASSES).float()),
    "channels by gather": lambda m, h, c: h.gather(1, c[:, None, None].expand(-1, WIDTH, h.shape[2])),
    "channels in its order": by_rank,
    "maximum with conditioning": lambda m, h, c: (
        h + torch.cat([h, m.table[c][:, :, None].expand_as(h)], 1).amax(1, keepdim=True)
    ),
    "a table by sampled index": each(lambda m, h, c: m.many[c][0][(h[:, 0] > 0).long()].transpose(1, 2)),
    "a part of a table": tokens,
    "a class token": front, "copies by label": lambda m, h, c: lags(h)[torch.arange(len(c)), c],
    "copies of all": lambda m, h, c: (lags(h) * F.one_hot(c, CLASSES)[:, :, None, None]).sum(1),
    "a kernel of each channel": each(lambda m, h, c: F.conv1d(F.pad(h, (1, 0)), m.many[c][0][:, None, :2], groups=WIDTH)),
    "of another storage": swapped, "a bias of a norm": each(lambda m, h, c: F.layer_norm(h.mT, (WIDTH,), None, m.table[c][0]).mT),
    "a layer over a class token": mixed_by_token,
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


def compiled(use: Callable[..., Tensor], **options: Any) -> fastgen.Sampler:
    head = Categorical(N, encode="symmetric", params="B(n*C)*")
    return fastgen.compile(Labelled(use).eval(), (1, 12), head, (torch.tensor([1]),), threads=1, **options)


@pytest.mark.parametrize("use", FROZEN)
def test_what_would_be_frozen_is_refused(use: str) -> None:
    with pytest.raises((UnsupportedError, NotCausalError), match="conditioning|index|constant"):
        compiled(FROZEN[use])


@pytest.mark.parametrize("use", MIXED)
def test_one_label_for_a_whole_batch_is_named(use: str) -> None:
    with pytest.raises(UnsupportedError, match="mixes the samples of a batch"):
        compiled(MIXED[use])


@pytest.mark.parametrize("use", FOLLOWED)
def test_what_is_followed_is_followed_for_every_label(use: str) -> None:
    followed(FOLLOWED[use])


def followed(use: Callable[..., Tensor]) -> None:
    sampler = compiled(use, verify=False)
    assert sampler.verify().ok
    labels = torch.arange(CLASSES)
    samples = sampler.sample(CLASSES, seed=3, cond=(labels,))
    naive = fastgen.compile(sampler.model, (1, 12), sampler.spec.head, (torch.tensor([1]),), backend="naive")
    assert torch.equal(samples, naive.sample(CLASSES, seed=3, cond=(labels,))) and len(samples.unique(dim=0)) > 1


class Patterned(nn.Module):
    """Half of the parameters are the label's alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.table = nn.Conv2d(1, N, (1, 3)), nn.Embedding(CLASSES, N)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        h = self.first(F.pad(x, (3, -1)))
        return torch.cat([h[:, :2], 3 * self.table(label)[:, 2:, None, None].expand(-1, -1, *x.shape[2:])], 1)


def test_parameters_that_are_the_labels_alone() -> None:
    head = Categorical(N, encode="symmetric", params="B(n*C)*")
    sampler = fastgen.compile(Patterned().eval(), (1, 3, 4), head, (torch.tensor([1]),), threads=1)
    naive = fastgen.compile(sampler.model, (1, 3, 4), head, (torch.tensor([1]),), backend="naive")
    labels = torch.arange(CLASSES).repeat(4)
    assert torch.equal(sampler.sample(16, cond=(labels,)), naive.sample(16, cond=(labels,)))


@pytest.mark.parametrize("use", ["expert by index", "a part of a table"])
@pytest.mark.parametrize("label", [-1, CLASSES])
def test_a_label_that_there_is_not(use: str, label: int) -> None:
    with pytest.raises(fastgen.errors.ShapeError, match="index"):
        compiled(FOLLOWED[use]).sample(1, cond=(torch.tensor([label]),))


ARGUMENTS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "decimals of round": (lambda m, h, c: torch.round(h, decimals=1), "its argument decimals="),
    "value of addcmul": (lambda m, h, c: torch.addcmul(h, h, h, value=0.5), "its argument value"),
}


@pytest.mark.parametrize("use", ARGUMENTS)
def test_an_argument_that_a_rule_does_not_know_is_refused(use: str) -> None:
    function, match = ARGUMENTS[use]
    with pytest.raises(UnsupportedError, match=match):
        compiled(function)


@pytest.mark.parametrize(
    "use", [lambda m, c: c[:1], lambda m, c: c.mean(0, keepdim=True), lambda m, c: c.amax(0, keepdim=True)]
)
@pytest.mark.parametrize("value", [0.0, 0.5, 0.3])
def test_one_vector_for_a_whole_batch_is_named(use: Callable[..., Tensor], value: float) -> None:
    """Also where the example is the same everywhere."""
    model = Labelled(lambda m, h, c: h + use(m, c)[:, :, None]).eval()
    head = Categorical(N, encode="symmetric", params="B(n*C)*")
    with pytest.raises(UnsupportedError, match="mixes the samples of a batch"):
        fastgen.compile(model, (1, 12), head, (torch.full((1, WIDTH), value),), threads=1)


def test_a_little_of_other_samples_is_no_rounding() -> None:
    """The yardstick of the proof is one sample's own rounding."""

    class Mixes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.out = nn.Conv1d(1, WIDTH, 2), nn.Conv1d(WIDTH, N, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.first(F.pad(x, (2, -1))))
            return self.out(h + 1e-3 * h.mean(0, keepdim=True))

    with pytest.raises(UnsupportedError, match="mixes the samples of a batch"):
        fastgen.compile(Mixes().eval(), (1, 12), Categorical(N, encode="symmetric", params="B(n*C)*"), threads=1)


def test_a_traced_module_with_a_label() -> None:
    model = Labelled(FOLLOWED["added"]).eval()
    traced = torch.jit.trace(model, (torch.zeros(2, 1, 12), torch.tensor([1, 2])))
    head, labels = Categorical(N, encode="symmetric", params="B(n*C)*"), torch.arange(CLASSES)
    ours = fastgen.compile(traced, (1, 12), head, (torch.tensor([1]),), threads=1).sample(CLASSES, cond=(labels,))
    assert torch.equal(ours, compiled(FOLLOWED["added"]).sample(CLASSES, cond=(labels,)))


@pytest.mark.parametrize("index", [lambda x: (x + 1) % N, lambda x: (x * 2 - 3) % N, lambda x: (-x) % N])
def test_remainders_of_whole_numbers(index: Callable[[Tensor], Tensor]) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table, self.conv, self.out = nn.Embedding(N, WIDTH), nn.Conv1d(WIDTH, WIDTH, 2), nn.Conv1d(WIDTH, N, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.tanh(self.conv(F.pad(self.table(index(x)).mT, (2, -1)))))

    model, head = Wrapped().eval(), Categorical(N, encode="index", params="B(n*C)*")
    naive = fastgen.compile(model, (12,), head, backend="naive")
    assert torch.equal(fastgen.compile(model, (12,), head, threads=1).sample(8), naive.sample(8))
