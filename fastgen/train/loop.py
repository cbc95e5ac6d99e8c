"""The training loop: Adam with warm-up and cosine decay, averaged weights, exact resumption."""

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastgen.errors import OutputError
from fastgen.models import build
from fastgen.pretrained import save_pretrained
from fastgen.train.data import Source
from fastgen.train.loss import bits_per_dim
from fastgen.train.recipes import RECIPES, Recipe
from fastgen.train.state import TrainState, load_state, save_state, write_text

_STATE, _MODEL, _REPORT = "state.safetensors", "model", "report.json"


@dataclass(frozen=True)
class TrainReport:
    """What a run reached: bits per value on held-out data with the averaged weights, on the last training
    batches with the raw ones, the steps done in all, and the seconds this call took."""

    name: str
    steps: int
    held_out_bits_per_dim: float
    train_bits_per_dim: float | None  # None: no step was run
    seconds: float
    parameters: int


def train(
    name: str | Recipe,
    out_dir: str | Path,
    steps: int | None = None,
    *,
    resume: bool = False,
    progress: bool = True,
    seed: int = 0,
    threads: int | None = None,
    save_every: int = 500,
) -> TrainReport:
    """Train a recipe up to optimiser step `steps` (default: all of it) and write it under `out_dir`.

    out_dir/model is a checkpoint of the averaged weights (`from_pretrained`), out_dir/state.safetensors all
    that a later call with resume=True needs to go on exactly: stopping at N and resuming to N+M gives the
    bytes of N+M steps in one go on the same machine and number of threads. out_dir/report.json holds the
    returned report. The global random state and thread count of the caller are left as they were. Raises
    ValueError for an unknown recipe, OutputError if out_dir holds a run already or cannot be written,
    CheckpointError if the state to resume is damaged or of another recipe or seed.
    """
    recipe = name if isinstance(name, Recipe) else _recipe(name)
    steps = recipe.steps if steps is None else steps
    out = Path(out_dir)
    if (out / _STATE).exists() and not resume:
        raise OutputError(f"{out} holds a run already; give resume=True to go on with it, or another directory")
    with _isolated(seed, threads):
        started = time.monotonic()
        model = build(recipe.model)
        source = recipe.source(model)
        state = TrainState.fresh(model, lr=recipe.lr)
        if resume:
            load_state(out / _STATE, state, recipe, seed)
        train_bits = _run(state, recipe, source, seed, steps, progress, save_every, out / _STATE)
        save_state(out / _STATE, state, recipe, seed)
        held_out = _held_out(state, source)
        save_pretrained(model, out / _MODEL)
    report = TrainReport(
        name=recipe.name,
        steps=state.step,
        held_out_bits_per_dim=held_out,
        train_bits_per_dim=None if math.isnan(train_bits) else train_bits,
        seconds=round(time.monotonic() - started, 1),
        parameters=sum(p.numel() for p in model.parameters()),
    )
    write_text(out / _REPORT, json.dumps(asdict(report), indent=2) + "\n")
    if progress:
        print(f"{report.name}: {report.held_out_bits_per_dim:.4f} bits/dim held out after {report.steps} steps")
    return report


def _recipe(name: str) -> Recipe:
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}, expected one of {', '.join(RECIPES)}")
    return RECIPES[name]


@contextmanager
def _isolated(seed: int, threads: int | None) -> Iterator[None]:
    """Seeded random state and thread count inside, the caller's outside."""
    before = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if threads is not None:
            torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def learning_rate(recipe: Recipe, step: int) -> float:
    """Learning rate of a step (from 0): linear warm-up, then half a cosine to a hundredth of the peak."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    done = min(1.0, (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup))
    return recipe.lr * (0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * done)))


def _run(
    state: TrainState,
    recipe: Recipe,
    source: Source,
    seed: int,
    steps: int,
    progress: bool,
    save_every: int,
    path: Path,
) -> float:
    """Optimiser steps state.step .. steps-1; the running mean of the training bits/dim."""
    state.model.train()
    mean = math.nan
    bar = tqdm(initial=state.step, total=steps, disable=not progress, desc=recipe.name, mininterval=5.0)
    with bar:
        while state.step < steps:
            x, cond = source.batch(state.step, recipe.batch, seed)
            bits = _step(state, recipe, x, cond)
            mean = bits if math.isnan(mean) else 0.98 * mean + 0.02 * bits
            bar.update()
            bar.set_postfix(bits=f"{mean:.3f}", refresh=False)
            if state.step % save_every == 0 and state.step < steps:
                save_state(path, state, recipe, seed)
    return mean


def _step(state: TrainState, recipe: Recipe, x: Tensor, cond: tuple[Tensor, ...]) -> float:
    for group in state.optimiser.param_groups:
        group["lr"] = learning_rate(recipe, state.step)
    loss = bits_per_dim(state.model, x, cond).mean()
    state.optimiser.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(state.model.parameters(), recipe.clip)
    state.optimiser.step()
    state.step += 1
    # Early on the average follows closely, else it would remember the random start.
    state.average(min(recipe.ema, (1.0 + state.step) / (10.0 + state.step)))
    return float(loss.detach())


def _held_out(state: TrainState, source: Source) -> float:
    """Mean bits per value over the held-out data with the averaged weights, which the model keeps."""
    state.use_average()
    state.model.eval()
    with torch.no_grad():
        bits = torch.cat([bits_per_dim(state.model, x, cond) for x, cond in source.held_out()])
    return float(bits.mean())
