"""The functions of map and reduction nodes (csrc/functions.def) in torch: what they mean."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "copy": lambda a: a, "neg": torch.neg, "exp": torch.exp, "log": torch.log, "tanh": torch.tanh,
    "sigmoid": torch.sigmoid, "relu": torch.relu, "abs": torch.abs, "sqrt": torch.sqrt, "rsqrt": torch.rsqrt,
    "sin": torch.sin, "cos": torch.cos, "reciprocal": torch.reciprocal, "log1p": torch.log1p, "expm1": torch.expm1,
    "erf": torch.erf, "sign": torch.sign, "floor": torch.floor, "ceil": torch.ceil, "round": torch.round,
    "trunc": torch.trunc, "not": lambda a: (a == 0).float(), "silu": F.silu, "gelu": F.gelu,
    "atan": torch.atan, "gelutanh": lambda a: F.gelu(a, approximate="tanh"),
}  # fmt: skip
WITH_IMM: dict[str, Callable[[Tensor, float, float, float], Tensor]] = {
    "elu": lambda a, p, q, r: torch.where(a > 0, q * a, q * p * torch.expm1(torch.clamp(a, max=0) * r)),
    "leakyrelu": lambda a, p, q, r: F.leaky_relu(a, p),
    "softplus": lambda a, p, q, r: F.softplus(a, p, q),
    "clamp": lambda a, p, q, r: torch.clamp(a, p, q),
    "affine": lambda a, p, q, r: a * p + q,
    "powscalar": lambda a, p, q, r: a**p,
    "scalarpow": lambda a, p, q, r: p**a,
}
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "maximum": torch.maximum,
    "minimum": torch.minimum, "pow": torch.pow, "eq": torch.eq, "ne": torch.ne, "gt": torch.gt, "ge": torch.ge,
    "lt": torch.lt, "le": torch.le, "and": lambda a, b: (a != 0) & (b != 0), "or": lambda a, b: (a != 0) | (b != 0),
    "remainder": torch.remainder,
}  # fmt: skip
REDUCE: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda a: a.sum(-1),
    "max": lambda a: a.amax(-1),
    "min": lambda a: a.amin(-1),
}


def arity(fn: str) -> int:
    """How many operands a function takes."""
    return 1 if fn in UNARY or fn in WITH_IMM else 2 if fn in BINARY else 3


def pointwise(fn: str, operands: list[Tensor], imm: tuple[float, ...]) -> Tensor:
    """fn(operands; imm) element by element."""
    if fn in UNARY:
        return UNARY[fn](operands[0])
    if fn in WITH_IMM:
        p, q, r = (*imm, 0.0, 0.0, 0.0)[:3]
        return WITH_IMM[fn](operands[0], p, q, r)
    if fn in BINARY:
        return BINARY[fn](*operands)
    a, b, c = operands
    return torch.where(a != 0, b, c) if fn == "where" else a * b + c
