"""Ready times: after which draw is each element known, computed per group of channels with equal dependencies.

Time runs in half steps: the value drawn at step t is known at time 2t + 2, site work of step t runs at time 2t + 1, row
work before step t at time 2t. A weight of zero, a product with a constant zero and an untaken branch of a constant
`where` carry no dependency; causality, sub-pixel phases and masked orders all follow from that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastgen.errors import NotCausalError, UnsupportedError
from fastgen.plan.ir import (
    Affine,
    CondNode,
    EmbedNode,
    Graph,
    InputNode,
    MapNode,
    Node,
    OpaqueNode,
    Pair,
    Piece,
    ReduceNode,
    Ref,
    TapsNode,
    TapW,
    refs,
)

NEVER = -1  # depends on no sampled value


@dataclass
class Ready:
    """Ready times of a node: channel c at site (i, j) is known at times[group[c], i, j]."""

    group: Tensor  # [C] int64
    times: Tensor  # [G, H, W] int32


def look(times: Tensor, at: Affine, grid: Pair) -> Tensor:
    """times [G, h, w] of the sources as a reader on `grid` sees them: [G, H, W], NEVER outside the bounds."""
    i, j = at.rows(torch.arange(grid[0])), at.cols(torch.arange(grid[1]))
    rows = (i >= max(0, at.lo[0])) & (i < min(at.hi[0], times.shape[1]))
    cols = (j >= max(0, at.lo[1])) & (j < min(at.hi[1], times.shape[2]))
    seen = times[:, i.clamp(0, times.shape[1] - 1)][:, :, j.clamp(0, times.shape[2] - 1)]
    return torch.where((rows[:, None] & cols[None])[None], seen, NEVER)


def q_grid(node_grid: Pair, up: Pair, parity: Pair) -> Pair:
    """Iteration grid of the outputs of one parity."""
    return (-(-(node_grid[0] - parity[0]) // up[0]), -(-(node_grid[1] - parity[1]) // up[1]))


def check_supported(graph: Graph) -> None:
    """Raises UnsupportedError for the first operation without a rule that an output depends on."""
    todo, seen = list(graph.params), set(graph.params)
    found: list[OpaqueNode] = []
    while todo:
        node = graph.nodes[todo.pop()]
        if isinstance(node, OpaqueNode):
            found.append(node)
        for ref in refs(node):
            if ref.node not in seen:
                seen.add(ref.node)
                todo.append(ref.node)
    if found:
        first = min(found, key=lambda n: n.index)
        raise UnsupportedError(f"layer {first.path}: {first.reason}")


def ready_times(graph: Graph, input_ready: Tensor) -> list[Ready]:
    """Ready of every node; `input_ready` [C, H, W] holds the times at which the sampled tensor's elements are known."""
    out: list[Ready] = []
    for node in graph.nodes:
        out.append(_ready(node, out, input_ready))
    return out


def _ready(node: Node, done: list[Ready], input_ready: Tensor) -> Ready:
    if isinstance(node, InputNode):
        flat = input_ready.reshape(node.channels, -1)
        rows, group = torch.unique(flat, dim=0, return_inverse=True)
        return Ready(group, rows.reshape(-1, *node.grid).to(torch.int32))
    if isinstance(node, TapsNode):
        return _taps(node, done)
    if isinstance(node, MapNode):
        return _map(node, done)
    if isinstance(node, EmbedNode | ReduceNode):
        time = torch.full((1, *node.grid), NEVER, dtype=torch.int32)
        for piece in node.operands[0]:
            if piece.ref is not None:
                source = done[piece.ref.node]
                groups = source.group[list(piece.ref.chans)].unique()
                time = torch.maximum(time, look(source.times[groups], piece.ref.at, node.grid).amax(0, keepdim=True))
        return Ready(torch.zeros(node.channels, dtype=torch.int64), time)
    value = 0 if isinstance(node, CondNode) else NEVER
    return Ready(torch.zeros(node.channels, dtype=torch.int64), torch.full((1, *node.grid), value, dtype=torch.int32))


