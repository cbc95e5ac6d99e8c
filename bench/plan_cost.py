"""Time and memory of compiling one configuration, in a process of its own; prints one line of JSON."""

from __future__ import annotations

import json
import resource
import sys
import time

import fastgen
from bench import configs


def peak_mib() -> float:
    """The most memory this process ever held, in MiB (ru_maxrss counts KiB on Linux, bytes on macOS)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def main(name: str, length: int) -> None:
    case = configs.make(name, length)
    before, began = peak_mib(), time.perf_counter()
    sampler = fastgen.compile(case.model, case.spec.shape, cond=case.cond(1), verify=False)
    seconds = time.perf_counter() - began
    cost = {
        "plan_seconds": sampler.plan.seconds,
        "compile_seconds": seconds,
        "peak_mib": peak_mib(),
        "before_mib": before,
    }
    print(json.dumps(cost))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
