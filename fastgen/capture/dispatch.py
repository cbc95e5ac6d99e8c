"""Dispatch of captured operations: what moves data runs on ids, what computes becomes a node.

A rule takes (tracer, aten overload, real result, args, kwargs) and gives the ids of the result; it may add nodes. Anything
without a rule is decomposed by torch's own decompositions, or becomes opaque: refused by name if an output depends on it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fastgen.capture.closed_form import ClosedForm
from fastgen.capture.convolution import CONVOLUTIONS, conv_of_conditioning
from fastgen.capture.fit import Irregular
from fastgen.capture.ids import COND, CONST
from fastgen.capture.linear import LINEAR
from fastgen.capture.lookup import LOOKUP, PICKS, untouched
from fastgen.capture.moves import MOVEMENT, cast
from fastgen.capture.norms import NORMS
from fastgen.capture.pointwise import POINTWISE, pointwise
from fastgen.capture.reads import READS, YES_OR_NO, Read, refuse, shape_read
from fastgen.capture.shadow import Ids, dense
from fastgen.capture.signature import COMPUTES, check_call, check_result, check_type, empty, numbers_of
from fastgen.capture.tracer import Tracer
from fastgen.errors import UnsupportedError

Watch = Callable[[Tracer, Tensor], None]  # is shown every result
Rule = Callable[[Tracer, Any, Tensor, tuple[Any, ...], dict[str, Any]], Ids]

METADATA_OPS = frozenset(
    ["transpose_", "t_", "squeeze_", "unsqueeze_", "detach_", "swapaxes_", "swapdims_", "as_strided_", "set_", "resize_"]
)  # fmt: skip
# Of their arguments they take the shape alone.
FRESH_OPS = frozenset(
    ["new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided", "zeros_like", "ones_like", "full_like",
     "empty_like"]
)  # fmt: skip
REFUSED = {
    "_scaled_dot_product": "attention",
    "lstm": "a recurrence", "gru": "a recurrence", "rnn_tanh": "a recurrence", "rnn_relu": "a recurrence",
    "cumsum": "a running sum", "cumprod": "a running product",
    "native_group_norm": "a norm over sites", "sort": "sorting", "topk": "top-k",
}  # fmt: skip
# Of all values, where no dim is given.
WHOLE = {"max": "the largest", "min": "the smallest", "aminmax": "the smallest and largest"}
# Random only in training; this argument says so.
TRAINED = {"native_dropout": 2, "rrelu_with_noise": 4}
# They write an argument besides their result, which nobody reads.
RESULT_ALONE = frozenset(["rrelu_with_noise"])


def _pointwise(name: str, tr: Tracer, func: Any, out: Tensor, args: Any, kwargs: Any) -> Ids:
    return pointwise(tr, name, out, args, kwargs)


# What moves conditioning about without a change.
MOVED = {k: v for k, v in MOVEMENT.items() if k not in ("to", "_to_copy")}
RULES: dict[str, Rule] = {
    **MOVEMENT, **CONVOLUTIONS, **LINEAR, **LOOKUP, **NORMS,
    **{name: partial(_pointwise, name) for name in POINTWISE},
}  # fmt: skip


def is_random(func: Any, name: str, args: Any) -> bool:
    """Whether a call gives other numbers every time."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    k = TRAINED.get(name)
    return k is None or (k < len(args) and args[k] is not False)


