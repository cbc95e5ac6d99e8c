"""The plan: what runs per row and per site, what was hoisted, what it costs; in data, in numbers and in words."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from fastgen.graph.node import Graph
from fastgen.graph.refs import Places
from fastgen.plan.fuse import Instr
from fastgen.plan.period import OpKey
from fastgen.plan.units import Unit
from fastgen.spec import Spec
from fastgen.steps import Steps


@dataclass
class Schedule:
    """What packing needs: the units and instructions with their clocks, for the planned size."""

    units: list[Unit]  # live, in running order
    instrs: list[Instr]
    params: Places  # per phase: (unit, channel) of every parameter
    steps: Steps
    row_len: int  # steps of a row
    sequence: bool  # extends to any length
    period: int  # steps after which it repeats: of images, all of them
    advance: dict[OpKey, int] = field(default_factory=dict)  # of a sequence: sites that each op goes on in them


@dataclass
class Plan:
    """What runs per row and per site; print it to read it. program/ packs it for an executor."""

    spec: Spec  # as planned: sequences may be planned shorter than they are sampled
    graph: Graph
    schedule: Schedule
    reach: int  # largest distance of a tap, in sites
    seconds: float
    receptive_field: tuple[int, ...] = ()
    notes: dict[str, str] = field(default_factory=dict)  # what packer and executors say of themselves

    def __str__(self) -> str:
        return _describe(self)


@dataclass
class Work:
    """Instructions of one class and what they cost for one sample of the planned size."""

    instrs: int = 0
    executions: int = 0  # how often any of them runs (a batch of sites counts once)
    macs: int = 0
    weight_bytes: int = 0  # float32 weights read, at one sample in flight


def _cost(instr: Instr, work: Work) -> None:
    work.instrs += 1
    host, up = instr.host, instr.up
    for u, v in instr.parities:
        live = instr.lead.live[u :: up[0], v :: up[1]]
        when = instr.lead.when[u :: up[0], v :: up[1]][live]
        runs = len(when.unique())
        k = sum(len(r.ref.chans) for r in host.node.reads() if r.parity == (u, v)) if host else 0
        size = k * host.channels if host else 0
        work.executions += runs
        work.macs += size * int(live.sum())
        work.weight_bytes += 4 * size * runs


def classes(plan: Plan) -> dict[str, Work]:
    """Work by class: row (whole layers that wait for a row), hoisted (sums taken out of site layers), site."""
    table = {"row": Work(), "hoisted": Work(), "site": Work()}
    hoisted = {u.partial for u in plan.schedule.units if u.partial is not None}
    for instr in plan.schedule.instrs:
        _cost(instr, table["hoisted" if instr.lead.id in hoisted else ("row" if instr.lead.row else "site")])
    return table


def plan_stats(plan: Plan) -> dict[str, float]:
    """Figures for one sample of the planned size: MACs, weight bytes read at batch 1, instructions."""
    table = classes(plan)
    row, hoisted, site = table["row"], table["hoisted"], table["site"]
    return {
        "steps": plan.spec.steps,
        "row_macs": row.macs + hoisted.macs, "site_macs": site.macs, "hoisted_macs": hoisted.macs,
        "row_weight_bytes": row.weight_bytes + hoisted.weight_bytes, "site_weight_bytes": site.weight_bytes,
        "row_instructions": row.instrs + hoisted.instrs, "site_instructions": site.instrs,
        "site_executions_per_step": site.executions / plan.spec.steps,
        "plan_seconds": plan.seconds,
    }  # fmt: skip


def count(n: float) -> str:
    """A number for people: 3.1 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n:.3g} "


def _describe(plan: Plan) -> str:
    """The plan as a person reads it."""
    spec, table = plan.spec, classes(plan)
    total = sum(w.macs for w in table.values()) or 1
    rows = "chunks" if spec.sequence else "rows"
    lines = [
        f"plan for samples {spec.shape} ({spec.layout}), {spec.head.name}: {spec.steps} steps in {rows} of "
        f"{plan.schedule.row_len}",
        f"  captured        {len(plan.graph.nodes)} nodes, fused into {len(plan.schedule.instrs)} instructions, "
        f"{plan.seconds:.1f} s",
        f"  receptive field {' x '.join(map(str, plan.receptive_field))}",
    ]
    names = {"row": "per row", "hoisted": "hoisted to row", "site": "per site"}
    for key, w in table.items():
        lines.append(
            f"  {names[key]:<15} {w.instrs:>3} instructions, {count(w.macs / spec.steps)}MAC a step "
            f"({100 * w.macs / total:.0f}%), {count(w.weight_bytes / spec.steps)}B of weights a step at batch 1"
        )
    lines += [f"  {name:<15} {text}" for name, text in plan.notes.items()]
    lines += [f"  note            {n}" for n in plan.graph.notes]
    lines += _listing(plan)
    return "\n".join(lines)


def _listing(plan: Plan) -> list[str]:
    """Instructions by layer, in running order; runs of alike ones are counted."""
    out: list[str] = []
    last, count = "", 0
    hoisted = {u.partial for u in plan.schedule.units if u.partial is not None}
    for instr in plan.schedule.instrs:
        what = "hoist" if instr.lead.id in hoisted else ("row" if instr.lead.row else "site")
        op = f"taps {instr.host.channels}" if instr.host else f"map {instr.lead.channels}"
        maps = Counter(m.node.name for m in instr.maps if m.node.name != "copy")
        tail = " + " + ", ".join(f"{fn}{f' x{k}' if k > 1 else ''}" for fn, k in maps.items()) if maps else ""
        line = f"    {what:<6}{op}{tail}"
        key = line + instr.lead.path.rstrip("0123456789.")
        if key == last:
            count += 1
            continue
        if count:
            out[-1] += f"   (and {count} alike)"
        last, count = key, 0
        out.append(f"{line:<60} {instr.lead.path}")
    if count:
        out[-1] += f"   (and {count} alike)"
    return out
