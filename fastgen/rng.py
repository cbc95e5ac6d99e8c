"""Noise from counters: Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011).

A uniform is a function of its name alone: seed, sample, step, and number within the step. Key: the seed.
Counter: (block, step, sample low, sample high); uniform j is lane j % 4 of block j // 4. csrc/rng.h makes the
same numbers.
"""

from __future__ import annotations

import operator
from typing import SupportsIndex

import torch
from torch import Tensor

from fastgen.errors import ShapeError

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four words of counter, two of key -> four random words.

    Words are unsigned 32-bit numbers in int64 tensors of shapes that broadcast.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _multiply(a: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a 64-bit product, by halves of x so that no signed product overflows."""
    low, high = a * (x & 0xFFFF), a * (x >> 16)
    return (high + (low >> 16)) >> 16, (((high & 0xFFFF) << 16) + low) & _MASK


def uniforms(seed: int, samples: Tensor, step: int | Tensor, count: int) -> Tensor:
    """The first `count` uniforms of a step, or of several, for each sample.

    samples: int64 [n], indices from 0. step: an int, or int64 [S]; from 0 to 2**32 - 1. Returns float64 [n,
    count], or [n, S, count]: odd multiples of 2**-33, so exact and strictly inside (0, 1). On the device of
    `samples`. Raises ShapeError when samples or step have another rank or dtype, ValueError outside the
    ranges.
    """
    seed = seed_of(seed)
    if samples.dim() != 1 or samples.dtype != torch.int64:
        raise ShapeError(f"samples are {samples.dtype} {list(samples.shape)}; expected torch.int64 indices [n]")
    given = step if isinstance(step, Tensor) else torch.tensor([step])
    if given.dim() != 1 or given.dtype != torch.int64:
        raise ShapeError(f"step is {given.dtype} {list(given.shape)}; expected an int, or torch.int64 [S]")
    _check_range("samples", samples, 2**63)
    _check_range("step", given, 2**32)
    steps = given.to(samples.device)
    if count < 1:
        raise ValueError(f"count={count}: expected at least one uniform")
    block = torch.arange((count + 3) // 4, device=samples.device)
    sample = samples[:, None, None]
    words = philox((block, steps[:, None], sample & _MASK, (sample >> 32) & _MASK), (seed & _MASK, seed >> 32))
    shape = (samples.shape[0], steps.shape[0], block.shape[0])
    bits = torch.stack([word.expand(shape) for word in words], dim=-1).flatten(-2)[..., :count]
    u = (bits.to(torch.float64) + 0.5) * 2.0**-32
    return u if isinstance(step, Tensor) else u[:, 0]


def _check_range(what: str, x: Tensor, end: int) -> None:
    outside = x[(x < 0) | (x > end - 1)]
    if outside.numel():
        raise ValueError(f"{what}={outside[0].item()}: expected numbers from 0 to {end - 1}")


def seed_of(seed: SupportsIndex | torch.Generator) -> int:
    """A seed from 0 to 2**64 - 1: an integer as it is, a Generator by one 63-bit number drawn from it.

    The global random state is not touched. Raises TypeError or ValueError for anything else.
    """
    if isinstance(seed, torch.Generator):
        high = 2**63 - 1
        return int(torch.randint(high, (), generator=seed, device=seed.device, dtype=torch.int64).item())
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise TypeError(f"seed is a {type(seed).__name__}; expected an int or a torch.Generator")
    number = operator.index(seed)
    if not 0 <= number < 2**64:
        raise ValueError(f"seed={number}: expected a number from 0 to 2**64 - 1")
    return number
