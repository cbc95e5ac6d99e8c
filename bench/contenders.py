"""Who is timed, each as an object whose run() takes the seconds of one step of the whole batch."""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod

import torch
from torch import dtype

from bench.configs import Case
from bench.eager import EagerWaveNet
from fastgen.api import Sampler
from fastgen.backends.cpu import CpuExecutor
from fastgen.backends.reference import ReferenceExecutor
from fastgen.errors import Cancelled
from fastgen.models.wavenet import WaveNet

NAIVE_SECONDS = 0.5  # a run of the naive loop times as many forwards as this holds, at least one
WARM_STEPS = 64
EAGER_STEPS = 256
REFERENCE_SECONDS = 4.0  # how long a run of the reference executor may take before it is cancelled
REFERENCE_ROWS = 4  # rows timed at least, past the first: coarse levels work every second or fourth


class Contender(ABC):
    """One way to sample. once: too slow to repeat. how: what was timed, for the reader of the table."""

    name: str
    how: str
    once = False

    def __init__(self, case: Case, batch: int) -> None:
        self.case, self.batch = case, batch
        self.times: list[float] = []

    @abstractmethod
    def warm(self) -> None:
        """Everything that is not to be timed."""

    @abstractmethod
    def run(self) -> float:
        """Seconds per step, all `batch` samples advancing by one."""


class Naive(Contender):
    """The slow loop, of which a few iterations are timed: all are alike. Their draws are not counted."""

    name = "naive loop"

    def __init__(self, case: Case, batch: int) -> None:
        super().__init__(case, batch)
        what = f"the last {case.window} sites (no output sees more)" if case.audio else "the image"
        self.how = f"one forward over {what} x {case.spec.steps} steps"

    def warm(self) -> None:
        self.inputs = self.case.forward_inputs(self.batch)
        self.run()

    @torch.no_grad()
    def run(self) -> float:
        began, count = time.perf_counter(), 0
        while count == 0 or time.perf_counter() - began < NAIVE_SECONDS:
            self.case.model(*self.inputs)
            count += 1
        return (time.perf_counter() - began) / count


class Eager(Contender):
    """The queue-cached loop in eager PyTorch, with as many torch threads as serve it best."""

    name = "eager queues"

    def __init__(self, case: Case, batch: int, threads: int) -> None:
        super().__init__(case, batch)
        self.threads, self.how = threads, ""

    def warm(self) -> None:
        assert isinstance(self.case.model, WaveNet)
        steps = EAGER_STEPS
        self.peer = EagerWaveNet(self.case.model, self.batch, self.case.cond(self.batch, steps), steps)
        self.all_threads = torch.get_num_threads()
        tried = {}
        for n in dict.fromkeys((1, self.threads)):
            self.threads = n
            self._seconds(WARM_STEPS // 4)
            tried[n] = min(self._seconds(WARM_STEPS) for _ in range(2))
        self.threads = min(tried, key=lambda n: tried[n])
        self.how = f"{steps} steps, {self.threads} torch threads (the better of 1 and all)"

    def run(self) -> float:
        return self._seconds(EAGER_STEPS)

    def _seconds(self, steps: int) -> float:
        torch.set_num_threads(self.threads)
        try:
            began = time.perf_counter()
            self.peer.run(steps)
            return (time.perf_counter() - began) / steps
        finally:
            torch.set_num_threads(self.all_threads)


class Ours(Contender):
    """Whole sampling runs through the public call."""

    def __init__(self, case: Case, batch: int, sampler: Sampler) -> None:
        super().__init__(case, batch)
        self.sampler, self.how = sampler, "whole runs"
        self.name = f"fastgen cpu {str(sampler.dtype).removeprefix('torch.')}"
        self.bytes_per_weight = sampler.dtype.itemsize

    def warm(self) -> None:
        """The first rows: memory touched, threads up."""
        self.cond = self.case.cond(self.batch)
        limit = self.batch * WARM_STEPS
        with contextlib.suppress(Cancelled):
            self.sampler.sample(self.batch, cond=self.cond, callback=lambda done, _: done < limit)

    def run(self) -> float:
        began = time.perf_counter()
        self.sampler.sample(self.batch, cond=self.cond, seed=len(self.times))
        return (time.perf_counter() - began) / self.case.spec.steps


class Reference(Contender):
    """The reference executor, cancelled after some rows: it is the specification, not made for speed."""

    name = "fastgen reference"
    once = True

    def __init__(self, case: Case, batch: int, sampler: Sampler) -> None:
        super().__init__(case, batch)
        self.sampler, self.how = sampler, ""

    def warm(self) -> None:
        self.cond = self.case.cond(self.batch)

    def run(self) -> float:
        marks: list[tuple[int, float]] = []

        def watch(done: int, _: int) -> bool:
            marks.append((done // self.batch, time.perf_counter()))
            late = marks[-1][1] - marks[0][1] > REFERENCE_SECONDS
            return not (late and len(marks) > REFERENCE_ROWS + 1)

        with contextlib.suppress(Cancelled):
            self.sampler.sample(self.batch, cond=self.cond, callback=watch)
        (first, began), (last, ended) = marks[1], marks[-1]
        self.how = f"steps {first} to {last} of {self.case.spec.steps}, extrapolated"
        return (ended - began) / (last - first)


def with_weights(sampler: Sampler, weights: dtype, threads: int) -> Sampler:
    """The same plan on the cpu executor with weights of another type: planning again takes long."""
    assert isinstance(sampler.executor, CpuExecutor)
    return sampler.with_executor(CpuExecutor(sampler.programs, sampler.conditioning, weights, threads))


def as_reference(sampler: Sampler) -> Sampler:
    """The same plan on the reference executor."""
    assert isinstance(sampler.executor, CpuExecutor)
    return sampler.with_executor(ReferenceExecutor(sampler.programs, sampler.conditioning))
