"""Items: which op runs at which sites in which row or step, for one period of the schedule."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgen.graph.refs import Pair
from fastgen.plan.fuse import Instr
from fastgen.plan.period import op_sites
from fastgen.plan.plan import Schedule
from fastgen.program import records as R

Entry = tuple[int, int, int, int, int]  # slot (row or step of the period), then an Item


def item_tables(schedule: Schedule, ops: list[tuple[Instr, Pair]]) -> tuple[Any, ...]:
    """Row items, their pointers, step items, their pointers.

    A period of a sequence is taken from its middle, where neither border shows, and shifted to the start.
    """
    period = schedule.period
    base = 0 if not schedule.sequence else (len(schedule.steps) // 2) // period
    rows: list[Entry] = []
    steps: list[Entry] = []
    for op, (instr, parity) in enumerate(ops):
        when, q = op_sites(instr, parity)
        if schedule.sequence:
            inside = (when >= 2 * period * base) & (when < 2 * period * (base + 1))
            when, q = when[inside] - 2 * period * base, q[inside] - schedule.advance[(instr.index, parity)] * base
        for t, start, count, step in _progressions(when, q):
            if t % 2 == 0:
                rows.append((t // (2 * schedule.row_len), op, start, count, step))
            else:
                steps.append((t // 2, op, start, count, step))
    return (*_index(rows, period // schedule.row_len), *_index(steps, period))


def _progressions(when: Tensor, q: Tensor) -> list[tuple[int, int, int, int]]:
    """(time, q0, count, step): the sites of an op at each time, as arithmetic progressions."""
    order = torch.argsort(when * (1 << 32) + q)
    out: list[tuple[int, int, int, int]] = []
    for t, s in zip(when[order].tolist(), q[order].tolist(), strict=True):
        if out and out[-1][0] == t:
            _, q0, count, step = out[-1]
            if count == 1 or s == q0 + count * step:
                out[-1] = (t, q0, count + 1, s - q0 if count == 1 else step)
                continue
        out.append((t, s, 1, 1))
    return out


def _index(entries: list[Entry], slots: int) -> tuple[Any, Any]:
    entries = sorted(entries)
    counts = np.bincount(np.array([e[0] for e in entries], dtype=np.int64), minlength=slots)
    return R.table([e[1:] for e in entries], R.Item), np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
