"""Between which two numbers the elements of a node lie, where that is known.

Plans compute in float32, which holds whole numbers up to 2**24 without gaps: arithmetic of integers, lookups and casts to
small integer types are followed only where their range is known to fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from fastgen.capture.fit import Irregular
from fastgen.graph.lookup import EmbedNode
from fastgen.graph.maps import MapNode, ReduceNode
from fastgen.graph.node import Node
from fastgen.graph.refs import Operand, Pair
from fastgen.graph.taps import TapsNode

Range = tuple[float, float] | None  # None: not known
WHOLE = float(1 << 24)


def _corners(fn: Callable[[float, float], float]) -> Callable[..., Range]:
    """The range of a function that is largest and smallest at corners."""

    def of(a: tuple[float, float], b: tuple[float, float]) -> Range:
        values = [fn(x, y) for x in a for y in b]
        return (min(values), max(values)) if all(map(math.isfinite, values)) else None

    return of


def _affine(a: tuple[float, float], imm: tuple[float, ...]) -> Range:
    values = [x * imm[0] + imm[1] for x in a]
    return min(values), max(values)


def _remainder(a: tuple[float, float], b: tuple[float, float]) -> Range:
    return None if b[0] <= 0 <= b[1] else (min(b[0], 0.0), max(b[1], 0.0))


def _quotient(a: tuple[float, float], b: tuple[float, float]) -> Range:
    return None if b[0] <= 0 <= b[1] else _corners(lambda x, y: x / y)(a, b)


def _abs(a: tuple[float, float]) -> Range:
    return (0.0 if a[0] <= 0 <= a[1] else min(map(abs, a))), max(map(abs, a))


BOUNDED: dict[str, tuple[float, float]] = {
    "tanh": (-1, 1), "sigmoid": (0, 1), "sin": (-1, 1), "cos": (-1, 1), "sign": (-1, 1), "erf": (-1, 1),
    **dict.fromkeys(["not", "eq", "ne", "gt", "ge", "lt", "le", "and", "or"], (0, 1)),
}  # fmt: skip
ROUNDED: dict[str, Callable[[float], int]] = {
    "floor": math.floor,
    "ceil": math.ceil,
    "round": round,
    "trunc": math.trunc,
}
BINARY: dict[str, Callable[..., Range]] = {
    "add": _corners(lambda x, y: x + y), "sub": _corners(lambda x, y: x - y), "mul": _corners(lambda x, y: x * y),
    "maximum": _corners(max), "minimum": _corners(min), "remainder": _remainder, "div": _quotient,
}  # fmt: skip


def range_of_map(fn: str, operands: list[Range], imm: tuple[float, ...]) -> Range:
    """The range of fn(operands; imm), a function of csrc/functions.def."""
    if fn in BOUNDED:
        return BOUNDED[fn]
    first = operands[0]
    if fn == "clamp":
        low, high = imm[0], imm[1]
        lo, hi = (-math.inf, math.inf) if first is None else first
        return min(max(lo, low), high), min(max(hi, low), high)
    if fn == "where":
        return union(operands[1:])
    if fn == "relu":
        return None if first is None else (max(0.0, first[0]), max(0.0, first[1]))
    known = [r for r in operands if r is not None]
    if len(known) < len(operands) or not known:
        return None
    a = known[0]
    if fn in BINARY:
        return BINARY[fn](a, known[1])
    if fn in ROUNDED and all(map(math.isfinite, a)):
        return float(ROUNDED[fn](a[0])), float(ROUNDED[fn](a[1]))
    if fn == "muladd":
        times = BINARY["mul"](a, known[1])
        return None if times is None else BINARY["add"](times, known[2])
    if fn == "affine":
        return _affine(a, imm)
    return {"copy": a, "neg": (-a[1], -a[0]), "abs": _abs(a)}.get(fn)


class Ranges:
    """The ranges of a graph's nodes, found when they are asked for. given: that of the sampled tensor (node 0); cond: of
    conditioning, where it is known."""

    def __init__(self, nodes: list[Node], given: Range, cond: dict[int, Range] | None = None) -> None:
        self.nodes, self.known = nodes, {0: given, **(cond or {})}

    def of(self, nodes: Iterable[int]) -> Range:
        """Of all elements of some nodes."""
        return union([self.of_node(k) for k in nodes])

    def of_node(self, index: int) -> Range:
        """Of all elements of a node; nodes come after those that they read."""
        todo = [index]
        while todo:
            node = self.nodes[todo[-1]]
            missing = [r.ref.node for r in node.reads() if r.ref.node not in self.known]
            if node.index in self.known or not missing:
                self.known.setdefault(node.index, self._of(node))
                todo.pop()
            else:
                todo += missing
        return self.known[index]

    def _of(self, node: Node) -> Range:
        if isinstance(node, MapNode):
            return range_of_map(node.fn, [self._of_operand(o) for o in node.operands], node.imm)
        if isinstance(node, EmbedNode):
            return of_values(node.table)
        if isinstance(node, ReduceNode) and node.fn in ("max", "min"):
            return self._of_operand(node.operands[0])
        return self._of_taps(node) if isinstance(node, TapsNode) else None

    def _of_operand(self, pieces: Operand) -> Range:
        parts: list[Range] = []
        for p in pieces:
            if p.ref is not None:
                parts += [self.known[p.ref.node], (p.fill, p.fill)]
            elif p.const is not None:
                parts.append(of_values(p.const))
        return union(parts)

    def _of_taps(self, node: TapsNode) -> Range:
        """Sums, parity by parity, of weights times what they meet, which is zero outside of a layer."""
        bias = (0.0, 0.0) if node.bias is None else of_values(node.bias)
        sums: dict[Pair, tuple[Tensor, Tensor]] = {}
        for term in node.taps:
            found = union([self.known[term.ref.node], (0.0, 0.0)])
            if found is None or bias is None:
                return None
            w = term.weight.double()
            up, down = w.clamp(min=0).sum(1), w.clamp(max=0).sum(1)
            low, high = sums.get(term.parity, (0.0, 0.0))
            sums[term.parity] = (low + up * found[0] + down * found[1], high + up * found[1] + down * found[0])
        if not sums or bias is None:
            return bias
        low, high = (min(float(a.min()) for a, _ in sums.values()), max(float(b.max()) for _, b in sums.values()))
        return low + bias[0], high + bias[1]


def union(ranges: list[Range]) -> Range:
    """The range of values out of any of them."""
    known = [r for r in ranges if r is not None]
    if len(known) < len(ranges) or not known:
        return None
    return min(r[0] for r in known), max(r[1] for r in known)


def of_values(t: Tensor) -> Range:
    """The range of given numbers."""
    if not t.numel() or t.is_complex():
        return None
    low, high = (float(v) for v in torch.aminmax(t.detach().reshape(-1).to(torch.float64)))
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None


def check_whole(found: Range, what: str) -> None:
    """Raises Irregular where whole numbers of a range do not all have a float32 of their own."""
    if found is None:
        raise Irregular(f"{what} of integers whose range is not known (clamp them first)")
    if max(map(abs, found)) > WHOLE:
        raise Irregular(f"{what} of integers up to {max(map(abs, found)):.3g}, beyond 2**24, where float32 has gaps")


def check_index(found: Range, rows: int) -> None:
    """Raises Irregular where a lookup may leave a table of so many rows."""
    if found is None:
        raise Irregular(f"a lookup by integers whose range is not known; clamp them to 0 .. {rows - 1}")
    if found[0] < 0 or found[1] > rows - 1:
        raise Irregular(
            f"a lookup by integers from {found[0]:.0f} to {found[1]:.0f} in a table of {rows} rows; "
            f"expected 0 to {rows - 1}"
        )


def check_cast(found: Range, dtype: torch.dtype) -> None:
    """Raises Irregular where a cast to a small integer type may wrap around."""
    limits = torch.iinfo(dtype)
    if found is None or found[0] < limits.min or found[1] > limits.max:
        given = (
            "whose range is not known (clamp them first)" if found is None else f"from {found[0]:.6g} to {found[1]:.6g}"
        )
        raise Irregular(f"a cast to {str(dtype).removeprefix('torch.')} of values {given}, which may not fit")
