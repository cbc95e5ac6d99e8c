"""What this machine is, as a step: one row {device, multiprocessors, ...}; exit status 2 where no GPU can be used.

python -m bench.gpu.device [--revision ID] [--lines FILE]
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import re
import sys
from pathlib import Path
from typing import Any

import torch

from bench import machine
from bench.gpu.lines import Lines
from bench.gpu.steps import CANNOT_STATUS


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="bench.gpu.device", description=(__doc__ or "").split("\n")[0])
    p.add_argument("--revision", default="", help="where the tree is not a git checkout")
    p.add_argument("--lines", type=Path)
    return p.parse_args(arguments)


def why_not() -> str | None:
    """Why nothing can run here, if so."""
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device can be used (no GPU, or no driver that fits)"
    return None


def describe(revision: str) -> dict[str, Any]:
    """The device and the versions."""
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info(0)
    return {
        "device": properties.name, "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count, "memory_gb": total / 1e9, "free_gb": free / 1e9,
        "driver": _driver(), "cuda": torch.version.cuda, "torch": torch.__version__, "triton": _version("triton"),
        "python": sys.version.split()[0], "cores": machine.cores(), "revision": revision or machine.revision(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }  # fmt: skip


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _driver() -> str:
    """The kernel driver's version, where the system shows it."""
    path = Path("/proc/driver/nvidia/version")
    found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", path.read_text()) if path.exists() else None
    return found.group(0) if found else "unknown"


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    reason = why_not()
    if reason is not None:
        print(f"bench.gpu: {reason}; nothing was run")
        return CANNOT_STATUS
    about = describe(args.revision)
    Lines(args.lines)(about)
    print(", ".join(f"{k} {v}" for k, v in about.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
