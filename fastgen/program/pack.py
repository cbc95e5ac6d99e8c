"""Packing: a schedule to the flat program of csrc/plan.h, for one length of a sequence or one image size."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgen.errors import UnsupportedError
from fastgen.graph.node import CondSource
from fastgen.graph.refs import Pair
from fastgen.graph.times import parity_grid
from fastgen.plan.fuse import Instr
from fastgen.plan.period import borders
from fastgen.plan.plan import Schedule
from fastgen.program import records as R
from fastgen.program.items import item_tables
from fastgen.program.rings import input_ring, rings
from fastgen.program.vector import Coder, Pool, ceil_panel

HEAD_FIELDS = (
    "kind", "channels", "phases", "n", "levels", "params", "enc", "delay", "floor_log_scale", "clip_lo", "clip_hi"
)  # fmt: skip


def pack(schedule: Schedule, head: dict[str, Any], weight_dtype: torch.dtype, length: int | None = None) -> R.Program:
    """The program; `length` (sequences) replaces the planned number of sites."""
    return Packer(schedule, weight_dtype, length).program(head)


def grown(cols: int, planned: int, length: int) -> int:
    """Columns of a grid that had `cols` of them at the planned number of sites, at another.

    Grids scale with the sequence by a whole stride, or by a whole number of columns a site; margins and single values do
    not. A grid with margins is still within half of its own number of sites, so 1.5 tells 2 columns a site (or more)
    from 1 and a margin.
    """
    if length == planned or cols == 1:
        return cols
    if cols > 1.5 * planned:
        per_site = round(cols / planned)
        return max(1, length * per_site + cols - planned * per_site)
    stride = max(1, round(planned / cols))
    return max(1, -(-length // stride) + cols - -(-planned // stride))


class Packer:
    """The tables of one program under way; what the vector programs (vector.py) and sources write to."""

    def __init__(self, schedule: Schedule, weight_dtype: torch.dtype, length: int | None) -> None:
        self.schedule, self.weight_dtype = schedule, weight_dtype
        self.planned = schedule.steps.grid[1]
        self.length = self.planned if length is None else length
        self.consts = Pool()
        self.buffers: list[R.Buffer] = []
        self.grids: list[Pair] = []  # of the buffers, as planned
        self.taps: list[R.Tap] = []
        self.code: list[R.Micro] = []
        self.ops: list[R.Op] = []
        self.op_units: list[tuple[Instr, Pair]] = []
        self.cond: list[int] = []
        self._weights: list[Tensor] = []
        self._weight_size = 0
        self._tables: dict[tuple[int, Pair, int], int] = {}
        self._home: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._arena = 0
        self._input = -1

    # ---- buffers -------------------------------------------------------------------------------------------------
    def _grow_cols(self, grid: Pair) -> int:
        """Columns of a grid at the requested length."""
        return grown(grid[1], self.planned, self.length) if grid[0] == 1 else grid[1]

    def _buffer(self, channels: int, grid: Pair, kind: int, ring: int | None, offset: int = 0) -> int:
        rows, cols = grid[0], self._grow_cols(grid)
        ring_rows, ring_cols = rows, cols
        if ring is not None:
            ring_rows, ring_cols = (1, min(ring, cols)) if rows == 1 else (min(ring, rows), cols)
        if kind in (R.STATE, R.INPUT):
            offset = self._arena
            self._arena += ceil_panel(channels * ring_rows * ring_cols)
        self.buffers.append(R.Buffer(channels, rows, cols, ring_rows, ring_cols, kind, offset))
        self.grids.append(grid)
        return len(self.buffers) - 1

    def input_buffer(self) -> int:
        """The buffer that draws are written to."""
        return self._input

    def cond_buffer(self, node: CondSource) -> int:
        """A new buffer that conditioning fills."""
        self.cond.append(node.index)
        return self._buffer(node.channels, node.grid, R.COND, None, len(self.cond) - 1)

    def _place(self) -> None:
        """A buffer for all that is stored."""
        steps = self.schedule.steps
        self._input = self._buffer(steps.known.shape[0], steps.grid, R.INPUT, input_ring(self.schedule))
        for u in self.schedule.units:
            if u.node.source:
                self._home[u.id] = (u.node.home(self), u.chans)
        kept = rings(self.schedule)
        for instr in self.schedule.instrs:
            for u in instr.stored:
                self._home[u.id] = (self._buffer(u.channels, u.grid, R.STATE, kept[u.id]), tuple(range(u.channels)))

    def place(self, unit: int) -> tuple[int, tuple[int, ...]]:
        """(buffer, its channels there) of a unit."""
        return self._home[unit]

    def const_table(self, values: Tensor) -> int:
        """A Const buffer holding a per-site constant [C, H, W]."""
        grid: Pair = (values.shape[1], values.shape[2])
        if self.schedule.sequence and grid[0] == 1 and self.length != self.planned:
            values = _stretch(values, self._grow_cols(grid))
        offset = self.consts.add(values.permute(1, 2, 0).contiguous().numpy())
        key = (values.shape[0], grid, offset)  # equal constants lie at one offset of the pool
        if key not in self._tables:
            self._tables[key] = self._buffer(values.shape[0], grid, R.CONST, None, offset)
        return self._tables[key]

    # ---- ops -----------------------------------------------------------------------------------------------------
    def _op(self, instr: Instr, parity: Pair) -> None:
        lead, coder = instr.lead, Coder(self, instr, parity)
        partial = -1 if instr.host is None or instr.host.partial is None else self._home[instr.host.partial][0]
        rows_q, cols_q = parity_grid(lead.grid, instr.up, parity)
        if lead.grid[0] == 1:  # none where a short sequence ends before this parity begins
            cols_q = parity_grid((1, self._grow_cols(lead.grid)), instr.up, parity)[1]
        self.ops.append(R.Op(
            **vars(coder.linear_part), partial=partial, code0=len(self.code), ncode=len(coder.code),
            scratch=max(coder.top, R.PANEL), up_i=instr.up[0], up_j=instr.up[1], par_i=parity[0], par_j=parity[1],
            q_rows=rows_q, q_cols=cols_q, advance=self.schedule.advance.get((instr.index, parity), 0),
        ))  # fmt: skip
        self.code += coder.code
        self.op_units.append((instr, parity))

    def panels(self, weight: Tensor) -> int:
        """Packs [O, K] as panels [ceil(O/16)][K][16]; returns their offset."""
        offset = self._weight_size
        rows = ceil_panel(weight.shape[0])
        padded = torch.zeros(rows, weight.shape[1])
        padded[: weight.shape[0]] = weight
        panels = padded.view(rows // R.PANEL, R.PANEL, weight.shape[1]).transpose(1, 2).contiguous()
        self._weights.append(panels.reshape(-1).to(self.weight_dtype))
        self._weight_size += panels.numel()
        return offset

    # ---- all of it -----------------------------------------------------------------------------------------------
    def program(self, head: dict[str, Any]) -> R.Program:
        """Packs everything. head: Spec.native_head."""
        steps = self.schedule.steps
        self._place()
        for instr in self.schedule.instrs:
            for parity in instr.parities:
                self._op(instr, parity)
        record, param_ptr = self._head(head), self._parameters()
        row_items, row_ptr, step_items, step_ptr = item_tables(self.schedule, self.op_units)
        rows, added = steps.grid[0], self.length - self.planned
        site = steps.site[: self.schedule.period].clamp(max=rows * self.length - 1)
        return R.Program(
            buffers=R.table(self.buffers, R.Buffer), taps=R.table(self._stretched_taps(), R.Tap),
            code=R.table(self.code, R.Micro), ops=R.table(self.ops, R.Op),
            row_items=row_items, row_ptr=row_ptr, step_items=step_items, step_ptr=step_ptr,
            step_site=site.to(torch.int32).numpy(), step_phase=steps.phase[: self.schedule.period].to(torch.int32).numpy(),
            param_ptr=param_ptr, weights=self._blob(), consts=self.consts.array(), head=record,
            rows=rows, cols=self.length, steps=len(steps) + added * steps.phases,
            row_len=self.schedule.row_len, period=self.schedule.period, arena=max(self._arena, R.PANEL), cond=self.cond,
        )  # fmt: skip

    def _blob(self) -> R.Array:
        """All weights as one array; bfloat16 as its bits."""
        weights = torch.cat(self._weights) if self._weights else torch.zeros(0, dtype=self.weight_dtype)
        if self.weight_dtype == torch.float32:
            return weights.numpy()
        return weights.view(torch.int16).numpy().view(np.uint16)

    def _stretched_taps(self) -> list[R.Tap]:
        """Bounds at the end of the sequence, moved there.

        What the sample itself decides never looks past the newest value, so where the planned length ended is no bound
        for it; conditioning and constants end where they end, so many columns before or after the data. A bound in the
        first half of a grid belongs to the beginning and stays.
        """
        if not self.schedule.sequence:
            return self.taps
        out = []
        for tap in self.taps:
            buffer, grid, hi = self.buffers[tap.buf], self.grids[tap.buf], tap.hi_j
            if grid[0] == 1 and grid[1] > 1 and hi > grid[1] // 2:
                hi = buffer.cols if buffer.kind in (R.STATE, R.INPUT) else max(0, hi + buffer.cols - grid[1])
            out.append(tap._replace(hi_j=hi))
        return out

    def _head(self, head: dict[str, Any]) -> Any:
        record = np.zeros((), R.dtype_of(R.Head))
        for key in HEAD_FIELDS:
            record[key] = head[key]
        record["input"] = self._input
        for key in ("table", "start"):
            record[key] = -1 if head[key] is None else self.consts.add(head[key].float().numpy())
        return record

    def _parameters(self) -> R.Array:
        """Taps that gather the parameters, phase after phase; where those of each begin and end."""
        ends = [len(self.taps)]
        for chans in self.schedule.params:
            self._gather(chans)
            ends.append(len(self.taps))
        return np.array(ends, np.int32)

    def _gather(self, chans: list[tuple[int, int]]) -> None:
        """Taps for one phase's parameters, (unit, channel) each, in runs."""
        start = 0
        for k in range(1, len(chans) + 1):
            if k == len(chans) or chans[k] != (chans[k - 1][0], chans[k - 1][1] + 1):
                buf, place = self._home[chans[start][0]]
                (rows, cols), chan = self.grids[buf], place[chans[start][1]]
                self.taps.append(R.Tap(buf, chan, k - start, 1, 1, 1, 1, 0, 0, 0, rows, 0, cols))
                start = k


def _stretch(values: Tensor, cols: int) -> Tensor:
    """A per-site constant [C, 1, n] of a sequence at another length: its middle value repeats.

    What differs at the beginning stays there and what differs at the end goes with it, at most a quarter of the
    columns each, as the effects of a layer's borders do. Raises UnsupportedError for all else.
    """
    n, ends = values.shape[2], borders(values)
    if ends is None or (ends[1] and cols < sum(ends)):
        raise UnsupportedError("a constant varies along the sequence, so the plan holds for the compiled length only")
    head, tail = ends
    fill = values[:, :, n // 2 : n // 2 + 1].expand(-1, -1, max(0, cols - head - tail))
    return torch.cat([values[:, :, : min(head, cols)], fill, values[:, :, n - tail :]], 2)
