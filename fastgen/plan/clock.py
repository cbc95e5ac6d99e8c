"""Clocks: when each unit runs at each site, and which sums leave the critical path.

Walking the units backwards from the parameters, a unit runs as late as its first consumer needs it. If all its sites can
wait for, and are ready at, the start of their row it is a *row* unit, run in a batch there; else a *site* unit. Of a
linear site unit the terms that are ready at the start of the row are *hoisted*: a row unit sums them for the whole row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastgen.plan.ir import Affine, Piece, TapW
from fastgen.plan.passes import Unit
from fastgen.plan.ready import look, q_grid

LATER = 1 << 30
MIN_HOIST = 8  # channels: a smaller hoisted sum costs more to store than it saves


@dataclass
class Clock:
    """The row length in steps; time is in half steps (ready.py)."""

    row_len: int

    def row_time(self, t: Tensor) -> Tensor:
        """Start of the row of each time."""
        return t // (2 * self.row_len) * (2 * self.row_len)


def schedule(units: list[Unit], params: list[list[tuple[int, int]]], steps: Tensor, clock: Clock) -> list[Unit]:
    """Sets live, when and cls of every live unit, adds the hoisted sums, and returns the live units in running order."""
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
        if unit.kind in ("input", "cond"):
            unit.cls = unit.kind
            out.append(unit)
            continue
        start = clock.row_time(unit.when)
        waits = bool((unit.ready[unit.live] <= start[unit.live]).all())
        unit.cls = "row" if waits else "site"
        if waits:
            unit.when = torch.where(unit.live, start, LATER)
        out.append(unit)
        hoisted = _hoist(unit, by_id, clock, len(by_id)) if unit.kind == "taps" and not waits else None
        if hoisted is not None:
            by_id[hoisted.id] = hoisted
            need[hoisted.id] = hoisted.when
            out.append(hoisted)
            _propagate(hoisted, need)
        _propagate(unit, need)
    _drop_dead(out)
    return out[::-1]


def _drop_dead(units: list[Unit]) -> None:
    """Forgets reads of units that no live site reaches: they are outside their bounds everywhere."""
    live = {u.id for u in units}
    for u in units:
        u.taps = [t for t in u.taps if t.ref.node in live]
        u.operands = [
            [_constant(p) if p.ref is not None and p.ref.node not in live else p for p in ps] for ps in u.operands
        ]


def _constant(piece: Piece) -> Piece:
    return Piece(piece.lo, piece.hi, const=torch.full((piece.hi - piece.lo,), piece.fill))


def _hoist(unit: Unit, by_id: dict[int, Unit], clock: Clock, new_id: int) -> Unit | None:
    """Takes the terms that are ready at the start of the row out of a site unit, into a row unit."""
    start = torch.where(unit.live, clock.row_time(unit.when), LATER)
    early: list[TapW] = []
    late: list[TapW] = []
    for tap in unit.taps:
        times = by_id[tap.ref.node].ready
        (pu, pv), (ui, uj) = tap.parity, unit.up
        grid = q_grid(unit.grid, unit.up, tap.parity)
        seen = look(times[None], tap.ref.at, grid)[0]
        waits = bool((seen <= start[pu::ui, pv::uj])[unit.live[pu::ui, pv::uj]].all())
        (early if waits else late).append(tap)
    if sum(len(t.ref.chans) for t in early) < MIN_HOIST:
        return None
    hoisted = replace(
        unit,
        id=new_id,
        taps=early,
        cls="row",
        when=start,
        live=unit.live.clone(),
        ready=torch.zeros_like(unit.ready),
    )
    unit.taps, unit.bias, unit.partial = late, None, new_id
    return hoisted


def _propagate(unit: Unit, need: dict[int, Tensor]) -> None:
    """Tells the sources of a unit when they are needed."""
    done: set[tuple[int, Affine, tuple[int, int]]] = set()
    reads = [(t.ref, t.parity) for t in unit.taps]
    reads += [(p.ref, (0, 0)) for ps in unit.operands for p in ps if p.ref is not None]
    for ref, (pu, pv) in reads:
        key = (ref.node, ref.at, (pu, pv))
        if key in done:
            continue
        done.add(key)
        ui, uj = unit.up if unit.kind == "taps" else (1, 1)
        when = torch.where(unit.live, unit.when, LATER)[pu::ui, pv::uj]
        _pull(need[ref.node], when, ref.at)


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
        if u.kind not in ("input", "cond") and bool((u.ready > u.when)[u.live].any()):
            raise AssertionError(f"{u.node.path}: {u.node.op} is planned before its operands are ready")
