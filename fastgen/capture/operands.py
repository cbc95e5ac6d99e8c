"""What an operation reads, element by element: as references to nodes, constants, and sources of conditioning.

Sampled values, constants and conditioning may stand in one operand, and in one channel of it at different sites.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgen.capture.closed_form import ClosedForm, Lanes
from fastgen.capture.fit import Irregular, fit, fit_parts, pieces_of
from fastgen.capture.ids import COND, CONST, pack
from fastgen.capture.shadow import Ids
from fastgen.capture.tracer import Tracer
from fastgen.graph.maps import MapNode
from fastgen.graph.refs import Affine, Operand, Pair, Piece, Ref, Term, runs
from fastgen.graph.taps import TapsNode


@dataclass(frozen=True)
class Elements:
    """Elements of a tensor of the running call, arranged as a rule needs them: ids, values, and flat positions in it.

    where: None if no element depends on conditioning (which alone is read by position).
    """

    tensor: Tensor
    ids: Tensor
    values: Tensor
    where: Tensor | None = None

    def arranged(self, arrange: Callable[[Tensor], Tensor]) -> Elements:
        """The same elements otherwise: arrange is applied to ids, values and positions alike."""
        where = None if self.where is None else arrange(self.where)
        return Elements(self.tensor, arrange(self.ids), arrange(self.values), where)

    def columns(self, keep: Tensor) -> Elements:
        """Those of some columns, of elements [lanes, columns]."""
        return self.arranged(lambda t: t[:, keep])

    def lanes(self, keep: list[int]) -> Elements:
        """Some lanes [n, columns]."""
        return self.arranged(lambda t: t[keep])

    def with_ids(self, ids: Tensor) -> Elements:
        """The same elements known by other ids."""
        return Elements(self.tensor, ids, self.values, self.where)


def elements(tr: Tracer, t: Tensor) -> Elements:
    """All elements of a tensor, shaped like it."""
    ids = tr.ids(t)
    where = torch.arange(t.numel()).view(t.shape) if bool((ids == COND).any()) else None
    return Elements(t, ids, t.detach(), where)


def stand_in(tr: Tracer, values: Tensor, ids: Ids) -> Tensor:
    """A tensor of their own for elements that forward has in none; values: what they are where they are constant."""
    made = values.detach().clone(memory_format=torch.contiguous_format)
    tr.put(made, ids if isinstance(ids, ClosedForm) else ids.reshape(made.shape))
    return made


def pieces(tr: Tracer, e: Elements, i: Tensor, j: Tensor, grid: Pair) -> Operand:
    """Operand pieces of elements [lanes, columns] for a reader that has them at sites (i, j) [columns]."""
    joined, e = _joined(tr, e, i, j, grid)
    try:
        groups, constant = fit(e.ids, i, j)
    except Irregular:
        e = _patched(tr, e, i, j, grid)
        groups, constant = fit(e.ids, i, j)
    lanes = _conditioned(e, constant)
    known = {*lanes, *(k for g in joined for k in g.lanes)}
    groups = [_beside(tr, e, g, i, j, grid) for g in groups]
    out = pieces_of(groups, [k for k in constant if k not in known], e.values, i, j, grid)
    return sorted([*out, *_as_pieces([*_source(tr, e, lanes, i, j, grid), *joined])], key=lambda p: p.lo)


def terms(
    tr: Tracer, e: Elements, i: Tensor, j: Tensor, grid: Pair, patched: bool = False
) -> tuple[list[Lanes], Tensor]:
    """References for a sum over lanes, and ids [lanes, columns] that are CONST where a constant is left to be added.

    patched: a lane may be in several groups, of disjoint sites, of which its value is the sum.
    """
    joined, e = _joined(tr, e, i, j, grid)
    groups, constant = (fit_parts if patched else fit)(e.ids, i, j)
    lanes = _conditioned(e, constant)
    known = [*lanes, *(k for g in joined for k in g.lanes)]
    ids = e.ids
    if known:
        ids = ids.clone()
        ids[known] = COND
    return [*groups, *_source(tr, e, lanes, i, j, grid), *joined], ids


def _patched(tr: Tracer, e: Elements, i: Tensor, j: Tensor, grid: Pair) -> Elements:
    """A copy of lanes that are one layer's at some sites and another's elsewhere, in one node; others stay. Raises Irregular."""
    lanes = (e.ids >= 0).any(1).nonzero()[:, 0].tolist()
    own = e.lanes(lanes)
    groups, _ = fit_parts(own.ids, i, j)
    if bool((own.ids == COND).any()) or len((i << 20 | j).unique()) < len(i):
        raise Irregular("one channel is conditioning and of several layers at different sites")
    taps = []
    for g in groups:
        weight = torch.zeros(len(lanes), len(g.lanes))
        weight[g.lanes, torch.arange(len(g.lanes))] = 1.0
        taps.append(Term(g.ref, weight))
    bias = torch.zeros(len(lanes), *grid)
    bias[:, i, j] = torch.where(own.ids == CONST, own.values.float(), torch.zeros(()))
    node = tr.add(TapsNode, "join", len(lanes), grid, taps=taps, bias=bias if bool(bias.any()) else None)
    ids = e.ids.clone()
    ids[lanes] = pack(node.index, torch.arange(len(lanes))[:, None], i[None], j[None])
    return e.with_ids(ids)


def _beside(tr: Tracer, e: Elements, g: Lanes, i: Tensor, j: Tensor, grid: Pair) -> Lanes:
    """The same lanes, where they stand beside constants that are not one number: of a copy that holds those too."""
    inside = g.ref.at.inside(g.ref.at.rows(i), g.ref.at.cols(j))
    outside = torch.where(inside, 0.0, e.values[g.lanes].float())
    if bool(inside.all()) or bool((outside[:, ~inside] == outside[:1, ~inside][:, :1]).all()):
        return g
    table, every = torch.zeros(len(g.lanes), *grid), len(g.lanes)
    table[:, i, j] = outside
    if not torch.equal(table[:, i, j], outside):
        raise Irregular("constants of different values stand beside one sampled value at one site")
    operands = [[Piece(0, every, g.ref)], [Piece(0, every, const=table)]]
    node = tr.add(MapNode, "join", every, grid, fn="add", operands=operands)
    return Lanes(g.lanes, Ref(node.index, tuple(range(every)), Affine(hi=grid)))


def _as_pieces(groups: list[Lanes]) -> Operand:
    return [
        Piece(g.lanes[a], g.lanes[b - 1] + 1, g.ref.lanes(list(range(a, b)))) for g in groups for a, b in runs(g.lanes)
    ]


def _conditioned(e: Elements, constant: list[int]) -> list[int]:
    """Of the lanes without a sampled element, those with one of conditioning."""
    some = (e.ids == COND).any(1) if e.where is not None else ()
    return [k for k in constant if len(some) and bool(some[k])]


def _source(tr: Tracer, e: Elements, lanes: list[int], i: Tensor, j: Tensor, grid: Pair) -> list[Lanes]:
    """A source node for lanes of conditioning, and of constants of the same tensor beside it: of one site where they are
    the same at all of them, of one channel where all lanes are."""
    if not lanes or e.where is None:
        return []
    position = e.where[lanes].clamp(min=0)
    if bool((position == position[:, :1]).all()):
        index, at = position[:, :1].reshape(len(lanes), 1, 1), Affine((0, 0), hi=(1, 1))
    else:
        index = torch.zeros(len(lanes), *grid, dtype=torch.int64)
        index[:, i, j] = position
        at = Affine(hi=grid)
    same = len(lanes) > 1 and bool((index == index[:1]).all())
    node = tr.cond_source(e.tensor, index[:1] if same else index, (index.shape[1], index.shape[2]))
    return [Lanes(lanes, Ref(node, (0,) * len(lanes) if same else tuple(range(len(lanes))), at))]


def _joined(tr: Tracer, e: Elements, i: Tensor, j: Tensor, grid: Pair) -> tuple[list[Lanes], Elements]:
    """The lanes that are conditioning at some sites only, and sampled (a class token or a history in front, a part that is
    given) or from outside of the tensor (padding) at others: as references to a copy that holds both. And the elements
    without them."""
    if e.where is None:
        return [], e
    conditional = e.ids == COND
    lanes = (conditional.any(1) & ((e.ids >= 0) | (e.where < 0)).any(1)).nonzero()[:, 0].tolist()
    if not lanes:
        return [], e
    groups = []
    patterns, which = torch.unique(conditional[lanes], dim=0, return_inverse=True)
    for k, given in enumerate(patterns):
        here = [lane for lane, n in zip(lanes, which.tolist(), strict=True) if n == k]
        own, every = e.lanes(here), list(range(len(here)))
        mask = torch.zeros(len(here), *grid)
        mask[:, i[given], j[given]] = 1.0
        rest = own.columns(~given)  # what is not to show may be anything
        operands = [
            [Piece(0, len(here), const=mask)],
            _as_pieces(_source(tr, own, every, i, j, grid)),
            pieces(tr, Elements(rest.tensor, rest.ids, rest.values), i[~given], j[~given], grid),
        ]
        node = tr.add(MapNode, "join", len(here), grid, fn="where", operands=operands)
        groups.append(Lanes(here, Ref(node.index, tuple(every), Affine(hi=grid))))
    ids = e.ids.clone()
    ids[lanes] = CONST
    return groups, e.with_ids(ids)
