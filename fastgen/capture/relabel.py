"""A copy with regular labels, where channels vary with a site's parity or a tensor was patched in place."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from fastgen.capture.closed_form import ClosedForm
from fastgen.capture.fit import Irregular, fit, fit_parts
from fastgen.capture.ids import COND, sites
from fastgen.capture.tracer import Tracer
from fastgen.graph.refs import Pair, Term
from fastgen.graph.taps import TapsNode

PARITIES = (1, 2, 3, 4, 6, 8)  # blocks of sites whose channels may differ in order


def relabel(tr: Tracer, x: Tensor, ids: Tensor) -> Tensor:
    """Ids of a copy of x [1, C, (H,) W] whose channels vary with the site's parity (pixel shuffle, colours unrolled into
    columns); the ids as they are where x is regular already, or has no such form."""
    if ids.dim() not in (3, 4) or ids.shape[0] != 1 or not bool((ids >= 0).any()) or bool((ids == COND).any()):
        return ids
    grid: Pair = (1, ids.shape[2]) if ids.dim() == 3 else (ids.shape[2], ids.shape[3])
    plain = ids.reshape(ids.shape[1], *grid)
    with contextlib.suppress(Irregular):
        fit(plain.reshape(ids.shape[1], -1), *sites(*grid))
        return ids
    for up in sorted(((a, b) for a in PARITIES for b in PARITIES), key=lambda p: p[0] * p[1]):
        if any(up[a] > 1 and grid[a] < 2 * up[a] for a in (0, 1)):
            continue
        try:
            taps = [t for u in range(up[0]) for v in range(up[1]) for t in _copies(plain, up, (u, v))]
        except Irregular:
            continue
        fixed = torch.where(plain < 0, x.detach().expand(ids.shape).reshape(plain.shape).float(), torch.zeros(()))
        node = tr.add(
            TapsNode,
            "relabel",
            plain.shape[0],
            grid,
            taps=taps,
            up=up,
            bias=fixed if bool(fixed.any()) else None,
        )
        return ClosedForm.of_node(node.index, plain.shape[0], grid).ids().reshape(ids.shape)
    return ids


def _copies(ids: Tensor, up: Pair, parity: Pair) -> list[Term]:
    """Taps that copy ids [C, H, W] at the sites of one parity."""
    part = ids[:, parity[0] :: up[0], parity[1] :: up[1]]
    groups, _ = fit_parts(part.reshape(part.shape[0], -1), *sites(part.shape[1], part.shape[2]))
    taps = []
    for g in groups:
        weight = torch.zeros(ids.shape[0], len(g.lanes))
        weight[g.lanes, torch.arange(len(g.lanes))] = 1.0
        taps.append(Term(g.ref, weight, parity))
    return taps
