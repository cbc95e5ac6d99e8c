"""The receptive field: the extent of the inputs that one output sees."""

from __future__ import annotations

from fastgen.graph.node import Graph
from fastgen.spec import Spec

Span = tuple[float, float, float, float]  # first row, last row, first column, last column, relative to the reader


def receptive_field(graph: Graph, spec: Spec) -> tuple[int, ...]:
    """Extent (rows, columns), or (length,), of the inputs that one output sees, from the taps' offsets.

    Coarse nodes count with their stride; a bound where branches differ.
    """
    spans: list[Span | None] = [None] * len(graph.nodes)
    scale: list[tuple[float, float]] = [(1.0, 1.0)] * len(graph.nodes)
    spans[0] = (0.0, 0.0, 0.0, 0.0)  # forward's input
    for node in graph.nodes:
        for read in node.reads():
            below, at = spans[read.ref.node], read.ref.at
            if below is None:
                continue
            ratio = tuple(max(at.mul[a], 1) / at.div[a] / node.up[a] for a in (0, 1))
            step = scale[read.ref.node]
            scale[node.index] = (step[0] * ratio[0], step[1] * ratio[1])
            oi, oj = at.off[0] / at.div[0] * step[0], at.off[1] / at.div[1] * step[1]
            # a fine site reads the coarse one it rounds down to: up to a stride less one further back
            ri, rj = (step[a] * ((1 - 1 / at.div[a]) + (1 - 1 / node.up[a])) for a in (0, 1))
            seen = (below[0] + oi - ri, below[1] + oi, below[2] + oj - rj, below[3] + oj)
            spans[node.index] = _union(spans[node.index], seen)
    top = spans[graph.params[-1]]
    if top is None:
        return ()
    rows, cols = int(top[1] - top[0]) + 1, int(top[3] - top[2]) + 1
    return (min(cols, spec.sites[0]),) if spec.sequence else (min(rows, spec.grid[0]), min(cols, spec.grid[1]))


def _union(a: Span | None, b: Span) -> Span:
    """The least span that holds both."""
    return b if a is None else (min(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), max(a[3], b[3]))
