"""The period of a sequence's schedule: after how many steps every op does the same again, further on."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen.graph.refs import Pair
from fastgen.plan.fuse import Instr

MAX_PERIOD = 4096
OpKey = tuple[int, Pair]  # an op: instruction and parity


def period_of(instrs: list[Instr], steps: int, row_len: int) -> tuple[int, dict[OpKey, int]] | None:
    """Steps after which the schedule of a sequence repeats, and how far each op advances in them; None: it does not."""
    ops = [(k.index, p, *op_sites(k, p)) for k in instrs for p in k.parities]
    for period in range(row_len, min(MAX_PERIOD, steps // 4) + 1, row_len):
        found = {(k, p): _advance(when, q, period, steps) for k, p, when, q in ops}
        if all(a is not None for a in found.values()):
            return period, {k: a for k, a in found.items() if a is not None}
    return None


def borders(values: Tensor) -> Pair | None:
    """Of a constant along a sequence [C, 1, n]: how many sites at either end differ from the middle one, as the effects of a
    layer's borders do; None where it is more than a quarter of them, so that the constant does not go on like that."""
    n = values.shape[2]
    differs = (values != values[:, :, n // 2 : n // 2 + 1]).any(0)[0].nonzero()[:, 0]
    first, last = differs[differs < n // 2], differs[differs >= n // 2]
    head = int(first[-1]) + 1 if len(first) else 0
    tail = n - int(last[0]) if len(last) else 0
    return None if max(head, tail) > n // 4 else (head, tail)


def op_sites(instr: Instr, parity: Pair) -> tuple[Tensor, Tensor]:
    """(times, q) of the live sites of an op."""
    (ui, uj), (pu, pv) = instr.up, parity
    live, when = instr.lead.live[pu::ui, pv::uj], instr.lead.when[pu::ui, pv::uj]
    i, j = live.nonzero().unbind(1)
    return when[i, j].to(torch.int64), i * live.shape[1] + j


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
