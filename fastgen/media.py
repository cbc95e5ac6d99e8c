"""Values and what is seen or heard of them: pixels and audio."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastgen.heads import Head
from fastgen.heads.categorical import encoding_table
from fastgen.spec import Spec


def _ends(head: Head) -> tuple[float, float]:
    """The values shown as black and as white."""
    if head.indices or head.discrete:
        return 0.0, head.n - 1.0
    low, high = head.clip or (-1.0, 1.0)
    return (low, high) if math.isfinite(low) and math.isfinite(high) else (-1.0, 1.0)


def to_pixels(samples: Tensor, spec: Spec) -> Tensor:
    """What sample() returns for images, [n, ...], as uint8 [n, C, H, W], spread over 0 to 255."""
    low, high = _ends(spec.head)
    values = spec.values(samples).double()
    pixels = ((values - low) / (high - low) * 255.0).round().clamp(0, 255).to(torch.uint8)
    return pixels.transpose(1, 2).reshape(len(samples), spec.channels, *spec.grid)


def from_pixels(pixels: Tensor, spec: Spec) -> Tensor:
    """An image, uint8 [C, H, W], as values [1, H*W, C]: the level nearest to each pixel."""
    low, high = _ends(spec.head)
    unit = pixels.reshape(1, spec.channels, -1).transpose(1, 2).double() / 255.0
    levels = spec.head.n if spec.head.indices or spec.head.discrete else spec.head.grid_levels
    if levels:
        unit = (unit * (levels - 1)).round() / (levels - 1)
    return (low + unit * (high - low)).float()


def _amplitudes(head: Head) -> Tensor | None:
    """Amplitude of every class [n], None where values are amplitudes. Without a code of its own: mu-law."""
    if not head.indices:
        return None
    table = head.table if head.table is not None and head.enc == 1 else encoding_table(head.n, "mulaw")
    assert table is not None
    return table[:, 0]


def to_audio(samples: Tensor, spec: Spec) -> Tensor:
    """What sample() returns for audio, [n, ...], as amplitudes float32 [n, T]. ValueError if not mono."""
    if spec.channels != 1:
        raise ValueError(f"samples {spec.shape} have {spec.channels} values at a time; expected one (mono)")
    values = spec.as_long_as(samples).values(samples)[:, :, 0]
    table = _amplitudes(spec.head)
    return values if table is None else table[values.long()]


def from_audio(signal: Tensor, spec: Spec) -> Tensor:
    """Amplitudes float [T] as values [1, T, 1]: the nearest class where values are classes."""
    table = _amplitudes(spec.head)
    if table is None:
        return signal.reshape(1, -1, 1)
    edges = (table[1:] + table[:-1]) / 2
    return torch.bucketize(signal.contiguous(), edges.contiguous()).float().reshape(1, -1, 1)
