"""The command line's entry: parse, run, and say an error in one line."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Sequence

from fastgen.cli.commands import bench
from fastgen.cli.options import parser

INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended


def _have_streams() -> None:
    """What is closed swallows what is written; what a terminal's encoding lacks is written in its own words."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  # for the rest of the process
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line (default: the program's): 0 done, 1 not verified, 2 error, 130 interrupted."""
    warnings.filterwarnings("ignore", message="TF32 acceleration")  # torch's, about a device nobody asked for
    _have_streams()
    whole = parser()
    args, rest = whole.parse_known_args(argv)
    if rest and args.run is not bench:
        whole.error(f"unrecognized arguments: {' '.join(rest)}")
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
    except Exception as error:  # of any kind: an exit code of 1 would say "not verified"
        if args.debug:
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"fastgen: {text}", file=sys.stderr)
        return 2
