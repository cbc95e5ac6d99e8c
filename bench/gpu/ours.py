"""Times fastgen on one configuration, on one kind of team, at several batches.

    python -m bench.gpu.ours wavenet-nv --team cluster16 --batch 1,16 [--dtype bfloat16,float32] [--seconds S] [--lines FILE]

Rows: {config, begins, audio, parameters, steps}; {config, proof, dtype, team, ...}; and of each batch {config, name, dtype,
batch, team, rung, step_seconds, how} or, instead of times, `skipped` or `failed` with the reason. step_seconds: of one
step of the whole batch, one number a repeat. The first sites alone are timed first, so that there is a figure whatever
becomes of the rest; a later row of the same batch replaces an earlier one.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastgen
from bench import configs
from bench.configs import DTYPES, Case
from bench.gpu.clock import wait
from bench.gpu.lines import Lines, Row, turn
from bench.gpu.steps import NOT_RUN_STATUS
from fastgen.api import Sampler
from fastgen.backends.conditioning import Conditioning
from fastgen.backends.cuda import TEAMS, CudaExecutor
from fastgen.backends.request import Request
from fastgen.errors import Cancelled, FastgenError
from fastgen.program.records import Program

NAME = "fastgen"
REPEATS = 5
SITES = 4096  # of a sequence
FIRST_SITES = 64  # timed at least, behind the first report of a run
PROOF_SITES = 512  # of a sequence
DISTINCT = 4  # different conditioning inputs in a batch
Emit = Callable[[Row], None]


class Clock:
    """The time a contender has, shared evenly by what is still to be timed."""

    def __init__(self, seconds: float, parts: int) -> None:
        self.end, self.parts = time.perf_counter() + seconds, parts

    def share(self) -> float:
        """Seconds for the next part; 0 where there is none left."""
        left = max(0.0, self.end - time.perf_counter())
        share = left / max(self.parts, 1)
        self.parts -= 1
        return share if left > 0.5 else 0.0


def word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def begins(case: Case) -> Row:
    """What the report must know of a configuration."""
    return {"config": case.name, "audio": case.audio, "parameters": case.parameters, "steps": case.spec.steps}


class Harvested:
    """Conditioning that remembers what it found, on the device: the loop is timed without making the conditioning."""

    def __init__(self, conditioning: Conditioning, device: torch.device) -> None:
        self.conditioning, self.device, self.seconds = conditioning, device, 0.0
        self.known: dict[tuple[int, int], list[Tensor]] = {}

    def sources(self, program: Program, request: Request) -> list[Tensor]:
        key = (id(program), request.slots)
        if key not in self.known:
            began = time.perf_counter()
            self.known = {key: [c.to(self.device) for c in self.conditioning.sources(program, request)]}
            self.seconds = time.perf_counter() - began
        return self.known[key]


def conditioning(case: Case, batch: int) -> tuple[Tensor, ...]:
    """A few different ones in turn: making thousands on the CPU is not what is timed."""
    few = case.cond(min(batch, DISTINCT))
    return tuple(c[torch.arange(batch) % len(c)] for c in few)


def planned(case: Case) -> Sampler:
    """On the CPU, which leaves the device to whose turn it is."""
    return fastgen.compile(case.model, case.spec.shape, cond=case.cond(1), device="cpu", threads=1, verify=False)


def on_team(sampler: Sampler, dtype: torch.dtype, team: str) -> Sampler:
    """The same plan on the GPU: planning again takes long."""
    return sampler.with_executor(
        CudaExecutor(sampler.programs, sampler.conditioning, dtype, torch.device("cuda"), team)
    )


class _Marks:
    """Watches a run from row to row, and stops it when it takes too long. first: told the seconds of one step, as soon as
    FIRST_SITES are done."""

    def __init__(self, case: Case, batch: int, seconds: float, first: Callable[[Row], None]) -> None:
        self.batch, self.seconds, self.first = batch, seconds, first
        self.steps, self.sites = (
            case.spec.steps,
            FIRST_SITES * case.spec.steps // (case.spec.grid[0] * case.spec.grid[1]),
        )
        self.began = time.perf_counter()
        self.marks: list[tuple[int, float]] = []
        self.told = False

    def __call__(self, done: int, total: int) -> bool:
        self.marks.append((done // self.batch, time.perf_counter()))
        if not self.told and self.marks[-1][0] - self.marks[0][0] >= min(self.sites, self.steps // 2):
            self.told = True
            self.first(self.so_far())
        return not (self.told and self.marks[-1][1] - self.began > self.seconds)

    def so_far(self) -> Row:
        """Without the launch, if it can be told."""
        (a, began), (b, ended) = self.marks[0], self.marks[-1]
        if b == a:
            a, began = 0, self.began
        return {"step_seconds": [(ended - began) / (b - a)], "how": f"steps {a} to {b} of {self.steps}"}


def time_batch(case: Case, sampler: Sampler, batch: int, seconds: float, emit: Emit) -> None:
    """A row for the first sites, and one for whole runs, if two of them fit the time."""
    executor: Any = sampler.executor
    cond, steps = conditioning(case, batch), case.spec.steps

    def whole(seed: int, callback: Any = None) -> float:
        wait()
        began = time.perf_counter()
        sampler.sample(batch, cond=cond, seed=seed, callback=callback)
        wait()
        return time.perf_counter() - began

    marks = _Marks(case, batch, seconds / 2, emit)
    try:
        first = whole(0, marks) - executor.conditioning.seconds
    except Cancelled:
        emit(marks.so_far())
        return
    repeats = max(1, min(REPEATS, int(seconds / 2 / max(first, 1e-6))))
    row: Row = {"step_seconds": [whole(k + 1) / steps for k in range(repeats)], "how": "whole runs"}
    if cond:
        row["how"] += ", conditioning on the device before"
        row["conditioning_seconds"] = executor.conditioning.seconds
    emit(row)


def time_nothing(case: Case, sampler: Sampler) -> float:
    """What a call costs that draws no sample: part of every whole run, and none of the device's."""
    began = time.perf_counter()
    for _ in range(REPEATS):
        sampler.sample(0, cond=case.cond(1))
    return (time.perf_counter() - began) / REPEATS