def tap_columns(tap: TapW, source: Ready) -> list[tuple[int, Tensor]]:
    """(source group, which outputs use it [O] bool) of one tap, zero weights left out."""
    group = source.group[list(tap.ref.chans)]
    if tap.full:
        every = torch.ones(tap.weight.shape[0], dtype=torch.bool)
        return [(int(g), every) for g in group.unique()]
    used = tap.weight != 0
    if source.times.shape[0] == 1:
        return [(0, used.any(1))]
    return [(int(g), used[:, group == g].any(1)) for g in group.unique()]


def _taps(node: TapsNode, done: list[Ready]) -> Ready:
    columns = [(tap, g, use) for tap in node.taps for g, use in tap_columns(tap, done[tap.ref.node]) if bool(use.any())]
    if not columns:
        return Ready(
            torch.zeros(node.channels, dtype=torch.int64),
            torch.full((1, *node.grid), NEVER, dtype=torch.int32),
        )
    pattern = torch.stack([use for _, _, use in columns], 1)
    if bool(pattern.all()):
        rows, group = pattern[:1], torch.zeros(node.channels, dtype=torch.int64)
    else:
        rows, group = torch.unique(pattern, dim=0, return_inverse=True)
    times = torch.full((len(rows), *node.grid), NEVER, dtype=torch.int32)
    for k, (tap, g, _) in enumerate(columns):
        (pu, pv), (ui, uj) = tap.parity, node.up
        part = times[:, pu::ui, pv::uj]
        seen = look(done[tap.ref.node].times[g : g + 1], tap.ref.at, (part.shape[1], part.shape[2]))
        part.copy_(torch.where(rows[:, k, None, None], torch.maximum(part, seen), part))
    return _merged(Ready(group, times))


def _merged(ready: Ready) -> Ready:
    """Groups with equal times made one."""
    if ready.times.shape[0] == 1:
        return ready
    rows, inverse = torch.unique(ready.times.reshape(ready.times.shape[0], -1), dim=0, return_inverse=True)
    return Ready(inverse[ready.group], rows.reshape(-1, *ready.times.shape[1:]))


def dead_operands(node: MapNode) -> dict[int, Tensor]:
    """Per operand the elements [C, H, W] that cannot matter: factors of a constant zero, untaken branches."""
    table: dict[int, Tensor] = {}

    def constant(k: int, test: str) -> Tensor | None:
        hit = torch.zeros(node.channels, *node.grid, dtype=torch.bool)
        for p in node.operands[k]:
            if p.const is not None:
                c = p.const.reshape(p.const.shape[0], *(p.const.shape[1:] or (1, 1)))
                hit[p.lo : p.hi] = (c == 0) if test == "zero" else (c != 0)
        return hit if bool(hit.any()) else None

    if node.fn in ("mul", "muladd"):
        for k, other in ((0, 1), (1, 0)):
            hit = constant(other, "zero")
            if hit is not None:
                table[k] = hit
    if node.fn == "where":
        for k, test in ((1, "zero"), (2, "one")):
            hit = constant(0, test)
            if hit is not None:
                table[k] = hit
    return table


def _map(node: MapNode, done: list[Ready]) -> Ready:
    dead = dead_operands(node)
    keys = torch.full((node.channels, len(node.operands)), -1, dtype=torch.int64)
    sources: list[tuple[Ref, int]] = []
    for k, pieces in enumerate(node.operands):
        for piece in pieces:
            if piece.ref is None:
                continue
            group = done[piece.ref.node].group[list(piece.ref.chans)]
            for g in group.unique().tolist():
                lanes = (group == g).nonzero()[:, 0] + piece.lo
                keys[lanes, k] = len(sources)
                sources.append((piece.ref, g))
    extra = [torch.unique(d.reshape(node.channels, -1), dim=0, return_inverse=True)[1] for d in dead.values()]
    rows, group = torch.unique(torch.cat([keys, *[e[:, None] for e in extra]], 1), dim=0, return_inverse=True)
    first = torch.zeros(len(rows), dtype=torch.int64)
    first[group] = torch.arange(node.channels)
    times = torch.full((len(rows), *node.grid), NEVER, dtype=torch.int32)
    for r, row in enumerate(rows.tolist()):
        for k in range(len(node.operands)):
            if row[k] < 0:
                continue
            ref, g = sources[row[k]]
            seen = look(done[ref.node].times[g : g + 1], ref.at, node.grid)[0]
            if k in dead:
                seen = torch.where(dead[k][first[r]], NEVER, seen)
            times[r] = torch.maximum(times[r], seen)
    return _merged(Ready(group, times))


