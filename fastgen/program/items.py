"""Items: which op runs at which sites in which row or step, for one period of the schedule."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgen.errors import UnsupportedError
from fastgen.graph.refs import Pair
from fastgen.plan.fuse import Instr
from fastgen.plan.plan import Schedule
from fastgen.program import records as R

MAX_PERIOD = 4096
OpKey = tuple[int, Pair]  # an op: instruction and parity
Entry = tuple[int, int, int, int, int]  # slot (row or step of the period), then an Item


def period_of(schedule: Schedule) -> tuple[int, dict[OpKey, int]]:
    """Steps after which the schedule repeats (images: all of them), and how far each op advances in them.

    Raises UnsupportedError for a sequence whose schedule does not repeat.
    """
    steps = len(schedule.steps)
    ops = [(k.index, p, *op_sites(k, p)) for k in schedule.instrs for p in k.parities]
    if not schedule.sequence:
        return steps, {(k, p): 0 for k, p, _, _ in ops}
    for period in range(schedule.row_len, min(MAX_PERIOD, steps // 4) + 1, schedule.row_len):
        found = {(k, p): _advance(when, q, period, steps) for k, p, when, q in ops}
        if all(a is not None for a in found.values()):
            return period, {k: a for k, a in found.items() if a is not None}
    raise UnsupportedError(
        f"the schedule of a sequence of {steps} steps does not repeat; compile with a longer example shape"
    )


def op_sites(instr: Instr, parity: Pair) -> tuple[Tensor, Tensor]:
    """(times, q) of the live sites of an op."""
    (ui, uj), (pu, pv) = instr.up, parity
    live, when = instr.lead.live[pu::ui, pv::uj], instr.lead.when[pu::ui, pv::uj]
    i, j = live.nonzero().unbind(1)
    return when[i, j].to(torch.int64), i * live.shape[1] + j


def item_tables(
    schedule: Schedule, ops: list[tuple[Instr, Pair]], period: int, advance: dict[OpKey, int]
) -> tuple[Any, ...]:
    """Row items, their pointers, step items, their pointers.

    A period of a sequence is taken from its middle, where neither border shows, and shifted to the start.
    """
    base = 0 if not schedule.sequence else (len(schedule.steps) // 2) // period
    rows: list[Entry] = []
    steps: list[Entry] = []
    for op, (instr, parity) in enumerate(ops):
        when, q = op_sites(instr, parity)
        if schedule.sequence:
            inside = (when >= 2 * period * base) & (when < 2 * period * (base + 1))
            when, q = when[inside] - 2 * period * base, q[inside] - advance[(instr.index, parity)] * base
        for t, start, count, step in _progressions(when, q):
            if t % 2 == 0:
                rows.append((t // (2 * schedule.row_len), op, start, count, step))
            else:
                steps.append((t // 2, op, start, count, step))
    return (*_index(rows, period // schedule.row_len), *_index(steps, period))


def _advance(when: Tensor, q: Tensor, period: int, steps: int) -> int | None:
    """Sites per period if an op's times repeat with it (and the borders can follow the same rule), else None.

    Two periods in the middle must be alike; they are the rule. The borders need not follow it: there a site may have been
    planned later than the rule says, as fewer readers wait for it, and running it by the rule is still right. So a site
    may differ if the rule runs it earlier, at a time that exists, and it lies at least a quarter of the op's sites
    (`middle`) from the rule's own: what differs nearer than that is no border but another period.
    """
    base = (steps // 2) // period

    def window(k: int) -> tuple[Tensor, Tensor]:
        inside = (when >= 2 * period * k) & (when < 2 * period * (k + 1))
        order = torch.argsort(when[inside] * (1 << 32) + q[inside])
        return when[inside][order], q[inside][order]

    (t0, q0), (t1, q1) = window(base), window(base + 1)
    if not len(q0) or len(q0) != len(q1) or not torch.equal(t0 + 2 * period, t1):
        return None
    advance = int(q1[0] - q0[0])
    if advance <= 0 or not bool((q1 - q0 == advance).all()):
        return None
    rule = {int(s) % advance: (int(t), int(s)) for t, s in zip(t0, q0, strict=True)}
    middle = len(q) // 4
    for t, site in zip(when.tolist(), q.tolist(), strict=True):
        if site % advance not in rule:
            return None
        t_rule, q_rule = rule[site % advance]
        expected = t_rule + (site - q_rule) // advance * 2 * period
        if expected != t and (expected > t or expected < 0 or abs(site - q_rule) < middle):
            return None
    return advance


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
