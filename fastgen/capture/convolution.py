"""Convolutions, transposed ones and average pooling become taps at affine positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.capture.closed_form import ClosedForm, Lanes
from fastgen.capture.fit import Irregular
from fastgen.capture.ids import COND, CONST, SITE_MASK, sites
from fastgen.capture.linear import linear
from fastgen.capture.operands import Elements, elements, stand_in, terms
from fastgen.capture.pointwise import emit
from fastgen.capture.reductions import inner
from fastgen.capture.relabel import relabel
from fastgen.capture.shadow import Ids, dense
from fastgen.capture.tracer import Tracer
from fastgen.graph.refs import Affine, Pair, Ref, Term
from fastgen.graph.taps import TapsNode

MOST_COPIES = 16  # of one sample in a batch


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


def _unpaddable(groups: list[Lanes], grid: Pair, reaches_out: Pair) -> bool:
    """A source read at the same site from everywhere has no outside, so padding around it would not read zero."""
    return any((g.ref.at.mul[a] == 0 and reaches_out[a]) for g in groups for a in (0, 1))


def _operand(tr: Tracer, x: Tensor, grid: Pair) -> tuple[list[Lanes], Tensor | None]:
    """References for the sampled and the conditioning channels of x [1, C, H, W] at its own positions, and the ids of those
    beside which constants stand (None: its own, in closed form). A copy with regular labels holds the constants too."""
    field = tr.closed(x)
    if field is not None:
        return field.groups()[0], None
    e = elements(tr, x)
    try:
        groups, ids = terms(tr, e.arranged(lambda t: t.reshape(x.shape[1], -1)), *sites(*grid), grid, patched=True)
    except Irregular:
        e = e.with_ids(relabel(tr, x, e.ids))
        groups, ids = terms(tr, e.arranged(lambda t: t.reshape(x.shape[1], -1)), *sites(*grid), grid)
    return groups, ids.reshape(x.shape)


def convolution(tr: Tracer, func: Any, out: Tensor, args: Any, kwargs: Any) -> Ids:
    """aten.convolution(x, w, b, stride, padding, dilation, transposed, output_padding, groups), 1-D and 2-D."""
    x, w, b, stride, padding, dilation, transposed, _, groups = args
    one = x.dim() == 3
    if x.dim() not in (3, 4):
        raise Irregular(f"{x.dim() - 2}-D convolution")
    if x.shape[0] != 1 and _copies(tr, x):
        return _one_by_one(tr, func, out, args, kwargs)
    if b is not None and not tr.fixed(b):
        plain = stand_in(tr, out, convolution(tr, func, out, (x, w, None, *args[3:]), kwargs))
        return emit(tr, "conv", out.shape, "add", [plain, b.view([1, -1] + [1] * (x.dim() - 2))], ())
    s, p, d = _pair(stride, one, 1), _pair(padding, one, 0), _pair(dilation, one, 1)
    if one:
        x, w = x.unsqueeze(2), w.unsqueeze(2)
    grid: Pair = (x.shape[2], x.shape[3])
    out_grid: Pair = (1, out.shape[2]) if one else (out.shape[2], out.shape[3])
    if transposed and (x.shape[0] != 1 or not tr.fixed(w)):
        raise Irregular("a transposed convolution whose weight is not constant, or of a folded batch")
    if tr.dynamic(w) or (tr.conditional(w) and x.shape[0] != 1):
        raise Irregular("its weight depends on the sample, or its batch is folded")
    if tr.conditional(w):
        return _given_weight(tr, x, w, groups, (s, p, d), out_grid).reshape(out.shape)
    w = dense_weight(w.detach(), groups, transposed)
    if x.shape[0] != 1:
        return _folded(tr, x, w, b, (s, p, d), out_grid)
    lanes, ids = _operand(tr, x, grid)
    kernel: Pair = (w.shape[2], w.shape[3])
    padded = (p[0] > 0 or transposed, p[1] > 0 or transposed)
    if _unpaddable(lanes, grid, padded):
        raise Irregular("padding around a broadcast value")
    taps = []
    full = bool((w != 0).all())
    for a in range(kernel[0]):
        for e in range(kernel[1]):
            for mul, off, parity in _positions((a, e), s, p, d, transposed):
                for g in lanes:
                    ref = Ref(g.ref.node, g.ref.chans, compose(g.ref.at, mul, off))
                    weight = w[:, :, a, e] if len(g.lanes) == w.shape[1] else w[:, g.lanes, a, e]
                    taps.append(Term(ref, weight.clone(), parity, (a, e), kernel, full))
    bias = _constant_part(tr, x, ids, w, b, (s, p, d), transposed, out_grid)
    node = tr.add(TapsNode, "conv_transpose" if transposed else "conv", w.shape[0], out_grid,
                  taps=taps, bias=bias, up=s if transposed else (1, 1))  # fmt: skip
    return ClosedForm.of_node(node.index, w.shape[0], out_grid)


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


def _constant_part(
    tr: Tracer,
    x: Tensor,
    ids: Tensor | None,
    w: Tensor,
    b: Tensor | None,
    geometry: Any,
    transposed: bool,
    out_grid: Pair,
) -> Tensor | None:
    """What the constant elements of x [1, C, H, W] and the bias contribute: [O], or [O, H, W] where it varies over sites."""
    field = tr.closed(x)
    if field is not None and (field.whole or (field.zero and bool((field.lanes >= 0).all()))):
        return None if b is None else b.detach().clone()
    ids = tr.ids(x) if ids is None else ids
    fixed = torch.where(ids == CONST, x.to(w.dtype), torch.zeros((), dtype=w.dtype))
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


def _seen(tr: Tracer, x: Tensor, kernel: Pair, geometry: tuple[Pair, Pair, Pair], grid: Pair) -> Elements:
    """What each site of a convolution of x [B, C, H, W] sees: elements [B, C, kernel positions, *grid]."""
    s, p, d = geometry

    def patches(t: Tensor, outside: int) -> Tensor:
        t = F.pad(t, (p[1], p[1], p[0], p[0]), value=outside)
        found = []
        for a in range(kernel[0]):
            for e in range(kernel[1]):
                rows = slice(a * d[0], a * d[0] + (grid[0] - 1) * s[0] + 1, s[0])
                cols = slice(e * d[1], e * d[1] + (grid[1] - 1) * s[1] + 1, s[1])
                found.append(t[:, :, rows, cols])
        return torch.stack(found, 2)

    e = elements(tr, x)
    where = None if e.where is None else patches(e.where, -1)
    return Elements(x, patches(e.ids, CONST), patches(e.values, 0), where)


def _given_weight(
    tr: Tracer, x: Tensor, w: Tensor, groups: int, geometry: tuple[Pair, Pair, Pair], grid: Pair
) -> Tensor:
    """Ids [O, sites] of a convolution of x [1, C, H, W] whose weight [O, C / groups, kh, kw] depends on conditioning: inner
    products of it and what each site sees."""
    seen = _seen(tr, x, (w.shape[2], w.shape[3]), geometry, grid)
    seen = seen.arranged(lambda t: t[0].reshape(groups, 1, -1, grid[0] * grid[1]).mT)
    weight = elements(tr, w).arranged(lambda t: t.reshape(groups, w.shape[0] // groups, 1, -1))
    return inner(tr, "conv", seen, weight)


def _copies(tr: Tracer, x: Tensor) -> bool:
    """Whether the batch of x [B, C, ...] holds copies of the same sites (with and without a label), not other sites."""
    if x.shape[0] > MOST_COPIES:
        return False
    ids = tr.ids(x)
    site = torch.where(ids >= 0, ids & SITE_MASK, -1)
    both = (site >= 0) & (site[:1] >= 0)
    return bool(both.flatten(1).any(1).all()) and bool(((site == site[:1]) | ~both).all())


def _one_by_one(tr: Tracer, func: Any, out: Tensor, args: Any, kwargs: Any) -> Ids:
    """A convolution of each element of a batch of copies; equal ones are computed once."""
    x = args[0]
    ids, found = tr.ids(x), []
    for k in range(x.shape[0]):
        same = next((m for m in range(k) if torch.equal(ids[m], ids[k]) and torch.equal(x[m], x[k])), None)
        if same is None or bool((ids[k] == COND).any()):
            made = convolution(tr, func, out[k : k + 1], (x[k : k + 1], *args[1:]), kwargs)
            found.append(dense(made, out[:1].shape))
        else:
            found.append(found[same])
    return torch.cat(found)


def _folded(
    tr: Tracer, x: Tensor, w: Tensor, b: Tensor | None, geometry: tuple[Pair, Pair, Pair], grid: Pair
) -> Tensor:
    """Convolution whose batch axis holds sites (dilation folded into the batch): lanes by kernel position."""
    seen = _seen(tr, x, (w.shape[2], w.shape[3]), geometry, grid).arranged(
        lambda t: t.permute(2, 1, 0, 3, 4).reshape(-1, x.shape[0] * grid[0] * grid[1])
    )
    result = linear(tr, "conv", seen, w.permute(0, 2, 3, 1).reshape(w.shape[0], -1), b)
    return result.reshape(w.shape[0], x.shape[0], *grid).transpose(0, 1)


def avg_pool(tr: Tracer, func: Any, out: Tensor, args: Any, kwargs: Any) -> Ids:
    """aten.avg_pool1d/2d without padding: a convolution with one weight."""
    x, size = args[0], [int(k) for k in args[1]]
    stride = list(args[2]) if len(args) > 2 and args[2] else size
    if any(args[3] if len(args) > 3 else [0]) or (len(args) > 4 and args[4]):
        raise Irregular("average pooling with padding or ceil_mode")
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
    if not tr.plans_conditioning or name != "convolution" or args[0].dim() != 3 or args[6] or tr.data_grid[0] != 1:
        return None
    x, w, out_len = args[0], args[1], out.shape[-1]
    if x.shape[0] != 1 or out_len != tr.data_grid[1] or x.shape[-1] != out_len or tr.depth:
        return None
    if tr.conditional(w) or tr.conditional(args[2]):
        return None
    if tr.dynamic(x) or not tr.conditional(x):
        return None
    return convolution(tr, None, out, args, {})


def with_flags(tr: Tracer, func: Any, out: Tensor, args: Any, kwargs: Any) -> Ids:
    """aten._convolution, as traced modules call it: the same with flags of the library that computes it."""
    return convolution(tr, func, out, args[:9], {})


CONVOLUTIONS: dict[str, Callable[..., Ids]] = {
    "convolution": convolution, "_convolution": with_flags, "avg_pool1d": avg_pool, "avg_pool2d": avg_pool,
}  # fmt: skip
