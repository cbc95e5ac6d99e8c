"""Weights: are they finite, and are they still those that a sampler was compiled with?"""

from __future__ import annotations

import zlib

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


def fingerprint(model: nn.Module) -> dict[str, tuple[tuple[int, ...], int]]:
    """Per parameter and buffer its shape and a checksum of its bytes, in order: a swap of two rows changes it too."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: (tuple(t.shape), _checksum(t.detach())) for name, t in named}


def _checksum(t: Tensor) -> int:
    if t.numel() == 0:
        return 0
    return zlib.crc32(t.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
