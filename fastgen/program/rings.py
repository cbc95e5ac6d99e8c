"""Rings: how many rows (columns, for one-row grids) of each stored unit must be kept.

A buffer's row i lies at i % ring; it may be overwritten once nothing reads it any more, so the ring is the largest
distance, at any time a reader runs, between the newest row written and the row read, plus one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen.graph.refs import Read
from fastgen.graph.sources import InputNode
from fastgen.plan.plan import Schedule
from fastgen.plan.units import Unit

Readers = dict[int, list[tuple[Unit, Read]]]


def rings(schedule: Schedule) -> dict[int, int]:
    """By id of every stored unit."""
    readers, by_id = _readers(schedule.units), {u.id: u for u in schedule.units}
    out = {}
    for instr in schedule.instrs:
        for u in instr.stored:
            out[u.id] = max([1] + [_lag(u.live, u.when, reader, read) for reader, read in readers.get(u.id, [])])
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
    """Of forward's input, which draws write: one more than readers need, as a draw comes before its next reader."""
    written = schedule.steps.known.amax(0)
    live = torch.ones(written.shape, dtype=torch.bool)
    readers = _readers(schedule.units)
    inputs = [u for u in schedule.units if isinstance(u.node, InputNode)]
    return max([1] + [_lag(live, written, reader, read) for u in inputs for reader, read in readers.get(u.id, [])]) + 1


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
