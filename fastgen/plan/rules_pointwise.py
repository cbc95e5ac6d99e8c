"""Pointwise rules: maps, embeddings (and one-hot, which is one), channel-wise reductions.

The elements of a result are laid out as lanes (channels) x columns (sites), labelled with the sites of their operands,
and every operand is fitted to an affine reference from there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastgen.plan import fit
from fastgen.plan.ir import Affine, EmbedNode, MapNode, Pair, Piece, ReduceNode, Ref
from fastgen.plan.rules_linear import linear, relabel

if TYPE_CHECKING:
    from fastgen.plan.capture import Tracer

# aten name -> our name; operands in aten's order, no parameters
PLAIN = {
    "neg": "neg", "exp": "exp", "log": "log", "tanh": "tanh", "sigmoid": "sigmoid", "relu": "relu", "abs": "abs",
    "sqrt": "sqrt", "rsqrt": "rsqrt", "sin": "sin", "cos": "cos", "reciprocal": "reciprocal", "log1p": "log1p",
    "expm1": "expm1", "erf": "erf", "sign": "sign", "sgn": "sign", "floor": "floor", "ceil": "ceil", "round": "round",
    "trunc": "trunc", "fix": "trunc", "logical_not": "not", "silu": "silu", "mul": "mul", "div": "div",
    "maximum": "maximum", "minimum": "minimum", "pow": "pow", "eq": "eq", "ne": "ne", "gt": "gt", "ge": "ge", "lt": "lt",
    "le": "le", "logical_and": "and", "logical_or": "or", "bitwise_and": "and", "bitwise_or": "or",
    "remainder": "remainder", "where": "where",
}  # fmt: skip
SPECIAL = frozenset(
    ["add", "sub", "rsub", "elu", "leaky_relu", "gelu", "softplus", "hardtanh", "clamp", "clamp_min", "clamp_max",
     "square", "masked_fill", "addcmul", "ne_zero", "relu6", "threshold"]
)  # fmt: skip
POINTWISE = frozenset(PLAIN) | SPECIAL
SCALAR_AFFINE = {"mul": lambda s: (s, 0.0), "div": lambda s: (1.0 / s, 0.0)}
Operand = Tensor | float
Ids = Tensor | fit.Field


def pointwise(tr: Tracer, name: str, out: Tensor, args: Any, kwargs: Any) -> Ids:
    """Ids of the result of a pointwise aten operation."""
    fn, operands, imm = _spec(tr, name, list(args), dict(kwargs), out)
    return emit(tr, name, out.shape, fn, operands, imm)


def _spec(
    tr: Tracer, name: str, a: list[Any], kw: dict[str, Any], out: Tensor
) -> tuple[str, list[Operand], tuple[float, ...]]:
    """(our function, operands, parameters) of an aten call."""

    def arg(k: int, key: str, default: Any) -> Any:
        return a[k] if len(a) > k else kw.get(key, default)

    if name == "div" and kw.get("rounding_mode"):
        raise fit.Irregular("division with rounding")
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
    if name in SCALAR_AFFINE and (
        not isinstance(a[1], Tensor) or (a[1].dim() == 0 and not tr.dynamic(a[1]) and not tr.conditional(a[1]))
    ):
        return "affine", [a[0]], SCALAR_AFFINE[name](float(a[1]))
    if name == "pow" and not isinstance(a[1], Tensor):
        return ("mul", [a[0], a[0]], ()) if a[1] == 2 else ("powscalar", [a[0]], (float(a[1]),))
    if name == "pow" and not isinstance(a[0], Tensor):
        return "scalarpow", [a[1]], (float(a[0]),)
    if name in PLAIN:
        return PLAIN[name], list(a), ()
    big = 3.0e38
    table: dict[str, Callable[[], tuple[str, list[Operand], tuple[float, ...]]]] = {
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
        "square": lambda: ("mul", [a[0], a[0]], ()),
        "ne_zero": lambda: ("ne", [a[0], 0.0], ()),
        "masked_fill": lambda: ("where", [a[1], a[2], a[0]], ()),
        "addcmul": lambda: ("muladd", [a[1], a[2], a[0]], ()),
    }
    if name == "clamp":
        lo, hi = arg(1, "min", None), arg(2, "max", None)
        if isinstance(lo, Tensor) or isinstance(hi, Tensor):
            raise fit.Irregular("clamp with tensor bounds")
        return "clamp", [a[0]], (-big if lo is None else float(lo), big if hi is None else float(hi))
    if name == "threshold":
        raise fit.Irregular("threshold")
    return table[name]()


class Layout:
    """Lanes x columns of a shape: which axes are channels and which are sites, by how the operands' ids vary."""

    def __init__(self, shape: torch.Size, ids: list[Tensor]) -> None:
        self.shape = shape
        self.order = torch.zeros(0)
        moved = [t for t in ids if bool((t >= 0).any())]
        self.perm, lead = self._axes(moved)
        if self.perm is None:
            self.order = self._ranked(moved)
            self.lanes, self.columns = self.order.shape
            self.site_shape: list[int] = []
            self.folded = False
            return
        sizes = [shape[a] for a in self.perm]
        self.lanes = 1
        for n in sizes[:lead]:
            self.lanes *= n
        self.columns = max(1, _product(shape)) // max(1, self.lanes)
        self.site_shape = [n for n in sizes[lead:] if n > 1]
        self.folded = 0 in self.perm[lead:] and shape[0] > 1  # sites in the batch axis

    def _axes(self, moved: list[Tensor]) -> tuple[list[int] | None, int]:
        nd = len(self.shape)
        if nd >= 2 and self.shape[0] == 1 and all(fit.separable(t.reshape(self.shape[1], -1)) for t in moved):
            return [*list(range(1, nd)), 0], 1  # channels second, the usual case
        channels: list[int] = []
        places: list[int] = []
        mixed: list[int] = []
        for a in range(nd):
            site = any(_varies(t & fit.SITE_MASK, t >= 0, a) for t in moved)
            key = any(_varies(t >> 32, t >= 0, a) for t in moved)
            (mixed if site and key else places if site else channels).append(a)
        if mixed:
            if not any(self.shape[a] > 1 for a in places):
                return None, 0
            channels = sorted(channels + mixed)  # lanes may read at different distances: shifted and unshifted layers
        return channels + places, len(channels)

    @staticmethod
    def _ranked(moved: list[Tensor]) -> Tensor:
        """Positions [L, S] when one axis mixes channels and sites: by site, then by order within it."""
        lead = max(moved, key=lambda t: int((t >= 0).sum())).reshape(-1)
        if bool((lead < 0).any()):
            raise fit.Irregular("an axis mixes channels, sites and constants")
        order = torch.argsort(lead & fit.SITE_MASK, stable=True)
        columns = len(torch.unique(lead & fit.SITE_MASK))
        if len(lead) % columns:
            raise fit.Irregular("sites have different numbers of channels")
        by_site = order.view(columns, -1)
        if not bool(((lead[by_site] & fit.SITE_MASK) == (lead[by_site[:, :1]] & fit.SITE_MASK)).all()):
            raise fit.Irregular("sites have different numbers of channels")
        return by_site.t().contiguous()

    def split(self, t: Tensor) -> Tensor:
        """A tensor expanded to the shape, as [lanes, columns]."""
        if self.perm is None:
            return t.reshape(-1)[self.order]
        return t.permute(self.perm).reshape(self.lanes, self.columns)

    def join(self, t: Tensor) -> Tensor:
        """The inverse of split."""
        if self.perm is None:
            flat = torch.empty(self.order.numel(), dtype=t.dtype)
            flat[self.order.reshape(-1)] = t.reshape(-1)
            return flat.view(self.shape)
        back = t.reshape([self.shape[a] for a in self.perm])
        return back.permute([self.perm.index(a) for a in range(len(self.perm))])


