"""Forms of modules, of what they return and of what they are given: exact, or one error that names the thing."""

# As users write: modules are not annotated in full.
# mypy: disable-error-code="no-any-return,no-untyped-def"

from __future__ import annotations

import collections
import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastgen
from fastgen import UnsupportedError
from fastgen.errors import FastgenError, ShapeError
from fastgen.heads import Categorical

SHAPE, HEAD = (1, 10), Categorical(4, encode="symmetric", params="B(n*C)*")


class Net(nn.Module):
    """A causal layer, something in the middle, an output, and what becomes of it."""

    def __init__(self, middle: Any = None, finish: Callable[[Tensor], Any] = lambda y: y) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.out = nn.Conv1d(1, 6, 3), nn.Conv1d(6, 4, 1)
        self.middle, self.finish = middle or (lambda h, *cond: h), finish

    def forward(self, x: Tensor, *cond: Tensor) -> Any:
        return self.finish(self.out(self.middle(torch.tanh(self.first(F.pad(x, (2, 0)))), *cond)))


def compiled(model: nn.Module, *cond: Any, **options: Any) -> fastgen.Sampler:
    return fastgen.compile(model.eval(), SHAPE, HEAD, cond, predicts="next", threads=1, **options)


@pytest.fixture(scope="module")
def plain() -> Tensor:
    return compiled(Net()).sample(3)


# ---- what forward returns ----------------------------------------------------------------------------------------
@dataclasses.dataclass
class Output:
    logits: Tensor
    hidden: Tensor | None = None


Pair = collections.namedtuple("Pair", "hidden logits")
RETURNED: dict[str, Callable[[Tensor], Any]] = {
    "a list": lambda y: [y, 2 * y], "none in front": lambda y: (None, y), "a dictionary": lambda y: {"hidden": y * 2, "logits": y},
    "the only tensor": lambda y: {"parameters": y, "count": 3}, "an object": lambda y: Output(y, y * 2),
    "a named tuple": lambda y: Pair(y * 2, y), "nested": lambda y: ({"logits": y}, 3), "in float64": lambda y: y.double(),
    "an ordered dictionary": lambda y: collections.OrderedDict(logits=y),
}  # fmt: skip
NOT_RETURNED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "nothing": (lambda y: None, "forward returned NoneType"),
    "an empty tuple": (lambda y: (), "forward returned tuple"),
    "two tensors": (lambda y: {"a": y, "b": y}, "with the tensors a, b; expected a tensor of parameters, or one of them called"),
    "one sample of two": (lambda y: y[:1], "parameters of 1 samples for 2"),
    "two samples of one": (lambda y: torch.cat([y, y]), "parameters of 2 samples for one"),
    "a flat tensor": (lambda y: y.reshape(-1), "forward's output has shape"),
    "one number": (lambda y: y.sum(), "forward's output has shape"),
    "complex numbers": (lambda y: y + 0j, "complex"),
}  # fmt: skip


@pytest.mark.parametrize("form", RETURNED)
def test_forms_of_a_result(form: str, plain: Tensor) -> None:
    assert torch.equal(compiled(Net(finish=RETURNED[form])).sample(3), plain)


@pytest.mark.parametrize("form", NOT_RETURNED)
def test_results_that_are_no_parameters(form: str) -> None:
    finish, message = NOT_RETURNED[form]
    with pytest.raises(FastgenError, match=message):
        compiled(Net(finish=finish))


# ---- modules -----------------------------------------------------------------------------------------------------
class Slots(nn.Module):
    __slots__ = ("scale",)

    def __init__(self) -> None:
        super().__init__()
        self.scale = 2.0

    def forward(self, h: Tensor) -> Tensor:
        return h * self.scale


