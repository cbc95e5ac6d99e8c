"""Mixture of (discretised) logistic distributions, as in PixelCNN++ and in WaveNet vocoders."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from fastgen.errors import ShapeError
from fastgen.heads.base import Head, check_layout
from fastgen.heads.choice import pick, pickable, possible, scale_error, unequal, variation


class _Parts(NamedTuple):
    """One step's parameters by kind; tensors of errors come in the same form."""

    logits: Tensor  # [..., M]
    means: Tensor  # [..., C, M]
    log_scales: Tensor  # [..., C, M], not yet bounded
    coefficients: Tensor | None  # [..., 3, M] before tanh; None for one channel


@dataclass(frozen=True, eq=False)
class LogisticMixture(Head):
    """n_mix logistic distributions on [-1, 1]; a step draws a site, one or three channels, at once.

    PixelCNN++ (Salimans, Karpathy, Chen and Kingma 2017, eq. 1 to 3) in its published parameter layout. One
    channel: [n_mix logits, n_mix means, n_mix log-scales]. Three: n_mix logits, then per colour [n_mix means,
    n_mix log-scales, n_mix coefficients]; with c = tanh(coefficients), mean_1 += c_0 x_0 and mean_2 += c_1
    x_0 + c_2 x_1. The channels of a site share the component.

    levels: values lie on a grid of so many levels from -1 to 1, whose outermost bins are open; None: they are
    continuous and clipped to [-1, 1] (a density ignores the clipping). log_scale_floor: lower bound of
    log-scales.
    """

    n_mix: int
    levels: int | None = 256
    params: str = "auto"
    log_scale_floor: float = -7.0
    n: int = field(init=False, repr=False)

    name: ClassVar[str] = "LogisticMixture"
    kind: ClassVar[int] = 0
    at_once: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.n_mix < 1:
            raise ValueError(f"n_mix={self.n_mix}: expected at least one component")
        if self.levels is not None and self.levels < 2:
            raise ValueError(f"levels={self.levels}: expected at least two, or None for continuous values")
        if not math.isfinite(self.log_scale_floor):
            raise ValueError(f"log_scale_floor={self.log_scale_floor}: expected a finite number")
        check_layout(self.params)
        fields = {
            "n": self.n_mix,
            "floor": float(np.float32(self.log_scale_floor)),
            "grid_levels": self.levels or 0,
            "clip": (-1.0, 1.0),
        }
        for key, value in fields.items():
            object.__setattr__(self, key, value)

    def num_params(self, channels: int) -> int:
        if channels not in (1, 3):
            raise ShapeError(f"LogisticMixture draws 1 or 3 value channels a site; given {channels}")
        return 3 * self.n_mix if channels == 1 else 10 * self.n_mix

    def num_uniforms(self, channels: int) -> int:
        return 1 + channels  # component, values

    def _channels_of(self, params: int) -> int:
        for channels in (1, 3):
            if params == self.num_params(channels):
                return channels
        expected = f"{self.num_params(1)} (one channel) or {self.num_params(3)} (three)"
        raise ShapeError(f"LogisticMixture: params has {params} per step; expected {expected}")

    def _split(self, params: Tensor) -> _Parts:
        m = self.n_mix
        if self._channels_of(params.shape[-1]) == 1:
            logits, means, log_scales = params.chunk(3, -1)
            return _Parts(logits, means[..., None, :], log_scales[..., None, :], None)
        colours = params[..., m:].reshape(*params.shape[:-1], 3, 3, m)  # colour, kind, component
        return _Parts(params[..., :m], *(colours[..., kind, :] for kind in range(3)))

    # ---- draws ---------------------------------------------------------------------------------------------
    def _draw(self, params: Tensor, uniforms: Tensor, temperature: float, known: Tensor | None) -> Tensor:
        parts = self._split(params)
        component = pick(parts.logits, uniforms[..., 0], temperature)
        chosen = [_select(p, component) for p in parts[1:] if p is not None]
        means, log_scales = chosen[0], chosen[1].clamp(min=self.floor)
        noise = log_scales.exp() * temperature * _logistic(uniforms[..., 1:])
        c = torch.tanh(chosen[2]) if len(chosen) == 3 else None
        values: list[Tensor] = []
        for channel in range(means.shape[-1]):
            mean = means[..., channel]
            if channel == 1 and c is not None:
                mean = mean + c[..., 0] * values[0]
            if channel == 2 and c is not None:
                mean = mean + c[..., 1] * values[0] + c[..., 2] * values[1]
            x = self._rounded(mean + noise[..., channel])
            if known is not None:
                x = torch.where(known[..., channel].isnan(), x, known[..., channel].to(x))
            values.append(x)
        return torch.where(possible(parts.logits)[..., None], torch.stack(values, -1), math.nan)

    def _rounded(self, x: Tensor) -> Tensor:
        """Clipped, on the grid and in float32 precision, as later channels and forward's input see it."""
        x = torch.where(x.isfinite(), x, math.nan).clamp(-1, 1)
        if self.levels is not None:
            half = 0.5 * (self.levels - 1)
            x = ((x + 1) * half).round() / half - 1
        return x.to(torch.float32).to(x.dtype)

    # ---- likelihood ----------------------------------------------------------------------------------------
    def log_prob(self, params: Tensor, value: Tensor) -> Tensor:
        parts = self._split(params)
        x = value.to(params)[..., None]  # [..., C, 1]
        if x.shape[-2] != parts.means.shape[-2]:
            raise ShapeError(f"LogisticMixture: value {list(value.shape)}; expected {parts.means.shape[-2]} last")
        centred = x - _conditional_means(parts, x)
        log_scales = parts.log_scales.clamp(min=self.floor)
        log_p = (
            _log_density(centred, log_scales) if self.levels is None else _log_bin(x, centred, log_scales, self.levels)
        )
        return (log_p.sum(-2) + parts.logits.log_softmax(-1)).logsumexp(-1)

    # ---- how far parameters are apart ----------------------------------------------------------------------
    def _moved(self, a: _Parts, b: _Parts) -> tuple[Tensor, Tensor, Tensor]:
        """By how much means and log-scales differ, and the smaller scale: [..., C, M], colours before at their farthest."""
        means = (a.means - b.means).abs()
        if a.coefficients is not None and b.coefficients is not None:
            c = (torch.tanh(a.coefficients) - torch.tanh(b.coefficients)).abs()
            means = means + _colour_shift(c, torch.ones_like(c))
        s, t = a.log_scales.clamp(min=self.floor), b.log_scales.clamp(min=self.floor)
        return means, (s - t).abs(), torch.minimum(s, t).exp()

    def _distance(self, a: Tensor, b: Tensor) -> Tensor:
        p, q = self._split(a), self._split(b)
        means, log_scales, scale = self._moved(p, q)
        parts = (means / scale + log_scales).sum(-2)
        return variation(p.logits, q.logits) + (p.logits.softmax(-1) * parts).sum(-1)

    def _mismatch(self, a: Tensor, b: Tensor) -> Tensor:
        if self.levels is None:
            return self._distance(a, b)
        p, q = self._split(a), self._split(b)
        means, log_scales, scale = self._moved(p, q)
        # A value changes where it is within its shift of the edge of a bin; E |logistic| = 2 log 2.
        shift = means + scale * log_scales * 2 * math.log(2)
        parts = (shift * 0.5 * (self.levels - 1)).sum(-2)
        return unequal(p.logits, q.logits) + (p.logits.softmax(-1) * parts).sum(-1)

    # ---- ties ----------------------------------------------------------------------------------------------
    def _explained(self, params: Tensor, error: Tensor, uniforms: Tensor, value: Tensor, t: float) -> Tensor:
        parts, errors = self._split(params), self._split(error)
        x = value[..., None]  # the channels before, too, are as the executor drew them
        mean_error = errors.means
        if errors.coefficients is not None and parts.coefficients is not None:
            c = torch.tanh(parts.coefficients)
            away = [(torch.tanh(parts.coefficients + e) - c).abs() for e in (errors.coefficients, -errors.coefficients)]
            mean_error = mean_error + _colour_shift(torch.maximum(*away), x.abs())
        scales = parts.log_scales.clamp(min=self.floor).exp() * t
        deviation = scales * _logistic(uniforms[..., 1:])[..., None]
        allowed = mean_error + deviation.abs() * scale_error(parts.log_scales, errors.log_scales, self.floor)
        bin_half = 0.0 if self.levels is None else 1.0 / (self.levels - 1)
        raw = (_conditional_means(parts, x) + deviation).clamp(-1, 1)
        close = ((raw - x).abs() <= allowed + bin_half).all(-2)
        likely = pickable(parts.logits, errors.logits, uniforms[..., 0], t)
        return torch.any(likely & close, -1)


