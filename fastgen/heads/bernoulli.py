"""Two classes from one logit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastgen.heads.base import Head, check_layout
from fastgen.heads.categorical import encoding_table


@dataclass(frozen=True, eq=False, init=False)
class Bernoulli(Head):
    """The value is 1 with probability sigmoid(logit), else 0; a step draws one value channel.

    encode: what forward takes, "unit" (0 and 1, the value itself) or "symmetric" (-1 and 1).
    """

    encoding: str
    params: str

    name: ClassVar[str] = "Bernoulli"
    kind: ClassVar[int] = 2
    discrete: ClassVar[bool] = True

    def __init__(self, encode: str = "unit", params: str = "auto") -> None:
        if encode not in ("unit", "symmetric"):
            raise ValueError(f"encode={encode!r}: expected 'unit' or 'symmetric'")
        check_layout(params)
        symmetric = encode == "symmetric"
        fields = {
            "n": 2,
            "encoding": encode,
            "params": params,
            "table": encoding_table(2, encode) if symmetric else None,
            "indices": symmetric,
        }
        for key, value in fields.items():
            object.__setattr__(self, key, value)

    def num_params(self, channels: int) -> int:
        return 1

    def num_uniforms(self, channels: int) -> int:
        return 1

    def _draw(self, params: Tensor, uniforms: Tensor, temperature: float, known: Tensor | None) -> Tensor:
        drawn = (uniforms < torch.sigmoid(params / temperature)).to(torch.float64)
        return torch.where(params.isnan(), math.nan, drawn)

    def _distance(self, a: Tensor, b: Tensor) -> Tensor:
        return (torch.sigmoid(a) - torch.sigmoid(b)).abs()[..., 0]

    def _mismatch(self, a: Tensor, b: Tensor) -> Tensor:
        return self._distance(a, b)

    def log_prob(self, params: Tensor, value: Tensor) -> Tensor:
        self._channels_of(params.shape[-1])
        return logsigmoid(torch.where(self._index(value) == 1, params, -params))[..., 0]

    def _explained(self, params: Tensor, error: Tensor, uniforms: Tensor, value: Tensor, t: float) -> Tensor:
        one = uniforms < torch.sigmoid((params + error) / t)
        zero = uniforms >= torch.sigmoid((params - error) / t)
        return torch.where(value == 1, one, zero & (value == 0))[..., 0]
