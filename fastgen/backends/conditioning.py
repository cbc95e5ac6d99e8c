"""Conditioning at call time: run forward again and take the values that depend on conditioning alone.

The plan names the places ("the k-th add of layer Y, argument 1"); a light dispatch mode finds them again, skips the
work on sampled values, whose results are not looked at, and runs forward to its end, so that it may refuse what it is
given. One sample at a time, equal ones once: torch's batched kernels give other bytes at other batch sizes, and sample i
must not. Small ones are remembered between calls.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fastgen.backends.marks import Marks
from fastgen.backends.request import Request
from fastgen.capture.dispatch import FRESH_OPS, METADATA_OPS, written_by
from fastgen.capture.ranges import Ranges
from fastgen.capture.reads import READS
from fastgen.capture.signature import COMPUTES, empty, forms, numbers_of
from fastgen.errors import FastgenError, ShapeError, UnsupportedError
from fastgen.forward import FORWARD_ERRORS, ModulePath, first_tensor, plain, refused
from fastgen.graph.bounds import of_values
from fastgen.graph.node import OUTPUT, Call, Graph
from fastgen.graph.sources import CondNode
from fastgen.kept import Kept
from fastgen.program.pack import grown
from fastgen.program.records import Program
from fastgen.spec import Spec
from fastgen.view import neutral

Shapes = dict[Call, Any]  # what a skipped operation gives, on the meta device; by layer, name and call
REMEMBERED = 256  # samples' conditioning (labels come again), each of at most
SMALL = 1 << 20  # numbers
FORMS = 8  # shapes of conditioning that are remembered


class _Collector(TorchDispatchMode):
    """Follows which numbers are sampled, collects the arguments at the points, and compares what forward does with what it
    did at capture. Sampled values are zeros, and Python is answered about them as at capture."""

    def __init__(self, path: ModulePath, graph: Graph, x: Tensor, shapes: Shapes) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph, points, answers = graph, graph.points, graph.answers
        self.path, self.calls, self.shapes = path, Counter[tuple[str, str]](), shapes
        self.answers, self.asked = answers, 0
        self.wanted: dict[tuple[str, str, int], list[tuple[int, int]]] = {}
        for k, (where, name, count, position) in enumerate(points):
            self.wanted.setdefault((where, name, count), []).append((k, position))
        self.missing = len(points)
        self.found: dict[int, Tensor] = {}
        self.marks = Marks()
        self.marks.put(x)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        key = (self.path.current, name)
        self._look(key, tensors)
        self.calls[key] += 1
        marks = [m for t in tensors if (m := self.marks.of(t)) is not None]
        sampled = bool(marks)
        if name in READS:
            self.asked += 1
            answer = self.answers[self.asked - 1] if self.asked <= len(self.answers) else None
            return answer if sampled and answer is not None else func(*args, **kwargs)
        self._compare((*key, self.calls[key] - 1), args, kwargs)
        skipped = sampled and name.rstrip("_") in COMPUTES and all(bool(m.all()) for m in marks) and "out" not in kwargs
        written = written_by(func, args, kwargs)
        if skipped and written:
            out: Any = written[0]
        elif skipped:
            made = (*key, self.calls[key] - 1)
            if made not in self.shapes:
                self.shapes[made] = func(*tree_map(empty, args), **tree_map(empty, kwargs))
            out = tree_map(_zeros, self.shapes[made])
        else:
            out = func(*args, **kwargs)
        if sampled and name not in METADATA_OPS and name not in FRESH_OPS:
            if skipped:
                for t in [*tree_leaves(out), *written]:
                    if isinstance(t, Tensor):
                        self.marks.put(t)
            else:
                self.marks.follow(func, name, args, kwargs, out, written)
        return out

    def _look(self, key: tuple[str, str], tensors: list[Tensor]) -> None:
        for k, position in self.wanted.get((*key, self.calls[key]), []):
            self.found[k] = tensors[position].detach().clone()
            self.missing -= 1

    def returned(self, out: Tensor) -> None:
        """Takes what forward returned."""
        self._look(OUTPUT, [out])

    def _compare(self, call: Call, args: Any, kwargs: Any) -> None:
        """Raises UnsupportedError where a number of Python's is not that of capture: it comes of a shape."""
        known = self.graph.numbers.get(call)
        if known is not None and known != numbers_of(args, kwargs):
            raise UnsupportedError(
                f"layer {call[0]}: aten.{call[1]} has the number {numbers_of(args, kwargs)}, and had {known} at compile time: it "
                "depends on the length of the sample or of conditioning; compile with those of this length"
            )

    def finish(self) -> None:
        """Raises UnsupportedError where forward computed more or less often than at capture."""
        for key in {**self.graph.calls, **self.calls}:
            before, now = self.graph.calls.get(key, 0), self.calls[key]
            if key[1].rstrip("_") in COMPUTES and before != now:
                raise UnsupportedError(
                    f"forward took another path than at compile time: layer {key[0]} calls aten.{key[1]} {now} times, and did "
                    f"{before} times; compile with a sample and conditioning of these lengths"
                )


def _bytes(t: Tensor) -> bytes:
    whole: bytes = (t.view(torch.int16) if t.dtype == torch.bfloat16 else t).numpy().tobytes()  # numpy has no bfloat16
    return whole


def _zeros(t: Any) -> Any:
    return torch.zeros_like(t, device="cpu") if isinstance(t, Tensor) else t


