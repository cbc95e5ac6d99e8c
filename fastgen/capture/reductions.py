"""Sums, maxima and minima over an axis of channels, and the products that are summed: inner products of any two operands."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastgen.capture.axes import LaneOrder, label_columns
from fastgen.capture.fit import Irregular
from fastgen.capture.ids import CONST, pack
from fastgen.capture.operands import Elements, elements, pieces, stand_in
from fastgen.capture.pointwise import emit
from fastgen.capture.shadow import dense
from fastgen.capture.tracer import Tracer
from fastgen.graph.maps import ReduceNode
from fastgen.graph.refs import Pair

LARGEST = 1 << 24  # elements of a product before it is summed


def reduce_last(tr: Tracer, op: str, fn: str, e: Elements) -> Tensor:
    """Ids [...] of fn (sum, max, min) over the last axis of elements [..., K], which must all be of one site."""
    shape = e.ids.shape
    order = LaneOrder(shape, [e.ids], len(shape) - 1)
    flat = order.split(torch.arange(shape.numel()).view(shape))
    whole = flat.view(-1, shape[-1], order.columns) if order.lanes % shape[-1] == 0 else flat[None]
    if not torch.equal(whole, whole[:, :1] + torch.arange(whole.shape[1])[:, None]):
        raise Irregular("a reduction over an axis that holds channels and sites")
    e = e.arranged(order.split)
    keep, i, j = label_columns(order, [e.ids], tr.data_grid)
    if not bool(keep.any()):
        return torch.full(shape[:-1], CONST)
    site = (i << 20 | j)[keep]
    if len(torch.unique(site)) != len(site):
        raise Irregular("a reduction over several sites")
    grid: Pair = (int(i[keep].max()) + 1, int(j[keep].max()) + 1)
    operand = pieces(tr, e.columns(keep), i[keep], j[keep], grid)
    groups = order.lanes // shape[-1]
    node = tr.add(ReduceNode, op, groups, grid, fn=fn, operands=[operand])
    result = torch.full((groups, 1, order.columns), CONST)
    result[:, 0, keep] = pack(node.index, torch.arange(groups)[:, None], i[keep], j[keep])
    return order.join(result.expand(groups, shape[-1], order.columns).reshape(order.lanes, order.columns))[..., 0]


def inner(tr: Tracer, op: str, a: Elements, b: Elements) -> Tensor:
    """Ids [...] of the sums over k of a[..., k] * b[..., k], broadcast together; either may be anything."""
    shape = torch.broadcast_shapes(a.ids.shape, b.ids.shape)
    if math.prod(shape) > LARGEST:
        raise Irregular(f"a product of {math.prod(shape):.3g} terms; the planner takes up to {LARGEST:.3g}")
    a, b = (e.arranged(lambda t: t.expand(shape)) for e in (a, b))
    products = stand_in(
        tr, a.values * b.values, dense(emit(tr, op, shape, "mul", [a, b], (), copies=len(shape) - 1), shape)
    )
    return reduce_last(tr, op, "sum", elements(tr, products))


def extremum(tr: Tracer, func: Any, out: Tensor, args: Any, kwargs: Any) -> Tensor:
    """amax, amin over channels."""
    x = args[0]
    dims = args[1] if len(args) > 1 else kwargs.get("dim", [])
    dims = [d % x.dim() for d in ([dims] if isinstance(dims, int) else dims or range(x.dim()))]
    kept = [d for d in range(x.dim()) if d not in dims]
    name = "min" if "min" in func.overloadpacket.__name__ else "max"
    last = elements(tr, x).arranged(lambda t: t.permute(kept + dims).reshape([x.shape[d] for d in kept] + [-1]))
    return reduce_last(tr, "a" + name, name, last)
