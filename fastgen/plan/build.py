"""From a module to its plan: capture, ready times, clocks, fusion; and the plan as a person reads it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.errors import UnsupportedError
from fastgen.plan.capture import capture
from fastgen.plan.clock import Clock, check, schedule
from fastgen.plan.fuse import Instr, fuse
from fastgen.plan.ir import Graph
from fastgen.plan.pack import Layout, pack
from fastgen.plan.passes import Splitter, Unit, merge_sums
from fastgen.plan.ready import check_causal, check_supported, ready_times
from fastgen.plan.table import Program
from fastgen.spec import Spec

CHUNK = 8  # steps per row of a sequence: what is this far back is summed in batches
LONG = 1024  # sequences longer than this are planned on a shorter one
SHORT = 64  # sequences shorter than this are planned like images, step by step


@dataclass
class Plan:
    """What runs per row and per site. `program(length)` packs it for an executor; print it to read it."""

    spec: Spec  # as planned: sequences may be planned shorter than they are sampled
    graph: Graph
    layout: Layout
    reach: int  # largest distance of a tap, in sites
    seconds: float
    receptive_field: tuple[int, ...] = ()
    notes: dict[str, str] = field(default_factory=dict)  # what executors say of themselves
    _programs: dict[tuple[int | None, torch.dtype], Program] = field(default_factory=dict)

    def program(self, length: int | None = None, dtype: torch.dtype = torch.float32) -> Program:
        """The packed program; `length` is the number of sites of a sequence. Kept for the last few lengths."""
        if not self.layout.sequence:
            planned = self.spec.grid[1]
            if length not in (None, planned):
                raise UnsupportedError(
                    f"length {length}: planned for {planned} only; compile with a shape of at least {SHORT} sites"
                )
            length = None
        elif length is not None and length > self.spec.grid[1] and self.spec.grid[1] < 2 * self.reach:
            raise UnsupportedError(
                f"length {length}: the module looks {self.reach} sites back, so compile with a shape of at least "
                f"{2 * self.reach} sites to sample more than {self.spec.grid[1]}"
            )
        key = (length, dtype)
        if key not in self._programs:
            if len(self._programs) >= 4:
                self._programs.pop(next(iter(self._programs)))
            with one_thread():
                self._programs[key] = pack(self.layout, self.spec.native_head(), dtype, length)
        return self._programs[key]

    def __str__(self) -> str:
        from fastgen.plan.describe import describe

        return describe(self)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Planning is many small operations: torch's threads would cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def build_plan(model: nn.Module, spec: Spec, cond: tuple[Any, ...]) -> Plan:
    """Plans a module for samples of `spec` with example conditioning `cond` (batch 1).

    Raises UnsupportedError, NotCausalError or ShapeError, each naming the layer, before anything is run.
    """
    began = time.perf_counter()
    planned = spec
    if spec.sequence and spec.sites[0] > LONG and not any(isinstance(c, Tensor) for c in cond):
        planned = spec.at_length(LONG)
    while True:
        try:
            planned, graph, units, params = _units(model, planned, cond)
        except UnsupportedError:
            if spec.layout != "T" or spec.vector or spec.head.enc != 1 or spec.predicts != "same":
                raise
            spec = replace(spec, vector=True)  # every output from every input: not sites but one vector
            planned, graph, units, params = _units(model, spec, cond)
        reach = max([1] + [max(abs(r.at.off[0]), abs(r.at.off[1])) for u in units for r in u.refs()])
        if planned.sites == spec.sites or 4 * reach <= planned.sites[0]:
            break
        planned = spec.at_length(min(spec.sites[0], 1 << (4 * reach - 1).bit_length()))
    layout = _layout(planned, units, params)
    plan = Plan(planned, graph, layout, reach, time.perf_counter() - began)
    plan.receptive_field = receptive_field(graph, planned)
    plan.seconds = time.perf_counter() - began
    return plan


def _units(
    model: nn.Module, spec: Spec, cond: tuple[Any, ...]
) -> tuple[Spec, Graph, list[Unit], list[list[tuple[int, int]]]]:
    """Captures and splits; the spec comes back with the layout of forward's output settled, so that it cannot become
    ambiguous at another length."""
    x = spec.encode(torch.zeros(1, spec.grid[0] * spec.grid[1], spec.channels, dtype=torch.float32))
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type != "cpu":
        raise UnsupportedError(f"the module is on {device}; planning runs on the CPU (model.cpu())")
    settled: list[str] = []

    def arrange(out: Tensor) -> Tensor:
        settled.append(spec.head.layout(out.shape, 1 if spec.vector else spec.channels, spec.sites))
        return spec.parameters(out)

    graph = capture(model, x, cond, spec.input_ids, arrange)
    check_supported(graph)
    graph = merge_sums(graph)
    ready = ready_times(graph, spec.input_times())
    check_causal(graph, ready, spec.step_table())
    split = Splitter(graph, ready)
    spec = replace(spec, head=spec.head.with_layout(settled[0]))
    return spec, graph, split.units, split.params


def _layout(spec: Spec, units: list[Unit], params: list[list[tuple[int, int]]]) -> Layout:
    sequence = spec.sequence and spec.sites[0] >= SHORT and spec.order is None
    if spec.order is not None:
        row_len = spec.steps
    elif spec.sequence:
        row_len = CHUNK * spec.phases if sequence else 1
    else:
        row_len = spec.grid[1] * spec.phases
    live = schedule(units, params, spec.step_table(), Clock(row_len))
    check(live)
    instrs: list[Instr] = fuse(live, params)
    return Layout(
        live, instrs, params, spec.input_channels, spec.grid, spec.phases, row_len, sequence,
        spec.step_site(), spec.input_times().amax(0),
    )  # fmt: skip


def receptive_field(graph: Graph, spec: Spec) -> tuple[int, ...]:
    """Extent (rows, columns), or (length,), of the inputs that one output sees, from the taps' offsets.

    Coarse nodes count with their stride; a bound where branches differ.
    """
    from fastgen.plan.ir import InputNode, refs

    spans: list[tuple[float, float, float, float] | None] = [None] * len(graph.nodes)
    scale: list[tuple[float, float]] = [(1.0, 1.0)] * len(graph.nodes)
    for node in graph.nodes:
        if isinstance(node, InputNode):
            spans[node.index] = (0.0, 0.0, 0.0, 0.0)
            continue
        best: tuple[float, float, float, float] | None = None
        up = getattr(node, "up", (1, 1))
        for ref in refs(node):
            below = spans[ref.node]
            if below is None:
                continue
            ratio = tuple(max(ref.at.mul[a], 1) / ref.at.div[a] / up[a] for a in (0, 1))
            step = scale[ref.node]
            scale[node.index] = (step[0] * ratio[0], step[1] * ratio[1])
            oi, oj = ref.at.off[0] / ref.at.div[0] * step[0], ref.at.off[1] / ref.at.div[1] * step[1]
            # a fine site reads the coarse one it rounds down to: up to a stride less one further back
            ri, rj = (step[a] * ((1 - 1 / ref.at.div[a]) + (1 - 1 / up[a])) for a in (0, 1))
            seen = (below[0] + oi - ri, below[1] + oi, below[2] + oj - rj, below[3] + oj)
            best = seen if best is None else (
                min(best[0], seen[0]), max(best[1], seen[1]), min(best[2], seen[2]), max(best[3], seen[3])
            )  # fmt: skip
        spans[node.index] = best
    top = spans[graph.params[-1]]
    if top is None:
        return ()
    rows, cols = int(top[1] - top[0]) + 1, int(top[3] - top[2]) + 1
    return (min(cols, spec.sites[0]),) if spec.sequence else (min(rows, spec.grid[0]), min(cols, spec.grid[1]))
