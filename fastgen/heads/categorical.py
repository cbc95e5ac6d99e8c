"""Softmax over classes, and the ways in which forward may take a class."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fastgen.errors import ShapeError
from fastgen.heads.base import Head, check_layout
from fastgen.heads.choice import pick, pickable, possible, unequal, variation

ENCODINGS = ("index", "onehot", "unit", "symmetric", "mulaw")


def encoding_table(n: int, encode: str | Tensor) -> Tensor | None:
    """What forward takes for each of n classes: float32 [n, enc], or None for the index itself.

    "unit": k / (n - 1). "symmetric": 2 k / (n - 1) - 1. "mulaw": the companding law of ITU-T G.711 in its
    continuous form, x = sign(y) ((1 + mu)^|y| - 1) / mu with mu = n - 1 and y = 2 k / mu - 1. A tensor:
    itself.
    """
    if isinstance(encode, Tensor):
        if encode.dim() != 2 or encode.shape[0] != n or encode.shape[1] < 1 or not encode.is_floating_point():
            raise ShapeError(f"encode is a table {encode.dtype} {list(encode.shape)}; expected floats [{n}, enc]")
        return encode.detach().to("cpu", torch.float32, copy=True)
    if encode not in ENCODINGS:
        raise ValueError(f"encode={encode!r}: expected a table [{n}, enc] or one of {', '.join(map(repr, ENCODINGS))}")
    if encode == "index":
        return None
    if encode == "onehot":
        return torch.eye(n)
    mu = n - 1
    y = torch.arange(n, dtype=torch.float64) / mu
    if encode != "unit":
        y = 2 * y - 1
    if encode == "mulaw":
        y = y.sign() * torch.expm1(y.abs() * math.log1p(mu)) / mu
    return y.to(torch.float32)[:, None]


@dataclass(frozen=True, eq=False, init=False)
class Categorical(Head):
    """n classes with one logit each; a step draws one value channel.

    encode: what forward takes for a class, "index" (int64), "onehot", "unit", "symmetric", "mulaw" or a table
    [n, enc]; see `encoding_table`. Values are class indices.
    """

    n: int
    encoding: str | Tensor
    params: str

    name: ClassVar[str] = "Categorical"
    kind: ClassVar[int] = 1
    discrete: ClassVar[bool] = True

    def __init__(self, n: int, encode: str | Tensor = "index", params: str = "auto") -> None:
        if n < 2:
            raise ValueError(f"n={n}: expected at least two classes")
        check_layout(params)
        table = encoding_table(n, encode)
        fields = {
            "n": n,
            "encoding": table if isinstance(encode, Tensor) else encode,
            "params": params,
            "table": table,
            "enc": 1 if table is None else table.shape[1],
            "indices": True,
            "integer_input": table is None,
        }
        for key, value in fields.items():
            object.__setattr__(self, key, value)

    def num_params(self, channels: int) -> int:
        return self.n

    def num_uniforms(self, channels: int) -> int:
        return 1

    def _draw(self, params: Tensor, uniforms: Tensor, temperature: float, known: Tensor | None) -> Tensor:
        drawn = pick(params, uniforms[..., 0], temperature).to(torch.float64)
        return torch.where(possible(params), drawn, math.nan)[..., None]

    def _distance(self, a: Tensor, b: Tensor) -> Tensor:
        return variation(a, b)

    def _mismatch(self, a: Tensor, b: Tensor) -> Tensor:
        return unequal(a, b)

    def log_prob(self, params: Tensor, value: Tensor) -> Tensor:
        self._channels_of(params.shape[-1])
        log_p = params.log_softmax(-1)
        index = self._index(value)
        lead = np.broadcast_shapes(log_p.shape[:-1], index.shape[:-1])
        return log_p.expand(*lead, self.n).gather(-1, index.expand(*lead, 1))[..., 0]

    def _explained(self, params: Tensor, error: Tensor, uniforms: Tensor, value: Tensor, t: float) -> Tensor:
        likely = pickable(params, error, uniforms[..., 0], t)
        value = value.expand(*likely.shape[:-1], 1)
        index = value.nan_to_num(-1).clamp(0, self.n - 1).long()  # what is no class of ours has no explanation
        return (likely.gather(-1, index) & (index == value))[..., 0]