def check_causal(graph: Graph, ready: list[Ready], steps: Tensor) -> None:
    """Raises NotCausalError unless each phase's parameters are known at their step; steps [phases, H, W]."""
    for f, index in enumerate(graph.params):
        node, r = graph.nodes[index], ready[index]
        late = r.times > 2 * steps[f].to(torch.int32)[None] + 1
        if bool(late.any()):
            g, i, j = late.nonzero()[0].tolist()
            chan = int((r.group == g).nonzero()[0])
            step = int(steps[f, i, j])
            chain, source = _blame(graph, ready, node, chan, i, j)
            raise NotCausalError(
                f"the parameters of step {step} (row {i}, column {j}) depend on the value drawn at step "
                f"{int(r.times[g, i, j]) // 2 - 1}: {' <- '.join(chain)} <- {source}"
            )


def _blame(graph: Graph, ready: list[Ready], node: Node, chan: int, i: int, j: int) -> tuple[list[str], str]:
    """The chain of layers and taps along the latest dependency of one element."""
    chain: list[str] = []
    while not isinstance(node, InputNode):
        label, ref, lane, i, j = _latest(node, ready, chan, i, j)
        if label:
            chain.append(label)
        chan, node = ref.chans[lane], graph.nodes[ref.node]
    return chain, f"x[channel {chan}, row {i}, column {j}]"


def _latest(node: Node, ready: list[Ready], chan: int, i: int, j: int) -> tuple[str, Ref, int, int, int]:
    best: tuple[int, str, Ref, int, int, int] | None = None

    def offer(label: str, ref: Ref, lane: int, qi: int, qj: int) -> None:
        nonlocal best
        si, sj = int(ref.at.rows(torch.tensor(qi))), int(ref.at.cols(torch.tensor(qj)))
        source = ready[ref.node]
        if not bool(ref.at.inside(torch.tensor(si), torch.tensor(sj))):
            return
        if not (0 <= si < source.times.shape[1] and 0 <= sj < source.times.shape[2]):
            return
        time = int(source.times[source.group[ref.chans[lane]], si, sj])
        if best is None or time > best[0]:
            best = (time, label, ref, lane, si, sj)

    if isinstance(node, TapsNode):
        for tap in node.taps:
            if (i % node.up[0], j % node.up[1]) != tap.parity:
                continue
            where = ""
            if tap.kernel is not None and tap.extent is not None and max(tap.extent) > 1:
                where = f" tap (row {tap.kernel[0]}, col {tap.kernel[1]}) of {tap.extent}"
            for lane in tap.weight[chan].nonzero()[:, 0].tolist():
                offer(f"{node.path}: {node.op}{where}", tap.ref, lane, i // node.up[0], j // node.up[1])
    elif isinstance(node, MapNode | ReduceNode | EmbedNode):
        dead = dead_operands(node) if isinstance(node, MapNode) else {}
        for k, pieces in enumerate(node.operands):
            for p in pieces:
                if p.ref is not None and (not isinstance(node, MapNode) or p.lo <= chan < p.hi):
                    if k in dead and bool(dead[k][chan, i, j]):
                        continue
                    lanes = [chan - p.lo] if isinstance(node, MapNode) else range(p.hi - p.lo)
                    for lane in lanes:
                        offer("", p.ref, lane, i, j)
    assert best is not None
    return best[1], best[2], best[3], best[4], best[5]


__all__ = ["NEVER", "Piece", "Ready", "check_causal", "check_supported", "look", "q_grid", "ready_times"]
