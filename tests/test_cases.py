"""The cases are what they claim to be, judged by forward alone: causal in the declared order, alive,
repeatable.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastgen.errors import NotCausalError
from tests.cases import BadCase, Case, assert_causal, bad_cases, cases

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("case", cases(), ids=str)
def test_causal_in_the_declared_order(case: Case) -> None:
    assert_causal(case)


@pytest.mark.parametrize("case", cases(), ids=str)
def test_alive_and_repeatable(case: Case) -> None:
    values = case.random_values(3, torch.Generator().manual_seed(5))
    first, again = (case.parameters(case.build().eval(), values) for _ in range(2))
    assert torch.equal(first, again), "two builds differ"
    assert first.isfinite().all()
    spread = first.std(dim=(0, 1))  # of each parameter over samples and steps
    assert 0.1 < spread.max() < 6 and first.abs().max() < 50, f"spread {spread}"
    assert case.to_input(values).shape == (3, *case.shape)


@pytest.mark.parametrize("case", [c for c in cases() if c.cond()], ids=str)
def test_every_condition_matters_and_is_per_sample(case: Case) -> None:
    model, n = case.build().eval(), 3
    values = case.random_values(1, torch.Generator().manual_seed(6))
    conds = case.conds(n)
    singles = [tuple(c[i : i + 1] for c in conds) for i in range(n)]
    for mine, example in zip(singles[0], case.cond(), strict=True):
        assert torch.equal(mine, example), "a sample's conditioning depends on n"
    alone = [case.parameters(model, values, cond) for cond in singles]
    with torch.inference_mode():
        x = case.to_input(values.expand(n, *values.shape[1:]))
        together = case.head.parameters_of(model(x, *conds), case.channels, case.sites)
    torch.testing.assert_close(together.reshape(n, case.steps, -1), torch.cat(alone), atol=1e-5, rtol=1e-5)
    for k in range(len(conds)):
        mixed = tuple(singles[1 if j == k else 0][j] for j in range(len(conds)))
        assert (case.parameters(model, values, mixed) - alone[0]).abs().max() > 1e-2, f"input {k} does not matter"


def test_names_are_unique() -> None:
    names = [str(c) for c in [*cases(), *bad_cases()]]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("bad", [b for b in bad_cases() if b.error is NotCausalError], ids=str)
def test_bad_cases_do_read_the_future(bad: BadCase) -> None:
    with pytest.raises(AssertionError, match="not drawn yet"):
        assert_causal(bad.case)


@pytest.mark.parametrize("bad", [b for b in bad_cases() if b.case.name != "wrong-input-channels"], ids=str)
def test_bad_cases_do_run(bad: BadCase) -> None:
    """What is wrong with them is what they say, not a crash of their own."""
    x = bad.case.to_input(bad.case.random_values(2, torch.Generator().manual_seed(8)))
    with torch.inference_mode():
        out = bad.case.build().eval()(x)
    assert out.shape[0] == 2 and bool(out.isfinite().all()) == (bad.case.name != "nan-weights")


def test_batch_mixing_is_real() -> None:
    bad = next(b for b in bad_cases() if b.case.name == "mixes-batch")
    values = bad.case.random_values(2, torch.Generator().manual_seed(7))
    model = bad.case.build()
    alone: Tensor = bad.case.parameters(model, values[:1])
    assert not torch.allclose(alone, bad.case.parameters(model, values)[:1], atol=1e-3)