def _select(x: Tensor, component: Tensor) -> Tensor:
    """[..., C, M] at component [...] -> [..., C]."""
    return x.gather(-1, component[..., None, None].expand(*x.shape[:-1], 1))[..., 0]


def _logistic(u: Tensor) -> Tensor:
    """Quantile of the standard logistic distribution."""
    return u.log() - torch.log1p(-u)


def _conditional_means(parts: _Parts, x: Tensor) -> Tensor:
    """Means given the channels before, x [..., C, 1]: [..., C, M]."""
    if parts.coefficients is None:
        return parts.means
    return parts.means + _colour_shift(torch.tanh(parts.coefficients), x)


def _colour_shift(c: Tensor, x: Tensor) -> Tensor:
    """What the channels before add to the means (eq. 3): c [..., 3, M], x [..., 3, 1] -> [..., 3, M]."""
    green = c[..., 0, :] * x[..., 0, :]
    blue = c[..., 1, :] * x[..., 0, :] + c[..., 2, :] * x[..., 1, :]
    return torch.stack((torch.zeros_like(green), green, blue), -2)


def _log_density(centred: Tensor, log_scales: Tensor) -> Tensor:
    z = centred * (-log_scales).exp()
    return z - log_scales - 2 * softplus(z)


def _log_bin(x: Tensor, centred: Tensor, log_scales: Tensor, levels: int) -> Tensor:
    """Log-probability of the bin around x (eq. 2), the outermost ones open; finite with finite gradients.

    With bin ends a > b in units of the scale, sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b -
    a)), which neither cancels nor underflows: no approximation by the density is needed where the probability
    is tiny.
    """
    half_bin = 1.0 / (levels - 1)
    inverse = (-log_scales).exp()
    below_upper = logsigmoid((centred + half_bin) * inverse)
    above_lower = logsigmoid((half_bin - centred) * inverse)
    log_width = math.log(2 * half_bin) - log_scales
    narrow = log_width < -7.0
    width = log_width.clamp(-7.0, 5.0).exp()  # above, 1 - exp(-w) is 1
    few = log_width.clamp(max=-7.0)
    series = few - few.exp() / 2 + (2 * few).exp() / 24  # log(1 - exp(-w)) = log w - w / 2 + w^2 / 24 - ...
    log_inside = torch.where(narrow, series, torch.log(-torch.expm1(-width)))
    is_lowest, is_highest = x < -1 + half_bin, x > 1 - half_bin
    inner = below_upper + above_lower + log_inside
    return torch.where(is_lowest, below_upper, torch.where(is_highest, above_lower, inner))
