"""The graph that capture builds beside a run of forward: nodes, and in shadow memory which of them every number is.

Knows no operation: rules (moves, linear, convolution, pointwise, norms, lookup) call it, dispatch.py calls them.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastgen.capture.closed_form import ClosedForm
from fastgen.capture.ids import COND, CONST, MAX_CHANNELS, MAX_COLS, MAX_NODES, MAX_ROWS, pack
from fastgen.capture.ranges import Ranges, check_index
from fastgen.capture.shadow import Ids, ShadowMemory
from fastgen.errors import UnsupportedError
from fastgen.forward import ModulePath
from fastgen.graph.bounds import Range, of_values, union
from fastgen.graph.node import Call, Limit, Node, Point
from fastgen.graph.refs import Operand, Pair
from fastgen.graph.sources import CondNode, OpaqueNode


class Tracer(ShadowMemory):
    """Nodes so far, and what every number of forward is. data_grid: the sites of the sampled tensor."""

    def __init__(self, path: ModulePath, data_grid: Pair, given: Range = None) -> None:
        super().__init__()
        self.path, self.data_grid = path, data_grid
        self.nodes: list[Node] = []
        self.sampled = torch.zeros(0)  # the tensor that forward was given
        self.ranges = Ranges(self.nodes, given)
        self.reads: list[Any] = []  # (reads.py) of forward's reads in order: what was read, None where it is a constant
        self.how: str | None = None  # why Python reads now: "bool" for a yes or no, "" for nothing that counts
        self.points: list[Point] = []
        self.notes: list[str] = []
        self.calls: Counter[tuple[str, str]] = Counter()
        self.numbers: dict[Call, tuple[float, ...]] = {}
        self.shapes: dict[Call, Any] = {}
        self.limits: list[Limit] = []
        self.plans_conditioning = True  # its convolutions along a sequence, which need no memory a layer then
        self.depth = 0  # of decompositions
        self.call: tuple[str, str, int] = ("", "", 0)
        self.call_args: list[Tensor] = []
        self._sources: dict[Any, list[tuple[Tensor, int]]] = {}
        self._kept: list[torch.UntypedStorage] = []

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
        found = (self.opaque_in(self.ids(t)) for t in tensors if self.closed(t) is None)  # those are never opaque
        return next((k for k in found if k is not None), None)

    def opaque_in(self, ids: Tensor) -> int | None:
        """The id of the first element without a rule, if any."""
        opaque = [n.index for n in self.nodes if isinstance(n, OpaqueNode)]
        if not opaque:
            return None
        marks = torch.tensor(opaque)
        hit = ids[torch.isin(ids >> 48, marks) & (ids >= 0)]
        return int(hit[0]) if len(hit) else None

    def reason(self, opaque: int) -> str:
        """Why the element with an id has no rule."""
        node = self.nodes[opaque >> 48]
        return f"layer {node.path}: {node.reason}" if isinstance(node, OpaqueNode) else ""

    def no_rule(self, t: Tensor, ids: Tensor) -> int:
        """See ShadowMemory."""
        opaque = self.opaque_in(ids)
        if opaque is not None:
            return opaque
        reason = f"the bytes of sampled values are taken for {str(t.dtype).removeprefix('torch.')}, which they are not"
        if t.dtype.is_complex:
            reason = "complex numbers are not planned; compute with their real and imaginary parts"
        return int(self.opaque(t, "view", reason).reshape(-1)[0])

    @contextlib.contextmanager
    def reading(self, how: str) -> Iterator[None]:
        """What Python reads meanwhile it reads for this."""
        before, self.how = self.how, how
        try:
            yield
        finally:
            self.how = before

    def range_of(self, t: Tensor) -> Range:
        """Between which two numbers the elements of t lie, if that is known."""
        field = self.closed(t)
        if field is not None:
            return self.range_of_ids(field)
        ids = self.ids(t)
        fixed = t.detach()[ids == CONST]
        return union([self.range_of_ids(ids), *([of_values(fixed)] if fixed.numel() else [])])

    def range_of_ids(self, ids: Ids) -> Range:
        """The same for the sampled ones of some ids."""
        if isinstance(ids, ClosedForm):
            found = [self.ranges.of(self.nodes_of(ids))]
            return union([*found, *([] if ids.whole else [(0.0, 0.0) if ids.zero else None])])
        return None if bool((ids == COND).any()) else self.ranges.of(self.nodes_of(ids))

    @staticmethod
    def nodes_of(ids: Ids) -> tuple[int, ...]:
        """The nodes of the sampled ones of some ids."""
        found = ids.lanes[ids.lanes >= 0] >> 16 if isinstance(ids, ClosedForm) else ids[ids >= 0] >> 48
        return tuple(found.unique().tolist())

    def limited(self, nodes: tuple[int, ...], low: float, high: float, what: str) -> bool:
        """Whether it is conditioning that decides between which numbers the values of some nodes lie: it is then asked at
        every call. what: these values are."""
        assumed: dict[int, Range] = {n.index: (0.0, 0.0) for n in self.nodes if isinstance(n, CondNode)}
        if self.ranges.of(nodes) is not None or Ranges(self.nodes, self.ranges.known[0], assumed).of(nodes) is None:
            return False
        self.limits.append(Limit(self.path.current, nodes, low, high, what))
        return True

    def check_lookup(self, operand: Operand, rows: int) -> None:
        """Raises Irregular where an operand, used as an index of so many rows, may leave them."""
        nodes = tuple({p.ref.node for p in operand if p.ref is not None})
        for p in operand:
            check_index((p.fill, p.fill) if p.const is None else of_values(p.const), rows)
        if nodes and not self.limited(nodes, 0, rows - 1, "an index"):
            check_index(self.ranges.of(nodes), rows)

    def cond_source(self, t: Tensor, index: Tensor, grid: Pair) -> int:
        """A node for conditioning values: index [C, H, W] are flat positions in t, a view of an argument of the running call."""
        position, index = self._argument(t, index)
        t = self.call_args[position]
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
        self._kept.append(t.untyped_storage())  # so that no other takes its place
        return node.index

    def _argument(self, t: Tensor, index: Tensor) -> tuple[int, Tensor]:
        """Which argument of the running call t is a view of, and where flat positions in t are in that."""
        for k, a in enumerate(self.call_args):
            if a is t or (a.data_ptr() == t.data_ptr() and _spread(a) == _spread(t) and a.dtype == t.dtype):
                return k, index
            if a.untyped_storage()._cdata == t.untyped_storage()._cdata and a.dtype == t.dtype:
                cells = torch.arange(a.untyped_storage().nbytes() // a.element_size())
                held = cells.as_strided(a.shape, a.stride(), a.storage_offset()).reshape(-1)
                place = torch.full_like(cells, a.numel()).scatter_reduce(0, held, torch.arange(a.numel()), "amin")
                found = place.as_strided(t.shape, t.stride(), t.storage_offset()).reshape(-1)[index]
                if bool((found < a.numel()).all()):
                    return k, found
        raise UnsupportedError(
            f"{self.path.current}: torch takes {self.call[1]} apart, and computes with conditioning in between; write it out "
            "with simpler operations"
        )


def _spread(t: Tensor) -> list[tuple[int, int]]:
    """Sizes and strides of the axes that have more than one element."""
    return [(n, stride) for n, stride in zip(t.shape, t.stride(), strict=True) if n > 1]
