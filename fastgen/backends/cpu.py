"""The C++ executor: the whole loop native, over a fixed pool of threads, SIMD chosen at run time."""

from __future__ import annotations

import os
from typing import Any, Self

import torch
from torch import Tensor

from fastgen.backends.base import CompiledExecutor, Setting
from fastgen.backends.conditioning import Conditioning
from fastgen.backends.request import Request
from fastgen.errors import Cancelled
from fastgen.kept import Kept
from fastgen.native import native
from fastgen.program.programs import Programs

ARENA_LIMIT = 1 << 29  # bytes of activations in flight
MOST_SLOTS = 64
ENGINES = 2  # lengths whose executors are kept: each holds all weights


class CpuExecutor(CompiledExecutor):
    """float32 or bfloat16 weights, float32 arithmetic. Threads: None takes the CPUs this process may use."""

    name = "cpu"

    def __init__(
        self,
        programs: Programs,
        conditioning: Conditioning,
        dtype: torch.dtype = torch.float32,
        threads: int | None = None,
        isa: str = "auto",
    ) -> None:
        self.programs, self.conditioning, self.dtype, self.isa = programs, conditioning, dtype, isa
        self.threads = (
            threads or len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else (threads or os.cpu_count() or 1)
        )
        self._native, self._process = native(), os.getpid()
        self._engines: Kept[int | None, Any] = Kept(ENGINES)
        self.engine(None)

    @classmethod
    def make(cls, setting: Setting) -> Self:
        """See Executor."""
        return cls(setting.programs, setting.conditioning, setting.dtype, setting.threads)

    def engine(self, length: int | None) -> Any:
        """The native executor for a sequence length."""

        def made() -> Any:
            return self._native.CpuExecutor(self.programs(length, self.dtype).tables(), self.threads, self.isa)

        return self._engines.made(length, made)

    def ready(self) -> None:
        """See Executor. In a forked child, where the threads of the parent are not, engines are made again."""
        if os.getpid() != self._process:
            self._engines.clear()
            self._process = os.getpid()

    def slots(self, length: int | None) -> int:
        """As many samples at once as keep the activations in flight within bounds."""
        arena = 4 * self.programs(length, self.dtype).arena
        return max(1, min(MOST_SLOTS, ARENA_LIMIT // arena))

    def run(self, request: Request) -> tuple[Tensor, Tensor | None]:
        """See Executor; releases the GIL."""
        engine = self.engine(request.length)
        program = self.programs(request.length, self.dtype)
        cond = [c.contiguous().numpy() for c in self.conditioning.sources(program, request)]
        out = None if request.out is None else request.out.numpy()
        try:
            values, params = engine.run(
                request.slots, request.seed, request.first, request.temperature, cond,
                None if request.given is None else request.given.contiguous().numpy(),
                None if request.mask is None else request.mask.to(torch.uint8).contiguous().numpy(),
                request.want_params, request.progress, out,
            )  # fmt: skip
        except self._native.Cancelled as error:
            raise Cancelled from error
        return torch.from_numpy(values), None if params is None else torch.from_numpy(params)
