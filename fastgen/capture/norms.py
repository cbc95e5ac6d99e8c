"""Composite rules: gates, batch and layer norms, moments over channels, made of maps and sums."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgen.capture.fit import Irregular
from fastgen.capture.linear import linear
from fastgen.capture.operands import elements, stand_in
from fastgen.capture.pointwise import Argument, emit
from fastgen.capture.reductions import extremum
from fastgen.capture.shadow import Ids
from fastgen.capture.tracer import Tracer


def log_sigmoid(tr: Tracer, func: Any, out: Tensor, args: Any, kwargs: Any) -> Ids:
    """-softplus(-x)."""
    minus = stand_in(tr, -args[0], emit(tr, "log_sigmoid", out.shape, "neg", [args[0]], ()))
    soft = stand_in(tr, -out, emit(tr, "log_sigmoid", out.shape, "softplus", [minus], (1.0, 20.0)))
    return emit(tr, "log_sigmoid", out.shape, "neg", [soft], ())


def glu(tr: Tracer, func: Any, out: Tensor, args: Any, kwargs: Any) -> Ids:
    """a * sigmoid(b) for the halves of x along a dimension."""
    dim = args[1] if len(args) > 1 else kwargs.get("dim", -1)
    a, b = args[0].chunk(2, dim)
    beside = None if tr.dynamic(b) else elements(tr, a)  # it may be of conditioning alone
    gate = stand_in(tr, torch.sigmoid(b), emit(tr, "glu", out.shape, "sigmoid", [b], (), like=beside))
    return emit(tr, "glu", out.shape, "mul", [a, gate], ())


def batch_norm(tr: Tracer, func: Any, out: Tensor, args: Any, kwargs: Any) -> Ids:
    """Batch normalisation with running statistics is an affine map per channel."""
    x, weight, bias, mean, var = args[:5]
    training = bool(args[5]) if "no_training" not in func.overloadpacket.__name__ else False
    if training or mean is None:
        raise Irregular("its statistics are over sites (and samples): a norm of a batch, or of an instance")
    eps = args[-1] if isinstance(args[-1], float) else kwargs.get("eps", 1e-5)
    sides = [1, -1] + [1] * (x.dim() - 2)
    if tr.conditional(weight) or tr.conditional(bias):
        scale = torch.rsqrt(var + eps)
        normal = emit(tr, "batch_norm", out.shape, "muladd", [x, scale.view(sides), (-mean * scale).view(sides)], ())
        return affine(tr, "batch_norm", stand_in(tr, out, normal), weight, bias, sides)
    scale = (1.0 if weight is None else weight.detach()) / torch.sqrt(var + eps)
    shift = (0.0 if bias is None else bias.detach()) - mean * scale
    return emit(tr, "batch_norm", out.shape, "muladd", [x, scale.view(sides), shift.view(sides)], ())


def affine(tr: Tracer, op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, sides: list[int]) -> Ids:
    """x * weight + bias, each viewed with `sides`; either may be missing, and depend on conditioning."""
    scale = torch.ones(()) if weight is None else weight.detach().view(sides)
    shift = torch.zeros(()) if bias is None else bias.detach().view(sides)
    return emit(tr, op, x.shape, "muladd", [x, scale, shift], ())


def moments(tr: Tracer, x: Tensor, dims: list[int], correction: float) -> tuple[Tensor, Tensor]:
    """Stand-ins for mean and variance over channels, dims kept."""
    count = math.prod([x.shape[d] for d in dims])

    def mean_of(t: Tensor, scale: float) -> Tensor:
        kept = [d for d in range(x.dim()) if d not in dims]
        e = elements(tr, t).arranged(lambda a: a.permute(dims + kept).reshape(count, -1))
        values = t.detach().float().sum(dims, keepdim=True) * scale
        return stand_in(tr, values, linear(tr, "mean", e, torch.full((1, count), scale), None))

    mean = mean_of(x, 1.0 / count)
    centred = stand_in(tr, x - mean, emit(tr, "norm", x.shape, "sub", [x, mean], ()))
    squared = stand_in(tr, centred * centred, emit(tr, "norm", x.shape, "mul", [centred, centred], ()))
    return mean, mean_of(squared, 1.0 / (count - correction))


def variance(tr: Tracer, func: Any, out: Tensor, args: Any, kwargs: Any) -> Tensor:
    """aten.var.correction over channels."""
    x = args[0]
    dims = [d % x.dim() for d in (args[1] if len(args) > 1 and args[1] else range(x.dim()))]
    correction = kwargs.get("correction", 1)
    return tr.ids(moments(tr, x, dims, 1.0 if correction is None else float(correction))[1])


def layer_norm(tr: Tracer, func: Any, out: Tensor, args: Any, kwargs: Any) -> Ids:
    """aten.native_layer_norm(x, shape, weight, bias, eps) over the last axes (Ba et al. 2016)."""
    x, weight, bias, eps = args[0], args[2], args[3], float(args[4])
    mean, var = moments(tr, x, [x.dim() - k for k in range(len(args[1]), 0, -1)], 0.0)

    def step(fn: str, values: Tensor, operands: list[Argument], imm: tuple[float, ...] = ()) -> Tensor:
        return stand_in(tr, values, emit(tr, "layer_norm", values.shape, fn, operands, imm))

    more = step("affine", var + eps, [var], (1.0, eps))
    scale = step("rsqrt", torch.rsqrt(more), [more])
    centred = step("sub", x - mean, [x, mean])
    y = step("mul", centred * scale, [centred, scale])
    if weight is not None or bias is not None:
        return affine(tr, "layer_norm", y, weight, bias, list(args[1]))
    return tr.ids(y)


NORMS: dict[str, Callable[..., Ids]] = {
    "glu": glu, "log_sigmoid_forward": log_sigmoid, "native_batch_norm": batch_norm,
    "_native_batch_norm_legit_no_training": batch_norm, "cudnn_batch_norm": batch_norm, "amax": extremum,
    "amin": extremum, "var": variance, "native_layer_norm": layer_norm,
}  # fmt: skip
