"""What tests on a GPU leave alone: a call on a GPU (bench/gpu) names the kinds of team that hang there."""

from __future__ import annotations

import pytest

from tests.gpu.checks import RUNGS


@pytest.fixture
def rungs(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """The kinds of team to check."""
    left = request.config.getoption("--leave-out", "").split(",")
    return tuple(rung for rung in RUNGS if rung not in left)


@pytest.fixture
def first(rungs: tuple[str, ...]) -> str:
    """The kind of team to check most: what fastgen takes by itself, or else one that every device has."""
    return "auto" if rungs == RUNGS else "cta"
