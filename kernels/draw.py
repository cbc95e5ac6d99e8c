"""Draws from mixtures of logistics and from softmaxes, with the counters of fastgen/rng.py.

A program owns BM draws; a draw is number r of [n, S], so sample first + r / S at step + r % S, and its uniforms are one
block of Philox: lane 0 picks the component or class, the others are the noise of the channels. Parameters are widened to
float64, all between is float64, and the value is rounded to float32 once, as in fastgen/heads and csrc/heads.h: two
implementations then differ only where a uniform lies within about 1e-14 of a boundary. The pick is an inverse CDF: how
many cumulative sums are not above u times the total. A softmax goes through its classes in blocks, thrice (maximum,
total, count), since a vocabulary need not fit in registers; after the first time they come from L2.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels.common import cdiv, philox, power_of_two, unit_interval

DRAWS = 32  # draws of a program over mixtures; M is small
CLASSES = 1024  # numbers of a program over classes: draws times classes at a time
WORDS = ["k0", "k1", "first", "step"]  # of any value: not to be specialised by it


@triton.jit
def bits(row, S, k0, k1, first, step):
    """The four random words of draw `row`."""
    sample = tl.cast(first, tl.int64) + row // S
    at = (tl.cast(step, tl.int64) + row % S).to(tl.uint32)
    low = (sample & 0xFFFFFFFF).to(tl.uint32)
    high = (sample >> 32).to(tl.uint32)
    return philox(at * 0, at, low, high, tl.cast(k0, tl.uint32), tl.cast(k1, tl.uint32))


@triton.jit
def rounded(x, half, GRID: tl.constexpr):
    """Clipped, on the grid and in float32 precision. Adding 1.5 * 2**52 rounds to an integer, halves to even."""
    x = tl.where(x < -1.0, -1.0, tl.where(x > 1.0, 1.0, x))  # a NaN stays one
    if GRID:
        x = ((x + 1.0) * half + 6755399441055744.0 - 6755399441055744.0) / half - 1.0
    return x.to(tl.float32)


@triton.jit
def one_value(own, N, live, bit, temperature, floor):
    """Mean, and the noise to be added to it, of the channel whose mean is at `own`."""
    ls = tl.load(own + N, mask=live, other=0.0).to(tl.float64)
    floor = tl.cast(floor, tl.float64)
    u = unit_interval(bit)
    noise = tl.exp(tl.where(ls < floor, floor, ls)) * temperature * (tl.log(u) - tl.log(1.0 - u))
    return tl.load(own, mask=live, other=0.0).to(tl.float64), noise


@triton.jit
def coefficient(at, live):
    x = tl.load(at, mask=live, other=0.0).to(tl.float64)
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit(do_not_specialize=WORDS)
def mixture_draw(
    params, out, rows, S, N, k0, k1, first, step, temperature, floor, levels,
    CHANNELS: tl.constexpr, GRID: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """params [rows, 3 N or 10 N] -> out [rows, CHANNELS]."""
    KINDS: tl.constexpr = 3 if CHANNELS == 3 else 2
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    live = row < rows
    base = params + row * (N + CHANNELS * KINDS * N)
    r0, r1, r2, r3 = bits(row, S, k0, k1, first, step)
    t = tl.cast(temperature, tl.float64)
    m = tl.arange(0, BN)[None, :]
    own = live[:, None] & (m < N)
    logits = tl.load(base[:, None] + m, mask=own, other=float("-inf")).to(tl.float64)
    p = tl.exp((logits - tl.max(logits, 1)[:, None]) / t)
    p = tl.where(own, p, 0.0)
    target = unit_interval(r0) * tl.sum(p, 1)
    above = tl.cumsum(p, 1) > target[:, None]
    k = tl.sum(tl.where(own & (above == 0), 1, 0), 1)
    at = base + N + tl.minimum(k, N - 1)
    half = tl.cast(levels - 1, tl.float64) * 0.5
    mean, noise = one_value(at, N, live, r1, t, floor)
    x0 = rounded(mean + noise, half, GRID)
    tl.store(out + row * CHANNELS, x0, mask=live)
    if CHANNELS == 3:
        mean, noise = one_value(at + 3 * N, N, live, r2, t, floor)
        mean += coefficient(at + 2 * N, live) * x0.to(tl.float64)
        x1 = rounded(mean + noise, half, GRID)
        tl.store(out + row * 3 + 1, x1, mask=live)
        mean, noise = one_value(at + 6 * N, N, live, r3, t, floor)
        mean += coefficient(at + 5 * N, live) * x0.to(tl.float64)
        mean += coefficient(at + 8 * N, live) * x1.to(tl.float64)
        tl.store(out + row * 3 + 2, rounded(mean + noise, half, GRID), mask=live)


@triton.jit(do_not_specialize=WORDS)
def class_draw(
    logits, out, rows, S, K, k0, k1, first, step, temperature, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """logits [rows, K] -> out [rows], int64."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    live = row < rows
    base = (logits + row * K)[:, None]
    t = tl.cast(temperature, tl.float64)
    most = tl.full((BM,), float("-inf"), tl.float64)
    for start in range(0, K, BN):
        k = start + tl.arange(0, BN)[None, :]
        z = tl.load(base + k, mask=live[:, None] & (k < K), other=float("-inf")).to(tl.float64)
        most = tl.maximum(most, tl.max(z, 1))
    total = tl.zeros((BM,), tl.float64)
    for start in range(0, K, BN):
        k = start + tl.arange(0, BN)[None, :]
        own = live[:, None] & (k < K)
        z = tl.load(base + k, mask=own, other=0.0).to(tl.float64)
        total += tl.sum(tl.where(own, tl.exp((z - most[:, None]) / t), 0.0), 1)
    r0, _, _, _ = bits(row, S, k0, k1, first, step)
    target = unit_interval(r0) * total
    before = tl.zeros((BM,), tl.float64)
    picked = tl.zeros((BM,), tl.int32)
    for start in range(0, K, BN):
        k = start + tl.arange(0, BN)[None, :]
        own = live[:, None] & (k < K)
        z = tl.load(base + k, mask=own, other=0.0).to(tl.float64)
        p = tl.where(own, tl.exp((z - most[:, None]) / t), 0.0)
        above = before[:, None] + tl.cumsum(p, 1) > target[:, None]
        picked += tl.sum(tl.where(own & (above == 0), 1, 0), 1)
        before += tl.sum(p, 1)
    tl.store(out + row, tl.minimum(picked, K - 1).to(tl.int64), mask=live)


