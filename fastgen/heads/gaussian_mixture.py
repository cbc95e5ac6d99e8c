"""Mixture of normal distributions."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fastgen.heads.base import Head, check_layout
from fastgen.heads.choice import pick, pickable, possible, scale_error, variation

_HALF_LOG_2_PI = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True, eq=False)
class GaussianMixture(Head):
    """n_mix normal distributions; a step draws one value channel.

    Parameters of a step: [n_mix logits, n_mix means, n_mix log-scales]; for n_mix 1, [mean, log-scale],
    before which forward may return the meaningless logit. Scales are standard deviations, their logarithms
    bounded below by log_scale_floor. value_range: drawn values are clipped to it (None: not at all);
    densities ignore it.
    """

    n_mix: int
    params: str = "auto"
    log_scale_floor: float = -7.0
    value_range: tuple[float, float] | None = None
    n: int = field(init=False, repr=False)

    name: ClassVar[str] = "GaussianMixture"
    kind: ClassVar[int] = 3

    def __post_init__(self) -> None:
        if self.n_mix < 1:
            raise ValueError(f"n_mix={self.n_mix}: expected at least one component")
        if not math.isfinite(self.log_scale_floor):
            raise ValueError(f"log_scale_floor={self.log_scale_floor}: expected a finite number")
        if self.value_range is not None and not self.value_range[0] < self.value_range[1]:
            raise ValueError(f"value_range={self.value_range}: expected (low, high) with low < high, or None")
        check_layout(self.params)
        for key, value in {
            "n": self.n_mix,
            "floor": float(np.float32(self.log_scale_floor)),
            "clip": self.value_range,
        }.items():
            object.__setattr__(self, key, value)

    def num_params(self, channels: int) -> int:
        return 3 * self.n_mix if self.n_mix > 1 else 2

    def num_uniforms(self, channels: int) -> int:
        return 2  # component, value

    def _counts(self, channels: int) -> tuple[int, ...]:
        return (3 * self.n_mix,) if self.n_mix > 1 else (2, 3)

    def _split(self, params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, means and log-scales (not yet bounded), each [..., n_mix]; so too of errors."""
        parts = params.chunk(3 if self.n_mix > 1 else 2, -1)
        return parts[0] if self.n_mix > 1 else torch.zeros_like(parts[0]), parts[-2], parts[-1]

    def _scales(self, log_scales: Tensor) -> Tensor:
        return log_scales.clamp(min=self.floor).exp()

    def _draw(self, params: Tensor, uniforms: Tensor, temperature: float, known: Tensor | None) -> Tensor:
        logits, means, log_scales = self._split(params)
        component = pick(logits, uniforms[..., 0], temperature)[..., None]
        mean, scale = means.gather(-1, component), self._scales(log_scales).gather(-1, component)
        drawn = self._clipped(mean + scale * temperature * torch.special.ndtri(uniforms[..., 1:]))
        return torch.where(possible(logits)[..., None], drawn, math.nan)

    def _clipped(self, x: Tensor) -> Tensor:
        x = torch.where(x.isfinite(), x, math.nan)
        return x if self.clip is None else x.clamp(*self.clip)

    def _distance(self, a: Tensor, b: Tensor) -> Tensor:
        (p, m, s), (q, n, t) = self._split(a), self._split(b)
        s, t = s.clamp(min=self.floor), t.clamp(min=self.floor)
        parts = (m - n).abs() / torch.minimum(s, t).exp() + (s - t).abs()
        return variation(p, q) + (p.softmax(-1) * parts).sum(-1)

    def _mismatch(self, a: Tensor, b: Tensor) -> Tensor:
        return self._distance(a, b)

    def log_prob(self, params: Tensor, value: Tensor) -> Tensor:
        self._channels_of(params.shape[-1])
        logits, means, log_scales = self._split(params)
        log_scales = log_scales.clamp(min=self.floor)
        z = (value.to(params) - means) * (-log_scales).exp()
        log_p = logits.log_softmax(-1) - 0.5 * z * z - log_scales - _HALF_LOG_2_PI
        return log_p.logsumexp(-1)

    def _explained(self, params: Tensor, error: Tensor, uniforms: Tensor, value: Tensor, t: float) -> Tensor:
        logits, means, log_scales = self._split(params)
        logit_error, mean_error, log_scale_error = self._split(error)
        deviation = self._scales(log_scales) * t * torch.special.ndtri(uniforms[..., 1:])
        allowed = mean_error + deviation.abs() * scale_error(log_scales, log_scale_error, self.floor)
        close = (self._clipped(means + deviation) - value).abs() <= allowed
        likely = pickable(logits, logit_error, uniforms[..., 0], t)
        return torch.any(likely & close, -1)
