"""Composite rules: gates, batch and layer norms, moments and extrema over channels, made of maps and sums."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgen.capture.axes import choose_labels
from fastgen.capture.fit import Irregular, fit, pieces_of
from fastgen.capture.ids import CONST, pack
from fastgen.capture.linear import linear
from fastgen.capture.pointwise import Argument, emit
from fastgen.capture.shadow import Ids
from fastgen.capture.tracer import Tracer
from fastgen.graph.maps import ReduceNode
from fastgen.graph.refs import Pair


def log_sigmoid(tr: Tracer, func: Any, out: Tensor, args: Any, kwargs: Any) -> Ids:
    """-softplus(-x)."""
    minus, soft = torch.empty(out.shape), torch.empty(out.shape)
    tr.put(minus, emit(tr, "log_sigmoid", out.shape, "neg", [args[0]], ()))
    tr.put(soft, emit(tr, "log_sigmoid", out.shape, "softplus", [minus], (1.0, 20.0)))
    return emit(tr, "log_sigmoid", out.shape, "neg", [soft], ())


def glu(tr: Tracer, func: Any, out: Tensor, args: Any, kwargs: Any) -> Ids:
    """a * sigmoid(b) for the halves of x along a dimension."""
    dim = args[1] if len(args) > 1 else kwargs.get("dim", -1)
    a, b = args[0].chunk(2, dim)
    gate = torch.empty(out.shape)
    tr.put(gate, emit(tr, "glu", out.shape, "sigmoid", [b], ()))
    return emit(tr, "glu", out.shape, "mul", [a, gate], ())


def batch_norm(tr: Tracer, func: Any, out: Tensor, args: Any, kwargs: Any) -> Ids:
    """Batch normalisation with running statistics is an affine map per channel."""
    x, weight, bias, mean, var = args[:5]
    training = bool(args[5]) if "no_training" not in func.overloadpacket.__name__ else False
    if training or mean is None:
        raise Irregular("batch statistics mix samples and sites")
    eps = args[-1] if isinstance(args[-1], float) else kwargs.get("eps", 1e-5)
    scale = (1.0 if weight is None else weight.detach()) / torch.sqrt(var + eps)
    shift = (0.0 if bias is None else bias.detach()) - mean * scale
    sides = [1, -1] + [1] * (x.dim() - 2)
    return emit(tr, "batch_norm", out.shape, "muladd", [x, scale.view(sides), shift.view(sides)], ())


def moments(tr: Tracer, x: Tensor, dims: list[int], correction: float) -> tuple[Tensor, Tensor]:
    """Stand-ins (ids only) for mean and variance over channels, dims kept."""
    shape = torch.Size(1 if d in dims else n for d, n in enumerate(x.shape))
    count = math.prod([x.shape[d] for d in dims])

    def mean_of(t: Tensor, scale: float) -> Tensor:
        kept = [d for d in range(x.dim()) if d not in dims]
        ids = tr.ids(t).permute(dims + kept).reshape(count, -1)
        values = t.permute(dims + kept).reshape(count, -1)
        result = torch.empty(shape)
        tr.put(result, linear(tr, "mean", ids, values, torch.full((1, count), scale), None))
        return result

    mean = mean_of(x, 1.0 / count)
    centred, squared = torch.empty(x.shape), torch.empty(x.shape)
    tr.put(centred, emit(tr, "norm", x.shape, "sub", [x, mean], ()))
    tr.put(squared, emit(tr, "norm", x.shape, "mul", [centred, centred], ()))
    return mean, mean_of(squared, 1.0 / (count - correction))


def variance(tr: Tracer, func: Any, out: Tensor, args: Any, kwargs: Any) -> Tensor:
    """aten.var.correction over channels."""
    x = args[0]
    dims = [d % x.dim() for d in (args[1] if len(args) > 1 and args[1] else range(x.dim()))]
    correction = kwargs.get("correction", 1)
    return tr.ids(moments(tr, x, dims, 1.0 if correction is None else float(correction))[1])


def layer_norm(tr: Tracer, func: Any, out: Tensor, args: Any, kwargs: Any) -> Tensor:
    """aten.native_layer_norm(x, shape, weight, bias, eps) over the last axes (Ba et al. 2016)."""
    x, weight, bias, eps = args[0], args[2], args[3], float(args[4])
    mean, var = moments(tr, x, [x.dim() - k for k in range(len(args[1]), 0, -1)], 0.0)

    def step(fn: str, shape: torch.Size, operands: list[Argument], imm: tuple[float, ...] = ()) -> Tensor:
        result = torch.empty(shape)
        tr.put(result, emit(tr, "layer_norm", shape, fn, operands, imm))
        return result

    scale = step("rsqrt", var.shape, [step("affine", var.shape, [var], (1.0, eps))])
    y = step("mul", x.shape, [step("sub", x.shape, [x, mean]), scale])
    if weight is not None:
        shift = torch.zeros(()) if bias is None else bias.detach()
        y = step("muladd", x.shape, [y, weight.detach(), shift])
    return tr.ids(y)


def extremum(tr: Tracer, func: Any, out: Tensor, args: Any, kwargs: Any) -> Tensor:
    """amax, amin over channels."""
    x = args[0]
    dims = args[1] if len(args) > 1 else kwargs.get("dim", [])
    dims = [d % x.dim() for d in ([dims] if isinstance(dims, int) else dims or range(x.dim()))]
    kept = [d for d in range(x.dim()) if d not in dims]
    count = math.prod([x.shape[d] for d in dims])
    ids = tr.ids(x).permute(dims + kept).reshape(count, -1)
    values = x.permute(dims + kept).reshape(count, -1)
    keep, i, j = choose_labels(ids)
    site = (i << 20 | j)[keep]
    if len(torch.unique(site)) != len(site):
        raise Irregular("an extremum over sites, or of several groups of channels")
    ids, values, i, j = ids[:, keep], values[:, keep], i[keep], j[keep]
    groups, constant = fit(ids, i, j)
    grid: Pair = (int(i.max()) + 1, int(j.max()) + 1)
    pieces = pieces_of(groups, constant, values, i, j, grid)
    name = "min" if "min" in func.overloadpacket.__name__ else "max"
    node = tr.add(ReduceNode, "a" + name, 1, grid, fn=name, operands=[pieces])
    result = torch.full((len(keep),), CONST)
    result[keep] = pack(node.index, torch.tensor(0), i, j)
    return result


NORMS: dict[str, Callable[..., Ids]] = {
    "glu": glu, "log_sigmoid_forward": log_sigmoid, "native_batch_norm": batch_norm,
    "_native_batch_norm_legit_no_training": batch_norm, "cudnn_batch_norm": batch_norm, "amax": extremum,
    "amin": extremum, "var": variance, "native_layer_norm": layer_norm,
}  # fmt: skip
