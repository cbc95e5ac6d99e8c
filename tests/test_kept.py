"""What is kept between calls, from many threads and across a fork."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import fastgen
from fastgen import planned
from fastgen.errors import ModelChangedError
from fastgen.kept import Kept
from fastgen.planned import Planned
from tests.oracle import at_length, by_name, compile_case


def test_the_oldest_goes_first() -> None:
    kept: Kept[int, str] = Kept(2)
    kept.put(1, "one")
    kept.put(2, "two")
    assert kept.get(1) == "one"
    kept.put(3, "three")
    assert (kept.get(1), kept.get(2), kept.get(3)) == ("one", None, "three")
    assert kept.made(2, lambda: "again") == "again" and kept.made(2, lambda: "not asked for") == "again"
    assert kept.get(1) is None
    kept.clear()
    assert kept.get(2) is None


def test_one_sampler_in_threads_at_many_lengths() -> None:
    case = by_name("wavenet-onehot")[0]
    sampler = compile_case(at_length(case, 96), threads=1)
    lengths = range(40, 52)
    wanted = {n: sampler.sample(1, seed=1, length=n) for n in lengths}
    wrong: list[object] = []

    def work(k: int) -> None:
        for r in range(30):
            n = lengths[(7 * k + r) % len(lengths)]
            try:
                if not torch.equal(sampler.sample(1, seed=1, length=n), wanted[n]):
                    wrong.append(n)
            except Exception as error:
                wrong.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    finally:
        sys.setswitchinterval(before)
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_forked_child(threads: int) -> None:
    """A sampler of the parent, and what the one-liner remembers, make their engines again; the parent's go on."""
    case = by_name("masked-sequential")[0]
    model, sampler = case.build(), compile_case(case, threads=threads)
    options: Any = dict(shape=case.shape, head=case.head, seed=1, threads=threads)
    wanted, theirs = fastgen.sample(model, 2, **options), sampler.sample(3, seed=2)
    child = os.fork()
    if child == 0:  # no assertion leaves it: it is pytest's copy
        code = 1
        try:
            code = 0 if torch.equal(fastgen.sample(model, 2, **options), wanted) else 2
            code = code or (0 if torch.equal(sampler.sample(3, seed=2), theirs) else 3)
        finally:
            os._exit(code)
    deadline = time.monotonic() + 60
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    if ended == (0, 0):
        os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(ended[1]) == 0 and ended[0] == child
    assert torch.equal(sampler.sample(3, seed=2), theirs)


# ---- samplers that travel --------------------------------------------------------------------------------------------
def by_pickle(sampler: fastgen.Sampler) -> fastgen.Sampler:
    made: fastgen.Sampler = pickle.loads(pickle.dumps(sampler))
    return made


TRAVELLERS = ["masked-sequential", "wavenet-onehot", "gated-embedding", "order-vector"]