def _product(shape: Any) -> int:
    n = 1
    for s in shape:
        n *= s
    return n


def _varies(t: Tensor, dyn: Tensor, axis: int) -> bool:
    n = t.shape[axis]
    if n < 2 or t.stride(axis) == 0:
        return False
    a, b = t.narrow(axis, 0, n - 1), t.narrow(axis, 1, n - 1)
    return bool(((a != b) & dyn.narrow(axis, 0, n - 1) & dyn.narrow(axis, 1, n - 1)).any())


def label_columns(layout: Layout, ids: list[Tensor], grid: Pair) -> tuple[Tensor, Tensor, Tensor]:
    """(keep, i, j): which columns of the result are computed, and their site labels."""
    moved = [t for t in ids if bool((t >= 0).any())]
    keep = torch.zeros(layout.columns, dtype=torch.bool)
    label = torch.full((layout.columns,), -1)
    agree = True
    for t in moved:
        dyn = t >= 0
        site = t & fit.SITE_MASK
        high = torch.where(dyn, site, -1).amax(0)
        low = torch.where(dyn, site, 1 << 40).amin(0)
        seen = high >= 0
        agree &= bool((high[seen] == low[seen]).all()) and bool(((label == high) | (label < 0) | ~seen).all())
        label = torch.where(seen, high, label)
        keep |= seen
    labelled = keep.clone()
    for t in ids:  # a site that only conditioning reaches is computed too
        keep |= (t == fit.COND).any(0)
    if agree and torch.equal(keep, labelled):
        return keep, fit.row(label.clamp(min=0)), fit.col(label.clamp(min=0))
    if not layout.folded and (len(layout.site_shape) == 2 or (len(layout.site_shape) == 1 and grid[0] == 1)):
        height, width = (1, *layout.site_shape)[-2:]
        i, j = fit.sites(height, width)
        rows, cols = i[keep], j[keep]
        box = (i >= rows.min()) & (i <= rows.max()) & (j >= cols.min()) & (j <= cols.max())
        return box, i, j
    known, i, j = fit.choose_labels(torch.cat(moved))
    if bool((keep & ~known).any()):
        raise fit.Irregular("sites of the result cannot be told from its operands")
    return known, i, j


