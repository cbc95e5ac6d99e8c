"""Who is timed on a GPU. Each function times one contender on one configuration at several batches, and emits a row of
plain data for each: {config, name, dtype, batch, step_seconds, how, ...}, or one with `skipped` or `failed`, which says why.

step_seconds: seconds of one step of the whole batch, one number a repeat. Runs in a process of its own (gpu_timings.py),
so that neither an error of the device nor a slow compiler takes the others with it.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastgen
from bench.configs import Case
from bench.eager import EagerWaveNet
from fastgen.api import Sampler
from fastgen.backends.conditioning import Conditioning
from fastgen.backends.cuda import CudaExecutor
from fastgen.backends.request import Request
from fastgen.errors import Cancelled, FastgenError
from fastgen.models.wavenet import WaveNet
from fastgen.nn.choice import use_kernels_
from fastgen.program.records import Program

Row = dict[str, Any]
Emit = Callable[[Row], None]
REPEATS = 5
FORWARD_SECONDS, FORWARDS = 0.3, 20  # of the naive loop: as many as that takes, at most so many
QUEUE_STEPS = 256
DISTINCT = 4  # different conditioning inputs in a batch


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


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# ---- ours -----------------------------------------------------------------------------------------------------------
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


def with_dtype(sampler: Sampler, dtype: torch.dtype) -> Sampler:
    """The same plan with products in another type: planning again takes long."""
    other = copy.copy(sampler)
    assert isinstance(sampler.executor, CudaExecutor)
    executor = sampler.executor
    other.dtype = dtype
    other.executor = CudaExecutor(sampler.programs, executor.conditioning, dtype, executor.device, executor.team)
    return other


def time_sampler(case: Case, sampler: Sampler, batch: int, seconds: float) -> Row:
    """Whole runs, or, where one would take longer than `seconds`, its first part."""
    executor: Any = sampler.executor
    harvested: Harvested = executor.conditioning
    cond, steps = conditioning(case, batch), case.spec.steps
    marks: list[tuple[int, float]] = [(0, time.perf_counter())]

    def watch(done: int, total: int) -> bool:
        marks.append((done // batch, time.perf_counter()))
        return marks[-1][1] - marks[0][1] < seconds / 2

    def whole(seed: int, callback: Any = None) -> float:
        wait()
        began = time.perf_counter()
        sampler.sample(batch, cond=cond, seed=seed, callback=callback)
        wait()
        return time.perf_counter() - began

    try:
        first = whole(0, watch)
    except Cancelled:
        (a, began), (b, ended) = marks[min(1, len(marks) - 2)], marks[-1]  # without the launch, if it can be told
        return {"step_seconds": [(ended - began) / (b - a)], "how": f"steps {a} to {b} of {steps}, extrapolated"}
    first -= harvested.seconds
    repeats = max(1, min(REPEATS, int(seconds / 2 / max(first, 1e-6))))
    row: Row = {"step_seconds": [whole(k + 1) / steps for k in range(repeats)], "how": "whole runs"}
    if case.cond(1):
        row["how"] += ", conditioning on the device before"
        row["conditioning_seconds"] = harvested.seconds
    return row


def verified(sampler: Sampler) -> Row:
    found = sampler.verify()
    return {"ok": found.ok, "text": str(found), "max_abs_error": found.max_abs_error, "scale": found.scale}


def ours(
    case: Case, batches: list[int], seconds: float, emit: Emit, make: Callable[[Case], Sampler] | None = None
) -> None:
    """The public call, in bfloat16 and float32. Refuses to time a sampler that is not exact."""
    began = time.perf_counter()
    sampler = (make or compiled)(case)
    spent = time.perf_counter() - began
    plan = {"plan_seconds": sampler.plan.seconds, "compile_seconds": spent}
    dtypes = (torch.bfloat16, torch.float32) if make is None else (sampler.dtype,)
    clock = Clock(seconds - spent, len(dtypes) * len(batches))
    for dtype in dtypes:
        chosen = sampler if dtype == sampler.dtype else with_dtype(sampler, dtype)
        proof = verified(chosen)
        emit({"config": case.name, "proof": proof, "dtype": word(dtype), **plan})
        executor: Any = chosen.executor
        executor.conditioning = Harvested(executor.conditioning, executor.device)
        for batch in batches:
            row = {"config": case.name, "name": "fastgen", "dtype": word(dtype), "batch": batch}
            share = clock.share()
            if not proof["ok"]:
                row["failed"] = "stepping does not reproduce forward"
            elif not share:
                row["skipped"] = "no time left"
            else:
                try:
                    row |= time_sampler(case, chosen, batch, share)
                except torch.cuda.OutOfMemoryError:
                    row["skipped"] = "out of memory"
                except RuntimeError as error:  # a peer that cannot is said, and is no failure of ours
                    row["skipped"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                except FastgenError as error:
                    row["failed"] = str(error).splitlines()[0]
                if isinstance(executor, CudaExecutor):
                    row["rung"] = executor.rung(min(batch, executor.slots(None)))["text"]
            emit(row)
        executor.conditioning = executor.conditioning.conditioning


def compiled(case: Case) -> Sampler:
    return fastgen.compile(
        case.model, case.spec.shape, cond=case.cond(1), device="cuda", dtype=torch.bfloat16, verify=False
    )


# ---- the naive loop ---------------------------------------------------------------------------------------------------
def naive_inputs(case: Case, batch: int, device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    """What one step of the naive loop hands to forward; random values, as speed may depend on them."""
    x, *cond = case.forward_inputs(batch)
    made = torch.Generator().manual_seed(0)
    if x.is_floating_point():
        x = torch.rand(x.shape, generator=made) * 2 - 1
    inputs = (x, *cond)
    return tuple(c.to(device, dtype) if c.is_floating_point() else c.to(device) for c in inputs)


def naive_model(case: Case, device: str, dtype: torch.dtype) -> torch.nn.Module:
    """In plain torch, as most people have it: without fastgen's own kernels."""
    model = use_kernels_(copy.deepcopy(case.model), "torch")
    return model.to(device, dtype).eval()


