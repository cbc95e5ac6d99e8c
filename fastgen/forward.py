"""Calling a person's forward: on copies, with the path of the layer that runs, and with errors that name it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
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
        raise refused(x, cond, error) from error


def refused(x: Tensor, cond: tuple[Any, ...], error: Exception) -> ShapeError:
    """What to tell a person whose forward fails on its inputs."""
    given = ", ".join(str(list(c.shape)) if isinstance(c, Tensor) else repr(c) for c in cond)
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    with_cond = f" with conditioning {given}" if cond else ""
    return ShapeError(f"forward does not take a sample {list(x.shape)} of {x.dtype}{with_cond}: {reason}")


def first_tensor(out: Any) -> Tensor:
    """Forward's parameters: its result, or the first of a tuple or list of results."""
    while isinstance(out, tuple | list) and out:
        out = out[0]
    if not isinstance(out, Tensor):
        raise UnsupportedError(f"forward returned {type(out).__name__}; expected a tensor of parameters")
    return out
