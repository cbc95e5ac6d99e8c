"""The promises of a call: progress, cancelling, streaming, two samplers at once. As in checks.py nothing raises, and the
same functions test samplers that need no GPU (tests/test_gpu_checks.py)."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor

from fastgen.api import Sampler
from fastgen.errors import Cancelled, FastgenError
from tests.gpu.checks import SEED, Finding, named


def check_calls(sequence: Sampler, image: Sampler) -> list[Finding]:
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
        with named(name, findings):
            findings.append(check())
    return findings


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


def check_full(sequence: Sampler, n: int) -> list[Finding]:
    """Words pass in and out of a kernel that has taken the whole device: n samples keep every multiprocessor busy."""
    findings: list[Finding] = []
    checks: dict[str, Callable[[str], Finding]] = {
        f"cancel of {n} samples": lambda name: cancel(sequence, n, name),
        f"stream of {n} samples": lambda name: streaming(sequence, -1, n, name, early=True),
    }
    for name, check in checks.items():
        with named(name, findings):
            findings.append(check(name))
    return findings


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
