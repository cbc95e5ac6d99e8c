"""Matrix products, sums and means over channels become taps at the same site."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgen.capture.axes import choose_labels
from fastgen.capture.fit import Irregular
from fastgen.capture.ids import COND, CONST, SITE_MASK, pack
from fastgen.capture.operands import Elements, elements, stand_in, terms
from fastgen.capture.pointwise import emit
from fastgen.capture.reductions import inner
from fastgen.capture.shadow import Ids
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


def linear(tr: Tracer, op: str, e: Elements, w: Tensor, b: Tensor | None) -> Tensor:
    """out[o, s] = sum_k w[o, k] x[k, s] + b[o] with sites taken from the operands; elements [K, S] -> ids [O, S]."""
    used = (w != 0).any(0)  # a weight of zero carries no dependency
    e, w = e.arranged(lambda t: t[used]), w[:, used].detach()
    result = torch.full((w.shape[0], e.ids.shape[1]), CONST)
    result[:, (e.ids == COND).any(0)] = COND  # where nothing sampled is added
    for columns in _distinct(e.ids):
        part = e.columns(columns)
        keep, i, j = choose_labels(part.ids)
        part, i, j, columns = part.columns(keep), i[keep], j[keep], columns[keep]
        if not len(columns):
            continue
        grid: Pair = (int(i.max()) + 1, int(j.max()) + 1)
        groups, ids = terms(tr, part, i, j, grid, patched=True)
        taps = [Term(g.ref, w[:, g.lanes].clone()) for g in groups]
        fixed = w @ torch.where(ids == CONST, part.values.to(w.dtype), torch.zeros((), dtype=w.dtype))
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


def _product(tr: Tracer, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Ids of a [n, k] @ b [k, p] + bias [p]; bias is a constant, and b one too where there is a bias."""
    if tr.fixed(b):
        return linear(tr, "linear", elements(tr, a).arranged(Tensor.t), b.t(), bias).t()
    if tr.fixed(a):
        return linear(tr, "linear", elements(tr, b), a, None)
    return _inner(tr, elements(tr, a), elements(tr, b))


def _inner(tr: Tracer, a: Elements, b: Elements) -> Tensor:
    """Ids of a [..., n, k] @ b [..., k, p], neither of which is constant."""
    try:
        return inner(tr, "product", a.arranged(lambda t: t[..., None, :]), b.arranged(lambda t: t.mT[..., None, :, :]))
    except Irregular as error:
        if tr.dynamic(a.tensor) and tr.dynamic(b.tensor):
            raise Irregular("a product of two sampled tensors (attention) is not planned yet") from error
        raise


def mm(tr: Tracer, func: Any, out: Tensor, args: Any, kwargs: Any) -> Tensor:
    """a [n, k] @ b [k, p]."""
    return _product(tr, args[0], args[1])


def addmm(tr: Tracer, func: Any, out: Tensor, args: Any, kwargs: Any) -> Ids:
    """bias + a @ b."""
    bias, a, b = args
    if kwargs.get("alpha", 1) != 1 or kwargs.get("beta", 1) != 1:
        raise Irregular("addmm with factors")
    if tr.fixed(bias) and tr.fixed(b) and bias.dim() == 1:
        return _product(tr, a, b, bias)
    if not tr.dynamic(a) and not tr.dynamic(b):
        raise Irregular("a sampled tensor added to a product without one; add it afterwards")
    return emit(tr, "linear", out.shape, "add", [stand_in(tr, out, _product(tr, a, b)), bias], ())


def bmm(tr: Tracer, func: Any, out: Tensor, args: Any, kwargs: Any) -> Tensor:
    """Batched products [n, i, k] @ [n, k, j]."""
    a, b = args
    if not tr.fixed(a) and not tr.fixed(b):
        return _inner(tr, elements(tr, a), elements(tr, b))
    if tr.fixed(b) and (b.stride(0) == 0 or bool((b == b[:1]).all())):
        flat = elements(tr, a).arranged(lambda t: t.reshape(-1, a.shape[-1]).t())
        return linear(tr, "linear", flat, b[0].t(), None).t().reshape(out.shape)
    return torch.stack([_product(tr, a[k], b[k]) for k in range(a.shape[0])])


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
    e = elements(tr, x).arranged(lambda t: t.permute(dims + kept).reshape(count, -1))
    scale = 1.0 / count if func.overloadpacket.__name__ == "mean" else 1.0
    weight = torch.full((1, count), scale, dtype=x.dtype if x.is_floating_point() else torch.float32)
    return linear(tr, "sum", e, weight, None)


LINEAR: dict[str, Callable[..., Ids]] = {
    "mm": mm, "addmm": addmm, "bmm": bmm, "sum": reduce_sum, "mean": reduce_sum,
}  # fmt: skip
