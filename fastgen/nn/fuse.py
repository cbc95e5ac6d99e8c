"""`fuse_`: the fused kernels in a model that is written with torch.nn, in place, with a proof that nothing changed."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.nn.choice import Deciding, decide_again
from fastgen.nn.convolutions import has_hooks
from fastgen.nn.patterns import Finder
from fastgen.nn.proof import compare, has_gradients, outcome, undisturbed
from fastgen.nn.rewrite import replace_match, write_forward
from fastgen.nn.trace import Call, CannotTrace, is_leaf, trace
from fastgen.ops import KernelChoice


@dataclass(frozen=True)
class Swap:
    """One chain of layers that is now one call: in the forward of `module`, the convolutions `convs`, as `what` says."""

    module: str
    convs: str
    what: str
    kernel: KernelChoice


@dataclass
class FuseReport:
    """What `fuse_` did. swapped: the chains; left: (module, reason) of gates that were recognised or searched for in
    vain; error: largest difference of outputs and gradients on the example, as a part of their scale."""

    swapped: list[Swap] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)
    error: float = 0.0

    def __str__(self) -> str:
        lines = [f"{len(self.swapped)} swapped, largest difference on the example {self.error:.1e} of scale"]
        lines += [f"  {s.module or '(model)'}: {s.convs}: {s.what} [{s.kernel.name}]" for s in self.swapped]
        lines += [f"  left as it is: {where or '(model)'}: {reason}" for where, reason in self.left]
        return "\n".join(lines)


def fuse_(model: nn.Module, example: Any = None) -> FuseReport:
    """Replace what has a fused kernel in `model`, in place: its modules keep their parameters, names and hooks.

    Recognised in the forward of any module, by tracing it: a convolution (1-D or 2-D, one group, weight norm of
    either kind, masks multiplied into the weight) followed by tanh(a) sigmoid(b) or a sigmoid(b) of the halves of
    its channels (chunk, split, slices, nn.GLU), or two convolutions of one input as the halves; with conditioning
    added in front of the gate, a residual behind it, concat_elu and zero padding in front of the convolution; and
    concat_elu with a convolution alone. A forward rewritten that way runs for calls of the example's structure (the
    same arguments given, as tensors or with the same plain values); for others the module's own runs.

    example: the arguments of one forward, a tensor or a tuple. Models with `sample_shape` and `example_cond`
    (`fastgen.models`) need none. Outputs and gradients on it are compared before and after, in evaluation and in
    training mode. The state_dict does not change, nor does the class of a model that is pickled: that is the plain
    one again. Raises ValueError without an example; VerifyError if anything differs, and leaves the model as it was.
    """
    args = _example(model, example)
    report, undo = FuseReport(), []
    calls: dict[int, Call | None] = {}
    with undisturbed(model) as fresh:
        gradients = has_gradients(model, args, fresh)
        if not gradients:
            report.left.append(("", "the example has no gradients before either; outputs alone are compared"))
        convs = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.Conv1d | nn.Conv2d)]
        report.left += [
            (path, "it carries hooks, which a fused call would pass by") for path, m in convs if has_hooks(m)
        ]
        before = outcome(model, args, fresh, calls, gradients)
        try:
            for path, module in _inner_first(model):
                if id(module) in calls:
                    undo += _rewrite(path, module, calls[id(module)], report)
            if report.swapped:
                report.error = compare(before, outcome(model, args, fresh, {}, gradients))
            report.left = _said_once(report)
        except BaseException:
            for restore in undo:
                restore()
            raise
    return report


def _example(model: nn.Module, example: Any) -> tuple[Any, ...]:
    if example is not None:
        return (example,) if isinstance(example, Tensor) else tuple(example)
    shape, cond = getattr(model, "sample_shape", None), getattr(model, "example_cond", None)
    if shape is None or cond is None:
        raise ValueError(f"fuse_: give example=, the arguments of one forward of {type(model).__name__}")
    weight = next(model.parameters())
    dtype = torch.int64 if getattr(model, "layout", "") == "HW" else weight.dtype
    return (torch.zeros(2, *shape, dtype=dtype, device=weight.device), *cond(2))


def _inner_first(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """A user's own modules with convolutions in them, children in front of their parents."""
    own = [(path, m) for path, m in reversed(list(model.named_modules())) if not is_leaf(m)]
    return [(path, m) for path, m in own if any(isinstance(c, nn.Conv1d | nn.Conv2d) for c in m.modules())]


def _rewrite(path: str, module: nn.Module, call: Call | None, report: FuseReport) -> list[Callable[[], None]]:
    """Puts fused calls into one module's forward; what undoes it."""
    try:
        if call is None:
            raise CannotTrace("its arguments are not all tensors or plain values, with a name each")
        graph, shapes = trace(module, call)
        where, found = f"{path}." if path else "", []
        finder = Finder(module, graph, shapes)
        while (match := finder.next()) is not None:
            fused = replace_match(module, graph, match, where)
            finder.shapes[fused] = finder.shapes[match.last]
            found.append(match)
        report.left += [(path, reason) for reason in finder.refused]
    except CannotTrace as error:
        report.left.append((path, str(error)))
        return []
    if not found:
        return []
    restore = _install(module, write_forward(module, graph, call))
    assert isinstance(module, Deciding)
    report.swapped += [Swap(path, m.name, m.what, module._fastgen_kernel) for m in found]
    return [restore]


def _said_once(report: FuseReport) -> list[tuple[str, str]]:
    """What is left, without what a parent says again of its child, or has been able to swap in it."""
    done = [f"{s.module}.{s.convs}".lstrip(".") for s in report.swapped]
    seen: dict[str, tuple[str, str]] = {}
    for path, reason in report.left:
        if not path or not any(name.startswith(f"{path}.") for name in done):
            seen.setdefault(f"{path}.{reason}".lstrip("."), (path, reason))
    return list(seen.values())


def _install(module: nn.Module, forward: Any) -> Callable[[], None]:
    """Gives one module a class of its own with this forward; returns what takes it away again."""
    own = type(module)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        state = {k: v for k, v in self.__dict__.items() if not k.startswith("_fastgen_")}
        hooks = state["_load_state_dict_post_hooks"]
        state["_load_state_dict_post_hooks"] = type(hooks)((k, v) for k, v in hooks.items() if k != handle.id)
        return object.__new__, (own,), state

    def copy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
        memo[id(self)] = twin = type(self).__new__(type(self))
        twin.__dict__.update(deepcopy(self.__dict__, memo))
        return twin

    parts = {"forward": forward, "__reduce_ex__": reduce, "__deepcopy__": copy, "__module__": own.__module__}
    module.__class__ = type(f"Fused{own.__name__}", (own, Deciding), parts)
    handle = module.register_load_state_dict_post_hook(decide_again)
    decide_again(module)

    def restore() -> None:
        handle.remove()
        module.__class__ = own
        for name in [n for n in module.__dict__ if n.startswith("_fastgen_")]:
            del module.__dict__[name]

    return restore
