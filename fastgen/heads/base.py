"""What all heads share: the protocol, the layouts of forward's output, and draws by inverse CDF.

Letters: B batch, * the sites' axes, C value channels of a site, n parameters of a step, P the same in
canonical order, U uniforms of a step, V values of a step (C for a head that draws a site at once, else 1).

Draws compute in float64 between float32 parameters and float32 values, as csrc/heads.h does: then no
library's exp or log, and no order of a sum, moves a decision unless the uniform lies within about 1e-15 of a
boundary.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from fastgen.errors import ShapeError

# The axes of forward's output after the batch: "S" stands for the sites' axes; letters in one string are one
# axis; a letter that is missing has size 1.
LAYOUTS: dict[str, tuple[str, ...]] = {
    "B(n*C)*": ("nC", "S"),
    "B(C*n)*": ("Cn", "S"),
    "BnC*": ("n", "C", "S"),
    "BCn*": ("C", "n", "S"),
    "BC*n": ("C", "S", "n"),
    "B*n": ("S", "n"),
    "B*(n*C)": ("S", "nC"),
    "B*(C*n)": ("S", "Cn"),
    "B*nC": ("S", "n", "C"),
    "B*Cn": ("S", "C", "n"),
    "B(*n)": ("Sn",),
    "B(n*)": ("nS",),
    "B*": ("S",),
}

_OFF_GRID = 1e-3  # of a step between levels: float32 scaling of images to [-1, 1] is a thousand times closer
# Relative and absolute error that an executor may add to a parameter by computing its draw in float32.
_ROUNDING = 2.0**-21


class Head(ABC):
    """How the parameters of a step become a value. Immutable; equal when class and arguments are.

    params: layout of forward's output, a key of `LAYOUTS` or "auto". A head that draws a site at once has one
    channel axis of size 1 in these names: its n are all parameters of a site.
    """

    name: ClassVar[str]
    kind: ClassVar[int]  # HeadKind of csrc/plan.h
    at_once: ClassVar[bool] = False  # True: one step draws all value channels of a site
    discrete: ClassVar[bool] = False  # values are class indices
    indices: bool = False  # sample() returns int64 class indices rather than what forward takes
    integer_input: bool = False  # forward takes int64 indices
    enc: int = 1  # channels of forward's input per value channel
    table: Tensor | None = None  # [classes, enc] what forward takes for each class; None: the value itself
    grid_levels: int = 0  # > 0: values are rounded to so many levels on [-1, 1]
    floor: float = 0.0  # lower bound of log-scales
    clip: tuple[float, float] | None = None  # range that drawn values are clipped to
    n: int  # mixture components, or classes
    params: str

    @abstractmethod
    def num_params(self, channels: int) -> int:
        """Parameters of a step, for `channels` value channels a site."""

    @abstractmethod
    def num_uniforms(self, channels: int) -> int:
        """Uniforms that a step takes, for `channels` value channels a site."""

    @abstractmethod
    def _draw(self, params: Tensor, uniforms: Tensor, temperature: float, known: Tensor | None) -> Tensor:
        """Float64 [..., P], [..., U] -> [..., V]."""

    @abstractmethod
    def log_prob(self, params: Tensor, value: Tensor) -> Tensor:
        """Log-likelihood in nats of value [..., V] under params [..., P]: [...], in the dtype of params."""

    @abstractmethod
    def _distance(self, a: Tensor, b: Tensor) -> Tensor:
        """As `distance`, of float64 parameters [..., P]."""

    @abstractmethod
    def _mismatch(self, a: Tensor, b: Tensor) -> Tensor:
        """As `mismatch`, of float64 parameters [..., P]."""

    @abstractmethod
    def _explained(self, params: Tensor, error: Tensor, uniforms: Tensor, value: Tensor, t: float) -> Tensor:
        """Whether parameters within `error` of `params` could have given `value`; all float64; bool [...]."""

    def fault_of(self, values: Tensor) -> str:
        """Why these values are none that the head draws; empty if they are."""
        if not bool(values.isfinite().all()):
            return "NaN or infinity"
        if self.discrete:
            wrong = values[(values < 0) | (values >= self.n) | (values != values.round())]
            what = f"no class index from 0 to {self.n - 1}"
        elif self.grid_levels:
            half = (self.grid_levels - 1) / 2  # steps of the grid on [-1, 1] are 1 / half
            steps = (values.double() + 1) * half
            wrong = values[(values.abs() > 1 + _OFF_GRID / half) | ((steps - steps.round()).abs() > _OFF_GRID)]
            what = (
                f"none of the {self.grid_levels} levels on [-1, 1] (for values between them compile with levels=None)"
            )
        else:
            return ""
        return f"{float(wrong[0]):g}, which is {what}" if wrong.numel() else ""

    def _channels_of(self, params: int) -> int:
        """Value channels of a step that has so many parameters. Raises ShapeError."""
        if params != self.num_params(1):
            raise ShapeError(f"{self.name}: params has {params} per step; expected {self.num_params(1)}")
        return 1

    def _counts(self, channels: int) -> tuple[int, ...]:
        """Numbers of parameters that forward may return; the first beyond num_params mean nothing."""
        return (self.num_params(channels),)

    # ---- draws ---------------------------------------------------------------------------------------------
    def draw(self, params: Tensor, uniforms: Tensor, temperature: float = 1.0, known: Tensor | None = None) -> Tensor:
        """The value that the uniforms pick: params [..., P], uniforms [..., U] -> float32 [..., V].

        Where the parameters are no distribution (NaN, no finite logit, an infinite mean), the value is NaN.
        temperature > 0 divides logits and multiplies scales. known [..., V]: values that are not drawn (NaN:
        drawn); later channels of the step see them. Leading axes broadcast. Raises ShapeError, ValueError
        (temperature).
        """
        params, uniforms, temperature = self._checked(params, uniforms, temperature)
        value = self._draw(params, uniforms, temperature, known)
        value = torch.where(value.to(torch.float32).isfinite(), value, math.nan)  # as executors have it
        if known is not None:
            value = torch.where(known.isnan(), value, known)
        return value.to(torch.float32)

    def distance(self, params: Tensor, other: Tensor) -> Tensor:
        """An upper bound of the total variation between what params [..., P] and other [..., P] draw: [...].

        Exact for classes. For mixtures: that of the weights, and the weighted mean of what an error of a mean comes to in
        units of its scale and of a log-scale, after its floor; it may be above 1. Infinite where either has NaN.
        """
        return self._distance(params.double(), other.double()).nan_to_num(math.inf)

    def mismatch(self, params: Tensor, other: Tensor) -> Tensor:
        """About how probable it is that the same uniforms draw another value from other than from params: [...].

        Exact for classes; for values on a grid, what the means and scales move by in units of the grid. Infinite where
        either has NaN.
        """
        return self._mismatch(params.double(), other.double()).nan_to_num(math.inf)

    def near_tie(
        self, params: Tensor, other_params: Tensor, uniforms: Tensor, value: Tensor, temperature: float = 1.0
    ) -> Tensor:
        """Whether the error of the parameters explains a draw: bool [...].

        params [..., P]: the truth; other_params [..., P]: those that gave `value` [..., V], with `uniforms`
        [..., U]. True where some parameters within |params - other_params| (and float32 rounding) of params,
        each for itself, give `value`: so where it is draw(params, ...), or the decision between the two lies
        within the error of a boundary. For continuous values: where the difference is no larger than the
        error explains.
        """
        params, uniforms, temperature = self._checked(params, uniforms, temperature)
        other = other_params.to(params)
        error = torch.where(params == other, 0.0, (params - other).abs())
        error = error + _ROUNDING * (1 + torch.where(params.isinf(), 0.0, params.abs()))
        return self._explained(params, error, uniforms, value.to(params), temperature)

    def _checked(self, params: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor, float]:
        """The two in float64 with equal leading axes, and the temperature in float32 as executors have it."""
        given, temperature = temperature, float(np.float32(temperature))
        if not (0.0 < temperature < math.inf):
            raise ValueError(f"temperature={given}: expected a finite float32 > 0")
        needed = self.num_uniforms(self._channels_of(params.shape[-1]))
        if uniforms.shape[-1] != needed:
            raise ShapeError(f"{self.name}: uniforms {list(uniforms.shape)}; expected {needed} in the last axis")
        try:
            lead = np.broadcast_shapes(params.shape[:-1], uniforms.shape[:-1])
        except ValueError:
            raise ShapeError(
                f"{self.name}: params {list(params.shape)} and uniforms {list(uniforms.shape)}; "
                f"expected leading axes that broadcast"
            ) from None
        params, uniforms = (x.to(torch.float64).expand(*lead, x.shape[-1]) for x in (params, uniforms))
        return params, uniforms, temperature

    # ---- encoding ------------------------------------------------------------------------------------------
    def encode(self, value: Tensor) -> Tensor:
        """What forward's input holds for a value: [..., V] -> float32 [..., V * enc]; for NaN, that of class 0.

        Raises ValueError for a class index out of range.
        """
        if self.table is None:
            return (value.nan_to_num(0.0) if self.discrete else value).to(torch.float32)
        return self.table.to(value.device)[self._index(value.nan_to_num(0.0))].flatten(-2)

    def _index(self, value: Tensor) -> Tensor:
        """Class indices as int64."""
        index = value.long()
        if not torch.compiler.is_compiling() and not bool(((index >= 0) & (index < self.n)).all()):
            given = f"{index.min().item()} to {index.max().item()}"
            raise ValueError(f"{self.name}: class indices from {given}; expected 0 to {self.n - 1}")
        return index

    # ---- layouts of forward's output -----------------------------------------------------------------------
    def parameters_of(self, out: Tensor, channels: int, sites: Sequence[int]) -> Tensor:
        """Forward's output [B, ...] -> canonical parameters [B, *sites, phases, P].

        Moves elements and no more, so `out` may be of any dtype. phases: 1 for a head that draws a site at
        once, else `channels`. Raises ShapeError when the output does not fit, or params="auto" fits in
        several ways.
        """
        layout, count = self._fit(out.shape, channels, sites)
        read = _read(out, layout, count, 1 if self.at_once else channels, tuple(sites))
        return read[..., count - self.num_params(channels) :]

    def layout(self, shape: Sequence[int], channels: int, sites: Sequence[int]) -> str:
        """The key of `LAYOUTS` by which an output of `shape` [B, ...] is read. Raises as `parameters_of`."""
        return self._fit(shape, channels, sites)[0]

    def _fit(self, shape: Sequence[int], channels: int, sites: Sequence[int]) -> tuple[str, int]:
        """Layout and number of parameters of an output."""
        counts = self._counts(channels)
        names = tuple(LAYOUTS) if self.params == "auto" else (self.params,)
        readings = _readings(names, counts, 1 if self.at_once else channels, tuple(sites))
        fits = [(name, count) for name, count, wanted in readings if tuple(shape[1:]) == wanted]
        if len(fits) == 1:
            return fits[0]
        what = (
            f"{self.name}: forward's output has shape {list(shape)} for {channels} value channel(s) "
            f"at sites {list(sites)}"
        )
        if fits:
            choices = ", ".join(f"params={name!r}" for name, _ in fits)
            raise ShapeError(f"{what}, which can be read in {len(fits)} ways; choose one of {choices}")
        if not readings:
            raise ShapeError(f"{what}; params={self.params!r} has no axis for them or for their parameters")
        shapes: dict[tuple[int, ...], list[str]] = {}
        for name, _, wanted in readings:
            shapes.setdefault(wanted, []).append(repr(name))
        expected = (f"[B, {str(list(s))[1:-1]}] (params={' or '.join(k)})" for s, k in shapes.items())
        raise ShapeError(f"{what}; expected {', '.join(expected)}")

    def with_layout(self, params: str) -> Self:
        """The same head for outputs laid out as the key `params` of `LAYOUTS`, or "auto"."""
        check_layout(params)
        other = copy.copy(self)
        object.__setattr__(other, "params", params)
        return other

    # ---- equality ------------------------------------------------------------------------------------------
    def _key(self) -> tuple[Any, ...]:
        values = (getattr(self, f.name) for f in dataclasses.fields(self))  # type: ignore[arg-type]
        return type(self), *(tuple(map(tuple, v.tolist())) if isinstance(v, Tensor) else v for v in values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Head) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())


# ---- layouts -----------------------------------------------------------------------------------------------
def check_layout(params: str) -> None:
    """Raises ValueError unless `params` names a layout."""
    if params != "auto" and params not in LAYOUTS:
        raise ValueError(f"params={params!r}: expected 'auto' or one of {', '.join(map(repr, LAYOUTS))}")


def _shape(layout: str, n: int, phases: int, sites: Sequence[int]) -> tuple[int, ...]:
    """Axes of forward's output after the batch."""
    sizes = {"n": (n,), "C": (phases,), "S": tuple(sites)}
    shape: list[int] = []
    for axis in LAYOUTS[layout]:
        shape += sizes[axis] if axis == "S" else [math.prod(math.prod(sizes[letter]) for letter in axis)]
    return tuple(shape)


