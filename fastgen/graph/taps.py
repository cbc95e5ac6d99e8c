"""The linear node: convolutions, transposed convolutions, linear layers, sums."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from fastgen.graph.bounds import Range, of_values, union
from fastgen.graph.node import Coder, Node
from fastgen.graph.refs import Cause, Pair, Places, Read, Ref, Term
from fastgen.graph.times import NEVER, Ready, look


@dataclass
class TapsNode(Node):
    """out[q * up + parity] = bias + sum_k W_k x_k(q)."""

    taps: list[Term] = field(default_factory=list)
    bias: Tensor | None = None  # [O] or [O, H, W]

    linear: ClassVar[bool] = True

    def reads(self) -> list[Read]:
        return [Read(t.ref, self.up, t.parity) for t in self.taps]

    def ready(self, done: list[Ready], known: Tensor) -> Ready:
        columns = [(t, g, use) for t in self.taps for g, use in _columns(t, done[t.ref.node]) if bool(use.any())]
        if not columns:
            return Ready.uniform(self.channels, self.grid)
        pattern = torch.stack([use for _, _, use in columns], 1)
        if bool(pattern.all()):
            rows, group = pattern[:1], torch.zeros(self.channels, dtype=torch.int64)
        else:
            rows, group = torch.unique(pattern, dim=0, return_inverse=True)
        times = torch.full((len(rows), *self.grid), NEVER, dtype=torch.int32)
        for k, (term, g, _) in enumerate(columns):
            part = Read(term.ref, self.up, term.parity).of_sites(times)
            seen = look(done[term.ref.node].times[g : g + 1], term.ref.at, (part.shape[1], part.shape[2]))
            part.copy_(torch.where(rows[:, k, None, None], torch.maximum(part, seen), part))
        return Ready(group, times).merged()

    def value(self, values: Sequence[Tensor]) -> Tensor:
        out = torch.zeros(self.channels, *self.grid, dtype=torch.float64)
        if self.bias is not None:
            out += self.bias.double().reshape(self.channels, *(self.bias.shape[1:] or (1, 1)))
        for term, read in zip(self.taps, self.reads(), strict=True):
            part = read.of_sites(out)
            seen = term.ref.read(values[term.ref.node], (part.shape[1], part.shape[2]))
            part += torch.einsum("ok,kij->oij", term.weight.double(), seen)
        return out

    def bounds(self, known: Mapping[int, Range]) -> Range:
        """Sums, parity by parity, of weights times what they meet, which is zero outside of a layer."""
        bias = (0.0, 0.0) if self.bias is None else of_values(self.bias)
        sums: dict[Pair, tuple[Tensor, Tensor]] = {}
        for term in self.taps:
            found = union([known[term.ref.node], (0.0, 0.0)])
            if found is None or bias is None:
                return None
            w = term.weight.double()
            up, down = w.clamp(min=0).sum(1), w.clamp(max=0).sum(1)
            low, high = sums.get(term.parity, (0.0, 0.0))
            sums[term.parity] = (low + up * found[0] + down * found[1], high + up * found[1] + down * found[0])
        if not sums or bias is None:
            return bias
        low, high = (min(float(a.min()) for a, _ in sums.values()), max(float(b.max()) for _, b in sums.values()))
        return low + bias[0], high + bias[1]

    def constants(self) -> list[Tensor]:
        return [] if self.bias is None else [self.bias]

    @property
    def adds_up(self) -> bool:
        return bool(self.taps) and all(bool((t.weight >= 0).all()) for t in self.taps)

    def restrict(self, chans: list[int], places: Places) -> Node:
        whole = len(chans) == self.channels
        bias = self.bias if whole or self.bias is None else self.bias[chans]
        taps = [t for term in self.taps for t in _restrict(term, None if whole else chans, places)]
        return replace(self, channels=len(chans), taps=taps, bias=bias)

    def blame(self, chan: int, i: int, j: int) -> Iterator[Cause]:
        for term in self.taps:
            if (i % self.up[0], j % self.up[1]) != term.parity:
                continue
            where = ""
            if term.kernel is not None and term.extent is not None and max(term.extent) > 1:
                where = f" tap (row {term.kernel[0]}, col {term.kernel[1]}) of {term.extent}"
            for lane in term.weight[chan].nonzero()[:, 0].tolist():
                yield Cause(f"{self.path}: {self.op}{where}", term.ref, lane, i // self.up[0], j // self.up[1])

    def split(self, waits: Callable[[Read], bool], least: int) -> tuple[Node, Node] | None:
        early = [waits(read) for read in self.reads()]
        taken = [t for t, first in zip(self.taps, early, strict=True) if first]
        if sum(len(t.ref.chans) for t in taken) < least:
            return None
        rest = [t for t, first in zip(self.taps, early, strict=True) if not first]
        return replace(self, taps=taken), replace(self, taps=rest, bias=None)

    def emit(self, coder: Coder) -> int:
        terms = [(read, t.weight) for read, t in zip(self.reads(), self.taps, strict=True)]
        return coder.linear(terms, self.bias, self.channels)

    def forget(self, live: set[int]) -> None:
        self.taps = [t for t in self.taps if t.ref.node in live]


def _columns(term: Term, source: Ready) -> list[tuple[int, Tensor]]:
    """(source group, which outputs use it [O] bool) of one term; a weight of zero carries no dependency."""
    group = source.group[list(term.ref.chans)]
    if term.full:
        every = torch.ones(term.weight.shape[0], dtype=torch.bool)
        return [(int(g), every) for g in group.unique()]
    used = term.weight != 0
    if source.times.shape[0] == 1:
        return [(0, used.any(1))]
    return [(int(g), used[:, group == g].any(1)) for g in group.unique()]


def _restrict(term: Term, chans: list[int] | None, places: Places) -> list[Term]:
    """A term for some outputs (None: all), one per source unit, without those whose weights are all zero."""
    weight = term.weight if chans is None else term.weight[chans]
    by_unit: dict[int, list[int]] = {}
    found = places[term.ref.node]
    for lane, c in enumerate(term.ref.chans):
        by_unit.setdefault(found[c][0], []).append(lane)
    out = []
    for unit, lanes in by_unit.items():
        part = weight if len(lanes) == weight.shape[1] else weight[:, lanes]
        if term.full or bool((part != 0).any()):
            ref = Ref(unit, tuple(found[term.ref.chans[k]][1] for k in lanes), term.ref.at)
            out.append(Term(ref, part, term.parity, term.kernel, term.extent, term.full))
    return out