def emit(tr: Tracer, op: str, shape: torch.Size, fn: str, operands: list[Operand], imm: tuple[float, ...]) -> Ids:
    """Adds a map node and returns the ids of its result, shaped `shape`."""
    tensors = [t if isinstance(t, Tensor) else torch.tensor(float(t)) for t in operands]
    closed = _closed(tr, op, shape, fn, tensors, imm)
    if closed is not None:
        return closed
    full = [tr.ids(t).expand(shape) for t in tensors]
    try:
        return _emit(tr, op, shape, fn, tensors, full, imm)
    except fit.Irregular:
        again = [relabel(tr, t, own) for t, own in zip(tensors, full, strict=True)]
        if all(a is b for a, b in zip(full, again, strict=True)):
            raise
        return _emit(tr, op, shape, fn, tensors, again, imm)


def _closed(
    tr: Tracer, op: str, shape: torch.Size, fn: str, tensors: list[Tensor], imm: tuple[float, ...]
) -> fit.Field | None:
    """The common case without an id per element: fields over the same sites, and constants per channel."""
    operands: list[list[Piece]] = []
    first: fit.Field | None = None
    for t in tensors:
        field = tr.field(t) if t.shape == shape else None
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
        field = tr.field(t) if t.shape == shape else None
        if field is None:
            value = t.detach().expand(shape)[0].reshape(shape[1], -1)[:, 0].clone()
            operands.append([Piece(0, shape[1], const=value)])
            continue
        groups, _ = field.groups()
        pieces = [Piece(g.lanes[a], g.lanes[b - 1] + 1, Ref(g.ref.node, g.ref.chans[a:b], Affine(lo=g.ref.at.lo, hi=g.ref.at.hi)))
                  for g in groups for a, b in fit.runs(g.lanes)]  # fmt: skip
        operands.append(sorted(pieces, key=lambda p: p.lo))
    node = tr.add(MapNode, op, shape[1], grid, fn=fn, operands=operands, imm=imm)
    return fit.Field((node.index << 16) | torch.arange(shape[1]), first.grid, first.off, first.lo, first.hi)


def _per_channel(t: Tensor, shape: torch.Size) -> bool:
    """Whether a constant broadcast to shape [1, C, ...] is the same at all sites."""
    t = t.expand(shape)
    return all(t.shape[a] == 1 or t.stride(a) == 0 for a in range(2, t.dim()))


