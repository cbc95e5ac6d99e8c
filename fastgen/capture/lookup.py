"""Lookup rules: embeddings, indexing of a table, one-hot, which is one, and a choice among values that are computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgen.capture.axes import LaneOrder, label_columns
from fastgen.capture.fit import Irregular
from fastgen.capture.ids import COND, CONST, SITE_MASK, pack
from fastgen.capture.moves import move
from fastgen.capture.operands import Elements, elements, pieces, stand_in
from fastgen.capture.pointwise import emit
from fastgen.capture.reductions import LARGEST, reduce_last
from fastgen.capture.shadow import Ids, dense
from fastgen.capture.tracer import Tracer
from fastgen.graph.lookup import EmbedNode
from fastgen.graph.maps import MapNode
from fastgen.graph.refs import Pair

Take = Callable[[Tensor, Tensor], Tensor]  # (table, index) -> result


def embed(tr: Tracer, table: Tensor, index: Tensor) -> Tensor:
    """Ids [*index.shape, E] of table[index] for a sampled index; table [rows, E] is constant."""
    e = elements(tr, index)
    order = LaneOrder(index.shape, [e.ids])
    e = e.arranged(order.split)
    keep, i, j = label_columns(order, [e.ids], tr.data_grid)
    if not bool(keep.any()):
        return torch.full((*index.shape, table.shape[1]), CONST)
    e, i, j = e.columns(keep), i[keep], j[keep]
    grid: Pair = (int(i.max()) + 1, int(j.max()) + 1)
    width = table.shape[1]
    result = torch.full((width, *index.shape), CONST)
    rows = [torch.full((order.lanes, order.columns), CONST) for _ in range(width)]
    for lane in range(order.lanes):
        own = e.lanes([lane])
        operand = pieces(tr, Elements(own.tensor, own.ids, own.values.float(), own.where), i, j, grid)
        tr.check_lookup(operand, table.shape[0])
        node = tr.add(EmbedNode, "embedding", width, grid, table=table.detach().clone(), operands=[operand])
        for k in range(width):
            rows[k][lane, keep] = pack(node.index, torch.tensor(k), i, j)
    for k in range(width):
        result[k] = order.join(rows[k])
    return result.movedim(0, -1)


@dataclass(frozen=True)
class Pick:
    """A choice by an index: of `size` along a dimension of a table."""

    table: Tensor
    index: Tensor
    dim: int
    take: Take

    @property
    def size(self) -> int:
        """Of how many."""
        return int(self.table.shape[self.dim])


def choose(tr: Tracer, op: str, p: Pick) -> Tensor:
    """Ids of what is picked, where the candidates are computed, or the index is conditioning (heads by label): of all
    candidates, those that are not asked for are zeros, and the rest is their sum."""
    index, size = p.index, p.size
    shape = torch.Size([*p.take(p.table, index).shape, size])
    if shape.numel() > LARGEST:
        raise Irregular(
            f"a choice among {size} candidates, {shape.numel():.3g} in all; the planner takes {LARGEST:.3g}"
        )
    one_by_one = [torch.full_like(index, k) for k in range(size)]
    candidates = elements(tr, p.table).arranged(lambda t: torch.stack([p.take(t, k) for k in one_by_one], -1))
    site = torch.where(candidates.ids >= 0, candidates.ids & SITE_MASK, -1).reshape(-1, size)
    if bool((site != site[:, :1]).any()) and bool((site == site[:1]).all()):
        raise Irregular("an index of sites that depends on the sample or on conditioning")
    # Which element of the index decides: taken from a table of as many rows as the index has elements.
    entries = torch.arange(index.numel()).view(index.shape)
    rows = torch.arange(index.numel()).view([-1 if d == p.dim else 1 for d in range(p.table.dim())])
    sizes = [index.numel() if d == p.dim else n for d, n in enumerate(p.table.shape)]
    entry = p.take(rows.expand(sizes).contiguous(), entries)[..., None].expand(shape)
    known = elements(tr, index)
    asked = Elements(
        index, known.ids.reshape(-1)[entry], known.values.reshape(-1)[entry].float(),
        entry if bool((known.ids == COND).any()) else None,
    )  # fmt: skip
    last = len(shape) - 1
    hit = emit(tr, op, shape, "eq", [asked, torch.arange(size).float()], (), like=candidates, copies=last)
    compared = tr.nodes[-1]
    assert isinstance(compared, MapNode)
    tr.check_lookup(compared.operands[0], size)
    mask = stand_in(tr, torch.zeros(shape), dense(hit, shape))
    kept = emit(tr, op, shape, "where", [mask, candidates, 0.0], (), copies=last)
    return reduce_last(tr, op, "sum", elements(tr, stand_in(tr, torch.zeros(shape), dense(kept, shape))))


def _of_embedding(tr: Tracer, func: Any, args: Any) -> Pick:
    return Pick(args[0], args[1], 0, lambda t, k: t[k])


def _along(tr: Tracer, func: Any, args: Any) -> Pick:
    dim = args[1] % max(1, args[0].dim())
    return Pick(args[0], args[2], dim, lambda t, k: func(t, dim, k))


def _of_index(tr: Tracer, func: Any, args: Any) -> Pick:
    """By the one index among several that is not constant. Raises Irregular."""
    table, indices = args[0], args[1]
    unknown = [k for k, t in enumerate(indices) if isinstance(t, Tensor) and not tr.fixed(t)]
    if len(unknown) != 1 or any(isinstance(t, Tensor) and t.dtype in (torch.bool, torch.uint8) for t in indices):
        raise Irregular("several indices that are not constant, or one beside a mask")
    dim = unknown[0]

    def take(t: Tensor, k: Tensor) -> Tensor:
        taken: Tensor = func(t, [*indices[:dim], k, *indices[dim + 1 :]])
        return taken

    return Pick(table, indices[dim], dim, take)


PICKS: dict[str, Callable[..., Pick]] = {
    "embedding": _of_embedding, "gather": _along, "index_select": _along, "index": _of_index,
}  # fmt: skip


def untouched(tr: Tracer, pick: Callable[..., Pick], func: Any, out: Tensor, args: Any) -> Tensor | None:
    """Ids of what conditioning picks of constants: those of which all candidates are zero are constant. None: not known."""
    try:
        p = pick(tr, func, args)
    except Irregular:
        return None
    if not tr.fixed(p.table) or out.numel() * p.size > LARGEST:
        return None
    some = torch.stack([p.take(p.table, torch.full_like(p.index, k)) != 0 for k in range(p.size)]).any(0)
    return torch.where(some, COND, CONST)


def embedding(tr: Tracer, func: Any, out: Tensor, args: Any, kwargs: Any) -> Tensor:
    """aten.embedding(weight, index)."""
    if tr.fixed(args[0]):
        return embed(tr, args[0], args[1])
    return choose(tr, "embedding", _of_embedding(tr, func, args))


def scatter(tr: Tracer, func: Any, out: Tensor, args: Any, kwargs: Any) -> Tensor:
    """One-hot: scatter of one value at sampled indices into zeros is a lookup in a diagonal table."""
    target, dim, index, source = args[:4]
    if not tr.dynamic(index) or tr.dynamic(target) or bool(target.any()) or index.shape[dim] != 1:
        raise Irregular("scatter other than a one-hot of sampled indices")
    value = float(source.flatten()[0]) if isinstance(source, Tensor) else float(source)
    if isinstance(source, Tensor) and (tr.dynamic(source) or not bool((source == value).all())):
        raise Irregular("scatter of different values")
    table = torch.eye(target.shape[dim], dtype=torch.float32) * value
    return embed(tr, table, index.squeeze(dim)).movedim(-1, dim)


def index(tr: Tracer, func: Any, out: Tensor, args: Any, kwargs: Any) -> Tensor:
    """x[constant indices], table[sampled index], x[label]."""
    table, indices = args[0], args[1]
    if all(tr.fixed(t) for t in indices if isinstance(t, Tensor)):
        moved: Tensor = func(tr.ids(table).contiguous(), indices)
        return moved
    if tr.fixed(table) and len(indices) == 1:
        return embed(tr, table.reshape(table.shape[0], -1), indices[0])
    return choose(tr, "index", _of_index(tr, func, args))


def along(tr: Tracer, func: Any, out: Tensor, args: Any, kwargs: Any) -> Ids:
    """gather(x, dim, index) and index_select(x, dim, index)."""
    if tr.fixed(args[2]):
        return move(tr, func, out, args, kwargs)
    return choose(tr, func.overloadpacket.__name__, _along(tr, func, args))


LOOKUP: dict[str, Callable[..., Ids]] = {
    "embedding": embedding, "scatter": scatter, "index": index, "gather": along, "index_select": along,
}  # fmt: skip
