"""Which axes of a result are channels and which are sites, and the labels of those sites."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastgen.capture.fit import Irregular, separable
from fastgen.capture.ids import COND, SITE_MASK, col_of, row_of, sites
from fastgen.graph.refs import Pair


class LaneOrder:
    """Lanes x columns of a shape: which axes are channels and which are sites, by how the operands' ids vary."""

    def __init__(self, shape: torch.Size, ids: list[Tensor], copies: int | None = None) -> None:
        """copies: an axis of shifted copies, which looks like one of sites and is to be one of channels."""
        self.shape = shape
        self.order = torch.zeros(0)
        moved = [t for t in ids if bool((t >= 0).any())]
        self.perm, lead = self._axes(moved, copies)
        if self.perm is None:
            self.order = self._ranked(moved)
            self.lanes, self.columns = self.order.shape
            self.site_shape: list[int] = []
            self.folded = False
            return
        sizes = [shape[a] for a in self.perm]
        self.lanes = 1
        for n in sizes[:lead]:
            self.lanes *= n
        self.columns = max(1, math.prod(shape)) // max(1, self.lanes)
        self.site_shape = [n for n in sizes[lead:] if n > 1]
        self.folded = 0 in self.perm[lead:] and shape[0] > 1  # sites in the batch axis

    def _axes(self, moved: list[Tensor], copies: int | None) -> tuple[list[int] | None, int]:
        """(axes with the channels first, how many are channels), or (None, 0) where one axis mixes channels and sites.

        An axis along which the operands' sites move is one of sites, one along which only their channels move is one of
        channels. One along which both move counts as channels if another axis is left for the sites: its lanes then
        read at different distances, as where shifted and unshifted layers were joined.
        """
        nd = len(self.shape)
        if (
            copies is None
            and nd >= 2
            and self.shape[0] == 1
            and all(separable(t.reshape(self.shape[1], -1)) for t in moved)
        ):
            return [*list(range(1, nd)), 0], 1  # channels second, the usual case
        channels: list[int] = []
        places: list[int] = []
        mixed: list[int] = []
        for a in range(nd):
            site = any(_varies(t & SITE_MASK, t >= 0, a) for t in moved)
            key = any(_varies(t >> 32, t >= 0, a) for t in moved)
            (channels if a == copies else mixed if site and key else places if site else channels).append(a)
        if mixed:
            if not any(self.shape[a] > 1 for a in places):
                return None, 0
            channels = sorted(channels + mixed)  # lanes may read at different distances: shifted and unshifted layers
        return channels + places, len(channels)

    @staticmethod
    def _ranked(moved: list[Tensor]) -> Tensor:
        """Positions [L, S] when one axis mixes channels and sites: by site, then by order within it."""
        lead = max(moved, key=lambda t: int((t >= 0).sum())).reshape(-1)
        if bool((lead < 0).any()):
            raise Irregular("one axis runs over channels, sites and constants")
        order = torch.argsort(lead & SITE_MASK, stable=True)
        columns = len(torch.unique(lead & SITE_MASK))
        if len(lead) % columns:
            raise Irregular("one axis runs over channels and sites, unevenly")
        by_site = order.view(columns, -1)
        if not bool(((lead[by_site] & SITE_MASK) == (lead[by_site[:, :1]] & SITE_MASK)).all()):
            raise Irregular("one axis runs over channels and sites, unevenly")
        return by_site.t().contiguous()

    def split(self, t: Tensor) -> Tensor:
        """A tensor expanded to the shape, as [lanes, columns]."""
        if self.perm is None:
            return t.reshape(-1)[self.order]
        return t.permute(self.perm).reshape(self.lanes, self.columns)

    def join(self, t: Tensor) -> Tensor:
        """The inverse of split."""
        if self.perm is None:
            flat = torch.empty(self.order.numel(), dtype=t.dtype)
            flat[self.order.reshape(-1)] = t.reshape(-1)
            return flat.view(self.shape)
        back = t.reshape([self.shape[a] for a in self.perm])
        return back.permute([self.perm.index(a) for a in range(len(self.perm))])


def _varies(t: Tensor, dyn: Tensor, axis: int) -> bool:
    n = t.shape[axis]
    if n < 2 or t.stride(axis) == 0:
        return False
    a, b = t.narrow(axis, 0, n - 1), t.narrow(axis, 1, n - 1)
    return bool(((a != b) & dyn.narrow(axis, 0, n - 1) & dyn.narrow(axis, 1, n - 1)).any())


def label_columns(order: LaneOrder, ids: list[Tensor], grid: Pair) -> tuple[Tensor, Tensor, Tensor]:
    """(keep, i, j): which columns of the result are computed, and their site labels."""
    moved = [t for t in ids if bool((t >= 0).any())]
    keep = torch.zeros(order.columns, dtype=torch.bool)
    label = torch.full((order.columns,), -1)
    agree = True
    for t in moved:
        dyn = t >= 0
        site = t & SITE_MASK
        high = torch.where(dyn, site, -1).amax(0)
        low = torch.where(dyn, site, 1 << 40).amin(0)
        seen = high >= 0
        agree &= bool((high[seen] == low[seen]).all()) and bool(((label == high) | (label < 0) | ~seen).all())
        label = torch.where(seen, high, label)
        keep |= seen
    labelled = keep.clone()
    for t in ids:  # a site that only conditioning reaches is computed too
        keep |= (t == COND).any(0)
    if agree and torch.equal(keep, labelled):
        return keep, row_of(label.clamp(min=0)), col_of(label.clamp(min=0))
    if not order.folded and (len(order.site_shape) == 2 or (len(order.site_shape) == 1 and grid[0] == 1)):
        height, width = (1, *order.site_shape)[-2:]
        i, j = sites(height, width)
        rows, cols = i[keep], j[keep]
        box = (i >= rows.min()) & (i <= rows.max()) & (j >= cols.min()) & (j <= cols.max())
        return box, i, j
    known, i, j = choose_labels(torch.cat(moved))
    if bool((keep & ~known).any()):
        raise Irregular("which site an element belongs to cannot be told from what it is made of")
    return known, i, j


def choose_labels(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Site labels for columns of ids [L, S] from the sources themselves: (keep [S] bool, i [S], j [S]).

    The lane with most sampled columns gives them; others fill its gaps at their constant distance from it.
    """
    dyn = ids >= 0
    keep = dyn.any(0)
    if not bool(keep.any()):
        return keep, keep.long(), keep.long()
    order = torch.argsort(dyn.sum(1), descending=True, stable=True).tolist()
    lead = order[0]
    known = dyn[lead].clone()
    i, j = row_of(ids[lead]).clone(), col_of(ids[lead]).clone()
    for lane in order[1:]:
        if bool((known | ~keep).all()):
            break
        new, both = dyn[lane] & ~known, dyn[lane] & known
        if not bool(new.any()) or not bool(both.any()):
            continue
        li, lj = row_of(ids[lane]), col_of(ids[lane])
        di, dj = (i - li)[both], (j - lj)[both]
        if bool((di == di[0]).all()) and bool((dj == dj[0]).all()):
            i[new], j[new] = li[new] + di[0], lj[new] + dj[0]
            known |= new
    if not bool((known | ~keep).all()):
        raise Irregular("which site an element belongs to cannot be told from what it is made of")
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
