"""The graph that capture builds beside a run of forward: nodes, and in shadow memory which of them every number is.

Knows no operation: rules (moves, linear, convolution, pointwise, norms, lookup) call it, dispatch.py calls them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgen.capture.ids import MAX_CHANNELS, MAX_COLS, MAX_NODES, MAX_ROWS, pack
from fastgen.capture.shadow import ShadowMemory
from fastgen.errors import UnsupportedError
from fastgen.forward import ModulePath
from fastgen.graph.node import Node, Point
from fastgen.graph.refs import Pair
from fastgen.graph.sources import CondNode, OpaqueNode


class Tracer(ShadowMemory):
    """Nodes so far, and what every number of forward is. data_grid: the sites of the sampled tensor."""

    def __init__(self, path: ModulePath, data_grid: Pair) -> None:
        super().__init__()
        self.path, self.data_grid = path, data_grid
        self.nodes: list[Node] = []
        self.points: list[Point] = []
        self.notes: list[str] = []
        self.calls: Counter[tuple[str, str]] = Counter()
        self.depth = 0  # of decompositions
        self.call: tuple[str, str, int] = ("", "", 0)
        self.call_args: list[Tensor] = []
        self._sources: dict[Any, list[tuple[Tensor, int]]] = {}
        self._kept: list[Tensor] = []

    def enter(self, name: str, tensors: list[Tensor]) -> None:
        """An operation of forward begins (inside a decomposition: another part of the running one)."""
        if self.depth == 0:
            key = (self.path.current, name)
            self.call, self.call_args = (*key, self.calls[key]), tensors
            self.calls[key] += 1

    def add(self, make: Callable[..., Node], op: str, channels: int, grid: Pair, **fields: Any) -> Node:
        """Appends a node made by the module that is running now."""
        limits = (MAX_CHANNELS, MAX_ROWS, MAX_COLS)
        if channels > limits[0] or grid[0] > limits[1] or grid[1] > limits[2] or len(self.nodes) >= MAX_NODES:
            raise UnsupportedError(
                f"{self.path.current}: {op} has {channels} channels on a grid of {grid[0]}x{grid[1]}; "
                f"the planner takes up to {limits[0]} channels and {limits[1]}x{limits[2]} sites"
            )
        node = make(len(self.nodes), self.path.current, op, channels, grid, **fields)
        self.nodes.append(node)
        return node

    def opaque(self, out: Tensor, op: str, reason: str) -> Tensor:
        """Ids of a result without a rule: an error only if an output needs it."""
        node = self.add(OpaqueNode, op, 1, (1, 1), reason=reason)
        return torch.full(out.shape, int(pack(node.index, *(torch.zeros((), dtype=torch.int64),) * 3)))

    def opaque_ids(self, tensors: list[Tensor]) -> int | None:
        """The id of the first result without a rule among some tensors, if any."""
        opaque = [n.index for n in self.nodes if isinstance(n, OpaqueNode)]
        if not opaque:
            return None
        marks = torch.tensor(opaque)
        for t in tensors:
            if self.closed(t) is not None:  # closed forms are never opaque
                continue
            ids = self.ids(t)
            hit = ids[torch.isin(ids >> 48, marks) & (ids >= 0)]
            if len(hit):
                return int(hit[0])
        return None

    def cond_source(self, t: Tensor, index: Tensor, grid: Pair) -> int:
        """A node for conditioning values: index [C, H, W] are flat positions in t, an argument of the running call."""
        position = next((k for k, a in enumerate(self.call_args) if a is t), None)
        if position is None:
            raise UnsupportedError(
                f"{self.path.current}: {self.call[1]} uses conditioning inside a composite operation; compute it outside"
            )
        same = (t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride(), t._version)
        for known, number in self._sources.get(same, []):
            if torch.equal(known, index):
                return number
        point = (*self.call, position)
        if point not in self.points:
            self.points.append(point)
        node = self.add(
            CondNode,
            "cond",
            index.shape[0],
            grid,
            point=self.points.index(point),
            gather=index,
            tensor_shape=tuple(t.shape),
        )
        self._sources.setdefault(same, []).append((index, node.index))
        self._kept.append(t)  # so that no other tensor takes its storage's place
        return node.index
