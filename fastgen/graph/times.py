"""Ready times: after which draw a value is known, per group of channels with equal dependencies.

Time runs in half steps: the value drawn at step t is known at time 2t + 2, site work of step t runs at time 2t + 1, row
work before step t at time 2t.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastgen.graph.refs import Affine, Pair

NEVER = -1  # depends on no sampled value


@dataclass
class Ready:
    """Ready times of a node: channel c at site (i, j) is known at times[group[c], i, j]."""

    group: Tensor  # [C] int64
    times: Tensor  # [G, H, W] int32

    @staticmethod
    def uniform(channels: int, grid: Pair, time: int = NEVER) -> Ready:
        """All channels known at one time everywhere."""
        return Ready(torch.zeros(channels, dtype=torch.int64), torch.full((1, *grid), time, dtype=torch.int32))

    def merged(self) -> Ready:
        """Groups with equal times made one."""
        if self.times.shape[0] == 1:
            return self
        rows, inverse = torch.unique(self.times.reshape(self.times.shape[0], -1), dim=0, return_inverse=True)
        return Ready(inverse[self.group], rows.reshape(-1, *self.times.shape[1:]))


def look(times: Tensor, at: Affine, grid: Pair) -> Tensor:
    """times [G, h, w] of the sources as a reader on `grid` sees them: [G, H, W], NEVER outside the bounds."""
    i, j = at.rows(torch.arange(grid[0])), at.cols(torch.arange(grid[1]))
    rows = (i >= max(0, at.lo[0])) & (i < min(at.hi[0], times.shape[1]))
    cols = (j >= max(0, at.lo[1])) & (j < min(at.hi[1], times.shape[2]))
    seen = times[:, i.clamp(0, times.shape[1] - 1)][:, :, j.clamp(0, times.shape[2] - 1)]
    return torch.where((rows[:, None] & cols[None])[None], seen, NEVER)


def parity_grid(grid: Pair, up: Pair, parity: Pair) -> Pair:
    """Iteration grid of the sites q * up + parity of a grid."""
    return (-(-(grid[0] - parity[0]) // up[0]), -(-(grid[1] - parity[1]) // up[1]))