@pytest.mark.parametrize("send", [by_pickle, copy.deepcopy])
@pytest.mark.parametrize("name", TRAVELLERS)
def test_a_sampler_travels(name: str, send: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its plan, which is not made again, and with bytes that are the same."""
    case = by_name(name)[0]
    sampler = compile_case(case)
    cond = case.conds(3)
    wanted = sampler.sample(3, seed=5, cond=cond)
    monkeypatch.setattr(planned, "build_plan", lambda *_: pytest.fail("planned again"))
    again = send(sampler)
    assert torch.equal(again.sample(3, seed=5, cond=cond), wanted) and again.model is not sampler.model
    assert again.verify().ok and str(again.plan) == str(sampler.plan)
    with torch.no_grad():
        next(p for p in again.model.parameters() if p.numel() > 1).mul_(2)
    with pytest.raises(ModelChangedError):
        again.sample(1, cond=case.conds(1))
    assert torch.equal(sampler.sample(3, seed=5, cond=cond), wanted), "the first has weights of its own"
    monkeypatch.undo()
    again.refresh()
    assert again.verify().ok


def test_a_sampler_of_changed_weights_does_not_travel() -> None:
    sampler = compile_case(by_name("masked-sequential")[0])
    with torch.no_grad():
        next(p for p in sampler.model.parameters() if p.numel() > 1).mul_(2)
    with pytest.raises(ModelChangedError):
        pickle.dumps(sampler)


def test_a_sampler_in_another_process(tmp_path: Path) -> None:
    case = by_name("masked-sequential")[0]
    sampler = compile_case(case)
    (tmp_path / "sampler").write_bytes(pickle.dumps(sampler))
    code = (
        "import pickle, sys, torch\n"
        "sampler = pickle.loads(open(sys.argv[1], 'rb').read())\n"
        "torch.save(sampler.sample(2, seed=9), sys.argv[2])\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "sampler"), str(tmp_path / "drawn")]
    subprocess.run(command, check=True, timeout=120, cwd=Path(__file__).parents[1])
    assert torch.equal(torch.load(tmp_path / "drawn", weights_only=True), sampler.sample(2, seed=9))


# ---- what the one-liner keeps ----------------------------------------------------------------------------------------
def one(model: torch.nn.Module, n: int = 1, **options: Any) -> torch.Tensor:
    case = by_name("masked-sequential")[0]
    return fastgen.sample(model, n, shape=case.shape, head=case.head, threads=1, **options)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Every plan that is made, by a weak reference."""
    plans: list[object] = []
    make = Planned.__init__

    def watched(self: Planned, *args: Any) -> None:
        plans.append(weakref.ref(self))
        make(self, *args)

    monkeypatch.setattr(Planned, "__init__", watched)
    return plans


def test_threads_that_ask_at_once_wait_for_one_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    plans, model = counted(monkeypatch), by_name("masked-sequential")[0].build()
    start, drawn = threading.Barrier(8), []

    def ask() -> None:
        start.wait()
        drawn.append(one(model, 2, seed=3))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(plans) == 1 and len(drawn) == 8 and all(torch.equal(x, drawn[0]) for x in drawn)


def test_models_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sampler lives as long as its model, and no longer; asked for another, it goes."""
    plans, case = counted(monkeypatch), by_name("masked-sequential")[0]
    model: torch.nn.Module | None = case.build()
    gone = weakref.ref(model)
    one(model)  # type: ignore[arg-type]
    model = None
    gc.collect()
    assert gone() is None
    one(other := case.build())
    gc.collect()
    assert [p() is None for p in plans] == [True, False]  # type: ignore[operator]
    fastgen.forget(other)
    gc.collect()
    assert plans[1]() is None  # type: ignore[operator]
    one(other)
    assert len(plans) == 3
    fastgen.forget()
    gc.collect()
    assert plans[2]() is None  # type: ignore[operator]


def test_a_sampler_keeps_its_model() -> None:
    case = by_name("masked-sequential")[0]
    sampler = fastgen.compile(case.build(), case.shape, case.head, threads=1)
    gc.collect()
    assert sampler.sample(1).shape == (1, *case.shape)
    sampler.refresh()


def test_what_is_kept_is_bounded_in_bytes() -> None:
    kept: Kept[int, int] = Kept(8, 10, lambda value: value)
    for k, size in enumerate([4, 4, 4]):
        kept.put(k, size)
    assert kept.get(0) is None and kept.get(1) == 4
    kept.put(3, 100)
    assert kept.get(3) == 100 and kept.get(1) is None, "at least one"


def test_a_maker_that_fails_leaves_the_next_to_try() -> None:
    kept: Kept[int, str] = Kept(2)
    asked: list[int] = []

    def fails() -> str:
        asked.append(1)
        time.sleep(0.05)
        raise ValueError("no")

    errors: list[Exception] = []

    def ask() -> None:
        try:
            kept.made(1, fails)
        except ValueError as error:
            errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(asked) == len(errors) == 3 and kept.made(1, lambda: "yes") == "yes"


@pytest.mark.parametrize("misspelt", ["temprature", "theads", "progres"])
def test_a_misspelt_option_fails_before_anything_is_planned(misspelt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plans, model = counted(monkeypatch), by_name("masked-sequential")[0].build()
    with pytest.raises(TypeError, match=misspelt):
        one(model, **{misspelt: 1})
    assert not plans
    with pytest.raises(TypeError, match=misspelt):
        compile_case(by_name("masked-sequential")[0]).stream(1, **{misspelt: 1})


def test_a_frozen_sampler_does_not_look() -> None:
    case = by_name("masked-sequential")[0]
    sampler = compile_case(case)
    wanted, frozen = sampler.sample(2, seed=1), sampler.frozen()
    with torch.no_grad():
        next(p for p in sampler.model.parameters() if p.numel() > 1).mul_(2)
    assert torch.equal(frozen.sample(2, seed=1), wanted)
    with pytest.raises(ModelChangedError):
        sampler.sample(2, seed=1)
