"""Fusion: pointwise units join the linear unit whose result they read, so one instruction is one pass over a site."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastgen.graph.refs import Pair, Places, Ref
from fastgen.plan.units import Unit


@dataclass(eq=False)
class Instr:
    """One instruction: an optional linear unit and the pointwise units that follow it at the same sites and time."""

    index: int
    lead: Unit  # gives sites and times
    host: Unit | None  # the linear unit
    maps: list[Unit] = field(default_factory=list)
    stored: list[Unit] = field(default_factory=list)

    @property
    def units(self) -> list[Unit]:
        """In the order of execution."""
        return ([self.host] if self.host else []) + self.maps

    @property
    def up(self) -> Pair:
        """Its sites are q * up + parity, one op a parity."""
        return self.host.node.up if self.host else (1, 1)

    @property
    def parities(self) -> list[Pair]:
        """The parities of its sites, in order."""
        return [(u, v) for u in range(self.up[0]) for v in range(self.up[1])]


def fuse(units: list[Unit], params: Places) -> list[Instr]:
    """Instructions in running order; sets what each must store for others."""
    home: dict[int, Instr] = {}
    instrs: list[Instr] = []
    for unit in units:
        if unit.node.source:
            continue
        host = None if unit.node.linear else _host(unit, home, instrs)
        if host is None:
            host = Instr(len(instrs), unit, unit if unit.node.linear else None)
            instrs.append(host)
        if not unit.node.linear:
            host.maps.append(unit)
        home[unit.id] = host
    needed = {uid for chans in params for uid, _ in chans}
    for unit in units:
        for ref in unit.refs():
            if ref.node in home and (home[ref.node] is not home[unit.id] or not ref.at.identity):
                needed.add(ref.node)
        if unit.partial is not None:
            needed.add(unit.partial)
    for instr in instrs:
        instr.stored = [u for u in instr.units if u.id in needed]
        for u in instr.units:  # a fused unit runs wherever its leader does
            u.grid, u.live, u.when = instr.lead.grid, instr.lead.live, instr.lead.when
    return instrs


def _host(unit: Unit, home: dict[int, Instr], instrs: list[Instr]) -> Instr | None:
    """The instruction of the latest operand, if the unit can run there: same sites, same time, same site read."""
    reads: list[Ref] = [r for r in unit.refs() if r.node in home]
    if not reads:
        return None
    last = max((home[r.node] for r in reads), key=lambda h: h.index)
    inside = [r for r in reads if home[r.node] is last]
    if any(not r.at.identity for r in inside):
        return None
    lead = last.lead
    h, w = min(unit.grid[0], lead.grid[0]), min(unit.grid[1], lead.grid[1])
    live = unit.live[:h, :w]
    if int(live.sum()) != int(unit.live.sum()) or not bool(lead.live[:h, :w][live].all()):
        return None
    if not bool((unit.when[:h, :w] == lead.when[:h, :w])[live].all()):
        return None
    return last if all(_covers(r, unit) for r in inside) else None


def _covers(ref: Ref, unit: Unit) -> bool:
    """Whether the bounds of a same-site read admit every live site of the reader."""
    i, j = unit.live.nonzero().unbind(1)
    return bool(ref.at.inside(i, j).all())
