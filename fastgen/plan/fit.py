"""Element ids and the regular form: from "which element is this" per tensor element to affine references.

An id packs (node, channel, row, column) into an int64: 15 + 16 + 12 + 20 bits. CONST marks a value that never depends on
the sample, COND one that depends on conditioning alone. Lanes are channels as a reader sees them, columns are its sites;
:func:`fit` finds, for ids [lanes, columns] and the reader's site labels, the affine maps that reproduce every id.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastgen.plan.ir import Affine, Pair, Piece, Ref

CONST, COND = -1, -2
SITE_MASK = (1 << 32) - 1
MAX_CHANNELS, MAX_ROWS, MAX_COLS, MAX_NODES = 1 << 16, 1 << 12, 1 << 20, 1 << 15
_FAR = 1 << 40


class Irregular(Exception):
    """The dependence pattern has no affine form."""


def pack(node: int, chans: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Ids of `chans` x sites, broadcast together."""
    return (node << 48) | (chans << 32) | (i << 20) | j


def row(ids: Tensor) -> Tensor:
    """Row of each id."""
    return (ids >> 20) & 0xFFF


def col(ids: Tensor) -> Tensor:
    """Column of each id."""
    return ids & 0xFFFFF


@dataclass(frozen=True)
class Field:
    """Ids of a whole tensor [C, H, W] in closed form, so that wide layers need no id per element.

    Element (c, i, j) is channel lanes[c] (node << 16 | channel; negative: constant) at site (i, j) + off where that lies
    in [lo, hi), and constant elsewhere; `zero` says that those constants are zeros.
    """

    lanes: Tensor  # [C] int64
    grid: Pair
    off: Pair = (0, 0)
    lo: Pair = (0, 0)
    hi: Pair = (1 << 12, 1 << 20)
    zero: bool = True

    @property
    def whole(self) -> bool:
        """No element is constant."""
        last = (self.grid[0] - 1 + self.off[0], self.grid[1] - 1 + self.off[1])
        inside = all(self.lo[a] <= self.off[a] and last[a] < self.hi[a] for a in (0, 1))
        return inside and bool((self.lanes >= 0).all())

    def window(self, c: tuple[int, int], start: Pair, grid: Pair) -> Field:
        """The field of channels [c0, c1) and of a box of `grid` sites from `start`."""
        off = (self.off[0] + start[0], self.off[1] + start[1])
        return Field(self.lanes[c[0] : c[1]], grid, off, self.lo, self.hi, self.zero)

    def padded(self, left: Pair, grid: Pair, zero: bool) -> Field | None:
        """The field after padding by constants (or cropping, where negative)."""
        last = tuple(min(self.hi[a], self.off[a] + self.grid[a]) for a in (0, 1))
        first = tuple(max(self.lo[a], self.off[a]) for a in (0, 1))
        bare = all(self.lo[a] <= self.off[a] and self.off[a] + self.grid[a] <= self.hi[a] for a in (0, 1))
        if not bare and not (self.zero and zero):
            return None
        off = (self.off[0] - left[0], self.off[1] - left[1])
        return Field(self.lanes, grid, off, (first[0], first[1]), (last[0], last[1]), zero)

    def ids(self) -> Tensor:
        """Dense ids [C, H, W]."""
        i, j = torch.arange(self.grid[0]) + self.off[0], torch.arange(self.grid[1]) + self.off[1]
        rows, cols = (i >= self.lo[0]) & (i < self.hi[0]), (j >= self.lo[1]) & (j < self.hi[1])
        site = (i << 20)[:, None] | j
        out = (self.lanes << 32)[:, None, None] | site
        keep = (rows[:, None] & cols)[None] & (self.lanes >= 0)[:, None, None]
        return out if bool(keep.all()) else torch.where(keep, out, CONST)

    def groups(self) -> tuple[list[Lanes], list[int]]:
        """What fit() would find at the tensor's own positions, and the constant lanes."""
        last = (self.off[0] + self.grid[0], self.off[1] + self.grid[1])
        lo = (max(self.lo[0], self.off[0]), max(self.lo[1], self.off[1]))
        hi = (min(self.hi[0], last[0]), min(self.hi[1], last[1]))
        at = Affine((1, 1), (1, 1), self.off, lo, hi)
        nodes = self.lanes >> 16
        out = []
        for node in nodes[self.lanes >= 0].unique().tolist():
            lanes = (nodes == node).nonzero()[:, 0]
            out.append(Lanes(lanes.tolist(), Ref(node, tuple((self.lanes[lanes] & 0xFFFF).tolist()), at)))
        return out, (self.lanes < 0).nonzero()[:, 0].tolist()


