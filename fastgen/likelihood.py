"""Likelihood of given samples: one teacher-forced forward a batch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.forward import FORWARD_ERRORS, refused
from fastgen.spec import Spec
from fastgen.teacher_forced import by_step, forward_parameters

BATCH = 16


def log_prob(model: nn.Module, spec: Spec, values: Tensor, cond: tuple[Any, ...]) -> Tensor:
    """Nats of each sample: values [n, H*W, C] -> [n]."""
    out = []
    for a in range(0, len(values), BATCH):
        part = values[a : a + BATCH]
        here = tuple(c[a : a + BATCH] if isinstance(c, Tensor) and c.dim() else c for c in cond)
        try:
            params = forward_parameters(model, spec, part, here)
        except FORWARD_ERRORS as error:
            raise refused(spec.encode(part), here, error) from error
        out.append(spec.head.log_prob(params.double(), by_step(spec, part).double()).sum(1))
    return torch.cat(out) if out else torch.zeros(0, dtype=torch.float64)


def bits_per_dim(nats: Tensor, spec: Spec) -> Tensor:
    """-log2 p per value."""
    return -nats / (math.log(2) * spec.grid[0] * spec.grid[1] * spec.channels)
