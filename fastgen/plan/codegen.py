"""Vector programs: the pointwise units of an instruction as micro-ops over one column's scratch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgen.plan.fit import runs
from fastgen.plan.fuse import Instr
from fastgen.plan.ir import Affine, Pair, Piece
from fastgen.plan.passes import Unit
from fastgen.plan.table import FN, PANEL

MAX_RUNS = 4  # more separate channel ranges than this are read as one range and gathered


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


@dataclass
class Space:
    """What code generation needs to know of the program around it."""

    consts: Pool
    taps: list[tuple[int, ...]]  # rows of the TAP table
    place: Callable[[int], tuple[int, tuple[int, ...]]]  # unit -> (buffer, its channels there)
    table: Callable[[Tensor], int]  # constant [C, H, W] -> Const buffer
    grid: Callable[[int], Pair]  # buffer -> its grid


def tap_row(buf: int, chan: int, nchan: int, at: Affine, grid: Pair, up: Pair, parity: Pair) -> tuple[int, ...]:
    """A TAP record for reads by the iteration site q of an op whose output site is q * up + parity."""
    mul = (at.mul[0] * up[0], at.mul[1] * up[1])
    off = (at.mul[0] * parity[0] + at.off[0], at.mul[1] * parity[1] + at.off[1])
    hi = (min(at.hi[0], grid[0]), min(at.hi[1], grid[1]))
    return (buf, chan, nchan, *mul, *at.div, *off, max(0, at.lo[0]), hi[0], max(0, at.lo[1]), hi[1])


class Coder:
    """Generates the vector program of one instruction for one output parity."""

    def __init__(self, space: Space, instr: Instr, parity: Pair) -> None:
        self.space, self.instr = space, instr
        self.up, self.parity = (instr.host.up if instr.host else (1, 1)), parity
        self.code: list[tuple[Any, ...]] = []
        self.where: dict[int, int] = {}  # unit -> scratch offset
        self.loads: dict[Any, int] = {}
        self.top = 0
        if instr.host is not None:
            self.where[instr.host.id] = 0
            self.top = ceil_panel(instr.host.channels)
        for unit in instr.maps:
            self._unit(unit)
        for unit in instr.stored:
            buf, chans = space.place(unit.id)
            self._emit("store", 0, self.where[unit.id], buf, chans[0], unit.channels)

    def _alloc(self, n: int) -> int:
        start = self.top
        self.top += ceil_panel(n)
        return start

    def _emit(
        self, fn: str, dst: int, a: int = 0, b: int = 0, c: int = 0, n: int = 0, imm: tuple[float, ...] = ()
    ) -> None:
        self.code.append((FN[fn], dst, a, b, c, n, *(*imm, 0.0, 0.0, 0.0)[:3]))

    def _unit(self, unit: Unit) -> None:
        if unit.kind == "map":
            self._map(unit)
            return
        lanes = unit.operands[0][-1].hi
        source = self._whole(unit.operands[0], lanes)
        dst = self.where[unit.id] = self._alloc(unit.channels)
        if unit.kind == "reduce":
            self._emit(unit.fn, dst, source, n=lanes)
            return
        assert unit.table is not None
        if source < 0:  # a constant index: bring it to scratch
            moved = self._alloc(1)
            self._emit("copy", moved, source, n=1)
            source = moved
        offset = self.space.consts.add(unit.table.float().numpy())
        self._emit("embed", dst, source, offset, 0, unit.channels, (float(unit.table.shape[0]),))

    def _whole(self, pieces: list[Piece], lanes: int) -> int:
        """Address of an operand as one contiguous vector."""
        if len(pieces) == 1:
            return self._address(pieces[0], 0, lanes)
        start = self._alloc(lanes)
        for p in pieces:
            self._emit("copy", start + p.lo, self._address(p, 0, p.hi - p.lo), n=p.hi - p.lo)
        return start

    def _map(self, unit: Unit) -> None:
        operands = unit.operands
        cuts = sorted({p.lo for ps in operands for p in ps} | {p.hi for ps in operands for p in ps})
        if unit.fn == "copy" and len(cuts) == 2:  # the value itself, under another name
            address = self._address(operands[0][0], 0, unit.channels)
            if address >= 0:
                self.where[unit.id] = address
                return
        dst = self.where[unit.id] = self._alloc(unit.channels)
        for lo, hi in itertools.pairwise(cuts):
            args = []
            for pieces in operands:
                piece = next(p for p in pieces if p.lo <= lo and hi <= p.hi)
                args.append(self._address(piece, lo - piece.lo, hi - piece.lo))
            a, b, c = (*args, 0, 0, 0)[:3]
            self._emit(unit.fn, dst + lo, a, b, c, hi - lo, unit.imm)

    def _address(self, piece: Piece, lo: int, hi: int) -> int:
        """Operand address of lanes [lo, hi) of a piece: scratch offset, or ~offset in consts."""
        if piece.const is not None:
            if piece.const.dim() == 1:
                return ~self.space.consts.add(piece.const[lo:hi].float().numpy())
            buf = self.space.table(piece.const.float())
            return self._load(buf, list(range(lo, hi)), Affine(), 0.0)
        assert piece.ref is not None
        chans = list(piece.ref.chans[lo:hi])
        start = self.where.get(piece.ref.node)
        if start is not None and piece.ref.at.identity:
            return self._select(start, chans)
        buf, place = self.space.place(piece.ref.node)
        return self._load(buf, [place[c] for c in chans], piece.ref.at, piece.fill)

    def _select(self, start: int, chans: list[int]) -> int:
        """Channels of a scratch vector as one contiguous vector."""
        if chans == list(range(chans[0], chans[0] + len(chans))):
            return start + chans[0]
        key = ("select", start, tuple(chans))
        if key not in self.loads:
            dst = self.loads[key] = self._alloc(len(chans))
            if len(set(chans)) == 1:
                self._emit("broadcast", dst, start + chans[0], n=len(chans))
            else:
                low = min(chans)
                index = self.space.consts.add(np.array([c - low for c in chans]))
                self._emit("gather", dst, start + low, index, 0, len(chans))
        return self.loads[key]

    def _load(self, buf: int, chans: list[int], at: Affine, fill: float) -> int:
        key = (buf, tuple(chans), at, fill)
        if key in self.loads:
            return self.loads[key]
        parts = runs(chans)
        if len(parts) > MAX_RUNS:
            low, high = min(chans), max(chans) + 1
            block = self._load(buf, list(range(low, high)), at, fill)
            self.loads[key] = self._select(block, [c - low for c in chans])
            return self.loads[key]
        dst = self.loads[key] = self._alloc(len(chans))
        for a, b in parts:
            self.space.taps.append(tap_row(buf, chans[a], b - a, at, self.space.grid(buf), self.up, self.parity))
            self._emit("load", dst + a, len(self.space.taps) - 1, n=b - a, imm=(fill,))
        return dst


def dense_taps(unit: Unit, parity: Pair, space: Space) -> tuple[list[tuple[int, ...]], Tensor]:
    """TAP records of one parity and the matching weight matrix [O, K]."""
    rows: list[tuple[int, ...]] = []
    columns: list[Tensor] = []
    for tap in unit.taps:
        if tap.parity != parity:
            continue
        buf, place = space.place(tap.ref.node)
        chans = [place[c] for c in tap.ref.chans]
        weight = tap.weight.float()
        if chans != list(range(chans[0], chans[0] + len(chans))):
            low, high = min(chans), max(chans) + 1
            wide = torch.zeros(weight.shape[0], high - low)
            wide.index_add_(1, torch.tensor(chans) - low, weight)  # a channel read twice gets both weights
            used = sorted(set(chans))
            for a, b in runs(used) if len(runs(used)) <= MAX_RUNS else [(0, len(used))]:
                first, last = used[a], used[b - 1] + 1
                rows.append(tap_row(buf, first, last - first, tap.ref.at, space.grid(buf), (1, 1), (0, 0)))
                columns.append(wide[:, first - low : last - low])
            continue
        rows.append(tap_row(buf, chans[0], len(chans), tap.ref.at, space.grid(buf), (1, 1), (0, 0)))
        columns.append(weight)
    return rows, torch.cat(columns, 1) if columns else torch.zeros(unit.channels, 0)
