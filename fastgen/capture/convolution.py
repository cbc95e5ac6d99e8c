"""Convolutions, transposed ones and average pooling become taps at affine positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.capture.closed_form import ClosedForm, Lanes
from fastgen.capture.fit import Irregular, fit, fit_parts
from fastgen.capture.ids import COND, CONST, sites
from fastgen.capture.linear import linear
from fastgen.capture.relabel import relabel
from fastgen.capture.shadow import Ids
from fastgen.capture.tracer import Tracer
from fastgen.graph.refs import Affine, Pair, Ref, Term
from fastgen.graph.taps import TapsNode


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
    whole = tr.ids(x)
    i, j = sites(*grid)
    try:
        ids = whole.reshape(x.shape[1], -1)
        groups, constant = fit_parts(ids, i, j)
    except Irregular:
        whole = relabel(tr, x, whole)
        ids = whole.reshape(x.shape[1], -1)
        groups, constant = fit(ids, i, j)
    lanes = [k for k in constant if bool((ids[k] == COND).any())]
    if lanes:
        index = torch.arange(x.numel()).view(x.shape[1], *grid)[lanes]
        node = tr.cond_source(_call_argument(tr, x), index, grid)
        groups.append(Lanes(lanes, Ref(node, tuple(range(len(lanes))), Affine(hi=grid))))
    return groups, whole


def _call_argument(tr: Tracer, x: Tensor) -> Tensor:
    """The tensor of the running call that x is a reshaped view of."""
    return next((t for t in tr.call_args if t.data_ptr() == x.data_ptr() and t.numel() == x.numel()), x)


def convolution(tr: Tracer, func: Any, out: Tensor, args: Any, kwargs: Any) -> Ids:
    """aten.convolution(x, w, b, stride, padding, dilation, transposed, output_padding, groups), 1-D and 2-D."""
    x, w, b, stride, padding, dilation, transposed, _, groups = args
    if tr.dynamic(w) or tr.conditional(w):
        raise Irregular("the weight depends on the sample or on conditioning")
    one = x.dim() == 3
    if x.dim() not in (3, 4):
        raise Irregular(f"{x.dim() - 2}-D convolution")
    s, p, d = _pair(stride, one, 1), _pair(padding, one, 0), _pair(dilation, one, 1)
    if one:
        x, w = x.unsqueeze(2), w.unsqueeze(2)
    w = dense_weight(w.detach(), groups, transposed)
    if x.shape[0] != 1:
        if transposed:
            raise Irregular("transposed convolution over a folded batch")
        return _folded(tr, x, w, b, s, p, d, out)
    grid: Pair = (x.shape[2], x.shape[3])
    out_grid: Pair = (1, out.shape[2]) if one else (out.shape[2], out.shape[3])
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


def _folded(tr: Tracer, x: Tensor, w: Tensor, b: Tensor | None, s: Pair, p: Pair, d: Pair, out: Tensor) -> Tensor:
    """Convolution whose batch axis holds sites (dilation folded into the batch): lanes by kernel position."""
    ids = F.pad(tr.ids(x), (p[1], p[1], p[0], p[0]), value=CONST)
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
    if name != "convolution" or args[0].dim() != 3 or args[6] or tr.data_grid[0] != 1:
        return None
    x, w, out_len = args[0], args[1], out.shape[-1]
    if x.shape[0] != 1 or out_len != tr.data_grid[1] or x.shape[-1] != out_len or tr.depth:
        return None
    if tr.conditional(w) or tr.conditional(args[2]):
        return None
    if not bool((tr.ids(x) == COND).all()):
        return None
    return convolution(tr, None, out, args, {})


CONVOLUTIONS: dict[str, Callable[..., Ids]] = {
    "convolution": convolution, "avg_pool1d": avg_pool, "avg_pool2d": avg_pool,
}  # fmt: skip