def _emit(
    tr: Tracer,
    op: str,
    shape: torch.Size,
    fn: str,
    tensors: list[Tensor],
    full: list[Tensor],
    imm: tuple[float, ...],
) -> Tensor:
    layout = Layout(shape, full)
    ids = [layout.split(t) for t in full]
    keep, i, j = label_columns(layout, ids, tr.data_grid)
    if not bool(keep.any()):  # every sampled element lies outside
        return torch.full(shape, fit.CONST)
    whole = bool(keep.all())
    if not whole:
        ids, i, j = [t[:, keep] for t in ids], i[keep], j[keep]
    grid: Pair = (int(i.max()) + 1, int(j.max()) + 1)
    pieces = []
    for t, own in zip(tensors, ids, strict=True):
        values = layout.split(t.detach().expand(shape))
        pieces.append(_operand(tr, t, own, values if whole else values[:, keep], layout, keep, (i, j), grid))
    node = tr.add(MapNode, op, layout.lanes, grid, fn=fn, operands=pieces, imm=imm)
    return layout.join(_column_ids(node.index, layout, keep, i, j))


def _column_ids(node: int, layout: Layout, keep: Tensor, i: Tensor, j: Tensor) -> Tensor:
    fresh = fit.pack(node, torch.arange(layout.lanes)[:, None], i[None], j[None])
    if bool(keep.all()):
        return fresh
    result = torch.full((layout.lanes, layout.columns), fit.CONST)
    result[:, keep] = fresh
    return result


def _operand(
    tr: Tracer,
    t: Tensor,
    ids: Tensor,
    values: Tensor,
    layout: Layout,
    keep: Tensor,
    at: tuple[Tensor, Tensor],
    grid: Pair,
) -> list[Piece]:
    """Pieces of one operand: references, constants, conditioning."""
    i, j = at
    groups, constant = fit.fit(ids, i, j)
    lanes = [k for k in constant if bool((ids[k] == fit.COND).any())]
    pieces = fit.pieces_of(groups, [k for k in constant if k not in set(lanes)], values, i, j, grid)
    if lanes:
        position = layout.split(torch.arange(t.numel()).view(t.shape).expand(layout.shape))[lanes][:, keep]
        pieces += _conditioning(tr, t, position, lanes, i, j, grid)
    return sorted(pieces, key=lambda p: p.lo)


def _conditioning(
    tr: Tracer, t: Tensor, position: Tensor, lanes: list[int], i: Tensor, j: Tensor, grid: Pair
) -> list[Piece]:
    """A source node for the conditioning lanes of operand t; one site where it is the same at all of them."""
    if bool((position == position[:, :1]).all()):
        index, at = position[:, :1].reshape(len(lanes), 1, 1), Affine((0, 0), hi=(1, 1))
    else:
        index = torch.zeros(len(lanes), *grid, dtype=torch.int64)
        index[:, i, j] = position
        at = Affine(hi=grid)
    same = len(lanes) > 1 and bool((index == index[:1]).all())
    node = tr.cond_source(t, index[:1] if same else index, (index.shape[1], index.shape[2]))
    chans = (0,) * len(lanes) if same else tuple(range(len(lanes)))
    return [Piece(lanes[a], lanes[b - 1] + 1, Ref(node, chans[a:b], at)) for a, b in fit.runs(lanes)]


