"""The regular form: from "which element is this" per tensor element to affine references.

Lanes are channels as a reader sees them, columns are its sites; `fit` finds, for ids [lanes, columns] and the reader's site
labels, the affine maps that reproduce every id.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen.capture.closed_form import Lanes
from fastgen.capture.ids import CONST, SITE_MASK, col_of, row_of
from fastgen.graph.refs import Affine, Pair, Piece, Ref, runs

_FAR = 1 << 40


class Irregular(Exception):
    """The dependence pattern has no affine form."""


def _candidates(src: Tensor, dst: Tensor) -> list[Pair]:
    """Slopes (mul, div) worth trying for one axis of one lane.

    src = floor((dst * mul + off) / div) spans `reach` while dst spans `spread`, so mul / div is near reach / spread; a
    floor at either end moves the ratio by less than one part in `reach`, for which the margins allow. Only one of mul
    and div differs from 1: no layer both strides and repeats.
    """
    spread = int(dst.max() - dst.min())
    reach = int(src.max() - src.min())
    out = [(0, 1)] if reach == 0 else []
    if spread and reach:
        ratio = spread / reach
        for d in range(max(2, int(ratio) - 1), int(ratio) + 3 + int(ratio / 4)):
            out.append((1, d))
        for m in range(max(2, int(1 / ratio) - 1), int(1 / ratio) + 3 + int(0.25 / ratio)):
            out.append((m, 1))
    return out


def _axis(src: Tensor, dst: Tensor, dyn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per lane (mul, div, off) with src = floor((dst * mul + off) / div) wherever dyn; src, dyn [L, S], dst [S]."""
    lanes = src.shape[0]
    mul, div, off = (
        torch.ones(lanes, dtype=torch.int64),
        torch.ones(lanes, dtype=torch.int64),
        torch.zeros(lanes, dtype=torch.int64),
    )

    def attempt(rows: Tensor, m: int, d: int) -> Tensor:
        gap = src[rows] * d - dst * m
        low = torch.where(dyn[rows], gap, -_FAR).amax(1)
        high = torch.where(dyn[rows], gap, _FAR).amin(1) + d - 1
        ok = low <= high
        hit = rows[ok]
        mul[hit], div[hit], off[hit] = m, d, low[ok]
        return rows[~ok]

    todo = attempt(torch.arange(lanes), 1, 1)
    while len(todo):
        probe = todo[0]
        before = len(todo)
        for m, d in _candidates(src[probe][dyn[probe]], dst[dyn[probe]]):
            todo = attempt(todo, m, d)
            if len(todo) < before:
                break
        if len(todo) == before:
            raise Irregular("sites read at distances that change along an axis (a flip, or an index over sites?)")
    return mul, div, off


def separable(ids: Tensor) -> bool:
    """Whether ids [L, S] are all sampled, with the same sites in every lane and one channel per lane."""
    first = ids[:, :1]
    return (
        bool((first >= 0).all())
        and bool(((first & SITE_MASK) == (first[:1] & SITE_MASK)).all())
        and bool((ids[0] >> 32 == ids[0, 0] >> 32).all())
        and torch.equal(ids - first, (ids[:1] - first[:1]).expand_as(ids))
    )


def fit_parts(ids: Tensor, i: Tensor, j: Tensor) -> tuple[list[Lanes], list[int]]:
    """As fit, but a lane may read one layer in one box of sites and another elsewhere (tensors patched in place): it is
    then in several groups, whose boxes are disjoint, and its value is their sum."""
    try:
        return fit(ids, i, j)
    except Irregular:
        nodes = (ids[ids >= 0] >> 48).unique().tolist()
        if len(nodes) < 2:
            raise
        groups, constant = [], set(range(ids.shape[0]))
        for node in nodes:
            part, unread = fit(torch.where((ids >> 48) == node, ids, CONST), i, j)
            groups += part
            constant &= set(unread)
        return groups, sorted(constant)


def fit(ids: Tensor, i: Tensor, j: Tensor) -> tuple[list[Lanes], list[int]]:
    """Affine references that reproduce ids [L, S] read at labels (i, j) [S]; and the lanes that are constant.

    Raises Irregular where there are none. Outside the bounds of a reference every id is constant.
    """
    first = ids[:, :1]
    if ids.shape[1] and separable(ids):
        live = torch.arange(ids.shape[0])
        part, dyn = ids[:1], torch.ones(1, ids.shape[1], dtype=torch.bool)
        keys = first[:, 0] >> 32
        which = torch.zeros(len(live), dtype=torch.int64)
    else:
        dynamic = ids >= 0
        live = dynamic.any(1).nonzero()[:, 0]
        if not len(live):
            return [], list(range(ids.shape[0]))
        part, dyn = ids[live], dynamic[live]
        key = part >> 32
        keys = key.amax(1)
        if bool((torch.where(dyn, key, _FAR).amin(1) != keys).any()):
            raise Irregular(
                "what is one channel here comes from another channel or layer at other sites (a reshape? a network over all "
                "values at once is planned as a vector: shape (D,))"
            )
        which = torch.arange(len(live))
    si, sj = row_of(part), col_of(part)
    columns = [*_axis(si, i, dyn), *_axis(sj, j, dyn)]
    for s in (si, sj):
        columns += [torch.where(dyn, s, _FAR).amin(1), torch.where(dyn, s, -1).amax(1) + 1]
    table = torch.stack(columns, 1)[which]
    table = torch.cat([(keys >> 16)[:, None], table], 1)
    rows, inverse = torch.unique(table, dim=0, return_inverse=True)
    groups = []
    for g, values in enumerate(rows.tolist()):
        node, mi, di, oi, mj, dj, oj, li, hi, lj, hj = values
        at = Affine((mi, mj), (di, dj), (oi, oj), (li, lj), (hi, hj))
        members = (inverse == g).nonzero()[:, 0]
        inside = at.inside(at.rows(i), at.cols(j))
        if not bool((dyn[which[members].unique()] == inside).all()):
            raise Irregular("some sites depend on the sample and others not, in no rectangle of sites")
        chans = tuple((keys[members] & 0xFFFF).tolist())
        groups.append(Lanes(live[members].tolist(), Ref(node, chans, at)))
    constant = sorted(set(range(ids.shape[0])) - set(live.tolist()))
    return groups, constant


def pieces_of(
    groups: list[Lanes], constant: list[int], values: Tensor, i: Tensor, j: Tensor, grid: Pair
) -> list[Piece]:
    """Operand pieces in lane order; `values` [L, S] are the real ones, used where an element is constant."""
    pieces = []
    for g in groups:
        inside = g.ref.at.inside(g.ref.at.rows(i), g.ref.at.cols(j))
        outside = values[g.lanes][:, ~inside]
        fill = float(outside.flatten()[0]) if outside.numel() else 0.0
        if outside.numel() and not bool((outside == fill).all()):
            raise Irregular("constants of different values stand beside sampled ones in one channel")
        for a, b in runs(g.lanes):
            pieces.append(Piece(g.lanes[a], g.lanes[b - 1] + 1, g.ref.lanes(list(range(a, b))), fill=fill))
    for a, b in runs(constant):
        value = values[constant[a] : constant[b - 1] + 1]
        if bool((value == value[:, :1]).all()):
            const = value[:, 0].clone()
        else:
            const = torch.zeros(value.shape[0], *grid, dtype=values.dtype)
            const[:, i, j] = value
        pieces.append(Piece(constant[a], constant[b - 1] + 1, const=const))
    return sorted(pieces, key=lambda p: p.lo)
