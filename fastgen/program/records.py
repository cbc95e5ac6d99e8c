"""The program's tables: the structs of csrc/plan.h, one named tuple each, and the numpy dtypes that mirror them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple, get_type_hints

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Long = Annotated[int, "i8"]

PANEL = 16
STATE, INPUT, COND, CONST = 0, 1, 2, 3


class Buffer(NamedTuple):
    """Storage of one node's activations."""

    channels: int
    rows: int
    cols: int
    ring_rows: int
    ring_cols: int
    kind: int
    offset: Long


class Tap(NamedTuple):
    """Where a vector of channels is read."""

    buf: int
    chan: int
    nchan: int
    mul_i: int
    mul_j: int
    div_i: int
    div_j: int
    off_i: int
    off_j: int
    lo_i: int
    hi_i: int
    lo_j: int
    hi_j: int


class Micro(NamedTuple):
    """One micro-op of a vector program."""

    fn: int
    dst: int
    a: int
    b: int
    c: int
    n: int
    imm0: float
    imm1: float
    imm2: float


class Op(NamedTuple):
    """A linear part and the vector program behind it."""

    tap0: int
    ntaps: int
    acc: int
    k: int
    weights: Long
    bias: int
    site_bias: int
    partial: int
    code0: int
    ncode: int
    scratch: int
    up_i: int
    up_j: int
    par_i: int
    par_j: int
    q_rows: int
    q_cols: int
    advance: int


class Item(NamedTuple):
    """An op at some of its sites."""

    op: int
    q0: int
    count: int  # type: ignore[assignment]  # a tuple has a method of that name, which nobody calls
    qstep: int


class Head(NamedTuple):
    """How the parameters at a site become a value."""

    kind: int
    channels: int
    phases: int
    n: int
    levels: int
    params: int
    input: int
    enc: int
    table: int
    delay: int
    start: int
    floor_log_scale: float
    clip_lo: float
    clip_hi: float


def dtype_of(record: type) -> np.dtype[Any]:
    """The structured dtype of a record, laid out as C does."""
    fields: list[tuple[str, Any]] = []
    for name, kind in get_type_hints(record, include_extras=True).items():
        fields.append((name, getattr(kind, "__metadata__", ({int: "i4", float: "f4"}.get(kind),))[0]))
    return np.dtype(fields, align=True)


def table(records: list[Any], record: type) -> Array:
    """Records as one array."""
    return np.array([tuple(r) for r in records], dtype_of(record))


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
    step_phase: Array
    param_ptr: Array
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
        tables = {k: v for k, v in self.__dict__.items() if k != "cond"}
        return {**tables, "head": self.head.reshape(1)}
