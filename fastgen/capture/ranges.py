"""Between which two numbers the elements of a node lie, where that is known.

Plans compute in float32, which holds whole numbers up to 2**24 without gaps: arithmetic of integers, lookups and casts to
small integer types are followed only where their range is known to fit.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fastgen.capture.fit import Irregular
from fastgen.graph.bounds import Range, union
from fastgen.graph.node import Node

WHOLE = float(1 << 24)


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
                self.known.setdefault(node.index, node.bounds(self.known))
                todo.pop()
            else:
                todo += missing
        return self.known[index]


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
