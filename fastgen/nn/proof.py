"""The proof of `fuse_`: outputs and gradients of an example before and after."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastgen.errors import VerifyError
from fastgen.nn.trace import Call, call_of

# Largest difference as a part of a tensor's scale: in float32 what all of fastgen promises, else by the dtype's rounding.
# Torch's convolutions on a GPU round float32 to ten bits (TF32), as the kernels do.
_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
_TOLERANCE_TF32 = 1e-2


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[Callable[[bool], None]]:
    """Gives a function that sets evaluation (or training) mode, the buffers of the start and one seed; at the end the
    model's modes, its buffers and the caller's random state are what they were."""
    modes = [(m, m.training) for m in model.modules()]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]

    def fresh(training: bool = False) -> None:
        for m, _ in modes:
            m.training = training
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        torch.manual_seed(0)

    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        try:
            fresh(False)
            yield fresh
        finally:
            fresh(False)
            for m, mode in modes:
                m.training = mode


def outcome(
    model: nn.Module,
    args: tuple[Any, ...],
    fresh: Callable[[bool], None],
    calls: dict[int, Call | None],
    gradients: bool,
) -> dict[str, Tensor]:
    """Outputs and gradients on the example in evaluation and in training mode; `calls` is filled with how each module
    was called first. Leaves the model in evaluation mode."""
    found: dict[str, Tensor] = {}
    for training in (True, False):
        fresh(training)
        hooks = [] if training else [_watch(m, calls) for m in model.modules()]
        try:
            with torch.set_grad_enabled(gradients):
                found |= _tensors(model, model(*args), "training" if training else "evaluation")
        finally:
            for hook in hooks:
                hook.remove()
    return found


def has_gradients(model: nn.Module, args: tuple[Any, ...], fresh: Callable[[bool], None]) -> bool:
    """Whether the model as it is can be differentiated: one that works in place may not."""
    try:
        outcome(model, args, fresh, {}, True)
    except RuntimeError:
        outcome(model, args, fresh, {}, False)  # if this fails too, the example is wrong
        return False
    return True


def _watch(module: nn.Module, calls: dict[int, Call | None]) -> Any:
    def hook(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if id(m) not in calls:
            calls[id(m)] = call_of(m, args, kwargs)

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _tensors(model: nn.Module, outputs: Any, mode: str) -> dict[str, Tensor]:
    leaves = [t for t in tree_leaves(outputs) if isinstance(t, Tensor)]
    found = {f"{mode}: output {k}": t.detach() for k, t in enumerate(leaves)}
    used = [t for t in leaves if t.requires_grad]
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if used and named:
        grads = torch.autograd.grad(used, [p for _, p in named], [torch.randn_like(t) for t in used], allow_unused=True)
        found |= {f"{mode}: gradient of {n}": g for (n, _), g in zip(named, grads, strict=True) if g is not None}
    return found


def compare(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    """The largest difference. Raises VerifyError where one is beyond rounding."""
    if before.keys() != after.keys():
        odd = sorted(before.keys() ^ after.keys())[0]
        raise VerifyError(f"fuse_: {odd} exists only {'before' if odd in before else 'after'}; the model is unchanged")
    # A gradient that cancels to nothing has no scale of its own.
    largest = {
        kind: max([_size(t) for n, t in before.items() if n.startswith(kind)], default=0.0) for kind in _kinds(before)
    }
    worst = 0.0
    for name, expected in before.items():
        given = after[name]
        if given.shape != expected.shape or given.dtype != expected.dtype:
            raise VerifyError(
                f"fuse_: {name} became {given.dtype} {list(given.shape)}, expected {expected.dtype} "
                f"{list(expected.shape)}; the model is unchanged"
            )
        scale = max(_size(expected), 1e-2 * largest[_kind(name)])
        error = _size(given.double() - expected.double()) / scale if scale else _size(given)
        allowed = _tolerance(expected) * (10.0 if "gradient" in name else 1.0)  # it sums over all sites
        if not error <= allowed:
            raise VerifyError(
                f"fuse_: {name} differs by {error:.1e} of its scale, expected at most {allowed:.0e}; the model is unchanged"
            )
        worst = max(worst, error)
    return worst


def _kind(name: str) -> str:
    return " ".join(name.split(" ")[:2])


def _kinds(tensors: dict[str, Tensor]) -> set[str]:
    return {_kind(name) for name in tensors}


def _size(t: Tensor) -> float:
    return float(t.double().abs().max()) if t.numel() else 0.0


def _tolerance(t: Tensor) -> float:
    if t.device.type == "cuda" and t.dtype == torch.float32:
        return _TOLERANCE_TF32
    return _TOLERANCE.get(t.dtype, 0.0)
