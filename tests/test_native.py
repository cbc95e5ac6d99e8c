"""The native executor: the bytes of a sample depend on its name alone, and malformed programs never crash it."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastgen import Sampler, rng
from fastgen.backends.cpu import CpuExecutor
from fastgen.backends.request import Request
from fastgen.native import native
from tests.cases import Case, cases
from tests.conftest import Compiled
from tests.oracle import at_length, by_name, compile_case

every_case = pytest.mark.parametrize("case", cases(), ids=str)
WIDE = [
    *by_name("rgb-unrolled", "unet-pixelcnnpp", "gated-embedding", "wavenet-vocoder", "masked-table"),
    at_length(by_name("wavenet-batch-folded")[0], 96),
]


def run(executor: Any, case: Case, n: int, first: int = 0, seed: int = 3, total: int = 6) -> tuple[Tensor, Tensor]:
    cond = tuple(c[first : first + n] if isinstance(c, Tensor) else c for c in case.conds(total))
    values, params = executor.run(Request(n, seed, first, cond=cond, want_params=True))
    return values, params


def same_bytes(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    """Bit by bit: a negative zero is not a zero."""
    return all(
        torch.equal(x.contiguous().view(torch.int32), y.contiguous().view(torch.int32))
        for x, y in zip(a, b, strict=True)
    )


# ---- D1: bytes -------------------------------------------------------------------------------------------------------
@every_case
def test_bytes_do_not_depend_on_the_batch(case: Case, compiled: Compiled) -> None:
    executor = compiled(case).executor
    together = run(executor, case, 6)
    assert same_bytes(run(executor, case, 6), together), "a second run"
    for first, n in ((4, 1), (0, 1), (2, 3), (0, 5)):
        part = tuple(t[first : first + n] for t in together)
        assert same_bytes(run(executor, case, n, first), part), f"samples {first} to {first + n}"  # type: ignore[arg-type]


@pytest.mark.parametrize("case", WIDE, ids=str)
def test_bytes_do_not_depend_on_threads(case: Case, compiled: Compiled) -> None:
    sampler = compiled(case)
    conditioning = sampler.conditioning
    expected = run(sampler.executor, case, 6)
    for threads in (2, 3, 5):
        executor = CpuExecutor(sampler.programs, conditioning, torch.float32, threads)
        assert executor.engine(None).threads == threads
        for n, first in ((6, 0), (1, 3)):
            part = tuple(t[first : first + n] for t in expected)
            assert same_bytes(run(executor, case, n, first), part), f"{threads} threads, {n} samples"  # type: ignore[arg-type]


def test_chunks_of_a_large_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """More samples than fit side by side are the same samples."""
    (case,) = by_name("gated-cropped")
    sampler = compile_case(case)
    whole = sampler.sample(7, seed=4, cond=case.conds(7))
    monkeypatch.setattr(sampler.executor, "slots", lambda length: 3)
    assert torch.equal(sampler.sample(7, seed=4, cond=case.conds(7)), whole)
    shard = sampler.sample(3, seed=4, first=4, cond=tuple(c[4:] for c in case.conds(7)))
    assert torch.equal(shard, whole[4:])


@pytest.mark.parametrize("first", [0, 2**32 - 2, 2**40, 2**63 - 8])
def test_sample_indices_of_any_size(first: int, compiled: Compiled) -> None:
    (case,) = by_name("masked-mlp")
    a, b = (compiled(case, backend=k).sample(4, first=first, seed=2**63) for k in ("cpu", "reference"))
    assert torch.equal(a, b)
    assert torch.equal(a[3:], compiled(case).sample(1, first=first + 3, seed=2**63))


def test_given_values_do_not_leak_between_samples(compiled: Compiled) -> None:
    (case,) = by_name("unet-pixelcnnpp")
    sampler = compiled(case)
    free = sampler.sample(3, seed=1)
    given, mask = -torch.ones_like(free), torch.zeros(free.shape, dtype=torch.bool)
    mask[1, :, :3] = True
    x = sampler.sample(3, seed=1, given=given, mask=mask)
    assert torch.equal(x[0], free[0]) and torch.equal(x[2], free[2]) and not torch.equal(x[1], free[1])


# ---- D0: noise -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", [0, 1, 2**32 + 5, 2**64 - 1])
def test_noise_is_that_of_the_counters(seed: int) -> None:
    samples = torch.tensor([0, 1, 2**31, 2**32, 2**40 + 3])
    for step in (0, 7, 2**31, 2**32 - 1):
        expected = rng.uniforms(seed, samples, step, 6)
        assert torch.equal(
            torch.from_numpy(native().uniforms(seed, samples.numpy().astype(np.uint64), step, 6)), expected
        )


@every_case
def test_draws_take_the_noise_of_their_step(case: Case, compiled: Compiled) -> None:
    """From the executor's own parameters, heads and counters make the executor's values again."""
    values, params = run(compiled(case).executor, case, 3)
    u = rng.uniforms(3, torch.arange(3), torch.arange(case.steps), case.head.num_uniforms(case.channels))
    again = case.head.draw(params, u)
    drawn = case.by_step(values)
    if case.head.discrete or case.head.grid_levels:
        assert torch.equal(drawn, again)
    else:
        torch.testing.assert_close(drawn, again, atol=1e-6, rtol=1e-6)


# ---- one engine, several callers -------------------------------------------------------------------------------------
def test_a_callback_cannot_start_the_same_engine() -> None:
    (case,) = by_name("masked-sequential")
    sampler = compile_case(case)

    def again(done: int, total: int) -> None:
        sampler.sample(1)

    with pytest.raises(RuntimeError, match="running already"):
        sampler.sample(1, callback=again)
    assert sampler.sample(1).shape == (1, *case.shape)


def test_callers_wait_for_their_turn() -> None:
    (case,) = by_name("masked-sequential")
    sampler = compile_case(case, threads=2)
    expected = sampler.sample(3, seed=2)
    results: list[Tensor] = []
    threads = [threading.Thread(target=lambda: results.append(sampler.sample(3, seed=2))) for _ in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert len(results) == 6 and all(torch.equal(x, expected) for x in results)


def test_threads_end_with_their_sampler() -> None:
    def alive() -> int:
        return len(os.listdir("/proc/self/task"))

    if not os.path.isdir("/proc/self/task"):
        pytest.skip("counts threads in /proc")
    gc.collect()
    before = alive()
    sampler: Sampler | None = compile_case(by_name("masked-sequential")[0], threads=4)
    assert sampler is not None
    sampler.sample(1)
    assert alive() == before + 3
    del sampler
    gc.collect()
    assert alive() == before


# ---- malformed tables ------------------------------------------------------------------------------------------------
def tables_of(case: Case) -> dict[str, Any]:
    return compile_case(case).programs(None).tables()


def test_dtypes_of_the_tables_are_checked() -> None:
    tables = tables_of(by_name("masked-sequential")[0])
    for name, table in tables.items():
        with pytest.raises(ValueError, match=f"'?{name}'? is missing"):
            native().CpuExecutor({k: v for k, v in tables.items() if k != name}, 1)
        if isinstance(table, np.ndarray):
            with pytest.raises(ValueError, match=f"'{name}' must be"):
                native().CpuExecutor(
                    {**tables, name: table.astype(np.float64) if table.dtype.names is None else table.tolist()}, 1
                )


def test_a_value_is_drawn_once_in_a_period() -> None:
    for name in ("order-planes", "order-columns", "order-vector"):
        tables = tables_of(by_name(name)[0])
        site, phase = tables["step_site"].copy(), tables["step_phase"].copy()
        site[-1], phase[-1] = site[0], phase[0]
        with pytest.raises(ValueError, match=f"phase {phase[0]} of site {site[0]} is drawn twice"):
            native().CpuExecutor({**tables, "step_site": site, "step_phase": phase}, 1)


@pytest.mark.parametrize("name", ["rows", "cols", "steps", "arena", "row_len", "period"])
@pytest.mark.parametrize("value", [None, 2.5, "3", -1, 2**70, [1]], ids=repr)
def test_numbers_of_the_tables_are_checked(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name} is {re.escape(repr(value))}, expected 0 to"):
        native().CpuExecutor({**tables_of(by_name("masked-sequential")[0]), name: value}, 1)


def test_tables_have_one_axis() -> None:
    tables = tables_of(by_name("masked-sequential")[0])
    with pytest.raises(ValueError, match="'step_site' has 2 axes, expected 1"):
        native().CpuExecutor({**tables, "step_site": tables["step_site"][None]}, 1)


@pytest.mark.parametrize(
    "case", by_name("rgb-unrolled", "wavenet-embedded", "gated-cropped", "masked-layernorm"), ids=str
)
def test_mutated_tables_never_crash(case: Case) -> None:
    """Each is refused with ValueError, or runs. In a process of its own, so that a crash would be seen as one."""
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([os.getcwd(), *sys.path]))
    command = [sys.executable, "-m", "tests.mutate", case.name]
    child = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env, check=False)
    assert child.returncode == 0, f"exit {child.returncode} after {child.stdout[-600:]}\n{child.stderr[-2000:]}"
    refused, ran = map(int, child.stdout.strip().splitlines()[-1].split())
    assert refused + ran == 300 and ran > 30 and refused > 30


def test_the_draw_checks_its_head() -> None:
    """Called with any record: refused by name, or within bounds."""
    right = dict(kind=1, channels=1, phases=1, enc=1, n=5, params=5, table=-1, start=-1)
    params, u = np.zeros((1, 5), np.float32), np.full((1, 1), 0.5)

    def head(**fields: int) -> Any:
        record = np.zeros(1, native().dtypes()["Head"])
        for name, value in {**right, **fields}.items():
            record[name] = value
        return record

    assert native().draw(head(), params, u).tolist() == [[2.0]]
    for wrong in (dict(n=10**9), dict(n=6), dict(n=0), dict(n=-3), dict(kind=9), dict(channels=0), dict(kind=0, n=5)):
        with pytest.raises(ValueError, match="head: "):
            native().draw(head(**wrong), params, u)
