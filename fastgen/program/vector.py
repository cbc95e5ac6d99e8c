"""Vector programs: the pointwise units of an instruction as micro-ops over one column's scratch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fastgen.graph.refs import Affine, Operand, Pair, Piece, Read, runs
from fastgen.plan.fuse import Instr
from fastgen.program.functions import function_codes
from fastgen.program.records import PANEL, Array, Micro, Tap

# More separate channel ranges than this are read as one range and gathered: a tap is a memory access of its own, a gather
# one more pass over what is in the first-level cache.
MAX_RUNS = 4


def ceil_panel(n: int) -> int:
    """n rounded up to whole weight panels."""
    return -(-n // PANEL) * PANEL


@dataclass
class Pool:
    """Constants shared by a program, deduplicated."""

    values: list[Any] = field(default_factory=list)
    size: int = 0
    known: dict[bytes, int] = field(default_factory=dict)

    def add(self, array: Any) -> int:
        """Offset of a float32 array in consts."""
        flat = np.ascontiguousarray(array, dtype=np.float32).reshape(-1)
        key = flat.tobytes()
        if key not in self.known:
            self.known[key] = self.size
            self.values.append(flat)
            self.size += len(flat)
        return self.known[key]

    def array(self) -> Array:
        """All of them, and a panel of zeros that a vector may be read beyond the end of the last."""
        return np.concatenate([*self.values, np.zeros(PANEL, np.float32)])


class Space(Protocol):
    """What code generation needs to know of the program around it (pack.py)."""

    consts: Pool
    taps: list[Tap]
    grids: list[Pair]  # of the buffers

    def place(self, unit: int) -> tuple[int, tuple[int, ...]]:
        """(buffer, its channels there) of a unit."""

    def const_table(self, values: Tensor) -> int:
        """A Const buffer for a constant [C, H, W]."""

    def panels(self, weight: Tensor) -> int:
        """Offset of a weight [O, K] among the weights."""


@dataclass
class Linear:
    """The linear part of an op; the fields are those of Op in csrc/plan.h."""

    tap0: int = 0
    ntaps: int = 0
    acc: int = 0
    k: int = 0
    weights: int = 0
    bias: int = -1
    site_bias: int = -1


def tap_of(buf: int, chan: int, nchan: int, at: Affine, grid: Pair, up: Pair, parity: Pair) -> Tap:
    """The tap for reads by the iteration site q of an op whose output site is q * up + parity."""
    mul = (at.mul[0] * up[0], at.mul[1] * up[1])
    off = (at.mul[0] * parity[0] + at.off[0], at.mul[1] * parity[1] + at.off[1])
    hi = (min(at.hi[0], grid[0]), min(at.hi[1], grid[1]))
    return Tap(buf, chan, nchan, *mul, *at.div, *off, max(0, at.lo[0]), hi[0], max(0, at.lo[1]), hi[1])


class Coder:
    """Generates an op, that is one instruction for one output parity; the nodes of its units write theirs by `emit`."""

    def __init__(self, space: Space, instr: Instr, parity: Pair) -> None:
        self.space, self.up, self.parity = space, instr.up, parity
        self.linear_part = Linear(tap0=len(space.taps))
        self.code: list[Micro] = []
        self.top = 0  # scratch in use
        self._where: dict[int, int] = {}  # unit -> scratch offset
        self._loads: dict[Any, int] = {}
        for unit in instr.units:
            self._where[unit.id] = unit.node.emit(self)
        for unit in instr.stored:
            buf, chans = space.place(unit.id)
            self.emit("store", 0, self._where[unit.id], buf, chans[0], unit.channels)

    def alloc(self, n: int) -> int:
        """Scratch for n floats."""
        start = self.top
        self.top += ceil_panel(n)
        return start

    def emit(
        self, fn: str, dst: int, a: int = 0, b: int = 0, c: int = 0, n: int = 0, imm: tuple[float, ...] = ()
    ) -> None:
        """One micro-op of csrc/plan.h."""
        self.code.append(Micro(function_codes()[fn], dst, a, b, c, n, *(*imm, 0.0, 0.0, 0.0)[:3]))

    def linear(self, terms: list[tuple[Read, Tensor]], bias: Tensor | None, outputs: int) -> int:
        """The linear part: bias [O] or [O, H, W] and the sum of weight [O, n] times what each read gives. At scratch 0."""
        part, space = self.linear_part, self.space
        taps, weight = dense_taps([t for t in terms if t[0].parity == self.parity], outputs, space)
        space.taps += taps
        part.ntaps, part.acc, part.k = len(taps), outputs, weight.shape[1]
        part.weights = space.panels(weight)
        if bias is not None and bias.dim() == 1:
            padded = torch.zeros(ceil_panel(outputs))
            padded[:outputs] = bias.float()
            part.bias = self.constants(padded)
        elif bias is not None:
            part.site_bias = space.const_table(bias.float())
        self.top = ceil_panel(outputs)
        return 0

    def constants(self, values: Tensor) -> int:
        """Offset of values in consts."""
        return self.space.consts.add(values.float().numpy())

    def whole(self, operand: Operand) -> int:
        """Address of an operand as one contiguous vector."""
        lanes = operand[-1].hi
        if len(operand) == 1:
            return self.address(operand[0], 0, lanes)
        start = self.alloc(lanes)
        for p in operand:
            self.emit("copy", start + p.lo, self.address(p, 0, p.hi - p.lo), n=p.hi - p.lo)
        return start

    def address(self, piece: Piece, lo: int, hi: int) -> int:
        """Operand address of lanes [lo, hi) of a piece: scratch offset, or ~offset in consts."""
        if piece.const is not None:
            if piece.const.dim() == 1:
                return ~self.constants(piece.const[lo:hi])
            buf = self.space.const_table(piece.const.float())
            return self._load(buf, list(range(lo, hi)), Affine(), 0.0)
        assert piece.ref is not None
        chans = list(piece.ref.chans[lo:hi])
        start = self._where.get(piece.ref.node)
        if start is not None and piece.ref.at.identity:
            return self._select(start, chans)
        buf, place = self.space.place(piece.ref.node)
        return self._load(buf, [place[c] for c in chans], piece.ref.at, piece.fill)

    def _select(self, start: int, chans: list[int]) -> int:
        """Channels of a scratch vector as one contiguous vector."""
        if chans == list(range(chans[0], chans[0] + len(chans))):
            return start + chans[0]
        key = ("select", start, tuple(chans))
        if key not in self._loads:
            dst = self._loads[key] = self.alloc(len(chans))
            if len(set(chans)) == 1:
                self.emit("broadcast", dst, start + chans[0], n=len(chans))
            else:
                low = min(chans)
                index = self.space.consts.add(np.array([c - low for c in chans]))
                self.emit("gather", dst, start + low, index, 0, len(chans))
        return self._loads[key]

    def _load(self, buf: int, chans: list[int], at: Affine, fill: float) -> int:
        key = (buf, tuple(chans), at, fill)
        if key in self._loads:
            return self._loads[key]
        parts = runs(chans)
        if len(parts) > MAX_RUNS:
            low, high = min(chans), max(chans) + 1
            block = self._load(buf, list(range(low, high)), at, fill)
            self._loads[key] = self._select(block, [c - low for c in chans])
            return self._loads[key]
        dst = self._loads[key] = self.alloc(len(chans))
        for a, b in parts:
            self.space.taps.append(tap_of(buf, chans[a], b - a, at, self.space.grids[buf], self.up, self.parity))
            self.emit("load", dst + a, len(self.space.taps) - 1, n=b - a, imm=(fill,))
        return dst


def dense_taps(terms: list[tuple[Read, Tensor]], outputs: int, space: Space) -> tuple[list[Tap], Tensor]:
    """Taps of a linear part's terms, and the matching weight matrix [outputs, K]."""
    taps: list[Tap] = []
    columns: list[Tensor] = []
    for read, weight in terms:
        buf, place = space.place(read.ref.node)
        chans = [place[c] for c in read.ref.chans]
        at, grid = read.ref.at, space.grids[buf]
        weight = weight.float()
        if chans == list(range(chans[0], chans[0] + len(chans))):
            taps.append(tap_of(buf, chans[0], len(chans), at, grid, (1, 1), (0, 0)))
            columns.append(weight)
            continue
        low, high = min(chans), max(chans) + 1
        wide = torch.zeros(weight.shape[0], high - low)
        wide.index_add_(1, torch.tensor(chans) - low, weight)  # a channel read twice gets both weights
        used = sorted(set(chans))
        for a, b in runs(used) if len(runs(used)) <= MAX_RUNS else [(0, len(used))]:
            first, last = used[a], used[b - 1] + 1
            taps.append(tap_of(buf, first, last - first, at, grid, (1, 1), (0, 0)))
            columns.append(wide[:, first - low : last - low])
    return taps, torch.cat(columns, 1) if columns else torch.zeros(outputs, 0)
