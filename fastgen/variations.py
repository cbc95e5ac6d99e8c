"""What a proof is made on: other conditioning than the example that a plan was made with, and values that are given."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.backends.request import Request
from fastgen.spec import Spec
from fastgen.teacher_forced import forward_parameters

Others = list[tuple[tuple[Any, ...], Tensor]]


def variations(spec: Spec, request: Request, others: Others) -> Request:
    """The request with what a proof is to hold for: every second sample has the first of other conditionings, if there is
    any, and the last of several samples is half given."""
    cond = request.cond
    if others:
        cond = tuple(_in_turn(o, c) if batched(c) else c for c, o in zip(cond, others[0][0], strict=True))
    if request.slots < 2:
        return replace(request, cond=cond)
    given = spec.example_values(request.slots)
    mask = torch.zeros_like(given, dtype=torch.bool)
    mask[-1, ::2] = True
    return replace(request, cond=cond, given=given, mask=mask)


def others(model: nn.Module, spec: Spec, cond: tuple[Any, ...], most: int) -> Others:
    """Up to `most` conditionings unlike this one (batch 1) and each other that forward takes, and with which its parameters are
    finite; in no order. With each of them, what forward gives for the first example values: [1, steps, P]."""
    found: list[tuple[tuple[Any, ...], Tensor]] = []
    if not any(map(batched, cond)):
        return found
    for change, until in (
        (_next, 1),
        (_rolled, 1),
        (_before, most),
        (_next, most),
    ):  # a step up, some down, the rest up
        last = cond
        for _ in range(2 * most):
            tried = tuple(change(c) if batched(c) else c for c in last)
            if len(found) >= until or _alike(tried, last):
                break
            last = tried
            if any(_alike(tried, f) for f in (cond, *(f for f, _ in found))):
                continue
            params = _finite(model, spec, tried)
            if params is None:
                break
            found.append((tried, params))
    return found


def _in_turn(other: Tensor, c: Tensor) -> Tensor:
    """Every second sample of c [n, ...], from the first on, has other [1, ...]."""
    c = c.clone()
    c[::2] = other
    return c


def batched(c: Any) -> bool:
    return isinstance(c, Tensor) and c.dim() > 0


def first_of(cond: tuple[Any, ...]) -> tuple[Any, ...]:
    """The conditioning of the first sample (batch 1)."""
    return tuple(c[:1] if batched(c) else c for c in cond)


def _finite(model: nn.Module, spec: Spec, cond: tuple[Any, ...]) -> Tensor | None:
    """Parameters [1, steps, P]; None where forward does not take this conditioning, or none of them is finite."""
    try:
        params = forward_parameters(model, spec, spec.example_values(1), cond)
    except Exception:  # a label that there is not, for one
        return None
    return params if bool(params.isfinite().any()) else None


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