def logistic_mixture(
    params: Tensor, out: Tensor, seed: tuple[int, int], first: int, step: int, temperature: float, levels: int,
    floor: float,
) -> None:  # fmt: skip
    """Fills out [n, (S,) C] from params [n, (S,) P]; seed in two words, levels 0: continuous."""
    channels = out.shape[-1]
    rows = out.numel() // channels
    n = params.shape[-1] // (3 if channels == 1 else 10)
    mixture_draw[(cdiv(rows, DRAWS),)](
        params, out, rows, rows // out.shape[0], n, *seed, first, step, temperature, floor, levels,
        channels, levels > 0, BM=DRAWS, BN=max(2, power_of_two(n)), num_warps=4,
    )  # fmt: skip


def categorical(logits: Tensor, out: Tensor, seed: tuple[int, int], first: int, step: int, temperature: float) -> None:
    """Fills out [n, (S)] from logits [n, (S,) K]; seed in two words."""
    classes = logits.shape[-1]
    columns = min(CLASSES, max(16, power_of_two(classes)))
    rows = CLASSES // columns
    class_draw[(cdiv(out.numel(), rows),)](
        logits, out, out.numel(), out.numel() // out.shape[0], classes, *seed, first, step, temperature,
        BM=rows, BN=columns, num_warps=4,
    )  # fmt: skip
