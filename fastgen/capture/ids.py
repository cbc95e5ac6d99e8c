"""Element ids: which element of which node a number is, in an int64 of 15 + 16 + 12 + 20 bits (node, channel, row, column).

CONST marks a value that never depends on the sample, COND one that depends on conditioning alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen.graph.refs import Pair

CONST, COND = -1, -2
SITE_MASK = (1 << 32) - 1
MAX_CHANNELS, MAX_ROWS, MAX_COLS, MAX_NODES = 1 << 16, 1 << 12, 1 << 20, 1 << 15


def pack(node: int, chans: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Ids of `chans` x sites, broadcast together."""
    return (node << 48) | (chans << 32) | (i << 20) | j


def row_of(ids: Tensor) -> Tensor:
    """Row of each id."""
    return (ids >> 20) & 0xFFF


def col_of(ids: Tensor) -> Tensor:
    """Column of each id."""
    return ids & 0xFFFFF


def sites(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Row and column of every position of a grid, row-major."""
    n = torch.arange(height * width)
    return n // width, n % width


def node_ids(node: int, channels: int, grid: Pair) -> Tensor:
    """Ids of all elements of a node: [channels, sites]."""
    i, j = sites(*grid)
    return pack(node, torch.arange(channels)[:, None], i[None], j[None])
