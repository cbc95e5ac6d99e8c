"""Weights: are they finite, and are they still those that a sampler was compiled with?"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastgen.errors import FastgenError


def check_finite(model: nn.Module) -> None:
    """Raises FastgenError naming the first parameter or buffer that holds NaN or infinity."""
    for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, t in tensors:
            if not t.is_floating_point():
                continue
            bad = ~t.detach().isfinite() if kind == "parameter" else t.detach().isnan()
            if bool(bad.any()):
                raise FastgenError(
                    f"{kind} {name} {tuple(t.shape)} holds {int(bad.sum())} values that are NaN or infinite; "
                    "expected finite weights"
                )


@dataclass(frozen=True)
class Mark:
    """What a tensor of weights was: where it lay, its version, a quick sum of its bits and a checksum of its bytes."""

    shape: tuple[int, ...]
    place: tuple[int, int]
    total: int
    checksum: int


def fingerprint(model: nn.Module) -> dict[str, Mark]:
    """A mark for every parameter and buffer."""
    return {name: Mark(tuple(t.shape), _place(t), _total(t), _checksum(t)) for name, t in _weights(model)}


def changed(model: nn.Module, marks: dict[str, Mark]) -> str | None:
    """The first parameter or buffer that is not what it was, if any.

    A tensor that torch has not seen change is checked by its sum alone, which costs one read of the weights; `.data`
    writes do not tell torch, and are found by that.
    """
    for name, t in _weights(model):
        mark = marks.get(name)
        if mark is None or tuple(t.shape) != mark.shape:
            return name
        if _place(t) == mark.place:
            if _total(t) != mark.total:
                return name
        elif _checksum(t) != mark.checksum:
            return name
    return None


def _weights(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, t.detach()) for name, t in [*model.named_parameters(), *model.named_buffers()]]


def _place(t: Tensor) -> tuple[int, int]:
    return t.data_ptr(), 0 if t.is_inference() else t._version


def _bytes(t: Tensor) -> Tensor:
    return t.contiguous().reshape(-1).view(torch.uint8)


def _total(t: Tensor) -> int:
    """Sum of the bits as integers, eight bytes at a time."""
    raw = _bytes(t)
    whole = raw.numel() // 8 * 8
    return int(raw[:whole].view(torch.int64).sum()) + int(raw[whole:].sum())


def _checksum(t: Tensor) -> int:
    """CRC-32 of the bytes: a swap of two rows changes it too."""
    return zlib.crc32(_bytes(t).cpu().numpy().data) if t.numel() else 0
