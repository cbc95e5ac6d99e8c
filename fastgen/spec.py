"""What a sample is: its shape as forward takes it, its sites, steps and encoding. Shapes are checked here, once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastgen.errors import ShapeError
from fastgen.heads import Head
from fastgen.plan import fit
from fastgen.plan.ir import Pair

LAYOUTS = ("CHW", "HWC", "HW", "CT", "TC", "T")
DEFAULT_LAYOUT = {1: "T", 2: "CT", 3: "CHW"}


@dataclass(frozen=True)
class Spec:
    """A sample of `shape` (without batch) drawn by `head`.

    layout: names of the axes, one of CHW, HW, CT, T. predicts: "same" (the output at a site is for that site) or "next"
    (forward is fed the sample delayed by one with `start` in front). order: None (raster, channels in turn) or an int
    tensor with the step of every site [H, W], or of every value [C, H, W].
    """

    shape: tuple[int, ...]
    head: Head
    layout: str = ""
    predicts: str = "same"
    start: float | None = None
    order: Tensor | None = field(default=None, compare=False)
    vector: bool = False  # a (D,) sample planned as one site of D values (MADE), not as D sites

    def __post_init__(self) -> None:
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
        width = self.input_channels
        if width % self.head.enc:
            raise ShapeError(
                f"shape {self.shape} has {width} channels; {self.head.name} encodes a value in {self.head.enc}, "
                f"so their number must be a multiple of it"
            )

    # ---- geometry ------------------------------------------------------------------------------------------------
    @property
    def sequence(self) -> bool:
        """1-D data: any length can be sampled."""
        return "T" in self.layout and not self.vector

    @property
    def sites(self) -> tuple[int, ...]:
        """Size of the sites' axes: (H, W) or (T,)."""
        return tuple(s for a, s in zip(self.layout, self.shape, strict=True) if a != "C")

    @property
    def grid(self) -> Pair:
        """Sites as rows and columns; a sequence is one row."""
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
    def phases(self) -> int:
        """Steps per site."""
        return 1 if self.head.at_once else self.channels

    @property
    def steps(self) -> int:
        """Draws per sample."""
        return self.grid[0] * self.grid[1] * self.phases

    def at_length(self, length: int) -> Spec:
        """The same sequence with another number of sites."""
        shape = tuple(length if a == "T" else s for a, s in zip(self.layout, self.shape, strict=True))
        return Spec(shape, self.head, self.layout, self.predicts, self.start)

    def step_table(self) -> Tensor:
        """Step of every draw: int64 [phases, H, W]."""
        h, w = self.grid
        if self.order is None:
            site = torch.arange(h * w).view(1, h, w)
            return site * self.phases + torch.arange(self.phases).view(-1, 1, 1)
        order = self.order.long().cpu()
        given = tuple(order.shape)
        order = order.reshape(-1, h, w) if order.numel() % (h * w) == 0 and order.numel() else order
        if order.dim() != 3 or order.shape[0] not in (1, self.phases):
            raise ShapeError(f"order has shape {given}; expected the step of every site {self.sites} or of every value")
        if order.shape[0] != self.phases:
            order = order * self.phases + torch.arange(self.phases).view(-1, 1, 1)
        if not torch.equal(order.reshape(-1).sort()[0], torch.arange(order.numel())):
            raise ShapeError("order must hold every step 0, 1, 2, ... once")
        return order

    def step_site(self) -> Tensor:
        """Site (i * W + j) of every step."""
        table = self.step_table()
        h, w = self.grid
        flat = torch.arange(h * w).expand(self.phases, h * w).reshape(-1)
        return flat[torch.argsort(table.reshape(-1))]

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
        return self._laid_out(x.transpose(1, 2)).to(self.dtype)

    def _laid_out(self, x: Tensor) -> Tensor:
        """[B, C, sites...] (sites flat or not) -> [B, *axes of the layout]; C is dropped where the layout has none."""
        if "C" not in self.layout:
            return x.reshape(x.shape[0], *self.sites)
        x = x.reshape(x.shape[0], x.shape[1], *self.sites)
        return x.movedim(1, 1 + self.layout.index("C")).contiguous()

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
        return self._laid_out(values.transpose(1, 2))

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
        arranged = self.head.arrange(out, 1 if self.vector else self.channels, self.sites)
        if self.vector:
            return arranged.reshape(out.shape[0], 1, 1, self.channels, -1)
        return arranged.unsqueeze(1) if self.sequence else arranged

    def input_ids(self, node: int) -> tuple[Tensor, int, Pair]:
        """Ids of forward's input at batch 1, its channels and grid."""
        i, j = fit.sites(*self.grid)
        ids = fit.pack(node, torch.arange(self.input_channels)[:, None], i[None], j[None])
        return (
            self._laid_out(ids[None]) if not self.vector else ids.reshape(1, -1),
            self.input_channels,
            self.grid,
        )

    def input_times(self) -> Tensor:
        """Times (half steps) at which forward's input is known: [Cx, H, W]; see plan/ready.py."""
        known = 2 * self.step_table() + 2
        if self.predicts == "next":
            flat = known.amax(0).reshape(-1)
            known = torch.cat([torch.zeros(1, dtype=flat.dtype), flat[:-1]]).view(1, *self.grid)
        per_value = known.expand(self.channels, *self.grid) if known.shape[0] == 1 else known
        return per_value.repeat_interleave(self.head.enc, 0)

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
        params = head.num_params(1 if self.vector else self.channels)
        return {
            "kind": head.kind, "channels": self.channels, "phases": self.phases, "n": head.n, "levels": head.grid_levels,
            "params": params, "enc": head.enc, "delay": int(self.predicts == "next"),
            "floor_log_scale": head.floor, "clip_lo": low, "clip_hi": high, "table": head.table,
            "start": self.start_vector() if self.predicts == "next" else None,
        }  # fmt: skip
