"""The person's module stays the person's: no flag, counter or attribute of it moves, and what surrounds a call stays out."""

from __future__ import annotations

import collections
import functools
import threading
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastgen
from fastgen import heads
from fastgen.errors import ModelChangedError
from fastgen.view import private_view

HEAD = heads.Categorical(4, encode="unit", params="B(n*C)*")


class Net(nn.Module):
    """Sequences of four classes, fed delayed; `layers` stand in plain attributes of many kinds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.out = nn.Conv1d(1, 8, 3), nn.Conv1d(8, 4, 1)
        self.drop = nn.Dropout(0.5)
        self.embed = nn.Linear(3, 8)

    def hidden(self, x: Tensor) -> Tensor:
        return torch.tanh(self.first(F.pad(x, (2, 0))))

    def middle(self, h: Tensor) -> Tensor:
        return h

    def forward(self, x: Tensor, *cond: Tensor) -> Tensor:
        h = self.drop(self.middle(self.hidden(x)))
        if cond:
            h = h + self.drop(self.embed(cond[0]))[:, :, None]
        out: Tensor = self.out(h)
        return out


class Listed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = [nn.Sequential(nn.Conv1d(8, 8, 1), nn.Dropout(0.5))]

    def middle(self, h: Tensor) -> Tensor:
        return h + self.blocks[0](h)


class Nested(Net):
    def __init__(self) -> None:
        super().__init__()
        self.table = {"a": ([nn.Conv1d(8, 8, 1)], nn.Dropout(0.5)), "b": OrderedDict(c=2.0)}

    def middle(self, h: Tensor) -> Tensor:
        (conv,), drop = self.table["a"]  # type: ignore[misc]
        out: Tensor = drop(conv(h)) * self.table["b"]["c"]  # type: ignore[index, call-overload]
        return out


class Bound(Net):
    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Sequential(nn.Conv1d(8, 8, 1), nn.Dropout(0.5)).forward  # a method of a module kept nowhere else

    def middle(self, h: Tensor) -> Tensor:
        return self.step(h)


class Partial(Net):
    def __init__(self) -> None:
        super().__init__()
        self.step = functools.partial(self._apply_to, nn.Dropout(0.5), scale=2.0)

    def _apply_to(self, drop: nn.Module, h: Tensor, scale: float) -> Tensor:
        out: Tensor = drop(h) * scale
        return out

    def middle(self, h: Tensor) -> Tensor:
        return self.step(h)


class Replaced(Net):
    """A forward put in place of the class's, as people patch models: a closure over the module itself."""

    def __init__(self) -> None:
        super().__init__()
        me = self

        def forward(x: Tensor, *cond: Tensor) -> Tensor:
            out: Tensor = me.out(me.drop(me.hidden(x)))
            return out

        self.forward = forward  # type: ignore[method-assign]


class Helper:
    def __init__(self, drop: nn.Module) -> None:
        self.drop, self.scale = drop, 0.5


class Helped(Net):
    def __init__(self) -> None:
        super().__init__()
        self.helper = Helper(nn.Dropout(0.5))

    def middle(self, h: Tensor) -> Tensor:
        out: Tensor = self.helper.drop(h) * self.helper.scale
        return out


class Counting(Net):
    """Counters of every kind, and a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.number, self.seen = 0, list[int]()
        self.cache: Tensor | None = None

    def middle(self, h: Tensor) -> Tensor:
        self.calls += 1  # type: ignore[operator, misc]
        self.number += 1
        self.seen.append(len(h))
        self.cache = h * 2
        return self.cache


class Hooked(Net):
    def __init__(self) -> None:
        super().__init__()
        nn.utils.weight_norm(self.first)
        self.first.register_forward_hook(lambda module, args, out: out * 2)


class Aliased(Net):
    """Tensors that share their memory, a closure over a list, and features that a hook puts into an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.all = torch.ones(2, 8, 1)
        self.register_buffer("part", self.all[0])
        self.order, self.features = [0], dict[str, Tensor]()
        order, features = self.order, self.features
        self.scaled = lambda h: h * (order[0] + 0.5)
        self.first.register_forward_hook(lambda module, args, out: features.__setitem__("first", out))

    def middle(self, h: Tensor) -> Tensor:
        self.part[0] = 3.0
        self.order[0] = 2
        return self.scaled(h) * self.all[0] + self.features["first"]  # type: ignore[no-untyped-call]


