"""Lookup rules: embeddings, indexing of a table, one-hot, which is one, and a choice among values that are computed."""

from __future__ import annotations

from collections.abc import Callable
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
        own = e.lane(lane)
        operand = pieces(tr, Elements(own.tensor, own.ids, own.values.float(), own.where), i, j, grid)
        tr.check_lookup(operand, table.shape[0])
        node = tr.add(EmbedNode, "embedding", width, grid, table=table.detach().clone(), operands=[operand])
        for k in range(width):
            rows[k][lane, keep] = pack(node.index, torch.tensor(k), i, j)
    for k in range(width):
        result[k] = order.join(rows[k])
    return result.movedim(0, -1)


def choose(tr: Tracer, op: str, table: Tensor, index: Tensor, size: int, dim: int, take: Take) -> Tensor:
    """Ids of take(table, index), where what is taken is computed, or the index is conditioning (heads by label): of all
    `size` candidates along a dimension of the table, those that are not asked for are zeros, and the rest is their sum."""
    shape = torch.Size([*take(table, index).shape, size])
    if shape.numel() > LARGEST:
        raise Irregular(
            f"a choice among {size} candidates, {shape.numel():.3g} in all; the planner takes {LARGEST:.3g}"
        )
    one_by_one = [torch.full_like(index, k) for k in range(size)]
    candidates = elements(tr, table).arranged(lambda t: torch.stack([take(t, k) for k in one_by_one], -1))
    site = torch.where(candidates.ids >= 0, candidates.ids & SITE_MASK, -1)
    if bool(((site != site.amax(-1, keepdim=True)) & (site >= 0)).any()):
        raise Irregular("an index of sites that depends on the sample or on conditioning")
    # Which element of the index decides: taken from a table of as many rows as the index has elements.
    entries = torch.arange(index.numel()).view(index.shape)
    rows = torch.arange(index.numel()).view([-1 if d == dim else 1 for d in range(table.dim())])
    sizes = [index.numel() if d == dim else n for d, n in enumerate(table.shape)]
    entry = take(rows.expand(sizes).contiguous(), entries)[..., None].expand(shape)
    known = elements(tr, index)
    asked = Elements(
        index, known.ids.reshape(-1)[entry], known.values.reshape(-1)[entry].float(),
        entry if bool((known.ids == COND).any()) else None,
    )  # fmt: skip
    hit = emit(tr, op, shape, "eq", [asked, torch.arange(size).float()], (), like=candidates)
    compared = tr.nodes[-1]
    assert isinstance(compared, MapNode)
    tr.check_lookup(compared.operands[0], size)
    mask = stand_in(tr, torch.zeros(shape), dense(hit, shape))
    kept = emit(tr, op, shape, "where", [mask, candidates, 0.0], ())
    return reduce_last(tr, op, "sum", elements(tr, stand_in(tr, torch.zeros(shape), dense(kept, shape))))


def _fixed(tr: Tracer, t: Tensor) -> bool:
    return not tr.dynamic(t) and not tr.conditional(t)


def embedding(tr: Tracer, func: Any, out: Tensor, args: Any, kwargs: Any) -> Tensor:
    """aten.embedding(weight, index)."""
    weight, index = args[:2]
    if _fixed(tr, weight):
        return embed(tr, weight, index)
    return choose(tr, "embedding", weight, index, weight.shape[0], 0, lambda t, k: t[k])


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
    unknown = [k for k, t in enumerate(indices) if isinstance(t, Tensor) and not _fixed(tr, t)]
    if not unknown:
        moved: Tensor = func(tr.ids(table).contiguous(), indices)
        return moved
    if _fixed(tr, table) and len(indices) == 1:
        return embed(tr, table.reshape(table.shape[0], -1), indices[0])
    if len(unknown) > 1 or any(isinstance(t, Tensor) and t.dtype in (torch.bool, torch.uint8) for t in indices):
        raise Irregular("several indices that are not constant, or one beside a mask")
    dim = unknown[0]

    def take(t: Tensor, k: Tensor) -> Tensor:
        taken: Tensor = func(t, [*indices[:dim], k, *indices[dim + 1 :]])
        return taken

    return choose(tr, "index", table, indices[dim], table.shape[dim], dim, take)


def along(tr: Tracer, func: Any, out: Tensor, args: Any, kwargs: Any) -> Ids:
    """gather(x, dim, index) and index_select(x, dim, index)."""
    table, dim, index = args[0], args[1], args[2]
    if _fixed(tr, index):
        return move(tr, func, out, args, kwargs)
    dim %= table.dim()
    name = func.overloadpacket.__name__
    return choose(tr, name, table, index, table.shape[dim], dim, lambda t, k: func(t, dim, k))


LOOKUP: dict[str, Callable[..., Ids]] = {
    "embedding": embedding, "scatter": scatter, "index": index, "gather": along, "index_select": along,
}  # fmt: skip
