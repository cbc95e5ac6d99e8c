"""Reads that leave torch: Python looks at a number, or at a shape that numbers decide.

What Python does with them cannot be followed, with one exception. A yes or no after whose opposite forward raises an
error, and asks nothing else first, is a check (of a range, for NaN): whenever forward gives a result, the answer was this
one. That is found out by running forward again, on a copy of the module, with the answer turned round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastgen.capture.tracer import Tracer
from fastgen.errors import UnsupportedError

READS = frozenset(["_local_scalar_dense", "equal", "is_nonzero", "allclose"])
YES_OR_NO = frozenset(["equal", "is_nonzero", "allclose"])
SHOWN = frozenset(["__repr__", "__str__", "__format__"])  # for people, as in a print
# Whose arguments decide the shape of the result: by position; all, if not here.
SHAPED_BY = {"masked_select": (1,), "repeat_interleave": (0,)}


@dataclass(frozen=True)
class Read:
    """One read of a forward: where, what, and the answer."""

    path: str
    what: str
    answer: bool


def refuse(tr: Tracer, t: Tensor, what: str, cure: str = "") -> NoReturn:
    """Raises UnsupportedError for a read of sampled or conditioning values, or of what depends on them."""
    blocked = tr.opaque_ids([t])
    if blocked is not None:
        raise UnsupportedError(f"layer {tr.path.current}: Python reads ({what}) what has no rule: {tr.reason(blocked)}")
    if tr.dynamic(t):
        raise UnsupportedError(
            f"{tr.path.current}: Python reads a sampled value ({what}); the sampler cannot follow a branch on data, nor "
            f"arithmetic outside torch{': ' + cure if cure else ''}"
        )
    raise UnsupportedError(
        f"{tr.path.current}: Python reads a conditioning value ({what}), which is another for every sample; "
        f"{cure or 'use it as a tensor, or pass it as a Python number, string or list, which compile binds'}"
    )


def shape_read(tr: Tracer, func: Any, name: str, args: Any, tensors: list[Tensor]) -> Tensor | None:
    """The sampled or conditioning tensor that decides the shape of func's result, if one does."""
    if torch.Tag.dynamic_output_shape not in func.tags:
        return None
    if name == "index":
        tensors = [t for t in args[1] if isinstance(t, Tensor) and t.dtype in (torch.bool, torch.uint8)]
    elif name in SHAPED_BY:
        tensors = [args[k] for k in SHAPED_BY[name]]
    return next((t for t in tensors if tr.dynamic(t) or tr.conditional(t)), None)


class Turned(TorchDispatchMode):
    """Runs forward with the answer of one read turned round, and of the very same one when it is asked again."""

    def __init__(self, number: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.number, self.count = number, 0
        self.asked: tuple[Any, ...] | None = None
        self.branch = self.showing = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in READS:
            self.count += 1
            asked = (func, *map(_place, args), *sorted((kwargs or {}).items()))
            if self.count == self.number + 1:
                self.asked = asked
            if self.asked == asked:
                return not out
            # A number, or what is asked to show a tensor, is for the message of an error.
            if self.asked is not None and isinstance(out, bool) and not self.showing:
                self.branch = True
        return out


class Showing(TorchFunctionMode):
    """Tells a Turned when a tensor is being shown."""

    def __init__(self, turned: Turned) -> None:
        super().__init__()
        self.turned = turned

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        before, self.turned.showing = self.turned.showing, getattr(func, "__name__", "") in SHOWN
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.turned.showing = before


def _place(a: Any) -> Any:
    return (a.data_ptr(), a.shape, a.stride()) if isinstance(a, Tensor) else a


def check_reads(reads: list[Read | None], run: Callable[[], Any]) -> list[str]:
    """Notes of the checks among the reads. Raises UnsupportedError at the first that is a branch: forward, `run` once more
    with the other answer, gives a result there too."""
    notes = []
    for number, read in enumerate(reads):
        if read is None:
            continue
        mode = Turned(number)
        try:
            with mode, Showing(mode):
                run()
        except (Exception, SystemExit):  # whatever forward raises to say that it cannot go on
            if not mode.branch:
                notes.append(f"{read.path}: {read.what} is taken as a check; the sampler does not repeat it")
                continue
        raise UnsupportedError(
            f"{read.path}: {read.what}: forward goes another way where this is {not read.answer}, and the sampler cannot "
            "follow a branch on data; compute both ways and choose by torch.where"
        )
    return notes
