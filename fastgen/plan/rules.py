"""Dispatch of captured operations: what moves data runs on ids, what computes becomes a node.

Three kinds of rule. *Movement* (cat, pad, gather by constant index, ...) carries ids along. *Linear* maps
(rules_linear.py) become taps. *Pointwise* maps, embeddings and reductions (rules_pointwise.py) become maps. Anything else
is decomposed by torch's own decompositions, or becomes opaque: refused by name if an output depends on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastgen.errors import UnsupportedError
from fastgen.plan import fit
from fastgen.plan.ir import Graph, MapNode, Node, OpaqueNode
from fastgen.plan.rules_linear import LINEAR, conv_of_conditioning
from fastgen.plan.rules_pointwise import COMPUTED, POINTWISE, pointwise

if TYPE_CHECKING:
    from fastgen.plan.capture import Tracer

Ids = Tensor | fit.Field
Rule = Callable[["Tracer", Any, Tensor, tuple[Any, ...], dict[str, Any]], Ids]

IDENTITY = frozenset(
    [
        "clone",
        "contiguous",
        "detach",
        "alias",
        "_unsafe_view",
        "lift_fresh",
        "lift_fresh_copy",
        "reshape",
        "view_copy",
        "native_dropout",
        "dropout",
        "_reshape_copy",
        "expand_copy",
        "positive",
    ]
)
MOVES = frozenset(
    [
        "repeat",
        "roll",
        "flip",
        "index_select",
        "tril",
        "triu",
        "repeat_interleave",
        "im2col",
        "upsample_nearest1d",
        "upsample_nearest2d",
        "upsample_nearest3d",
        "_upsample_nearest_exact1d",
        "_upsample_nearest_exact2d",
        "pixel_shuffle",
        "pixel_unshuffle",
        "channel_shuffle",
        "reflection_pad1d",
        "reflection_pad2d",
        "replication_pad1d",
        "replication_pad2d",
        "unfold_copy",
        "diagonal_copy",
        "rot90",
        "gather",
        "slice_scatter",
        "select_scatter",
    ]
)
REFUSED = {
    "_scaled_dot_product": "attention",
    "lstm": "a recurrence", "gru": "a recurrence", "rnn_tanh": "a recurrence", "rnn_relu": "a recurrence",
    "cumsum": "a running sum", "cumprod": "a running product",
    "native_group_norm": "a norm over sites", "sort": "sorting", "topk": "top-k",
}  # fmt: skip


def dispatch(
    tr: Tracer, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]
) -> Any:
    """Runs one operation for real and records its ids."""
    from fastgen.plan.capture import FRESH_OPS, METADATA_OPS

    if name in METADATA_OPS:
        return func(*args, **kwargs)
    dynamic = any(tr.dynamic(t) for t in tensors)
    if func._schema.is_mutable:
        return _mutate(tr, func, name, args, kwargs, dynamic, any(tr.conditional(t) for t in tensors))
    if dynamic and name in ("_local_scalar_dense", "equal", "is_nonzero"):
        raise UnsupportedError(
            f"{tr.path.current}: Python reads a sampled value (.item(), bool(), int() or a comparison); "
            "the sampler cannot follow a branch on data"
        )
    out = func(*args, **kwargs)
    results = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
    if not results or name in FRESH_OPS:
        return out
    storages = {t.untyped_storage()._cdata for t in tensors}
    if results[0].untyped_storage()._cdata in storages:
        return out  # a view: the shadow is read through its strides
    if not dynamic:
        if any(tr.conditional(t) for t in tensors):
            planned: Ids | None = conv_of_conditioning(tr, name, out, args)
            for t in results:
                tr.put(t, torch.full(t.shape, fit.COND) if planned is None else planned)
        return out
    if name in ("min", "max", "aminmax") and len(args) == 1:
        tr.notes.append(f"{tr.path.current}: global {name} of a sampled tensor is taken as a range check")
        return out
    return _record(tr, func, name, args, kwargs, out, results)


def _record(tr: Tracer, func: Any, name: str, args: Any, kwargs: Any, out: Any, results: list[Tensor]) -> Any:
    rule = _rule_of(name)
    decompose = None if rule is not None or any(name.startswith(r) for r in REFUSED) else _decomposition(func)
    if decompose is not None:
        nodes = len(tr.nodes)
        try:
            tr.depth += 1
            with tr:
                return decompose(*args, **kwargs)
        except (UnsupportedError, fit.Irregular):
            raise
        except Exception:  # a decomposition that torch cannot trace: fall back to the refusal by name
            del tr.nodes[nodes:]
        finally:
            tr.depth -= 1
    for k, t in enumerate(results):
        tr.put(t, _apply(tr, rule if k == 0 else None, func, name, t, args, kwargs))
    return out


def _decomposition(func: Any) -> Callable[..., Any] | None:
    """Torch's own definition of an operation by simpler ones, if it has one."""
    from torch._decomp import decomposition_table  # takes seconds to import, and few modules need it

    return decomposition_table.get(func)


