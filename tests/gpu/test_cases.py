"""Every case of tests/cases.py on the GPU: against the reference executor, against forward, and byte by byte whatever the
batch, the slot and the kind of team."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch

import fastgen
from bench.configs import DTYPES
from bench.gpu.calls import SMOKE
from tests.cases import Case, cases
from tests.gpu.checks import HELD_OFF, check_case, on_gpu, settle, subject
from tests.oracle import by_name

pytestmark = pytest.mark.gpu
planned = functools.lru_cache(maxsize=1)(subject)  # the dtypes of a case come one after the other


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", cases(), ids=str)
def test_case(
    case: Case, dtype: str, rungs: tuple[str, ...], first: str, record_property: Callable[[str, object], None]
) -> None:
    settle(check_case(planned(case), on_gpu, DTYPES[dtype], rungs, first), record_property)


@pytest.mark.parametrize("case", by_name(*SMOKE), ids=str)
def test_the_public_call(case: Case, rungs: tuple[str, ...], first: str) -> None:
    """fastgen.compile on the device, verified, and the same bytes on every rung that there is."""
    model, cond = case.build(), case.cond()

    def compiled(team: str) -> fastgen.Sampler:
        return fastgen.compile(
            model, case.shape, case.head, cond, layout=case.layout, predicts=case.predicts, start=case.start,
            device="cuda", dtype=torch.bfloat16, team=team,
        )  # fmt: skip

    there = compiled(first)
    drawn = there.sample(5, seed=2)
    assert drawn.is_cuda
    assert torch.equal(there.sample(2, seed=2, first=3), drawn[3:])
    for rung in rungs:
        try:
            other = compiled(rung)
        except ValueError as error:
            assert HELD_OFF in str(error)
            continue
        assert torch.equal(other.sample(5, seed=2), drawn)
