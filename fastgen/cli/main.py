"""The command line's entry: parse, run, and say an error in one line."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence

from fastgen.cli.commands import bench
from fastgen.cli.options import parser
from fastgen.errors import FastgenError

INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line (default: the program's): 0 done, 1 not verified, 2 error, 130 interrupted."""
    warnings.filterwarnings("ignore", message="TF32 acceleration")  # torch's, about a device nobody asked for
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
    except (FastgenError, ValueError, TypeError, OSError, ImportError, MemoryError) as error:
        if args.debug:
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"fastgen: {text}", file=sys.stderr)
        return 2
