"""Is a GPU's executor right? A case of tests/cases.py against the specification.

What is checked is given as a factory, so that the same functions test an executor that needs no GPU
(tests/test_gpu_checks.py). Nothing raises: a check that fails, or cannot be made, is a Finding that says so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fastgen.api import Sampler
from fastgen.backends.base import CompiledExecutor as Executor
from fastgen.backends.conditioning import Conditioning
from fastgen.backends.cuda import TEAMS, CudaExecutor
from fastgen.backends.reference import ReferenceExecutor
from fastgen.backends.request import Request
from fastgen.verify import verify
from tests.cases import Case
from tests.oracle import compile_case

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # of the largest parameter
RUNGS = TEAMS[1:]  # the first is "auto"
SEED, BATCH, FIRST = 11, 16, 5  # FIRST: no multiple of a tile, so that a sample's slot changes
HELD_OFF = "cannot hold"  # how the executor words a rung that the device does not have


@dataclass(frozen=True)
class Finding:
    """ok: None where the check could not be made, which detail then explains."""

    name: str
    ok: bool | None
    detail: str = ""


@dataclass(frozen=True)
class Subject:
    """A case, planned once, and what the specification makes of it."""

    case: Case
    sampler: Sampler
    values: Tensor  # [BATCH, H*W, C], drawn by the reference executor
    params: Tensor  # [BATCH, steps, P]

    @property
    def conditioning(self) -> Conditioning:
        return self.sampler.conditioning


Make = Callable[[Subject, torch.dtype, str], Executor]  # by dtype and rung, or "auto"


def subject(case: Case) -> Subject:
    """Plans a case, and runs the reference executor on it."""
    sampler = compile_case(case)
    conditioning = sampler.conditioning
    values, params = ReferenceExecutor(sampler.programs, conditioning).run(request(case, BATCH))
    assert params is not None
    return Subject(case, sampler, values, params)


def on_gpu(s: Subject, dtype: torch.dtype, rung: str) -> CudaExecutor:
    """What is checked where there is a GPU."""
    return CudaExecutor(s.sampler.programs, s.conditioning, dtype, torch.device("cuda"), rung)


def request(case: Case, n: int, first: int = 0, **options: Any) -> Request:
    """Samples first to first + n of the case, each with its own conditioning."""
    cond = tuple(c[first:] if isinstance(c, Tensor) and c.dim() else c for c in case.conds(first + n))
    return Request(n, SEED, first, cond=cond, want_params=True, **options)


def same_bytes(a: Tensor | None, b: Tensor | None) -> bool:
    """Equal bit by bit, wherever they are."""
    assert a is not None and b is not None
    return a.shape == b.shape and torch.equal(a.cpu().view(torch.int32), b.cpu().view(torch.int32))


@contextlib.contextmanager
def named(name: str, into: list[Finding]) -> Iterator[None]:
    """What goes wrong inside is a failed check of this name."""
    try:
        yield
    except Exception as error:
        missing = isinstance(error, ValueError) and HELD_OFF in str(error)
        into.append(Finding(name, None if missing else False, f"{type(error).__name__}: {error}".splitlines()[0]))


def check_case(
    s: Subject, make: Make, dtype: torch.dtype, rungs: tuple[str, ...] = RUNGS, first: str = "auto"
) -> list[Finding]:
    """All that is promised of one case in one dtype. rungs: what must give the bytes of the rung that `first` takes."""
    findings: list[Finding] = []
    with named("executor", findings):
        executor = make(s, dtype, first)
        for name, check in (
            ("parameters", parameters),
            ("draws", draws),
            ("known values", known),
            ("batches", batches),
        ):
            with named(name, findings):
                findings.append(check(s, executor, dtype))
        expected = executor.run(request(s.case, FIRST))
        for rung in rungs:
            with named(rung, findings):
                found = make(s, dtype, rung).run(request(s.case, FIRST))
                equal = same_bytes(found[0], expected[0]) and same_bytes(found[1], expected[1])
                findings.append(Finding(rung, equal, "" if equal else f"other bytes than {first}"))
    return findings


def settle(findings: list[Finding], record: Callable[[str, object], None]) -> None:
    """Hands all findings to pytest's report, and fails on those that are wrong; one that could not be made is no error."""
    record("findings", [asdict(f) for f in findings])
    wrong = [f"{f.name}: {f.detail}" for f in findings if f.ok is False]
    assert findings and not wrong, "; ".join(wrong)


def parameters(s: Subject, executor: Executor, dtype: torch.dtype) -> Finding:
    """Stepping through the reference's values gives its parameters, within the dtype's tolerance."""
    forced = request(s.case, BATCH, given=s.values, mask=torch.ones_like(s.values))
    values, params = executor.run(forced)
    assert params is not None
    params = params.cpu()
    scale = max(1.0, float(torch.where(s.params.isfinite(), s.params, 0.0).abs().max()))
    error = float(torch.where(params == s.params, 0.0, (params - s.params).abs()).max())  # infinities compare equal
    kept = torch.equal(values.cpu(), s.values)
    ok = kept and error <= TOLERANCE[dtype] * scale  # false for NaN
    text = f"error {error:.1e} at scale {scale:.3g}, allowed {TOLERANCE[dtype]:.0e} of it"
    return Finding("parameters", ok, text if kept else f"{text}; known values were not kept")


def draws(s: Subject, executor: Executor, dtype: torch.dtype) -> Finding:
    """Every draw, made again from forward's own parameters."""
    report = verify(s.sampler.planned.on_cpu, s.sampler.spec, executor, request(s.case, BATCH))
    return Finding("draws", report.ok, f"{report.draws_equal}/{report.draws} equal, {report.near_ties} near ties")


def known(s: Subject, executor: Executor, dtype: torch.dtype) -> Finding:
    """In-painting at another temperature: half of the sites are given, and come back."""
    given = s.values[:3]
    mask = (torch.rand((*given.shape[:2], 1), generator=torch.Generator().manual_seed(0)) < 0.5).expand(given.shape)
    wanted = request(s.case, 3, FIRST, given=given, mask=mask.float(), temperature=0.8)
    kept = torch.equal(executor.run(wanted)[0].cpu()[mask], given[mask])
    report = verify(s.sampler.planned.on_cpu, s.sampler.spec, executor, wanted)
    text = f"{report.draws_equal}/{report.draws} equal, {report.near_ties} near ties"
    return Finding("known values", kept and report.ok, text if kept else f"{text}; known values were not kept")


def batches(s: Subject, executor: Executor, dtype: torch.dtype) -> Finding:
    """The bytes of a sample do not depend on the batch, on its slot, or on what ran before."""
    whole = executor.run(request(s.case, BATCH))
    bad = []
    for n, first in ((1, 0), (1, FIRST), (3, FIRST), (BATCH - FIRST, FIRST), (BATCH, 0)):
        part = executor.run(request(s.case, n, first))
        if not all(same_bytes(a, b[first : first + n]) for a, b in zip(part, whole, strict=True) if b is not None):
            bad.append(f"{n} from {first}")
    return Finding("batches", not bad, f"other bytes: {', '.join(bad)}" if bad else "1, 3, 11 and 16 samples")