@dataclass
class Lanes:
    """Lanes that share a source node and an affine map."""

    lanes: list[int]
    ref: Ref


def sites(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Row and column of every position of a grid, row-major."""
    n = torch.arange(height * width)
    return n // width, n % width


def _candidates(src: Tensor, dst: Tensor) -> list[Pair]:
    """Slopes (mul, div) worth trying for one axis of one lane."""
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
            raise Irregular("no affine map from reader sites to source sites")
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
            raise Irregular("one lane mixes channels or layers")
        which = torch.arange(len(live))
    si, sj = row(part), col(part)
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
            raise Irregular("sampled values do not fill a box of sites")
        chans = tuple((keys[members] & 0xFFFF).tolist())
        groups.append(Lanes(live[members].tolist(), Ref(node, chans, at)))
    constant = sorted(set(range(ids.shape[0])) - set(live.tolist()))
    return groups, constant


def runs(lanes: list[int]) -> list[tuple[int, int]]:
    """Maximal runs of consecutive numbers, as index ranges into the (ascending) list."""
    out, start = [], 0
    for k in range(1, len(lanes) + 1):
        if k == len(lanes) or lanes[k] != lanes[k - 1] + 1:
            out.append((start, k))
            start = k
    return out


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
            raise Irregular("constants of different values border the sampled ones")
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


def choose_labels(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Site labels for columns of ids [L, S] from the sources themselves: (keep [S] bool, i [S], j [S]).

    The lane with most sampled columns gives them; others fill its gaps at their constant distance from it.
    """
    dyn = ids >= 0
    keep = dyn.any(0)
    order = torch.argsort(dyn.sum(1), descending=True, stable=True).tolist()
    lead = order[0]
    known = dyn[lead].clone()
    i, j = row(ids[lead]).clone(), col(ids[lead]).clone()
    for lane in order[1:]:
        if bool((known | ~keep).all()):
            break
        new, both = dyn[lane] & ~known, dyn[lane] & known
        if not bool(new.any()) or not bool(both.any()):
            continue
        li, lj = row(ids[lane]), col(ids[lane])
        di, dj = (i - li)[both], (j - lj)[both]
        if bool((di == di[0]).all()) and bool((dj == dj[0]).all()):
            i[new], j[new] = li[new] + di[0], lj[new] + dj[0]
            known |= new
    if not bool((known | ~keep).all()):
        raise Irregular("sites of the result cannot be told from its operands")
    keep, i, j = _complete(keep, i, j)
    if bool(keep.any()):
        i -= min(0, int(i[keep].min()))
        j -= min(0, int(j[keep].min()))
    return keep, i, j


def _complete(keep: Tensor, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Labels for constant columns too, where the others follow the raster of a grid: sites stay a box."""
    count = len(keep)
    if bool(keep.all()) or int(keep.sum()) < 2:
        return keep, i, j
    s = torch.arange(count)
    for width in range(1, count + 1):
        if count % width:
            continue
        di, dj = (i - s // width)[keep], (j - s % width)[keep]
        if bool((di == di[0]).all()) and bool((dj == dj[0]).all()):
            return torch.ones_like(keep), s // width + di[0], s % width + dj[0]
    return keep, i, j
