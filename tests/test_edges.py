"""Edges that a change by one would not survive: ties, bounds, keys of what is kept, rights of files, last steps."""

# As users write: modules are not annotated in full.
# mypy: disable-error-code="no-any-return,no-untyped-def"

from __future__ import annotations

import math
import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastgen
from fastgen import api
from fastgen.backends.request import Request
from fastgen.heads import Bernoulli, Categorical, GaussianMixture, Head, LogisticMixture
from fastgen.heads.choice import pick, scale_error, unequal
from fastgen.kept import Kept
from fastgen.models import build
from fastgen.planned import Planned
from fastgen.pretrained import from_pretrained, save_pretrained
from fastgen.variations import others, variations
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
    made = variations(sampler.spec, request, others(sampler.planned.on_cpu, sampler.spec, (torch.tensor([1]),), 1))
    assert made.cond[0].tolist() == [2, 1, 2] and made.mask is not None
    assert made.mask[:, :, 0].sum(1).tolist() == [0, 0, 6], "the last one, every second value"


def test_conditioning_of_which_nothing_is_finite_is_no_variation() -> None:
    class Picky(Labelled):
        def forward(self, x: Tensor, label: Tensor) -> Tensor:
            return super().forward(x, label) + torch.where(label == 2, math.nan, 0.0)[:, None, None]

    sampler = fastgen.compile(Picky().eval(), (1, 12), HEAD, (torch.tensor([1]),), threads=1, verify=False)
    request, found = (
        Request(2, 0, cond=(torch.tensor([1, 1]),)),
        others(sampler.planned.on_cpu, sampler.spec, (torch.tensor([1]),), 1),
    )
    made = variations(sampler.spec, request, found)
    assert made.cond[0].tolist() == [0, 1]


def test_compile_proves_a_second_length_at_another_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int | None, float]] = []
    verify = Planned.verify

    def watched(self: Planned, *args: Any, **options: Any) -> Any:
        asked.append((options["length"], options.get("temperature", 1.0)))
        return verify(self, *args, **options)

    monkeypatch.setattr(Planned, "verify", watched)
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
