"""Times a peer on one configuration, at several batches: the naive loop, or a careful loop with cached activations.

    python -m bench.gpu.peers wavenet-nv eager --batch 1,16 [--seconds S] [--lines FILE]

eager     one forward a step, in plain torch, bfloat16 and float32
graph     the same as a CUDA graph, bfloat16
compile   the same through torch.compile, bfloat16; each batch is compiled for itself, which takes long
queues    bench/eager.py on the device (WaveNets)

Rows as those of bench/gpu/ours.py. A peer that cannot is left out, and is no failure of ours.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import configs
from bench.configs import Case
from bench.eager import EagerWaveNet
from bench.gpu.clock import captured, time_once, wait
from bench.gpu.lines import Lines, Row, turn
from bench.gpu.ours import REPEATS, SITES, Clock, Emit, begins, word
from fastgen.models.wavenet import WaveNet
from fastgen.nn.choice import use_kernels_

FORWARD_SECONDS, FORWARDS = 0.3, 20  # of the naive loop: as many as that takes, at most so many
QUEUE_STEPS = 256
HALF, FULL = torch.bfloat16, torch.float32
NAMES = {
    "eager": "naive loop", "graph": "naive loop, CUDA graph", "compile": "naive loop, torch.compile",
    "queues": "eager queues",
}  # fmt: skip
NAIVE_DTYPES = {"eager": (HALF, FULL), "graph": (HALF,), "compile": (HALF,)}


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


def naive(kind: str, case: Case, batches: list[int], seconds: float, emit: Emit, device: str) -> None:
    """One forward a step. kind: eager, graph or compile."""
    dtypes = NAIVE_DTYPES[kind]
    window = f"the last {case.window} sites" if case.audio else "the image"
    clock = Clock(seconds, len(dtypes) * len(batches))
    for dtype in dtypes:
        model = naive_model(case, device, dtype)
        for batch in batches:
            row: Row = {"config": case.name, "name": NAMES[kind], "dtype": word(dtype), "batch": batch}
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
        run = captured(run)
    row["step_seconds"] = time_forward(run, seconds)
    return row


def queues(case: Case, batches: list[int], seconds: float, emit: Emit, device: str) -> None:
    """bench/eager.py on the device, in float32: a launch for every operation of every step bounds it, not arithmetic."""
    if not isinstance(case.model, WaveNet):
        return
    model = copy.deepcopy(case.model)
    use_kernels_(model, "torch").to(device)
    clock = Clock(seconds, len(batches))
    for batch in batches:
        row: Row = {"config": case.name, "name": NAMES["queues"], "dtype": "float32", "batch": batch}
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


def run(kind: str, case: Case, batches: list[int], seconds: float, emit: Emit, device: str = "cuda") -> None:
    if kind == "queues":
        queues(case, batches, seconds, emit, device)
    else:
        naive(kind, case, batches, seconds, emit, device)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="bench.gpu.peers", description=(__doc__ or "").split("\n")[0])
    p.add_argument("config", choices=configs.NAMES)
    p.add_argument("kind", choices=NAMES)
    p.add_argument("--batch", type=configs.batches, default=[1])
    p.add_argument("--seconds", type=float, default=30.0, help="the time it may take; what does not fit is left out")
    p.add_argument("--turn", type=Path, help="a file whose lock is the turn on the device")
    p.add_argument("--lines", type=Path)
    return p.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    emit = Lines(args.lines)
    case = configs.make(args.config, SITES)
    with turn(args.turn, emit):
        torch.backends.cudnn.benchmark = True
        emit(begins(case))
        run(args.kind, case, args.batch, args.seconds, emit)
    return 0


if __name__ == "__main__":
    sys.exit(main())
