"""What was measured on what: names, versions, caches, and the machine's measured rates."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from fastgen.native import native

ROOT = Path(__file__).resolve().parent.parent


def cores() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe(threads: int) -> dict[str, Any]:
    """The machine; its rates are filled in by `rates`."""
    return {
        "cpu": _cpu(), "cores": cores(), "caches": _caches(), "isa": native().cpu_isa(),
        "system": f"{platform.system()} {platform.machine()}", "python": platform.python_version(),
        "torch": torch.__version__, "revision": revision(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "load": [os.getloadavg()[0]], **rates(threads),
    }  # fmt: skip


def rates(threads: int) -> dict[str, float]:
    """gflops, read_gbps (memory) and cached_gbps (the cores' own caches), all threads."""
    found: dict[str, float] = native().machine(threads)
    return found


def finish(machine: dict[str, Any], threads: int) -> None:
    """Measures the rates again, at the end of the run, and keeps the better ones: they are limits."""
    machine["load"].append(os.getloadavg()[0])
    for name, rate in rates(threads).items():
        machine[name] = max(machine[name], rate)


def revision() -> str:
    """The short commit id, with + for changes that are not committed; "unknown" outside git."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _caches() -> dict[str, str]:
    """Sizes of the first core's data caches, as the kernel reports them."""
    found = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind, level, size = ((folder / name).read_text().strip() for name in ("type", "level", "size"))
        if kind != "Instruction":
            found[f"L{level}"] = size
    return found
