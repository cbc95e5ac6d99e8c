"""Pointwise nodes and reductions over channels."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fastgen.graph.bounds import Range, of_values, range_of_map, union
from fastgen.graph.functions import REDUCE, pointwise
from fastgen.graph.node import Coder, Node
from fastgen.graph.refs import Cause, Operand, Piece, Places, Read, Ref, restrict
from fastgen.graph.times import NEVER, Ready, look


@dataclass
class OperandNode(Node):
    """A node that computes from operands at its own sites."""

    operands: list[Operand] = field(default_factory=list)

    def reads(self) -> list[Read]:
        return [Read(p.ref) for pieces in self.operands for p in pieces if p.ref is not None]

    def constants(self) -> list[Tensor]:
        return [p.const for pieces in self.operands for p in pieces if p.const is not None]

    def whole(self, operand: int, values: Sequence[Tensor]) -> Tensor:
        """All lanes of an operand at the node's sites, float64 [lanes, H, W]."""
        return torch.cat([p.value(values, self.grid) for p in self.operands[operand]])

    def bounds_of(self, operand: int, known: Mapping[int, Range]) -> Range:
        """Of all lanes of an operand, and of what stands outside of them."""
        parts: list[Range] = []
        for p in self.operands[operand]:
            parts += [of_values(p.const)] if p.const is not None else []
            parts += [known[p.ref.node], (p.fill, p.fill)] if p.ref is not None else []
        return union(parts)

    def ready(self, done: list[Ready], known: Tensor) -> Ready:
        """All channels when all lanes are."""
        result = Ready.uniform(self.channels, self.grid)
        for read in self.reads():
            source = done[read.ref.node]
            groups = source.group[list(read.ref.chans)].unique()
            seen = look(source.times[groups], read.ref.at, self.grid).amax(0, keepdim=True)
            result.times = torch.maximum(result.times, seen)
        return result

    def restrict(self, chans: list[int], places: Places) -> Node:
        """Every channel needs every lane."""
        operands = [restrict(pieces, list(range(pieces[-1].hi)), places) for pieces in self.operands]
        return replace(self, channels=len(chans), operands=operands)

    def blame(self, chan: int, i: int, j: int) -> Iterator[Cause]:
        for read in self.reads():
            for lane in range(len(read.ref.chans)):
                yield Cause("", read.ref, lane, i, j)

    def forget(self, live: set[int]) -> None:
        self.operands = [
            [p.constant() if p.ref is not None and p.ref.node not in live else p for p in pieces]
            for pieces in self.operands
        ]


