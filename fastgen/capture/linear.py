"""Matrix products, sums and means over channels become taps at the same site."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgen.capture.axes import choose_labels
from fastgen.capture.fit import Irregular, fit
from fastgen.capture.ids import COND, CONST, SITE_MASK, pack
from fastgen.capture.tracer import Tracer
from fastgen.graph.refs import Pair, Term
from fastgen.graph.taps import TapsNode


def by_rank(ids: Tensor) -> list[Tensor]:
    """Columns of ids [K, S] split so that within each part the site labels differ (channels folded into columns)."""
    lead = torch.where(ids >= 0, ids & SITE_MASK, -1).amax(0)
    keep = (lead >= 0).nonzero()[:, 0]
    order = keep[torch.argsort(lead[keep], stable=True)]
    site = lead[order]
    start = torch.ones_like(site, dtype=torch.bool)
    start[1:] = site[1:] != site[:-1]
    position = torch.arange(len(site))
    rank = position - torch.where(start, position, 0).cummax(0)[0]
    return [order[rank == r].sort()[0] for r in range(int(rank.max()) + 1 if len(rank) else 0)]


def _distinct(ids: Tensor) -> list[Tensor]:
    """Column sets of ids [K, S] within which site labels differ: all of them, unless columns hold channels too."""
    try:
        keep, i, j = choose_labels(ids)
        label = (i << 20 | j)[keep]
        if len(torch.unique(label)) == len(label):
            return [torch.arange(ids.shape[1])]
    except Irregular:
        pass
    return by_rank(ids)


def linear(tr: Tracer, op: str, ids: Tensor, values: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """out[o, s] = sum_k w[o, k] x[k, s] + b[o] with sites taken from the operands; ids, values [K, S] -> ids [O, S]."""
    if bool((ids == COND).any()):
        raise Irregular("a matrix product mixes sampled values and conditioning")
    result = torch.full((w.shape[0], ids.shape[1]), CONST)
    used = (w != 0).any(0)  # a weight of zero carries no dependency
    ids, values, w = ids[used], values[used], w[:, used].detach()
    for columns in _distinct(ids):
        part, vals = ids[:, columns], values[:, columns]
        keep, i, j = choose_labels(part)
        part, vals, i, j, columns = part[:, keep], vals[:, keep], i[keep], j[keep], columns[keep]
        if not len(columns):
            continue
        groups, _ = fit(part, i, j)
        grid: Pair = (int(i.max()) + 1, int(j.max()) + 1)
        taps = [Term(g.ref, w[:, g.lanes].clone()) for g in groups]
        fixed = w @ torch.where(part >= 0, torch.zeros((), dtype=w.dtype), vals.to(w.dtype))
        bias = None if b is None else b.detach().clone()
        if bool(fixed.any()):
            total = fixed if bias is None else fixed + bias[:, None]
            bias = total[:, 0].clone()
            if not bool((total == total[:, :1]).all()):
                bias = torch.zeros(w.shape[0], *grid, dtype=w.dtype)
                bias[:, i, j] = total
        node = tr.add(TapsNode, op, w.shape[0], grid, taps=taps, bias=bias)
        result[:, columns] = pack(node.index, torch.arange(w.shape[0])[:, None], i[None], j[None])
    return result


def _product(tr: Tracer, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """Ids of a @ b [n, p] where one of them is constant."""
    da, db = tr.dynamic(a), tr.dynamic(b)
    if da and db:
        raise Irregular("a product of two sampled tensors (attention) is not planned yet")
    if (da and tr.conditional(b)) or (db and tr.conditional(a)):
        raise Irregular("a product with a matrix that depends on conditioning")
    if da:
        return linear(tr, "linear", tr.ids(a).t(), a.t(), b.t(), bias).t()
    result = linear(tr, "linear", tr.ids(b), b, a, None)
    if bias is not None:
        raise Irregular("a bias along sites")
    return result


def mm(tr: Tracer, func: Any, out: Tensor, args: Any, kwargs: Any) -> Tensor:
    """a [n, k] @ b [k, p]."""
    return _product(tr, args[0], args[1], None)


def addmm(tr: Tracer, func: Any, out: Tensor, args: Any, kwargs: Any) -> Tensor:
    """bias + a @ b with a constant bias [p]."""
    bias, a, b = args
    alpha, beta = kwargs.get("alpha", 1), kwargs.get("beta", 1)
    if tr.dynamic(bias) or tr.conditional(bias) or bias.dim() != 1 or alpha != 1 or beta != 1:
        raise Irregular("addmm with a bias that is not one constant per channel")
    return _product(tr, a, b, bias)


def bmm(tr: Tracer, func: Any, out: Tensor, args: Any, kwargs: Any) -> Tensor:
    """Batched products with constant matrices, one by one."""
    a, b = args
    if tr.dynamic(a) and tr.dynamic(b):
        raise Irregular("a product of two sampled tensors (attention) is not planned yet")
    shared = b if tr.dynamic(a) else a
    if tr.conditional(shared):
        raise Irregular("a product with a matrix that depends on conditioning")
    if tr.dynamic(a) and (shared.stride(0) == 0 or bool((shared == shared[:1]).all())):
        flat = tr.ids(a).reshape(-1, a.shape[-1])
        return linear(tr, "linear", flat.t(), a.reshape(flat.shape).t(), shared[0].t(), None).t().reshape(out.shape)
    return torch.stack([_product(tr, a[k], b[k], None) for k in range(a.shape[0])])


def reduce_sum(tr: Tracer, func: Any, out: Tensor, args: Any, kwargs: Any) -> Tensor:
    """sum and mean over channels: a product with ones."""
    x = args[0]
    dims = args[1] if len(args) > 1 else kwargs.get("dim")
    dims = [dims] if isinstance(dims, int) else list(dims or range(x.dim()))
    dims = [d % x.dim() for d in dims]
    kept = [d for d in range(x.dim()) if d not in dims]
    count = 1
    for d in dims:
        count *= x.shape[d]
    ids = tr.ids(x).permute(dims + kept).reshape(count, -1)
    values = x.permute(dims + kept).reshape(count, -1)
    scale = 1.0 / count if func.overloadpacket.__name__ == "mean" else 1.0
    weight = torch.full((1, count), scale, dtype=values.dtype if values.is_floating_point() else torch.float32)
    return linear(tr, "sum", ids, values, weight, None)


LINEAR: dict[str, Callable[..., Tensor]] = {
    "mm": mm, "addmm": addmm, "bmm": bmm, "sum": reduce_sum, "mean": reduce_sum,
}  # fmt: skip
