"""Log-likelihood under a mixture of logistics: one pass over the parameters forward, one backward, nothing kept."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastgen.errors import ShapeError
from fastgen.heads.logistic_mixture import LogisticMixture, _conditional_means, _log_bin, _log_density
from fastgen.ops import checks
from fastgen.ops.dispatch import on_device, uses_kernel
from fastgen.ops.reference import logistic_mixture_log_prob_reference


def logistic_mixture_log_prob(params: Tensor, x: Tensor, *, levels: int | None = 256, floor: float = -7.0) -> Tensor:
    """Log-probability in nats of each pixel under its mixture of logistics: params [..., P], x [..., C] -> [...].

    Parameters, edge cases and meaning are those of `fastgen.heads.LogisticMixture` (PixelCNN++, Salimans et al.
    2017, eq. 1 to 3): P = 3M for one channel, 10M for three; levels None is a continuous density; floor bounds
    log-scales. Float64 stays so, all else computes in and returns float32. Any strides are read in place where the
    axes between the first and last are as one (so [B, P, H, W] seen as [B, H, W, P] is not copied). The gradient
    of params is analytic and made again from params in the backward, so nothing is kept; x is data and has none.
    Equivalent to `logistic_mixture_log_prob_reference`. Raises ShapeError, ValueError.
    """
    op = "logistic_mixture_log_prob"
    mixture_size(op, params, x.shape[-1] if x.dim() else 0, levels, floor)
    if tuple(x.shape[:-1]) != tuple(params.shape[:-1]) or not x.is_floating_point():
        raise ShapeError(
            f"{op}: x is {checks.describe(x)} for params {checks.describe(params)}, expected floats with the same "
            "leading axes"
        )
    checks.check_like(op, params, {"x": x}, dtype=False)
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: x requires a gradient, expected data without; use logistic_mixture_log_prob_reference")
    rows = _rows(params)
    checks.check_size(op, "params, from the first to the last,", rows.shape[-1], rows.stride(-1))
    y: Tensor = mixture_log_prob(rows, _rows(x), levels or 0, float(floor))
    return y.reshape(params.shape[:-1])


def mixture_size(op: str, params: Tensor, channels: int, levels: int | None, floor: float) -> int:
    """Number of components. Raises ShapeError and ValueError unless all fits together."""
    if channels not in (1, 3):
        raise ShapeError(f"{op}: {channels} value channels, expected 1 or 3")
    per = 3 if channels == 1 else 10
    size = params.shape[-1] if params.dim() else 0
    if params.dim() < 1 or not params.is_floating_point() or size < per or size % per:
        raise ShapeError(
            f"{op}: params is {checks.describe(params)}, expected floats [..., {per} * mixtures] for {channels} channel(s)"
        )
    if levels is not None and levels < 2:
        raise ValueError(f"{op}: levels={levels}, expected at least two, or None for continuous values")
    if not -math.inf < floor < math.inf:
        raise ValueError(f"{op}: floor={floor}, expected a finite number")
    return int(size // per)


def _rows(x: Tensor) -> Tensor:
    """[..., P] as [B, S, P]."""
    if x.dim() < 3:
        return x.reshape(1, -1, x.shape[-1])
    return x.flatten(1, -2)


@torch.library.custom_op("fastgen::logistic_mixture_log_prob", mutates_args=())
def mixture_log_prob(params: Tensor, x: Tensor, levels: int, floor: float) -> Tensor:
    """params [B, S, P], x [B, S, C] -> [B, S]; levels 0: continuous."""
    y = _fake(params, x, levels, floor)
    if y.numel() == 0:
        return y
    if uses_kernel(params):
        from fastgen.kernels import mixture

        with on_device(params):
            mixture.log_prob(params, x, y, levels, floor)
        return y
    return y.copy_(logistic_mixture_log_prob_reference(params, x, levels=levels or None, floor=floor))


def _fake(params: Tensor, x: Tensor, levels: int, floor: float) -> Tensor:
    return params.new_empty(params.shape[:-1], dtype=torch.promote_types(params.dtype, torch.float32))


@torch.library.custom_op("fastgen::logistic_mixture_log_prob_backward", mutates_args=())
def mixture_log_prob_backward(grad: Tensor, params: Tensor, x: Tensor, levels: int, floor: float) -> Tensor:
    """Gradient of params, in its dtype and, where it is dense, strides; grad [B, S]."""
    result = torch.empty_like(params)
    if params.numel() == 0:
        return result
    if uses_kernel(params):
        from fastgen.kernels import mixture

        with on_device(params):
            mixture.gradient(grad, params, x, result, levels, floor)
        return result
    wide = params if params.dtype == torch.float64 else params.float()
    return result.copy_(grad[..., None] * log_prob_gradient(wide, x.to(wide), levels or None, floor))


def _backward_fake(grad: Tensor, params: Tensor, x: Tensor, levels: int, floor: float) -> Tensor:
    return torch.empty_like(params)


def log_prob_gradient(params: Tensor, x: Tensor, levels: int | None, floor: float) -> Tensor:
    """Derivatives of the log-probability by the parameters, [..., P], [..., C] -> [..., P]; plain torch.

    With r the posterior of the components and f their terms, the derivative by a logit is r - softmax(logits), and by
    anything within a term r f'.
    """
    head = LogisticMixture(params.shape[-1] // (10 if x.shape[-1] == 3 else 3), levels, log_scale_floor=floor)
    parts, x = head._split(params), x[..., None]
    centred, log_scales = x - _conditional_means(parts, x), parts.log_scales.clamp(min=floor)
    inverse = (-log_scales).exp()
    if levels is None:
        terms = _log_density(centred, log_scales)
        slope = -torch.tanh(centred * inverse / 2)
        by_mean, by_scale = -slope * inverse, -1 - centred * inverse * slope
    else:
        terms, half_bin = _log_bin(x, centred, log_scales, levels), 1 / (levels - 1)
        a, b, w = (centred + half_bin) * inverse, (half_bin - centred) * inverse, 2 * half_bin * inverse
        tail_a, tail_b = torch.sigmoid(-a), torch.sigmoid(-b)
        lowest, highest = x < -1 + half_bin, x > 1 - half_bin
        rest = torch.where(w < 1e-8, 1.0, w / torch.expm1(w))  # of log(1 - exp(-w)) by log w
        tail_a, tail_b = torch.where(highest, 0.0, tail_a), torch.where(lowest, 0.0, tail_b)
        by_mean = (tail_b - tail_a) * inverse
        by_scale = -a * tail_a - b * tail_b - torch.where(lowest | highest, 0.0, rest)
    posterior = (terms.sum(-2) + parts.logits.log_softmax(-1)).softmax(-1)
    by_mean = by_mean * posterior[..., None, :]
    by_scale = torch.where(parts.log_scales < floor, 0.0, by_scale * posterior[..., None, :])
    own = [by_mean, by_scale]
    if parts.coefficients is not None:
        green, blue = by_mean[..., 1, :], by_mean[..., 2, :]
        by_c = torch.stack((green * x[..., 0, :], blue * x[..., 0, :], blue * x[..., 1, :]), -2)
        own.append(by_c * (1 - torch.tanh(parts.coefficients) ** 2))
    return torch.cat((posterior - parts.logits.softmax(-1), torch.stack(own, -2).flatten(-3)), -1)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    params, x, ctx.levels, ctx.floor = inputs
    ctx.save_for_backward(params, x)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    params, x = ctx.saved_tensors
    found = mixture_log_prob_backward(grad, params, x, ctx.levels, ctx.floor) if ctx.needs_input_grad[0] else None
    return found, None, None, None


mixture_log_prob.register_fake(_fake)
mixture_log_prob_backward.register_fake(_backward_fake)
mixture_log_prob.register_autograd(_backward, setup_context=_setup)
