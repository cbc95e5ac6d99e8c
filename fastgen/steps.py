"""The steps of a sample: which value is drawn when, and when forward's input is known."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgen.errors import ShapeError


@dataclass(frozen=True)
class Steps:
    """Made once from a spec and handed down. Times are in half steps (graph/times.py)."""

    table: Tensor  # int64 [phases, H, W]: the step of every draw
    site: Tensor  # int64 [steps]: i * W + j of every step
    phase: Tensor  # int64 [steps]: which of its site's draws every step is
    known: Tensor  # int64 [Cx, H, W]: the time from which forward's (encoded) input holds its value

    @property
    def phases(self) -> int:
        """Steps per site."""
        return self.table.shape[0]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of sites."""
        return self.table.shape[1], self.table.shape[2]

    def __len__(self) -> int:
        return len(self.site)


def make_steps(table: Tensor, delayed: bool, channels: int, enc: int) -> Steps:
    """The steps of a table [phases, H, W]; `channels` values a site, each encoded in `enc` channels of forward's input.

    delayed: forward is fed the sample delayed by one site, so that its first site is known from the start.
    """
    h, w = table.shape[1:]
    order = torch.argsort(table.reshape(-1))
    known = 2 * table + 2
    if delayed:
        flat = known.reshape(len(known), -1)
        known = torch.cat([torch.zeros_like(flat[:, :1]), flat[:, :-1]], 1).view_as(table)
    per_value = known.expand(channels, h, w) if known.shape[0] == 1 else known
    return Steps(table, order % (h * w), order // (h * w), per_value.repeat_interleave(enc, 0))


def step_table(order: Tensor | None, phases: int, grid: tuple[int, int], sites: tuple[int, ...]) -> Tensor:
    """The step of every draw [phases, H, W]. order: None for raster with the values of a site in turn, or the step of
    every site [*sites], or of every value, channels first [phases, *sites]. Raises TypeError, ShapeError."""
    h, w = grid
    if order is None:
        site = torch.arange(h * w).view(1, h, w)
        return site * phases + torch.arange(phases).view(-1, 1, 1)
    if not isinstance(order, Tensor):
        raise TypeError(
            f"order is a {type(order).__name__}; expected a tensor of integers shaped {sites} (torch.as_tensor)"
        )
    if order.is_floating_point() or order.is_complex() or order.dtype == torch.bool:
        raise ShapeError(f"order is a tensor of {order.dtype}; expected integers, the step of every site or value")
    every_value = (phases, *sites) if h * w == math.prod(sites) else sites  # those of a vector share one site
    if tuple(order.shape) not in (sites, (1, *sites), every_value):
        raise ShapeError(
            f"order has shape {tuple(order.shape)}; expected the step of every site {sites}"
            + (f" or of every value, channels first {every_value}" if phases > 1 and every_value != sites else "")
        )
    order = order.long().cpu().reshape(-1, h, w)
    if len(order) != phases:
        order = order * phases + torch.arange(phases).view(-1, 1, 1)
    if not torch.equal(order.reshape(-1).sort()[0], torch.arange(order.numel())):
        raise ShapeError("order must hold every step 0, 1, 2, ... once")
    return order
