"""What is asked of an executor: one run of a few samples in lockstep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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

    def rows(self, a: int, b: int) -> Request:
        """Samples a to b of it."""
        cond = tuple(c[a:b] if isinstance(c, Tensor) and c.dim() else c for c in self.cond)
        given, mask = (None if t is None else t[a:b] for t in (self.given, self.mask))
        return Request(
            b - a, self.seed, self.first + a, self.temperature, cond, given, mask, self.length, self.want_params
        )
