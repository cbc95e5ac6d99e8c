"""Is a GPU's executor right? Every case of tests/cases.py against the specification, and the promises of a call.

What is checked is given as a factory, so that the same functions test an executor that needs no GPU
(tests/test_gpu_bench.py). Nothing raises: a check that fails, or cannot be made, is a Finding that says so.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fastgen.api import Sampler
from fastgen.backends.base import Executor
from fastgen.backends.conditioning import Conditioning
from fastgen.backends.reference import ReferenceExecutor
from fastgen.backends.request import Request
from fastgen.errors import Cancelled, FastgenError
from fastgen.verify import TOLERANCE, verify
from tests.cases import Case
from tests.oracle import compile_case

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RUNGS = ("cluster16", "cluster8", "grid", "cta")
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


def request(case: Case, n: int, first: int = 0, **options: Any) -> Request:
    """Samples first to first + n of the case, each with its own conditioning."""
    cond = tuple(c[first:] if isinstance(c, Tensor) and c.dim() else c for c in case.conds(first + n))
    return Request(n, SEED, first, cond=cond, want_params=True, **options)


def same_bytes(a: Tensor | None, b: Tensor | None) -> bool:
    """Equal bit by bit, wherever they are."""
    assert a is not None and b is not None
    return a.shape == b.shape and torch.equal(a.cpu().view(torch.int32), b.cpu().view(torch.int32))


@contextlib.contextmanager
def _named(name: str, into: list[Finding]) -> Iterator[None]:
    """What goes wrong inside is a failed check of this name."""
    try:
        yield
    except Exception as error:
        missing = isinstance(error, ValueError) and HELD_OFF in str(error)
        into.append(Finding(name, None if missing else False, f"{type(error).__name__}: {error}".splitlines()[0]))


def check_case(s: Subject, make: Make, dtype: torch.dtype, rungs: tuple[str, ...] = RUNGS) -> dict[str, Any]:
    """All that is promised of one case in one dtype: {case, dtype, findings}."""
    findings: list[Finding] = []
    with _named("executor", findings):
        executor = make(s, dtype, "auto")
        for name, check in (
            ("parameters", parameters),
            ("draws", draws),
            ("known values", known),
            ("batches", batches),
        ):
            with _named(name, findings):
                findings.append(check(s, executor, dtype))
        expected = executor.run(request(s.case, FIRST))
        for rung in rungs:
            with _named(rung, findings):
                found = make(s, dtype, rung).run(request(s.case, FIRST))
                equal = same_bytes(found[0], expected[0]) and same_bytes(found[1], expected[1])
                findings.append(Finding(rung, equal, "" if equal else "other bytes than the rung that auto takes"))
    name = str(dtype).removeprefix("torch.")
    return {"case": s.case.name, "dtype": name, "findings": [asdict(f) for f in findings]}


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
    report = verify(s.sampler.model, s.sampler.spec, executor, request(s.case, BATCH), dtype)
    return Finding("draws", report.ok, f"{report.draws_equal}/{report.draws} equal, {report.near_ties} near ties")


def known(s: Subject, executor: Executor, dtype: torch.dtype) -> Finding:
    """In-painting at another temperature: half of the sites are given, and come back."""
    given = s.values[:3]
    mask = (torch.rand((*given.shape[:2], 1), generator=torch.Generator().manual_seed(0)) < 0.5).expand(given.shape)
    wanted = request(s.case, 3, FIRST, given=given, mask=mask.float(), temperature=0.8)
    kept = torch.equal(executor.run(wanted)[0].cpu()[mask], given[mask])
    report = verify(s.sampler.model, s.sampler.spec, executor, wanted, dtype)
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


# ---- the promises of a call ---------------------------------------------------------------------------------------
def check_calls(sequence: Sampler, image: Sampler) -> list[dict[str, Any]]:
    """Progress, cancelling, streaming, two samplers at once. sequence: long enough to be stopped on the way."""
    findings: list[Finding] = []
    checks: list[tuple[str, Callable[[], Finding]]] = [
        ("progress", lambda: progress(sequence)),
        ("cancel", lambda: cancel(sequence)),
        ("stream of chunks", lambda: streaming(sequence, -1, name="stream of chunks")),
        ("stream of rows", lambda: streaming(image, -2, name="stream of rows")),
        ("stream closed early", lambda: closing(sequence)),
        ("two samplers at once", lambda: together(sequence, image)),
    ]
    if sequence.executor.device.type == "cuda":
        checks.append(("tensors on the device", lambda: on_device(image)))
    for name, check in checks:
        with _named(name, findings):
            findings.append(check())
    return [asdict(f) for f in findings]


def progress(sampler: Sampler) -> Finding:
    seen: list[tuple[int, int]] = []
    sampler.sample(2, seed=SEED, callback=lambda *news: seen.append(news))
    done = [d for d, _ in seen]
    total = 2 * sampler.spec.steps
    ok = done == sorted(done) and len(set(done)) > 1 and seen[-1] == (total, total)
    return Finding("progress", ok, f"{len(set(done))} reports, the last {seen[-1]}")


def cancel(sampler: Sampler, n: int = 2, name: str = "cancel") -> Finding:
    """A callback that says no ends the run soon, and the next run is as if nothing had been."""
    began = time.perf_counter()
    expected = sampler.sample(n, seed=SEED)
    whole = time.perf_counter() - began
    asked: list[float] = []

    def stop(done: int, total: int) -> bool:
        if not asked and 0 < done < total:
            asked.append(time.perf_counter())
        return not asked

    try:
        sampler.sample(n, seed=SEED, callback=stop)
    except Cancelled:
        took = time.perf_counter() - asked[0]
        ok = took < whole / 2 and torch.equal(sampler.sample(n, seed=SEED), expected)
        return Finding(name, ok, f"ended {took * 1e3:.1f} ms later; a run takes {whole * 1e3:.0f}")
    return Finding(name, False, "the run went on to its end")


def streaming(sampler: Sampler, axis: int, n: int = 3, name: str = "", early: bool = False) -> Finding:
    """What is streamed is what sample returns. early: and the first part comes in the first half of the run."""
    began, times, parts = time.perf_counter(), [], []
    for part in sampler.stream(n, seed=SEED):
        times.append(time.perf_counter() - began)
        parts.append(part.cpu())
    expected = sampler.sample(n, seed=SEED).cpu()
    same = torch.equal(torch.cat(parts, axis), expected)
    ok = same and (not early or times[0] < times[-1] / 2)
    text = f"{len(parts)} parts, the first after {times[0] * 1e3:.1f} of {times[-1] * 1e3:.1f} ms"
    return Finding(name, ok, text if same else f"{text}; not what sample returns")


def check_full(sequence: Sampler, n: int) -> list[dict[str, Any]]:
    """Words pass in and out of a kernel that has taken the whole device: n samples keep every multiprocessor busy."""
    findings: list[Finding] = []
    checks: dict[str, Callable[[str], Finding]] = {
        f"cancel of {n} samples": lambda name: cancel(sequence, n, name),
        f"stream of {n} samples": lambda name: streaming(sequence, -1, n, name, early=True),
    }
    for name, check in checks.items():
        with _named(name, findings):
            findings.append(check(name))
    return [asdict(f) for f in findings]


def closing(sampler: Sampler) -> Finding:
    expected = sampler.sample(2, seed=SEED)
    stream = iter(sampler.stream(2, seed=SEED))
    next(stream)
    began = time.perf_counter()
    stream.close()  # type: ignore[attr-defined]
    took = time.perf_counter() - began
    same = torch.equal(sampler.sample(2, seed=SEED), expected)
    return Finding("stream closed early", same, f"ended {took * 1e3:.1f} ms later")


def together(*samplers: Sampler) -> Finding:
    """Each in a thread and on a stream of its own, several times."""
    expected = [s.sample(3, seed=SEED) for s in samplers]
    found: list[list[Tensor]] = [[] for _ in samplers]
    errors: list[str] = []

    def work(k: int) -> None:
        try:
            device = samplers[k].executor.device
            own = torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else contextlib.nullcontext()
            with own:
                found[k].extend(samplers[k].sample(3, seed=SEED) for _ in range(4))
        except FastgenError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(samplers))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    same = all(len(f) == 4 and all(torch.equal(x, e) for x in f) for f, e in zip(found, expected, strict=True))
    return Finding("two samplers at once", same and not errors, "; ".join(errors) or "4 runs each")


def on_device(sampler: Sampler) -> Finding:
    """Known values may be on the GPU; results are."""
    given = sampler.sample(2, seed=SEED)
    mask = torch.ones(given.shape, dtype=torch.bool, device=given.device)
    again = sampler.sample(2, seed=SEED + 1, given=given, mask=mask)
    return Finding("tensors on the device", given.is_cuda and torch.equal(again, given), str(given.device))
