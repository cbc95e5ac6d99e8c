"""Draws from mixtures of logistics and from softmaxes by the counters of `fastgen.rng`, on the parameters' device."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fastgen.errors import ShapeError
from fastgen.ops import checks
from fastgen.ops.dispatch import on_device, uses_kernel
from fastgen.ops.mixture import mixture_size
from fastgen.ops.reference import draw_categorical_reference, draw_logistic_mixture_reference
from fastgen.rng import seed_of


def draw_logistic_mixture(
    params: Tensor,
    seed: int,
    first: int = 0,
    step: int = 0,
    temperature: float = 1.0,
    *,
    channels: int,
    levels: int | None = 256,
    floor: float = -7.0,
) -> Tensor:
    """Pixels drawn as `fastgen.heads.LogisticMixture` draws them: params [n, P] -> float32 [n, C], at one step.

    params [n, S, P] -> [n, S, C] at steps step .. step + S - 1. Sample i is number first + i of the seed. P = 3M
    (channels=1) or 10M (3), contiguous. All between the given parameters and the float32 values is float64, so a
    draw equals that of the head with the same parameters, except where the uniform lies within about 1e-14 of a
    boundary between two components or grid values (`Head.near_tie`), or, with levels=None, in the last bit.
    Equivalent to `draw_logistic_mixture_reference`; no gradient. Raises ShapeError, ValueError, TypeError (seed).
    """
    op = "draw_logistic_mixture"
    mixture_size(op, params, channels, levels, floor)
    low, high, t = _checked(op, params, seed, first, step, temperature)
    y: Tensor = draw_mixture(params.detach(), low, high, first, step, t, channels, levels or 0, float(floor))
    return y


def draw_categorical(logits: Tensor, seed: int, first: int = 0, step: int = 0, temperature: float = 1.0) -> Tensor:
    """Class indices drawn as `fastgen.heads.Categorical` draws them: logits [n, K] -> int64 [n], at one step.

    logits [n, S, K] -> [n, S] at steps step .. step + S - 1; contiguous. The first k with p_0 + .. + p_k > u times
    their sum, in float64; equality with the head as in `draw_logistic_mixture`. Equivalent to
    `draw_categorical_reference`; no gradient. Raises ShapeError, ValueError, TypeError (seed).
    """
    op = "draw_categorical"
    low, high, t = _checked(op, logits, seed, first, step, temperature)
    y: Tensor = draw_class(logits.detach(), low, high, first, step, t)
    return y


def _checked(op: str, params: Tensor, seed: int, first: int, step: int, temperature: float) -> tuple[int, int, float]:
    """The words of the seed, and the temperature in float32 as executors have it."""
    if params.dim() not in (2, 3) or not params.is_floating_point() or params.shape[-1] < 1:
        raise ShapeError(f"{op}: parameters are {checks.describe(params)}, expected floats [n, P] or [n, S, P]")
    if not params.is_contiguous():
        raise ShapeError(
            f"{op}: parameters {list(params.shape)} have strides {list(params.stride())}, expected contiguous"
        )
    steps = params.shape[1] if params.dim() == 3 else 1
    if not 0 <= first <= 2**63 - 1 - params.shape[0]:
        raise ValueError(f"{op}: first={first}, expected the number of a sample, 0 or more")
    if not 0 <= step <= 2**32 - steps:
        raise ValueError(f"{op}: step={step}, expected 0 to {2**32 - steps}")
    t = float(np.float32(temperature))
    if not 0.0 < t < math.inf:
        raise ValueError(f"{op}: temperature={temperature}, expected a finite float32 > 0")
    number = seed_of(seed)
    return number & 0xFFFFFFFF, number >> 32, t


@torch.library.custom_op("fastgen::draw_logistic_mixture", mutates_args=())
def draw_mixture(
    params: Tensor, seed_low: int, seed_high: int, first: int, step: int, temperature: float, channels: int,
    levels: int, floor: float,
) -> Tensor:  # fmt: skip
    """See `fastgen.ops.draw_logistic_mixture`; the seed in two words of 32 bits, levels 0: continuous."""
    y = _mixture_fake(params, seed_low, seed_high, first, step, temperature, channels, levels, floor)
    if y.numel() == 0:
        return y
    if uses_kernel(params):
        from fastgen.kernels import draw

        with on_device(params):
            draw.logistic_mixture(
                params.contiguous(), y, (seed_low, seed_high), first, step, temperature, levels, floor
            )
        return y
    seed = seed_high << 32 | seed_low
    return draw_logistic_mixture_reference(
        params, seed, first, step, temperature, channels=channels, levels=levels or None, floor=floor
    )


def _mixture_fake(
    params: Tensor, seed_low: int, seed_high: int, first: int, step: int, temperature: float, channels: int,
    levels: int, floor: float,
) -> Tensor:  # fmt: skip
    return params.new_empty((*params.shape[:-1], channels), dtype=torch.float32)


@torch.library.custom_op("fastgen::draw_categorical", mutates_args=())
def draw_class(logits: Tensor, seed_low: int, seed_high: int, first: int, step: int, temperature: float) -> Tensor:
    """See `fastgen.ops.draw_categorical`; the seed in two words of 32 bits."""
    y = _class_fake(logits, seed_low, seed_high, first, step, temperature)
    if y.numel() == 0:
        return y
    if uses_kernel(logits):
        from fastgen.kernels import draw

        with on_device(logits):
            draw.categorical(logits.contiguous(), y, (seed_low, seed_high), first, step, temperature)
        return y
    return draw_categorical_reference(logits, seed_high << 32 | seed_low, first, step, temperature)


def _class_fake(logits: Tensor, seed_low: int, seed_high: int, first: int, step: int, temperature: float) -> Tensor:
    return logits.new_empty(logits.shape[:-1], dtype=torch.int64)


draw_mixture.register_fake(_mixture_fake)
draw_class.register_fake(_class_fake)
