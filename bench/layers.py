"""Times the fused layers against eager torch and torch.compile on a GPU: forward, forward and backward, peak memory.

    python bench/layers.py                     all layers, the mixture loss, a training step (some minutes on an H200)
    python bench/layers.py --quick             small batches, few repeats: does it run, roughly how fast
    python bench/layers.py --dtype bfloat16,float32 --batch 32 --only wavenet

First every layer is checked in float32, bfloat16 and float16 against float64. Writes <out>/layers-<date>-<revision>.json,
.md and .svg. Contenders take turns on the same tensors; a figure is the median of rounds of replayed CUDA graphs, so it is
the time of the GPU and not of Python; the whole training step is timed as it runs, Python included.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from bench import layers_report, machine
from fastgen import models, ops
from fastgen.nn import use_kernels_
from fastgen.train.loss import bits_per_dim
from tests.kernel_shapes import LAYERS, Layer, Tensors

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STEP_MODEL = "pixelcnnpp-cifar"
Run = Callable[[], Any]
Row = dict[str, Any]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="bench/layers.py", description=(__doc__ or "").split("\n")[0])
    p.add_argument("--batch", type=int, help="samples a layer is timed with; default 64 (WaveNets: an eighth)")
    p.add_argument("--dtype", default="bfloat16", help="comma-separated, of float32, bfloat16, float16")
    p.add_argument("--only", default="", help="layers whose name contains this")
    p.add_argument("--quick", action="store_true", help="batch 4, two rounds, no training step")
    p.add_argument("--rounds", type=int, help="default 7")
    p.add_argument("--out", type=Path, default=machine.ROOT / "bench" / "results")
    args = p.parse_args(arguments)
    args.batch = args.batch or (4 if args.quick else 64)
    args.rounds = args.rounds or (2 if args.quick else 7)
    unknown = [d for d in args.dtype.split(",") if d not in DTYPES]
    if unknown or args.batch < 1 or args.rounds < 1:
        p.error(f"--dtype takes {', '.join(DTYPES)}; --batch and --rounds at least 1")
    return args


# ---- correctness -------------------------------------------------------------------------------------------
def errors(layer: Layer, dtype: torch.dtype, device: str, batch: int = 2) -> dict[str, float]:
    """Largest error of the result and of each gradient, of the largest value, against float64 on the same numbers."""
    torch.manual_seed(0)
    tensors = layer.tensors(batch, dtype, device)
    exact = {k: v.detach().double().requires_grad_() for k, v in tensors.items()}
    y, wanted = layer.run(tensors, fused=True), layer.run(exact, fused=False)
    seed = torch.randn_like(y)
    pairs = dict(
        zip(
            tensors, zip(gradients(y, tensors, seed), gradients(wanted, exact, seed.double()), strict=True), strict=True
        )
    )
    pairs["y"] = (y.detach(), wanted.detach())
    return {k: float(((a.double() - b).abs().max() / b.abs().max()).item()) for k, (a, b) in pairs.items()}


def allowed(dtype: torch.dtype) -> float:
    """Four roundings on the way, and a random walk over some thousand terms in float32."""
    return 4 * torch.finfo(dtype).eps + 64 * torch.finfo(torch.float32).eps


def gradients(y: Tensor, tensors: Tensors, seed: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, list(tensors.values()), seed)


# ---- timing ------------------------------------------------------------------------------------------------
def captured(run: Run, device: str) -> Run:
    """`run` as one CUDA graph, so that what is timed is the GPU; on another device `run` itself."""
    if device != "cuda":
        return run
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


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

    rows: Row = {}
    graphs: dict[str, tuple[Run, Run]] = {}
    for name in forward:
        for warm in (without_gradients(forward[name]), both[name]):
            warm()  # compiles, and fills the allocator's pools
        rows[name] = {"peak_bytes": peak(both[name], device), "forward": [], "both": []}
        graphs[name] = (captured(without_gradients(forward[name]), device), captured(both[name], device))
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
        "name": "mixture loss, 10 of 3 channels",
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
    return {"name": f"training step of {name}", "dtype": "bfloat16 autocast", "batch": batch, "rows": rows}


# ---- the run -----------------------------------------------------------------------------------------------
def describe() -> Row:
    import triton

    return {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "cuda": torch.version.cuda, "revision": machine.revision(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }  # fmt: skip


def check(chosen: list[Layer], device: str) -> list[Row]:
    """Errors of every layer in every dtype; with exact float32 products on both sides."""
    found = []
    for layer in chosen:
        for name, dtype in DTYPES.items():
            worst = errors(layer, dtype, device)
            right = all(e <= allowed(dtype) for e in worst.values())
            found.append(
                {"name": layer.name, "dtype": name, "errors": worst, "allowed": allowed(dtype), "right": right}
            )
            print(f"{'ok ' if right else 'BAD'} {layer.name} {name}: {max(worst.values()):.2g} <= {allowed(dtype):.2g}")
    return found


def tf32(allowed: bool) -> None:
    """Whether products of float32 may be TF32, torch's and ours."""
    torch.backends.cudnn.allow_tf32 = allowed
    torch.set_float32_matmul_precision("high" if allowed else "highest")


def keep(result: Row, timing: Row) -> None:
    result["timings"].append(timing)
    print(layers_report.line(timing), flush=True)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    choice = ops.kernel_for("cuda", torch.float32) if torch.cuda.is_available() else None
    if choice is None or choice.name != "triton":
        why = "no CUDA device was found" if choice is None else choice.reason
        print(f"bench/layers.py times Triton kernels on an NVIDIA GPU: {why}")
        return 1
    tf32(False)  # while errors are looked at
    chosen = [layer for layer in LAYERS if args.only in layer.name]
    result: Row = {
        "machine": describe(),
        "options": {"rounds": args.rounds},
        "checks": check(chosen, "cuda"),
        "timings": [],
    }
    tf32(True)  # for all contenders
    torch.backends.cudnn.benchmark = True
    for dtype in map(DTYPES.__getitem__, args.dtype.split(",")):
        for layer in chosen:
            keep(result, time_layer(layer, dtype, args.batch, args.rounds, "cuda"))
        keep(result, time_loss(dtype, args.batch, args.rounds, "cuda"))
    if not args.quick:
        keep(result, time_step(STEP_MODEL, args.batch, args.rounds, "cuda"))
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / f"layers-{datetime.date.today()}-{result['machine']['revision'].rstrip('+')}"
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    stem.with_suffix(".md").write_text(layers_report.render(result))
    stem.with_suffix(".svg").write_text(layers_report.plot(result))
    print(layers_report.render(result))
    return 0 if all(c["right"] for c in result["checks"]) else 1


if __name__ == "__main__":
    sys.exit(main())