def proved(case: Case, sampler: Sampler) -> Row:
    """Stepping against forward; of a sequence whose length nothing else decides, its first sites."""
    found = sampler.verify(length=min(PROOF_SITES, case.spec.sites[0]) if case.audio and not case.cond(1) else None)
    return {"ok": found.ok, "text": str(found), "max_abs_error": found.max_abs_error, "distance": found.distance}


def run(case: Case, sampler: Sampler, team: str, dtypes: list[torch.dtype], batches: list[int], seconds: float,
        emit: Emit) -> bool:  # fmt: skip
    """Every dtype and batch, and then the proof; whether all was exact and nothing failed. What is not exact is timed
    too, and the report says what it is."""
    clock, good = Clock(seconds, len(dtypes) * (len(batches) + 1)), True
    for dtype in dtypes:
        began = time.perf_counter()
        chosen = on_team(sampler, dtype, team)
        key: Row = {"config": case.name, "team": team, "dtype": word(dtype)}
        lowered = {"plan_seconds": sampler.plan.seconds, "lower_seconds": time.perf_counter() - began}
        executor: Any = chosen.executor
        executor.conditioning = Harvested(executor.conditioning, executor.device)
        for batch in batches:
            good &= _timed(case, chosen, {**key, "name": NAME, "batch": batch}, clock.share(), emit)
        executor.conditioning = executor.conditioning.conditioning
        clock.share()
        lowered["call_seconds"] = time_nothing(case, chosen)
        proof = proved(case, chosen)
        emit({**key, "proof": proof, **lowered})
        good &= proof["ok"]
    return good


def _timed(case: Case, sampler: Sampler, row: Row, seconds: float, emit: Emit) -> bool:
    executor, batch = sampler.executor, row["batch"]
    try:
        if isinstance(executor, CudaExecutor):
            row["rung"] = executor.rung(min(batch, executor.slots(None)))["text"]
        if seconds:
            time_batch(case, sampler, batch, seconds, lambda found: emit(row | found))
        else:
            emit({**row, "skipped": "no time left"})
    except torch.cuda.OutOfMemoryError:
        emit({**row, "skipped": "out of memory"})
    except (FastgenError, RuntimeError) as error:
        emit({**row, "failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]})
        return False
    return True


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="bench.gpu.ours", description=(__doc__ or "").split("\n")[0])
    p.add_argument("config", choices=configs.NAMES)
    p.add_argument("--team", choices=TEAMS, default="auto")
    p.add_argument("--batch", type=configs.batches, default=[1])
    p.add_argument("--dtype", default="bfloat16", help="comma-separated")
    p.add_argument("--seconds", type=float, default=30.0, help="for the device's part; what does not fit is left out")
    p.add_argument("--turn", type=Path, help="a file whose lock is the turn on the device")
    p.add_argument("--lines", type=Path)
    args = p.parse_args(arguments)
    args.dtypes = [DTYPES[name] for name in args.dtype.split(",") if name in DTYPES]
    if len(args.dtypes) != len(args.dtype.split(",")):
        p.error(f"--dtype takes {', '.join(DTYPES)}")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    emit = Lines(args.lines)
    case = configs.make(args.config, SITES)
    sampler = planned(case)
    with turn(args.turn, emit):
        emit(begins(case))
        try:
            good = run(case, sampler, args.team, args.dtypes, args.batch, args.seconds, emit)
        except ValueError as error:
            if "cannot hold" not in str(error):
                raise
            print(error)
            return NOT_RUN_STATUS
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
