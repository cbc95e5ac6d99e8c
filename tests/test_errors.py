"""What is refused, and how: one clear message that names the thing, and nothing half-done."""

# As users write: modules are not annotated in full.
# mypy: disable-error-code="no-any-return,no-untyped-call"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastgen
from fastgen import FastgenError, ModelChangedError, NotCausalError, ShapeError, UnsupportedError
from fastgen.heads import Bernoulli, Categorical
from tests.cases import BadCase, Case, bad_cases
from tests.conftest import Compiled
from tests.oracle import at_length, by_name, compile_case

IMAGE = by_name("masked-sequential")[0]
LABELLED = by_name("gated-cropped")[0]
AUDIO = at_length(by_name("wavenet-onehot")[0], 64)


@pytest.mark.parametrize("bad", bad_cases(), ids=str)
def test_bad_modules(bad: BadCase) -> None:
    model = bad.case.build().train()
    with pytest.raises(bad.error, match=bad.match):
        compile_case(bad.case, verify=True)
    state = torch.get_rng_state()
    try:
        fastgen.compile(model, bad.case.shape, bad.case.head, layout=bad.case.layout, predicts=bad.case.predicts)
    except FastgenError:
        assert all(m.training for m in model.modules()), "the caller's mode is restored"
    if bad.case.name != "noise-in-eval":
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("bad", bad_cases(), ids=str)
def test_messages_are_for_people(bad: BadCase) -> None:
    with pytest.raises(FastgenError) as info:
        compile_case(bad.case, verify=True)
    text = str(info.value)
    assert 20 < len(text) < 400 and "\n" not in text and "please report" not in text


# ---- compile ---------------------------------------------------------------------------------------------------------
class Plain(nn.Module):
    """A causal convolution, without fastgen's attributes."""

    def __init__(self, out: int = 5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, out, (2, 3), padding=(1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 0, 1, -1)))[:, :, :-1]


