"""The proof cannot be vacuous: planted errors are found, whatever else is large, rare, sharp or in low precision."""

# As users write: modules are not annotated in full.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastgen
from fastgen import Sampler, UnsupportedError
from fastgen.backends.request import Request
from fastgen.errors import ShapeError
from fastgen.heads import Bernoulli, Categorical, GaussianMixture, Head, LogisticMixture
from fastgen.pretrained import from_pretrained
from tests.oracle import by_name, compile_case

T = 32


class Delayed(nn.Module):
    """A causal layer, and something in front of the output."""

    def __init__(self, outputs: int, finish: Callable[[Tensor], Tensor] = lambda y: y) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.finish = nn.Conv1d(1, outputs, 2), finish

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(self.conv(F.pad(x, (2, 0))[..., :-1]))


def sampler_of(model: nn.Module, head: Head, **options: Any) -> Sampler:
    return fastgen.compile(model, (1, T), head, threads=1, **{"verify": False, **options})


def planted(sampler: Sampler, error: Callable[[Tensor], Tensor]) -> Any:
    """The report where the executor's parameters are off by `error`."""
    run = sampler.executor.run

    def wrong(request: Request) -> tuple[Tensor, Tensor | None]:
        values, params = run(request)
        assert params is not None
        return values, params + error(params)

    sampler.executor.run = wrong  # type: ignore[method-assign]
    try:
        return sampler.verify()
    finally:
        sampler.executor.run = run  # type: ignore[method-assign]


def one_class(k: int, value: float) -> Callable[[Tensor], Tensor]:
    """Makes a class (nearly) impossible, as masks do."""
    return lambda y: torch.cat([y[:, :k], torch.full_like(y[:, :1], value), y[:, k + 1 :]], 1)


@pytest.mark.parametrize("value", [-1e4, -1e9, -3e38, -math.inf])
@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_a_huge_logit_hides_nothing(value: float, size: float) -> None:
    """Every other logit is off by `size`."""
    sampler = sampler_of(Delayed(7, one_class(3, value)), Categorical(7, encode="symmetric", params="B(n*C)*"))
    assert sampler.verify().ok
    off = torch.zeros(7)
    off[::2] = size
    report = planted(sampler, lambda p: off)
    assert not report.ok and report.distance > 0.01 * size, str(report)


@pytest.mark.parametrize(
    ("log_scale", "size"), [(-14.0, 1e-4), (-7.0, 6.3e-5), (0.0, 1e-3)], ids=["sharp", "floor", "wide"]
)
@pytest.mark.parametrize(
    "head", [GaussianMixture(1, log_scale_floor=-14), LogisticMixture(1, levels=None, log_scale_floor=-14)]
)
def test_a_mean_is_measured_by_its_scale(head: Head, log_scale: float, size: float) -> None:
    """Means are off by `size`; rounding of float32 is not held against a sharp distribution."""

    def finish(y: Tensor) -> Tensor:
        scale = torch.full_like(y, log_scale)
        return torch.cat([y, scale] if isinstance(head, GaussianMixture) else [y, y, scale], 1)

    sampler = sampler_of(Delayed(1, finish), head)
    assert sampler.verify().ok, str(sampler.verify())
    mean = torch.tensor([size, 0.0]) if isinstance(head, GaussianMixture) else torch.tensor([0.0, size, 0.0])
    report = planted(sampler, lambda p: mean)
    assert not report.ok and report.distance > 0.9 * size * math.exp(-log_scale), str(report)


def test_large_parameters_round_by_more() -> None:
    """Logits that are differences of large numbers: what forward's own rounding explains is no fault."""
    model = Delayed(5, lambda y: (y * 3e4 + 1e4) * 1e-2 - (y.flip(1) * 3e4 + 1e4) * 1e-2)
    report = sampler_of(model, Categorical(5, encode="symmetric", params="B(n*C)*")).verify()
    assert report.ok and report.rounding > 1e-6


def test_more_ties_than_are_likely() -> None:
    """Values that only an accumulation of excuses explains: each is within an error of a boundary, all are too many."""
    head = Categorical(2, encode="unit", params="B(n*C)*")
    sampler = sampler_of(Delayed(2, lambda y: y * 0), head)
    run = sampler.executor.run

    def lying(request: Request) -> tuple[Tensor, Tensor | None]:
        drawn, theta = run(request)
        assert theta is not None
        theta[..., 0] += 9e-6  # within the tolerance of a parameter
        return 1 - drawn, theta

    sampler.executor.run = lying  # type: ignore[method-assign]
    assert not sampler.verify().ok


# ---- low precision -----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def shipped() -> nn.Module:
    return from_pretrained("mnist-pixelcnnpp-small").eval()


def taps_of(model: nn.Module) -> list[str]:
    return [n for n, p in model.named_parameters() if p.dim() == 4 and p.shape[-1] * p.shape[-2] > 1][2::5][:6]