def embed(tr: Tracer, table: Tensor, index: Tensor) -> Tensor:
    """Ids [*index.shape, E] of table[index] for a sampled index; table [rows, E]."""
    if tr.dynamic(table) or tr.conditional(table):
        raise fit.Irregular("a lookup in a table that depends on the sample or on conditioning")
    full = tr.ids(index)
    layout = Layout(index.shape, [full])
    ids = layout.split(full)
    keep, i, j = label_columns(layout, [ids], tr.data_grid)
    if not bool(keep.any()):
        return torch.full((*index.shape, table.shape[1]), fit.CONST)
    ids, i, j = ids[:, keep], i[keep], j[keep]
    values = layout.split(index.detach())[:, keep]
    grid: Pair = (int(i.max()) + 1, int(j.max()) + 1)
    width = table.shape[1]
    result = torch.full((width, *index.shape), fit.CONST)
    rows = [torch.full((layout.lanes, layout.columns), fit.CONST) for _ in range(width)]
    for lane in range(layout.lanes):
        groups, constant = fit.fit(ids[lane : lane + 1], i, j)
        pieces = fit.pieces_of(groups, constant, values[lane : lane + 1].float(), i, j, grid)
        node = tr.add(EmbedNode, "embedding", width, grid, table=table.detach().clone(), operands=[pieces])
        for e in range(width):
            rows[e][lane, keep] = fit.pack(node.index, torch.tensor(e), i, j)
    for e in range(width):
        result[e] = layout.join(rows[e])
    return result.movedim(0, -1)


def embedding(tr: Tracer, func: Any, out: Tensor, args: Any, kwargs: Any) -> Tensor:
    """aten.embedding(weight, index)."""
    return embed(tr, args[0], args[1])


def scatter(tr: Tracer, func: Any, out: Tensor, args: Any, kwargs: Any) -> Tensor:
    """One-hot: scatter of one value at sampled indices into zeros is a lookup in a diagonal table."""
    target, dim, index, source = args[:4]
    if not tr.dynamic(index) or tr.dynamic(target) or bool(target.any()) or index.shape[dim] != 1:
        raise fit.Irregular("scatter other than a one-hot of sampled indices")
    value = float(source.flatten()[0]) if isinstance(source, Tensor) else float(source)
    if isinstance(source, Tensor) and (tr.dynamic(source) or not bool((source == value).all())):
        raise fit.Irregular("scatter of different values")
    table = torch.eye(target.shape[dim], dtype=torch.float32) * value
    return embed(tr, table, index.squeeze(dim)).movedim(-1, dim)


def log_sigmoid(tr: Tracer, func: Any, out: Tensor, args: Any, kwargs: Any) -> Ids:
    """-softplus(-x)."""
    minus, soft = torch.empty(out.shape), torch.empty(out.shape)
    tr.put(minus, emit(tr, "log_sigmoid", out.shape, "neg", [args[0]], ()))
    tr.put(soft, emit(tr, "log_sigmoid", out.shape, "softplus", [minus], (1.0, 20.0)))
    return emit(tr, "log_sigmoid", out.shape, "neg", [soft], ())


def glu(tr: Tracer, func: Any, out: Tensor, args: Any, kwargs: Any) -> Ids:
    """a * sigmoid(b) for the halves of x along a dimension."""
    dim = args[1] if len(args) > 1 else kwargs.get("dim", -1)
    a, b = args[0].chunk(2, dim)
    gate = torch.empty(out.shape)
    tr.put(gate, emit(tr, "glu", out.shape, "sigmoid", [b], ()))
    return emit(tr, "glu", out.shape, "mul", [a, gate], ())


def batch_norm(tr: Tracer, func: Any, out: Tensor, args: Any, kwargs: Any) -> Ids:
    """Batch normalisation with running statistics is an affine map per channel."""
    x, weight, bias, mean, var = args[:5]
    training = bool(args[5]) if "no_training" not in func.overloadpacket.__name__ else False
    if training or mean is None:
        raise fit.Irregular("batch statistics mix samples and sites")
    eps = args[-1] if isinstance(args[-1], float) else kwargs.get("eps", 1e-5)
    scale = (1.0 if weight is None else weight.detach()) / torch.sqrt(var + eps)
    shift = (0.0 if bias is None else bias.detach()) - mean * scale
    sides = [1, -1] + [1] * (x.dim() - 2)
    return emit(tr, "batch_norm", out.shape, "muladd", [x, scale.view(sides), shift.view(sides)], ())