def time_forward(run: Callable[[], Any], seconds: float) -> list[float]:
    """Seconds of one forward, on the device's clock."""
    for _ in range(2):
        run()
    wait()
    times: list[float] = []
    began = time.perf_counter()
    while not times or (len(times) < FORWARDS and time.perf_counter() - began < min(seconds, FORWARD_SECONDS)):
        times.append(time_once(run))
    return times


def time_once(run: Callable[[], Any]) -> float:
    if not torch.cuda.is_available():
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def captured(model: Callable[..., Any], inputs: tuple[Any, ...]) -> Callable[[], Any]:
    """One forward as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(*inputs)
    return graph.replay


def naive(
    kind: str, dtypes: tuple[torch.dtype, ...], case: Case, batches: list[int], seconds: float, emit: Emit, device: str
) -> None:
    """One forward a step. kind: eager, graph or compile."""
    name = {"eager": "naive loop", "graph": "naive loop, CUDA graph", "compile": "naive loop, torch.compile"}[kind]
    window = f"the last {case.window} sites" if case.audio else "the image"
    clock = Clock(seconds, len(dtypes) * len(batches))
    for dtype in dtypes:
        model = naive_model(case, device, dtype)
        for batch in batches:
            row: Row = {"config": case.name, "name": name, "dtype": word(dtype), "batch": batch}
            share = clock.share()
            if share:
                try:
                    row |= _one_forward(kind, model, naive_inputs(case, batch, device, dtype), share)
                    row["how"] = f"one forward over {window} x {case.spec.steps} steps"
                except torch.cuda.OutOfMemoryError:
                    row["skipped"] = "out of memory"
                except RuntimeError as error:  # a peer that cannot is said, and is no failure of ours
                    row["skipped"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            else:
                row["skipped"] = "no time left"
            emit(row)
            if device == "cuda":
                torch.cuda.empty_cache()


@torch.no_grad()
def _one_forward(kind: str, model: torch.nn.Module, inputs: tuple[Any, ...], seconds: float) -> Row:
    row: Row = {}
    run: Callable[[], Any] = lambda: model(*inputs)  # noqa: E731
    if kind == "compile":
        torch.compiler.reset()
        fast = torch.compile(model, dynamic=False)
        began = time.perf_counter()
        fast(*inputs)
        wait()
        row["compile_seconds"] = time.perf_counter() - began
        run = lambda: fast(*inputs)  # noqa: E731
    elif kind == "graph":
        run = captured(model, inputs)
    row["step_seconds"] = time_forward(run, seconds)
    return row


# ---- the queue-cached loop ----------------------------------------------------------------------------------------------
def queues(case: Case, batches: list[int], seconds: float, emit: Emit, device: str) -> None:
    """bench/eager.py on the device, in float32: a launch for every operation of every step bounds it, not arithmetic."""
    if not isinstance(case.model, WaveNet):
        return
    model = copy.deepcopy(case.model)
    use_kernels_(model, "torch").to(device)
    clock = Clock(seconds, len(batches))
    for batch in batches:
        row: Row = {"config": case.name, "name": "eager queues", "dtype": "float32", "batch": batch}
        share = clock.share()
        if share:
            cond = tuple(c.to(device) for c in case.cond(batch, QUEUE_STEPS))
            with torch.device(device):  # its state is made by torch.zeros and the like
                peer = EagerWaveNet(model, batch, cond, QUEUE_STEPS)
                row |= {"step_seconds": _steps(peer, share), "how": f"{QUEUE_STEPS} steps"}
        else:
            row["skipped"] = "no time left"
        emit(row)


def _steps(peer: EagerWaveNet, seconds: float) -> list[float]:
    peer.run(QUEUE_STEPS // 8)
    wait()
    times: list[float] = []
    began = time.perf_counter()
    while not times or (len(times) < REPEATS and time.perf_counter() - began < seconds / 2):
        start = time.perf_counter()
        peer.run(QUEUE_STEPS)
        wait()
        times.append((time.perf_counter() - start) / QUEUE_STEPS)
    return times


# ---- all of a kind ------------------------------------------------------------------------------------------------------
HALF, FULL = torch.bfloat16, torch.float32
COMPILED_BATCHES = (1, 16)  # each is compiled for itself, which takes long


def run_kind(kind: str, case: Case, batches: list[int], seconds: float, emit: Emit, device: str = "cuda") -> None:
    """kind: ours, peers or compile. Rows of the ones most wanted come first."""
    if device == "cuda":
        torch.backends.cudnn.benchmark = True
    if kind == "ours":
        ours(case, batches, seconds, emit)
    elif kind == "compile":
        naive("compile", (HALF,), case, [b for b in batches if b in COMPILED_BATCHES], seconds, emit, device)
    else:
        end = time.perf_counter() + seconds
        naive("eager", (HALF, FULL), case, batches, seconds / 2, emit, device)
        if device == "cuda":
            naive("graph", (HALF,), case, batches, (end - time.perf_counter()) / 2, emit, device)
        queues(case, batches, end - time.perf_counter(), emit, device)
