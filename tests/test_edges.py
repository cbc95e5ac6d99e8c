"""Edges that a change by one would not survive: bounds, ties, last bytes, last steps, rights of files, keys of what is kept."""

# As users write: modules are not annotated in full.
# mypy: disable-error-code="no-any-return,no-untyped-def"

from __future__ import annotations

import functools
import math
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastgen
from fastgen import UnsupportedError, api
from fastgen.backends.request import Request
from fastgen.capture.fit import Irregular
from fastgen.capture.ranges import check_index
from fastgen.fingerprint import Fingerprint, check_finite
from fastgen.graph.bounds import range_of_map, union
from fastgen.heads import Bernoulli, Categorical, GaussianMixture, Head, LogisticMixture
from fastgen.heads.choice import pick, scale_error, unequal
from fastgen.kept import Kept
from fastgen.models import build
from fastgen.pretrained import from_pretrained, save_pretrained
from fastgen.variations import variations
from tests.oracle import at_length, by_name, compile_case

# ---- heads -------------------------------------------------------------------------------------------------------


def test_a_uniform_on_a_boundary_belongs_to_the_class_above() -> None:
    """As in the native draw: cumsum > u * total, and u < p for a coin."""
    assert int(pick(torch.zeros(2, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64), 1.0)) == 1
    coin = Bernoulli()._draw(
        torch.zeros(1, 1, dtype=torch.float64), torch.full((1, 1), 0.5, dtype=torch.float64), 1.0, None
    )
    assert float(coin) == 0.0


def test_classes_that_trade_places_are_all_of_the_measure() -> None:
    """Intervals that do not meet have nothing in common, and not less."""
    far = torch.tensor([[40.0, 0.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 0.0, 40.0]])
    assert float(unequal(*far)) == pytest.approx(1.0, abs=1e-6)


def test_a_scale_below_its_floor_is_off_by_nothing() -> None:
    assert float(scale_error(torch.tensor(-20.0), torch.tensor(3.0), -7.0)) == 0.0
    assert float(scale_error(torch.tensor(-8.0), torch.tensor(2.0), -7.0)) == pytest.approx(math.e - 1)


@pytest.mark.parametrize("value", [1 + 2 / 255, -1 - 2 / 255, 1 + 1.4 / 127.5])
def test_levels_beyond_the_range_are_none(value: float) -> None:
    assert "none of the 256 levels" in LogisticMixture(1, levels=256).fault_of(torch.tensor([value]))


@pytest.mark.parametrize(
    "head", [GaussianMixture(1, params="B(n*C)*"), LogisticMixture(1, levels=None), LogisticMixture(1, levels=32)]
)
def test_bounds_of_what_an_error_does(head: Head) -> None:
    """Distance bounds the total variation, and mismatch how often a value changes, where mean and scale are a little off."""
    g = torch.Generator().manual_seed(0)
    a = torch.randn(200, head.num_params(1), generator=g, dtype=torch.float64)
    a[:, -1] = a[:, -1].abs() * 0.5 - 3.0
    for which, off in ((-2, 0.02), (-1, 0.05)):
        b = a.clone()
        b[:, which] += off
        u = torch.rand(200, 2000, head.num_uniforms(1), generator=g, dtype=torch.float64)
        x, y = (head.draw(t[:, None].expand(200, 2000, -1), u, 1.0) for t in (a, b))
        changed = (x != y).double().mean((1, 2))
        bins = torch.linspace(-1, 1, 33)
        p, q = (torch.stack([torch.bucketize(v, bins).eq(k).double().mean((1, 2)) for k in range(34)]) for v in (x, y))
        apart = 0.5 * (p - q).abs().sum(0)
        assert bool((apart <= head.distance(a, b) + 0.03).all()), "of what is drawn"
        if getattr(head, "levels", None) is not None:
            assert bool((changed <= 1.05 * head.mismatch(a, b) + 0.03).all()), "of values that change"
            assert bool((head.mismatch(a, b) <= 40 * changed + 0.5).all()), "and not by orders"


