"""The program's tables: numpy mirrors of the structs of csrc/plan.h, one record type each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

PANEL = 16
STATE, INPUT, COND, CONST = 0, 1, 2, 3


def _struct(*fields: tuple[str, Any]) -> np.dtype[Any]:
    return np.dtype([f if len(f) > 2 else (f[0], f[1]) for f in fields], align=True)


def _ints(names: str) -> list[tuple[str, Any]]:
    return [(n, "i4") for n in names.split()]


BUFFER = _struct(*_ints("channels rows cols ring_rows ring_cols kind"), ("offset", "i8"))
TAP = _struct(*_ints("buf chan nchan mul_i mul_j div_i div_j off_i off_j lo_i hi_i lo_j hi_j"))
MICRO = _struct(*_ints("fn dst a b c n"), ("imm0", "f4"), ("imm1", "f4"), ("imm2", "f4"))
OP = _struct(
    *_ints("tap0 ntaps acc k"), ("weights", "i8"),
    *_ints("bias site_bias partial code0 ncode scratch up_i up_j par_i par_j q_rows q_cols advance"),
)  # fmt: skip
ITEM = _struct(*_ints("op q0 count qstep"))
HEAD = np.dtype(
    [*_ints("kind channels phases n levels params tap0"), ("tap_ptr", "i4", (65,)),
     *_ints("input enc table delay start"), ("floor_log_scale", "f4"),
     ("clip_lo", "f4"), ("clip_hi", "f4")],
    align=True,
)  # fmt: skip

FN = {
    name: code
    for start, names in {
        0: "load store embed gather copy fill broadcast",
        16: "neg exp log tanh sigmoid relu abs sqrt rsqrt sin cos reciprocal log1p expm1 erf sign floor ceil round trunc "
        "not silu gelu gelutanh elu leakyrelu softplus clamp affine powscalar scalarpow",
        64: "add sub mul div maximum minimum pow eq ne gt ge lt le and or remainder muladd",
        96: "where",
        112: "sum max min",
    }.items()
    for code, name in enumerate(names.split(), start)
}
FN_NAME = {code: name for name, code in FN.items()}

Array = npt.NDArray[Any]


@dataclass
class Program:
    """What an executor runs; the fields are those of csrc/plan.h."""

    buffers: Array
    taps: Array
    code: Array
    ops: Array
    row_items: Array
    row_ptr: Array
    step_items: Array
    step_ptr: Array
    step_site: Array
    weights: Array  # float32 or uint16 (bfloat16)
    consts: Array
    head: Array
    rows: int
    cols: int
    steps: int
    row_len: int
    period: int
    arena: int
    cond: list[int] = field(default_factory=list)  # plan node behind each Cond buffer

    def tables(self) -> dict[str, Any]:
        """As the native executors take it."""
        return {k: v for k, v in self.__dict__.items() if k != "cond"}
