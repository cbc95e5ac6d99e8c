"""Calling a person's forward: on copies, with the path of the layer that runs, and with errors that name it."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.errors import FastgenError, ShapeError, UnsupportedError

FORWARD_ERRORS = (RuntimeError, ValueError, TypeError, LookupError, AssertionError, AttributeError, ArithmeticError)


def device_of(model: nn.Module) -> torch.device:
    """Of its first parameter; the CPU for a module without."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


class ModulePath:
    """The dotted path of the module of a private view (view.py) whose forward this thread is running."""

    _running = threading.local()

    def __init__(self) -> None:
        self.stack: list[str] = []

    @property
    def current(self) -> str:
        """Path of the innermost running module; "forward" outside all."""
        return self.stack[-1] if self.stack else "forward"

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Follows this thread for the duration."""
        before = getattr(self._running, "path", None)
        self._running.path = self
        try:
            yield
        finally:
            self._running.path = before

    @classmethod
    def follow(cls, module: nn.Module, name: str) -> None:
        """Has a module say when its forward begins and ends, whoever watches then."""

        def enter(module: nn.Module, args: Any) -> None:
            path = getattr(cls._running, "path", None)
            if path is not None:
                path.stack.append(name)

        def leave(module: nn.Module, args: Any, result: Any) -> None:
            path = getattr(cls._running, "path", None)
            if path is not None:
                path.stack.pop()

        module.register_forward_pre_hook(enter, prepend=True)
        module.register_forward_hook(leave, always_call=True)


def plain(t: Any) -> Any:
    """A tensor that capture may write to and watch: a copy, and no inference tensor."""
    return t.clone() if isinstance(t, Tensor) else t


def try_forward(model: nn.Module, x: Tensor, cond: tuple[Any, ...]) -> None:
    """Runs forward once, so that what it cannot take is told apart from what cannot be planned."""
    try:
        model(x.clone(), *cond)
    except FastgenError:
        raise
    except FORWARD_ERRORS as error:
        told = refused(x, cond, error)
        try:
            model(*(torch.cat([t, t]) if isinstance(t, Tensor) and t.dim() else t for t in (x, *cond)))
        except FORWARD_ERRORS:
            raise told from error
        raise ShapeError(
            f"{told}; it takes two samples at once, but not one: does it squeeze the batch away?"
        ) from error


def refused(x: Tensor, cond: tuple[Any, ...], error: Exception) -> ShapeError:
    """What to tell a person whose forward fails on its inputs."""
    given = ", ".join(str(list(c.shape)) if isinstance(c, Tensor) else repr(c) for c in cond)
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    with_cond = f" with conditioning {given}" if cond else ""
    if not x.is_floating_point():
        reason += " (these are class indices; the head's encode='unit', 'symmetric' or 'onehot' feeds numbers)"
    elif "Long" in reason:
        reason += " (the head's encode='index' feeds class indices)"
    return ShapeError(f"forward does not take a sample {list(x.shape)} of {x.dtype}{with_cond}: {reason}")


def first_tensor(out: Any) -> Tensor:
    """Forward's parameters: its result; of a tuple or list of results the first; of results with names `logits`, or the only
    tensor among them."""
    given = type(out).__name__
    while not isinstance(out, Tensor):
        named = _named(out)
        if named is not None:
            tensors = {k: v for k, v in named.items() if isinstance(v, Tensor)}
            if "logits" not in tensors and len(tensors) != 1:
                names = ", ".join(map(str, tensors)) or "none"
                raise UnsupportedError(
                    f"forward returned {given} with the tensors {names}; expected a tensor of parameters, or one of them called "
                    "'logits' (wrap the module in one whose forward returns it)"
                )
            out = tensors.get("logits", next(iter(tensors.values())))
            continue
        out = next((v for v in out if v is not None), None) if isinstance(out, tuple | list) else None
        if out is None:
            raise UnsupportedError(f"forward returned {given}; expected a tensor of parameters")
    return out


def _named(out: Any) -> dict[Any, Any] | None:
    """The results of a mapping, a named tuple or a dataclass."""
    if isinstance(out, Mapping):
        return dict(out)
    if dataclasses.is_dataclass(out) and not isinstance(out, type):
        return {f.name: getattr(out, f.name) for f in dataclasses.fields(out)}
    return out._asdict() if hasattr(out, "_asdict") else None
