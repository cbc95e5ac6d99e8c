"""Weights: are they finite, and are they still those that a sampler was compiled with?"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastgen.errors import FastgenError

_WORD = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


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
    """Per parameter and buffer its shape and the sum of its bit patterns: any change of weights changes it."""
    marks = {}
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        marks[name] = (tuple(t.shape), _sum_of_bits(t.detach()))
    return marks


def _sum_of_bits(t: Tensor) -> int:
    if t.numel() == 0:
        return 0
    return int(t.contiguous().view(_WORD[t.element_size()]).sum(dtype=torch.int64)) if t.dtype != torch.bool else int(t.sum())
