"""Movement rules: what moves data runs on positions, and ids follow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastgen.capture.fit import Irregular
from fastgen.capture.ids import CONST
from fastgen.capture.pointwise import pointwise
from fastgen.capture.ranges import check_cast
from fastgen.capture.shadow import Ids
from fastgen.capture.tracer import Tracer

# The same elements in the same order.
IDENTITY = frozenset(
    ["clone", "contiguous", "detach", "alias", "_unsafe_view", "lift_fresh", "lift_fresh_copy", "reshape", "view_copy",
     "native_dropout", "dropout", "_reshape_copy", "expand_copy", "positive"]
)  # fmt: skip
# Elements of the first argument, elsewhere.
MOVES = frozenset(
    ["repeat", "roll", "flip", "index_select", "tril", "triu", "repeat_interleave", "im2col", "upsample_nearest1d",
     "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "pixel_shuffle",
     "pixel_unshuffle", "channel_shuffle", "reflection_pad1d", "reflection_pad2d", "replication_pad1d",
     "replication_pad2d", "unfold_copy", "diagonal_copy", "rot90", "gather"]
)  # fmt: skip

PATCHES = frozenset(["slice_scatter", "select_scatter", "diagonal_scatter"])


def same(tr: Tracer, func: Any, out: Tensor, args: Any, kwargs: Any) -> Ids:
    field = tr.closed(args[0]) if args[0].shape == out.shape else None
    return tr.ids(args[0]) if field is None else field


def pad(tr: Tracer, func: Any, out: Tensor, args: Any, kwargs: Any) -> Ids:
    """constant_pad_nd, in closed form where possible."""
    field, sides = tr.closed(args[0]), list(args[1])
    if field is not None and len(sides) <= 2 * (out.dim() - 2):
        sides += [0] * (4 - len(sides))
        grid = (1, out.shape[2]) if out.dim() == 3 else (out.shape[2], out.shape[3])
        value = args[2] if len(args) > 2 else kwargs.get("value", 0)
        padded = field.padded((sides[2], sides[0]), grid, value == 0)
        if padded is not None:
            return padded
    return move(tr, func, out, args, kwargs)


def move(tr: Tracer, func: Any, out: Tensor, args: Any, kwargs: Any) -> Tensor:
    """Runs the operation on positions and follows them; zero is "from nowhere", a constant."""
    if any(tr.dynamic(a) for a in tree_leaves((args[1:], kwargs)) if isinstance(a, Tensor)):
        raise Irregular("positions depend on sampled values")
    t = args[0]
    rest = [0 if func.overloadpacket.__name__ == "constant_pad_nd" and k == 1 else a for k, a in enumerate(args[1:])]
    position = torch.arange(1, t.numel() + 1, dtype=torch.float64).view(t.shape)
    moved = func(position, *rest, **kwargs).long().reshape(-1)
    flat = torch.cat([torch.full((1,), CONST), tr.ids(t).reshape(-1)])
    return flat[moved]


def join(tr: Tracer, func: Any, out: Tensor, args: Any, kwargs: Any) -> Ids:
    fields = [tr.closed(t) for t in args[0]]
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % max(1, out.dim())
    first = fields[0]
    if first is not None and dim == 1 and func.overloadpacket.__name__ == "cat":
        alike = [f for f in fields if f is not None and replace(f, lanes=first.lanes) == first]
        if len(alike) == len(fields):
            return replace(first, lanes=torch.cat([f.lanes for f in alike]))
    result: Tensor = func([tr.ids(t) for t in args[0]], *args[1:], **kwargs)
    return result


def patch(tr: Tracer, func: Any, out: Tensor, args: Any, kwargs: Any) -> Tensor:
    """The second argument in the place of a part of the first."""
    result: Tensor = func(tr.ids(args[0]), tr.ids(args[1]), *args[2:], **kwargs)
    return result


def cast(tr: Tracer, func: Any, out: Tensor, args: Any, kwargs: Any) -> Ids:
    """Casts keep the value, except to bool, and from float to integer, which truncates; and small integers wrap around."""
    made = args[0]
    if out.dtype == torch.bool and made.dtype != torch.bool:
        return pointwise(tr, "ne_zero", out, args[:1], {})
    if not out.dtype.is_floating_point and out.dtype != made.dtype:
        check_cast(tr.range_of(made), out.dtype)
    if made.dtype.is_floating_point and not out.dtype.is_floating_point:
        return pointwise(tr, "trunc", out, args[:1], {})
    return same(tr, func, out, args, kwargs)


MOVEMENT: dict[str, Callable[..., Ids]] = {
    **dict.fromkeys(IDENTITY, same), **dict.fromkeys(MOVES, move), **dict.fromkeys(PATCHES, patch),
    "cat": join, "stack": join, "_to_copy": cast, "to": cast, "constant_pad_nd": pad,
}  # fmt: skip
