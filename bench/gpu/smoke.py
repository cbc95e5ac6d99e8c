"""The smallest run there is, in a process of its own: one case, one kind of team, one dtype.

    python -m bench.gpu.smoke unet-pixelcnnpp --team grid --dtype bfloat16 [--lines FILE]

One row {case, team, dtype, limits, rung, ok, error, distance, draws, near_ties, digest, seconds}: what the device can hold,
and how far stepping is from forward. Equal digests are equal bytes of all values and parameters.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from pathlib import Path

import torch

from bench.configs import DTYPES
from bench.gpu.lines import Lines, Row
from bench.gpu.steps import NOT_RUN_STATUS
from fastgen.backends.base import CompiledExecutor
from fastgen.backends.cuda import TEAMS, CudaExecutor
from fastgen.backends.request import Request
from fastgen.verify import verify
from tests.gpu.checks import HELD_OFF, request
from tests.oracle import by_name, compile_case

SAMPLES = 3


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="bench.gpu.smoke", description=(__doc__ or "").split("\n")[0])
    p.add_argument("case", help="of tests/cases.py")
    p.add_argument("--team", choices=TEAMS, required=True)
    p.add_argument("--dtype", choices=DTYPES, required=True)
    p.add_argument("--lines", type=Path)
    return p.parse_args(arguments)


class Remembering(CompiledExecutor):
    """Another executor, of whose last run it keeps what the bytes were."""

    name, digest = "remembering", ""

    def __init__(self, inner: CompiledExecutor) -> None:
        self.inner = inner
        self.programs, self.conditioning, self.dtype = inner.programs, inner.conditioning, inner.dtype
        self.rounds_activations = inner.rounds_activations

    def run(self, request: Request) -> tuple[torch.Tensor, torch.Tensor | None]:
        values, params = self.inner.run(request)
        assert params is not None
        self.digest = hashlib.sha256(b"".join(t.cpu().numpy().tobytes() for t in (values, params))).hexdigest()[:16]
        return values, params


def run(name: str, team: str, dtype: torch.dtype) -> Row:
    """ok: None where the device cannot hold such a team."""
    case = by_name(name)[0]
    sampler = compile_case(case)
    conditioning = sampler.conditioning
    try:
        executor = CudaExecutor(sampler.programs, conditioning, dtype, torch.device("cuda"), team)
    except ValueError as error:
        if HELD_OFF not in str(error):
            raise
        return {"ok": None, "why": str(error)}
    began, watched = time.perf_counter(), Remembering(executor)
    found = verify(sampler.planned.on_cpu, sampler.spec, watched, request(case, SAMPLES))
    return {
        "limits": executor.limits, "rung": executor.rung(SAMPLES)["text"], "ok": found.ok,
        "error": found.max_abs_error, "distance": found.distance, "draws": f"{found.draws_equal}/{found.draws}",
        "near_ties": found.near_ties, "digest": watched.digest, "seconds": time.perf_counter() - began,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    torch.set_num_threads(1)  # many small operations
    row = run(args.case, args.team, DTYPES[args.dtype])
    Lines(args.lines)({"case": args.case, "team": args.team, "dtype": args.dtype, **row})
    print(row.get("why") or ", ".join(f"{k} {v}" for k, v in row.items()))
    return NOT_RUN_STATUS if row["ok"] is None else int(not row["ok"])


if __name__ == "__main__":
    sys.exit(main())