NETS: list[type[Net]] = [Aliased, Net, Listed, Nested, Bound, Partial, Replaced, Helped, Counting, Hooked]


def compiled(model: nn.Module, **options: Any) -> fastgen.Sampler:
    return fastgen.compile(model, (1, 24), HEAD, predicts="next", threads=1, **options)


def every_module(model: nn.Module) -> Iterator[nn.Module]:
    yield from model.modules()
    for hidden in (getattr(model, "blocks", []), getattr(getattr(model, "helper", None), "drop", None)):
        for m in hidden if isinstance(hidden, list) else [hidden]:
            if isinstance(m, nn.Module):
                yield from m.modules()


@pytest.mark.parametrize("make", NETS)
def test_in_training_mode_as_in_eval_mode(make: type[Net]) -> None:
    """The samples are those of the eval mode; the module is in training mode as before, and nothing in it has moved."""
    model = make()
    for m in every_module(model):
        m.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = {k: v for k, v in vars(model).items() if isinstance(v, int | float | list)}
    held = {k: list(v) for k, v in state.items() if isinstance(v, list)}
    sampler = compiled(model)
    drawn = sampler.sample(3, seed=5)
    assert all(m.training for m in every_module(model))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert {k: vars(model)[k] for k in state} == state and all(vars(model)[k] == v for k, v in held.items())
    view = private_view(model)
    naive = fastgen.compile(view, (1, 24), HEAD, predicts="next", backend="naive").sample(3, seed=5)
    assert torch.equal(drawn, naive)
    x = torch.rand(2, 1, 24)
    assert torch.equal(view(x), view(x)), "the view drops nothing"
    assert all(a is b for a, b in zip(model.parameters(), view.parameters(), strict=True))
    assert not {id(m) for m in model.modules()} & {id(m) for m in view.modules()}


def test_threads_beside_training_forwards() -> None:
    """Ten threads sample and score while forwards in training mode go on: equal bytes, and dropout always on there."""
    model = Net()
    truth = compiled(model.eval(), cond=(torch.zeros(1, 3),))
    zs = torch.randn(40, 1, 3)
    right = [truth.sample(1, seed=3, cond=(z,)) for z in zs]
    scores = truth.log_prob(right[0], cond=(zs[0],))
    sampler = compiled(model.train(), cond=(torch.zeros(1, 3),))
    wrong: list[Any] = []

    def work(k: int) -> None:
        try:
            for i in range(k, len(zs), 2):
                if not torch.equal(sampler.sample(1, seed=3, cond=(zs[i],)), right[i]):
                    wrong.append(i)
                if not torch.equal(sampler.log_prob(right[0], cond=(zs[0],)), scores):
                    wrong.append("score")
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(k % 2,)) for k in range(10)]
    for t in threads:
        t.start()
    x, same = torch.rand(2, 1, 24), 0
    for _ in range(100):
        same += torch.equal(model(x), model(x))
    for t in threads:
        t.join()
    assert wrong == [] and same == 0 and all(m.training for m in model.modules())


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


class Making(Net):
    """Tensors made inside of forward follow the defaults."""

    def middle(self, h: Tensor) -> Tensor:
        t = h.shape[-1]
        return (
            h * torch.ones(t) + torch.tensor(0.25) + torch.full((t,), 0.5) + torch.arange(8.0)[:, None] + torch.zeros(1)
        )


