"""Random modules (tests/fuzz.py), a few hundred; `make fuzz` makes thousands."""

from __future__ import annotations

import pytest

from tests.fuzz import outcome

SEEDS, EACH = 200, 25


@pytest.mark.parametrize("first", range(0, SEEDS, EACH))
def test_random_modules(first: int) -> None:
    """Exact, or refused for a reason that is true of them."""
    found = {seed: outcome(seed) for seed in range(first, first + EACH)}
    assert {seed: what for seed, what in found.items() if what[:2].isupper()} == {}
    assert sum(what == "exact" for what in found.values()) > EACH // 10
