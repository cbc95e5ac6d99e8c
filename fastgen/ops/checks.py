"""Arguments of the operations, checked once and before any launch: each error says what was given and expected."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastgen.errors import ShapeError

GATES = ("tanh", "linear", "none")
LIMIT = 2**31  # kernels address within a sample with 32-bit numbers


def describe(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"


def check_gate(op: str, gate: str) -> None:
    if gate not in GATES:
        raise ValueError(f"{op}: gate={gate!r}, expected one of {', '.join(map(repr, GATES))}")


def check_shape(op: str, name: str, x: Tensor, *expected: Sequence[int]) -> None:
    """Raises ShapeError unless x has one of the expected shapes."""
    if not any(tuple(x.shape) == tuple(shape) for shape in expected):
        wanted = " or ".join(str(list(shape)) for shape in expected)
        raise ShapeError(f"{op}: {name} is {describe(x)}, expected {wanted}")


def check_like(op: str, x: Tensor, others: dict[str, Tensor | None], dtype: bool = True) -> None:
    """Raises ShapeError unless all are on the device of x and, if so asked, of its dtype."""
    for name, other in others.items():
        if other is None:
            continue
        if other.device != x.device:
            raise ShapeError(f"{op}: {name} is on {other.device} and x on {x.device}, expected one device")
        if dtype and other.dtype != x.dtype:
            raise ShapeError(
                f"{op}: {name} is {describe(other)} and x {describe(x)}, expected one dtype; "
                "convert one, or run under torch.autocast"
            )


def check_float(op: str, name: str, x: Tensor, rank: int, axes: str) -> None:
    if x.dim() != rank or not x.is_floating_point():
        raise ShapeError(f"{op}: {name} is {describe(x)}, expected floating-point {axes}")


def check_size(op: str, what: str, *sample: int) -> None:
    """A sample must be addressable in 32 bits; batches may be of any size."""
    if math.prod(sample) >= LIMIT:
        raise ShapeError(f"{op}: a sample of {what} {list(sample)} has more than 2**31 - 1 values, expected fewer")


def layout_of(op: str, x: Tensor) -> bool:
    """Whether x [B, C, H, W] is channels-last (True) or contiguous (False). Raises ShapeError if neither."""
    if x.is_contiguous():
        return False
    if x.is_contiguous(memory_format=torch.channels_last):
        return True
    raise ShapeError(
        f"{op}: x {list(x.shape)} has strides {list(x.stride())}, expected a contiguous or channels-last tensor; "
        "call .contiguous() first"
    )


def ints(op: str, name: str, values: Sequence[int], count: int, least: int | None) -> list[int]:
    """A list of so many ints, none below `least`. Raises ValueError."""
    if len(values) != count or (least is not None and any(v < least for v in values)):
        bound = "" if least is None else f" of at least {least}"
        raise ValueError(f"{op}: {name}={tuple(values)}, expected {count} integers{bound}")
    return list(values)


def output_size(op: str, size: Sequence[int], kernel: Sequence[int], pads: Sequence[int], stride: Sequence[int],
                dilation: Sequence[int]) -> tuple[int, int]:  # fmt: skip
    """(H', W') of a convolution of an image (H, W); pads (left, right, top, bottom). Raises ShapeError."""
    padded = (size[0] + pads[2] + pads[3], size[1] + pads[0] + pads[1])
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    if padded[0] < reach[0] or padded[1] < reach[1]:
        raise ShapeError(
            f"{op}: a kernel {list(kernel)} of dilation {list(dilation)} covers {reach}, expected no more than the "
            f"padded input {list(padded)}"
        )
    return (padded[0] - reach[0]) // stride[0] + 1, (padded[1] - reach[1]) // stride[1] + 1
