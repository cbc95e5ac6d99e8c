"""What a proof is made on: other conditioning than the example that a plan was made with, and values that are given."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.backends.request import Request
from fastgen.spec import Spec
from fastgen.teacher_forced import forward_parameters


def variations(model: nn.Module, spec: Spec, request: Request) -> Request:
    """The request with what a proof is to hold for: every second sample has another conditioning than this one, where
    forward takes one that is found; and the last of several is half given."""
    other = another(model, spec, tuple(c[:1] if batched(c) else c for c in request.cond))
    cond = request.cond
    if other is not None:
        cond = tuple(_in_turn(o, c) if batched(c) else c for c, o in zip(cond, other, strict=True))
    if request.slots < 2:
        return replace(request, cond=cond)
    given = spec.example_values(request.slots)
    mask = torch.zeros_like(given, dtype=torch.bool)
    mask[-1, ::2] = True
    return replace(request, cond=cond, given=given, mask=mask)


def several(model: nn.Module, spec: Spec, cond: tuple[Any, ...], n: int) -> tuple[Any, ...]:
    """Conditioning of n samples, unlike each other as far as forward takes it, from one's (batch 1)."""
    found = [cond]
    while len(found) < n:
        found.append(another(model, spec, found[-1]) or found[0])
    return tuple(torch.cat([f[k] for f in found]) if batched(c) else c for k, c in enumerate(cond))


def _in_turn(other: Tensor, c: Tensor) -> Tensor:
    """Every second sample of c [n, ...], from the first on, has other [1, ...]."""
    c = c.clone()
    c[::2] = other
    return c


def batched(c: Any) -> bool:
    return isinstance(c, Tensor) and c.dim() > 0


def another(model: nn.Module, spec: Spec, cond: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Conditioning unlike this one (batch 1) that forward takes, and of which its parameters are finite; None: not found."""
    x = spec.example_values(1)
    for change in (_next, _before, _rolled):
        tried = tuple(change(c) if batched(c) else c for c in cond)
        if all(torch.equal(a, b) for a, b in zip(tried, cond, strict=True) if batched(a)):
            continue
        try:
            if bool(forward_parameters(model, spec, x, tried).isfinite().any()):
                return tried
        except Exception:  # a label that there is not, for one
            continue
    return None


def _next(c: Tensor) -> Tensor:
    if c.dtype == torch.bool:
        return ~c
    return c.roll(1, -1) * 0.75 + 0.125 if c.is_floating_point() else c + 1


def _before(c: Tensor) -> Tensor:
    return c.roll(1, -1) if c.is_floating_point() or c.dtype == torch.bool else (c - 1).clamp(min=0)


def _rolled(c: Tensor) -> Tensor:
    return c.roll(1, -1)
