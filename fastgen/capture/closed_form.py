"""Ids in closed form: a tensor whose ids one formula gives never has an id per element.

For a 54M-parameter PixelCNN++ that is all but the first few layers; capture of it costs seconds and not minutes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastgen.capture.ids import CONST
from fastgen.graph.refs import Affine, Pair, Ref


@dataclass
class Lanes:
    """Lanes that share a source node and an affine map."""

    lanes: list[int]
    ref: Ref


@dataclass(frozen=True)
class ClosedForm:
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

    @staticmethod
    def of_node(node: int, channels: int, grid: Pair) -> ClosedForm:
        """All elements of a node."""
        return ClosedForm((node << 16) | torch.arange(channels), grid, hi=grid)

    @property
    def whole(self) -> bool:
        """No element is constant."""
        last = (self.grid[0] - 1 + self.off[0], self.grid[1] - 1 + self.off[1])
        inside = all(self.lo[a] <= self.off[a] and last[a] < self.hi[a] for a in (0, 1))
        return inside and bool((self.lanes >= 0).all())

    def window(self, c: tuple[int, int], start: Pair, grid: Pair) -> ClosedForm:
        """The field of channels [c0, c1) and of a box of `grid` sites from `start`."""
        off = (self.off[0] + start[0], self.off[1] + start[1])
        return ClosedForm(self.lanes[c[0] : c[1]], grid, off, self.lo, self.hi, self.zero)

    def padded(self, left: Pair, grid: Pair, zero: bool) -> ClosedForm | None:
        """The field after padding by constants (or cropping, where negative)."""
        last = tuple(min(self.hi[a], self.off[a] + self.grid[a]) for a in (0, 1))
        first = tuple(max(self.lo[a], self.off[a]) for a in (0, 1))
        bare = all(self.lo[a] <= self.off[a] and self.off[a] + self.grid[a] <= self.hi[a] for a in (0, 1))
        if not bare and not (self.zero and zero):
            return None
        off = (self.off[0] - left[0], self.off[1] - left[1])
        return ClosedForm(self.lanes, grid, off, (first[0], first[1]), (last[0], last[1]), zero)

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
