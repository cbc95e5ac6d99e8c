"""Lookup rules: embeddings, indexing of a table, and one-hot, which is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgen.capture.axes import LaneOrder, label_columns
from fastgen.capture.fit import Irregular, fit, pieces_of
from fastgen.capture.ids import CONST, pack
from fastgen.capture.ranges import check_index
from fastgen.capture.tracer import Tracer
from fastgen.graph.lookup import EmbedNode
from fastgen.graph.refs import Pair


def embed(tr: Tracer, table: Tensor, index: Tensor) -> Tensor:
    """Ids [*index.shape, E] of table[index] for a sampled index; table [rows, E]."""
    if tr.dynamic(table) or tr.conditional(table):
        raise Irregular("a lookup in a table that depends on the sample or on conditioning")
    check_index(tr.range_of(index), table.shape[0])
    full = tr.ids(index)
    order = LaneOrder(index.shape, [full])
    ids = order.split(full)
    keep, i, j = label_columns(order, [ids], tr.data_grid)
    if not bool(keep.any()):
        return torch.full((*index.shape, table.shape[1]), CONST)
    ids, i, j = ids[:, keep], i[keep], j[keep]
    values = order.split(index.detach())[:, keep]
    grid: Pair = (int(i.max()) + 1, int(j.max()) + 1)
    width = table.shape[1]
    result = torch.full((width, *index.shape), CONST)
    rows = [torch.full((order.lanes, order.columns), CONST) for _ in range(width)]
    for lane in range(order.lanes):
        groups, constant = fit(ids[lane : lane + 1], i, j)
        pieces = pieces_of(groups, constant, values[lane : lane + 1].float(), i, j, grid)
        node = tr.add(EmbedNode, "embedding", width, grid, table=table.detach().clone(), operands=[pieces])
        for e in range(width):
            rows[e][lane, keep] = pack(node.index, torch.tensor(e), i, j)
    for e in range(width):
        result[e] = order.join(rows[e])
    return result.movedim(0, -1)


def embedding(tr: Tracer, func: Any, out: Tensor, args: Any, kwargs: Any) -> Tensor:
    """aten.embedding(weight, index)."""
    return embed(tr, args[0], args[1])


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
    """x[constant indices], or table[sampled index]."""
    table, indices = args[0], args[1]
    if not any(tr.dynamic(i) for i in indices if isinstance(i, Tensor)):
        moved: Tensor = func(tr.ids(table).contiguous(), indices)
        return moved
    if tr.dynamic(table) or len(indices) != 1:
        raise Irregular("positions depend on sampled values")
    return embed(tr, table.reshape(table.shape[0], -1), indices[0])


LOOKUP: dict[str, Callable[..., Tensor]] = {"embedding": embedding, "scatter": scatter, "index": index}
