"""Clocks: when each unit runs at each site, and which sums leave the critical path.

Walking the units backwards from the parameters, a unit runs as late as its first consumer needs it. If all its sites can
wait for, and are ready at, the start of their row it is a *row* unit, run in a batch there; else a *site* unit. Of a
linear site unit the terms that are ready at the start of the row are *hoisted*: a row unit sums them for the whole row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastgen.graph.refs import Affine, Pair, Places, Read
from fastgen.graph.times import look
from fastgen.plan.units import Unit

LATER = 1 << 30
# Channels: a hoisted sum is stored and read back (2 O numbers a site), which a term of fewer channels than a panel row
# streams in does not repay.
MIN_HOIST = 8


@dataclass
class Clock:
    """The row length in steps; time is in half steps (graph/times.py)."""

    row_len: int

    def row_time(self, t: Tensor) -> Tensor:
        """Start of the row of each time."""
        return t // (2 * self.row_len) * (2 * self.row_len)


def schedule(units: list[Unit], params: Places, steps: Tensor, clock: Clock) -> list[Unit]:
    """Sets live, when and row of every live unit, adds the hoisted sums, and returns the live units in running order."""
    need = {u.id: torch.full(u.grid, LATER, dtype=torch.int32) for u in units}
    by_id = {u.id: u for u in units}
    for f, chans in enumerate(params):
        for uid in {u for u, _ in chans}:
            need[uid] = torch.minimum(need[uid], 2 * steps[f].to(torch.int32) + 1)
    out: list[Unit] = []
    for unit in reversed(units):
        unit.live = need[unit.id] < LATER
        if not bool(unit.live.any()):
            continue
        unit.when = need[unit.id]
        out.append(unit)
        if unit.node.source:
            continue
        start = clock.row_time(unit.when)
        unit.row = bool((unit.ready[unit.live] <= start[unit.live]).all())
        if unit.row:
            unit.when = torch.where(unit.live, start, LATER)
        hoisted = None if unit.row else _hoist(unit, by_id, clock, len(by_id))
        if hoisted is not None:
            by_id[hoisted.id] = hoisted
            need[hoisted.id] = hoisted.when
            out.append(hoisted)
            _propagate(hoisted, need)
        _propagate(unit, need)
    live = {u.id for u in out}
    for u in out:
        u.node.forget(live)
    return out[::-1]


def _hoist(unit: Unit, by_id: dict[int, Unit], clock: Clock, new_id: int) -> Unit | None:
    """Takes the terms that are ready at the start of the row out of a site unit, into a row unit."""
    start = torch.where(unit.live, clock.row_time(unit.when), LATER)

    def waits(read: Read) -> bool:
        from_row, live = read.of_sites(start), read.of_sites(unit.live)
        seen = look(by_id[read.ref.node].ready[None], read.ref.at, (live.shape[0], live.shape[1]))[0]
        return bool((seen <= from_row)[live].all())

    parts = unit.node.split(waits, MIN_HOIST)
    if parts is None:
        return None
    early, unit.node = parts
    unit.partial = new_id
    return replace(
        unit, id=new_id, node=early, partial=None, row=True, when=start, live=unit.live.clone(),
        ready=torch.zeros_like(unit.ready),
    )  # fmt: skip


def _propagate(unit: Unit, need: dict[int, Tensor]) -> None:
    """Tells the sources of a unit when they are needed."""
    done: set[tuple[int, Affine, Pair, int]] = set()
    for read in unit.node.reads():
        key = (read.ref.node, read.ref.at, read.parity, id(read.dead))
        if key in done:
            continue
        done.add(key)
        live, when = unit.sites(read)
        _pull(need[read.ref.node], torch.where(live, when, LATER), read.ref.at)


def _pull(target: Tensor, when: Tensor, at: Affine) -> None:
    """target[source site] = min(itself, when[reader site]) over all reader sites."""
    i, j = (when < LATER).nonzero().unbind(1)
    si, sj = at.rows(i), at.cols(j)
    ok = at.inside(si, sj) & (si >= 0) & (sj >= 0) & (si < target.shape[0]) & (sj < target.shape[1])
    flat = (si * target.shape[1] + sj)[ok]
    target.view(-1).scatter_reduce_(0, flat, when[i, j][ok].to(target.dtype), "amin")


def check(units: list[Unit]) -> None:
    """Every unit runs when it is ready; a failure here is a bug of the planner, not of the module."""
    for u in units:
        if not u.node.source and bool((u.ready > u.when)[u.live].any()):
            raise AssertionError(f"{u.path}: {u.node.op} is planned before its operands are ready")
