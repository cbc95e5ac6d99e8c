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


def several(model: nn.Module, spec: Spec, cond: tuple[Any, ...], n: int) -> tuple[tuple[Any, ...], Tensor]:
    """Conditioning of n samples, unlike each other as far as forward takes it, from one's (batch 1), in no order; and what
    forward gives for the first example values with each of them alone: [n, steps, P]."""
    found = [(cond, forward_parameters(model, spec, spec.example_values(1), cond))]
    for change, most in ((_next, 2), (_before, n), (_next, n)):  # a step up, some down, the rest up
        last = cond
        for _ in range(2 * n):
            following = _another(model, spec, last, (change,)) if len(found) < most else None
            if following is None:
                break
            last = following[0]
            found += [following] if not any(_alike(last, f) for f, _ in found) else []
    chosen = [found[k % len(found)] for k in sorted(range(n), key=lambda k: (k % 2 == 0, k))]
    conds = tuple(torch.cat([f[k] for f, _ in chosen]) if batched(c) else c for k, c in enumerate(cond))
    return conds, torch.cat([params for _, params in chosen])


def _in_turn(other: Tensor, c: Tensor) -> Tensor:
    """Every second sample of c [n, ...], from the first on, has other [1, ...]."""
    c = c.clone()
    c[::2] = other
    return c


def batched(c: Any) -> bool:
    return isinstance(c, Tensor) and c.dim() > 0


def another(model: nn.Module, spec: Spec, cond: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Conditioning unlike this one (batch 1) that forward takes, and of which its parameters are finite; None: not found."""
    found = _another(model, spec, cond, (_next, _before, _rolled))
    return None if found is None else found[0]


def _another(
    model: nn.Module, spec: Spec, cond: tuple[Any, ...], changes: tuple[Callable[[Tensor], Tensor], ...]
) -> tuple[tuple[Any, ...], Tensor] | None:
    """The same by some changes, and its parameters [1, steps, P]."""
    x = spec.example_values(1)
    for change in changes:
        tried = tuple(change(c) if batched(c) else c for c in cond)
        if _alike(tried, cond):
            continue
        try:
            params = forward_parameters(model, spec, x, tried)
        except Exception:  # a label that there is not, for one
            continue
        if bool(params.isfinite().any()):
            return tried, params
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