def moments(tr: Tracer, x: Tensor, dims: list[int], correction: float) -> tuple[Tensor, Tensor]:
    """Stand-ins (ids only) for mean and variance over channels, dims kept."""
    shape = torch.Size(1 if d in dims else n for d, n in enumerate(x.shape))
    count = _product([x.shape[d] for d in dims])

    def mean_of(t: Tensor, scale: float) -> Tensor:
        kept = [d for d in range(x.dim()) if d not in dims]
        ids = tr.ids(t).permute(dims + kept).reshape(count, -1)
        values = t.permute(dims + kept).reshape(count, -1)
        result = torch.empty(shape)
        tr.put(result, linear(tr, "mean", ids, values, torch.full((1, count), scale), None))
        return result

    mean = mean_of(x, 1.0 / count)
    centred, squared = torch.empty(x.shape), torch.empty(x.shape)
    tr.put(centred, emit(tr, "norm", x.shape, "sub", [x, mean], ()))
    tr.put(squared, emit(tr, "norm", x.shape, "mul", [centred, centred], ()))
    return mean, mean_of(squared, 1.0 / (count - correction))


def variance(tr: Tracer, func: Any, out: Tensor, args: Any, kwargs: Any) -> Tensor:
    """aten.var.correction over channels."""
    x = args[0]
    dims = [d % x.dim() for d in (args[1] if len(args) > 1 and args[1] else range(x.dim()))]
    correction = kwargs.get("correction", 1)
    return tr.ids(moments(tr, x, dims, 1.0 if correction is None else float(correction))[1])


def layer_norm(tr: Tracer, func: Any, out: Tensor, args: Any, kwargs: Any) -> Tensor:
    """aten.native_layer_norm(x, shape, weight, bias, eps) over the last axes (Ba et al. 2016)."""
    x, weight, bias, eps = args[0], args[2], args[3], float(args[4])
    mean, var = moments(tr, x, [x.dim() - k for k in range(len(args[1]), 0, -1)], 0.0)

    def step(fn: str, shape: torch.Size, operands: list[Operand], imm: tuple[float, ...] = ()) -> Tensor:
        result = torch.empty(shape)
        tr.put(result, emit(tr, "layer_norm", shape, fn, operands, imm))
        return result

    scale = step("rsqrt", var.shape, [step("affine", var.shape, [var], (1.0, eps))])
    y = step("mul", x.shape, [step("sub", x.shape, [x, mean]), scale])
    if weight is not None:
        shift = torch.zeros(()) if bias is None else bias.detach()
        y = step("muladd", x.shape, [y, weight.detach(), shift])
    return tr.ids(y)


def extremum(tr: Tracer, func: Any, out: Tensor, args: Any, kwargs: Any) -> Tensor:
    """amax, amin over channels."""
    x = args[0]
    dims = args[1] if len(args) > 1 else kwargs.get("dim", [])
    dims = [d % x.dim() for d in ([dims] if isinstance(dims, int) else dims)]
    kept = [d for d in range(x.dim()) if d not in dims]
    count = _product([x.shape[d] for d in dims])
    ids = tr.ids(x).permute(dims + kept).reshape(count, -1)
    values = x.permute(dims + kept).reshape(count, -1)
    keep, i, j = fit.choose_labels(ids)
    site = (i << 20 | j)[keep]
    if len(torch.unique(site)) != len(site):
        raise fit.Irregular("a maximum per group of channels")
    ids, values, i, j = ids[:, keep], values[:, keep], i[keep], j[keep]
    groups, constant = fit.fit(ids, i, j)
    grid: Pair = (int(i.max()) + 1, int(j.max()) + 1)
    pieces = fit.pieces_of(groups, constant, values, i, j, grid)
    name = "min" if "min" in func.overloadpacket.__name__ else "max"
    node = tr.add(ReduceNode, "a" + name, 1, grid, fn=name, operands=[pieces])
    result = torch.full((len(keep),), fit.CONST)
    result[keep] = fit.pack(node.index, torch.tensor(0), i, j)
    return result


COMPUTED: dict[str, Callable[..., Ids]] = {
    "embedding": embedding, "scatter": scatter, "glu": glu, "log_sigmoid_forward": log_sigmoid, "native_batch_norm": batch_norm,
    "_native_batch_norm_legit_no_training": batch_norm, "cudnn_batch_norm": batch_norm, "amax": extremum, "amin": extremum,
    "var": variance, "native_layer_norm": layer_norm,
}  # fmt: skip
