"""The graph that capture emits: nodes with channels on a grid of sites, reading each other through affine references.

A *site* is a position (i, j) of a node's grid; sequences are a grid of one row, a vector is one site. Every value of the
graph is a vector of channels at a site. All dependence between nodes is a :class:`Ref`: "for my site (i, j) read these
channels of that node at floor(((i, j) * mul + off) / div)". That is the regular form that every executor runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

Pair = tuple[int, int]


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
    """Lane k reads channel `chans[k]` of node `node` at the affine source site."""

    node: int
    chans: tuple[int, ...]
    at: Affine

    def lanes(self, keep: list[int]) -> Ref:
        """The same reference restricted to some lanes."""
        return Ref(self.node, tuple(self.chans[k] for k in keep), self.at)


@dataclass
class Piece:
    """Lanes [lo, hi) of an operand: a reference, or constants of shape [n] or [n, H, W] (per site)."""

    lo: int
    hi: int
    ref: Ref | None = None
    const: Tensor | None = None
    fill: float = 0.0


@dataclass
class TapW:
    """One term of a linear node: weight [O, n] times the n channels that `ref` reads, for output sites of `parity`."""

    ref: Ref
    weight: Tensor
    parity: Pair = (0, 0)
    kernel: Pair | None = None  # position in the layer's kernel, for messages
    extent: Pair | None = None  # size of that kernel
    full: bool = False  # known to hold no zero


@dataclass
class Node:
    """Base of all nodes: `channels` at each site of `grid`; `path` is the module that made it."""

    index: int
    path: str
    op: str
    channels: int
    grid: Pair


@dataclass
class InputNode(Node):
    """The sampled tensor as forward sees it (encoded)."""


@dataclass
class CondNode(Node):
    """Values that depend on conditioning alone, harvested from a run of forward at call time (see harvest.py)."""

    point: int = -1
    gather: Tensor = field(default_factory=lambda: torch.empty(0))  # [C, H, W] flat index into the batch-1 tensor
    tensor_shape: tuple[int, ...] = ()


@dataclass
class TapsNode(Node):
    """out[q * up + parity] = bias + sum_k W_k x_k(q): convolutions, transposed convolutions, linear layers, sums."""

    taps: list[TapW] = field(default_factory=list)
    bias: Tensor | None = None  # [O] or [O, H, W]
    up: Pair = (1, 1)


@dataclass
class MapNode(Node):
    """out[c] = fn(operand_0[c], operand_1[c], ...; imm) at every site."""

    fn: str = "copy"
    operands: list[list[Piece]] = field(default_factory=list)
    imm: tuple[float, ...] = ()


@dataclass
class ReduceNode(Node):
    """One channel: fn (max, min) over all lanes of the operand."""

    fn: str = "max"
    operands: list[list[Piece]] = field(default_factory=list)


@dataclass
class EmbedNode(Node):
    """out = table[index] with the index read from one lane; table [rows, channels]."""

    table: Tensor = field(default_factory=lambda: torch.empty(0))
    operands: list[list[Piece]] = field(default_factory=list)


@dataclass
class OpaqueNode(Node):
    """An operation without a rule. Harmless unless an output depends on it."""

    reason: str = ""


@dataclass
class Graph:
    """What capture hands to the planner: nodes in order of execution; `params[f]` is the node with phase f's parameters."""

    nodes: list[Node]
    params: list[int]
    points: list[tuple[str, str, int, int]]  # harvest points: (module path, aten op, which call of it, argument)
    notes: list[str]


def refs(node: Node) -> list[Ref]:
    """All references a node reads, in order."""
    if isinstance(node, TapsNode):
        return [t.ref for t in node.taps]
    if isinstance(node, MapNode | ReduceNode | EmbedNode):
        return [p.ref for pieces in node.operands for p in pieces if p.ref is not None]
    return []
