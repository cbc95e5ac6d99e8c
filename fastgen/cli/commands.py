"""The commands: sample, train, verify, plan, info, bench. Each takes the parsed arguments and gives the exit code."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import fastgen
from fastgen import files, pretrained
from fastgen.cli.models import example_cond, labels_of, length_of, load, rate_of, sampler_of, say
from fastgen.errors import FastgenError
from fastgen.models import CLASSES, CONFIGS, ReferenceModel
from fastgen.native import native
from fastgen.sampler import Sampler
from fastgen.spec import Spec
from fastgen.train import train as run_recipe
from fastgen.train.recipes import RECIPES

CHECKOUT = Path(fastgen.__file__).resolve().parent.parent


def sample(args: argparse.Namespace) -> int:
    model, name = load(args)
    rate = args.rate or rate_of(model)
    length = length_of(args.length, model, rate)
    labels = labels_of(args.label, model)
    out = args.out or ("samples.wav" if model.layout == "CT" else "samples.png")
    spec = Spec(model.sample_shape, model.head, model.layout, model.predicts, model.start)
    spec = spec if length is None else spec.at_length(length)
    files.check_format(out, spec)
    files.check_output(out)
    if args.mask and not args.given:
        raise ValueError(f"--mask {args.mask}: needs --given, the file with the values to keep")
    given, mask = files.read_known(args.given, spec, rate, args.mask) if args.given else (None, None)
    say(args, f"planning {name}" + (" and checking it against forward" if args.verify else ""))
    sampler = sampler_of(args, model, length, args.verify)
    cond = _cond_for(model, labels, args, length)
    say(args, f"sampling {args.n} with seed {args.seed}")
    began = time.perf_counter()
    samples = _draw(sampler, args, cond, given, mask)
    seconds = time.perf_counter() - began
    columns = args.columns or (len(labels) if len(labels) > 1 and args.n % len(labels) == 0 else None)
    files.write_samples(samples, spec, out, rate, columns, args.upscale)
    hertz = f" at {rate} Hz" if out.lower().endswith(".wav") else ""
    speed = f"{seconds:.2f} s ({args.n / seconds:.3g} samples/s)"
    print(f"wrote {out}: {args.n} sample{'s' * (args.n > 1)} of {name}{hertz} in {speed}")
    return 0


def _cond_for(
    model: ReferenceModel, labels: list[int], args: argparse.Namespace, length: int | None
) -> tuple[Tensor, ...]:
    """Conditioning of all samples: labels by the index of the sample, so that shards agree with the whole."""
    index = range(args.first, args.first + args.n)
    chosen = torch.tensor([labels[i % len(labels)] for i in index]) if labels else None
    cond = []
    for example in example_cond(model, length):
        if chosen is not None and example.dtype == torch.int64 and example.dim() == 1:
            cond.append(chosen)
        else:
            say(args, f"conditioning {list(example.shape[1:])} is all zero")
            cond.append(example)
    return tuple(cond)


def _draw(
    sampler: Sampler,
    args: argparse.Namespace,
    cond: tuple[Tensor, ...],
    given: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """All samples, as many at a time as fit, or one at a time."""
    bar = not args.quiet and sys.stderr.isatty()
    options: dict[str, Any] = dict(seed=args.seed, temperature=args.temperature)
    if not args.batch_free:
        found = sampler.sample(args.n, cond=cond, given=given, mask=mask, first=args.first, progress=bar, **options)
        return found.cpu()

    def row(x: Tensor, i: int) -> Tensor:
        return x[i : i + 1] if len(x) > 1 else x

    parts = []
    for i in tqdm(range(args.n), unit="sample", disable=not bar):
        if given is not None and mask is not None:
            options.update(given=row(given, i), mask=row(mask, i))
        one = tuple(row(c, i) for c in cond)
        parts.append(sampler.sample(1, cond=one, first=args.first + i, **options).cpu())
    return torch.cat(parts)


def train(args: argparse.Namespace) -> int:
    if args.list:
        for name, recipe in RECIPES.items():
            print(f"{name}: {recipe.data}, {recipe.steps} steps of {recipe.batch}, learning rate {recipe.lr:g}")
        return 0
    if args.name is None:
        raise ValueError(f"train what? expected a recipe: {', '.join(RECIPES)}")
    out = Path(args.out or Path("runs") / args.name)
    report = run_recipe(
        args.name, out, args.steps, resume=args.resume, progress=not args.quiet, seed=args.seed,
        threads=args.threads,
    )  # fmt: skip
    bits = f"{report.held_out_bits_per_dim:.4f} bits/dim held out"
    print(f"wrote {out}: {report.name} after {report.steps} steps, {bits}, {report.seconds:.0f} s")
    return 0


def verify(args: argparse.Namespace) -> int:
    model, name = load(args)
    sampler = sampler_of(args, model, length_of(args.length, model, args.rate or rate_of(model)), verify=False)
    report = sampler.verify(args.n, args.seed)
    print(f"{name}: {report}")
    return 0 if report.ok else 1


def plan(args: argparse.Namespace) -> int:
    model, _ = load(args)
    print(sampler_of(args, model, length_of(args.length, model, args.rate or rate_of(model)), verify=False).plan)
    return 0


def info(args: argparse.Namespace) -> int:
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"fastgen {fastgen.__version__} in {Path(fastgen.__file__).parent}, on {platform.platform()}")
    print(f"python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}")
    print(f"threads: {cpus} of {os.cpu_count()} CPUs may be used; torch uses {torch.get_num_threads()}")
    try:
        print(f"native executor: {native().cpu_isa()} in use, of {', '.join(native().isas())}")
    except FastgenError as error:
        print(f"native executor: {error}")
    print("shipped models:" + ("" if pretrained.shipped() else " none"))
    for name in pretrained.shipped():
        print(f"  {name:<28} {_about(pretrained._SHIPPED / name)}")
    print("configurations (random weights):")
    for name, config in CONFIGS.items():
        print(f"  {name:<28} {CLASSES[config['model']].__name__}")
    return 0


def _about(folder: Path) -> str:
    """Size of a checkpoint's weights, and the likelihood that training reached if that is recorded."""
    megabytes = sum(f.stat().st_size for f in folder.glob("*.safetensors")) / 1e6
    report = folder / "report.json"
    bits = json.loads(report.read_text()).get("held_out_bits_per_dim") if report.is_file() else None
    return f"{megabytes:.2f} MB" + ("" if bits is None else f", {bits:.3f} bits/dim held out")


def bench(args: argparse.Namespace) -> int:
    if not (CHECKOUT / "bench" / "run.py").is_file():
        raise FastgenError("the benchmarks are not in the installed package: run python -m bench.run in a checkout")
    return subprocess.call([sys.executable, "-m", "bench.run", *args.rest], cwd=CHECKOUT)