@pytest.mark.parametrize("k", range(6))
def test_a_lost_tap_is_found_in_bfloat16(k: int, shipped: nn.Module) -> None:
    """A sampler planned from a model in which one kernel position of one layer is zero, judged by the true model."""
    damaged = copy.deepcopy(shipped)
    with torch.no_grad():
        dict(damaged.named_parameters())[taps_of(shipped)[k]][:, :, 0, 0] = 0
    sampler = fastgen.compile(damaged, dtype=torch.bfloat16, verify=False)
    if k == 0:
        assert sampler.verify(1).ok, str(sampler.verify(1))
    sampler.planned.on_cpu = shipped
    assert not sampler.verify(1).ok


@pytest.mark.parametrize("case", by_name("masked-sequential", "wavenet-onehot"), ids=str)
def test_a_wrong_weight_in_low_precision_alone(case: Any) -> None:
    """The plan is right, the packed weights are not: the second step finds it."""
    sampler = compile_case(case, dtype=torch.bfloat16, backend="reference")
    assert sampler.verify().ok
    weights = sampler.programs(None, torch.bfloat16).weights
    k = weights.nonzero()[0][-1]
    weights[k] ^= 0x8000  # its sign
    assert not sampler.verify().ok


# ---- conditioning ------------------------------------------------------------------------------------------------
class Labelled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.labels, self.out = nn.Conv1d(1, 8, 2), nn.Embedding(3, 8), nn.Conv1d(8, 4, 1)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return self.out(torch.tanh(self.conv(F.pad(x, (2, 0))[..., :-1]) + self.labels(label)[:, :, None]))


@pytest.mark.parametrize("label", [0, 1, 2])
def test_another_conditioning_is_part_of_it(label: int) -> None:
    """Conditioning frozen at the example's value, whichever it is: the label after or before it is not the same."""
    sampler = sampler_of(Labelled(), Categorical(4, encode="unit", params="B(n*C)*"), cond=(torch.tensor([label]),))
    assert sampler.verify().ok
    sources = sampler.conditioning.sources
    frozen = (torch.full((2,), label),)
    sampler.conditioning.sources = lambda program, request: sources(program, replace(request, cond=frozen))  # type: ignore[method-assign]
    assert not sampler.verify().ok


def test_given_values_are_part_of_it() -> None:
    sampler = sampler_of(Delayed(4), Categorical(4, encode="unit", params="B(n*C)*"))
    run = sampler.executor.run

    def forgetful(request: Request) -> tuple[Tensor, Tensor | None]:
        """Draws what is given."""
        return run(replace(request, given=None, mask=None))

    sampler.executor.run = forgetful  # type: ignore[method-assign]
    assert not sampler.verify().ok
    asked: list[Request] = []
    sampler.executor.run = lambda request: (asked.append(request), run(request))[1]  # type: ignore[method-assign]
    assert sampler.verify().ok
    assert asked[0].mask is not None and asked[0].mask[-1].any() and not asked[0].mask[0].any()


# ---- contracts ---------------------------------------------------------------------------------------------------
FIRST = torch.arange(T)
PROBABILITIES: dict[str, tuple[int, Callable[[Tensor], Tensor], Head]] = {
    "sigmoid": (1, torch.sigmoid, Bernoulli()),
    "softmax": (4, lambda y: F.softmax(4 * y, 1), Categorical(4, encode="unit", params="B(n*C)*")),
    "normalised": (
        4,
        lambda y: y.exp() / y.exp().sum(1, keepdim=True),
        Categorical(4, encode="unit", params="B(n*C)*"),
    ),
    "half a tanh": (1, lambda y: 0.5 * torch.tanh(y) + 0.5, Bernoulli()),
    "less than one": (1, lambda y: 1 - torch.sigmoid(y), Bernoulli()),
    "a border of its own": (1, lambda y: F.pad(torch.sigmoid(y)[..., 1:], (1, 0), value=0.5), Bernoulli()),
    "masked and filled": (1, lambda y: torch.sigmoid(y) * (FIRST != 0) + 0.5 * (FIRST == 0), Bernoulli()),
    "a mean": (1, lambda y: torch.stack([torch.sigmoid(y), torch.sigmoid(2 * y)]).mean(0), Bernoulli()),
    "a mixture": (1, lambda y: 0.3 * torch.sigmoid(y) + 0.7 * torch.sigmoid(-y), Bernoulli()),
    "from a limit on": (1, lambda y: torch.sigmoid(y).clamp(0.1, 0.9), Bernoulli()),
    "hard": (1, F.hardsigmoid, Bernoulli()),
    "smoothed": (4, lambda y: F.softmax(4 * y, 1) + 1e-3, Categorical(4, encode="unit", params="B(n*C)*")),
    "limited": (4, lambda y: F.softmax(4 * y, 1).clamp(min=0.05), Categorical(4, encode="unit", params="B(n*C)*")),
    "nothing at first": (
        4,
        lambda y: F.softmax(4 * y, 1) * (FIRST != 0),
        Categorical(4, encode="unit", params="B(n*C)*"),
    ),
}


