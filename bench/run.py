"""Times sampling against the naive loop and against a careful eager loop, and says what the machine allows.

    python -m bench.run                        all, at batches 1, 4 and 16 (about 12 minutes on 2 cores)
    python -m bench.run --quick                batch 1, once, short audio: does it still run, roughly how fast
    python -m bench.run --config wavenet-nv --batch 1,16 --base HEAD~1

Writes <out>/<date>-<revision>.json and .md. All that is compared is measured in this run, in turns, so that a
disturbance of the machine meets all of it; every figure comes with its spread.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import fastgen
from bench import base, configs, eager, machine, report
from bench.contenders import Contender, Eager, Naive, Ours, Reference, as_reference, with_weights
from fastgen.api import Sampler
from fastgen.models.wavenet import WaveNet

AUDIO_SITES, QUICK_AUDIO_SITES = 4096, 1024
EAGER_CHECK_SITES = 600  # beyond the longest dilation, 512


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="bench.run", description=(__doc__ or "").split("\n")[0])
    p.add_argument("--config", nargs="+", choices=configs.NAMES, default=list(configs.NAMES), metavar="NAME",
                   help=f"any of {', '.join(configs.NAMES)}; default all")  # fmt: skip
    p.add_argument("--batch", type=configs.batches, help="comma-separated; default 1,4,16")
    p.add_argument("--quick", action="store_true", help="batch 1, one repeat, no reference, no memory figure")
    p.add_argument("--threads", type=int, default=machine.cores(), help="default: all CPUs this process may use")
    p.add_argument("--repeats", type=int, help="default 3")
    p.add_argument("--out", type=Path, default=machine.ROOT / "bench" / "results")
    p.add_argument("--base", metavar="REV", help="then time this commit and this tree in turns, and print ratios")
    p.add_argument("--only-ours", action="store_true", help="leave out the naive loop, the peer and the reference")
    args = p.parse_args(arguments)
    args.batch = args.batch or ([1] if args.quick else [1, 4, 16])
    args.repeats = args.repeats or (1 if args.quick else 3)
    if args.threads < 1 or args.repeats < 1:
        p.error("--threads and --repeats must be at least 1")
    return args


def _compile(case: configs.Case, args: argparse.Namespace) -> tuple[Sampler, dict[str, Any]]:
    """The float32 sampler, and what making it cost (memory: in a process of its own)."""
    began = time.perf_counter()
    sampler = fastgen.compile(case.model, case.spec.shape, cond=case.cond(1), threads=args.threads, verify=False)
    cost: dict[str, Any] = {
        "plan_seconds": sampler.plan.seconds,
        "compile_seconds": time.perf_counter() - began,
        "peak_mib": None,
    }
    if not args.quick and not args.only_ours:
        command = [sys.executable, "-m", "bench.plan_cost", case.name, str(AUDIO_SITES)]
        done = subprocess.run(command, cwd=machine.ROOT, stdout=subprocess.PIPE, text=True, check=True)
        cost = json.loads(done.stdout.splitlines()[-1])
    return sampler, cost


def _check_peer(case: configs.Case) -> None:
    """The peer must compute the same thing, or beating it says nothing."""
    assert isinstance(case.model, WaveNet)
    steps = min(EAGER_CHECK_SITES, case.spec.sites[0])
    error = eager.error_against_forward(case.model, steps, case.cond(2, steps))
    if error > eager.TOLERANCE:
        raise SystemExit(f"bench: the eager peer differs from forward by {error:.2e} on {case.name}")


def _verify(samplers: dict[str, Sampler]) -> dict[str, float]:
    """Errors against forward; refuses to time a sampler that is not exact."""
    errors = {}
    for name, sampler in samplers.items():
        found = sampler.verify()
        if not found.ok:
            raise SystemExit(f"bench: {name} does not reproduce forward: {found}")
        errors[name] = float(found.max_abs_error)
    return errors


def _stats(sampler: Sampler) -> dict[str, float]:
    """Work per step of one sample; nothing for a base revision whose plan does not count it."""
    programs = getattr(sampler, "programs", None)
    if programs is None:
        return {}
    s = programs.stats()
    return {
        "macs_per_step": (s["row_macs"] + s["site_macs"]) / s["steps"],
        "weights_per_step": (s["row_weight_bytes"] + s["site_weight_bytes"]) / 4 / s["steps"],
    }


def _measure(contenders: list[Contender], repeats: int) -> None:
    for c in contenders:
        c.warm()
    for turn in range(repeats):
        for c in contenders:
            if turn == 0 or not c.once:
                c.times.append(c.run())


def _row(c: Contender, stats: dict[str, float]) -> dict[str, Any]:
    row: dict[str, Any] = {"batch": c.batch, "name": c.name, "how": c.how, "step_seconds": c.times}
    if isinstance(c, Ours) and stats:
        row["macs_per_step"] = stats["macs_per_step"]
        row["weight_bytes_per_step"] = stats["weights_per_step"] * c.bytes_per_weight
    return row


def bench_config(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Everything about one configuration."""
    case = configs.make(name, QUICK_AUDIO_SITES if args.quick else AUDIO_SITES)
    sampler, cost = _compile(case, args)
    half = with_weights(sampler, torch.bfloat16, args.threads)
    errors = {} if args.quick else _verify({"float32": sampler, "bfloat16": half})
    with_peer = case.audio and not args.only_ours
    if with_peer:
        _check_peer(case)
    stats, rows = _stats(sampler), []
    for batch in args.batch:
        contenders: list[Contender] = [] if args.only_ours else [Naive(case, batch)]
        contenders += [Ours(case, batch, sampler), Ours(case, batch, half)]
        if with_peer:
            contenders.append(Eager(case, batch, args.threads))
        if batch == min(args.batch) and not args.quick and not args.only_ours:
            contenders.append(Reference(case, batch, as_reference(sampler)))
        _measure(contenders, args.repeats)
        rows += [_row(c, stats) for c in contenders]
    return {
        "name": name, "audio": case.audio, "parameters": case.parameters, "steps": case.spec.steps,
        "plan": cost, "max_abs_error": errors, "rows": rows,
    }  # fmt: skip


def _as_arguments(args: argparse.Namespace) -> list[str]:
    """What makes another process time the same."""
    given = ["--config", *args.config, "--batch", ",".join(map(str, args.batch))]
    given += ["--threads", str(args.threads), "--repeats", str(args.repeats)]
    return given + (["--quick"] if args.quick else [])


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    results: dict[str, Any] = {
        "machine": machine.describe(args.threads),
        "options": {k: getattr(args, k) for k in ("batch", "quick", "threads", "repeats")},
        "configs": [],
    }
    for name in args.config:
        began = time.perf_counter()
        results["configs"].append(bench_config(name, args))
        print(f"{name}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    machine.finish(results["machine"], args.threads)
    text = report.render(results)
    print(text, end="")
    if args.base:
        here, there = base.against(args.base, _as_arguments(args))
        results["base"] = {"here": here, "there": there}
        comparison = report.compare(here, there)
        text += "\n" + comparison
        print("\n" + comparison, end="")
    args.out.mkdir(parents=True, exist_ok=True)
    day, revision = results["machine"]["date"][:10], results["machine"]["revision"].rstrip("+")
    path = args.out / f"{day}-{revision}{'-quick' if args.quick else ''}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    path.with_suffix(".md").write_text(text)
    print(f"written to {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
