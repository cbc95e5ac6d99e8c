"""Dispatch of captured operations: what moves data runs on ids, what computes becomes a node.

A rule takes (tracer, aten overload, real result, args, kwargs) and gives the ids of the result; it may add nodes. Anything
without a rule is decomposed by torch's own decompositions, or becomes opaque: refused by name if an output depends on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastgen.capture.closed_form import ClosedForm
from fastgen.capture.convolution import CONVOLUTIONS, conv_of_conditioning
from fastgen.capture.fit import Irregular
from fastgen.capture.ids import COND, CONST
from fastgen.capture.linear import LINEAR
from fastgen.capture.lookup import LOOKUP, index
from fastgen.capture.moves import MOVEMENT, PATCHES, cast
from fastgen.capture.norms import NORMS
from fastgen.capture.pointwise import POINTWISE, pointwise
from fastgen.capture.shadow import Ids
from fastgen.capture.tracer import Tracer
from fastgen.errors import UnsupportedError

Rule = Callable[[Tracer, Any, Tensor, tuple[Any, ...], dict[str, Any]], Ids]

METADATA_OPS = frozenset(
    ["transpose_", "t_", "squeeze_", "unsqueeze_", "detach_", "swapaxes_", "swapdims_", "as_strided_", "set_", "resize_"]
)  # fmt: skip
# Of their arguments they take the shape alone.
FRESH_OPS = frozenset(
    ["new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided", "zeros_like", "ones_like", "full_like",
     "empty_like", "rand_like", "randn_like"]
)  # fmt: skip
# What these make of sampled values is the plan's, so that a run for conditioning alone may skip it.
COMPUTES = POINTWISE | frozenset([*CONVOLUTIONS, *LINEAR, *LOOKUP, *NORMS])
REFUSED = {
    "_scaled_dot_product": "attention",
    "lstm": "a recurrence", "gru": "a recurrence", "rnn_tanh": "a recurrence", "rnn_relu": "a recurrence",
    "cumsum": "a running sum", "cumprod": "a running product",
    "native_group_norm": "a norm over sites", "sort": "sorting", "topk": "top-k",
}  # fmt: skip
# Arguments, by position, whose conditioning a rule turns into sources of its own; of any other argument the example's value
# would be taken for a constant. (Matrix products and sums refuse by themselves, saying what they cannot mix.)
ANY = range(16)
CONDITIONAL: dict[str, Iterable[int]] = {
    **dict.fromkeys(MOVEMENT, (0,)), **dict.fromkeys(PATCHES, (0, 1)),
    **dict.fromkeys(LINEAR, ANY), **dict.fromkeys(POINTWISE, ANY),
    **dict.fromkeys(["convolution", "index", "glu", "log_sigmoid_forward", "native_layer_norm", "native_batch_norm",
                     "_native_batch_norm_legit_no_training", "cudnn_batch_norm"], (0,)),
}  # fmt: skip


def _pointwise(name: str, tr: Tracer, func: Any, out: Tensor, args: Any, kwargs: Any) -> Ids:
    return pointwise(tr, name, out, args, kwargs)


RULES: dict[str, Rule] = {
    **MOVEMENT, **CONVOLUTIONS, **LINEAR, **LOOKUP, **NORMS, "index": index,
    **{name: partial(_pointwise, name) for name in POINTWISE},
}  # fmt: skip


class Dispatcher(TorchDispatchMode):
    """The mode under which forward runs: executes every operation, and has the tracer record it."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tracer = tracer

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        tr, kwargs = self.tracer, kwargs or {}
        name = func.overloadpacket.__name__
        tensors = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        tr.enter(name, tensors)
        if name in METADATA_OPS:
            return func(*args, **kwargs)
        dynamic = any(tr.dynamic(t) for t in tensors)
        if func._schema.is_mutable:
            return self._mutate(func, name, args, kwargs, dynamic, any(tr.conditional(t) for t in tensors))
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
                planned = conv_of_conditioning(tr, name, out, args)
                for t in results:
                    tr.put(t, torch.full(t.shape, COND) if planned is None else planned)
            return out
        if name in ("min", "max", "aminmax") and len(args) == 1:
            tr.notes.append(f"{tr.path.current}: global {name} of a sampled tensor is taken as a range check")
            return out
        return self._record(func, name, args, kwargs, out, results)

    def _record(self, func: Any, name: str, args: Any, kwargs: Any, out: Any, results: list[Tensor]) -> Any:
        tr, rule = self.tracer, RULES.get(name)
        refused = any(name.startswith(r) for r in REFUSED)
        decompose = None if rule is not None or refused else decomposition_table.get(func)
        if decompose is not None:
            nodes = len(tr.nodes)
            try:
                tr.depth += 1
                with self:
                    return decompose(*args, **kwargs)
            except (UnsupportedError, Irregular):
                raise
            except Exception:  # a decomposition that torch cannot trace: fall back to the refusal by name
                del tr.nodes[nodes:]
            finally:
                tr.depth -= 1
        for k, t in enumerate(results):
            tr.put(t, self._apply(rule if k == 0 else None, func, name, t, args, kwargs))
        return out

    def _mutate(self, func: Any, name: str, args: Any, kwargs: Any, dynamic: bool, conditional: bool) -> Any:
        """In-place operations: ids of the functional result first, then the write."""
        tr = self.tracer
        target: Tensor = args[0] if "out" not in kwargs else kwargs["out"]
        base = name[:-1] if name.endswith("_") else name
        if base == "zero" or (base == "fill" and not isinstance(args[1], Tensor)):
            ids: Ids = torch.full(target.shape, CONST)
        elif dynamic and base in ("copy", "fill"):
            ids = cast(tr, func, target, (args[1].expand(target.shape),), {})
            if conditional and isinstance(ids, Tensor) and bool((ids == COND).any()):
                tr.notes.append(f"{tr.path.current}: conditioning copied into a sampled tensor")
        elif dynamic:
            ids = self._apply(RULES.get(base), func, base, target, args, kwargs)
        else:
            ids = torch.full(target.shape, COND if conditional else CONST)
        result = func(*args, **kwargs)
        tr.put(target, ids)
        return result

    def _apply(self, rule: Rule | None, func: Any, name: str, out: Tensor, args: Any, kwargs: Any) -> Ids:
        tr = self.tracer
        if rule is None:
            why = next((r for k, r in REFUSED.items() if name.startswith(k)), "an operation without a rule")
            return tr.opaque(out, name, f"aten.{name} is {why}, which the planner does not have yet")
        blocked = tr.opaque_ids([t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)])
        if blocked is not None:  # what follows an operation without a rule has none either: keep the first reason
            return torch.full(out.shape, blocked)
        try:
            self._check_conditioning(name, args, kwargs)
            ids = rule(tr, func, out, args, kwargs)
            return ids if isinstance(ids, ClosedForm) else ids.reshape(out.shape)
        except Irregular as error:
            return tr.opaque(out, name, f"aten.{name}: {error}")

    def _check_conditioning(self, name: str, args: Any, kwargs: Any) -> None:
        """Raises Irregular where an argument depends on conditioning that the rule would not follow."""
        allowed = CONDITIONAL.get(name, ())
        for k, a in [*enumerate(args), *kwargs.items()]:
            if k not in allowed and any(self.tracer.conditional(t) for t in tree_leaves(a) if isinstance(t, Tensor)):
                raise Irregular(f"argument {k} depends on conditioning, and would be frozen at the example's value")
