"""The parser of the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import fastgen
from fastgen import files
from fastgen.backends.registry import BACKENDS
from fastgen.checks import MOST_THREADS
from fastgen.cli import commands
from fastgen.cli.models import DTYPES, RATE
from fastgen.train.recipes import RECIPES


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number >= 1")
    return int(text)


def _threads(text: str) -> int:
    if _positive(text) > MOST_THREADS:
        raise argparse.ArgumentTypeError(f"{text}: expected at most {MOST_THREADS} threads")
    return int(text)


# fmt: off
def parser() -> argparse.ArgumentParser:
    """The parser of all commands; `args.run` is the command."""
    whole = argparse.ArgumentParser(
        prog="fastgen", description="Exact, fast incremental sampling of autoregressive PyTorch models.",
        epilog="fastgen COMMAND --help says more.",
    )
    whole.add_argument("--version", action="version", version=f"fastgen {fastgen.__version__}")
    subparsers = whole.add_subparsers(metavar="COMMAND", required=True)

    def command(run: Callable[[argparse.Namespace], int], text: str, examples: str, **options: Any) -> Any:
        sub = subparsers.add_parser(
            run.__name__, help=text, description=text[0].upper() + text[1:] + ".",
            epilog=f"examples:\n{examples}", formatter_class=argparse.RawDescriptionHelpFormatter, **options,
        )
        sub.set_defaults(run=run)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return sub

    _add_sampling(command(commands.sample, "draw samples and write them to a file", _SAMPLE_EXAMPLES))
    _add_training(command(commands.train, "train a reference model", _TRAIN_EXAMPLES))
    sub = command(commands.verify, "check that stepping reproduces forward; exit code 1 if not", _VERIFY_EXAMPLES)
    _add_model(sub)
    sub.add_argument("-n", type=_positive, default=2, help="samples to check (default: 2)")
    sub.add_argument("--seed", type=int, default=0, help="seed of the samples (default: 0)")
    _add_model(command(commands.plan, "print what runs per row and per site", _PLAN_EXAMPLES))
    command(commands.info, "print versions, this machine, and the models there are", "  fastgen info")
    command(commands.bench, "run the benchmarks of a checkout; options go to python -m bench.run", "  fastgen bench --help",
            add_help=False)
    return whole


def _add_model(sub: argparse.ArgumentParser) -> None:
    add = sub.add_argument
    add("model", nargs="?", metavar="NAME_OR_DIR", help="a shipped model, a checkpoint directory, or a "
        "configuration (random weights); fastgen info lists them (default: the first shipped image model)")
    add("--backend", choices=BACKENDS, default="auto", help="what runs the plan (naive: forward every step)")
    add("--device", metavar="DEVICE", help="cpu, cuda, cuda:1 ... (default: cpu)")
    add("--dtype", choices=DTYPES, default="float32", help="of the weights (default: float32; float16 on a GPU)")
    add("--threads", type=_threads, help="threads to use (default: all CPUs this process may use)")
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
    add("--threads", type=_threads, help="threads of torch")
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
