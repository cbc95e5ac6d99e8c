"""The model that a command line names: its weights, sampler, labels and length."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

import fastgen
from fastgen import pretrained
from fastgen.errors import FastgenError
from fastgen.models import CONFIGS, ReferenceModel, WaveNet, build
from fastgen.sampler import Sampler
from fastgen.train.recipes import RECIPES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RATE = 16000  # samples per second of audio of which nothing else is known


def say(args: argparse.Namespace, text: str) -> None:
    """A message on the way."""
    if not args.quiet:
        print(f"fastgen: {text}", file=sys.stderr, flush=True)


def _default_model() -> str:
    """The first shipped image model."""
    for name in pretrained.shipped():
        if pretrained.from_pretrained(name).layout != "CT":
            return name
    raise FastgenError(
        f"no trained image model is shipped with this installation; name a checkpoint directory, or a "
        f"configuration to run with random weights: {', '.join(CONFIGS)}"
    )


def load(args: argparse.Namespace) -> tuple[ReferenceModel, str]:
    """The model that args.model names, and how to call it in messages."""
    name = args.model or _default_model()
    if args.threads:
        torch.set_num_threads(args.threads)
    if (Path(name) / "model" / "config.json").is_file() and not (Path(name) / "config.json").exists():
        name = str(Path(name) / "model")  # what `fastgen train` wrote
    if Path(name).is_dir() or name in pretrained.shipped() or name not in CONFIGS:
        try:
            return pretrained.from_pretrained(name), Path(name).name
        except FastgenError as error:
            if Path(name).is_dir() or name in pretrained.shipped():
                raise
            raise FastgenError(f"{error}; configurations (random weights): {', '.join(CONFIGS)}") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(name).eval()
    say(args, f"{name} comes without trained weights here: its weights are random")
    return model, f"{name} (random weights)"


def rate_of(model: ReferenceModel) -> int:
    """Samples per second of an audio model: of its configuration, of the recipe that trains it, or RATE."""
    if "sample_rate" in model.config:
        return int(model.config["sample_rate"])
    for recipe in RECIPES.values():
        config = CONFIGS[recipe.model] if isinstance(recipe.model, str) else recipe.model
        if recipe.data == "speech" and all(model.config.get(k) == v for k, v in config.items()):
            return recipe.rate
    return RATE


def length_of(text: str | None, model: ReferenceModel, rate: int) -> int | None:
    """Sites of an audio sample from "16000" or "2s"; None for images."""
    if model.layout != "CT":
        if text is not None:
            raise ValueError(f"--length {text}: only audio has a length; samples are {tuple(model.sample_shape)}")
        return None
    if text is None:
        return int(model.sample_shape[1])
    try:
        length = round(float(text[:-1]) * rate) if text.endswith("s") else int(text)
    except (ValueError, OverflowError):
        length = 0
    if length < 1:
        raise ValueError(f"--length {text}: expected a number of audio samples such as 16000, or seconds such as 2s")
    return length


def example_cond(model: ReferenceModel, length: int | None) -> tuple[Tensor, ...]:
    """Example conditioning, batch 1, all zero."""
    return model.example_cond(1, length) if isinstance(model, WaveNet) else model.example_cond(1)


def sampler_of(args: argparse.Namespace, model: ReferenceModel, length: int | None, verify: bool) -> Sampler:
    shape = model.sample_shape if length is None else (model.sample_shape[0], length)
    return fastgen.compile(
        model, shape, cond=example_cond(model, length), backend=args.backend, dtype=DTYPES[args.dtype],
        device=args.device, threads=args.threads, verify=verify,
    )  # fmt: skip


def labels_of(text: str | None, model: ReferenceModel) -> list[int]:
    """The labels that samples take in turn; empty for a model without."""
    count = int(model.config.get("speakers" if model.layout == "CT" else "classes") or 0)
    if not count:
        if text is not None:
            raise ValueError(f"--label {text}: this model takes no label")
        return []
    if text in (None, "all"):
        return list(range(count))
    try:
        labels = [int(part) for part in str(text).split(",")]
    except ValueError:
        labels = [-1]
    if not all(0 <= label < count for label in labels):
        raise ValueError(f"--label {text}: expected labels from 0 to {count - 1} such as 3 or 0,1,2, or all")
    return labels