@dataclass
class MapNode(OperandNode):
    """out[c] = fn(operand_0[c], operand_1[c], ...; imm) at every site."""

    fn: str = "copy"
    imm: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        return self.fn

    def ready(self, done: list[Ready], known: Tensor) -> Ready:
        dead = self.dead()
        keys = torch.full((self.channels, len(self.operands)), -1, dtype=torch.int64)
        sources: list[tuple[Ref, int]] = []
        for k, pieces in enumerate(self.operands):
            for piece in pieces:
                if piece.ref is None:
                    continue
                group = done[piece.ref.node].group[list(piece.ref.chans)]
                for g in group.unique().tolist():
                    lanes = (group == g).nonzero()[:, 0] + piece.lo
                    keys[lanes, k] = len(sources)
                    sources.append((piece.ref, g))
        extra = [torch.unique(d.reshape(self.channels, -1), dim=0, return_inverse=True)[1] for d in dead.values()]
        rows, group = torch.unique(torch.cat([keys, *[e[:, None] for e in extra]], 1), dim=0, return_inverse=True)
        first = torch.zeros(len(rows), dtype=torch.int64)
        first[group] = torch.arange(self.channels)
        times = torch.full((len(rows), *self.grid), NEVER, dtype=torch.int32)
        for r, row in enumerate(rows.tolist()):
            for k in range(len(self.operands)):
                if row[k] < 0:
                    continue
                ref, g = sources[row[k]]
                seen = look(done[ref.node].times[g : g + 1], ref.at, self.grid)[0]
                if k in dead:
                    seen = torch.where(dead[k][first[r]], NEVER, seen)
                times[r] = torch.maximum(times[r], seen)
        return Ready(group, times).merged()

    def dead(self) -> dict[int, Tensor]:
        """Per operand the elements [C, H, W] that cannot matter: factors of a constant zero, untaken branches, and what is
        brought to one value whatever it is."""
        if (self.fn == "affine" and self.imm[0] == 0) or (self.fn == "clamp" and self.imm[0] >= self.imm[1]):
            return {0: torch.ones(self.channels, *self.grid, dtype=torch.bool)}
        if self.fn in ("mul", "muladd"):
            tests = ((0, 1, True), (1, 0, True))
        elif self.fn == "where":
            tests = ((1, 0, True), (2, 0, False))
        else:
            return {}
        found = {k: self._constant(other, zero) for k, other, zero in tests}
        return {k: hit for k, hit in found.items() if bool(hit.any())}

    def reads(self) -> list[Read]:
        dead = self.dead()
        return [
            Read(p.ref, dead=_of_lanes(dead[k], p) if k in dead else None)
            for k, pieces in enumerate(self.operands)
            for p in pieces
            if p.ref is not None
        ]

    def _constant(self, operand: int, zero: bool) -> Tensor:
        """Where an operand is a constant that is zero, or is not: [C, H, W]."""
        hit = torch.zeros(self.channels, *self.grid, dtype=torch.bool)
        for p in self.operands[operand]:
            if p.const is not None:
                c = p.const.reshape(p.const.shape[0], *(p.const.shape[1:] or (1, 1)))
                hit[p.lo : p.hi] = (c == 0) if zero else (c != 0)
        return hit

    def restrict(self, chans: list[int], places: Places) -> Node:
        operands = [restrict(pieces, chans, places) for pieces in self.operands]
        for k, dead in self.dead().items():  # what cannot matter at any site is not waited for
            if bool(dead[chans].all()):
                operands[k] = [Piece(0, len(chans), const=torch.zeros(len(chans)))]
        return replace(self, channels=len(chans), operands=operands)

    def blame(self, chan: int, i: int, j: int) -> Iterator[Cause]:
        dead = self.dead()
        for k, pieces in enumerate(self.operands):
            if k in dead and bool(dead[k][chan, i, j]):
                continue
            for p in pieces:
                if p.ref is not None and p.lo <= chan < p.hi:
                    yield Cause("", p.ref, chan - p.lo, i, j)

    def value(self, values: Sequence[Tensor]) -> Tensor:
        return pointwise(self.fn, [self.whole(k, values) for k in range(len(self.operands))], self.imm).double()

    def bounds(self, known: Mapping[int, Range]) -> Range:
        return range_of_map(self.fn, [self.bounds_of(k, known) for k in range(len(self.operands))], self.imm)

    @property
    def adds_up(self) -> bool:
        if not self.reads() or not all(bool((c >= 0).all()) for c in self.constants()):
            return False
        if self.fn == "affine":  # one less a share is a share
            return self.imm[0] >= 0 or self.imm[0] + self.imm[1] >= 0
        return self.fn in ("copy", "mul", "muladd", "add", "where", "maximum", "minimum", "clamp")

    def emit(self, coder: Coder) -> int:
        cuts = sorted({c for pieces in self.operands for p in pieces for c in (p.lo, p.hi)})
        if self.fn == "copy" and len(cuts) == 2:  # the value itself, under another name
            address = coder.address(self.operands[0][0], 0, self.channels)
            if address >= 0:
                return address
        masked = self._masked()
        dst = coder.alloc(self.channels)
        for lo, hi in itertools.pairwise(cuts):
            args = []
            for pieces in self.operands:
                piece = next(p for p in pieces if p.lo <= lo and hi <= p.hi)
                args.append(coder.address(piece, lo - piece.lo, hi - piece.lo))
            for k in masked:  # zero times what is not there yet is not zero
                kept = coder.alloc(hi - lo)
                coder.emit("where", kept, args[1 - k], args[k], args[1 - k], hi - lo)
                args[k] = kept
            a, b, c = (*args, 0, 0, 0)[:3]
            coder.emit(self.fn, dst + lo, a, b, c, hi - lo, self.imm)
        return dst

    def _masked(self) -> list[int]:
        """Factors that are read at sites where the other one, a constant, is zero: they may hold anything there."""
        if self.fn not in ("mul", "muladd"):
            return []
        dead = self.dead()
        return [k for k in dead if any(p.ref and _of_lanes(dead[k], p) is not None for p in self.operands[k])]


