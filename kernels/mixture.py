"""Log-probability of pixels under a mixture of (discretised) logistics, and its gradient by the parameters.

A program owns BM pixels and holds all components of each as columns, M rounded up to a power of two: parameters are read
once, every intermediate stays in registers, one number a pixel is written. The gradient is a second run of the same
arithmetic rather than something kept: reading 10 M parameters again costs less than writing and reading as many
derivatives. Formulas are those of fastgen/heads/logistic_mixture.py. With bin ends a > b in units of the scale, sigmoid(a)
- sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(-w)), w = a - b, which neither cancels nor underflows; float32 without
expm1 needs log(1 - exp(-w)) as log w - w/2 + w^2/24 - w^4/2880 + w^6/181440 below w = 1, where the first term left out is
1e-7. The derivative by log w is then w / (e^w - 1). Strides are arguments: [B, P, H, W] seen as [B, H W, P] is read in place.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels.common import cdiv, power_of_two, sigmoid, tanh

# Pixels of a program by columns (components rounded up): 1,024 numbers of each parameter for four warps; half of that
# for the gradient, which holds twice as many of them at once.
ROWS = {16: 64, 64: 16, 256: 4, 1024: 1}


@triton.jit
def log_sigmoid(z):
    return tl.minimum(z, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(z)))


@triton.jit
def log_density(centred, ls):
    """Logistic density: value, derivatives by the mean's distance and by the log-scale."""
    inverse = tl.exp(-ls)
    z = centred * inverse
    slope = 1.0 - 2.0 * sigmoid(z)
    return z - ls + 2.0 * log_sigmoid(-z), slope * inverse, -1.0 - z * slope


@triton.jit
def log_bin(x, centred, ls, half_bin, log_bin_size):
    """Probability of the bin around x, the outermost ones open: value and derivatives as in log_density."""
    inverse = tl.exp(-ls)
    a = (centred + half_bin) * inverse
    b = (half_bin - centred) * inverse
    beyond_a = sigmoid(-a)
    beyond_b = sigmoid(-b)
    log_w = log_bin_size - ls
    w = tl.exp(log_w)
    w2 = w * w
    e = tl.exp(-w)
    narrow = w < 1.0
    few = log_w - 0.5 * w + w2 * (1.0 / 24 - w2 * (1.0 / 2880 - w2 * (1.0 / 181440)))
    slope_few = 1.0 - 0.5 * w + w2 * (1.0 / 12 - w2 * (1.0 / 720 - w2 * (1.0 / 30240)))
    rest = tl.where(narrow, 1.0, 1.0 - e)  # 1 where unused, so that no logarithm of zero is taken
    inside = tl.where(narrow, few, tl.log(rest))
    slope = tl.where(narrow, slope_few, w * e / rest)
    lowest = x < -1.0 + half_bin
    highest = x > 1.0 - half_bin
    in_a = log_sigmoid(a)
    in_b = log_sigmoid(b)
    value = tl.where(lowest, in_a, tl.where(highest, in_b, in_a + in_b + inside))
    by_mean = inverse * tl.where(lowest, beyond_a, tl.where(highest, -beyond_b, beyond_a - beyond_b))
    inner = -a * beyond_a - b * beyond_b - slope
    by_scale = tl.where(lowest, -a * beyond_a, tl.where(highest, -b * beyond_b, inner))
    return value, by_mean, by_scale


@triton.jit
def channel(x, mean, raw, half_bin, log_bin_size, floor, DISCRETE: tl.constexpr):
    """One colour under every component: value, derivatives by the mean and by the log-scale as given."""
    bounded = raw < floor
    ls = tl.where(bounded, floor, raw)  # a NaN stays one
    if DISCRETE:
        value, by_mean, by_scale = log_bin(x, x - mean, ls, half_bin, log_bin_size)
    else:
        value, by_mean, by_scale = log_density(x - mean, ls)
    return value, -by_mean, tl.where(bounded, 0.0, by_scale)


@triton.jit
def load(params, at, live):
    return tl.load(params + at, mask=live, other=0.0).to(tl.float32)


