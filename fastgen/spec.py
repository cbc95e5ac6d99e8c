"""What a sample is: its shape as forward takes it, its sites, steps and encoding. Shapes are checked here, once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgen.errors import ShapeError
from fastgen.heads import Head
from fastgen.steps import Steps, make_steps, step_table

LAYOUTS = ("CHW", "HWC", "HW", "CT", "TC", "T", "D")
DEFAULT_LAYOUT = {1: "T", 2: "CT", 3: "CHW"}


def number_of(value: Any) -> float | None:
    """A number, or what counts as one (numpy's, a tensor of one element without axes); None for anything else."""
    plain = isinstance(value, int | float | np.number) or (isinstance(value, Tensor | np.ndarray) and value.ndim == 0)
    return float(value) if plain and not isinstance(value, bool) else None


@dataclass(frozen=True)
class Spec:
    """A sample of `shape` (without batch) drawn by `head`.

    layout: names of the axes, one of LAYOUTS; D is a vector whose values share one site, as any of them may need any
    other (MADE). predicts: "same" (the output at a site is for that site) or "next" (forward is fed the sample delayed by
    one with `start` in front). order: None (raster, channels in turn) or an int tensor with the step of every site
    [H, W], or of every value, channels first in every layout, [C, H, W] ([D] for a vector).
    """

    shape: tuple[int, ...]
    head: Head
    layout: str = ""
    predicts: str = "same"
    start: float | None = None
    order: Tensor | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        start = number_of(self.start) if self.predicts == "next" and self.start is not None else 0.0
        if start is None or not math.isfinite(start):
            raise ValueError(f"start={self.start!r}: expected one number for all samples and channels")
        if not all(hasattr(s, "__index__") for s in self.shape):
            raise ShapeError(f"shape={self.shape!r}: expected whole numbers, one sample without the batch")
        layout = self.layout or DEFAULT_LAYOUT.get(len(self.shape), "")
        object.__setattr__(self, "layout", layout)
        object.__setattr__(self, "shape", tuple(int(s) for s in self.shape))
        if layout not in LAYOUTS or len(layout) != len(self.shape):
            raise ShapeError(
                f"shape {self.shape} with layout {layout or None!r}: expected one sample without the batch, "
                f"laid out as one of {', '.join(LAYOUTS)}"
            )
        if min(self.shape) < 1:
            raise ShapeError(f"shape {self.shape}: every axis must have at least one element")
        if self.predicts not in ("same", "next"):
            raise ValueError(f"predicts={self.predicts!r}: expected 'same' or 'next'")
        if self.predicts == "next" and not self.sequence:
            raise ValueError("predicts='next' is for sequences (layouts CT and T)")
        if self.vector and self.head.enc != 1:
            raise ShapeError(f"shape {self.shape}: a vector of values encoded in {self.head.enc} channels each")
        if self.vector and self.head.at_once and self.shape[0] > 1:
            raise ShapeError(
                f"shape {self.shape} with layout 'D': {self.head.name} draws all values of a site at once, and those of a "
                f"vector share one site; expected a head that draws one value a step, or layout 'T'"
            )
        width = self.input_channels
        if width % self.head.enc:
            raise ShapeError(
                f"shape {self.shape} has {width} channels; {self.head.name} encodes a value in {self.head.enc}, "
                f"so their number must be a multiple of it"
            )
        if self.order is not None:
            _ = self.timeline  # which raises where the order does not fit

    # ---- geometry ------------------------------------------------------------------------------------------------
    @property
    def sequence(self) -> bool:
        """1-D data: any length can be sampled."""
        return "T" in self.layout

    @property
    def vector(self) -> bool:
        """One site that holds all values."""
        return self.layout == "D"

    @property
    def sites(self) -> tuple[int, ...]:
        """Size of the axes other than C: (H, W), (T,) or (D,)."""
        return tuple(s for a, s in zip(self.layout, self.shape, strict=True) if a != "C")

    @property
    def grid(self) -> tuple[int, int]:
        """Sites as rows and columns; a sequence is one row, a vector one site."""
        if self.vector:
            return (1, 1)
        return (1, self.sites[0]) if self.sequence else (self.sites[0], self.sites[1])

    @property
    def input_channels(self) -> int:
        """Channels of forward's input (encoded)."""
        if self.vector:
            return self.shape[0]
        return self.shape[self.layout.index("C")] if "C" in self.layout else 1

    @property
    def channels(self) -> int:
        """Values per site."""
        return self.input_channels // self.head.enc

    @property
    def values_per_site(self) -> int:
        """Values that forward's output has parameters of at each of `sites`."""
        return 1 if self.vector else self.channels

    @property
    def phases(self) -> int:
        """Steps per site."""
        return 1 if self.head.at_once else self.channels

    @property
    def steps(self) -> int:
        """Draws per sample."""
        return self.grid[0] * self.grid[1] * self.phases

    def at_length(self, length: int) -> Spec:
        """The same sequence with another number of sites. Raises ValueError where an order holds for this one only."""
        if length == self.sites[0]:
            return self
        if self.order is not None:
            raise ValueError(f"length={length}: the order given at compile time holds for {self.sites[0]} sites only")
        return replace(
            self, shape=tuple(length if a == "T" else s for a, s in zip(self.layout, self.shape, strict=True))
        )

    def as_long_as(self, samples: Tensor) -> Spec:
        """The same with the length that samples [n, ...] of a sequence have."""
        if not self.sequence or samples.dim() < 2:
            return self
        axis = self.layout.index("T") + 1 if samples.dim() == len(self.layout) + 1 else -1
        return self.at_length(samples.shape[axis])

    def as_vector(self) -> Spec:
        """The same values, planned as one site."""
        return replace(self, layout="D")

    @cached_property
    def timeline(self) -> Steps:
        """Which value is drawn when. Raises ShapeError where `order` does not fit."""
        table = step_table(self.order, self.phases, self.grid, self.sites)
        return make_steps(table, self.predicts == "next", self.channels, self.head.enc)

    # ---- the sampled tensor --------------------------------------------------------------------------------------
    @property
    def dtype(self) -> torch.dtype:
        """dtype of forward's input."""
        return torch.int64 if self.head.integer_input else torch.float32

    def encode(self, values: Tensor) -> Tensor:
        """Values [B, H*W, C] -> forward's input [B, *shape], with the shift and start of predicts="next"."""
        b = values.shape[0]
        x = self.head.encode(values.reshape(b, -1, self.channels).to(torch.float32))  # [B, S, Cx]
        if self.predicts == "next":
            first = self.start_vector().to(x).expand(b, 1, -1)
            x = torch.cat([first, x[:, :-1]], 1)
        return self.laid_out(x.transpose(1, 2)).to(self.dtype)

    def laid_out(self, x: Tensor) -> Tensor:
        """[B, C, sites...] (sites flat or not) -> [B, *axes of the layout]; C is dropped where the layout has none."""
        if "C" not in self.layout:
            return x.reshape(x.shape[0], *self.sites)
        x = x.reshape(x.shape[0], x.shape[1], *self.sites)
        return x.movedim(1, 1 + self.layout.index("C")).contiguous()

    @property
    def input_range(self) -> tuple[float, float] | None:
        """Between which two numbers those of forward's input lie, where values are of a fixed set."""
        head = self.head
        if head.table is not None:
            given = head.table
        elif head.discrete:
            given = torch.tensor([0.0, head.n - 1.0])
        elif head.clip is not None:
            given = torch.tensor(head.clip)
        else:
            return None
        if self.predicts == "next":
            given = torch.cat([given.reshape(-1).float(), self.start_vector()])
        return float(given.min()), float(given.max())

    def start_vector(self) -> Tensor:
        """Encoded value in front of a predicts="next" sequence: [Cx]."""
        if self.start is None:
            return torch.zeros(self.input_channels, dtype=torch.float32)
        return self.head.encode(torch.full((1, self.channels), float(self.start))).reshape(-1)

    def result(self, values: Tensor) -> Tensor:
        """Values [n, H*W, C] as sample() returns them: [n, *shape], or class indices without the encoded axis."""
        n = values.shape[0]
        if self.head.indices:
            values = values.to(torch.int64)
            if self.head.enc > 1 and self.channels == 1:
                return values.reshape(n, *self.sites)
        return self.laid_out(values.transpose(1, 2))

    def values(self, x: Tensor) -> Tensor:
        """The inverse of result: [n, H*W, C] float32. Raises ShapeError when x is not what sample() returns."""
        like = tuple(self.result(torch.zeros(1, self.grid[0] * self.grid[1], self.channels)).shape[1:])
        if tuple(x.shape[1:]) != like or x.dim() != len(like) + 1:
            raise ShapeError(f"samples have shape {tuple(x.shape)}; expected [n, {', '.join(map(str, like))}]")
        x = x.detach().to("cpu", torch.float32)
        if x.dim() == len(self.layout) + 1 and "C" in self.layout:
            x = x.movedim(1 + self.layout.index("C"), 1)
        return x.reshape(x.shape[0], self.channels, self.grid[0] * self.grid[1]).transpose(1, 2).contiguous()

    def parameters(self, out: Tensor) -> Tensor:
        """Forward's output [B, ...] -> parameters [B, H, W, phases, P]."""
        arranged = self.head.parameters_of(out, self.values_per_site, self.sites)
        if self.vector:
            return arranged.reshape(out.shape[0], 1, 1, self.channels, -1)
        return arranged.unsqueeze(1) if self.sequence else arranged

    def example_values(self, n: int) -> Tensor:
        """Some values [n, H*W, C], different for every sample."""
        mixed = (torch.arange(n * self.grid[0] * self.grid[1] * self.channels) * 7919) % 8191
        values = mixed.view(n, -1, self.channels)
        if self.head.table is not None or self.head.indices or self.head.discrete:
            return (values % self.head.n).float()
        return values / 4095.0 - 1.0

    def native_head(self) -> dict[str, Any]:
        """The Head record's fields (csrc/plan.h)."""
        head = self.head
        low, high = head.clip or (-math.inf, math.inf)
        params = head.num_params(self.values_per_site)
        return {
            "kind": head.kind, "channels": self.channels, "phases": self.phases, "n": head.n, "levels": head.grid_levels,
            "params": params, "enc": head.enc, "delay": int(self.predicts == "next"),
            "floor_log_scale": head.floor, "clip_lo": low, "clip_hi": high, "table": head.table,
            "start": self.start_vector() if self.predicts == "next" else None,
        }  # fmt: skip
