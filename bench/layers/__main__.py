"""Times the fused layers against eager torch and torch.compile on a GPU: forward, forward and backward, peak memory.

    python -m bench.layers                     all layers, the mixture loss, a training step (some minutes on an H200)
    python -m bench.layers --quick             small batches, few repeats: does it run, roughly how fast
    python -m bench.layers --dtype bfloat16,float32 --batch 32 --only wavenet

A layer is checked against float64 in the dtype it is timed in. Writes <out>/layers-<date>-<revision>.json, .md and .svg, anew
after every layer; with --lines a row of each instead, {layer, ...} or {checked, ...}.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from bench import machine
from bench.configs import DTYPES
from bench.gpu.device import describe
from bench.gpu.lines import Lines
from bench.layers import report
from bench.layers.timing import LOSS, STEP, Row, time_layer, time_loss, time_step
from fastgen import ops
from tests.kernel_compare import allowed, errors
from tests.kernel_shapes import LAYERS, Layer

STEP_MODEL = "pixelcnnpp-cifar"
NAMES = (*(layer.name for layer in LAYERS), LOSS, f"{STEP} of {STEP_MODEL}")
Keep = Callable[[str, Row], None]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="bench.layers", description=(__doc__ or "").split("\n")[0])
    p.add_argument("--batch", type=int, help="samples a layer is timed with; default 64 (WaveNets: an eighth)")
    p.add_argument("--dtype", default="bfloat16", help="comma-separated, of float32, bfloat16, float16")
    p.add_argument("--only", default="", help="what contains this in its name")
    p.add_argument("--list", action="store_true", help="only the names, as rows {named}")
    p.add_argument("--quick", action="store_true", help="batch 4, two rounds, no training step")
    p.add_argument("--rounds", type=int, help="default 7")
    p.add_argument("--out", type=Path, default=machine.ROOT / "bench" / "results")
    p.add_argument("--lines", type=Path, help="rows go here, and there is no report")
    args = p.parse_args(arguments)
    args.batch = args.batch or (4 if args.quick else 64)
    args.rounds = args.rounds or (2 if args.quick else 7)
    unknown = [d for d in args.dtype.split(",") if d not in DTYPES]
    if unknown or args.batch < 1 or args.rounds < 1:
        p.error(f"--dtype takes {', '.join(DTYPES)}; --batch and --rounds at least 1")
    return args


def check(layer: Layer, dtype: str, device: str) -> Row:
    """Its errors; with exact float32 products on both sides."""
    tf32(False)
    worst, most = errors(layer, DTYPES[dtype], device), allowed(DTYPES[dtype])
    tf32(True)  # for all contenders
    right = all(e <= most for e in worst.values())
    return {"checked": layer.name, "dtype": dtype, "errors": worst, "allowed": most, "right": right}


def tf32(allowed: bool) -> None:
    """Whether products of float32 may be TF32, torch's and ours."""
    torch.backends.cudnn.allow_tf32 = allowed
    torch.set_float32_matmul_precision("high" if allowed else "highest")


def run(args: argparse.Namespace, keep: Keep, device: str = "cuda", compiled: bool = True) -> None:
    """Everything asked for, one row at a time."""
    for name in args.dtype.split(","):
        for layer in LAYERS:
            if args.only in layer.name:
                keep("checks", check(layer, name, device))
                keep("timings", time_layer(layer, DTYPES[name], args.batch, args.rounds, device, compiled))
        if args.only in LOSS:
            keep("timings", time_loss(DTYPES[name], args.batch, args.rounds, device, compiled))
    if args.only in NAMES[-1] and not args.quick:
        keep("timings", time_step(STEP_MODEL, args.batch, args.rounds, device, compiled))


def keep_in(result: Row, stem: Path) -> Keep:
    """Files that are whole after every row."""

    def keep(kind: str, row: Row) -> None:
        result[kind].append(row)
        print(report.line(row), flush=True)
        stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        stem.with_suffix(".md").write_text(report.render(result))
        stem.with_suffix(".svg").write_text(report.plot(result))

    return keep


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    emit = Lines(args.lines)
    if args.list:
        for name in NAMES:
            emit({"named": name})
            print(name)
        return 0
    choice = ops.kernel_for("cuda", torch.float32) if torch.cuda.is_available() else None
    if choice is None or choice.name != "triton":
        why = "no CUDA device was found" if choice is None else choice.reason
        print(f"bench.layers times Triton kernels on an NVIDIA GPU: {why}")
        return 1
    result: Row = {"machine": describe(""), "options": {"rounds": args.rounds}, "checks": [], "timings": []}
    torch.backends.cudnn.benchmark = True
    if args.lines is not None:

        def keep(kind: str, row: Row) -> None:
            result[kind].append(row)
            emit(row)
            print(report.line(row), flush=True)
    else:
        args.out.mkdir(parents=True, exist_ok=True)
        day, revision = result["machine"]["date"][:10], result["machine"]["revision"].rstrip("+")
        keep = keep_in(result, args.out / f"layers-{day}-{revision}")
    run(args, keep)
    return 0 if all(c["right"] for c in result["checks"]) else 1


if __name__ == "__main__":
    sys.exit(main())