def _mutate(tr: Tracer, func: Any, name: str, args: Any, kwargs: Any, dynamic: bool, conditional: bool) -> Any:
    """In-place operations: ids of the functional result first, then the write."""
    target: Tensor = args[0] if "out" not in kwargs else kwargs["out"]
    base = name[:-1] if name.endswith("_") else name
    if base in ("zero", "fill") and not (isinstance(args[-1], Tensor) and tr.dynamic(args[-1])):
        ids: Ids = torch.full(target.shape, fit.CONST)
    elif dynamic and base == "copy":
        ids = tr.ids(args[1]).expand(target.shape).clone()
        if conditional and bool((ids == fit.COND).any()):
            tr.notes.append(f"{tr.path.current}: conditioning copied into a sampled tensor")
    elif dynamic:
        ids = _apply(tr, _rule_of(base), func, base, target, args, kwargs)
    elif conditional:
        ids = torch.full(target.shape, fit.COND)
    else:
        ids = torch.full(target.shape, fit.CONST)
    result = func(*args, **kwargs)
    tr.put(target, ids)
    return result


def _apply(tr: Tracer, rule: Rule | None, func: Any, name: str, out: Tensor, args: Any, kwargs: Any) -> Ids:
    if rule is None:
        why = next((r for k, r in REFUSED.items() if name.startswith(k)), "an operation without a rule")
        return tr.opaque(out, name, f"aten.{name} is {why}, which the planner does not have yet")
    blocked = tr.opaque_ids([t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)])
    if blocked is not None:  # what follows an operation without a rule has none either: keep the first reason
        return torch.full(out.shape, blocked)
    try:
        ids = rule(tr, func, out, args, kwargs)
        return ids if isinstance(ids, fit.Field) else ids.reshape(out.shape)
    except fit.Irregular as error:
        return tr.opaque(out, name, f"aten.{name}: {error}")


def _rule_of(name: str) -> Rule | None:
    if name in IDENTITY:
        return _same
    if name in MOVES:
        return _move
    for table in (LINEAR, COMPUTED, _JOINS):
        if name in table:
            return table[name]
    if name in POINTWISE:
        return lambda tr, func, out, args, kwargs: pointwise(tr, name, out, args, kwargs)
    return None


def _same(tr: Tracer, func: Any, out: Tensor, args: Any, kwargs: Any) -> Ids:
    field = tr.field(args[0]) if args[0].shape == out.shape else None
    return tr.ids(args[0]) if field is None else field


def _pad(tr: Tracer, func: Any, out: Tensor, args: Any, kwargs: Any) -> Ids:
    """constant_pad_nd, in closed form where possible."""
    field, sides = tr.field(args[0]), list(args[1])
    if field is not None and len(sides) <= 2 * (out.dim() - 2):
        sides += [0] * (4 - len(sides))
        grid = (1, out.shape[2]) if out.dim() == 3 else (out.shape[2], out.shape[3])
        value = args[2] if len(args) > 2 else kwargs.get("value", 0)
        padded = field.padded((sides[2], sides[0]), grid, value == 0)
        if padded is not None:
            return padded
    return _move(tr, func, out, args, kwargs)


