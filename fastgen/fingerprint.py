"""Weights: are they finite, and is everything that forward may read still what a sampler was compiled with?"""

from __future__ import annotations

import collections
import functools
import operator
import types
import weakref
import zlib
from collections.abc import Callable, Iterator
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
MISSING, EMPTY = object(), object()
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


def marks(arrays: list[Tensor | numpy.ndarray[Any, Any]]) -> list[Mark]:
    """The marks of tensors and arrays as they are now: one read of all of them, on several threads."""
    plain = [(k, t.detach().contiguous()) for k, t in enumerate(arrays) if isinstance(t, Tensor) and _in_memory(t)]
    pieces = [(t.data_ptr(), t.numel() * t.element_size()) for _, t in plain]
    totals = dict(zip((k for k, _ in plain), native().checksums(pieces, torch.get_num_threads()), strict=True))
    return [Mark(tuple(t.shape), t.dtype, totals[k] if k in totals else _total(t)) for k, t in enumerate(arrays)]


@dataclass(frozen=True)
class Holder:
    """Something that holds values by key: a module's or an object's attributes, a list, a dictionary."""

    name: str
    box: Callable[[], Any]  # of a module by a weak reference: who looks at it keeps it alive
    values: dict[Any, Any]  # as they were
    arrays: list[Any]  # keys of tensors among them

    @staticmethod
    def of(name: str, box: Any) -> Holder:
        """Of a module, container or object as it is now."""
        values = _values(box)
        arrays = [key for key, value in values.items() if isinstance(value, Tensor | numpy.ndarray)]
        return Holder(name, weakref.ref(box) if isinstance(box, nn.Module) else lambda: box, values, arrays)

    def now(self) -> dict[Any, Any]:
        """The values as they are; none where the module is gone."""
        box = self.box()
        return {} if box is None else _values(box)

    def path(self, key: Any) -> str:
        """What a person would call a value."""
        hidden = ("_parameters", "_buffers", "_modules")
        parts = [p for p in f"{self.name}.{key}".split(".") if p and p not in hidden]
        hook = next((k for k, p in enumerate(parts) if p.startswith("_forward")), None)
        if hook is not None:
            return f"a hook of {'.'.join(parts[:hook]) or 'the module'}"
        parts = [p for p in self.name.split(".") if p and p not in hidden]
        name = ".".join(parts)
        return f"{name}[{key}]" if isinstance(key, int) else ".".join([*parts, *([] if key in hidden else [str(key)])])


class Fingerprint:
    """Everything that a module's forward may read: parameters, buffers, tensors, numbers and strings among the attributes
    of its modules, wherever those are kept (lists and dictionaries included), and which hooks they have."""

    def __init__(self, model: nn.Module) -> None:
        self.holders = list(_holders(model))
        arrays = {(h.name, key): h.values[key] for h in self.holders for key in h.arrays}
        self.marks: dict[Place, Mark] = dict(zip(arrays, marks(list(arrays.values())), strict=True))

    def changed(self, aside: frozenset[Place] | set[Place] = frozenset()) -> Iterator[tuple[Place, str]]:
        """Each place that is not what it was, and its name; places `aside` are not looked at."""
        arrays: list[tuple[Place, Holder, Any]] = []
        for h in self.holders:
            now = h.now()
            same = now.keys() == h.values.keys() and all(map(operator.is_, now.values(), h.values.values()))
            for key in h.arrays if same else {**h.values, **now}:
                place, value = (h.name, key), now.get(key, MISSING)
                if place in aside:
                    continue
                if isinstance(value, Tensor | numpy.ndarray):
                    arrays.append((place, h, value))
                elif _differs(h.values.get(key, MISSING), value):
                    yield place, h.path(key)
        for (place, h, _), mark in zip(arrays, marks([value for *_, value in arrays]), strict=True):
            if self.marks.get(place) != mark:
                yield place, h.path(place[1])


def _differs(was: Any, value: Any) -> bool:
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
        held = Holder.of(name, box)
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
    if isinstance(box, nn.Module):  # most have no hooks, buffers or children: what is empty has no holder of its own
        own = {
            k: EMPTY if type(v) in (dict, collections.OrderedDict) and not v else v
            for k, v in own.items()
            if k not in ASIDE
        }
    theirs = type(box).__module__.split(".")[0] not in ("torch", "builtins")
    shared = vars(type(box)) if theirs else {}  # of the class, as far as they are values
    own = {k: v for k, v in own.items() if not k.startswith("_fastgen_")}  # of layers, made from the rest
    return {
        **{k: v for k, v in shared.items() if not k.startswith("__") and isinstance(v, (*SIMPLE, Tensor, *CONTAINERS))},
        **_slots(box), **own,
    }  # fmt: skip


def _in_memory(t: Tensor) -> bool:
    """Whether it is a plain tensor whose bytes can be read where they lie."""
    return t.device.type == "cpu" and t.layout == torch.strided and type(t) in (Tensor, nn.Parameter)


def _total(t: Tensor | numpy.ndarray[Any, Any]) -> int:
    """A checksum of what is not: NumPy's arrays, and tensors of a device by sums of the rows and of the columns of their words,
    weighed by where they are."""
    if isinstance(t, numpy.ndarray):
        return zlib.crc32(t.tobytes() if t.dtype != object else repr(t).encode())
    words = t.detach().contiguous().reshape(-1).view(torch.uint8).long()
    width = max(1, int(words.numel() ** 0.5))
    words = torch.nn.functional.pad(words, (0, -words.numel() % width)).view(-1, width)
    down, across = words.sum(0), words.sum(1)
    odd = [torch.arange(len(s), device=s.device) * 2 + 1 for s in (down, across)]
    return int((down * odd[0]).sum()) * 0x9E3779B1 + int((across * odd[1]).sum())
