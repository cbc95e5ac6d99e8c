"""Units: merge sums of linear nodes, then split nodes into units with one ready time each."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fastgen.graph.maps import MapNode
from fastgen.graph.node import Graph, Node
from fastgen.graph.refs import Pair, Places, Read, Ref
from fastgen.graph.taps import TapsNode
from fastgen.graph.times import Ready


@dataclass(eq=False)
class Unit:
    """Some channels of a node that share their clock."""

    id: int
    node: Node  # for these channels; its references name units
    chans: tuple[int, ...]  # of the captured node
    grid: Pair
    ready: Tensor  # [H, W] int32
    partial: int | None = None  # unit whose value starts the accumulators
    row: bool = False  # runs in a batch at the start of its row
    live: Tensor = field(default_factory=lambda: torch.empty(0))
    when: Tensor = field(default_factory=lambda: torch.empty(0))  # [H, W] execution time, valid where live

    @property
    def channels(self) -> int:
        """How many channels it has."""
        return len(self.chans)

    @property
    def path(self) -> str:
        """The module that made it."""
        return self.node.path

    def refs(self) -> list[Ref]:
        """All references this unit reads."""
        return [read.ref for read in self.node.reads()]

    def sites(self, read: Read) -> tuple[Tensor, Tensor]:
        """(whether it matters, when) at the sites that use a read."""
        return read.needed(self.live), read.of_sites(self.when)


def merge_sums(graph: Graph) -> Graph:
    """add(taps, taps) at the same sites becomes one linear node, so its terms share accumulators."""
    users: Counter[int] = Counter(graph.params)
    for node in graph.nodes:
        users.update({read.ref.node for read in node.reads()})
    nodes = list(graph.nodes)
    for k, node in enumerate(nodes):
        pair = _summands(nodes, node)
        if pair is None or any(users[t.index] != 1 for t in pair):
            continue
        a, b = pair
        biases = [t.bias for t in pair if t.bias is not None]
        bias = biases[0] if biases else None
        if len(biases) == 2:
            bias = _plus(*biases)
        nodes[k] = TapsNode(node.index, b.path, "conv+conv", node.channels, node.grid, taps=a.taps + b.taps, bias=bias)
    return replace(graph, nodes=nodes)


def _plus(x: Tensor, y: Tensor) -> Tensor:
    """Sum of two biases, [O] or [O, H, W]."""
    if x.dim() == y.dim():
        return x + y
    wide, flat = (x, y) if x.dim() == 3 else (y, x)
    return wide + flat[:, None, None]


def _summands(nodes: list[Node], node: Node) -> tuple[TapsNode, TapsNode] | None:
    """The two linear nodes that a map adds lane by lane at identical sites, if it does just that."""
    if not isinstance(node, MapNode) or node.fn != "add":
        return None
    found = []
    for pieces in node.operands:
        if len(pieces) != 1 or pieces[0].ref is None:
            return None
        ref = pieces[0].ref
        source = nodes[ref.node]
        if not isinstance(source, TapsNode) or source.up != (1, 1) or not ref.at.identity:
            return None
        if ref.chans != tuple(range(source.channels)) or ref.at.lo != (0, 0):
            return None
        if source.grid != node.grid or ref.at.hi[0] < node.grid[0] or ref.at.hi[1] < node.grid[1]:
            return None
        found.append(source)
    if len(found) != 2 or found[0] is found[1]:
        return None
    return found[0], found[1]


def split(graph: Graph, ready: list[Ready]) -> tuple[list[Unit], Places]:
    """One unit per node that parameters depend on and group of channels with equal ready times, references rewritten; and
    per phase the (unit, channel in it) of every parameter."""
    units: list[Unit] = []
    places: Places = []
    reached = graph.reached() | {0}  # the sampled tensor is drawn, whoever reads it
    for node, r in zip(graph.nodes, ready, strict=True):
        where: list[tuple[int, int]] = [(-1, -1)] * node.channels
        for g in range(r.times.shape[0] if node.index in reached else 0):
            chans = (r.group == g).nonzero()[:, 0].tolist()
            unit = Unit(len(units), node.restrict(chans, places), tuple(chans), node.grid, r.times[g])
            units.append(unit)
            for k, c in enumerate(chans):
                where[c] = (unit.id, k)
        places.append(where)
    return units, [[places[p][c] for c in range(graph.nodes[p].channels)] for p in graph.params]
