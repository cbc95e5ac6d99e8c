"""References: which channels of which node, at which of its sites; and the operands made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Pair = tuple[int, int]
Places = list[list[tuple[int, int]]]  # per node and channel: (unit that computes it, channel in that unit)


@dataclass(frozen=True)
class Affine:
    """Source site = floor((site * mul + off) / div) per axis; zero (or `fill`) where it leaves [lo, hi)."""

    mul: Pair = (1, 1)
    div: Pair = (1, 1)
    off: Pair = (0, 0)
    lo: Pair = (0, 0)
    hi: Pair = (1 << 30, 1 << 30)

    @property
    def identity(self) -> bool:
        """Reads the very same site (bounds aside)."""
        return self.mul == (1, 1) and self.div == (1, 1) and self.off == (0, 0)

    def rows(self, i: Tensor) -> Tensor:
        """Source rows of rows `i`."""
        return torch.div(i * self.mul[0] + self.off[0], self.div[0], rounding_mode="floor")

    def cols(self, j: Tensor) -> Tensor:
        """Source columns of columns `j`."""
        return torch.div(j * self.mul[1] + self.off[1], self.div[1], rounding_mode="floor")

    def inside(self, si: Tensor, sj: Tensor) -> Tensor:
        """Whether source sites lie within the bounds."""
        return (si >= self.lo[0]) & (si < self.hi[0]) & (sj >= self.lo[1]) & (sj < self.hi[1])


@dataclass(frozen=True)
class Ref:
    """Lane k reads channel `chans[k]` of node `node` at the affine source site.

    In a captured graph `node` is a node's index; in a unit (plan/units.py), whose reads were cut by ready time, a unit's.
    """

    node: int
    chans: tuple[int, ...]
    at: Affine

    def read(self, source: Tensor, grid: Pair, fill: float = 0.0) -> Tensor:
        """What it reads of values [C, H, W] at the sites of a grid: [lanes, *grid]."""
        i, j = self.at.rows(torch.arange(grid[0]))[:, None], self.at.cols(torch.arange(grid[1]))
        inside = self.at.inside(i, j) & (i >= 0) & (i < source.shape[1]) & (j >= 0) & (j < source.shape[2])
        found = source[list(self.chans)][:, i.clamp(0, source.shape[1] - 1), j.clamp(0, source.shape[2] - 1)]
        return torch.where(inside, found, torch.tensor(fill, dtype=source.dtype))

    def lanes(self, keep: list[int]) -> Ref:
        """The same reference restricted to some lanes."""
        return Ref(self.node, tuple(self.chans[k] for k in keep), self.at)


@dataclass(frozen=True, eq=False)
class Read:
    """A reference and the reader's sites that use it: those q * up + parity, as q, less the dead ones.

    At dead sites what is read cannot matter, so it need not be ready: the reader's program drops whatever it finds.
    """

    ref: Ref
    up: Pair = (1, 1)
    parity: Pair = (0, 0)
    dead: Tensor | None = None  # [H, W] of the reader

    def of_sites(self, per_site: Tensor) -> Tensor:
        """What is known per site of the reader [..., H, W], at the sites that use the reference."""
        return per_site[..., self.parity[0] :: self.up[0], self.parity[1] :: self.up[1]]

    def needed(self, live: Tensor) -> Tensor:
        """Of the reader's live sites [H, W], those at which the value matters, at the sites that use the reference."""
        if self.dead is not None:
            live = live.clone()
            h, w = min(live.shape[0], self.dead.shape[0]), min(live.shape[1], self.dead.shape[1])
            live[:h, :w] &= ~self.dead[:h, :w]
        return self.of_sites(live)


@dataclass(frozen=True)
class Cause:
    """One dependency of one element, for messages: it reads lane `lane` of `ref` at iteration site (i, j)."""

    label: str  # layer and tap; empty where the operation has no name worth saying
    ref: Ref
    lane: int
    i: int
    j: int


@dataclass
class Piece:
    """Lanes [lo, hi) of an operand: a reference, or constants of shape [n] or [n, H, W] (per site)."""

    lo: int
    hi: int
    ref: Ref | None = None
    const: Tensor | None = None
    fill: float = 0.0

    def value(self, values: Sequence[Tensor], grid: Pair) -> Tensor:
        """Its lanes at every site of a grid, float64 [lanes, *grid]; values: of all nodes [C, H, W]."""
        if self.ref is not None:
            return self.ref.read(values[self.ref.node], grid, self.fill)
        assert self.const is not None
        const = self.const.double()
        return const.reshape(*const.shape[:1], *(const.shape[1:] or (1, 1))).expand(self.hi - self.lo, *grid)

    def constant(self) -> Piece:
        """The same lanes where nothing is ever read: what lies outside the reference's bounds."""
        return Piece(self.lo, self.hi, const=torch.full((self.hi - self.lo,), self.fill))


Operand = list[Piece]  # in lane order, without gaps


@dataclass
class Term:
    """One term of a linear node: weight [O, n] times the n channels that `ref` reads, for output sites of `parity`."""

    ref: Ref
    weight: Tensor
    parity: Pair = (0, 0)
    kernel: Pair | None = None  # position in the layer's kernel, for messages
    extent: Pair | None = None  # size of that kernel
    full: bool = False  # known to hold no zero


def runs(lanes: list[int]) -> list[tuple[int, int]]:
    """Maximal runs of consecutive numbers, as index ranges into the (ascending) list."""
    out, start = [], 0
    for k in range(1, len(lanes) + 1):
        if k == len(lanes) or lanes[k] != lanes[k - 1] + 1:
            out.append((start, k))
            start = k
    return out


def restrict(pieces: Operand, chans: list[int], places: Places) -> Operand:
    """An operand restricted to some lanes, its references led to units and cut where the unit changes."""
    position = {c: k for k, c in enumerate(chans)}
    out: Operand = []
    for p in pieces:
        lanes = [c for c in range(p.lo, p.hi) if c in position]
        new = [position[c] for c in lanes]
        for a, b in runs(new):
            if p.ref is None:
                assert p.const is not None
                out.append(Piece(new[a], new[b - 1] + 1, const=p.const[[c - p.lo for c in lanes[a:b]]]))
                continue
            found = [places[p.ref.node][p.ref.chans[c - p.lo]] for c in lanes[a:b]]
            start = 0
            for k in range(1, len(found) + 1):
                if k == len(found) or found[k][0] != found[start][0]:
                    ref = Ref(found[start][0], tuple(c for _, c in found[start:k]), p.ref.at)
                    out.append(Piece(new[a] + start, new[a] + k, ref, fill=p.fill))
                    start = k
    return sorted(out, key=lambda q: q.lo)
