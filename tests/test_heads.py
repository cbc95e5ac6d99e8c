"""Heads: likelihoods sum to one, draws follow them, layouts and encodings hold, executors agree."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastgen.errors import ShapeError
from fastgen.heads import LAYOUTS, Bernoulli, Categorical, GaussianMixture, Head, LogisticMixture
from fastgen.rng import uniforms

# Head and value channels a step; the same list serves every property below.
HEADS: list[tuple[Head, int]] = [
    (LogisticMixture(3, levels=16), 1),
    (LogisticMixture(2, levels=4), 3),
    (LogisticMixture(4, levels=None), 1),
    (LogisticMixture(5, levels=256), 3),
    (LogisticMixture(1, levels=None), 3),
    (Categorical(7), 1),
    (Categorical(300), 1),
    (Bernoulli(), 1),
    (GaussianMixture(1), 1),
    (GaussianMixture(3), 1),
    (GaussianMixture(2, value_range=(-0.75, 1.5)), 1),
]
each_head = pytest.mark.parametrize(("head", "channels"), HEADS, ids=lambda x: str(x).split(", params")[0])
SETTINGS = settings(max_examples=30, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def random_params(head: Head, channels: int, n: int, seed: int, spread: float = 1.0) -> Tensor:
    """Parameters such as a trained network gives; more extreme with `spread`. Float32 [n, P]."""
    x = torch.randn(n, head.num_params(channels), generator=torch.Generator().manual_seed(seed))
    if isinstance(head, LogisticMixture | GaussianMixture):
        kinds = [1.5, 0.7, 0.9, 1.0]  # logits, means, log-scales, coefficients
        m, three = head.n_mix, channels == 3
        pattern = [0] * m + ([1] * m + [2] * m + [3] * m) * 3 if three else [0] * m + [1] * m + [2] * m
        pattern = pattern[-x.shape[1] :]  # a single Gaussian has no logit
        scale = torch.tensor([kinds[k] * spread for k in pattern])
        return x * scale - torch.tensor([2.0 if k == 2 else 0.0 for k in pattern])
    return x * 2 * spread


def noise(head: Head, channels: int, n: int, seed: int = 0) -> Tensor:
    return uniforms(seed, torch.arange(n), 0, head.num_uniforms(channels))


def grid(levels: int, channels: int) -> Tensor:
    """All values of a site: [levels ** channels, channels]."""
    level = torch.linspace(-1, 1, levels, dtype=torch.float64)
    return torch.cartesian_prod(*[level] * channels).reshape(-1, channels)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


# ---- likelihood ------------------------------------------------------------------------------------------
def slow_log_prob(params: list[float], x: list[float], m: int, levels: int, floor: float) -> float:
    """Salimans et al. 2017, eq. 1 to 3, one site, term by term; nothing shared with the code under test."""
    logits, rest, width = params[:m], params[m:], 1 / (levels - 1)
    top = max(logits)
    weight = [math.exp(z - top) for z in logits]
    total = 0.0
    for i in range(m):
        p = weight[i] / sum(weight)
        for c in range(len(x)):
            block = rest[c * 3 * m : (c + 1) * 3 * m] if len(x) == 3 else rest
            mean, scale = block[i], math.exp(max(block[m + i], floor))
            a, b, g = (math.tanh(rest[k * 3 * m + 2 * m + i]) for k in range(3)) if c else (0, 0, 0)
            mean += a * x[0] if c == 1 else b * x[0] + g * x[1] if c == 2 else 0
            upper = 1.0 if x[c] > 0.999 else sigmoid((x[c] + width - mean) / scale)
            lower = 0.0 if x[c] < -0.999 else sigmoid((x[c] - width - mean) / scale)
            p *= upper - lower
        total += p
    return math.log(total)


@pytest.mark.parametrize("channels", [1, 3])
def test_logistic_mixture_is_that_of_the_paper(channels: int) -> None:
    head = LogisticMixture(4, levels=32)
    params = random_params(head, channels, 40, 1).double()
    value = head.draw(params, noise(head, channels, 40)).double()
    value[:10] = grid(32, 1).reshape(-1)[torch.randint(32, (10, channels), generator=torch.manual_seed(0))]
    value[:2] = torch.tensor([[-1.0], [1.0]]).expand(2, channels)
    expected = [slow_log_prob(p, x, 4, 32, -7.0) for p, x in zip(params.tolist(), value.tolist(), strict=True)]
    torch.testing.assert_close(head.log_prob(params, value), torch.tensor(expected).double(), rtol=1e-7, atol=0)


@SETTINGS
@given(
    seed=seeds,
    spread=st.sampled_from([0.3, 1.0, 4.0, 20.0]),
    case=st.sampled_from([(256, 1), (2, 1), (5, 3)]),
)
def test_grid_probabilities_sum_to_one(seed: int, spread: float, case: tuple[int, int]) -> None:
    levels, channels = case
    head = LogisticMixture(3, levels=levels)
    params = random_params(head, channels, 1, seed, spread).double()
    total = head.log_prob(params, grid(levels, channels)).exp().sum().item()
    assert total == pytest.approx(1, abs=1e-9)


def test_grid_probabilities_sum_to_one_at_every_scale() -> None:
    log_scales = torch.linspace(-12, 15, 400, dtype=torch.float64)[:, None]
    params = torch.cat([torch.zeros_like(log_scales), 0.3 + torch.zeros_like(log_scales), log_scales], 1)
    total = LogisticMixture(1).log_prob(params[:, None], grid(256, 1)).exp().sum(1)
    torch.testing.assert_close(total, torch.ones(400, dtype=torch.float64), rtol=0, atol=1e-11)


@SETTINGS
@given(seed=seeds, spread=st.sampled_from([0.3, 1.0, 20.0]), head=st.sampled_from([Categorical(9), Bernoulli()]))
def test_class_probabilities_sum_to_one(seed: int, spread: float, head: Head) -> None:
    params = random_params(head, 1, 1, seed, spread).double()
    total = head.log_prob(params, torch.arange(head.n)[:, None]).exp().sum().item()
    assert total == pytest.approx(1, abs=1e-12)


@SETTINGS
@given(seed=seeds, head=st.sampled_from([LogisticMixture(3, None), GaussianMixture(3), GaussianMixture(1)]))
def test_densities_integrate_to_one(seed: int, head: Head) -> None:
    params = random_params(head, 1, 1, seed).double()
    means, log_scales = params[0, -2 * head.n :].split(head.n)
    step = torch.linspace(-6, 6, 4001, dtype=torch.float64).sinh() / 5  # dense in the middle, out to 40 scales
    x = torch.cat([m + s.exp() * step for m, s in zip(means, log_scales, strict=True)]).sort()[0]
    total = torch.trapezoid(head.log_prob(params, x[:, None]).exp(), x).item()
    assert total == pytest.approx(1, abs=1e-4)


@each_head
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_float32_likelihood_is_accurate_with_finite_gradients(head: Head, channels: int, spread: float) -> None:
    params = random_params(head, channels, 300, 2, spread)
    value = head.draw(random_params(head, channels, 300, 3), noise(head, channels, 300))
    params.requires_grad_()
    log_prob = head.log_prob(params, value)
    assert log_prob.shape == (300,)
    assert log_prob.dtype == torch.float32
    (gradient,) = torch.autograd.grad(log_prob.sum(), params)
    assert gradient.isfinite().all()
    assert (gradient != 0).any()
    exact = params.detach().double().requires_grad_()
    expected = head.log_prob(exact, value.double())
    torch.testing.assert_close(log_prob.double(), expected, rtol=1e-4, atol=1e-4)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), exact)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=2e-3, atol=2e-3)


# ---- draws -----------------------------------------------------------------------------------------------
def chi_square_too_large(cells: Tensor, p: Tensor) -> bool:
    """Whether counts of draws fall outside six standard deviations; rare cells are pooled."""
    n = int(cells.numel())
    counts = torch.bincount(cells, minlength=len(p)).double()
    rare = p * n < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([p[~rare], p[rare].sum()[None]]) * n
    degrees = len(counts) - 1
    return bool(((counts - expected) ** 2 / expected.clamp(min=1)).sum() > degrees + 6 * (2 * degrees) ** 0.5)


@pytest.mark.parametrize(
    ("head", "channels", "values"),
    [
        (Categorical(6), 1, torch.arange(6.0)[:, None]),
        (Bernoulli(), 1, torch.arange(2.0)[:, None]),
        (LogisticMixture(3, levels=9), 1, grid(9, 1)),
        (LogisticMixture(3, levels=4), 3, grid(4, 3)),
    ],
    ids=["categorical", "bernoulli", "grey", "rgb"],
)
def test_discrete_draws_follow_the_likelihood(head: Head, channels: int, values: Tensor) -> None:
    params = random_params(head, channels, 1, 5)
    drawn = head.draw(params, noise(head, channels, 40_000, seed=9))
    distance = (drawn[:, None].double() - values).abs().amax(-1)
    assert distance.amin(1).max() < 1e-6
    p = head.log_prob(params.double(), values.double()).exp()
    assert not chi_square_too_large(distance.argmin(1), p)
    assert chi_square_too_large(distance.argmin(1), p.roll(1))  # the test can tell


@pytest.mark.parametrize(
    ("head", "cdf"),
    [
        (GaussianMixture(3), torch.special.ndtr),
        (GaussianMixture(1), torch.special.ndtr),
        (LogisticMixture(3, levels=None), torch.sigmoid),
    ],
    ids=["gaussian-mixture", "gaussian", "logistic"],
)
def test_continuous_draws_follow_the_distribution(head: Head, cdf: Callable[[Tensor], Tensor]) -> None:
    params = random_params(head, 1, 1, 6).double()[0]
    means, log_scales = params[-2 * head.n :].split(head.n)
    weights = params[: head.n].softmax(0) if head.n > 1 else torch.ones(1)
    n = 40_000
    x = head.draw(params, noise(head, 1, n, seed=4)).double()[:, 0].sort()[0]
    inside = (x > -1) & (x < 1) if head.clip else torch.ones_like(x, dtype=torch.bool)
    assert inside.sum() > n / 2
    expected = (cdf((x[:, None] - means) / log_scales.exp()) * weights).sum(1)
    distance = (expected - (torch.arange(n) + 0.5) / n).abs()[inside].max()
    assert distance < 2.0 / n**0.5  # Kolmogorov-Smirnov: p = 0.0007


@each_head
def test_draws_depend_on_their_own_row_alone(head: Head, channels: int) -> None:
    params, u = random_params(head, channels, 50, 7), noise(head, channels, 50)
    drawn = head.draw(params, u)
    assert drawn.shape == (50, channels)
    assert drawn.dtype == torch.float32
    assert torch.equal(drawn, torch.cat([head.draw(p, v)[None] for p, v in zip(params, u, strict=True)]))
    assert torch.equal(drawn, head.draw(params.view(5, 10, -1), u.view(5, 10, -1)).view(50, -1))
    assert torch.equal(head.draw(params[:1], u), head.draw(params[:1].expand(50, -1), u))
    assert not torch.equal(drawn, head.draw(params, noise(head, channels, 50, seed=1)))


@each_head
def test_temperature_divides_logits_and_multiplies_scales(head: Head, channels: int) -> None:
    params, u = random_params(head, channels, 200, 8), noise(head, channels, 200)
    scaled = params.clone()
    if head.discrete:
        scaled /= 2
    else:
        m = head.n
        scaled[:, : 0 if params.shape[1] == 2 * m else m] /= 2
        for at in [2 * m, 5 * m, 8 * m] if channels == 3 else [params.shape[1] - m]:
            scaled[:, at : at + m] += math.log(2)
    warm = head.draw(params, u, 2.0)
    difference = (warm - head.draw(scaled, u)).abs()
    assert (difference < 1e-5).all(-1).float().mean() > 0.98  # a level may round the other way
    assert not torch.equal(warm, head.draw(params, u))


@pytest.mark.parametrize("head", [Categorical(7), Bernoulli()], ids=["categorical", "bernoulli"])
def test_classes_are_the_mode_when_cold_and_uniform_when_hot(head: Head) -> None:
    params, u = random_params(head, 1, 200, 8), noise(head, 1, 200)
    mode = params.argmax(-1) if head.n > 2 else params[:, 0] > 0
    assert torch.equal(head.draw(params, u, 1e-4)[:, 0], mode.float())
    hot = (u[:, 0] * head.n).floor() if head.n > 2 else (u[:, 0] < 0.5).float()
    assert torch.equal(head.draw(params, u, 1e6)[:, 0], hot)


def test_cold_mixtures_give_the_mean_of_the_likeliest_component() -> None:
    head = LogisticMixture(3)
    params = random_params(head, 3, 100, 9)
    red = params[:, 3:6].gather(1, params[:, :3].argmax(-1, keepdim=True)).clamp(-1, 1)
    drawn = head.draw(params, noise(head, 3, 100), 1e-4)
    levels = (drawn + 1) * 127.5
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
    assert ((drawn[:, :1] - red).abs() < 0.5 / 127.5 + 1e-3).all()
    gaussian = GaussianMixture(2, value_range=(-0.5, 0.25))
    params = random_params(gaussian, 1, 100, 9)
    mean = params[:, 2:4].gather(1, params[:, :2].argmax(-1, keepdim=True))
    drawn = gaussian.draw(params, noise(gaussian, 1, 100), 1e-4)
    torch.testing.assert_close(drawn, mean.clamp(-0.5, 0.25), rtol=0, atol=1e-3)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf, 1e-60])
def test_bad_temperatures(temperature: float) -> None:
    head = Categorical(3)
    with pytest.raises(ValueError, match=r"temperature=.*> 0"):
        head.draw(torch.zeros(1, 3), torch.full((1, 1), 0.5), temperature)


def test_extreme_logits() -> None:
    head = Categorical(4)
    u = noise(head, 1, 500)
    masked = torch.tensor([-math.inf, 0.0, -math.inf, 0.0])
    assert set(head.draw(masked, u).unique().tolist()) == {1.0, 3.0}
    assert head.draw(torch.tensor([0.0, 1e30, 0, 0]), u).eq(1).all()


NO_DISTRIBUTION = [
    (Categorical(3), [0.0, math.nan, 0.0]), (Categorical(3), [math.nan, 0.0, 0.0]), (Categorical(3), [-math.inf] * 3),
    (Categorical(3), [0.0, math.inf, 0.0]), (Bernoulli(), [math.nan]), (GaussianMixture(1), [math.nan, 0.0]),
    (GaussianMixture(1), [math.inf, 0.0]), (GaussianMixture(1), [0.0, math.nan]), (GaussianMixture(1), [0.0, 1e4]),
    (GaussianMixture(2, value_range=(-1, 1)), [0.0, math.nan, 0, 0, 0, 0]),
    (GaussianMixture(2, value_range=(-1, 1)), [0.0, 0.0, math.inf, math.inf, 0, 0]),
    (LogisticMixture(1), [0.0, math.nan, 0.0]), (LogisticMixture(1), [0.0, -math.inf, 0.0]),
    (LogisticMixture(1), [0.0, 0.0, math.nan]), (LogisticMixture(2), [math.nan, 0, 0, 0, 0, 0]),
    (LogisticMixture(1), [0.0, 0, 0, 0, 0, 0, math.nan, 0, 0, 0]),
]  # fmt: skip


@pytest.mark.parametrize(("head", "params"), NO_DISTRIBUTION)
def test_what_is_no_distribution_draws_nan(head: Head, params: list[float]) -> None:
    """In torch and in C++; but what is known stays, and an infinite logit of a coin is certainty."""
    native = pytest.importorskip("fastgen._native", reason="the extension is not built")
    theta = torch.tensor(params).expand(500, -1)
    channels = 3 if len(params) == 10 else 1
    u = noise(head, channels, 500)
    drawn = head.draw(theta, u)
    assert drawn[:, 0].isnan().any() or channels == 3
    assert drawn.isnan().any() and not drawn.isinf().any()
    made = native.draw(record(native, head, channels), theta.contiguous().numpy(), u.numpy())
    torch.testing.assert_close(torch.from_numpy(np.asarray(made)), drawn, equal_nan=True)
    known = torch.zeros(500, channels)
    assert head.draw(theta, u, known=known).eq(0).all()
    assert head.distance(theta, theta).isinf().all() or not theta.isnan().any()


def test_certain_coins() -> None:
    u = noise(Bernoulli(), 1, 50)
    assert Bernoulli().draw(torch.tensor([math.inf]), u).eq(1).all()
    assert Bernoulli().draw(torch.tensor([-math.inf]), u).eq(0).all()


# ---- how far parameters are apart --------------------------------------------------------------------------------
def test_distance_of_classes_is_total_variation() -> None:
    head, a, b = Categorical(3), torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.1, 1.0, 1.9])
    p, q = a.double().softmax(-1), b.double().softmax(-1)
    assert float(head.distance(a, b)) == pytest.approx(float((p - q).abs().sum() / 2))
    u = (torch.arange(200_000) + 0.5)[:, None] / 200_000
    differ = (head.draw(a.expand(len(u), 3), u) != head.draw(b.expand(len(u), 3), u)).double().mean()
    assert float(head.mismatch(a, b)) == pytest.approx(float(differ), abs=2e-5)
    masked = torch.tensor([-1e9, 0.0, 1.0])
    assert float(head.distance(masked, masked + torch.tensor([1e3, 0.0, 0.0]))) == 0
    assert float(head.distance(masked, masked + torch.tensor([0.0, 0.5, 0.0]))) > 0.05, "one huge logit hides nothing"
    coins = Bernoulli()
    assert float(coins.distance(torch.tensor([0.0]), torch.tensor([1.0]))) == pytest.approx(
        1 / (1 + math.exp(-1)) - 0.5
    )


@pytest.mark.parametrize("head", [GaussianMixture(2), LogisticMixture(2), LogisticMixture(2, levels=None)])
def test_distance_bounds_the_total_variation_of_mixtures(head: Head) -> None:
    """Against the densities (or probabilities) themselves, on a grid; an error below a floor or beyond a tanh is none."""
    torch.manual_seed(1)
    a = torch.randn(20, 6).double() * torch.tensor([1, 1, 0.3, 0.3, 0.5, 0.5]) - torch.tensor([0, 0, 0, 0, 2.5, 2.5])
    b = a + 0.02 * torch.randn(20, 6)
    if head.grid_levels:
        x = torch.linspace(-1, 1, 256).double()[:, None, None]
        p, q = (head.log_prob(t, x.expand(256, 20, 1)).exp() for t in (a, b))
        variation = (p - q).abs().sum(0) / 2
    else:
        x = torch.linspace(-6, 6, 24_001).double()[:, None, None]
        p, q = (head.log_prob(t, x.expand(24_001, 20, 1)).exp() for t in (a, b))
        variation = (p - q).abs().sum(0) * (12 / 24_000) / 2
    assert (head.distance(a, b) >= variation - 1e-6).all()
    floor = torch.tensor([0.0, 0, 0, 0, -20, -30])
    assert float(head.distance(floor, floor + torch.tensor([0.0, 0, 0, 0, 5, 9]))) == 0
    sharp = torch.tensor([0.0, 0, 0, 0, -7, -7])
    assert float(head.distance(sharp, sharp + torch.tensor([0.0, 0, 1e-3, 1e-3, 0, 0]))) > 1, "of a scale, not of one"


def test_ties_excuse_nothing_impossible() -> None:
    inf, u = math.inf, 0.5 + 2.0**-24

    def excused(head: Head, params: list[float], other: list[float], u: list[float], value: list[float]) -> bool:
        return bool(head.near_tie(*map(torch.tensor, (params, other, u, value))))

    assert not excused(Categorical(3), [0.0, -inf, 0.0], [0.0, -inf, 0.0], [u], [1.0])
    assert excused(Categorical(3), [0.0, -inf, 0.0], [1e-6, -inf, 0.0], [u], [0.0])
    assert not excused(LogisticMixture(1), [0.0, 0.0, -50.0], [0.0, 0.0, -20.0], [0.5, 0.9], [-1.0])
    assert not excused(GaussianMixture(1), [0.0, -50.0], [0.0, -20.0], [0.5, 0.9], [1e6])
    saturated, more = (
        [0.0, 0.9, -7.0, 40.0, 0.0, -7.0, 0.0, 0.0, -7.0, 0.0],
        [0.0, 0.9, -7.0, 60.0, 0.0, -7.0, 0.0, 0.0, -7.0, 0.0],
    )
    assert not excused(LogisticMixture(1), saturated, more, [0.5] * 4, [0.9, -1.0, 0.0])


def test_known_values_are_kept_and_seen_by_later_channels() -> None:
    head = LogisticMixture(2, levels=None)
    params, u = random_params(head, 3, 60, 11), noise(head, 3, 60)
    drawn = head.draw(params, u)
    nothing = torch.full_like(drawn, math.nan)
    assert torch.equal(head.draw(params, u, known=nothing), drawn)
    assert torch.equal(head.draw(params, u, known=drawn.where(torch.arange(3) == 1, nothing)), drawn)
    red = nothing.clone()
    red[:, 0] = drawn[:, 0].neg()
    moved = head.draw(params, u, known=red)
    assert torch.equal(moved[:, 0], red[:, 0])
    assert (moved[:, 1] != drawn[:, 1]).float().mean() > 0.5
    classes = Categorical(5)
    known = torch.tensor([[2.0], [math.nan]]).expand(2, 1)
    assert classes.draw(torch.tensor([0.0, 0, 0, 0, 99]), torch.full((2, 1), 0.5), known=known).tolist() == [
        [2],
        [4],
    ]


# ---- layouts ---------------------------------------------------------------------------------------------
# Canonical [B, H, W, C, n] -> forward's output, written out.
PRODUCE: dict[str, Callable[[Tensor], Tensor]] = {
    "B(n*C)*": lambda x: x.permute(0, 4, 3, 1, 2).flatten(1, 2),
    "B(C*n)*": lambda x: x.permute(0, 3, 4, 1, 2).flatten(1, 2),
    "BnC*": lambda x: x.permute(0, 4, 3, 1, 2),
    "BCn*": lambda x: x.permute(0, 3, 4, 1, 2),
    "BC*n": lambda x: x.permute(0, 3, 1, 2, 4),
    "B*n": lambda x: x.squeeze(3),
    "B*(n*C)": lambda x: x.transpose(3, 4).flatten(3),
    "B*(C*n)": lambda x: x.flatten(3),
    "B*nC": lambda x: x.transpose(3, 4),
    "B*Cn": lambda x: x,
    "B(*n)": lambda x: x.flatten(1),
    "B(n*)": lambda x: x.flatten(1, 3).transpose(1, 2).flatten(1),
    "B*": lambda x: x.flatten(3).squeeze(3),
}


def fits(layout: str, channels: int, n: int) -> bool:
    return (channels == 1 or "C" in layout) and (n == 1 or "n" in layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("head", "channels"), [
    (Categorical(5), 1), (Categorical(5), 3), (Bernoulli(), 1), (Bernoulli(), 3), (GaussianMixture(2), 2),
    (LogisticMixture(2), 1), (LogisticMixture(1), 3),
])  # fmt: skip
def test_arrange_inverts_every_layout(head: Head, channels: int, layout: str) -> None:
    phases, n = 1 if head.at_once else channels, head.num_params(channels)
    head = head.with_layout(layout)
    if not fits(layout, phases, n):
        with pytest.raises(ShapeError, match="has no axis"):
            head.parameters_of(torch.zeros(2, n, 4, 7), channels, (4, 7))
        return
    canonical = torch.arange(2 * 4 * 7 * phases * n).view(2, 4, 7, phases, n)
    out = PRODUCE[layout](canonical)
    assert torch.equal(head.parameters_of(out, channels, (4, 7)), canonical)
    assert torch.equal(head.parameters_of(out.contiguous(), channels, (4, 7)), canonical)
    with pytest.raises(ShapeError, match="expected") as error:
        head.parameters_of(torch.zeros(2, 1 + out.shape[1], *out.shape[2:]), channels, (4, 7))
    assert f"[B, {str(list(out.shape[1:]))[1:-1]}]" in str(error.value)
    line = canonical[:, :1]
    assert torch.equal(
        head.parameters_of(PRODUCE[layout](line).reshape(*_without(out, line)), channels, (7,)), line[:, 0]
    )


def _without(out: Tensor, line: Tensor) -> tuple[int, ...]:
    """The shape of an output over sites (4, 7) for the sites (7,)."""
    if 4 in out.shape:
        at = next(i for i in range(1, out.dim()) if out.shape[i : i + 2] == (4, 7))
        return out.shape[:at] + out.shape[at + 1 :]
    return (2, line[0].numel())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_auto_takes_what_has_one_reading(layout: str) -> None:
    for head, channels in [(Categorical(5), 1), (Bernoulli(), 1), (Categorical(5), 2)]:
        n = head.num_params(channels)
        if not fits(layout, channels, n):
            continue
        canonical = torch.arange(2 * 4 * 7 * channels * n).view(2, 4, 7, channels, n)
        out = PRODUCE[layout](canonical)
        two_readings = "(n*" in layout or "(C*" in layout or "(*" in layout
        if n > 1 and two_readings and (channels > 1 or "C" not in layout):
            with pytest.raises(ShapeError, match=r"2 ways; choose one of .*params="):
                head.parameters_of(out, channels, (4, 7))
            continue
        assert torch.equal(head.parameters_of(out, channels, (4, 7)), canonical)
        chosen = head.with_layout(head.layout(out.shape, channels, (4, 7)))
        assert torch.equal(chosen.parameters_of(out, channels, (4, 7)), canonical)


def test_auto_refuses_a_square_that_reads_both_ways() -> None:
    with pytest.raises(ShapeError, match=r"\[2, 7, 7, 7\].*params='B\(n\*C\)\*', params='B\*n'"):
        Categorical(7).parameters_of(torch.zeros(2, 7, 7, 7), 1, (7, 7))


def test_a_single_gaussian_may_come_with_its_logit() -> None:
    head = GaussianMixture(1)
    out = torch.randn(2, 3, 5)
    assert torch.equal(head.parameters_of(out, 1, (5,))[..., 0, :], out[:, 1:].transpose(1, 2))
    assert torch.equal(head.parameters_of(out[:, 1:], 1, (5,))[..., 0, :], out[:, 1:].transpose(1, 2))


# ---- encodings -------------------------------------------------------------------------------------------
def test_encodings() -> None:
    classes = torch.arange(5)[:, None]
    assert Categorical(5).encode(classes).tolist() == classes.tolist()
    assert torch.equal(Categorical(5, "onehot").encode(classes), torch.eye(5))
    assert Categorical(5, "unit").encode(classes)[:, 0].tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert Categorical(5, "symmetric").encode(classes)[:, 0].tolist() == [-1, -0.5, 0, 0.5, 1]
    assert Bernoulli().encode(classes[:2])[:, 0].tolist() == [0, 1]
    assert Bernoulli("symmetric").encode(classes[:2])[:, 0].tolist() == [-1, 1]
    assert LogisticMixture(2).encode(torch.tensor([[0.5, -1, 1]])).tolist() == [[0.5, -1, 1]]
    table = torch.randn(5, 3)
    head = Categorical(5, table)
    pairs = torch.tensor([[[4.0, 0.0]], [[1.0, 1.0]]])  # two value channels a site
    assert head.encode(pairs).shape == (2, 1, 6)
    assert torch.equal(head.encode(pairs)[0, 0], torch.cat([table[4], table[0]]))
    assert (head.enc, head.indices, head.integer_input) == (3, True, False)
    table.zero_()
    assert head.encode(pairs).abs().sum() > 0  # a copy
    for wrong in (-1.0, 5.0):
        with pytest.raises(ValueError, match="expected 0 to 4"):
            head.encode(torch.tensor([wrong]))
        with pytest.raises(ValueError, match="expected 0 to 4"):
            head.log_prob(torch.zeros(5), torch.tensor([wrong]))


def test_mu_law_expands_what_the_companding_law_compresses() -> None:
    x = Categorical(256, "mulaw").encode(torch.arange(256)[:, None]).double()[:, 0]
    y = x.sign() * torch.log1p(255 * x.abs()) / math.log(256)
    assert torch.equal(((y + 1) / 2 * 255).round(), torch.arange(256).double())
    torch.testing.assert_close(y, 2 * torch.arange(256).double() / 255 - 1, rtol=0, atol=1e-5)
    assert torch.equal(x, -x.flip(0))
    assert (x[0], x[-1]) == (-1, 1)
    assert x[128].item() == pytest.approx((256 ** (1 / 255) - 1) / 255, rel=1e-6)


# ---- native ----------------------------------------------------------------------------------------------
def record(native: ModuleType, head: Head, channels: int) -> Any:
    h = np.zeros(1, native.dtypes()["Head"])
    phases = 1 if head.at_once else channels
    fields = dict(kind=head.kind, channels=channels, phases=phases, n=head.n, levels=head.grid_levels)
    fields |= dict(params=head.num_params(channels), enc=head.enc, table=-1, floor_log_scale=head.floor)
    low, high = head.clip or (-math.inf, math.inf)
    for key, value in (fields | dict(clip_lo=low, clip_hi=high)).items():
        h[key] = value
    return h


@each_head
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("spread", [1.0, 8.0])
def test_native_draws_are_the_same(head: Head, channels: int, temperature: float, spread: float) -> None:
    native = pytest.importorskip("fastgen._native", reason="the extension is not built")
    n = 4000
    params, u = random_params(head, channels, n, 12, spread), noise(head, channels, n, seed=3)
    ours = head.draw(params, u, temperature)
    drawn = native.draw(record(native, head, channels), params.numpy(), u.numpy(), temperature)
    theirs = torch.from_numpy(drawn)
    if head.discrete or head.grid_levels:
        # Between float32 parameters and values both compute in float64, so only a uniform within 1e-9 of a
        # boundary
        # may be decided otherwise.
        around = [head.draw(params, u.double() + d, temperature) for d in (-1e-9, 1e-9)]
        explained = (theirs == around[0]).all(-1) | (theirs == around[1]).all(-1)
        assert ((theirs == ours).all(-1) | explained).all()
    else:
        spacing = torch.from_numpy(np.spacing(ours.abs().numpy()))
        assert ((theirs - ours).abs() <= spacing).all()
    assert (theirs == ours).all(-1).float().mean() > 0.999


# ---- near ties -------------------------------------------------------------------------------------------
@each_head
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draws_from_slightly_wrong_parameters_are_near_ties(head: Head, channels: int, temperature: float) -> None:
    n, error = 20_000 if head.n < 100 else 3000, 1e-3
    params, u = random_params(head, channels, n, 13), noise(head, channels, n, seed=6)
    other = params + error * (2 * torch.rand(params.shape, generator=torch.Generator().manual_seed(1)) - 1)
    value = head.draw(other, u, temperature)
    differ = (value != head.draw(params, u, temperature)).any(-1)
    assert differ.any()
    assert head.near_tie(params, other, u, value, temperature).all()
    # Without an error to explain them, the same values are wrong.
    unexplained = head.near_tie(params, params, u, value, temperature)[differ]
    assert unexplained.float().mean() < 0.15  # their error is 1e-3, that of rounding about 1e-6


@each_head
def test_wrong_draws_are_not_near_ties(head: Head, channels: int) -> None:
    n = 2000
    params, u = random_params(head, channels, n, 14), noise(head, channels, n, seed=7)
    other = params + 1e-5
    right = head.draw(params, u)
    wrong = head.draw(params, noise(head, channels, n, seed=8))  # the wrong noise
    differ = (wrong - right).abs().amax(-1) > 0.02
    assert differ.any()
    assert not head.near_tie(params, other, u, wrong)[differ].any()
    assert head.near_tie(params, other, u, right).all()
    if head.discrete:
        for absurd in (-1.0, head.n, 0.5, math.nan):
            assert not head.near_tie(params, other, u, torch.full_like(right, absurd)).any()
        return
    step = 2 / (head.grid_levels - 1) if head.grid_levels else 1e-3  # one level, or a hundred times the error
    moved = torch.where(right > 1 - step, right - step, right + step)
    for channel in range(channels):
        value = torch.where(torch.arange(channels) == channel, moved, right)
        assert head.near_tie(params, other, u, value).float().mean() < 0.01  # there are true ties between levels


def test_near_tie_measures_the_distance_to_the_boundary() -> None:
    head = Categorical(3)
    params = torch.zeros(3)
    other = torch.tensor([1e-3, 0.0, 0.0])  # moves the first boundary from 1/3 by 2/9 * 1e-3
    second, third = torch.tensor([1.0]), torch.tensor([2.0])

    def tied(u: float, value: Tensor) -> bool:
        return bool(head.near_tie(params, other, torch.tensor([u]), value))

    assert tied(1 / 3 - 2.2e-4, second)
    assert not tied(1 / 3 - 2.3e-4, second)
    assert not tied(1 / 3 - 2.2e-4, third)  # not a neighbour of that boundary
    assert tied(0.5, second)
    grid_head = LogisticMixture(1, levels=3)  # values -1, 0, 1
    logistic = torch.tensor([0.0, 0.499, -3.0])
    moved = torch.tensor([0.0, 0.501, -3.0])
    half, one, low = torch.tensor([0.5, 0.5]), torch.tensor([1.0]), torch.tensor([-1.0])
    assert grid_head.near_tie(logistic, moved, half, one)
    assert not grid_head.near_tie(logistic, torch.tensor([0.0, 0.4995, -3.0]), half, one)
    assert not grid_head.near_tie(logistic, moved, half, low)


@pytest.mark.parametrize(
    ("head", "channels"),
    [(GaussianMixture(2), 1), (LogisticMixture(2, None), 1), (LogisticMixture(2), 3)],
    ids=["gaussian", "audio", "rgb"],
)
def test_a_draw_from_the_wrong_component_is_not_a_near_tie(head: Head, channels: int) -> None:
    params, u = random_params(head, channels, 200, 16), noise(head, channels, 200)
    first, second = params.clone(), params.clone()
    first[:, 0] += 50
    second[:, 1] += 50
    value = head.draw(second, u)
    assert head.near_tie(second, second, u, value).all()
    differ = (value - head.draw(first, u)).abs().amax(-1) > 0.01
    assert differ.sum() > 100
    assert not head.near_tie(first, first + 1e-5, u, value)[differ].any()
    assert head.near_tie(first, second, u, value).all()  # logits that wrong explain it


def test_near_tie_of_nan_is_false() -> None:
    for head, channels in HEADS:
        params, u = random_params(head, channels, 3, 15), noise(head, channels, 3)
        value = head.draw(params, u)
        assert not head.near_tie(params, params * math.nan, u, value).any()


# ---- objects ---------------------------------------------------------------------------------------------
def test_heads_are_immutable_values() -> None:
    table = torch.randn(4, 2)
    made: list[Callable[[], Head]] = [
        lambda: LogisticMixture(3),
        lambda: LogisticMixture(3, levels=None),
        lambda: GaussianMixture(3),
        lambda: GaussianMixture(3, value_range=(-1, 1)),
        lambda: Categorical(4),
        lambda: Categorical(4, "onehot"),
        lambda: Categorical(4, table),
        lambda: Categorical(4, params="B*n"),
        lambda: Bernoulli(),
        lambda: Bernoulli("symmetric"),
    ]
    assert len({make() for make in made}) == len(made)
    for make in made:
        assert make() == make()
        assert hash(make()) == hash(make())
        assert make().with_layout("BCn*") != make()
        with pytest.raises(dataclasses.FrozenInstanceError):
            make().params = "B*n"
    assert (Categorical(4).integer_input, Bernoulli("symmetric").indices, Bernoulli().indices) == (
        True,
        True,
        False,
    )


def zero_draw(params: list[int], u: list[int]) -> Tensor:
    return Categorical(4).draw(torch.zeros(params), torch.zeros(u))


def zero_log_prob(params: int, value: int) -> Tensor:
    return LogisticMixture(2).log_prob(torch.zeros(params), torch.zeros(value))


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: LogisticMixture(0), ValueError, "n_mix=0"),
        (lambda: LogisticMixture(1, levels=1), ValueError, "levels=1"),
        (lambda: LogisticMixture(1, log_scale_floor=-math.inf), ValueError, "log_scale_floor=-inf"),
        (lambda: LogisticMixture(1, params="nchw"), ValueError, r"params='nchw'.*'B\*n'"),
        (lambda: LogisticMixture(1).num_params(2), ShapeError, "1 or 3 value channels.*given 2"),
        (lambda: GaussianMixture(0), ValueError, "n_mix=0"),
        (lambda: GaussianMixture(1, log_scale_floor=math.nan), ValueError, "log_scale_floor=nan"),
        (lambda: GaussianMixture(1, value_range=(1, 1)), ValueError, "value_range"),
        (lambda: Categorical(1), ValueError, "n=1"),
        (lambda: Categorical(4, "mu"), ValueError, "encode='mu'.*'mulaw'"),
        (lambda: Categorical(4, torch.zeros(3, 2)), ShapeError, r"\[3, 2\].*\[4, enc\]"),
        (lambda: Bernoulli("onehot"), ValueError, "encode='onehot'"),
        (lambda: Bernoulli().with_layout("x"), ValueError, "params='x'"),
        (lambda: zero_draw([2, 5], [2, 1]), ShapeError, "5 per step; expected 4"),
        (lambda: zero_draw([2, 4], [2, 2]), ShapeError, r"\[2, 2\]; expected 1"),
        (lambda: zero_draw([2, 4], [3, 1]), ShapeError, r"\[2, 4\].*\[3, 1\]"),
        (lambda: zero_log_prob(20, 1), ShapeError, r"\[1\]; expected 3"),
        (lambda: zero_log_prob(7, 1), ShapeError, "7 per step.*6.*20"),
    ],
)  # fmt: skip
def test_bad_arguments(make: Callable[[], object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make()
