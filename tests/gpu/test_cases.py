"""Every case of tests/cases.py on the GPU: against the reference executor, against forward, and byte by byte whatever the
batch, the slot and the kind of team."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch

import fastgen
from bench.configs import DTYPES
from tests.cases import Case, cases
from tests.gpu.checks import RUNGS, check_case, on_gpu, settle, subject
from tests.oracle import by_name

pytestmark = pytest.mark.gpu
planned = functools.lru_cache(maxsize=1)(subject)  # the dtypes of a case come one after the other


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", cases(), ids=str)
def test_case(case: Case, dtype: str, record_property: Callable[[str, object], None]) -> None:
    settle(check_case(planned(case), on_gpu, DTYPES[dtype]), record_property)


@pytest.mark.parametrize("case", by_name("unet-pixelcnnpp", "wavenet-vocoder"), ids=str)
def test_the_public_call(case: Case) -> None:
    """fastgen.compile on the device, verified, and the same bytes on every rung that there is."""
    said = dict(layout=case.layout, predicts=case.predicts, start=case.start)
    model, cond = case.build(), case.cond()
    there = fastgen.compile(model, case.shape, case.head, cond, device="cuda", dtype=torch.bfloat16, **said)
    drawn = there.sample(5, seed=2)
    assert drawn.is_cuda
    assert torch.equal(there.sample(2, seed=2, first=3), drawn[3:])
    for rung in RUNGS:
        try:
            other = fastgen.compile(
                model, case.shape, case.head, cond, device="cuda", dtype=torch.bfloat16, team=rung, **said
            )
        except ValueError as error:
            assert "cannot hold" in str(error)
            continue
        assert torch.equal(other.sample(5, seed=2), drawn)