def written_by(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that a call writes to, by its schema."""
    written = []
    for k, a in enumerate(func._schema.arguments):
        if a.alias_info is not None and a.alias_info.is_write:
            written += tree_leaves(args[k] if k < len(args) else kwargs.get(a.name))
    return [t for t in written if isinstance(t, Tensor)]


class Dispatcher(TorchDispatchMode):
    """The mode under which forward runs: executes every operation, and has the tracer record it."""

    def __init__(self, tracer: Tracer, watch: Watch | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tracer, self.watch = tracer, watch

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():  # of TorchScript's operations the function mode is not popped
            out = self._dispatch(func, args, kwargs or {})
            if self.watch is not None and not self.tracer.depth:
                for t in [*tree_leaves(out), *written_by(func, args, kwargs or {})]:
                    if isinstance(t, Tensor):
                        self.watch(self.tracer, t)
            return out

    def _dispatch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tr = self.tracer
        name = func.overloadpacket.__name__
        tensors = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        tr.enter(name, tensors)
        if name in METADATA_OPS:
            return func(*args, **kwargs)
        if name in READS and func.namespace == "aten":
            return self._read(func, name, args, kwargs, tensors)
        if is_random(func, name, args):
            return self._random(func, name, args, kwargs)
        dynamic = any(tr.dynamic(t) for t in tensors)
        conditional = any(tr.conditional(t) for t in tensors)
        if dynamic and not tr.depth and name.rstrip("_") in POINTWISE:
            tr.numbers[tr.call] = numbers_of(args, kwargs)
        if func._schema.is_mutable and name not in RESULT_ALONE:
            return self._mutate(func, name, args, kwargs, dynamic, conditional)
        if (dynamic or conditional) and (decider := shape_read(tr, func, name, args, tensors)) is not None:
            refuse(tr, decider, f"aten.{name}, whose result has a shape that depends on it")
        out = func(*args, **kwargs)
        results = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if (
            not results
            and out is not None
            and (dynamic or conditional)
            and not name.startswith(("sym_", "is_", "size", "_has_", "_is_"))
        ):
            refuse(tr, next(t for t in tensors if tr.dynamic(t) or tr.conditional(t)), f"aten.{name}")
        if not results or name in FRESH_OPS:
            return out
        storages = {t.untyped_storage()._cdata for t in tensors if t.layout == torch.strided}
        if results[0].layout == torch.strided and results[0].untyped_storage()._cdata in storages:
            return out  # a view: the shadow is read through its strides
        if dynamic and not tr.depth and name in COMPUTES:
            tr.shapes[tr.call] = tree_map(empty, out)
        if not dynamic:
            if conditional:
                planned = conv_of_conditioning(tr, name, out, args)
                for k, t in enumerate(results):
                    tr.put(t, self._conditional(func, name, t, args, kwargs, k == 0) if planned is None else planned)
            return out
        return self._record(func, name, args, kwargs, out, results)

    def _conditional(self, func: Any, name: str, out: Tensor, args: Any, kwargs: Any, first: bool) -> Ids:
        """Ids of a result of conditioning alone: what is moved, or masked by a constant, is known element by element."""
        tr = self.tracer
        known: Tensor | None = None
        if first and name in MOVED and not any(tr.conditional(t) for t in tree_leaves(args[1:])):
            with contextlib.suppress(Irregular, RuntimeError):
                known = dense(MOVED[name](tr, func, out, args, kwargs), out.shape)
        elif name in ("copy", "fill", "to", "_to_copy"):
            known = tr.ids(args[0] if "to" in name else args[1])
        elif name in PICKS:
            known = untouched(tr, PICKS[name], func, out, args)
        elif name in ("mm", "bmm", "addmm"):
            known = self._without_terms(args)
        elif (
            name in ("where", "masked_fill") and len(args) == 3 and not tr.conditional(args[k := int(name != "where")])
        ):
            yes, no = (args[1], args[2]) if name == "where" else (args[2], args[0])
            yes, no = (tr.ids(a) if isinstance(a, Tensor) else torch.tensor(CONST) for a in (yes, no))
            known = torch.where(args[k], yes, no)
        elif name in POINTWISE:
            known = torch.where(self._depends_on_nothing(name, out, args, kwargs), CONST, COND)
        return torch.full(out.shape, COND) if known is None else known.expand(out.shape)

    def _depends_on_nothing(self, name: str, out: Tensor, args: Any, kwargs: Any) -> Tensor:
        """Where a function's result is a constant: of constants alone, or of a constant zero that is multiplied or divided."""
        constant = torch.ones(out.shape, dtype=torch.bool)
        zero = torch.zeros(out.shape, dtype=torch.bool)
        for a in tree_leaves((args, kwargs)):
            if isinstance(a, Tensor):
                constant = constant & (self.tracer.ids(a) == CONST)
        for a in args if name == "mul" else args[:1] if name in ("div", "true_divide") else ():
            zero = zero | (
                ((self.tracer.ids(a) == CONST) & (a == 0)) if isinstance(a, Tensor) else torch.tensor(a == 0)
            )
        return constant | zero

    def _without_terms(self, args: Any) -> Tensor:
        """Ids of bias + a @ b (or without a bias): where each term has a constant zero, nothing is added to the bias."""
        *bias, a, b = args
        some = [~((self.tracer.ids(t) == CONST) & (t == 0)) for t in (a, b)]
        added = (some[0].float() @ some[1].float()) > 0
        for t in bias:
            added = added | (self.tracer.ids(t) != CONST)
        return torch.where(added, COND, CONST)

    def _read(self, func: Any, name: str, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        """Python asks for a number: only a yes or no, and that is looked into afterwards (reads.py)."""
        tr, out = self.tracer, func(*args, **kwargs)
        watched = next((t for t in tensors if tr.dynamic(t)), None)
        watched = next((t for t in tensors if tr.conditional(t)), None) if watched is None else watched
        if watched is None or tr.how == "":
            if not tr.depth:
                tr.reads.append(None)
            return out
        yes_or_no = name in YES_OR_NO or tensors[0].dtype == torch.bool or tr.how == "bool"
        if not yes_or_no or tr.depth:
            refuse(tr, watched, ".item(), int() or float()" if name == "_local_scalar_dense" else f"torch.{name}()")
        kind = "sampled" if tr.dynamic(watched) else "conditioning"
        tr.reads.append(Read(tr.path.current, f"Python reads a yes or no on {kind} values", bool(out)))
        return out

    def _random(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        reason = f"aten.{name} is random, and what is made of it is not planned (keep fixed numbers in a buffer)"
        for t in [*tree_leaves(out), *written_by(func, args, kwargs)]:
            if isinstance(t, Tensor):
                self.tracer.put(t, self.tracer.opaque(t, name, reason))
        return out

    def _record(self, func: Any, name: str, args: Any, kwargs: Any, out: Any, results: list[Tensor]) -> Any:
        tr, rule = self.tracer, RULES.get(name)
        refused = any(name.startswith(r) for r in REFUSED)
        refused |= name in WHOLE and len(args) == 1
        decompose = None if rule is not None or refused else decomposition_table.get(func)
        if decompose is not None:
            try:
                tr.depth += 1
                with self:
                    return decompose(*args, **kwargs)
            except (UnsupportedError, Irregular):
                raise
            except Exception:  # a decomposition that torch cannot trace: fall back to the refusal by name
                pass
            finally:
                tr.depth -= 1
        for k, t in enumerate(results):
            tr.put(t, self._apply(rule if k == 0 else None, func, name, t, args, kwargs))
        return out

    def _mutate(self, func: Any, name: str, args: Any, kwargs: Any, dynamic: bool, conditional: bool) -> Any:
        """In-place operations: ids of the functional result first, then the write."""
        tr, written = self.tracer, written_by(func, args, kwargs)
        base = name[:-1] if name.endswith("_") else name
        if len(written) != 1 or func.namespace != "aten":
            result = func(*args, **kwargs)
            for t in [*written, *tree_leaves(result)]:
                if isinstance(t, Tensor) and (dynamic or conditional):
                    reason = (
                        f"{func.namespace}.{name} writes to its arguments in a way that the planner does not follow"
                    )
                    tr.put(t, tr.opaque(t, name, reason))
            return result
        target = written[0]
        if "out" in kwargs:  # which is made as large as it must be
            functional = torch.empty(0, dtype=target.dtype)
            target.resize_(func(*args, **{**kwargs, "out": functional}).shape)
        if base == "zero" or (base == "fill" and not isinstance(args[1], Tensor)):
            ids: Ids = torch.full(target.shape, CONST)
        elif dynamic and base in ("copy", "fill"):
            ids = self._apply(cast, func, base, target, (args[1].expand(target.shape),), {})
            if conditional and isinstance(ids, Tensor) and bool((ids == COND).any()):
                tr.notes.append(f"{tr.path.current}: conditioning copied into a sampled tensor")
        elif dynamic:
            ids = self._apply(RULES.get(base), func, base, target, args, kwargs)
        elif conditional:
            ids = self._conditional(func, base, target, args, kwargs, True)
        else:
            ids = torch.full(target.shape, CONST)
        result = func(*args, **kwargs)
        tr.put(target, ids)
        return result

    def _apply(self, rule: Rule | None, func: Any, name: str, out: Tensor, args: Any, kwargs: Any) -> Ids:
        tr = self.tracer
        inner = func.namespace == "prims"  # of the decomposition of the running call
        called = f"aten.{tr.call[1]}" if inner else f"{func.namespace}.{name}"
        blocked = tr.opaque_ids([t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)])
        if blocked is not None:  # what follows an operation without a rule has none either: keep the first reason
            return torch.full(out.shape, blocked)
        if func.namespace not in ("aten", "prims"):
            return tr.opaque(out, name, f"{called} is an operation of its own kind, which the planner does not know")
        if name in WHOLE and len(args) == 1:
            return tr.opaque(out, name, f"{called} is {WHOLE[name]} of all values, later ones too")
        if rule is None or inner:
            why = next((r for k, r in REFUSED.items() if name.startswith(k)), "an operation without a rule")
            return tr.opaque(out, name, f"{called} is {why}, which the planner does not have yet")
        try:
            check_type(name, out.dtype)
            check_call(tr, func, name, args, kwargs)
            ids = rule(tr, func, out, args, kwargs)
            check_result(tr, name, out, ids)
            return ids if isinstance(ids, ClosedForm) else ids.reshape(out.shape)
        except Irregular as error:
            return tr.opaque(out, name, f"{called}: {error}")
