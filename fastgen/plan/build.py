"""From a module to its plan: capture, ready times, clocks, fusion."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.capture.capture import capture
from fastgen.errors import UnsupportedError
from fastgen.forward import device_of
from fastgen.graph.node import Graph
from fastgen.graph.refs import Places
from fastgen.plan.fuse import fuse
from fastgen.plan.period import borders, period_of
from fastgen.plan.plan import Plan, Schedule
from fastgen.plan.ready import check_causal, check_supported, ready_times
from fastgen.plan.receptive import receptive_field
from fastgen.plan.schedule import Clock, check, schedule
from fastgen.plan.units import Unit, merge_sums, split
from fastgen.spec import Spec

# Steps per row of a sequence: what is at least this far back is summed in batches, what is nearer is site work. Longer
# rows batch more columns at once, and leave more of a layer's taps behind.
CHUNK = 8
LONG = 1024  # sequences longer than this are planned on a shorter one: its schedule repeats, and planning is cheap
SHORT = 64  # sequences shorter than this are planned like images, step by step: they hold no period to repeat

MOST_SITES = 4096  # of a sequence that is planned site by site: some seconds of planning
# Of a site: each may need units and taps of its own for every other, 10 s of planning for a full triangle.
MOST_VALUES = 256


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
def build_plan(model: nn.Module, spec: Spec, cond: tuple[Any, ...], whole: bool = False) -> Plan:
    """Plans a module for samples of `spec` with example conditioning `cond` (batch 1).

    whole: a sequence is planned site by site, for its own length alone, as where it is different at different sites.
    Raises UnsupportedError, NotCausalError or ShapeError, each naming the layer, before anything is run.
    """
    began = time.perf_counter()
    planned = spec
    whole = whole or spec.order is not None
    if whole and spec.sequence and spec.sites[0] > MOST_SITES:
        raise UnsupportedError(
            f"a sequence of {spec.sites[0]} sites that are not alike (positions, or an order); the planner takes up to "
            f"{MOST_SITES} of those, as each is planned by itself"
        )
    any_length = spec.sequence and not whole and not any(isinstance(c, Tensor) for c in cond)
    if any_length and spec.sites[0] > LONG:
        planned = spec.at_length(LONG)
    while True:
        try:
            planned, graph, units, params = _units(model, planned, cond)
        except UnsupportedError:
            if spec.layout != "T" or spec.head.enc != 1 or spec.head.at_once or spec.predicts != "same":
                raise
            spec = spec.as_vector()  # every output from every input: not sites but one vector
            planned, graph, units, params = _units(model, spec, cond)
        offsets = [u_ref.at.off for u in units for u_ref in u.refs()]
        reach = max([1] + [max(abs(off[0]), abs(off[1])) for off in offsets])
        if planned.sites == spec.sites or 4 * reach <= planned.sites[0]:
            break
        planned = spec.at_length(min(spec.sites[0], 1 << (4 * reach - 1).bit_length()))
    if spec.sequence and not whole and spec.sites[0] >= SHORT and not _alike(units):
        return build_plan(model, spec, cond, whole=True)
    made = _schedule(planned, units, params, whole)
    if made is None:
        return build_plan(model, spec, cond, whole=True)
    plan = Plan(planned, graph, made, reach, time.perf_counter() - began)
    if spec.sequence and spec.order is None and not plan.schedule.sequence and spec.sites[0] >= SHORT:
        plan.notes["length"] = f"{spec.sites[0]} sites only, which are not alike"
    plan.receptive_field = receptive_field(graph, planned)
    plan.seconds = time.perf_counter() - began
    return plan


def _units(model: nn.Module, spec: Spec, cond: tuple[Any, ...]) -> tuple[Spec, Graph, list[Unit], Places]:
    """Captures and splits; the spec comes back with the layout of forward's output settled, so that it cannot become
    ambiguous at another length."""
    if spec.phases > MOST_VALUES:
        raise UnsupportedError(
            f"samples of shape {spec.shape} have {spec.phases} values drawn one after another at a site; the planner takes "
            f"up to {MOST_VALUES}, as plans grow with the square of that"
        )
    x = spec.encode(torch.zeros(1, spec.grid[0] * spec.grid[1], spec.channels, dtype=torch.float32))
    device = device_of(model)
    if device.type != "cpu":
        raise UnsupportedError(f"the module is on {device}; planning runs on the CPU (model.cpu())")
    settled: list[str] = []

    def parameters_of(out: Tensor) -> Tensor:
        settled.append(spec.head.layout(out.shape, spec.values_per_site, spec.sites))
        return spec.parameters(out)

    def captured(plans_conditioning: bool) -> Graph:
        graph = capture(
            model, x, cond, spec.input_channels, spec.grid, spec.laid_out, parameters_of, spec.input_range,
            plans_conditioning=plans_conditioning,
        )  # fmt: skip
        check_supported(graph)
        return graph

    try:
        graph = captured(True)
    except UnsupportedError:  # torch has more operations than the planner, and conditioning may be left to it
        if not spec.sequence or not any(isinstance(c, Tensor) and c.dim() > 1 for c in cond):
            raise
        graph = captured(False)
    graph = merge_sums(graph)
    ready = ready_times(graph, spec.timeline.known)
    check_causal(graph, ready, spec.timeline.table)
    units, params = split(graph, ready)
    return replace(spec, head=spec.head.with_layout(settled[0])), graph, units, params


def _alike(units: list[Unit]) -> bool:
    """Whether the sites of a sequence read alike, with the same constants, but for the first and the last quarter, which go
    with the ends."""
    for unit in units:
        for c in unit.node.constants():
            if c.dim() == 3 and c.shape[1] == 1 and c.shape[2] >= 8 and borders(c) is None:
                return False
        for ref in unit.refs():
            width = units[ref.node].grid[1]
            if width >= 8 and (ref.at.lo[1] > width // 4 or ref.at.hi[1] < width - width // 4):
                return False
    return True


def _schedule(spec: Spec, units: list[Unit], params: Places, whole: bool) -> Schedule | None:
    """None: a sequence whose schedule does not repeat, so that it must be planned whole."""
    sequence = spec.sequence and spec.sites[0] >= SHORT and not whole
    if spec.order is not None:
        row_len = spec.steps
    elif spec.sequence:
        row_len = CHUNK * spec.phases if sequence else 1
    else:
        row_len = spec.grid[1] * spec.phases
    live = schedule(units, params, spec.timeline.table, Clock(row_len))
    check(live)
    instrs = fuse(live, params)
    if not sequence:
        return Schedule(live, instrs, params, spec.timeline, row_len, False, spec.steps)
    found = period_of(instrs, spec.steps, row_len)
    return None if found is None else Schedule(live, instrs, params, spec.timeline, row_len, True, *found)