def _read(out: Tensor, layout: str, n: int, phases: int, sites: Sequence[int]) -> Tensor:
    """[B, ...] in a layout that fits -> [B, *sites, phases, n]."""
    letters = "".join(LAYOUTS[layout])
    letters += "".join(missing for missing in "Cn" if missing not in letters)
    sizes = {"n": (n,), "C": (phases,), "S": tuple(sites)}
    split = out.reshape(out.shape[0], *(size for letter in letters for size in sizes[letter]))
    at: dict[str, list[int]] = {}
    axis = 1
    for letter in letters:
        at[letter] = list(range(axis, axis + len(sizes[letter])))
        axis += len(sizes[letter])
    return split.permute(0, *at["S"], *at["C"], *at["n"])


@functools.lru_cache(maxsize=256)
def _readings(
    names: tuple[str, ...], counts: tuple[int, ...], phases: int, sites: tuple[int, ...]
) -> list[tuple[str, int, tuple[int, ...]]]:
    """(layout, parameters a step, axes after the batch), each way to take the elements once."""
    found: dict[object, tuple[str, int, tuple[int, ...]]] = {}
    for name in names:
        letters = "".join(LAYOUTS[name])
        for count in counts:
            if (phases > 1 and "C" not in letters) or (count > 1 and "n" not in letters):
                continue
            shape = _shape(name, count, phases, sites)
            read = _read(torch.empty(1, *shape, device="meta"), name, count, phases, sites)
            strides = tuple(s for s, size in zip(read.stride(), read.shape, strict=True) if size > 1)
            found.setdefault((shape, count, strides), (name, count, shape))
    return list(found.values())
