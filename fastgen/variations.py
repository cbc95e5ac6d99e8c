"""What a proof is made on: other conditioning than the example that a plan was made with, and values that are given."""

from __future__ import annotations

from collections.abc import Callable
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
    """Conditioning of n samples, unlike each other as far as forward takes it, from one's (batch 1); in no order."""
    found = [cond]
    for changes, most in ((UPWARDS, 2), (DOWNWARDS, n), (UPWARDS, n)):  # a step up, some down, the rest up
        last = cond
        for _ in range(2 * n):
            following = another(model, spec, last, changes) if len(found) < most else None
            if following is None:
                break
            last = following
            found += [last] if not any(_alike(last, f) for f in found) else []
    chosen = [found[k % len(found)] for k in sorted(range(n), key=lambda k: (k % 2 == 0, k))]
    return tuple(torch.cat([f[k] for f in chosen]) if batched(c) else c for k, c in enumerate(cond))


def _in_turn(other: Tensor, c: Tensor) -> Tensor:
    """Every second sample of c [n, ...], from the first on, has other [1, ...]."""
    c = c.clone()
    c[::2] = other
    return c


def batched(c: Any) -> bool:
    return isinstance(c, Tensor) and c.dim() > 0


def another(
    model: nn.Module, spec: Spec, cond: tuple[Any, ...], changes: tuple[Callable[[Tensor], Tensor], ...] = ()
) -> tuple[Any, ...] | None:
    """Conditioning unlike this one (batch 1) that forward takes, and of which its parameters are finite; None: not found."""
    x = spec.example_values(1)
    for change in changes or (*UPWARDS, *DOWNWARDS, _rolled):
        tried = tuple(change(c) if batched(c) else c for c in cond)
        if _alike(tried, cond):
            continue
        try:
            if bool(forward_parameters(model, spec, x, tried).isfinite().any()):
                return tried
        except Exception:  # a label that there is not, for one
            continue
    return None


def _alike(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True) if batched(x))


def _next(c: Tensor) -> Tensor:
    if c.dtype == torch.bool:
        return ~c
    if not c.is_floating_point():
        return c + 1
    moved = c.roll(1, -1) * 0.75 + 0.125
    return torch.where(moved == c, c + 0.25, moved)  # a half, all of it, is where this ends


def _before(c: Tensor) -> Tensor:
    if c.dtype == torch.bool:
        return c.roll(1, -1)
    return c * 0.5 - 0.375 if c.is_floating_point() or c.is_complex() else (c - 1).clamp(min=0)


def _rolled(c: Tensor) -> Tensor:
    return c.roll(1, -1)


UPWARDS, DOWNWARDS = (_next,), (_before,)