HEAD = Categorical(5, encode="unit", params="B(n*C)*")
WRONG_COMPILE: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no module": (lambda: fastgen.compile(lambda x: x, (1, 4, 4), HEAD), TypeError, "function.*torch.nn.Module"),  # type: ignore[arg-type]
    "no shape": (lambda: fastgen.compile(Plain()), TypeError, "Plain.*shape=.*head="),
    "no head": (lambda: fastgen.compile(Plain(), (1, 4, 4)), TypeError, "head="),
    "head class": (lambda: fastgen.compile(Plain(), (1, 4, 4), Bernoulli), TypeError, "head="),  # type: ignore[arg-type]
    "empty axis": (lambda: fastgen.compile(Plain(), (1, 0, 4), HEAD), ShapeError, r"\(1, 0, 4\).*at least one"),
    "four axes": (lambda: fastgen.compile(Plain(), (1, 1, 4, 4), HEAD), ShapeError, r"\(1, 1, 4, 4\).*CHW"),
    "layout": (lambda: fastgen.compile(Plain(), (1, 4, 4), HEAD, layout="WHC"), ShapeError, "'WHC'.*CHW"),
    "predicts": (lambda: fastgen.compile(Plain(), (1, 4, 4), HEAD, predicts="last"), ValueError, "'last'.*'same' or 'next'"),
    "next image": (lambda: fastgen.compile(Plain(), (1, 4, 4), HEAD, predicts="next"), ValueError, "sequences"),
    "backend": (lambda: fastgen.compile(Plain(), (1, 4, 4), HEAD, backend="gpu"), ValueError, "'gpu'.*cpu.*naive"),
    "dtype": (lambda: fastgen.compile(Plain(), (1, 4, 4), HEAD, dtype=torch.float16), ValueError, "float16.*float32.*bfloat16"),
    "threads": (lambda: fastgen.compile(Plain(), (1, 4, 4), HEAD, threads=0), ValueError, "threads=0.*>= 1"),
    "device": (lambda: fastgen.compile(Plain(), (1, 4, 4), HEAD, device="xpu"), UnsupportedError, "xpu.*cpu and cuda"),
    "device and backend": (lambda: fastgen.compile(Plain(), (1, 4, 4), HEAD, device="cpu", backend="cuda"), ValueError, "backend='cuda' does not run on device='cpu'"),
    "team": (lambda: fastgen.compile(Plain(), (1, 4, 4), HEAD, team="warp"), ValueError, "team='warp'.*cluster16"),
    "float16 on a CPU": (lambda: fastgen.compile(Plain(), (1, 4, 4), HEAD, dtype=torch.float16), ValueError, "dtype=torch.float16"),
    "encoded channels": (
        lambda: fastgen.compile(Plain(), (4, 4, 4), Categorical(5, encode="onehot")), ShapeError, "4 channels.*5.*multiple",
    ),
    "input channels": (lambda: fastgen.compile(Plain(), (3, 4, 4), HEAD), ShapeError, r"\[1, 3, 4, 4\].*expected input.*1 channels"),
    "output channels": (lambda: fastgen.compile(Plain(4), (1, 4, 4), HEAD), ShapeError, r"\[1, 4, 4, 4\].*5"),
    "order shape": (
        lambda: fastgen.compile(Plain(), (1, 4, 4), HEAD, order=torch.arange(15).view(3, 5)), ShapeError, r"order.*\(3, 5\).*\(4, 4\)",
    ),
    "order transposed": (
        lambda: fastgen.compile(Plain(), (1, 4, 5), HEAD, order=torch.arange(20).view(5, 4)), ShapeError, r"order.*\(5, 4\).*site \(4, 5\)$",
    ),
    "order flat": (
        lambda: fastgen.compile(Plain(), (1, 4, 4), HEAD, order=torch.arange(16)), ShapeError, r"order.*\(16,\).*\(4, 4\)",
    ),
    "order of values channels last": (
        lambda: fastgen.compile(Plain(), (4, 5, 2), Categorical(4, params="BnC*"), layout="HWC", order=torch.arange(40).view(4, 5, 2)),
        ShapeError, r"order.*\(4, 5, 2\).*\(4, 5\).*channels first \(2, 4, 5\)",
    ),
    "order of fractions": (
        lambda: fastgen.compile(Plain(), (1, 4, 4), HEAD, order=torch.arange(16.0).view(4, 4) + 0.4), ShapeError, "order.*float32.*integers",
    ),
    "order as a list": (
        lambda: fastgen.compile(Plain(), (1, 1, 2), HEAD, order=[[0, 1]]), TypeError, "order is a list.*tensor",  # type: ignore[arg-type]
    ),
    "order twice": (
        lambda: fastgen.compile(Plain(), (1, 4, 4), HEAD, order=torch.zeros(4, 4, dtype=torch.int64)), ShapeError, "order.*once",
    ),
    "against the order": (
        lambda: fastgen.compile(Plain(), (1, 4, 4), HEAD, order=torch.arange(15, -1, -1).view(4, 4)), NotCausalError, "conv",
    ),
    "cond missing": (lambda: fastgen.compile(LABELLED.build(), LABELLED.shape, LABELLED.head), ShapeError, "forward does not take"),
    "cond batch": (
        lambda: fastgen.compile(LABELLED.build(), LABELLED.shape, LABELLED.head, LABELLED.conds(2)), ShapeError, r"cond\[0\].*\(2,\).*batch 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG_COMPILE)
def test_wrong_compile(wrong: str) -> None:
    make, error, match = WRONG_COMPILE[wrong]
    with pytest.raises(error, match=f"(?is){match}") as info:
        make()
    assert "\n" not in str(info.value) and len(str(info.value)) < 400


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(value: float) -> None:
    model = IMAGE.build()
    name, weight = list(model.named_parameters())[2]
    weight.data.view(-1)[3] = value
    for backend in ("cpu", "reference", "naive"):
        with pytest.raises(FastgenError, match=rf"parameter {name} .*holds 1 values that are NaN or infinite"):
            compile_case(Case(IMAGE.name, lambda: model, IMAGE.shape, IMAGE.head), backend=backend)
    sampler = compile_case(IMAGE)
    sampler.model.get_parameter(name).data.view(-1)[3] = value
    with pytest.raises(ModelChangedError, match=name):
        sampler.sample(1)
    with pytest.raises(FastgenError, match=f"{name}.*NaN or infinite"):
        sampler.refresh()
    with pytest.raises(ModelChangedError, match=name):  # a failed refresh leaves no half-made sampler
        sampler.sample(1)


def test_a_buffer_of_nan_is_named() -> None:
    model = Plain()
    model.register_buffer("shift", torch.tensor([float("nan")]))
    with pytest.raises(FastgenError, match="buffer shift"):
        fastgen.compile(model, (1, 4, 4), HEAD)


def test_verification_refuses_what_depends_on_the_moment() -> None:
    class Drifts(Plain):
        """Another result at every call."""

        def forward(self, x: Tensor) -> Tensor:
            self.calls = getattr(self, "calls", 0) + 1
            return super().forward(x) * (1 + 0.01 * self.calls)

    with pytest.raises(UnsupportedError, match="random even in eval mode"):
        fastgen.compile(Drifts(), (1, 4, 4), HEAD)


@pytest.mark.parametrize("change", ["one element", "swap", "flip", "shape", "buffer", "bits"])
def test_every_change_of_weights_is_seen(change: str) -> None:
    case = by_name("masked-layernorm")[0]
    model = case.build()
    model.register_buffer("steps", torch.arange(3))
    sampler = fastgen.compile(model, case.shape, case.head)
    sampler.sample(1)
    name, weight = max(model.named_parameters(), key=lambda item: item[1].numel())
    with torch.no_grad():
        if change == "one element":
            weight.view(-1)[-1] += 1e-7 + weight.view(-1)[-1].abs() * 1e-6
        elif change == "swap":
            weight.copy_(weight.roll(1, 0))
        elif change == "flip":
            weight.copy_(weight.flip(-1))
        elif change == "bits":  # changes of sign whose sum of bits is the same
            flat = weight.view(-1)
            a, b = int((flat > 0).nonzero()[0]), int((flat < 0).nonzero()[0])
            flat[[a, b]] *= -1
        elif change == "shape":
            weight.data = weight.data[..., :-1].clone()
        else:
            name = "steps"
            model.get_buffer("steps").add_(1)
    with pytest.raises(ModelChangedError, match=f"{name} changed"):
        sampler.sample(1)


# ---- sample ----------------------------------------------------------------------------------------------------------
GIVEN = torch.zeros(2, *IMAGE.shape, dtype=torch.int64)
KEEP = torch.ones(2, *IMAGE.shape, dtype=torch.bool)
WRONG_SAMPLE: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "negative n": (dict(n=-1), ValueError, "n=-1.*>= 0"),
    "float n": (dict(n=2.0), ValueError, r"n=2\.0"),
    "negative seed": (dict(seed=-1), ValueError, "seed=-1.*2\\*\\*64"),
    "large seed": (dict(seed=2**64), ValueError, "seed=18446744073709551616"),
    "float seed": (dict(seed=0.5), TypeError, "seed.*float"),
    "negative first": (dict(first=-1), ValueError, "first=-1.*>= 0"),
    "large first": (dict(first=2**63), ValueError, "first=9223372036854775808"),
    "temperature 0": (dict(temperature=0.0), ValueError, "temperature=0.0.*> 0"),
    "temperature inf": (dict(temperature=float("inf")), ValueError, "temperature=inf"),
    "temperature nan": (dict(temperature=float("nan")), ValueError, "temperature=nan"),
    "temperature too small": (dict(temperature=1e-60), ValueError, "temperature=1e-60.*float32"),
    "temperature too large": (dict(temperature=1e60), ValueError, "temperature=1e\\+60.*float32"),
    "length of an image": (dict(length=3), ValueError, "length=3: only sequences"),
    "given alone": (dict(given=GIVEN), ValueError, "given and mask go together"),
    "mask alone": (dict(mask=KEEP), ValueError, "given and mask go together"),
    "given shape": (dict(given=GIVEN[..., 1:], mask=KEEP[..., 1:]), ShapeError, r"\(2, 1, 8, 7\).*1, 8, 8"),
    "given rank": (dict(given=torch.tensor(1), mask=KEEP), ShapeError, r"\(\).*1, 8, 8"),
    "given batch": (dict(given=GIVEN.repeat(2, 1, 1, 1), mask=KEEP.repeat(2, 1, 1, 1)), ShapeError, "given holds 4.*expected 2"),
    "mask shape": (dict(given=GIVEN, mask=KEEP[..., 1:]), ShapeError, r"mask.*\(2, 1, 8, 7\).*\(2, 1, 8, 8\)"),
    "given list": (dict(given=[0], mask=KEEP), TypeError, "given is a list"),
    "mask list": (dict(given=GIVEN, mask=[True]), TypeError, "mask is a list"),
    "class too large": (dict(given=GIVEN + 16, mask=KEEP), ValueError, "no class index from 0 to 15"),
    "class negative": (dict(given=GIVEN - 1, mask=KEEP), ValueError, "no class index from 0 to 15"),
    "class and a half": (dict(given=GIVEN + 0.5, mask=KEEP), ValueError, "no class index from 0 to 15"),
    "given nan": (dict(given=GIVEN + float("nan"), mask=KEEP), ValueError, "NaN"),
    "cond": (dict(cond=(torch.tensor([1]),)), ShapeError, "cond has 1 inputs.*with 0"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG_SAMPLE)
@pytest.mark.parametrize("stream", [False, True])
def test_wrong_sample(wrong: str, stream: bool, compiled: Compiled) -> None:
    options, error, match = WRONG_SAMPLE[wrong]
    options = {"n": 2, **options}
    sampler = compiled(IMAGE)
    with pytest.raises(error, match=f"(?s){match}") as info:
        (sampler.stream if stream else sampler.sample)(options.pop("n"), **options)
    assert "\n" not in str(info.value) and len(str(info.value)) < 300


def test_what_is_not_known_may_be_anything(compiled: Compiled) -> None:
    given = torch.full((2, *IMAGE.shape), float("nan"))
    given[:, :, 0], mask = 3, torch.zeros(2, *IMAGE.shape, dtype=torch.bool)
    mask[:, :, 0] = True
    assert bool((compiled(IMAGE).sample(2, given=given, mask=mask)[:, :, 0] == 3).all())


LABELS, MAP = LABELLED.conds(2)
WRONG_COND: dict[str, tuple[Any, str]] = {
    "too few": ((LABELS,), "cond has 1 inputs.*with 2"),
    "too many": ((LABELS, MAP, MAP), "cond has 3 inputs.*with 2"),
    "dtype": ((LABELS.float(), MAP), r"cond\[0\] is torch.float32 \(2,\).*torch.int64"),
    "rank": ((LABELS[:, None], MAP), r"cond\[0\] is torch.int64 \(2, 1\)"),
    "batch": ((torch.cat([LABELS, LABELS]), MAP), r"cond\[0\] has shape \(4,\).*\[2"),
    "size": ((LABELS, MAP[..., 1:]), r"cond\[1\] has shape \(2, 3, 7, 5\).*\[2, 3, 7, 6\]"),
    "no tensor": ((3, MAP), r"cond\[0\] is int"),
}


@pytest.mark.parametrize("wrong", WRONG_COND)
def test_wrong_conditioning(wrong: str, compiled: Compiled) -> None:
    cond, match = WRONG_COND[wrong]
    sampler = compiled(LABELLED)
    x = sampler.sample(2, cond=(LABELS, MAP))
    for use in (lambda: sampler.sample(2, cond=cond), lambda: sampler.log_prob(x, cond)):
        with pytest.raises(ShapeError, match=match):
            use()


def test_conditioning_of_the_wrong_length() -> None:
    """Frames that do not make up the sequence; the sampler goes on."""
    case = by_name("wavenet-repeated-frames")[0]
    sampler = compile_case(case)
    with pytest.raises((ShapeError, UnsupportedError)):
        sampler.sample(1, cond=(torch.zeros(1, 4, 3),))
    assert sampler.sample(1).shape == (1, 1, 48)


WRONG_LENGTH: dict[str, tuple[Any, type[Exception], str]] = {
    "zero": (0, ValueError, "length=0.*>= 1"),
    "negative": (-5, ValueError, "length=-5.*>= 1"),
    "float": (70.0, ValueError, r"length=70\.0"),
}


@pytest.mark.parametrize("wrong", WRONG_LENGTH)
def test_wrong_length(wrong: str, compiled: Compiled) -> None:
    length, error, match = WRONG_LENGTH[wrong]
    with pytest.raises(error, match=match):
        compiled(AUDIO).sample(1, length=length)


def test_a_short_plan_says_what_would_serve(compiled: Compiled) -> None:
    case = by_name("wavenet-onehot")[0]
    for length in (20, 100):
        with pytest.raises(UnsupportedError, match=rf"length {length}.*48 sites only.*fewer than 64"):
            compiled(case).sample(1, length=length)
    with pytest.raises(ValueError, match="only sequences"):
        compiled(by_name("masked-mlp")[0]).sample(1, length=20)


@pytest.mark.parametrize(
    "x", [torch.zeros(2, 1, 8, 7), torch.zeros(1, 8, 8), torch.zeros(2, 2, 8, 8)], ids=lambda x: str(tuple(x.shape))
)
def test_log_prob_of_the_wrong_shape(x: Tensor, compiled: Compiled) -> None:
    with pytest.raises(ShapeError, match=r"samples have shape .*expected \[n, 1, 8, 8\]"):
        compiled(IMAGE).log_prob(x.long())


NO_SAMPLES: dict[str, tuple[str, Any, str]] = {  # case, what is done to a sample, message
    "class too large": ("masked-sequential", lambda x: x + 16, r"\d+, which is no class index from 0 to 15"),
    "a class as forward takes it": ("masked-sequential", lambda x: x / 15, "no class index"),
    "grey instead of 0 and 1": (
        "masked-inplace-binary",
        lambda x: x * 0 + 0.7,
        "0.7, which is no class index from 0 to 1",
    ),
    "levels as 0 to 255": ("order-bottom-up", lambda x: (x + 1) * 127.5, "none of the 256 levels on .*levels=None"),
    "levels in [0, 1]": ("order-bottom-up", lambda x: (x + 1) / 2, "none of the 256 levels"),
    "between levels": ("order-bottom-up", lambda x: x * 0 + 0.1, "0.1, which is none of the 256 levels"),
    "not a number": ("order-bottom-up", lambda x: x * float("nan"), "NaN or infinity"),
    "infinite": ("rgb-gaussian", lambda x: x / 0, "NaN or infinity"),
}


@pytest.mark.parametrize("wrong", NO_SAMPLES)
def test_every_door_refuses_what_is_no_sample(wrong: str, compiled: Compiled) -> None:
    name, change, match = NO_SAMPLES[wrong]
    sampler = compiled(by_name(name)[0])
    right = sampler.sample(1, seed=3)
    wrong_values = change(right)
    for door in (
        lambda: sampler.log_prob(wrong_values), lambda: sampler.bits_per_dim(wrong_values),
        lambda: sampler.sample(1, given=wrong_values, mask=torch.ones_like(right)),
        lambda: list(sampler.stream(1, given=wrong_values, mask=torch.ones_like(right))),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            door()
    assert sampler.log_prob(right).isfinite()


def test_images_scaled_in_float32_are_on_the_grid(compiled: Compiled) -> None:
    sampler = compiled(by_name("order-bottom-up")[0])
    for scaled in (
        torch.arange(30) / 127.5 - 1,
        torch.arange(226, 256) / 255 * 2 - 1,
        (torch.arange(30) / 255 - 0.5) / 0.5,
    ):
        assert sampler.log_prob(scaled.view(1, 1, 6, 5)).isfinite()


def test_order_and_length_do_not_go_together() -> None:
    class Reversed(nn.Module):
        """A sequence drawn from its end: every output reads what comes after it."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(1, 4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(F.pad(x, (-1, 2)))

    head = Categorical(4, encode="unit", params="B(n*C)*")
    sampler = fastgen.compile(Reversed(), (1, 70), head, order=torch.arange(69, -1, -1))
    assert sampler.sample(2).shape == (2, 1, 70)
    with pytest.raises(ValueError, match="order.*70 sites only"):
        sampler.sample(2, length=80)


@pytest.mark.parametrize("n", [0, -1, 1.5])
def test_verify_takes_a_number(n: Any, compiled: Compiled) -> None:
    with pytest.raises(ValueError, match="n="):
        compiled(IMAGE).verify(n)
