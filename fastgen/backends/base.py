"""What every executor offers: one run of a few samples in lockstep."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgen.errors import Cancelled

Progress = Callable[[int], bool | None]


@dataclass
class Request:
    """Samples [first, first + slots) of `seed`.

    given, mask: [slots, H*W, C] known values and where they are known. cond: forward's further inputs, batch `slots`.
    progress: called on the caller's thread with the number of steps done; returning False cancels the run.
    """

    slots: int
    seed: int
    first: int = 0
    temperature: float = 1.0
    cond: tuple[Any, ...] = ()
    given: Tensor | None = None
    mask: Tensor | None = None
    length: int | None = None
    want_params: bool = False
    progress: Progress | None = None
    out: Tensor | None = None  # float32 [slots, H*W, C], filled as the run goes

    def known(self, site: int, which: slice) -> Tensor | None:
        """Given values [slots, V] of one step, NaN where a value is to be drawn."""
        if self.mask is None or self.given is None:
            return None
        return torch.where(self.mask[:, site, which].bool(), self.given[:, site, which], float("nan"))


__all__ = ["Cancelled", "Executor", "Progress", "Request"]


class Executor(ABC):
    """Runs a plan (or, for the oracle, the module itself)."""

    name: str
    device: torch.device = torch.device("cpu")  # where results are

    @abstractmethod
    def run(self, request: Request) -> tuple[Tensor, Tensor | None]:
        """Values [slots, H*W, C] float32, and if wanted the parameters [slots, steps, P] before every draw."""

    def slots(self, length: int | None) -> int:
        """How many samples to run at once."""
        return 16

    def ready(self) -> None:
        """Raises FastgenError where a run cannot begin now; asked before anything else."""
        return None

    def aside(self) -> AbstractContextManager[Any]:
        """What a thread enters to run beside the thread that calls this, while that goes on using the device."""
        return nullcontext()
