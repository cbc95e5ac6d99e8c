"""The command line: sample, train, verify, plan, info, bench."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastgen
from fastgen import files, pretrained
from fastgen.api import BACKENDS, Sampler
from fastgen.backends.cpu import native
from fastgen.errors import FastgenError
from fastgen.models import CLASSES, CONFIGS, ReferenceModel, WaveNet, build
from fastgen.spec import Spec
from fastgen.train.recipes import RECIPES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RATE = 16000  # samples per second of audio of which nothing else is known
INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended


# ---- models ------------------------------------------------------------------------------------------------
def _default_model() -> str:
    """The first shipped image model."""
    for name in pretrained.shipped():
        if pretrained.from_pretrained(name).layout != "CT":
            return name
    raise FastgenError(
        f"no trained image model is shipped with this installation; name a checkpoint directory, or a "
        f"configuration to run with random weights: {', '.join(CONFIGS)}"
    )


def _load(args: argparse.Namespace) -> tuple[ReferenceModel, str]:
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
    _say(args, f"{name} comes without trained weights here: its weights are random")
    return model, f"{name} (random weights)"


def _rate(model: ReferenceModel) -> int:
    """Samples per second of an audio model: of its configuration, of the recipe that trains it, or RATE."""
    if "sample_rate" in model.config:
        return int(model.config["sample_rate"])
    for recipe in RECIPES.values():
        config = CONFIGS[recipe.model] if isinstance(recipe.model, str) else recipe.model
        if recipe.data == "speech" and all(model.config.get(k) == v for k, v in config.items()):
            return recipe.rate
    return RATE


def _length(text: str | None, model: ReferenceModel, rate: int) -> int | None:
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


def _cond(model: ReferenceModel, length: int | None) -> tuple[Tensor, ...]:
    """Example conditioning, batch 1, all zero."""
    return model.example_cond(1, length) if isinstance(model, WaveNet) else model.example_cond(1)


def _sampler(args: argparse.Namespace, model: ReferenceModel, length: int | None, verify: bool) -> Sampler:
    shape = model.sample_shape if length is None else (model.sample_shape[0], length)
    return fastgen.compile(
        model, shape, cond=_cond(model, length), backend=args.backend, dtype=DTYPES[args.dtype],
        device=args.device, threads=args.threads, verify=verify,
    )  # fmt: skip


def _labels(text: str | None, model: ReferenceModel) -> list[int]:
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


# ---- commands ----------------------------------------------------------------------------------------------
def _sample(args: argparse.Namespace) -> int:
    model, name = _load(args)
    rate = args.rate or _rate(model)
    length = _length(args.length, model, rate)
    labels = _labels(args.label, model)
    out = args.out or ("samples.wav" if model.layout == "CT" else "samples.png")
    spec = Spec(model.sample_shape, model.head, model.layout, model.predicts, model.start)
    spec = spec if length is None else spec.at_length(length)
    files.check_format(out, spec)
    files.check_output(out)
    if args.mask and not args.given:
        raise ValueError(f"--mask {args.mask}: needs --given, the file with the values to keep")
    given, mask = files.read_known(args.given, spec, rate, args.mask) if args.given else (None, None)
    _say(args, f"planning {name}" + (" and checking it against forward" if args.verify else ""))
    sampler = _sampler(args, model, length, args.verify)
    cond = _cond_for(model, labels, args, length)
    _say(args, f"sampling {args.n} with seed {args.seed}")
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
    for example in _cond(model, length):
        if chosen is not None and example.dtype == torch.int64 and example.dim() == 1:
            cond.append(chosen)
        else:
            _say(args, f"conditioning {list(example.shape[1:])} is all zero")
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
    from tqdm import tqdm

    def row(x: Tensor, i: int) -> Tensor:
        return x[i : i + 1] if len(x) > 1 else x

    parts = []
    for i in tqdm(range(args.n), unit="sample", disable=not bar):
        if given is not None and mask is not None:
            options.update(given=row(given, i), mask=row(mask, i))
        one = tuple(row(c, i) for c in cond)
        parts.append(sampler.sample(1, cond=one, first=args.first + i, **options).cpu())
    return torch.cat(parts)


def _train(args: argparse.Namespace) -> int:
    if args.list:
        for name, recipe in RECIPES.items():
            print(f"{name}: {recipe.data}, {recipe.steps} steps of {recipe.batch}, learning rate {recipe.lr:g}")
        return 0
    if args.name is None:
        raise ValueError(f"train what? expected a recipe: {', '.join(RECIPES)}")
    from fastgen.train import train

    out = Path(args.out or Path("runs") / args.name)
    report = train(
        args.name, out, args.steps, resume=args.resume, progress=not args.quiet, seed=args.seed,
        threads=args.threads,
    )  # fmt: skip
    bits = f"{report.held_out_bits_per_dim:.4f} bits/dim held out"
    print(f"wrote {out}: {report.name} after {report.steps} steps, {bits}, {report.seconds:.0f} s")
    return 0


def _verify(args: argparse.Namespace) -> int:
    model, name = _load(args)
    sampler = _sampler(args, model, _length(args.length, model, args.rate or _rate(model)), verify=False)
    report = sampler.verify(args.n, args.seed)
    print(f"{name}: {report}")
    return 0 if report.ok else 1


def _plan(args: argparse.Namespace) -> int:
    model, _ = _load(args)
    print(_sampler(args, model, _length(args.length, model, args.rate or _rate(model)), verify=False).plan)
    return 0


def _info(args: argparse.Namespace) -> int:
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


def _bench(args: argparse.Namespace) -> int:
    root = Path(__file__).resolve().parent.parent
    if not (root / "bench" / "run.py").is_file():
        raise FastgenError("the benchmarks are not in the installed package: run python -m bench.run in a checkout")
    return subprocess.call([sys.executable, "-m", "bench.run", *args.rest], cwd=root)


# ---- the parser --------------------------------------------------------------------------------------------
def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number >= 1")
    return int(text)


# fmt: off
def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastgen", description="Exact, fast incremental sampling of autoregressive PyTorch models.",
        epilog="fastgen COMMAND --help says more.",
    )
    parser.add_argument("--version", action="version", version=f"fastgen {fastgen.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(run: Callable[[argparse.Namespace], int], text: str, examples: str, **options: Any) -> Any:
        sub = commands.add_parser(
            run.__name__.lstrip("_"), help=text, description=text[0].upper() + text[1:] + ".",
            epilog=f"examples:\n{examples}", formatter_class=argparse.RawDescriptionHelpFormatter, **options,
        )
        sub.set_defaults(run=run)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return sub

    _add_sampling(command(_sample, "draw samples and write them to a file", _SAMPLE_EXAMPLES))
    _add_training(command(_train, "train a reference model", _TRAIN_EXAMPLES))
    sub = command(_verify, "check that stepping reproduces forward; exit code 1 if not", _VERIFY_EXAMPLES)
    _add_model(sub)
    sub.add_argument("-n", type=_positive, default=2, help="samples to check (default: 2)")
    sub.add_argument("--seed", type=int, default=0, help="seed of the samples (default: 0)")
    _add_model(command(_plan, "print what runs per row and per site", _PLAN_EXAMPLES))
    command(_info, "print versions, this machine, and the models there are", "  fastgen info")
    command(_bench, "run the benchmarks of a checkout; options go to bench.run", "  fastgen bench --help",
            add_help=False)
    return parser


def _add_model(sub: argparse.ArgumentParser) -> None:
    add = sub.add_argument
    add("model", nargs="?", metavar="NAME_OR_DIR", help="a shipped model, a checkpoint directory, or a "
        "configuration (random weights); fastgen info lists them (default: the first shipped image model)")
    add("--backend", choices=BACKENDS, default="auto", help="what runs the plan (naive: forward every step)")
    add("--device", metavar="DEVICE", help="cpu, cuda, cuda:1 ... (default: cpu)")
    add("--dtype", choices=DTYPES, default="float32", help="of the weights (default: float32; float16 on a GPU)")
    add("--threads", type=_positive, help="threads to use (default: all CPUs this process may use)")
    add("--length", help="of audio, in samples or seconds: 16000, 2s (default: the model's)")
    add("--rate", type=_positive, help=f"of audio, in Hz (default: the model's, else {RATE})")
    add("-q", "--quiet", action="store_true", help="no messages on the way, and no progress bar")


def _add_sampling(sub: argparse.ArgumentParser) -> None:
    _add_model(sub)
    add = sub.add_argument
    add("-n", type=_positive, default=16, help="how many (default: 16)")
    add("--seed", type=int, default=0, help="sample i of a seed is always the same (default: 0)")
    add("--out", "-o", metavar="FILE", help="file to write: .png (a grid) for images, .wav for audio, .npy "
        "or .safetensors for either (default: samples.png or samples.wav)")
    add("--temperature", type=float, default=1.0, help="below 1 sharper, above 1 wilder (default: 1)")
    add("--first", type=int, default=0, help="index of the first sample, for shards (default: 0)")
    add("--label", help="class of the samples: 3, or several in turn: 0,1,2 (default: all)")
    add("--given", metavar="FILE", help="values to keep: a .png of one image, a .wav to continue, or a .npy "
        "or .safetensors as this command writes them")
    add("--mask", choices=files.MASKS, help="which half of the given image to keep (default: top)")
    add("--columns", type=_positive, help="images in a row of the grid")
    add("--upscale", type=_positive, help="side of the square that a pixel becomes (default: fits 64 pixels)")
    add("--batch-free", action="store_true", help="one sample at a time: the least memory, the same samples")
    add("--no-verify", dest="verify", action="store_false", help="skip the check against forward")


def _add_training(sub: argparse.ArgumentParser) -> None:
    add = sub.add_argument
    add("name", nargs="?", metavar="NAME", help=f"a recipe: {', '.join(RECIPES)}")
    add("--out", "-o", metavar="DIR", help="directory to write (default: runs/NAME)")
    add("--steps", type=_positive, help="stop at this step (default: the recipe's)")
    add("--resume", action="store_true", help="go on with the run in DIR")
    add("--list", action="store_true", help="show the recipes")
    add("--seed", type=int, default=0, help="of weights and batches (default: 0)")
    add("--threads", type=_positive, help="threads of torch")
    add("-q", "--quiet", action="store_true", help="no progress bar")
# fmt: on


_SAMPLE_EXAMPLES = """\
  fastgen sample                                     16 images of the default model to samples.png
  fastgen sample -n 100 --label all --out digits.png
  fastgen sample --given digit.png --mask top        complete the lower half
  fastgen sample speech-wavenet-small --length 2s --out speech.wav
  fastgen sample runs/mine -n 50000 --first 50000 --out second-half.npy"""
_TRAIN_EXAMPLES = """\
  fastgen train --list
  fastgen train mnist-gated-pixelcnn-small --out runs/mine
  fastgen train mnist-gated-pixelcnn-small --out runs/mine --resume
  fastgen sample runs/mine"""
_VERIFY_EXAMPLES = """\
  fastgen verify
  fastgen verify runs/mine -n 4 --dtype bfloat16"""
_PLAN_EXAMPLES = """\
  fastgen plan
  fastgen plan wavenet-nv --length 1s"""


# ---- entry -------------------------------------------------------------------------------------------------
def _say(args: argparse.Namespace, text: str) -> None:
    if not args.quiet:
        print(f"fastgen: {text}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line (default: the program's): 0 done, 1 not verified, 2 error, 130 interrupted."""
    warnings.filterwarnings("ignore", message="TF32 acceleration")  # torch's, about a device nobody asked for
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and args.run is not _bench:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("fastgen: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (FastgenError, ValueError, TypeError, OSError, ImportError, MemoryError) as error:
        if args.debug:
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"fastgen: {text}", file=sys.stderr)
        return 2