class Conditioning:
    """Fills the Cond buffers of a program for one call."""

    def __init__(self, model: nn.Module, spec: Spec, graph: Graph) -> None:
        self.model, self.spec, self.graph = model, spec, graph
        reached = graph.reached()
        self._limits = [
            (limit, graph.conditioned(limit.nodes)) for limit in graph.limits if reached.issuperset(limit.nodes)
        ]
        self._known: Kept[bytes, list[Tensor]] = Kept(REMEMBERED)
        self._shapes: Kept[Any, Shapes] = Kept(FORMS)
        self._captured = (spec.shape, *graph.example)  # the form whose shapes are known from there

    def sources(self, program: Program, request: Request) -> list[Tensor]:
        """One tensor [slots, rows, cols, C] float32 per Cond buffer."""
        if not program.cond:
            return []
        spec = self.spec if request.length is None else self.spec.at_length(request.length)
        rows: dict[bytes, list[Tensor]] = {}
        keys = []
        for k in range(request.slots):
            one = tuple(c[k : k + 1] if isinstance(c, Tensor) and c.dim() else c for c in request.cond)
            tensors = [c.contiguous() for c in one if isinstance(c, Tensor)]
            form = (spec.shape, *forms(tensors))
            key = repr(form).encode() + b"|".join(_bytes(c) for c in tensors)
            if key not in rows:
                rows[key] = self._known.get(key) or self._sample(program, spec, one, form)
                if sum(a.numel() for a in rows[key]) <= SMALL:
                    self._known.put(key, rows[key])
            keys.append(key)
        return [
            torch.stack(parts).to(torch.float32).contiguous() for parts in zip(*(rows[k] for k in keys), strict=True)
        ]

    def _sample(self, program: Program, spec: Spec, one: tuple[Any, ...], form: Any) -> list[Tensor]:
        """The arrays of one sample. form: what the shapes of a forward hang on."""
        shapes = self._shapes.made(form, lambda: dict(self.graph.shapes) if form == self._captured else {})
        found = self._forward(spec, one, shapes)
        arrays = {n.index: self._take(n, found[n.point], spec) for n in self._nodes(program)}
        self._check_limits(arrays)
        return list(arrays.values())

    def _check_limits(self, arrays: dict[int, Tensor]) -> None:
        """Raises ShapeError where conditioning leads values out of what they must keep to (an index, out of its table)."""
        if not self._limits:
            return
        ranges = Ranges(self.graph.nodes, self.graph.given, {k: of_values(a) for k, a in arrays.items()})
        for limit, sources in self._limits:
            if not arrays.keys() >= sources:  # no output reads it: it is never computed
                continue
            found = ranges.of(limit.nodes)
            if found is None or found[0] < limit.low or found[1] > limit.high:
                given = "without limits" if found is None else f"from {found[0]:g} to {found[1]:g}"
                expected = f"{limit.low:g} to {limit.high:g}"
                raise ShapeError(
                    f"layer {limit.path}: with this conditioning {limit.what} is {given}; expected {expected}"
                )

    def _nodes(self, program: Program) -> list[CondNode]:
        return [n for n in (self.graph.nodes[k] for k in program.cond) if isinstance(n, CondNode)]

    def _forward(self, spec: Spec, cond: tuple[Any, ...], shapes: Shapes) -> dict[int, Tensor]:
        path = ModulePath()
        with neutral(), path.watching():
            x = spec.encode(torch.zeros(1, spec.grid[0] * spec.grid[1], spec.channels))
            cond = tuple(plain(c) for c in cond)
            mode = _Collector(path, self.graph, x, shapes)
            try:
                with mode:
                    out = first_tensor(self.model(x, *cond))
                mode.returned(out)
                if mode.missing == 0:
                    spec.parameters(out)
                    mode.finish()
                    return mode.found
            except FastgenError:
                raise
            except FORWARD_ERRORS as error:
                raise refused(x, cond, error) from error
        lost = next(p for k, p in enumerate(self.graph.points) if k not in mode.found)
        raise UnsupportedError(
            f"forward took another path than at compile time: layer {lost[0]} no longer calls aten.{lost[1]} "
            f"{lost[2] + 1} times"
        )

    def _take(self, node: CondNode, value: Tensor, spec: Spec) -> Tensor:
        """The node's values [H, W, C] out of the tensor it was found in."""
        shape = node.tensor_shape
        if value.dim() != len(shape):
            raise UnsupportedError(
                f"layer {node.path}: conditioning has {value.dim()} axes, at compile time {len(shape)}"
            )
        if not shape:
            return value.reshape(1, 1, 1)
        index = list(torch.unravel_index(node.gather, shape))
        if spec.sequence and node.grid[1] > 1:
            cols = grown(node.grid[1], self.spec.grid[1], spec.grid[1])
            index = [_stretch(k, cols, node.path) for k in index]
        for k, size in zip(index, value.shape, strict=True):
            if int(k.max()) >= size:
                raise ShapeError(
                    f"layer {node.path}: conditioning has shape {tuple(value.shape)}, too short for {spec.grid[1]} sites"
                )
        return value[tuple(index)].permute(1, 2, 0)


def _stretch(index: Tensor, cols: int, path: str) -> Tensor:
    """An index [C, 1, W] that is constant or advances by one per site, at another number of sites."""
    width = index.shape[2]
    if cols == width:
        return index
    slope = index[:, :, -1:] - index[:, :, -2:-1]
    base = index[:, :, -1:] - slope * (width - 1)
    rule = base + slope * torch.arange(width)
    if not bool((rule == index).all()) or bool((slope * (slope - 1) != 0).any()):
        raise UnsupportedError(f"layer {path}: conditioning is not laid out along the sequence; compile at this length")
    return base + slope * torch.arange(cols)