def _of_lanes(dead: Tensor, piece: Piece) -> Tensor | None:
    """The sites [H, W] at which all lanes of a piece are dead; None where there are none."""
    sites = dead[piece.lo : piece.hi].all(0)
    return sites if bool(sites.any()) else None


@dataclass
class ReduceNode(OperandNode):
    """out[c] = fn (sum, max, min) over lanes c * K .. (c + 1) * K - 1 of the operand, K of them a channel."""

    fn: str = "max"

    @property
    def name(self) -> str:
        return self.fn

    @property
    def _width(self) -> int:
        return self.operands[0][-1].hi // self.channels

    def ready(self, done: list[Ready], known: Tensor) -> Ready:
        """A channel when its own lanes are."""
        sources: list[tuple[Ref, int]] = []
        keys = torch.full((self.operands[0][-1].hi,), -1, dtype=torch.int64)
        for piece in self.operands[0]:
            if piece.ref is not None:
                group = done[piece.ref.node].group[list(piece.ref.chans)]
                for g in group.unique().tolist():
                    keys[(group == g).nonzero()[:, 0] + piece.lo] = len(sources)
                    sources.append((piece.ref, g))
        keys = keys.view(self.channels, self._width).sort(1)[0]
        rows, group = torch.unique(keys, dim=0, return_inverse=True)
        times = torch.full((len(rows), *self.grid), NEVER, dtype=torch.int32)
        for r, row in enumerate(rows):
            for k in row[row >= 0].unique().tolist():
                ref, g = sources[k]
                times[r] = torch.maximum(times[r], look(done[ref.node].times[g : g + 1], ref.at, self.grid)[0])
        return Ready(group, times).merged()

    def restrict(self, chans: list[int], places: Places) -> Node:
        lanes = [c * self._width + k for c in chans for k in range(self._width)]
        return replace(self, channels=len(chans), operands=[restrict(self.operands[0], lanes, places)])

    def blame(self, chan: int, i: int, j: int) -> Iterator[Cause]:
        first, last = chan * self._width, (chan + 1) * self._width
        for p in self.operands[0]:
            if p.ref is not None:
                for lane in range(max(p.lo, first), min(p.hi, last)):
                    yield Cause("", p.ref, lane - p.lo, i, j)

    def value(self, values: Sequence[Tensor]) -> Tensor:
        lanes = self.whole(0, values).view(self.channels, self._width, *self.grid)
        return REDUCE[self.fn](lanes.movedim(1, -1))

    def bounds(self, known: Mapping[int, Range]) -> Range:
        found = self.bounds_of(0, known)
        if found is None or self.fn != "sum":
            return found
        return self._width * found[0], self._width * found[1]

    @property
    def adds_up(self) -> bool:
        return True

    def emit(self, coder: Coder) -> int:
        source = coder.whole(self.operands[0])
        dst, step = coder.alloc(self.channels), self._width if source >= 0 else -self._width
        for c in range(self.channels):
            coder.emit(self.fn, dst + c, source + c * step, n=self._width)
        return dst