def _move(tr: Tracer, func: Any, out: Tensor, args: Any, kwargs: Any) -> Tensor:
    """Runs the operation on positions and follows them; zero is "from nowhere", a constant."""
    if any(tr.dynamic(a) for a in tree_leaves((args[1:], kwargs)) if isinstance(a, Tensor)):
        raise fit.Irregular("positions depend on sampled values")
    t = args[0]
    rest = [0 if func.overloadpacket.__name__ == "constant_pad_nd" and k == 1 else a for k, a in enumerate(args[1:])]
    position = torch.arange(1, t.numel() + 1, dtype=torch.float64).view(t.shape)
    moved = func(position, *rest, **kwargs).long().reshape(-1)
    flat = torch.cat([torch.full((1,), fit.CONST), tr.ids(t).reshape(-1)])
    return flat[moved]


def _join(tr: Tracer, func: Any, out: Tensor, args: Any, kwargs: Any) -> Ids:
    fields = [tr.field(t) for t in args[0]]
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % max(1, out.dim())
    first = fields[0]
    if first is not None and dim == 1 and func.overloadpacket.__name__ == "cat":
        alike = [f for f in fields if f is not None and replace(f, lanes=first.lanes) == first]
        if len(alike) == len(fields):
            return replace(first, lanes=torch.cat([f.lanes for f in alike]))
    result: Tensor = func([tr.ids(t) for t in args[0]], *args[1:], **kwargs)
    return result


def _index(tr: Tracer, func: Any, out: Tensor, args: Any, kwargs: Any) -> Tensor:
    """x[constant indices], or table[sampled index]."""
    from fastgen.plan.rules_pointwise import embed

    table, indices = args[0], args[1]
    if not any(tr.dynamic(i) for i in indices if isinstance(i, Tensor)):
        moved: Tensor = func(tr.ids(table).contiguous(), indices)
        return moved
    if tr.dynamic(table) or len(indices) != 1:
        raise fit.Irregular("positions depend on sampled values")
    return embed(tr, table.reshape(table.shape[0], -1), indices[0])


def _cast(tr: Tracer, func: Any, out: Tensor, args: Any, kwargs: Any) -> Ids:
    """Casts keep the value, except float to integer, which truncates."""
    if args[0].dtype.is_floating_point and not out.dtype.is_floating_point:
        return pointwise(tr, "trunc" if out.dtype != torch.bool else "ne_zero", out, args[:1], {})
    return _same(tr, func, out, args, kwargs)


_JOINS: dict[str, Rule] = {
    "cat": _join,
    "stack": _join,
    "index": _index,
    "_to_copy": _cast,
    "to": _cast,
    "constant_pad_nd": _pad,
}


def check_opaque(nodes: list[Node], ids: Tensor) -> None:
    """Raises UnsupportedError where an output is itself the result of an operation without a rule."""
    for k in (ids[ids >= 0] >> 48).unique().tolist():
        node = nodes[k]
        if isinstance(node, OpaqueNode):
            raise UnsupportedError(f"layer {node.path}: {node.reason}")


def finish(tr: Tracer, out: Tensor, arrange: Callable[[Tensor], Tensor]) -> Graph:
    """Adds one node per phase with the head's parameters at the data's sites, in the head's own order."""
    ids, values = arrange(tr.ids(out).contiguous()), arrange(out.contiguous())
    if not bool((ids >= 0).any()) and ids.shape[1] * ids.shape[2] * ids.shape[3] > 1:
        raise UnsupportedError(
            "forward's output does not depend on the sampled tensor as far as torch can see "
            "(is it computed outside torch, or by a custom autograd function?)"
        )
    height, width, phases, count = ids.shape[1:]
    check_opaque(tr.nodes, ids)
    i, j = fit.sites(height, width)
    params = []
    tr.path.stack = ["output"]
    for f in range(phases):
        part = ids[0, :, :, f].reshape(height * width, count).t()
        value = values[0, :, :, f].reshape(height * width, count).t()
        try:
            groups, constant = fit.fit(part, i, j)
            pieces = fit.pieces_of(groups, constant, value, i, j, (height, width))
        except fit.Irregular as error:
            raise UnsupportedError(f"forward's output: {error}") from error
        node = tr.add(MapNode, "params", count, (height, width), fn="copy", operands=[pieces])
        params.append(node.index)
    return Graph(tr.nodes, params, tr.points, tr.notes)
