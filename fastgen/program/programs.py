"""The packed programs of a plan: one a length and dtype, kept for the last few."""

from __future__ import annotations

from dataclasses import replace

import torch

from fastgen.errors import UnsupportedError
from fastgen.kept import Kept
from fastgen.plan.build import SHORT, one_thread
from fastgen.plan.plan import Plan, count, plan_stats
from fastgen.program.pack import pack
from fastgen.program.records import Program

KEPT = 4


class Programs:
    """Packs a plan where an executor asks for it."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._packed: Kept[tuple[int | None, torch.dtype], Program] = Kept(KEPT)
        stats = self.stats()
        plan.notes["memory"] = (
            f"{count(stats['weight_bytes'])}B of weights, {count(stats['state_bytes_per_sample'])}B of "
            f"activations per sample in flight"
        )

    def __call__(self, length: int | None = None, dtype: torch.dtype = torch.float32) -> Program:
        """The program; `length` is the number of sites of a sequence. Raises UnsupportedError where the plan does not
        hold for it."""
        sites = self._length(length)

        @one_thread()
        def packed() -> Program:
            return pack(self.plan.schedule, self.plan.spec.native_head(), dtype, sites)

        return self._packed.made((sites, dtype), packed)

    def stats(self) -> dict[str, float]:
        """Figures for one sample of the planned size: work, weight bytes read at batch 1, instructions, memory."""
        program = self()
        return {
            **plan_stats(self.plan),
            "weight_bytes": float(program.weights.nbytes), "state_bytes_per_sample": 4.0 * program.arena,
        }  # fmt: skip

    def _length(self, length: int | None) -> int | None:
        plan = self.plan
        planned = plan.spec.grid[1]
        if not plan.schedule.sequence:
            if length not in (None, planned):
                why = "forward does not do the same at every site, or at every length"
                if planned < SHORT:
                    why = f"it was compiled with fewer than {SHORT}"
                raise UnsupportedError(
                    f"length {length}: the plan holds for {planned} sites only, as {why}; compile with a shape of that length"
                )
            return None
        if length is not None and length > planned and planned < 2 * plan.reach:
            raise UnsupportedError(
                f"length {length}: the module looks {plan.reach} sites back, so compile with a shape of at least "
                f"{2 * plan.reach} sites to sample more than {planned}"
            )
        return length


class RoundedPrograms(Programs):
    """The programs in float32 whose weights are rounded as those of a low precision are."""

    def __init__(self, programs: Programs, rounding: torch.dtype) -> None:
        self.programs, self.rounding = programs, rounding

    def __call__(self, length: int | None = None, dtype: torch.dtype = torch.float32) -> Program:
        """See Programs."""
        program = self.programs(length)
        weights = torch.from_numpy(program.weights).to(self.rounding).float().numpy()
        return replace(program, weights=weights)
