"""Times one fused layer, the mixture loss or a training step against its contenders: forward, forward and backward, memory.

Contenders take turns on the same tensors; a figure is the median of rounds of replayed CUDA graphs, so it is the time of the
GPU and not of Python; the whole training step is timed as it runs, Python included.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.gpu.clock import captured
from fastgen import models, ops
from fastgen.nn import use_kernels_
from fastgen.train.loss import bits_per_dim
from tests.kernel_shapes import Layer

Run = Callable[[], Any]
Row = dict[str, Any]
LOSS, STEP = "mixture loss, 10 of 3 channels", "training step"


def timed(run: Run, device: str, least: float = 0.02) -> float:
    """Seconds of one run: as many in a row as take `least` seconds."""
    count = 1
    while True:
        if device == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            start.record()
            for _ in range(count):
                run()
            end.record()
            torch.cuda.synchronize()
            seconds = start.elapsed_time(end) / 1e3
        else:
            began = time.perf_counter()
            for _ in range(count):
                run()
            seconds = time.perf_counter() - began
        if seconds >= least:
            return seconds / count
        count = max(2 * count, int(1.2 * count * least / max(seconds, 1e-6)))


def peak(run: Run, device: str) -> int:
    """Bytes that a run takes beyond what is there already; 0 on a device that does not count them."""
    if device != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


def race(forward: dict[str, Callable[[], Tensor]], leaves: list[Tensor], rounds: int, device: str) -> Row:
    """Per contender medians of forward and of forward + backward in seconds, and peak bytes of the latter."""
    both: dict[str, Run] = {}
    with torch.no_grad():
        seed = torch.randn_like(next(iter(forward.values()))())
    for name, run in forward.items():
        both[name] = lambda run=run: torch.autograd.grad(run(), leaves, seed)  # type: ignore[misc]

    def without_gradients(run: Run) -> Run:
        return torch.no_grad()(run)

    graph: Callable[[Run], Run] = captured if device == "cuda" else lambda run: run
    rows: Row = {}
    graphs: dict[str, tuple[Run, Run]] = {}
    for name in forward:
        for warm in (without_gradients(forward[name]), both[name]):
            warm()  # compiles, and fills the allocator's pools
        rows[name] = {"peak_bytes": peak(both[name], device), "forward": [], "both": []}
        graphs[name] = (graph(without_gradients(forward[name])), graph(both[name]))
    for _ in range(rounds):
        for name, (first, second) in graphs.items():
            rows[name]["forward"].append(timed(first, device))
            rows[name]["both"].append(timed(second, device))
    return rows


def time_layer(layer: Layer, dtype: torch.dtype, batch: int, rounds: int, device: str, compiled: bool = True) -> Row:
    torch.manual_seed(0)
    batch = max(1, batch // 8) if layer.op == "wavenet" else batch
    tensors = layer.tensors(batch, dtype, device)
    plain = torch.compile(layer.run, fullgraph=True) if compiled else None
    forward: dict[str, Callable[[], Tensor]] = {
        "fused": lambda: layer.run(tensors, fused=True),
        "eager": lambda: layer.run(tensors, fused=False),
    }
    if plain is not None:
        forward["compile"] = lambda: plain(tensors, fused=False)
    rows = race(forward, list(tensors.values()), rounds, device)
    return {"name": layer.name, "dtype": str(dtype).removeprefix("torch."), "batch": batch, "rows": rows}


def time_loss(dtype: torch.dtype, batch: int, rounds: int, device: str, compiled: bool = True, size: int = 32) -> Row:
    """The mixture's log-likelihood of RGB images, parameters as the model returns them."""
    torch.manual_seed(0)
    params = torch.randn(batch, 100, size, size, device=device).to(dtype).requires_grad_()
    grid = torch.randint(0, 256, (batch, size, size, 3), device=device)
    x = grid / 127.5 - 1
    forward: dict[str, Callable[[], Tensor]] = {}
    contenders = {"fused": ops.logistic_mixture_log_prob, "eager": ops.logistic_mixture_log_prob_reference}
    if compiled:
        contenders["compile"] = torch.compile(ops.logistic_mixture_log_prob_reference, fullgraph=True)
    for name, function in contenders.items():
        forward[name] = lambda function=function: function(params.movedim(1, -1), x)  # type: ignore[misc]
    rows = race(forward, [params], rounds, device)
    return {
        "name": LOSS,
        "dtype": str(dtype).removeprefix("torch."),
        "batch": batch,
        "rows": rows,
    }


def time_step(name: str, batch: int, rounds: int, device: str, compiled: bool = True) -> Row:
    """A whole step of Adam under bfloat16 autocast, as it runs: images a second of the plain and the fused model."""
    rows: Row = {}
    for contender, wish in (("eager", "torch"), ("compile", "torch"), ("fused", "auto"), ("fused, compile", "auto")):
        if "compile" in contender and not compiled:
            continue
        torch.manual_seed(0)
        model = models.build(name).to(device).to(memory_format=torch.channels_last).train()
        use_kernels_(model, wish)  # type: ignore[arg-type]
        forward = torch.compile(model) if "compile" in contender else model
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-4)
        x = torch.randint(0, 256, (batch, *model.sample_shape), device=device) / 127.5 - 1
        x = x.contiguous(memory_format=torch.channels_last)

        def step(model: Any = model, forward: Any = forward, optimiser: Any = optimiser, x: Tensor = x) -> None:
            optimiser.zero_grad(set_to_none=True)
            with torch.autocast(device, torch.bfloat16):
                loss = bits_per_dim(model, x, model.example_cond(batch), forward).mean()
            loss.backward()
            optimiser.step()

        step()
        step()
        rows[contender] = {"peak_bytes": peak(step, device), "both": [timed(step, device) for _ in range(rounds)]}
        del model, forward, optimiser, step
    return {"name": f"{STEP} of {name}", "dtype": "bfloat16 autocast", "batch": batch, "rows": rows}
