"""Pointwise rules: maps.

The elements of a result are laid out as lanes (channels) x columns (sites), labelled with the sites of their operands,
and every operand is fitted to an affine reference from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgen.capture.axes import LaneOrder, label_columns
from fastgen.capture.closed_form import ClosedForm
from fastgen.capture.fit import Irregular
from fastgen.capture.ids import COND, CONST, pack
from fastgen.capture.operands import Elements, elements, pieces
from fastgen.capture.relabel import relabel
from fastgen.capture.shadow import Ids
from fastgen.capture.tracer import Tracer
from fastgen.graph.maps import MapNode
from fastgen.graph.refs import Affine, Pair, Piece, Ref, runs

# aten name -> our name; operands in aten's order, no parameters
PLAIN = {
    "neg": "neg", "exp": "exp", "log": "log", "tanh": "tanh", "sigmoid": "sigmoid", "relu": "relu", "abs": "abs",
    "sqrt": "sqrt", "rsqrt": "rsqrt", "sin": "sin", "cos": "cos", "atan": "atan", "reciprocal": "reciprocal", "log1p": "log1p",
    "expm1": "expm1", "erf": "erf", "sign": "sign", "sgn": "sign", "floor": "floor", "ceil": "ceil", "round": "round",
    "trunc": "trunc", "fix": "trunc", "silu": "silu", "mul": "mul", "div": "div",
    "maximum": "maximum", "minimum": "minimum", "pow": "pow", "eq": "eq", "ne": "ne", "gt": "gt", "ge": "ge", "lt": "lt",
    "le": "le", "logical_and": "and", "logical_or": "or", "remainder": "remainder", "where": "where",
    "true_divide": "div",
}  # fmt: skip
# Of yes and no, where the result is one: arithmetic of bools is theirs too.
LOGICAL = {
    "bitwise_and": "and", "bitwise_or": "or", "bitwise_xor": "ne", "bitwise_not": "not", "logical_not": "not",
    "logical_xor": "ne", "__and__": "and", "__or__": "or", "__xor__": "ne", "add": "or", "mul": "and",
}  # fmt: skip
SPECIAL = frozenset(
    ["add", "sub", "rsub", "elu", "leaky_relu", "gelu", "softplus", "hardtanh", "clamp", "clamp_min", "clamp_max",
     "square", "masked_fill", "addcmul", "ne_zero", "relu6", "threshold", "rrelu_with_noise"]
)  # fmt: skip
POINTWISE = frozenset(PLAIN) | SPECIAL | frozenset(LOGICAL)
Argument = Tensor | float | Elements  # of a map: broadcast to the result, or shaped like it


def pointwise(tr: Tracer, name: str, out: Tensor, args: Any, kwargs: Any) -> Ids:
    """Ids of the result of a pointwise aten operation."""
    fn, operands, imm = _spec(tr, name, list(args), dict(kwargs), out)
    return emit(tr, name, out.shape, fn, operands, imm)


def _spec(
    tr: Tracer, name: str, a: list[Any], kw: dict[str, Any], out: Tensor
) -> tuple[str, list[Argument], tuple[float, ...]]:
    """(our function, operands, parameters) of an aten call."""

    def arg(k: int, key: str, default: Any) -> Any:
        return a[k] if len(a) > k else kw.get(key, default)

    if any(isinstance(v, complex) for v in a):
        raise Irregular("complex numbers are not planned; compute with their real and imaginary parts")
    if name in LOGICAL:
        if name == "logical_xor" and any(v.dtype != torch.bool for v in a):
            raise Irregular("of numbers other than yes and no")
        if out.dtype == torch.bool:
            return LOGICAL[name], list(a), ()
        if name.startswith(("bitwise", "__")):  # of integers
            raise Irregular("the bits of integers are not planned")
    if name in ("add", "sub", "rsub"):
        x, y, alpha = a[0], a[1], float(arg(2, "alpha", 1))
        if name == "rsub":
            x, y, name = y, x, "sub"
        sign = alpha if name == "add" else -alpha
        if not isinstance(y, Tensor) or (y.dim() == 0 and not tr.dynamic(y) and not tr.conditional(y)):
            return "affine", [x], (1.0, sign * float(y))
        if not isinstance(x, Tensor):
            return "affine", [y], (sign, float(x))
        if sign in (1.0, -1.0):
            return ("add" if sign > 0 else "sub"), [x, y], ()
        return "muladd", [y, sign, x], ()
    if name in ("mul", "div", "true_divide") and (
        not isinstance(a[1], Tensor) or (a[1].dim() == 0 and not tr.dynamic(a[1]) and not tr.conditional(a[1]))
    ):
        factor = float(a[1])
        if name == "mul":
            return "affine", [a[0]], (factor, 0.0)
        if factor and math.frexp(factor)[0] in (0.5, -0.5):  # a power of two, whose reciprocal is exact
            return "affine", [a[0]], (1.0 / factor, 0.0)
    if name == "pow" and not isinstance(a[1], Tensor):
        return ("mul", [a[0], a[0]], ()) if a[1] == 2 else ("powscalar", [a[0]], (float(a[1]),))
    if name == "pow" and not isinstance(a[0], Tensor):
        return "scalarpow", [a[1]], (float(a[0]),)
    if name == "remainder" and not out.dtype.is_floating_point:
        return name, list(a), (1.0,)  # of whole numbers
    if name in PLAIN:
        return PLAIN[name], list(a), ()
    big = math.inf
    table: dict[str, Callable[[], tuple[str, list[Argument], tuple[float, ...]]]] = {
        "elu": lambda: (
            "elu",
            [a[0]],
            (float(arg(1, "alpha", 1)), float(arg(2, "scale", 1)), float(arg(3, "input_scale", 1))),
        ),
        "leaky_relu": lambda: ("leakyrelu", [a[0]], (float(arg(1, "negative_slope", 0.01)),)),
        "gelu": lambda: ("gelutanh" if kw.get("approximate", "none") == "tanh" else "gelu", [a[0]], ()),
        "softplus": lambda: ("softplus", [a[0]], (float(arg(1, "beta", 1)), float(arg(2, "threshold", 20)))),
        "hardtanh": lambda: ("clamp", [a[0]], (float(arg(1, "min_val", -1)), float(arg(2, "max_val", 1)))),
        "relu6": lambda: ("clamp", [a[0]], (0.0, 6.0)),
        "clamp_min": lambda: ("clamp", [a[0]], (float(a[1]), big)),
        "clamp_max": lambda: ("clamp", [a[0]], (-big, float(a[1]))),
        "rrelu_with_noise": lambda: (
            "leakyrelu",
            [a[0]],
            ((float(arg(2, "lower", 0.125)) + float(arg(3, "upper", 1 / 3))) / 2,),
        ),
        "square": lambda: ("mul", [a[0], a[0]], ()),
        "ne_zero": lambda: ("ne", [a[0], 0.0], ()),
        "masked_fill": lambda: ("where", [a[1], a[2], a[0]], ()),
        "addcmul": lambda: ("muladd", [a[1], a[2], a[0]], ()),
    }
    if name == "clamp":
        lo, hi = arg(1, "min", None), arg(2, "max", None)
        if isinstance(lo, Tensor) or isinstance(hi, Tensor):
            raise Irregular("clamp with tensor bounds")
        return "clamp", [a[0]], (-big if lo is None else float(lo), big if hi is None else float(hi))
    if name == "threshold":
        raise Irregular("threshold")
    return table[name]()


def emit(
    tr: Tracer, op: str, shape: torch.Size, fn: str, operands: list[Argument], imm: tuple[float, ...],
    like: Elements | None = None, copies: int | None = None,
) -> Ids:  # fmt: skip
    """Adds a map node and returns the ids of its result, shaped `shape`. like: elements at whose sites it is, where the
    operands have none of their own (conditioning and constants). copies: an axis that is known to hold channels."""
    given = [torch.tensor(float(t)) if isinstance(t, int | float) else t for t in operands]
    tensors = [t for t in given if isinstance(t, Tensor)]
    closed = _closed(tr, op, shape, fn, tensors, imm) if len(tensors) == len(given) else None
    if closed is not None:
        return closed
    full = [elements(tr, t).arranged(lambda a: a.expand(shape)) if isinstance(t, Tensor) else t for t in given]
    try:
        return _emit(tr, op, shape, fn, full, imm, like, copies)
    except Irregular:
        again = [relabel(tr, e.values, e.ids) for e in full]
        if all(e.ids is b for e, b in zip(full, again, strict=True)):
            raise
        return _emit(tr, op, shape, fn, [e.with_ids(b) for e, b in zip(full, again, strict=True)], imm, like, copies)


def _closed(
    tr: Tracer, op: str, shape: torch.Size, fn: str, tensors: list[Tensor], imm: tuple[float, ...]
) -> ClosedForm | None:
    """The common case without an id per element: fields over the same sites, and constants per channel."""
    operands: list[list[Piece]] = []
    first: ClosedForm | None = None
    for t in tensors:
        field = tr.closed(t) if t.shape == shape else None
        if field is not None:
            if not field.whole or (first is not None and (field.grid, field.off) != (first.grid, first.off)):
                return None
            first = first or field
            operands.append([])
        elif tr.dynamic(t) or tr.conditional(t) or not _per_channel(t, shape):
            return None
    if first is None or min(first.off) < 0:
        return None
    grid = (first.grid[0] + first.off[0], first.grid[1] + first.off[1])
    operands = []
    for t in tensors:
        field = tr.closed(t) if t.shape == shape else None
        if field is None:
            value = t.detach().expand(shape)[0].reshape(shape[1], -1)[:, 0].clone()
            operands.append([Piece(0, shape[1], const=value)])
            continue
        groups, _ = field.groups()
        parts = [Piece(g.lanes[a], g.lanes[b - 1] + 1, Ref(g.ref.node, g.ref.chans[a:b], Affine(lo=g.ref.at.lo, hi=g.ref.at.hi)))
                  for g in groups for a, b in runs(g.lanes)]  # fmt: skip
        operands.append(sorted(parts, key=lambda p: p.lo))
    node = tr.add(MapNode, op, shape[1], grid, fn=fn, operands=operands, imm=imm)
    return ClosedForm((node.index << 16) | torch.arange(shape[1]), first.grid, first.off, first.lo, first.hi)


def _per_channel(t: Tensor, shape: torch.Size) -> bool:
    """Whether a constant broadcast to shape [1, C, ...] is the same at all sites."""
    t = t.expand(shape)
    return all(t.shape[a] == 1 or t.stride(a) == 0 for a in range(2, t.dim()))


def _emit(
    tr: Tracer, op: str, shape: torch.Size, fn: str, operands: list[Elements], imm: tuple[float, ...],
    like: Elements | None, known: int | None,
) -> Tensor:  # fmt: skip
    # Axes of shifted copies of one channel move in sites, as axes of sites do. Where the copies of a site would meet
    # different constants or operands, or have no regular form, they are channels.
    failed: Irregular | None = None
    for copies in (None, *(a for a, n in enumerate(shape) if n > 1)) if known is None else (known,):
        try:
            return _laid_out(tr, op, shape, fn, operands, imm, like, copies)
        except Irregular as error:
            failed = failed or error
    assert failed is not None
    raise failed


def _laid_out(
    tr: Tracer, op: str, shape: torch.Size, fn: str, operands: list[Elements], imm: tuple[float, ...],
    like: Elements | None, copies: int | None,
) -> Tensor:  # fmt: skip
    """The node where an axis, `copies`, is one of channels; None: axes are what they look like."""
    placed = [e.ids for e in operands] + ([] if like is None else [like.ids])
    order = LaneOrder(shape, placed, copies)
    split = [e.arranged(order.split) for e in operands]
    keep, i, j = label_columns(order, [order.split(t) for t in placed], tr.data_grid)
    if not bool(keep.any()):  # every sampled element lies outside
        return torch.full(shape, CONST)
    if not bool(keep.all()):
        split, i, j = [e.columns(keep) for e in split], i[keep], j[keep]
    if _clash(i << 20 | j, split):
        raise Irregular("copies of one value meet different constants or conditioning, and cannot be told apart")
    grid: Pair = (int(i.max()) + 1, int(j.max()) + 1)
    found = [pieces(tr, e, i, j, grid) for e in split]
    node = tr.add(MapNode, op, order.lanes, grid, fn=fn, operands=found, imm=imm)
    return order.join(_column_ids(node.index, order, keep, i, j))


def _clash(label: Tensor, operands: list[Elements]) -> bool:
    """Whether columns with the same label [S] differ: in an id [L, S] of an operand, in the value of a constant, or in
    where conditioning is read."""
    label, order = label.sort(stable=True)
    same = label[1:] == label[:-1]
    if not bool(same.any()):
        return False
    a, b = order[:-1][same], order[1:][same]
    for e in operands:
        differ = e.ids[:, a] != e.ids[:, b]
        differ |= (e.ids[:, a] == CONST) & (e.values[:, a] != e.values[:, b])
        if e.where is not None:
            differ |= (e.ids[:, a] == COND) & (e.where[:, a] != e.where[:, b])
        if bool(differ.any()):
            return True
    return False


def _column_ids(node: int, order: LaneOrder, keep: Tensor, i: Tensor, j: Tensor) -> Tensor:
    fresh = pack(node, torch.arange(order.lanes)[:, None], i[None], j[None])
    if bool(keep.all()):
        return fresh
    result = torch.full((order.lanes, order.columns), CONST)
    result[:, keep] = fresh
    return result
