"""Passes over the captured graph: merge sums of linear nodes, then split nodes into units with one ready time each."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastgen.plan.fit import runs
from fastgen.plan.ir import (
    CondNode,
    EmbedNode,
    Graph,
    MapNode,
    Node,
    Pair,
    Piece,
    ReduceNode,
    Ref,
    TapsNode,
    TapW,
    refs,
)
from fastgen.plan.ready import Ready, dead_operands


@dataclass(eq=False)
class Unit:
    """Some channels of a node that share their clock. References point at unit ids."""

    id: int
    node: Node
    kind: str  # input, cond, taps, map, reduce, embed
    channels: int
    grid: Pair
    ready: Tensor  # [H, W] int32
    fn: str = ""
    imm: tuple[float, ...] = ()
    taps: list[TapW] = field(default_factory=list)
    bias: Tensor | None = None
    up: Pair = (1, 1)
    operands: list[list[Piece]] = field(default_factory=list)
    table: Tensor | None = None
    node_chans: tuple[int, ...] = ()
    partial: int | None = None  # unit whose value starts the accumulators
    cls: str = ""  # row or site
    live: Tensor = field(default_factory=lambda: torch.empty(0))
    when: Tensor = field(default_factory=lambda: torch.empty(0))  # [H, W] execution time, valid where live

    def refs(self) -> list[Ref]:
        """All references this unit reads."""
        return [t.ref for t in self.taps] + [p.ref for ps in self.operands for p in ps if p.ref is not None]


def merge_sums(graph: Graph) -> Graph:
    """add(taps, taps) at the same sites becomes one linear node, so its terms share accumulators."""
    users: Counter[int] = Counter(graph.params)
    for node in graph.nodes:
        users.update({r.node for r in refs(node)})
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
    return Graph(nodes, graph.params, graph.points, graph.notes)


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


class Splitter:
    """Nodes to units: one unit per group of channels with equal ready times, references rewritten."""

    def __init__(self, graph: Graph, ready: list[Ready]) -> None:
        self.units: list[Unit] = []
        self.place: list[list[tuple[int, int]]] = []  # per node and channel: (unit, channel in it)
        for node, r in zip(graph.nodes, ready, strict=True):
            places: list[tuple[int, int]] = [(-1, -1)] * node.channels
            for g in range(r.times.shape[0]):
                chans = (r.group == g).nonzero()[:, 0].tolist()
                unit = self._unit(node, chans, r.times[g])
                self.units.append(unit)
                for k, c in enumerate(chans):
                    places[c] = (unit.id, k)
            self.place.append(places)
        self.params = [[self.place[p][c] for c in range(graph.nodes[p].channels)] for p in graph.params]

    def _unit(self, node: Node, chans: list[int], times: Tensor) -> Unit:
        unit = Unit(len(self.units), node, "input", len(chans), node.grid, times, node_chans=tuple(chans))
        whole = len(chans) == node.channels
        if isinstance(node, CondNode):
            unit.kind = "cond"
        elif isinstance(node, TapsNode):
            unit.kind, unit.up = "taps", node.up
            unit.bias = node.bias if whole or node.bias is None else node.bias[chans]
            unit.taps = [t for tap in node.taps for t in self._tap(tap, chans, whole)]
        elif isinstance(node, MapNode):
            unit.kind, unit.fn, unit.imm = "map", node.fn, node.imm
            unit.operands = [self._pieces(ps, chans) for ps in node.operands]
            for k, dead in dead_operands(node).items():  # what cannot matter at any site is not waited for
                if bool(dead[chans].all()):
                    unit.operands[k] = [Piece(0, len(chans), const=torch.zeros(len(chans)))]
        elif isinstance(node, ReduceNode | EmbedNode):
            unit.kind = "reduce" if isinstance(node, ReduceNode) else "embed"
            unit.fn = node.fn if isinstance(node, ReduceNode) else "embed"
            lanes = list(range(node.operands[0][-1].hi))
            unit.operands = [self._pieces(node.operands[0], lanes)]
            unit.table = node.table if isinstance(node, EmbedNode) else None
        return unit

    def _tap(self, tap: TapW, chans: list[int], whole: bool) -> list[TapW]:
        """A tap restricted to some outputs, one per source unit, without those whose weights are all zero."""
        weight = tap.weight if whole else tap.weight[chans]
        by_unit: dict[int, list[int]] = {}
        places = self.place[tap.ref.node]
        for lane, c in enumerate(tap.ref.chans):
            by_unit.setdefault(places[c][0], []).append(lane)
        out = []
        for unit, lanes in by_unit.items():
            part = weight if len(lanes) == weight.shape[1] else weight[:, lanes]
            if tap.full or bool((part != 0).any()):
                ref = Ref(unit, tuple(places[tap.ref.chans[k]][1] for k in lanes), tap.ref.at)
                out.append(TapW(ref, part, tap.parity, tap.kernel, tap.extent, tap.full))
        return out

    def _pieces(self, pieces: list[Piece], chans: list[int]) -> list[Piece]:
        """Operand pieces restricted to some lanes, cut where the source unit changes."""
        position = {c: k for k, c in enumerate(chans)}
        out: list[Piece] = []
        for p in pieces:
            lanes = [c for c in range(p.lo, p.hi) if c in position]
            new = [position[c] for c in lanes]
            for a, b in runs(new):
                if p.ref is None:
                    assert p.const is not None
                    out.append(Piece(new[a], new[b - 1] + 1, const=p.const[[c - p.lo for c in lanes[a:b]]]))
                    continue
                places = [self.place[p.ref.node][p.ref.chans[c - p.lo]] for c in lanes[a:b]]
                start = 0
                for k in range(1, len(places) + 1):
                    if k == len(places) or places[k][0] != places[start][0]:
                        ref = Ref(places[start][0], tuple(c for _, c in places[start:k]), p.ref.at)
                        out.append(Piece(new[a] + start, new[a] + k, ref, fill=p.fill))
                        start = k
        return sorted(out, key=lambda q: q.lo)
