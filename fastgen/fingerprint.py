"""Weights: are they finite, and is everything that forward may read still what a sampler was compiled with?"""

from __future__ import annotations

import functools
import types
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from fastgen.errors import FastgenError
from fastgen.native import native
from fastgen.view import CONTAINERS, SIMPLE, content, of_the_person, slots_of

# Of a module's own attributes, what has no say in what forward gives.
ASIDE = frozenset(
    ["training", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook", "_state_dict_hooks",
     "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_non_persistent_buffers_set"]
)  # fmt: skip
MISSING = object()
DEEP = 3  # objects inside of objects
Place = tuple[str, Any]  # the name of a holder of values, and a key in it


def check_finite(model: nn.Module) -> None:
    """Raises FastgenError naming the first parameter or buffer that holds NaN or infinity."""
    for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, t in tensors:
            if nn.parameter.is_lazy(t):
                raise FastgenError(
                    f"{kind} {name} has no size yet (a lazy module); run forward once before it is sampled"
                )
            if not t.is_floating_point():
                continue
            bad = ~t.detach().isfinite() if kind == "parameter" else t.detach().isnan()
            if bool(bad.any()):
                raise FastgenError(
                    f"{kind} {name} {tuple(t.shape)} holds {int(bad.sum())} values that are NaN or infinite; "
                    "expected finite weights"
                )


@dataclass(frozen=True)
class Mark:
    """What a tensor was: its shape, its type, and a checksum of its bytes in their order."""

    shape: tuple[int, ...]
    dtype: Any
    total: int

    @staticmethod
    def of(t: Tensor | numpy.ndarray[Any, Any]) -> Mark:
        """The mark of a tensor or array as it is now: one read of it."""
        if isinstance(t, numpy.ndarray):
            raw = t.tobytes() if t.dtype != object else repr(t).encode()
            return Mark(t.shape, t.dtype, zlib.crc32(raw))
        t = t.detach()
        return Mark(tuple(t.shape), t.dtype, _checksum(t))


@dataclass(frozen=True)
class Holder:
    """Something that holds values by key: a module's or an object's attributes, a list, a dictionary."""

    name: str
    box: Any
    values: dict[Any, Any]  # as they were

    def now(self) -> dict[Any, Any]:
        """The values as they are."""
        return _values(self.box)

    def path(self, key: Any) -> str:
        """What a person would call a value."""
        hidden = ("_parameters", "_buffers", "_modules")
        parts = [p for p in self.name.split(".") if p and p not in hidden]
        if parts and parts[-1].startswith("_forward"):
            return f"a hook of {'.'.join(parts[:-1]) or 'the module'}"
        name = ".".join(parts)
        return f"{name}[{key}]" if isinstance(key, int) else ".".join([*parts, *([] if key in hidden else [str(key)])])


class Fingerprint:
    """Everything that a module's forward may read: parameters, buffers, tensors, numbers and strings among the attributes
    of its modules, wherever those are kept (lists and dictionaries included), and which hooks they have."""

    def __init__(self, model: nn.Module) -> None:
        self.holders = list(_holders(model))
        self.marks: dict[Place, Mark] = {}
        for h in self.holders:
            for key, value in h.values.items():
                if isinstance(value, Tensor | numpy.ndarray):
                    self.marks[h.name, key] = Mark.of(value)

    def changed(self, aside: frozenset[Place] | set[Place] = frozenset()) -> Iterator[tuple[Place, str]]:
        """Each place that is not what it was, and its name; places `aside` are not looked at."""
        for h in self.holders:
            now = h.now()
            for key in {**h.values, **now}:
                place = (h.name, key)
                if place in aside:
                    continue
                if self._differs(place, h.values.get(key, MISSING), now.get(key, MISSING)):
                    yield place, h.path(key)

    def _differs(self, place: Place, was: Any, value: Any) -> bool:
        if isinstance(value, Tensor | numpy.ndarray):
            return self.marks.get(place) != Mark.of(value)
        if value is was:
            return False
        return not (isinstance(was, SIMPLE) and type(value) is type(was) and value == was)


def _holders(root: nn.Module) -> Iterator[Holder]:
    """Holders in a fixed order, each once: modules, containers, and the objects that modules hold."""
    seen: set[int] = set()
    todo: list[tuple[str, Any, int]] = [("", root, 0)]
    while todo:
        name, box, depth = todo.pop()
        if id(box) in seen:
            continue
        seen.add(id(box))
        held = Holder(name, box, _values(box))
        yield held
        for key, value in held.values.items():
            child = held.path(key) if isinstance(key, int) else f"{name}.{key}".lstrip(".")
            if isinstance(value, types.MethodType):
                value = value.__self__
            if isinstance(value, nn.Module):
                todo.append((child, value, 0))
            elif isinstance(value, (*CONTAINERS, functools.partial, types.FunctionType)):
                todo.append((child, value, depth))
            elif depth < DEEP and _plain_object(value):
                todo.append((child, value, depth + 1))


def _plain_object(value: Any) -> bool:
    return of_the_person(value) and (isinstance(getattr(value, "__dict__", None), dict) or bool(_slots(value)))


def _slots(value: Any) -> dict[str, Any]:
    return {n: getattr(value, n) for n in slots_of(value)}


def _values(box: Any) -> dict[Any, Any]:
    if isinstance(box, dict):
        return dict(box)
    if isinstance(box, CONTAINERS):
        return dict(enumerate(box))
    if isinstance(box, functools.partial):
        return {"func": box.func, "args": box.args, "keywords": box.keywords}
    if isinstance(box, types.FunctionType):
        cells = zip(box.__code__.co_freevars, box.__closure__ or (), strict=True)
        return {**{n: content(c) for n, c in cells}, **vars(box), "__defaults__": box.__defaults__}
    own = dict(getattr(box, "__dict__", {}))
    if isinstance(box, nn.Module):
        own = {k: v for k, v in own.items() if k not in ASIDE}
    theirs = type(box).__module__.split(".")[0] not in ("torch", "builtins")
    shared = vars(type(box)) if theirs else {}  # of the class, as far as they are values
    own = {k: v for k, v in own.items() if not k.startswith("_fastgen_")}  # of layers, made from the rest
    return {
        **{k: v for k, v in shared.items() if not k.startswith("__") and isinstance(v, (*SIMPLE, Tensor, *CONTAINERS))},
        **_slots(box), **own,
    }  # fmt: skip


def _checksum(t: Tensor) -> int:
    raw = t.contiguous()
    if raw.device.type == "cpu" and raw.layout == torch.strided and type(raw) in (Tensor, nn.Parameter):
        return int(native().checksum(raw.data_ptr(), raw.numel() * raw.element_size()))
    # Of a device: sums of the rows and of the columns of its words, weighed by where they are.
    words = raw.reshape(-1).view(torch.uint8).long()
    width = max(1, int(words.numel() ** 0.5))
    words = torch.nn.functional.pad(words, (0, -words.numel() % width)).view(-1, width)
    down, across = words.sum(0), words.sum(1)
    odd = [torch.arange(len(s), device=s.device) * 2 + 1 for s in (down, across)]
    return int((down * odd[0]).sum()) * 0x9E3779B1 + int((across * odd[1]).sum())