# ---- fingerprint -------------------------------------------------------------------------------------------------
class Held:
    """An object of a person's."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Box(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("table", torch.arange(12.0).view(3, 4))
        self.flag: Any = True
        self.array = np.arange(5, dtype=np.uint8)
        self.deep = Held(Held(Held(1.0)))
        self.part = functools.partial(torch.add, alpha=1)

        def act(h: Tensor, slope: float = 0.1) -> Tensor:
            return h * slope

        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def _swap_array(m: Any) -> None:
    m.array = m.array.copy()
    m.array[-1] += 1


CHANGES: dict[str, Callable[[Any], object]] = {
    "the same bytes in another shape": lambda m: setattr(m, "table", m.table.reshape(4, 3)),
    "the same bytes of another type": lambda m: setattr(m, "table", m.table.view(torch.int32)),
    "one for true": lambda m: setattr(m, "flag", 1), "a float for one": lambda m: setattr(m, "flag", 1.0),
    "the last byte of an array": _swap_array, "three objects deep": lambda m: setattr(m.deep.value.value, "value", 2.0),
    "a default of a function": lambda m: setattr(m.act, "__defaults__", (0.2,)),
    "a keyword of a partial": lambda m: setattr(m, "part", functools.partial(torch.add, alpha=2)),
    "a hook in front": lambda m: m.layer.register_forward_pre_hook(lambda _, args: args),
    "the last element": lambda m: m.table.view(-1)[-1].add_(1),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_small_changes_are_seen(name: str) -> None:
    model = Box()
    marks = Fingerprint(model)
    assert next(marks.changed(), None) is None
    CHANGES[name](model)
    assert next(marks.changed(), None) is not None


def test_buffers_may_be_infinite_and_parameters_may_not() -> None:
    model = Box()
    model.table[0, 0] = -math.inf  # type: ignore[operator]
    check_finite(model)
    with torch.no_grad():
        model.layer.weight[0, 0] = math.inf
    with pytest.raises(fastgen.FastgenError, match=r"layer\.weight"):
        check_finite(model)


# ---- the proof ---------------------------------------------------------------------------------------------------
class Labelled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.out, self.table = nn.Conv1d(1, 4, 2), nn.Conv1d(4, 5, 1), nn.Embedding(4, 4)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return self.out(torch.tanh(self.first(F.pad(x, (2, -1)))) + self.table(label)[:, :, None])


HEAD = Categorical(5, encode="symmetric", params="B(n*C)*")


def test_what_a_proof_is_made_on() -> None:
    sampler = fastgen.compile(Labelled().eval(), (1, 12), HEAD, (torch.tensor([1]),), threads=1, verify=False)
    request = Request(3, 0, cond=(torch.tensor([1, 1, 1]),))
    made = variations(sampler.on_cpu, sampler.spec, request)
    assert made.cond[0].tolist() == [2, 1, 2] and made.mask is not None
    assert made.mask[:, :, 0].sum(1).tolist() == [0, 0, 6], "the last one, every second value"


def test_conditioning_of_which_nothing_is_finite_is_no_variation() -> None:
    class Picky(Labelled):
        def forward(self, x: Tensor, label: Tensor) -> Tensor:
            return super().forward(x, label) + torch.where(label == 2, math.nan, 0.0)[:, None, None]

    sampler = fastgen.compile(Picky().eval(), (1, 12), HEAD, (torch.tensor([1]),), threads=1, verify=False)
    made = variations(sampler.on_cpu, sampler.spec, Request(2, 0, cond=(torch.tensor([1, 1]),)))
    assert made.cond[0].tolist() == [0, 1]


def test_compile_proves_a_second_length_at_another_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int | None, float]] = []
    verify = fastgen.Sampler._verify

    def watched(self: fastgen.Sampler, n: int, seed: int, length: int | None, temperature: float) -> Any:
        asked.append((length, temperature))
        return verify(self, n, seed, length, temperature)

    monkeypatch.setattr(fastgen.Sampler, "_verify", watched)
    sampler = compile_case(at_length(by_name("wavenet-onehot")[0], 96), verify=True)
    assert sampler.any_length and len({length for length, _ in asked}) == 2 and {t for _, t in asked} == {1.0, 0.8}


def test_the_one_liner_tells_types_of_conditioning_apart() -> None:
    class Scaled(Labelled):
        def forward(self, x: Tensor, label: Tensor) -> Tensor:
            return super().forward(x, label.long() % 4) * (2.0 if label.dtype == torch.int32 else 1.0)

    model, options = Scaled().eval(), dict(shape=(1, 12), head=HEAD, seed=1, threads=1)
    long, short = (
        fastgen.sample(model, 8, cond=torch.full((8,), 1, dtype=t), **options) for t in (torch.int64, torch.int32)
    )
    assert not torch.equal(long, short)
    assert api._kind(torch.zeros(1, dtype=torch.int64)) != api._kind(torch.zeros(1, dtype=torch.int32))


def test_conditioning_is_remembered_by_type_and_shape() -> None:
    """The same bytes are not the same conditioning."""

    class Viewed(Labelled):
        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            return super().forward(x, c.long().clamp(0, 3).sum(-1) % 4)

    sampler = fastgen.compile(
        Viewed().eval(), (1, 12), HEAD, (torch.zeros(1, 2, dtype=torch.int32),), threads=1, verify=False
    )
    one = torch.tensor([[1.0, 2.0]])
    seen = []
    for c in (one, one.view(torch.int32)):
        request = Request(1, 0, cond=(c,))
        seen.append(sampler.conditioning.sources(sampler.programs(), request))
    assert not all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


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


# ---- what is kept, written and shown -----------------------------------------------------------------------------
def test_putting_again_makes_it_the_newest() -> None:
    kept: Kept[int, str] = Kept(2)
    for key in (1, 2, 1, 3):
        kept.put(key, str(key))
    assert kept.get(1) == "1" and kept.get(2) is None


def test_one_thread_makes_what_many_ask_for() -> None:
    kept: Kept[int, int] = Kept(2)
    made, ready = [], threading.Barrier(8)

    def make() -> int:
        made.append(1)
        threading.Event().wait(0.05)
        return 7

    def ask() -> None:
        ready.wait()
        assert kept.made(1, make) == 7

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert made == [1]


def test_forgetting_where_another_held_the_lock() -> None:
    """As in a child whose parent was in the middle of something."""
    kept: Kept[int, int] = Kept(2)
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with kept._lock:
            held.set()
            done.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    kept.clear()
    asked = threading.Thread(target=lambda: kept.put(1, 2), daemon=True)
    asked.start()
    asked.join(5)
    assert not asked.is_alive() and kept.get(1) == 2
    done.set()
    thread.join()


CONFIG: dict[str, Any] = dict(model="gated-pixelcnn", levels=4, dim=4, layers=2, classes=3, shape=[6, 6], hidden=5)


def test_rights_of_a_checkpoint(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        save_pretrained(build(CONFIG), tmp_path / "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o755
    assert {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "x").iterdir()} == {0o644}


def test_a_checkpoint_that_lacks_a_file_is_replaced(tmp_path: Path) -> None:
    model = build(CONFIG)
    save_pretrained(model, tmp_path / "x")
    (tmp_path / "x" / "config.json").unlink()
    save_pretrained(model, tmp_path / "x")
    assert from_pretrained(tmp_path / "x").config == model.config


def test_modules_made_by_other_threads_count_for_nothing(tmp_path: Path) -> None:
    save_pretrained(build(CONFIG), tmp_path / "x")
    stop = threading.Event()

    def make() -> None:
        while not stop.is_set():
            nn.Linear(1, 1)

    thread = threading.Thread(target=make)
    thread.start()
    try:
        for _ in range(20):
            assert from_pretrained(tmp_path / "x").config["dim"] == 4
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("backend", ["cpu", "reference", "naive"])
def test_progress_counts_from_zero_and_over_all_parts(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = by_name("masked-sequential")[0]
    sampler = compile_case(case, backend=backend, verify=False)
    monkeypatch.setattr(sampler.executor, "slots", lambda length: 2)
    seen: list[tuple[int, int]] = []
    sampler.sample(5, callback=lambda done, total: seen.append((done, total)))
    steps = sampler.spec.steps
    assert all(total == 5 * steps for _, total in seen) and [d for d, _ in seen] == sorted(d for d, _ in seen)
    assert max(d for d, _ in seen) > 4 * steps - 1 or backend != "cpu"
    assert min(d for d, _ in seen) < 2 * steps
    first: list[int] = []
    with pytest.raises(fastgen.Cancelled):
        sampler.sample(1, callback=lambda done, total: bool(first.append(done)))
    assert first[0] < steps, "asked before the end"


def test_a_stream_of_an_order_yields_what_is_complete() -> None:
    """Rows that are complete late hold back those behind them."""
    case = by_name("masked-sequential")[0]
    sampler = compile_case(case, verify=False)
    h, w = sampler.spec.grid
    model = nn.Conv2d(sampler.spec.channels, 1, 1)
    with torch.no_grad():
        model.weight.zero_()
    order = torch.arange(h * w).view(h, w).flip(0)  # from below
    backwards = fastgen.compile(model.eval(), (1, h, w), Bernoulli(), order=order, threads=1)
    rows = list(backwards.stream(2, seed=3))
    assert torch.equal(torch.cat(rows, 2), backwards.sample(2, seed=3))