class Keyed(nn.Module):
    """Keeps numbers by module."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv1d(6, 6, 1)
        self.scales = {self.layer: 2.0}

    def forward(self, h: Tensor) -> Tensor:
        return self.layer(h) * self.scales[self.layer]


@pytest.mark.parametrize("kind", [Slots, Keyed])
def test_attributes_in_odd_places(kind: type[nn.Module]) -> None:
    model = Net(kind())
    sampler = compiled(model)
    assert torch.equal(sampler.sample(3), compiled(model, backend="naive").sample(3))
    if kind is Slots:
        model.middle.scale = 3.0
        with pytest.raises(fastgen.errors.ModelChangedError, match="scale changed"):
            sampler.sample(1)
        sampler.refresh()
        assert torch.equal(sampler.sample(3), compiled(model, backend="naive").sample(3))


def test_a_traced_module(plain: Tensor) -> None:
    traced = torch.jit.trace(Net().eval(), torch.zeros(2, *SHAPE))
    assert torch.equal(compiled(traced).sample(3), plain)


def test_a_lazy_module() -> None:
    model = Net(nn.LazyConv1d(6, 1))
    with pytest.raises(FastgenError, match="middle.weight has no size yet"):
        compiled(model)
    model(torch.zeros(1, *SHAPE))
    assert compiled(model).verify().ok


def aside(h: Tensor) -> Tensor:
    """The work of another thread."""
    done: list[Tensor] = []
    thread = threading.Thread(target=lambda: done.append(torch.relu(h)))
    thread.start()
    thread.join()
    return done[0]


def ahead(h: Tensor) -> Tensor:
    return F.pad(h, (0, 2))[..., 2:]


UNSEEN: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "another thread": (aside, "does not depend on the sampled tensor as far as torch can see"),
    "apply_": (lambda h: h.clone().apply_(lambda v: v * 2), r"Tensor.apply_\(\)"),
    "map_": (lambda h: h.clone().map_(h, lambda a, b: a + b), r"Tensor.map_\(\)"),
    "nested tensors": (lambda h: torch.nested.nested_tensor([h[0]]).to_padded_tensor(0.0), "not while it is watched"),
    "a generator": (lambda h: h + torch.rand(h.shape, generator=torch.Generator().manual_seed(0)), "keep fixed numbers in a buffer"),
}  # fmt: skip
SEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "DLPack": lambda h: h + torch.from_dlpack(torch.utils.dlpack.to_dlpack(h)),
    "out= of another size": lambda h: torch.mul(h, 2.0, out=torch.empty(0)),
    "resize_": lambda h: torch.empty(0).resize_(h.shape).copy_(h),
    "vmap": torch.vmap(torch.sin), "forward differentiation": lambda h: torch.func.jvp(torch.sin, (h,), (torch.ones_like(h),))[1],
    "times zero": lambda h: h + 0.0 * ahead(h), "times a zero": lambda h: h + ahead(h) * torch.zeros(1),
    "clamped to one value": lambda h: h + ahead(h).clamp(0.5, 0.5),
}  # fmt: skip


@pytest.mark.parametrize("way", UNSEEN)
def test_work_that_is_not_seen(way: str) -> None:
    function, message = UNSEEN[way]
    model = Net(function)
    with pytest.raises(UnsupportedError, match=message):
        compiled(model)


@pytest.mark.parametrize("way", SEEN)
def test_work_that_is_seen(way: str) -> None:
    model = Net(SEEN[way])
    sampler = compiled(model, verify=False)
    assert sampler.verify().ok
    assert torch.equal(sampler.sample(3), compiled(model, backend="naive").sample(3))


# ---- conditioning and options ------------------------------------------------------------------------------------
def scaled(h: Tensor, c: Tensor) -> Tensor:
    return h * (c.real if c.is_complex() else c).float().reshape(-1, 1, 1)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.bool, torch.complex64]
)
def test_types_of_conditioning(dtype: torch.dtype) -> None:
    model = Net(scaled)
    sampler, one = compiled(model, torch.ones(1).to(dtype)), torch.ones(3).to(dtype)
    naive = compiled(model, torch.ones(1).to(dtype), backend="naive")
    assert torch.equal(sampler.sample(3, cond=(one,)), naive.sample(3, cond=(one,)))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint16, torch.uint32])
def test_conditioning_that_torch_cannot_compute_with(dtype: torch.dtype) -> None:
    model = Net(scaled)
    with pytest.raises(TypeError, match=f"cond\\[0\\] is {dtype}; expected floating-point"):
        compiled(model, torch.ones(1).to(dtype))


@pytest.mark.parametrize("start", [(0, 0, 1), torch.zeros(3), "0", True])
def test_starts_that_are_no_number(start: Any) -> None:
    with pytest.raises(ValueError, match="expected one number for all samples and channels"):
        compiled(Net(), start=start)


@pytest.mark.parametrize("shape", [(1, 6.9), ("1", 10), (1, None)])
def test_shapes_that_are_no_whole_numbers(shape: Any) -> None:
    with pytest.raises(ShapeError, match="expected whole numbers"):
        fastgen.compile(Net().eval(), shape, HEAD, predicts="next")


def test_a_mask_of_nan() -> None:
    sampler, given = compiled(Net()), torch.zeros(1, *SHAPE, dtype=torch.int64)
    with pytest.raises(ValueError, match="mask holds NaN"):
        sampler.sample(1, given=given, mask=torch.full((1, *SHAPE), torch.nan))


def test_temperatures_of_other_types(plain: Tensor) -> None:
    import numpy as np

    sampler = compiled(Net())
    wanted = sampler.sample(3, temperature=0.5)
    for temperature in (np.float32(0.5), np.float64(0.5), torch.tensor(0.5)):
        assert torch.equal(sampler.sample(3, temperature=temperature), wanted)  # type: ignore[arg-type]
    for temperature in (torch.ones(3), "1", None, True):
        with pytest.raises(ValueError, match="expected a finite float32 > 0"):
            sampler.sample(3, temperature=temperature)  # type: ignore[arg-type]


def test_conditioning_that_forward_does_not_take_at_call_time() -> None:
    """The oracle and log_prob say it as sampling does."""

    class Framed(Net):
        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            return super().forward(x) + c

    cond = torch.zeros(1, 4, 10)
    sampler, naive = compiled(Framed(), cond), compiled(Framed(), cond, backend="naive")
    long = torch.zeros(1, 4, 20)
    for run in (
        lambda: sampler.sample(1, cond=(long,)), lambda: naive.sample(1, cond=(long,)),
        lambda: sampler.log_prob(torch.zeros(1, 1, 10, dtype=torch.int64), cond=(long,)),
    ):  # fmt: skip
        with pytest.raises(ShapeError, match="forward does not take a sample"):
            run()


def test_samples_that_run_away_are_forwards_own() -> None:
    """Scales that grow with what was drawn: at some step they are infinite, and no plan is at fault."""

    class Grows(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            past = F.pad(x, (1, 0))[..., :-1]
            return torch.cat([past, past.abs() * 3 + 1], 1)

    head = fastgen.heads.GaussianMixture(1, params="B(n*C)*")
    with pytest.raises(FastgenError, match="are no distribution"):
        fastgen.compile(Grows(), (1, 24), head, threads=1)
