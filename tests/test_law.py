"""The law: stepping equals the teacher-forced forward, for every case and every executor, at every length."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgen.backends.cpu import CpuExecutor
from fastgen.backends.reference import ReferenceExecutor
from fastgen.backends.request import Request
from fastgen.heads import GaussianMixture
from fastgen.native import native
from tests.cases import Case, cases
from tests.conftest import Compiled
from tests.oracle import (
    assert_draws_follow,
    assert_same_samples,
    at_length,
    by_name,
    compile_case,
    noise_of,
    parameters,
    run_given,
    sample_of,
    slow_sample,
    values_of,
)

MAKE_FLOAT32 = (
    "masked-parametrized",
    "tied-onehot",
    "shifted-inplace",
)  # in forward, whatever the weights are

EXECUTORS: dict[str, dict[str, Any]] = {
    "reference": dict(backend="reference"),
    "cpu": dict(backend="cpu"),
    "cpu-bf16": dict(backend="cpu", dtype=torch.bfloat16),
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}  # of the largest parameter; weights rounded, in the second
executors = pytest.mark.parametrize("executor", EXECUTORS)
every_case = pytest.mark.parametrize("case", cases(), ids=str)
A_FEW = by_name(
    "rgb-unrolled", "unet-pixelcnnpp", "gated-cropped", "wavenet-vocoder", "masked-table", "masked-layernorm"
)
SEQUENCES = by_name(
    "wavenet-onehot",
    "wavenet-embedded",
    "wavenet-batch-folded",
    "wavenet-channels-last",
    "stereo",
    "wavenet-one-row",
)


def some_values(case: Case, n: int) -> Tensor:
    return case.random_values(n, torch.Generator().manual_seed(11))


@functools.cache
def the_slow_sample(case: Case) -> tuple[Tensor, Tensor]:
    return slow_sample(case, 3, 21)


def error_of(params: Tensor, truth: Tensor) -> float:
    """Largest difference, in units of the largest parameter."""
    return float((params - truth).abs().max()) / max(1.0, float(truth.abs().max()))


# ---- verify ------------------------------------------------------------------------------------------------------
@executors
@every_case
def test_verify(case: Case, executor: str, compiled: Compiled) -> None:
    sampler = compiled(case, **EXECUTORS[executor])
    report = sampler.verify(n=2)
    assert report.ok, str(report)
    assert report.samples == 2 and report.draws == 2 * case.steps
    assert report.draws_equal + report.near_ties == report.draws
    assert str(report).startswith("exact")


@pytest.mark.parametrize("case", by_name("masked-sequential", "shifted-inplace", "wavenet-onehot"), ids=str)
def test_verify_sees_a_wrong_weight(case: Case) -> None:
    sampler = compile_case(case, backend="reference")
    weights = sampler.programs(None).weights
    weights[weights.nonzero()[0][-1]] += 0.05
    report = sampler.verify()
    assert not report.ok and report.max_abs_error > 1e-4
    assert str(report).startswith("NOT EXACT")


def test_verify_sees_a_wrong_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = by_name("masked-sequential")
    sampler = compile_case(case)
    run = sampler.executor.run

    def off_by_one(request: Request) -> tuple[Tensor, Tensor | None]:
        values, params = run(request)
        values[:, -1] = (values[:, -1] + 1) % case.head.n  # the last one, so that no parameter changes
        return values, params

    monkeypatch.setattr(sampler.executor, "run", off_by_one)
    report = sampler.verify()
    assert not report.ok and report.max_abs_error < 1e-4 and report.draws - report.draws_equal == 2


# ---- stepping through given values -------------------------------------------------------------------------------
@executors
@every_case
def test_stepping_equals_forward(case: Case, executor: str, compiled: Compiled) -> None:
    sampler = compiled(case, **EXECUTORS[executor])
    values, cond = some_values(case, 3), case.conds(3)
    truth = parameters(case, case.build().eval(), values, cond)
    assert error_of(run_given(sampler, values, cond), truth) < TOLERANCE[sampler.dtype]


@pytest.mark.parametrize("case", [c for c in cases() if c.name not in MAKE_FLOAT32], ids=str)
def test_stepping_in_float64(case: Case, compiled: Compiled) -> None:
    """With arithmetic in float64 only the rounding of the result, and of what was folded beforehand, is left."""
    sampler = compiled(case, backend="reference")
    exact = ReferenceExecutor(sampler.programs, sampler.executor.conditioning, dtype=torch.float64)  # type: ignore[attr-defined]
    values, cond = some_values(case, 2), case.conds(2)
    params = run_given(sampler, values, cond, exact)
    doubled = tuple(c.double() if isinstance(c, Tensor) and c.is_floating_point() else c for c in cond)
    truth = parameters(case, case.build().double().eval(), values, doubled)
    assert error_of(params.double(), truth) < 5e-7


@every_case
def test_bfloat16_is_a_rounding_of_weights_alone(case: Case, compiled: Compiled) -> None:
    """Both executors, given the same rounded weights, agree as closely as in float32."""
    ours = compiled(case, backend="cpu", dtype=torch.bfloat16)
    spec = compiled(case, backend="reference", dtype=torch.bfloat16)
    values, cond = some_values(case, 2), case.conds(2)
    truth = run_given(spec, values, cond)
    assert error_of(run_given(ours, values, cond), truth) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("isa", native().isas())
@pytest.mark.parametrize("case", A_FEW, ids=str)
def test_every_instruction_set(case: Case, isa: str, compiled: Compiled) -> None:
    sampler = compiled(case)
    values, cond = some_values(case, 2), case.conds(2)
    truth = parameters(case, case.build().eval(), values, cond)
    for dtype in (torch.float32, torch.bfloat16):
        conditioning = sampler.conditioning
        executor = CpuExecutor(sampler.programs, conditioning, dtype, 1, isa)
        assert executor.engine(None).isa == isa
        assert error_of(run_given(sampler, values, cond, executor), truth) < TOLERANCE[dtype]


# ---- sampling ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", ["naive", "reference", "cpu"])
@every_case
def test_samples_are_those_of_the_slow_loop(case: Case, backend: str, compiled: Compiled) -> None:
    sampler = compiled(case, backend=backend)
    x = sampler.sample(3, seed=21, cond=case.conds(3))
    slow, params = the_slow_sample(case)
    assert x.shape == sample_of(case, slow).shape and x.dtype == sample_of(case, slow).dtype
    assert_same_samples(case, values_of(case, x), slow, params, 21)


@every_case
def test_samples_differ_and_fill_their_range(case: Case, compiled: Compiled) -> None:
    values = values_of(case, compiled(case).sample(8, seed=5, cond=case.conds(8)))
    assert values.isfinite().all()
    assert len(torch.unique(values.flatten(1), dim=0)) >= 6  # two mostly black images may be equal
    low, high = (0, case.head.n - 1) if case.head.discrete else (-1.0, 1.0)
    if not isinstance(case.head, GaussianMixture):  # normal distributions have no range
        assert low <= values.min() < values.max() <= high


# ---- sequences of any length -------------------------------------------------------------------------------------
@pytest.mark.parametrize("compiled_at", [64, 100, 131])
@pytest.mark.parametrize("case", SEQUENCES, ids=str)
def test_any_length(case: Case, compiled_at: int, compiled: Compiled) -> None:
    sampler = compiled(at_length(case, compiled_at))
    for length in (1, 3, 8, 21, 33, 63, 65, 99, 130, 147):
        here = at_length(case, length)
        ours = values_of(here, sampler.sample(2, seed=length, length=length))
        truth = parameters(here, here.build().eval(), ours, here.conds(2))
        assert_draws_follow(here, ours, truth, noise_of(here, 2, length))


@pytest.mark.parametrize("case", SEQUENCES, ids=str)
def test_a_length_is_what_a_fresh_compile_gives(case: Case, compiled: Compiled) -> None:
    sampler = compiled(at_length(case, 96))
    for length in (5, 40, 70, 160):
        here = at_length(case, length)
        fresh = compiled(here).sample(3, seed=2)
        slow_like = values_of(here, fresh)
        ours = values_of(here, sampler.sample(3, seed=2, length=length))
        torch.testing.assert_close(ours, slow_like, atol=2e-4, rtol=2e-4)


FRAMES = {"wavenet-repeated-frames": 6, "wavenet-transposed-frames": 4, "wavenet-vocoder": 8, "wavenet-unfolded": 1}


def conditions(case: Case, n: int, length: int) -> tuple[Any, ...]:
    """Conditioning of a case for n samples of `length` sites: frames of its hop are made as long."""
    hop, out = FRAMES[case.name], []
    for c in case.conds(n):
        if c.dim() == 3:
            generator = torch.Generator().manual_seed(length)
            c = torch.randn(c.shape[0], c.shape[1], length // hop, generator=generator)
        out.append(c)
    return tuple(out)


@pytest.mark.parametrize("case", by_name(*FRAMES), ids=str)
def test_any_length_with_conditioning(case: Case) -> None:
    """Frames follow the length; a label does not."""
    at = replace(at_length(case, 96), conds=lambda n: conditions(case, n, 96))
    sampler = compile_case(at)
    for length in (24, 72, 96, 120, 240):
        here, cond = at_length(case, length), conditions(case, 2, length)
        ours = values_of(here, sampler.sample(2, seed=length, length=length, cond=cond))
        truth = parameters(here, here.build().eval(), ours, cond)
        again = here.head.draw(truth, noise_of(here, 2, length))
        torch.testing.assert_close(ours.reshape(again.shape), again, atol=2e-4, rtol=2e-4)
        nats = sampler.log_prob(sampler.sample(2, seed=length, length=length, cond=cond), cond)
        assert nats.shape == (2,) and nats.isfinite().all()