SURROUNDINGS: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta": lambda: default_device("meta"),
    "inference": torch.inference_mode,
    "gradients": torch.enable_grad,
}


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_what_surrounds_a_call_stays_out(name: str) -> None:
    model, z = Making(), torch.randn(1, 3)
    sampler = compiled(model, cond=(z,))
    drawn, known = sampler.sample(2, seed=1), sampler.sample(1, seed=2)
    scores, other = sampler.log_prob(drawn), torch.randn(2, 3)
    fresh = compiled(Making(), cond=(z,)).sample(2, seed=9, cond=(other,))
    with SURROUNDINGS[name]():
        inside = compiled(model, cond=(z,))
        assert torch.equal(inside.sample(2, seed=9, cond=(other,)), fresh)
        assert torch.equal(inside.sample(2, seed=1), drawn) and torch.equal(sampler.log_prob(drawn), scores)
        assert torch.equal(torch.cat(list(sampler.stream(1, seed=2)), -1), known)
        assert inside.verify().ok
    assert torch.equal(inside.log_prob(drawn), scores)


# ---- changes -----------------------------------------------------------------------------------------------------
def change_weight(m: Any) -> None:
    m.first.weight.data.mul_(2)


def permute_weight(m: Any) -> None:
    m.first.weight.data.copy_(m.first.weight.data.roll(1, 0).clone())


def swap_two(m: Any) -> None:
    w = m.first.weight.data.view(-1)
    w[[0, 1]] = w[[1, 0]]


def replace_parameter(m: Any) -> None:
    m.first.weight = nn.Parameter(m.first.weight.detach() + 1)


def replace_module(m: Any) -> None:
    m.first = nn.Conv1d(1, 8, 3)


def change_stride(m: Any) -> None:
    m.out.padding = (1,)


def change_listed(m: Any) -> None:
    m.blocks[0][0].weight.data.mul_(2)


def append_listed(m: Any) -> None:
    m.blocks.append(nn.Identity())


def change_nested(m: Any) -> None:
    m.table["b"]["c"] = 3.0


def change_helper(m: Any) -> None:
    m.helper.scale = 2.0


class Odd(Net):
    """Numbers in odd places."""

    level = 1.0  # of the class

    def __init__(self) -> None:
        super().__init__()
        self.space, self.array = types.SimpleNamespace(scale=1.0), np.ones(1, np.float32)
        self.config = Helper(nn.Identity())
        self.config.inner = Helper(nn.Identity())  # type: ignore[attr-defined]
        self.queue, t = collections.deque([1.0]), torch.ones(1)
        self.held, self.bound = (lambda h: h * t), functools.partial(torch.mul, torch.ones(1))
        self.slots = Slots()

    def middle(self, h: Tensor) -> Tensor:
        h = self.bound(self.held(h)) * self.space.scale * float(self.array[0]) * self.queue[0] * self.level  # type: ignore[no-untyped-call]
        return h * self.config.inner.scale * self.slots.scale  # type: ignore[attr-defined]


class Slots:
    __slots__ = ("scale",)

    def __init__(self) -> None:
        self.scale = 1.0


