"""Rings: how many rows (columns, for one-row grids) of each stored unit must be kept.

A buffer's row i lies at i % ring; it may be overwritten once nothing reads it any more. Where rows are written one after
another, that makes the ring the largest distance, at any time a reader runs, between the newest row written and the row
read, plus one. In an order that comes back to earlier rows (planes, curves, bottom to top) all rows are kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen.graph.refs import Read
from fastgen.graph.sources import InputNode
from fastgen.plan.plan import Schedule
from fastgen.plan.units import Unit

KEEP_ALL = 1 << 30  # the packer cuts it to the grid
Readers = dict[int, list[tuple[Unit, Read]]]


def rings(schedule: Schedule) -> dict[int, int]:
    """By id of every stored unit."""
    readers, by_id = _readers(schedule.units), {u.id: u for u in schedule.units}
    out = {}
    for instr in schedule.instrs:
        for u in instr.stored:
            if not _in_turn(u.live, u.when):
                out[u.id] = KEEP_ALL
                continue
            out[u.id] = max(
                [_at_once(u)] + [_lag(u.live, u.when, reader, read) for reader, read in readers.get(u.id, [])]
            )
    for u in schedule.units:
        if u.partial is not None:
            partial = by_id[u.partial]
            out[u.partial] = max(out[u.partial], _own_site_lag(partial, u.live, u.when))
    drawn = 2 * schedule.steps.table + 1
    for f, chans in enumerate(schedule.params):
        for uid in {k for k, _ in chans}:
            out[uid] = max(out[uid], _own_site_lag(by_id[uid], torch.ones_like(drawn[f], dtype=torch.bool), drawn[f]))
    return out


def input_ring(schedule: Schedule) -> int:
    """Of forward's input, which draws write, value by value."""
    known = schedule.steps.known
    if not _in_turn(torch.ones_like(known, dtype=torch.bool), known):
        return KEEP_ALL
    written = known.amax(0)  # a site whole; its first values may be a row ahead of that, hence the one more
    live = torch.ones(written.shape, dtype=torch.bool)
    readers = _readers(schedule.units)
    inputs = [u for u in schedule.units if isinstance(u.node, InputNode)]
    return max([1] + [_lag(live, written, reader, read) for u in inputs for reader, read in readers.get(u.id, [])]) + 1


def _in_turn(live: Tensor, when: Tensor) -> bool:
    """Whether rows (columns, for one-row grids) [..., H, W] are written one after another."""
    axis = -2 if live.shape[-2] > 1 else -1
    position = live.nonzero()[:, axis]
    order = torch.argsort(when[live].to(torch.int64) * (1 << 21) + position)
    return bool((position[order].diff() >= 0).all())


def _at_once(unit: Unit) -> int:
    """Rows (columns) that a unit writes at one time: they must lie apart, whichever of them are read."""
    position = unit.live.nonzero()[:, 0 if unit.live.shape[0] > 1 else 1]
    _, group = torch.unique(unit.when[unit.live], return_inverse=True)
    last = torch.zeros(int(group.max()) + 1, dtype=torch.int64).scatter_reduce_(
        0, group, position, "amax", include_self=False
    )
    first = torch.zeros_like(last).scatter_reduce_(0, group, position, "amin", include_self=False)
    return int((last - first).max()) + 1


def _readers(units: list[Unit]) -> Readers:
    out: Readers = {}
    for u in units:
        for read in u.node.reads():
            out.setdefault(read.ref.node, []).append((u, read))
    return out


def _newest(live: Tensor, when: Tensor, at: Tensor) -> Tensor:
    """The furthest row (column, for one-row grids) written at times <= at."""
    axis = 0 if live.shape[0] > 1 else 1
    i = live.nonzero()[:, axis]
    times, order = when[live].to(torch.int64).sort(stable=True)
    far = i[order].cummax(0)[0]
    position = torch.searchsorted(times, at.to(torch.int64).contiguous(), right=True) - 1
    return far[position.clamp(min=0)]


def _lag(live: Tensor, when: Tensor, reader: Unit, read: Read) -> int:
    """Rows that a source, written at `when`, must keep for one read."""
    reader_live, reader_when = reader.sites(read)
    i, j = reader_live.nonzero().unbind(1)
    at = read.ref.at
    si, sj = at.rows(i), at.cols(j)
    ok = at.inside(si, sj) & (si >= 0) & (sj >= 0) & (si < live.shape[0]) & (sj < live.shape[1])
    if not bool(ok.any()):
        return 1
    source = (si if live.shape[0] > 1 else sj)[ok]
    return int((_newest(live, when, reader_when[i, j][ok]) - source).max()) + 1


def _own_site_lag(unit: Unit, live: Tensor, when: Tensor) -> int:
    """Rows that a unit must keep for what reads it at its own site, at `when`."""
    i, j = live.nonzero().unbind(1)
    source = i if unit.live.shape[0] > 1 else j
    return int((_newest(unit.live, unit.when, when[i, j]) - source).max()) + 1
