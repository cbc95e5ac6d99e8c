"""Executors of the lowered program (csrc/cuda): teams of CTAs on a GPU, or of host threads.

The memory of a run is torch's: tensors are made here and handed to the native code as addresses.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from fastgen.backends.base import CompiledExecutor, Setting
from fastgen.backends.conditioning import Conditioning
from fastgen.backends.request import Request
from fastgen.kept import Kept
from fastgen.native import native
from fastgen.program.programs import Programs
from fastgen.program.records import Program

PRECISIONS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
PATIENCE = 10_000_000_000  # nanoseconds that a barrier waits for a partner


@dataclass
class Lowered:
    """A program for one length, lowered and on the device."""

    program: Program
    block: Tensor  # uint8
    arena: int  # floats of state per slot
    stages: int
    column_stages: int


class TeamExecutor(CompiledExecutor):
    """What both kinds share: lowering, the memory of a run, and the words that teams and host exchange."""

    def __init__(
        self,
        programs: Programs,
        conditioning: Conditioning,
        dtype: torch.dtype,
        device: torch.device,
        shared_bytes: int,
    ) -> None:
        self.programs, self.conditioning, self.dtype, self.device = programs, conditioning, dtype, device
        self.shared_bytes = shared_bytes  # of a CTA
        self.precision = PRECISIONS[dtype]
        self.rounds_activations = dtype != torch.float32
        self._native = native()
        self._lowered: Kept[int | None, Lowered] = Kept(2)

    @abstractmethod
    def _launch(self, launch: dict[str, Any], request: Request, out: Tensor, lowered: Lowered) -> None:
        """Runs a launch to its end; raises Cancelled."""

    def lowered(self, length: int | None) -> Lowered:
        """The lowered program for a length; kept for the last few."""

        def made() -> Lowered:
            program = self.programs(length)
            block, info = self._native.lower(program.tables(), self.precision, self.shared_bytes)
            return Lowered(
                program, torch.from_numpy(block).to(self.device), info["arena"], info["stages"], info["column_stages"]
            )

        return self._lowered.made(length, made)

    def run(self, request: Request) -> tuple[Tensor, Tensor | None]:
        """See Executor; results are on the executor's device. Releases the GIL."""
        lowered = self.lowered(request.length)
        p, n = lowered.program, request.slots
        out = self._values(request, n, p.rows * p.cols, int(p.head["channels"]))
        params = self._zeros(n, p.steps, int(p.head["params"])) if request.want_params else None
        arena = torch.empty(n, lowered.arena, dtype=torch.float32, device=self.device)
        cond = [c.to(self.device, torch.float32).contiguous() for c in self.conditioning.sources(p, request)]
        pointers = torch.tensor([c.data_ptr() for c in cond] or [0], dtype=torch.int64).to(self.device)
        given, mask = self._known(request)
        launch = {
            "block": lowered.block.data_ptr(), "arena": arena.data_ptr(), "arena_stride": lowered.arena,
            "cond": pointers.data_ptr(), "out": out.data_ptr(), "params": 0 if params is None else params.data_ptr(),
            "given": 0 if given is None else given.data_ptr(), "mask": 0 if mask is None else mask.data_ptr(),
            "slots": n, "temperature": request.temperature, "seed": request.seed, "first": request.first,
            "patience": PATIENCE,
        }  # fmt: skip
        self._launch(launch, request, out, lowered)
        if request.out is not None:
            request.out.copy_(out)
        return out.to(self.device), params

    def _values(self, request: Request, *shape: int) -> Tensor:
        """What the values are written to."""
        return self._zeros(*shape)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float32, device=self.device)

    def _known(self, request: Request) -> tuple[Tensor | None, Tensor | None]:
        if request.mask is None or request.given is None:
            return None, None
        given = request.given.to(self.device, torch.float32).contiguous()
        return given, request.mask.to(self.device, torch.uint8).contiguous()


class HostTeamExecutor(TeamExecutor):
    """The GPU's interpreter on host threads: `ranks` CTAs of `warps` threads. For tests; it is not fast."""

    name = "host-team"

    def __init__(
        self, programs: Programs, conditioning: Conditioning, dtype: torch.dtype = torch.float32,
        ranks: int = 1, warps: int = 1, teams: int = 1, shared_bytes: int = 96 << 10,
    ) -> None:  # fmt: skip
        self.ranks, self.warps, self.teams = ranks, warps, teams
        super().__init__(programs, conditioning, dtype, torch.device("cpu"), shared_bytes)

    @classmethod
    def make(cls, setting: Setting) -> Self:
        """See Executor."""
        return cls(setting.programs, setting.conditioning, setting.dtype)

    def _launch(self, launch: dict[str, Any], request: Request, out: Tensor, lowered: Lowered) -> None:
        self._native.run_on_host({**launch, "teams": min(self.teams, request.slots)}, self.ranks, self.warps)