ODD: dict[str, Callable[[Any], None]] = {
    "space.scale": lambda m: setattr(m.space, "scale", 2.0), "array": lambda m: m.array.__setitem__(0, 2),
    "config.inner.scale": lambda m: setattr(m.config.inner, "scale", 2.0), r"queue\[0\]": lambda m: m.queue.__setitem__(0, 2.0),
    "held.t": lambda m: m.held.__closure__[0].cell_contents.mul_(2), r"bound.args\[0\]": lambda m: m.bound.args[0].mul_(2),
    "level": lambda m: setattr(type(m), "level", type(m).level + 1), "slots.scale": lambda m: setattr(m.slots, "scale", 2.0),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_changes_in_odd_places_are_noticed(name: str) -> None:
    model = Odd()
    sampler = compiled(model)
    drawn = sampler.sample(1)
    assert torch.equal(sampler.sample(1), drawn)
    ODD[name](model)
    with pytest.raises(ModelChangedError, match=rf"^{name} changed"):
        sampler.sample(1)


def add_hook(m: Any) -> None:
    m.out.register_forward_hook(lambda module, args, out: out * 2)


def new_attribute(m: Any) -> None:
    m.scale = 3.0


CHANGES: list[tuple[type[Net], Callable[[Any], None], str]] = [
    (Net, change_weight, "first.weight"), (Net, permute_weight, "first.weight"), (Net, swap_two, "first.weight"),
    (Net, replace_parameter, "first.weight"), (Net, replace_module, "first"), (Net, change_stride, "out.padding"),
    (Listed, change_listed, r"blocks\[0\].0.weight"), (Listed, append_listed, r"blocks\[1\]"),
    (Nested, change_nested, "table.b.c"), (Helped, change_helper, "helper.scale"), (Net, add_hook, "a hook of out"),
    (Net, new_attribute, "scale"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "change", "name"), CHANGES, ids=lambda v: getattr(v, "__name__", ""))
def test_changes_are_noticed(make: type[Net], change: Callable[[Any], None], name: str) -> None:
    model = make()
    sampler = compiled(model)
    sampler.sample(1)
    change(model)
    with pytest.raises(ModelChangedError, match=rf"^{name} changed"):
        sampler.sample(1)
    if change is not change_stride:  # which leaves a network that is not causal
        sampler.refresh()
        assert sampler.verify().ok


@pytest.mark.parametrize("make", NETS)
def test_what_forward_writes_is_no_change(make: type[Net]) -> None:
    """A person's own forwards, in either mode, leave a sampler alone; equal values put anew do, too."""
    model = make()
    sampler = compiled(model)
    drawn = sampler.sample(2)
    model.train()(torch.rand(2, 1, 24))
    model.eval()(torch.rand(2, 1, 24))
    model.out.weight = nn.Parameter(model.out.weight.detach().clone())
    assert torch.equal(sampler.sample(2), drawn)


# ---- other weights -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_types(dtype: torch.dtype) -> None:
    """Planned and proved on a copy in float32, which the plan says."""
    model = Making().to(dtype)
    sampler = compiled(model)
    assert all(p.dtype == dtype for p in model.parameters())
    assert sampler.verify().ok and f"{str(dtype).removeprefix('torch.')}, computed in float32" in str(sampler.plan)
    copy = Making()
    copy.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    other = compiled(copy)
    assert torch.equal(sampler.sample(3), other.sample(3))
    assert torch.equal(sampler.log_prob(sampler.sample(3)), other.log_prob(other.sample(3)))


def test_wrapped_modules() -> None:
    model = Net()
    drawn = compiled(model).sample(2)
    for wrapped in (nn.DataParallel(model), torch.compile(model)):
        assert torch.equal(compiled(wrapped).sample(2), drawn)


# ---- conditioning ------------------------------------------------------------------------------------------------
def test_conditioning_is_the_samplers_own() -> None:
    """Not the caller's memory, whatever becomes of that, and with no history."""
    z = torch.randn(1, 3, requires_grad=True) * 2
    sampler = compiled(Net(), cond=(z,))
    drawn = sampler.sample(2)
    chunks = sampler.stream(2, cond=(z,))
    with torch.no_grad():
        z.mul_(-9)
    assert torch.equal(sampler.sample(2), drawn) and torch.equal(torch.cat(list(chunks), -1), drawn)


def test_conditioning_in_bfloat16() -> None:
    class Cast(Net):
        def forward(self, x: Tensor, *cond: Tensor) -> Tensor:
            return super().forward(x, *(c.float() for c in cond))

    z = torch.randn(2, 3).bfloat16()
    drawn = compiled(Cast(), cond=(z[:1],)).sample(2, cond=(z,))
    assert torch.equal(drawn, compiled(Net(), cond=(z[:1].float(),)).sample(2, cond=(z.float(),)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_conditioning_must_be_finite(value: float) -> None:
    sampler = compiled(Net(), cond=(torch.zeros(1, 3),))
    with pytest.raises(ValueError, match=r"cond\[0\] \(1, 3\) holds 3 values that are NaN or infinite"):
        sampler.sample(1, cond=(torch.full((1, 3), value),))
    with pytest.raises(ValueError, match=r"cond\[0\] \(1, 3\) holds 3 values that are NaN or infinite"):
        compiled(Net(), cond=(torch.full((1, 3), value),))