@triton.jit
def mixture(
    params, x, out, grad, result, rows, S, N, pb, ps, pp, xb, xs, xc, rb, rs, rp, half_bin, log_bin_size, floor,
    CHANNELS: tl.constexpr, DISCRETE: tl.constexpr, GRADIENT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out [rows]; or, with GRADIENT, result [B, S, P] from grad [rows]. Strides of params, x and result by b, s, last."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    m = tl.arange(0, BN)[None, :]
    b = (row // S)[:, None]
    s = (row % S)[:, None]
    there = (row < rows)[:, None]
    live = there & (m < N)
    params += b * pb + s * ps + m * pp
    x += b * xb + s * xs
    one = N * pp  # from a kind of parameter to the next
    logits = tl.load(params, mask=live, other=0.0).to(tl.float32)
    x0 = load(x, 0, there)
    mean0 = load(params, one, live)
    f0, mean_slope0, scale_slope0 = channel(
        x0, mean0, load(params, 2 * one, live), half_bin, log_bin_size, floor, DISCRETE
    )
    total = logits + f0
    if CHANNELS == 3:
        x1 = load(x, xc, there)
        x2 = load(x, 2 * xc, there)
        c0 = tanh(load(params, 3 * one, live))
        c1 = tanh(load(params, 6 * one, live))
        c2 = tanh(load(params, 9 * one, live))
        mean1 = load(params, 4 * one, live) + c0 * x0
        mean2 = load(params, 7 * one, live) + c1 * x0 + c2 * x1
        f1, mean_slope1, scale_slope1 = channel(
            x1, mean1, load(params, 5 * one, live), half_bin, log_bin_size, floor, DISCRETE
        )
        f2, mean_slope2, scale_slope2 = channel(
            x2, mean2, load(params, 8 * one, live), half_bin, log_bin_size, floor, DISCRETE
        )
        total += f1 + f2
    total = tl.where(m < N, total, float("-inf"))
    logits = tl.where(m < N, logits, float("-inf"))
    top = tl.max(total, 1)[:, None]
    top_logit = tl.max(logits, 1)[:, None]
    e = tl.exp(total - top)
    e_logit = tl.exp(logits - top_logit)
    sum_e = tl.sum(e, 1)[:, None]
    sum_logit = tl.sum(e_logit, 1)[:, None]
    if GRADIENT:
        g = load(grad, row[:, None], there)
        posterior = e / sum_e
        r = g * posterior
        result += b * rb + s * rs + m * rp
        one = N * rp
        tl.store(result, r - g * (e_logit / sum_logit), mask=live)
        tl.store(result + one, r * mean_slope0, mask=live)
        tl.store(result + 2 * one, r * scale_slope0, mask=live)
        if CHANNELS == 3:
            tl.store(result + 3 * one, r * mean_slope1 * x0 * (1.0 - c0 * c0), mask=live)
            tl.store(result + 4 * one, r * mean_slope1, mask=live)
            tl.store(result + 5 * one, r * scale_slope1, mask=live)
            tl.store(result + 6 * one, r * mean_slope2 * x0 * (1.0 - c1 * c1), mask=live)
            tl.store(result + 7 * one, r * mean_slope2, mask=live)
            tl.store(result + 8 * one, r * scale_slope2, mask=live)
            tl.store(result + 9 * one, r * mean_slope2 * x1 * (1.0 - c2 * c2), mask=live)
    else:
        y = top - top_logit + tl.log(sum_e) - tl.log(sum_logit)
        tl.store(out + row[:, None], y, mask=there)


def log_prob(params: Tensor, x: Tensor, out: Tensor, levels: int, floor: float) -> None:
    """Fills out [B, S], float32, contiguous, from params [B, S, P] and x [B, S, C] of any strides."""
    _launch(params, x, levels, floor, out=out, grad=None, result=None)


def gradient(grad: Tensor, params: Tensor, x: Tensor, result: Tensor, levels: int, floor: float) -> None:
    """Fills result [B, S, P], of any strides, with the gradient of params from grad [B, S]."""
    _launch(params, x, levels, floor, out=None, grad=grad.contiguous(), result=result)


def _launch(params: Tensor, x: Tensor, levels: int, floor: float, **tensors: Any) -> None:
    batch, sites, size = params.shape
    channels = x.shape[2]
    n = size // (3 if channels == 1 else 10)
    columns = max(2, power_of_two(n))
    result = tensors["result"]
    rows = next((count for most, count in ROWS.items() if columns <= most), 1)
    rows = rows if result is None else max(1, rows // 2)
    mixture[(cdiv(batch * sites, rows),)](
        params, x, *tensors.values(), batch * sites, sites, n, *params.stride(), *x.stride(),
        *(result.stride() if result is not None else (0, 0, 0)),
        1.0 / (levels - 1) if levels else 0.0, math.log(2.0 / (levels - 1)) if levels else 0.0, floor,
        channels, levels > 0, result is not None, BM=rows, BN=columns, num_warps=4,
    )  # fmt: skip
