"""What `fuse_` recognises in an fx graph, and what it puts there: one call of the fused convolution.

    x -> (concat_elu) -> (pad) -> conv -> (crop) -> (+ conditioning) -> a, b = halves -> tanh(a) sigmoid(b) | a sigmoid(b)
      -> (+ residual)

also with two convolutions of the same input instead of two halves, with torch's GLU, and without a gate where concat_elu
stands in front. A chain is taken only if nothing else reads what lies inside it.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fastgen.nn import run
from fastgen.nn.convolutions import Conv, argument, changes, conv_at, is_call, module_of

_ADD, _MUL = (operator.add, torch.add), (operator.mul, torch.mul)
Shapes = dict[fx.Node, torch.Size]
Nodes = tuple[fx.Node, ...]


@dataclass(frozen=True)
class Match:
    """One chain: from the convolutions (two if each half has its own) to `last`, whose value it makes."""

    convs: tuple[Conv, ...]
    gate: run.Gate
    last: fx.Node
    cond: tuple[Nodes, ...]  # what is added to each convolution
    swapped: bool = False  # the gate takes the halves the other way round
    halves: tuple[Nodes, Nodes] = ((), ())  # what is added to each half of one convolution
    residual: fx.Node | None = None
    inside: frozenset[fx.Node] = frozenset()

    @property
    def name(self) -> str:
        return " and ".join(c.name for c in self.convs)

    @property
    def what(self) -> str:
        """The chain in words."""
        gate = {"tanh": ["tanh·sigmoid"], "linear": ["GLU"], "none": []}[self.gate]
        parts = ["concat_elu"] * self.convs[0].elu + [f"conv{self.convs[0].dims}d"]
        parts += ["conditioning"] * any((*self.cond, *self.halves)) + gate + ["residual"] * (self.residual is not None)
        return " + ".join(parts)


@dataclass(frozen=True)
class _Sum:
    """A convolution, what is added to it, and the nodes of both."""

    conv: Conv
    added: Nodes
    nodes: Nodes


class Finder:
    """Looks for chains in one module's graph. `refused` collects gates that are left alone, with the reason."""

    def __init__(self, root: nn.Module, graph: fx.Graph, shapes: Shapes) -> None:
        self.root, self.graph, self.shapes = root, graph, shapes
        self.refused: list[str] = []

    def next(self) -> Match | None:
        """The first chain in the graph that can be taken."""
        self.refused = []
        for node in self.graph.nodes:
            match = self._gated(node) if node.op != "output" else None
            if match is not None:
                match = self._with_residual(match)
                reason = self._obstacle(match)
                if reason is None:
                    return match
                self.refused.append(f"{match.name}: {reason}")
        for node in self.graph.nodes:
            conv = conv_at(self.root, node, self.shapes)
            if conv is not None and conv.elu:
                match = self._with_residual(Match((conv,), "none", node, ((),)))
                if self._obstacle(match) is None:
                    return match
        return None

    # ---- gates ---------------------------------------------------------------------------------------------
    def _gated(self, node: fx.Node) -> Match | None:
        if self._is_glu(node):
            found = self._sum(node.args[0] if node.args else None)
            return None if found is None else self._match(node, "linear", (found,), (node,))
        if not is_call(node, _MUL, ("mul",)) or len(node.args) != 2:
            return None
        for first, second in (node.args, node.args[::-1]):
            b = self._inside(second, nn.Sigmoid, (torch.sigmoid, F.sigmoid), "sigmoid")
            if b is None:
                continue
            a = self._inside(first, nn.Tanh, (torch.tanh, F.tanh), "tanh")
            match = self._halves(node, "linear" if a is None else "tanh", first if a is None else a, b, first, second)
            if match is not None:
                return match
        return None

    def _is_glu(self, node: fx.Node) -> bool:
        module, dim = module_of(self.root, node), None
        if isinstance(module, nn.GLU):
            dim = module.dim
        elif is_call(node, (F.glu,)):
            dim = argument(node, 1, "dim", -1)
        return dim in (1, 1 - len(self.shapes.get(node, ())))

    def _inside(self, node: Any, kind: type[nn.Module], functions: tuple[Any, ...], method: str) -> fx.Node | None:
        """The argument of an activation."""
        if isinstance(module_of(self.root, node), kind) or is_call(node, functions, (method,)):
            source = node.args[0] if node.args else None
            return source if isinstance(source, fx.Node) else None
        return None

    def _halves(self, node: fx.Node, gate: run.Gate, a: Any, b: Any, first: Any, second: Any) -> Match | None:
        if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
            return None
        outer = tuple(n for n in (node, first, second, a, b) if isinstance(n, fx.Node))
        match = self._two_halves(node, gate, a, b, outer)
        if match is not None:
            return match
        sums = self._sum(a), self._sum(b)
        if sums[0] is None or sums[1] is None or not sums[0].conv.alike(sums[1].conv):
            return None
        return self._match(node, gate, (sums[0], sums[1]), outer)

    def _two_halves(self, node: fx.Node, gate: run.Gate, a: fx.Node, b: fx.Node, outer: Nodes) -> Match | None:
        """Halves of one convolution, to each of which halves of the conditioning may have been added."""
        (terms_a, adds_a), (terms_b, adds_b) = self._terms(a, []), self._terms(b, [])
        for term_a in terms_a:
            for term_b in terms_b:
                half_a, half_b = self._half(term_a), self._half(term_b)
                if half_a is None or half_b is None or half_a[0] is not half_b[0] or half_a[1] == half_b[1]:
                    continue
                found = self._sum(half_a[0])
                if found is None:
                    continue
                rest = tuple(t for t in terms_a if t is not term_a), tuple(t for t in terms_b if t is not term_b)
                if (
                    len(rest[0]) != len(terms_a) - 1
                    or len(rest[1]) != len(terms_b) - 1
                    or bool(rest[0]) != bool(rest[1])
                ):
                    continue
                nodes = (*outer, *adds_a, *adds_b, *half_a[2], *half_b[2])
                match = self._match(node, gate, (found,), nodes, swapped=half_a[1] == 1)
                return match and replace(match, halves=rest if half_a[1] == 0 else rest[::-1])
        return None

    def _half(self, node: fx.Node) -> tuple[fx.Node, int, Nodes] | None:
        """(whole, 0 or 1, nodes) of a half of the channels: of chunk, of split, or a slice."""
        if not is_call(node, (operator.getitem,)):
            return None
        whole, index = node.args
        if is_call(whole, (torch.chunk, torch.split), ("chunk", "split")):
            assert isinstance(whole, fx.Node)
            source, half = whole.args[0], self._channels(whole.args[0]) // 2
            size = argument(whole, 1, "chunks" if "chunk" in str(whole.target) else "split_size_or_sections")
            size = whole.kwargs.get("split_size", size)
            sizes = (
                [self._number(n, half) for n in size] if isinstance(size, list | tuple) else self._number(size, half)
            )
            good = sizes == 2 if "chunk" in str(whole.target) else sizes in (half, [half, half])
            dim = argument(whole, 2, "dim", 0)
            if not isinstance(source, fx.Node) or not good or half == 0 or index not in (0, 1):
                return None
            nodes = (node, whole, *self._sizes(size))
            return (source, int(index == 1), nodes) if dim in (1, 1 - len(self.shapes[source])) else None
        half = self._channels(whole) // 2
        if not half or not isinstance(index, tuple) or len(index) < 2 or index[0] != slice(None):
            return None
        if any(part not in (slice(None), Ellipsis) for part in index[2:]) or not isinstance(whole, fx.Node):
            return None
        if not isinstance(index[1], slice) or index[1].step is not None:
            return None
        ends = self._number(index[1].start, half) or 0, self._number(index[1].stop, half) or 2 * half
        which = {(0, half): 0, (half, 2 * half): 1}.get(ends)
        ends_of = (index[1].start, index[1].stop)
        return None if which is None else (whole, which, (node, *self._sizes(ends_of)))

    def _number(self, value: Any, half: int) -> Any:
        """A plain value, or `half` where the graph computes x.size(1) // 2."""
        if not is_call(value, (operator.floordiv,)) or value.args[1] != 2:
            return value
        size = self._size(value.args[0])
        return half if size is not None and size[1] == 1 and self._channels(size[0]) == 2 * half else value

    def _sizes(self, value: Any) -> Nodes:
        """The nodes that a number, or numbers, of channels come from."""
        values = value if isinstance(value, list | tuple) else (value,)
        nodes = [
            v for v in values if isinstance(v, fx.Node) and is_call(v, (operator.floordiv, operator.getitem), ("size",))
        ]
        more = [a for n in nodes if self._size(n) is None for a in self._sizes(n.args[0])]
        return (*nodes, *more)

    def _size(self, value: Any) -> tuple[fx.Node, int] | None:
        """(x, axis) of x.size(axis) or x.shape[axis]."""
        if is_call(value, (), ("size",)) and len(value.args) == 2:
            source, axis = value.args
        elif is_call(value, (operator.getitem,)) and isinstance(value.args[1], int):
            whole, axis = value.args
            shape = is_call(whole, (getattr,)) and whole.args[1] == "shape"
            if not shape and not (is_call(whole, (), ("size",)) and len(whole.args) == 1):
                return None
            source = whole.args[0]
        else:
            return None
        return (source, axis % len(self.shapes[source])) if source in self.shapes else None

    def _channels(self, node: Any) -> int:
        shape = self.shapes.get(node, ())
        return shape[1] if len(shape) > 1 and shape[1] % 2 == 0 else 0

    # ---- sums ----------------------------------------------------------------------------------------------
    def _sum(self, node: Any) -> _Sum | None:
        """A convolution with whatever is added to it; of several convolutions the one with most work."""
        terms, nodes = self._terms(node, [])
        found = [(c, n) for t in terms for c, n in [self._cropped(t)] if c is not None]
        if not found:
            return None
        conv, seen = max(found, key=lambda f: f[0].kernel[0] * f[0].kernel[1] * self.shapes[f[0].x][1])
        added = tuple(t for t in terms if t is not seen[0])
        return _Sum(conv, added, (*nodes, *seen)) if len(added) == len(terms) - 1 else None  # y + y is no sum with y

    def _terms(self, node: Any, nodes: list[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
        """The leaves of a tree of additions that nothing else reads, and the additions."""
        plain = is_call(node, _ADD, ("add",)) and len(node.args) == 2 and not node.kwargs
        if plain and (not nodes or len(node.users) == 1) and all(isinstance(a, fx.Node) for a in node.args):
            nodes.append(node)
            return [t for a in node.args for t in self._terms(a, nodes)[0]], nodes
        return ([node] if isinstance(node, fx.Node) else []), nodes

    def _cropped(self, node: fx.Node) -> tuple[Conv | None, Nodes]:
        """A convolution behind .contiguous() and crops at its ends, which are pads that it does not need."""
        seen: Nodes = (node,)
        if is_call(node, (), ("contiguous",)) and isinstance(node.args[0], fx.Node):
            conv, inner = self._cropped(node.args[0])
            return conv, (*seen, *inner)
        if is_call(node, (operator.getitem,)) and isinstance(node.args[0], fx.Node):
            conv, inner = self._cropped(node.args[0])
            return (None if conv is None else self._crop(conv, node)), (*seen, *inner)
        return conv_at(self.root, node, self.shapes), seen

    def _crop(self, conv: Conv, node: fx.Node) -> Conv | None:
        whole, index = node.args
        if not isinstance(whole, fx.Node) or not isinstance(index, tuple) or conv.stride != (1, 1):
            return None
        shape = self.shapes.get(whole, torch.Size())
        if len(index) > len(shape) or any(part != slice(None) for part in index[:2]):
            return None
        pads = list(conv.pads)
        for axis, part in enumerate(index[2:], start=2):
            amount = self._cut(part, shape[axis], conv, axis)
            if amount is None:
                return None
            pads[1 if axis == len(shape) - 1 else 3] -= amount
        return replace(conv, pads=(pads[0], pads[1], pads[2], pads[3]))

    def _cut(self, part: Any, size: int, conv: Conv, axis: int) -> int | None:
        """How many sites a slice leaves out at the end of an axis, if that holds at every size."""
        if part == slice(None):
            return 0
        if not isinstance(part, slice) or part.start not in (None, 0) or part.step is not None:
            return None
        if isinstance(part.stop, int):
            return -part.stop if part.stop < 0 else None
        kept = self.shapes[conv.x][axis]
        return size - kept if self._size(part.stop) == (conv.x, axis) and size >= kept else None

    # ---- the whole chain -----------------------------------------------------------------------------------
    def _match(
        self, node: fx.Node, gate: run.Gate, sums: tuple[_Sum, ...], nodes: Nodes, swapped: bool = False
    ) -> Match | None:
        inside = {n for s in sums for n in (*s.nodes, *s.conv.absorbed, s.conv.node)} | set(nodes)
        inside = {n for n in inside if n.op not in ("placeholder", "get_attr")}
        added = tuple(s.added for s in sums)
        return Match(tuple(s.conv for s in sums), gate, node, added, swapped, inside=frozenset(inside))

    def _with_residual(self, match: Match) -> Match:
        """With an addition behind the chain taken in, if shapes are equal."""
        inside = match.inside | {match.last, *match.convs[0].absorbed}
        match = replace(match, inside=frozenset(inside))
        users = list(match.last.users)
        if len(users) != 1 or not is_call(users[0], _ADD, ("add",)) or len(users[0].args) != 2 or users[0].kwargs:
            return match
        others = [a for a in users[0].args if a is not match.last and isinstance(a, fx.Node)]
        if len(others) != 1 or self.shapes.get(others[0]) != self.shapes.get(match.last):
            return match
        return replace(match, residual=others[0], last=users[0], inside=frozenset({*match.inside, users[0]}))

    def _obstacle(self, match: Match) -> str | None:
        """Why a chain cannot be taken."""
        for node in match.inside - {match.last}:
            if any(user not in match.inside for user in node.users):
                return "a value inside the chain is read elsewhere, too"
        batch = self.shapes[match.convs[0].x][0]
        out = self.shapes.get(match.last, torch.Size())
        halves = [(replace(match.convs[0], outputs=match.convs[0].outputs // 2), nodes) for nodes in match.halves]
        for conv, added in [*zip(match.convs, match.cond, strict=True), *halves]:
            sites = (tuple(out[2:]), (1,) * conv.dims)
            for node in added:
                given = tuple(self.shapes.get(node, ()))
                if given not in [(b, conv.outputs, *s) for b in (1, batch) for s in sites]:
                    return f"what is added to it has shape {list(given)}, not that of a conditioning term"
        order = {n: k for k, n in enumerate(self.graph.nodes)}
        start = min(order[n] for n in match.inside)
        for node in list(self.graph.nodes)[start : order[match.last]]:
            if changes(self.root, node):
                return f"{node.name} works in place between its ends"
        return None
