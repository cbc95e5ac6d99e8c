"""Packing: instructions to the flat program of csrc/plan.h, for one length of a sequence or one image size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgen.errors import UnsupportedError
from fastgen.plan import table as T
from fastgen.plan.codegen import Coder, Pool, Space, ceil_panel, dense_taps
from fastgen.plan.fuse import Instr
from fastgen.plan.ir import CondNode, Pair, Ref
from fastgen.plan.passes import Unit
from fastgen.plan.ready import q_grid

MAX_PERIOD = 4096


@dataclass
class Layout:
    """What packing needs beside the instructions."""

    units: list[Unit]  # live, in running order
    instrs: list[Instr]
    params: list[list[tuple[int, int]]]  # per phase: (unit, channel)
    input_channels: int
    grid: Pair  # sites of a sample as planned
    phases: int
    row_len: int
    sequence: bool  # extends to any length
    step_site: Tensor
    input_written: Tensor  # [H, W] time at which each input site is written


def pack(layout: Layout, head: dict[str, Any], weight_dtype: torch.dtype, length: int | None = None) -> T.Program:
    """The program; `length` (sequences) replaces the planned number of sites."""
    return _Packer(layout, weight_dtype, length).program(head)


def grown(cols: int, planned: int, length: int) -> int:
    """Columns of a grid that had `cols` of them at the planned number of sites, at another: grids scale with the
    sequence by a whole stride (or a whole number of columns a site), margins and single values do not."""
    if length == planned or cols == 1:
        return cols
    if cols > 1.5 * planned:
        per_site = round(cols / planned)
        return max(1, length * per_site + cols - planned * per_site)
    stride = max(1, round(planned / cols))
    return max(1, -(-length // stride) + cols - -(-planned // stride))


class _Packer:
    def __init__(self, layout: Layout, weight_dtype: torch.dtype, length: int | None) -> None:
        self.layout = layout
        self.weight_dtype = weight_dtype
        self.grow = 0 if length is None else length - layout.grid[1]
        self.consts = Pool()
        self.buffers: list[list[int]] = []
        self.taps: list[tuple[int, ...]] = []
        self.code: list[tuple[Any, ...]] = []
        self.ops: list[tuple[Any, ...]] = []
        self.weights: list[Tensor] = []
        self.weight_size = 0
        self.op_units: list[tuple[Instr, Pair]] = []
        self.cond: list[int] = []
        self.tables: dict[int, int] = {}
        self.home: dict[int, tuple[int, tuple[int, ...]]] = {}
        self.arena = 0
        self._plan_grid: list[Pair] = []
        self.period, self.advance = self._period()

    # ---- schedule ------------------------------------------------------------------------------------------------
    def _op_sites(self, instr: Instr, parity: Pair) -> tuple[Tensor, Tensor, int]:
        """(times, q) of the live sites of an op, and the width of its iteration grid."""
        (ui, uj), (pu, pv) = (instr.host.up if instr.host else (1, 1)), parity
        lead = instr.lead
        live, when = lead.live[pu::ui, pv::uj], lead.when[pu::ui, pv::uj]
        i, j = live.nonzero().unbind(1)
        return when[i, j].to(torch.int64), i * live.shape[1] + j, live.shape[1]

    def _parities(self, instr: Instr) -> list[Pair]:
        up = instr.host.up if instr.host else (1, 1)
        return [(u, v) for u in range(up[0]) for v in range(up[1])]

    def _period(self) -> tuple[int, dict[tuple[int, Pair], int]]:
        """Steps after which the schedule repeats, and how far each op advances in them."""
        lay = self.layout
        steps = len(lay.step_site)
        ops = [(k.index, p, *self._op_sites(k, p)[:2]) for k in lay.instrs for p in self._parities(k)]
        if not lay.sequence:
            return steps, {(k, p): 0 for k, p, _, _ in ops}
        for period in range(lay.row_len, min(MAX_PERIOD, steps // 4) + 1, lay.row_len):
            found = {(k, p): _advance(when, q, period, steps) for k, p, when, q in ops}
            if all(a is not None for a in found.values()):
                return period, {k: a for k, a in found.items() if a is not None}
        raise UnsupportedError(
            f"the schedule of a sequence of {steps} steps does not repeat; compile with a longer example shape"
        )

    def _items(self) -> tuple[Any, ...]:
        """Row and step item tables with their pointers."""
        lay, period = self.layout, self.period
        base = 0 if not lay.sequence else (len(lay.step_site) // 2) // period
        rows: list[tuple[int, int, int, int, int]] = []
        steps: list[tuple[int, int, int, int, int]] = []
        for op, (instr, parity) in enumerate(self.op_units):
            when, q, _ = self._op_sites(instr, parity)
            shift = self.advance[(instr.index, parity)] * base
            if lay.sequence:
                inside = (when >= 2 * period * base) & (when < 2 * period * (base + 1))
                when, q = when[inside] - 2 * period * base, q[inside] - shift
            for t, start, count, step in _progressions(when, q):
                row = t % 2 == 0
                slot = t // (2 * lay.row_len) if row else t // 2
                (rows if row else steps).append((slot, op, start, count, step))
        n_rows = period // lay.row_len
        return (*_index(rows, n_rows), *_index(steps, period))

    # ---- buffers -------------------------------------------------------------------------------------------------
    def _grow_cols(self, cols: int) -> int:
        """Columns of a grid at the requested length."""
        return grown(cols, self.layout.grid[1], self.layout.grid[1] + self.grow)

    def _buffer(self, channels: int, grid: Pair, kind: int, ring: int | None, offset: int = 0) -> int:
        rows, cols = grid[0], self._grow_cols(grid[1]) if grid[0] == 1 else grid[1]
        ring_rows, ring_cols = rows, cols
        if ring is not None:
            ring_rows, ring_cols = (1, min(ring, cols)) if rows == 1 else (min(ring, rows), cols)
        if kind in (T.STATE, T.INPUT):
            offset = self.arena
            self.arena += ceil_panel(channels * ring_rows * ring_cols)
        self.buffers.append([channels, rows, cols, ring_rows, ring_cols, kind, offset])
        self._plan_grid.append(grid)
        return len(self.buffers) - 1

    def _place_sources(self) -> None:
        lay = self.layout
        input_buffer = self._buffer(lay.input_channels, lay.grid, T.INPUT, self._input_ring())
        for u in lay.units:
            if u.kind == "input":
                self.home[u.id] = (input_buffer, u.node_chans)
            elif u.kind == "cond":
                assert isinstance(u.node, CondNode)
                buf = self._buffer(u.node.channels, u.node.grid, T.COND, None, len(self.cond))
                self.cond.append(u.node.index)
                self.home[u.id] = (buf, u.node_chans)
        rings = self._rings()
        for instr in lay.instrs:
            for u in instr.stored:
                self.home[u.id] = (
                    self._buffer(u.channels, u.grid, T.STATE, rings[u.id]),
                    tuple(range(u.channels)),
                )

    def _readers(self) -> dict[int, list[tuple[Ref, Unit, Pair]]]:
        out: dict[int, list[tuple[Ref, Unit, Pair]]] = {}
        for u in self.layout.units:
            for t in u.taps:
                out.setdefault(t.ref.node, []).append((t.ref, u, t.parity))
            for p in (p for ps in u.operands for p in ps if p.ref is not None):
                assert p.ref is not None
                out.setdefault(p.ref.node, []).append((p.ref, u, (0, 0)))
        return out

    def _rings(self) -> dict[int, int]:
        """Rows (columns, for one-row grids) that each stored unit must keep."""
        readers = self._readers()
        rings = {}
        for instr in self.layout.instrs:
            for u in instr.stored:
                rings[u.id] = max([1] + [_lag(u.live, u.when, r, v, par) for r, v, par in readers.get(u.id, [])])
        for u in self.layout.units:
            if u.partial is not None:
                rings[u.partial] = max(
                    rings[u.partial], _partial_lag(u, next(p for p in self.layout.units if p.id == u.partial))
                )
        steps = _param_times(self.layout)
        for f, chans in enumerate(self.layout.params):
            for uid in {k for k, _ in chans}:
                unit = next(p for p in self.layout.units if p.id == uid)
                rings[uid] = max(rings[uid], _newest_lag(unit.live, unit.when, steps[f]))
        return rings

    def _input_ring(self) -> int:
        lay = self.layout
        lags = [1]
        live = torch.ones(lay.grid, dtype=torch.bool)
        readers = self._readers()
        for u in lay.units:
            if u.kind == "input":
                lags += [_lag(live, lay.input_written, r, v, par) for r, v, par in readers.get(u.id, [])]
        return max(lags) + 1

    def _table(self, values: Tensor) -> int:
        """A Const buffer holding a per-site constant [C, H, W]."""
        key = id(values)
        grid: Pair = (values.shape[1], values.shape[2])
        if self.layout.sequence and grid[0] == 1 and self.grow:
            values = _stretch(values, self._grow_cols(grid[1]))
        offset = self.consts.add(values.permute(1, 2, 0).contiguous().numpy())
        if key not in self.tables:
            self.tables[key] = self._buffer(values.shape[0], grid, T.CONST, None, offset)
        return self.tables[key]

    # ---- ops -----------------------------------------------------------------------------------------------------
    def _op(self, instr: Instr, parity: Pair, space: Space) -> None:
        host, lead = instr.host, instr.lead
        up = host.up if host else (1, 1)
        tap0, acc, k, bias, site_bias, partial, offset = len(self.taps), 0, 0, -1, -1, -1, 0
        if host is not None:
            rows, weight = dense_taps(host, parity, space)
            self.taps += rows
            acc, k, offset = host.channels, weight.shape[1], self._weights(weight)
            if host.bias is not None and host.bias.dim() == 1:
                padded = torch.zeros(ceil_panel(acc))
                padded[:acc] = host.bias.float()
                bias = self.consts.add(padded.numpy())
            elif host.bias is not None:
                site_bias = self._table(host.bias.float())
            if host.partial is not None:
                partial = self.home[host.partial][0]
        ntaps = len(self.taps) - tap0
        coder = Coder(space, instr, parity)
        rows_q, cols_q = q_grid(lead.grid, up, parity)
        if lead.grid[0] == 1:  # none where a short sequence ends before this parity begins
            cols_q = q_grid((1, self._grow_cols(lead.grid[1])), up, parity)[1]
        self.ops.append((
            tap0, ntaps, acc, k, offset, bias, site_bias, partial, len(self.code), len(coder.code),
            max(coder.top, T.PANEL), *up, *parity, rows_q, cols_q, self.advance[(instr.index, parity)],
        ))  # fmt: skip
        self.code += coder.code
        self.op_units.append((instr, parity))

    def _weights(self, weight: Tensor) -> int:
        """Packs [O, K] as panels [ceil(O/16)][K][16]; returns their offset."""
        offset = self.weight_size
        rows = ceil_panel(weight.shape[0])
        padded = torch.zeros(rows, weight.shape[1])
        padded[: weight.shape[0]] = weight
        panels = padded.view(rows // T.PANEL, T.PANEL, weight.shape[1]).transpose(1, 2).contiguous()
        self.weights.append(panels.reshape(-1).to(self.weight_dtype))
        self.weight_size += panels.numel()
        return offset

    def program(self, head: dict[str, Any]) -> T.Program:
        """Packs everything."""
        lay = self.layout
        self._place_sources()
        space = Space(self.consts, self.taps, lambda u: self.home[u], self._table, self._reader_grid)
        for instr in lay.instrs:
            for parity in self._parities(instr):
                self._op(instr, parity, space)
        record = self._head(head)
        row_items, row_ptr, step_items, step_ptr = self._items()
        weights = torch.cat(self.weights) if self.weights else torch.zeros(0, dtype=self.weight_dtype)
        blob = (
            weights.numpy() if self.weight_dtype == torch.float32 else weights.view(torch.int16).numpy().view(np.uint16)
        )
        cols = lay.grid[1] + self.grow
        return T.Program(
            np.array([tuple(b) for b in self.buffers], T.BUFFER), np.array(self._stretched_taps(), T.TAP),
            np.array(self.code, T.MICRO), np.array(self.ops, T.OP), row_items, row_ptr, step_items, step_ptr,
            lay.step_site[: self.period].clamp(max=lay.grid[0] * cols - 1).to(torch.int32).numpy(), blob, self._consts(), record,
            lay.grid[0], cols, len(lay.step_site) + self.grow * lay.phases, lay.row_len, self.period,
            max(self.arena, T.PANEL), self.cond,
        )  # fmt: skip

    def _consts(self) -> T.Array:
        if not self.consts.values:
            return np.zeros(T.PANEL, np.float32)
        return np.concatenate([*self.consts.values, np.zeros(T.PANEL, np.float32)])

    def _reader_grid(self, buf: int) -> Pair:
        return self._plan_grid[buf]

    def _stretched_taps(self) -> list[tuple[int, ...]]:
        """Bounds at the end of the sequence, moved there. What the sample itself decides never looks past the newest
        value, so where the planned length ended is no bound for it."""
        if not self.layout.sequence:
            return self.taps
        out = []
        for row in self.taps:
            buffer, grid = self.buffers[row[0]], self._plan_grid[row[0]]
            hi = row[12]
            if grid[0] == 1 and grid[1] > 1 and hi > grid[1] // 2:
                hi = buffer[2] if buffer[5] in (T.STATE, T.INPUT) else max(0, hi + buffer[2] - grid[1])
            out.append((*row[:12], hi))
        return out

    def _head(self, head: dict[str, Any]) -> Any:
        lay = self.layout
        record = np.zeros((), T.HEAD)
        for key in (
            "kind",
            "channels",
            "phases",
            "n",
            "levels",
            "params",
            "enc",
            "delay",
            "floor_log_scale",
            "clip_lo",
            "clip_hi",
        ):
            record[key] = head[key]
        record["input"] = 0
        record["table"] = -1 if head["table"] is None else self.consts.add(head["table"].float().numpy())
        record["start"] = -1 if head["start"] is None else self.consts.add(head["start"].float().numpy())
        record["tap0"] = len(self.taps)
        for f, chans in enumerate(lay.params):
            record["tap_ptr"][f] = len(self.taps) - record["tap0"]
            start = 0
            for k in range(1, len(chans) + 1):
                if k == len(chans) or chans[k][0] != chans[k - 1][0] or chans[k][1] != chans[k - 1][1] + 1:
                    buf, place = self.home[chans[start][0]]
                    grid = self._plan_grid[buf]
                    self.taps.append((buf, place[chans[start][1]], k - start, 1, 1, 1, 1, 0, 0, 0, grid[0], 0, grid[1]))
                    start = k
        record["tap_ptr"][len(lay.params) :] = len(self.taps) - record["tap0"]
        return record


def _advance(when: Tensor, q: Tensor, period: int, steps: int) -> int | None:
    """Sites per period if times repeat with it (and the borders can follow the same rule), else None."""
    base = (steps // 2) // period

    def window(k: int) -> tuple[Tensor, Tensor]:
        inside = (when >= 2 * period * k) & (when < 2 * period * (k + 1))
        order = torch.argsort(when[inside] * (1 << 32) + q[inside])
        return when[inside][order], q[inside][order]

    (t0, q0), (t1, q1) = window(base), window(base + 1)
    if not len(q0) or len(q0) != len(q1) or not torch.equal(t0 + 2 * period, t1):
        return None
    advance = int(q1[0] - q0[0])
    if advance <= 0 or not bool((q1 - q0 == advance).all()):
        return None
    rule = {int(s) % advance: (int(t), int(s)) for t, s in zip(t0, q0, strict=True)}
    middle = len(q) // 4
    for t, site in zip(when.tolist(), q.tolist(), strict=True):
        if site % advance not in rule:
            return None
        t_rule, q_rule = rule[site % advance]
        expected = t_rule + (site - q_rule) // advance * 2 * period
        if expected != t and (expected > t or expected < 0 or abs(site - q_rule) < middle):
            return None
    return advance


def _progressions(when: Tensor, q: Tensor) -> list[tuple[int, int, int, int]]:
    """(time, q0, count, step): the sites of an op at each time, as arithmetic progressions."""
    order = torch.argsort(when * (1 << 32) + q)
    out: list[tuple[int, int, int, int]] = []
    for t, s in zip(when[order].tolist(), q[order].tolist(), strict=True):
        if out and out[-1][0] == t:
            _, q0, count, step = out[-1]
            if count == 1 or s == q0 + count * step:
                out[-1] = (t, q0, count + 1, s - q0 if count == 1 else step)
                continue
        out.append((t, s, 1, 1))
    return out


def _index(entries: list[tuple[int, int, int, int, int]], slots: int) -> tuple[Any, Any]:
    entries = sorted(entries)
    items = np.array([e[1:] for e in entries], T.ITEM) if entries else np.zeros(0, T.ITEM)
    counts = np.bincount(np.array([e[0] for e in entries], dtype=np.int64), minlength=slots)
    return items, np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)


def _newest(live: Tensor, when: Tensor, at: Tensor) -> Tensor:
    """The furthest row (column, for one-row grids) written at times <= at."""
    axis = 0 if live.shape[0] > 1 else 1
    i = live.nonzero()[:, axis]
    times, order = when[live].to(torch.int64).sort(stable=True)
    far = i[order].cummax(0)[0]
    position = torch.searchsorted(times, at.to(torch.int64).contiguous(), right=True) - 1
    return far[position.clamp(min=0)]


def _lag(live: Tensor, when: Tensor, ref: Ref, reader: Unit, parity: Pair) -> int:
    (ui, uj), (pu, pv) = (reader.up if reader.kind == "taps" else (1, 1)), parity
    rl, rw = reader.live[pu::ui, pv::uj], reader.when[pu::ui, pv::uj]
    i, j = rl.nonzero().unbind(1)
    si, sj = ref.at.rows(i), ref.at.cols(j)
    ok = ref.at.inside(si, sj) & (si >= 0) & (sj >= 0) & (si < live.shape[0]) & (sj < live.shape[1])
    if not bool(ok.any()):
        return 1
    source = (si if live.shape[0] > 1 else sj)[ok]
    return int((_newest(live, when, rw[i, j][ok]) - source).max()) + 1


def _partial_lag(unit: Unit, partial: Unit) -> int:
    i, j = unit.live.nonzero().unbind(1)
    source = i if partial.live.shape[0] > 1 else j
    return int((_newest(partial.live, partial.when, unit.when[i, j]) - source).max()) + 1


def _newest_lag(live: Tensor, when: Tensor, at: Tensor) -> int:
    i, j = torch.ones_like(at, dtype=torch.bool).nonzero().unbind(1)
    source = i if live.shape[0] > 1 else j
    return int((_newest(live, when, at[i, j]) - source).max()) + 1


def _param_times(lay: Layout) -> Tensor:
    """[phases, H, W] times at which the head reads its parameters."""
    site = lay.step_site.to(torch.int64)
    steps = torch.zeros(lay.phases, lay.grid[0] * lay.grid[1], dtype=torch.int64)
    seen = torch.arange(len(site))
    if lay.phases == 1:
        steps[0, site] = seen
    else:
        order = torch.argsort(site * len(site) + seen)
        steps[:, :] = seen[order].view(-1, lay.phases).t()
    return (2 * steps + 1).view(lay.phases, *lay.grid)


def _stretch(values: Tensor, cols: int) -> Tensor:
    """A per-site constant of a sequence at another length: its middle value repeats."""
    n = values.shape[2]
    middle = values[:, :, n // 4 : 3 * n // 4]
    if not bool((middle == middle[:, :, :1]).all()):
        raise UnsupportedError("a constant varies along the sequence, so the plan holds for the compiled length only")
    if cols <= n // 2:
        return values[:, :, :cols].contiguous()
    fill = middle[:, :, :1].expand(-1, -1, cols - n // 2)
    return torch.cat([values[:, :, : n // 2], fill], 2)