@pytest.mark.parametrize("name", PROBABILITIES)
def test_probabilities_are_no_logits(name: str) -> None:
    outputs, finish, head = PROBABILITIES[name]
    with pytest.raises(UnsupportedError, match="forward returns probabilities.*takes logits.*torch.log"):
        sampler_of(Delayed(outputs, finish), head, verify=True)


@pytest.mark.parametrize(
    ("outputs", "finish", "head"),
    [
        (4, lambda y: F.log_softmax(y, 1), Categorical(4, encode="unit", params="B(n*C)*")),
        (1, lambda y: torch.logit(torch.sigmoid(y)), Bernoulli()),
        (1, lambda y: 0.01 * y + 0.5, Bernoulli()),
        (1, lambda y: torch.logit(torch.sigmoid(0.5 + 0.1 * y)), Bernoulli()),
        (1, lambda y: 0.1 * F.softplus(y), Bernoulli()),
        (1, lambda y: torch.relu(0.1 * y), Bernoulli()),
        (1, lambda y: 0.0 * y + 0.5, Bernoulli()),
        (2, lambda y: 0.3 + 0.0 * torch.sigmoid(y) * y, Categorical(2, encode="unit", params="B(n*C)*")),
        (4, lambda y: 0.5 + 0.01 * y, Categorical(4, encode="unit", params="B(n*C)*")),
    ],
    ids=[
        "log-softmax",
        "logit",
        "small logits",
        "logit of a middle",
        "softplus",
        "relu",
        "a fair coin",
        "no weights",
        "small",
    ],
)
def test_logits_are_taken(outputs: int, finish: Callable[[Tensor], Tensor], head: Head) -> None:
    assert sampler_of(Delayed(outputs, finish), head, verify=True).verify().ok


# ---- reasons -----------------------------------------------------------------------------------------------------
def test_nan_is_named_by_its_layer() -> None:
    class Logarithm(nn.Module):
        def forward(self, y: Tensor) -> Tensor:
            return torch.log(y - 0.9)

    with pytest.raises(UnsupportedError, match="forward gives NaN, from layer finish on"):
        sampler_of(Delayed(4, Logarithm()), Categorical(4, encode="unit", params="B(n*C)*"), verify=True)


def test_a_module_that_keeps_its_first_batch() -> None:
    class Keeps(Delayed):
        def __init__(self) -> None:
            super().__init__(4)
            self.ones: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.ones is None:
                self.ones = torch.ones(len(x), 1, x.shape[-1])
            return torch.cat([super().forward(x)[:, :3], self.ones], 1)

    model = Keeps()
    with pytest.raises(ShapeError, match="it takes one sample but not 2 at once: does it keep something of the size"):
        sampler_of(model, Categorical(4, encode="unit", params="B(n*C)*"), verify=True)
    assert model.ones is None


@pytest.mark.parametrize("bad", [math.nan, -math.inf, math.inf])
@pytest.mark.parametrize("backend", ["cpu", "reference", "naive"])
def test_parameters_that_are_no_distribution(bad: float, backend: str) -> None:
    """After one class was drawn: the step is named, the last class is not drawn in silence; streams say it, too."""

    def finish(y: Tensor) -> Tensor:
        return torch.where(y[:, :1] > 0.3, torch.full_like(y, bad), y)

    model = Delayed(3, finish)
    with torch.no_grad():
        model.conv.weight[:] = 0
        model.conv.weight[:, :, 1] = 0.5
        model.conv.bias[:] = 0  # type: ignore[index]
    sampler = fastgen.compile(
        model, (1, T), Categorical(3, encode="unit", params="B(n*C)*"), verify=False, backend=backend,
        **({"threads": 1} if backend == "cpu" else {}),
    )  # fmt: skip
    with pytest.raises(
        fastgen.FastgenError, match=r"sample \d+: the parameters of step \d+ \(row 0, column \d+\) are no distr"
    ):
        sampler.sample(8)
    with pytest.raises(fastgen.FastgenError, match=r"sample \d+: the parameters of step \d+ .* are no distribution"):
        list(sampler.stream(8))


def test_rounding_is_measured_of_every_sample() -> None:
    """The example's conditioning gives a sharp distribution, the other one that a proof is made with a wide one."""

    class Sharp(Delayed):
        def __init__(self) -> None:
            super().__init__(1)
            self.scales = torch.tensor([0.0, -12.0, 0.0, 0.0])

        def forward(self, x: Tensor, label: Tensor) -> Tensor:
            mean = 5 + super().forward(x)
            return torch.cat([mean, self.scales[label][:, None, None].expand_as(mean)], 1)

    head = GaussianMixture(1, log_scale_floor=-14)
    sampler = sampler_of(Sharp(), head, cond=(torch.tensor([1]),), verify=True)
    report = sampler.verify()
    assert report.ok and report.rounding < 1e-6
    assert not planted(sampler, lambda p: torch.tensor([1e-4, 0.0])).ok
