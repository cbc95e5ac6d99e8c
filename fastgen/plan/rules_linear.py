"""Linear rules: convolutions, transposed convolutions, matrix products, sums and means become taps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.plan import fit
from fastgen.plan.ir import Affine, Pair, Ref, TapsNode, TapW

if TYPE_CHECKING:
    from fastgen.plan.capture import Tracer


Ids = Tensor | fit.Field
PARITIES = (1, 2, 3, 4, 6, 8)  # blocks of sites whose channels may differ in order


def _pair(values: Any, one_dim: bool, front: int) -> Pair:
    v = [int(k) for k in values]
    if one_dim:
        return (front, v[0])
    return (v[0], v[0]) if len(v) == 1 else (v[0], v[1])


def dense_weight(weight: Tensor, groups: int, transposed: bool) -> Tensor:
    """Weight as [O, C, kh, kw] with zeros between the groups."""
    if transposed:
        c, o = weight.shape[0], weight.shape[1] * groups
        w = weight.reshape(groups, c // groups, o // groups, *weight.shape[2:]).transpose(1, 2)
    else:
        o, c = weight.shape[0], weight.shape[1] * groups
        w = weight.reshape(groups, o // groups, c // groups, *weight.shape[2:])
    full = torch.zeros(groups, o // groups, groups, c // groups, *weight.shape[2:], dtype=weight.dtype)
    for g in range(groups):
        full[g, :, g] = w[g]
    return full.reshape(o, c, *weight.shape[2:])


def compose(at: Affine, mul: Pair, off: Pair) -> Affine:
    """The affine map of a reader at site q * mul + off of the reader that `at` describes."""
    return Affine(
        (at.mul[0] * mul[0], at.mul[1] * mul[1]), at.div,
        (at.mul[0] * off[0] + at.off[0], at.mul[1] * off[1] + at.off[1]), at.lo, at.hi,
    )  # fmt: skip


def _unpaddable(groups: list[fit.Lanes], grid: Pair, reaches_out: Pair) -> bool:
    """A source read at the same site from everywhere has no outside, so padding around it would not read zero."""
    return any((g.ref.at.mul[a] == 0 and reaches_out[a]) for g in groups for a in (0, 1))


def _operand(tr: Tracer, x: Tensor, grid: Pair) -> list[fit.Lanes]:
    """References for the sampled and the conditioning channels of x [1, C, H, W] at its own positions."""
    field = tr.field(x)
    if field is not None:
        return field.groups()[0]
    ids = tr.ids(x).reshape(x.shape[1], -1)
    i, j = fit.sites(*grid)
    try:
        groups, constant = fit.fit_parts(ids, i, j)
    except fit.Irregular:
        ids = relabel(tr, x, tr.ids(x)).reshape(x.shape[1], -1)
        groups, constant = fit.fit(ids, i, j)
    lanes = [k for k in constant if bool((ids[k] == fit.COND).any())]
    if lanes:
        index = torch.arange(x.numel()).view(x.shape[1], *grid)[lanes]
        node = tr.cond_source(_call_argument(tr, x), index, grid)
        groups.append(fit.Lanes(lanes, Ref(node, tuple(range(len(lanes))), Affine(hi=grid))))
    return groups


def _call_argument(tr: Tracer, x: Tensor) -> Tensor:
    """The tensor of the running call that x is a reshaped view of."""
    return next((t for t in tr.call_args if t.data_ptr() == x.data_ptr() and t.numel() == x.numel()), x)


def convolution(tr: Tracer, func: Any, out: Tensor, args: Any, kwargs: Any) -> Ids:
    """aten.convolution(x, w, b, stride, padding, dilation, transposed, output_padding, groups), 1-D and 2-D."""
    x, w, b, stride, padding, dilation, transposed, _, groups = args
    if tr.dynamic(w) or tr.conditional(w):
        raise fit.Irregular("the weight depends on the sample or on conditioning")
    one = x.dim() == 3
    if x.dim() not in (3, 4):
        raise fit.Irregular(f"{x.dim() - 2}-D convolution")
    s, p, d = _pair(stride, one, 1), _pair(padding, one, 0), _pair(dilation, one, 1)
    if one:
        x, w = x.unsqueeze(2), w.unsqueeze(2)
    w = dense_weight(w.detach(), groups, transposed)
    if x.shape[0] != 1:
        if transposed:
            raise fit.Irregular("transposed convolution over a folded batch")
        return _folded(tr, x, w, b, s, p, d, out)
    grid: Pair = (x.shape[2], x.shape[3])
    out_grid: Pair = (1, out.shape[2]) if one else (out.shape[2], out.shape[3])
    lanes = _operand(tr, x, grid)
    kernel: Pair = (w.shape[2], w.shape[3])
    padded = (p[0] > 0 or transposed, p[1] > 0 or transposed)
    if _unpaddable(lanes, grid, padded):
        raise fit.Irregular("padding around a broadcast value")
    taps = []
    full = bool((w != 0).all())
    for a in range(kernel[0]):
        for e in range(kernel[1]):
            for mul, off, parity in _positions((a, e), s, p, d, transposed):
                for g in lanes:
                    ref = Ref(g.ref.node, g.ref.chans, compose(g.ref.at, mul, off))
                    weight = w[:, :, a, e] if len(g.lanes) == w.shape[1] else w[:, g.lanes, a, e]
                    taps.append(TapW(ref, weight.clone(), parity, (a, e), kernel, full))
    bias = _constant_part(tr, x, w, b, (s, p, d), transposed, out_grid)
    node = tr.add(TapsNode, "conv_transpose" if transposed else "conv", w.shape[0], out_grid,
                  taps=taps, bias=bias, up=s if transposed else (1, 1))  # fmt: skip
    return _all_sites(node.index, w.shape[0], out_grid)


def _positions(k: Pair, s: Pair, p: Pair, d: Pair, transposed: bool) -> list[tuple[Pair, Pair, Pair]]:
    """(mul, off, parity): output q * up + parity reads input position q * mul + off for kernel position k."""
    if not transposed:
        return [(s, (k[0] * d[0] - p[0], k[1] * d[1] - p[1]), (0, 0))]
    out = []
    for u in range(s[0]):
        for v in range(s[1]):
            a, e = u + p[0] - k[0] * d[0], v + p[1] - k[1] * d[1]
            if a % s[0] == 0 and e % s[1] == 0:
                out.append(((1, 1), (a // s[0], e // s[1]), (u, v)))
    return out


def _all_sites(node: int, channels: int, grid: Pair) -> fit.Field:
    return fit.Field((node << 16) | torch.arange(channels), grid, hi=grid)


def _constant_part(
    tr: Tracer, x: Tensor, w: Tensor, b: Tensor | None, geometry: Any, transposed: bool, out_grid: Pair
) -> Tensor | None:
    """What the constant elements of x and the bias contribute: [O], or [O, H, W] where it varies over sites."""
    field = tr.field(x)
    if field is not None and (field.whole or (field.zero and bool((field.lanes >= 0).all()))):
        return None if b is None else b.detach().clone()
    ids = tr.ids(x)
    fixed = torch.where((ids == fit.CONST), x.to(w.dtype), torch.zeros((), dtype=w.dtype))
    bias = None if b is None else b.detach().clone()
    if not bool(fixed.any()):
        return bias
    s, p, d = geometry
    full: Tensor
    if transposed:
        span = [(x.shape[2 + k] - 1) * s[k] - 2 * p[k] + d[k] * (w.shape[2 + k] - 1) + 1 for k in (0, 1)]
        extra = [out_grid[k] - span[k] for k in (0, 1)]
        full = F.conv_transpose2d(fixed, w.transpose(0, 1), None, s, p, extra, 1, d)[0]
    else:
        full = F.conv2d(fixed, w, None, s, p, d)[0]
    if bias is not None:
        full = full + bias[:, None, None]
    return full[:, 0, 0].clone() if bool((full == full[:, :1, :1]).all()) else full


def _folded(tr: Tracer, x: Tensor, w: Tensor, b: Tensor | None, s: Pair, p: Pair, d: Pair, out: Tensor) -> Tensor:
    """Convolution whose batch axis holds sites (dilation folded into the batch): lanes by kernel position."""
    ids = F.pad(tr.ids(x), (p[1], p[1], p[0], p[0]), value=fit.CONST)
    values = F.pad(x, (p[1], p[1], p[0], p[0]))
    height, width = (1, out.shape[-1]) if out.dim() == 3 else (out.shape[2], out.shape[3])
    lanes, vals, weights = [], [], []
    for a in range(w.shape[2]):
        for e in range(w.shape[3]):
            pick = (slice(None), slice(None), slice(a * d[0], a * d[0] + (height - 1) * s[0] + 1, s[0]),
                    slice(e * d[1], e * d[1] + (width - 1) * s[1] + 1, s[1]))  # fmt: skip
            lanes.append(ids[pick].transpose(0, 1).reshape(x.shape[1], -1))
            vals.append(values[pick].transpose(0, 1).reshape(x.shape[1], -1))
            weights.append(w[:, :, a, e])
    result = linear(tr, "conv", torch.cat(lanes), torch.cat(vals), torch.cat(weights, 1), b)
    return result.reshape(w.shape[0], x.shape[0], height, width).transpose(0, 1)


def relabel(tr: Tracer, x: Tensor, ids: Tensor) -> Tensor:
    """Ids of a copy of x [1, C, (H,) W] whose channels vary with the site's parity (pixel shuffle, colours unrolled into
    columns); the ids as they are where x is regular already, or has no such form."""
    if ids.dim() not in (3, 4) or ids.shape[0] != 1 or not bool((ids >= 0).any()) or bool((ids == fit.COND).any()):
        return ids
    grid: Pair = (1, ids.shape[2]) if ids.dim() == 3 else (ids.shape[2], ids.shape[3])
    plain = ids.reshape(ids.shape[1], *grid)
    with contextlib.suppress(fit.Irregular):
        fit.fit(plain.reshape(ids.shape[1], -1), *fit.sites(*grid))
        return ids
    for up in sorted(((a, b) for a in PARITIES for b in PARITIES), key=lambda p: p[0] * p[1]):
        if any(up[a] > 1 and grid[a] < 2 * up[a] for a in (0, 1)):
            continue
        try:
            taps = [t for u in range(up[0]) for v in range(up[1]) for t in _copies(plain, up, (u, v))]
        except fit.Irregular:
            continue
        fixed = torch.where(plain < 0, x.detach().expand(ids.shape).reshape(plain.shape).float(), torch.zeros(()))
        node = tr.add(
            TapsNode,
            "relabel",
            plain.shape[0],
            grid,
            taps=taps,
            up=up,
            bias=fixed if bool(fixed.any()) else None,
        )
        return _all_sites(node.index, plain.shape[0], grid).ids().reshape(ids.shape)
    return ids


def _copies(ids: Tensor, up: Pair, parity: Pair) -> list[TapW]:
    """Taps that copy ids [C, H, W] at the sites of one parity."""
    part = ids[:, parity[0] :: up[0], parity[1] :: up[1]]
    groups, _ = fit.fit_parts(part.reshape(part.shape[0], -1), *fit.sites(part.shape[1], part.shape[2]))
    taps = []
    for g in groups:
        weight = torch.zeros(ids.shape[0], len(g.lanes))
        weight[g.lanes, torch.arange(len(g.lanes))] = 1.0
        taps.append(TapW(g.ref, weight, parity))
    return taps


def by_rank(ids: Tensor) -> list[Tensor]:
    """Columns of ids [K, S] split so that within each part the site labels differ (channels folded into columns)."""
    lead = torch.where(ids >= 0, ids & fit.SITE_MASK, -1).amax(0)
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
        keep, i, j = fit.choose_labels(ids)
        label = (i << 20 | j)[keep]
        if len(torch.unique(label)) == len(label):
            return [torch.arange(ids.shape[1])]
    except fit.Irregular:
        pass
    return by_rank(ids)


def linear(tr: Tracer, op: str, ids: Tensor, values: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """out[o, s] = sum_k w[o, k] x[k, s] + b[o] with sites taken from the operands; ids, values [K, S] -> ids [O, S]."""
    if bool((ids == fit.COND).any()):
        raise fit.Irregular("a matrix product mixes sampled values and conditioning")
    result = torch.full((w.shape[0], ids.shape[1]), fit.CONST)
    used = (w != 0).any(0)  # a weight of zero carries no dependency
    ids, values, w = ids[used], values[used], w[:, used].detach()
    for columns in _distinct(ids):
        part, vals = ids[:, columns], values[:, columns]
        keep, i, j = fit.choose_labels(part)
        part, vals, i, j, columns = part[:, keep], vals[:, keep], i[keep], j[keep], columns[keep]
        if not len(columns):
            continue
        groups, _ = fit.fit(part, i, j)
        grid: Pair = (int(i.max()) + 1, int(j.max()) + 1)
        taps = [TapW(g.ref, w[:, g.lanes].clone()) for g in groups]
        fixed = w @ torch.where(part >= 0, torch.zeros((), dtype=w.dtype), vals.to(w.dtype))
        bias = None if b is None else b.detach().clone()
        if bool(fixed.any()):
            total = fixed if bias is None else fixed + bias[:, None]
            bias = total[:, 0].clone()
            if not bool((total == total[:, :1]).all()):
                bias = torch.zeros(w.shape[0], *grid, dtype=w.dtype)
                bias[:, i, j] = total
        node = tr.add(TapsNode, op, w.shape[0], grid, taps=taps, bias=bias)
        result[:, columns] = fit.pack(node.index, torch.arange(w.shape[0])[:, None], i[None], j[None])
    return result


def _product(tr: Tracer, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """Ids of a @ b [n, p] where one of them is constant."""
    da, db = tr.dynamic(a), tr.dynamic(b)
    if da and db:
        raise fit.Irregular("a product of two sampled tensors (attention) is not planned yet")
    if (da and tr.conditional(b)) or (db and tr.conditional(a)):
        raise fit.Irregular("a product with a matrix that depends on conditioning")
    if da:
        return linear(tr, "linear", tr.ids(a).t(), a.t(), b.t(), bias).t()
    result = linear(tr, "linear", tr.ids(b), b, a, None)
    if bias is not None:
        raise fit.Irregular("a bias along sites")
    return result


def mm(tr: Tracer, func: Any, out: Tensor, args: Any, kwargs: Any) -> Tensor:
    """a [n, k] @ b [k, p]."""
    return _product(tr, args[0], args[1], None)


def addmm(tr: Tracer, func: Any, out: Tensor, args: Any, kwargs: Any) -> Tensor:
    """bias + a @ b with a constant bias [p]."""
    bias, a, b = args
    alpha, beta = kwargs.get("alpha", 1), kwargs.get("beta", 1)
    if tr.dynamic(bias) or tr.conditional(bias) or bias.dim() != 1 or alpha != 1 or beta != 1:
        raise fit.Irregular("addmm with a bias that is not one constant per channel")
    return _product(tr, a, b, bias)


def bmm(tr: Tracer, func: Any, out: Tensor, args: Any, kwargs: Any) -> Tensor:
    """Batched products with constant matrices, one by one."""
    a, b = args
    if tr.dynamic(a) and tr.dynamic(b):
        raise fit.Irregular("a product of two sampled tensors (attention) is not planned yet")
    shared = b if tr.dynamic(a) else a
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


def avg_pool(tr: Tracer, func: Any, out: Tensor, args: Any, kwargs: Any) -> Ids:
    """aten.avg_pool1d/2d without padding: a convolution with one weight."""
    x, size = args[0], [int(k) for k in args[1]]
    stride = list(args[2]) if len(args) > 2 and args[2] else size
    if any(args[3] if len(args) > 3 else [0]) or (len(args) > 4 and args[4]):
        raise fit.Irregular("average pooling with padding or ceil_mode")
    c = x.shape[1]
    weight = torch.zeros(c, c, *size, dtype=x.dtype)
    area = 1
    for k in size:
        area *= k
    weight[torch.arange(c), torch.arange(c)] = 1.0 / area
    zeros = [0] * len(size)
    return convolution(tr, func, out, (x, weight, None, stride, zeros, [1] * len(size), False, zeros, 1), {})


def conv_of_conditioning(tr: Tracer, name: str, out: Tensor, args: Any) -> Ids | None:
    """Sequences: a convolution of conditioning at the data's own rate runs in the plan, where it needs no memory per
    layer; everything else that depends on conditioning alone is torch's. Ids, or None when it is torch's."""
    if name != "convolution" or args[0].dim() != 3 or args[6] or tr.data_grid[0] != 1:
        return None
    x, w, out_len = args[0], args[1], out.shape[-1]
    if x.shape[0] != 1 or out_len != tr.data_grid[1] or x.shape[-1] != out_len or tr.conditional(w) or tr.depth:
        return None
    if not bool((tr.ids(x) == fit.COND).all()):
        return None
    return convolution(tr, None, out, args, {})


LINEAR: dict[str, Callable[..., Ids]] = {
    "convolution": convolution, "mm": mm, "addmm": addmm, "bmm": bmm, "sum": reduce_sum, "mean": reduce_sum,
    "avg_pool1d": avg_pool, "avg_pool2d": avg_pool,
}  # fmt: skip
