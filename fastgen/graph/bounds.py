"""Between which two numbers the values of a node lie, where that is known: arithmetic of ranges."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Range = tuple[float, float] | None  # None: not known


def _corners(fn: Callable[[float, float], float]) -> Callable[..., Range]:
    """The range of a function that is largest and smallest at corners."""

    def of(a: tuple[float, float], b: tuple[float, float]) -> Range:
        values = [fn(x, y) for x in a for y in b]
        return (min(values), max(values)) if all(map(math.isfinite, values)) else None

    return of


def _affine(a: tuple[float, float], imm: tuple[float, ...]) -> Range:
    values = [x * imm[0] + imm[1] for x in a]
    return min(values), max(values)


def _remainder(a: tuple[float, float], b: tuple[float, float]) -> Range:
    return None if b[0] <= 0 <= b[1] else (min(b[0], 0.0), max(b[1], 0.0))


def _quotient(a: tuple[float, float], b: tuple[float, float]) -> Range:
    return None if b[0] <= 0 <= b[1] else _corners(lambda x, y: x / y)(a, b)


def _abs(a: tuple[float, float]) -> Range:
    return (0.0 if a[0] <= 0 <= a[1] else min(map(abs, a))), max(map(abs, a))


BOUNDED: dict[str, tuple[float, float]] = {
    "tanh": (-1, 1), "sigmoid": (0, 1), "sin": (-1, 1), "cos": (-1, 1), "sign": (-1, 1), "erf": (-1, 1),
    **dict.fromkeys(["not", "eq", "ne", "gt", "ge", "lt", "le", "and", "or"], (0, 1)),
}  # fmt: skip
ROUNDED: dict[str, Callable[[float], int]] = {
    "floor": math.floor,
    "ceil": math.ceil,
    "round": round,
    "trunc": math.trunc,
}
BINARY: dict[str, Callable[..., Range]] = {
    "add": _corners(lambda x, y: x + y), "sub": _corners(lambda x, y: x - y), "mul": _corners(lambda x, y: x * y),
    "maximum": _corners(max), "minimum": _corners(min), "remainder": _remainder, "div": _quotient,
}  # fmt: skip


def _whole_remainder(b: tuple[float, float]) -> Range:
    """Of whole numbers."""
    return None if b[0] <= 0 <= b[1] else (min(b[0] + 1, 0.0), max(b[1] - 1, 0.0))


def range_of_map(fn: str, operands: list[Range], imm: tuple[float, ...]) -> Range:
    """The range of fn(operands; imm), a function of csrc/functions.def."""
    if fn in BOUNDED:
        return BOUNDED[fn]
    first = operands[0]
    if fn == "clamp":
        low, high = imm[0], imm[1]
        lo, hi = (-math.inf, math.inf) if first is None else first
        return min(max(lo, low), high), min(max(hi, low), high)
    if fn == "where":
        return union(operands[1:])
    if fn == "relu":
        return None if first is None else (max(0.0, first[0]), max(0.0, first[1]))
    known = [r for r in operands if r is not None]
    if len(known) < len(operands) or not known:
        return None
    a = known[0]
    if fn == "remainder" and imm:
        return _whole_remainder(known[1])
    if fn in BINARY:
        return BINARY[fn](a, known[1])
    if fn in ROUNDED and all(map(math.isfinite, a)):
        return float(ROUNDED[fn](a[0])), float(ROUNDED[fn](a[1]))
    if fn == "muladd":
        times = BINARY["mul"](a, known[1])
        return None if times is None else BINARY["add"](times, known[2])
    if fn == "affine":
        return _affine(a, imm)
    return {"copy": a, "neg": (-a[1], -a[0]), "abs": _abs(a)}.get(fn)


def union(ranges: list[Range]) -> Range:
    """The range of values out of any of them."""
    known = [r for r in ranges if r is not None]
    if len(known) < len(ranges) or not known:
        return None
    return min(r[0] for r in known), max(r[1] for r in known)


def of_values(t: Tensor) -> Range:
    """The range of given numbers."""
    if not t.numel() or t.is_complex():
        return None
    low, high = (float(v) for v in torch.aminmax(t.detach().reshape(-1).to(torch.float64)))
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None
