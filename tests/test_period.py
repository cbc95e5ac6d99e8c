"""How a sequence's schedule, and what it reads, goes on at other lengths: rules that few models come near the edges of."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastgen.backends.conditioning import _stretch
from fastgen.errors import UnsupportedError
from fastgen.plan.period import _advance, period_of
from fastgen.program import records as R
from fastgen.program.pack import Packer, grown

STEPS = 64
TIMES = 2 * torch.arange(STEPS)  # site q at step q: in half steps
SITES = torch.arange(STEPS)


def moved(*changes: tuple[int, int]) -> torch.Tensor:
    """TIMES, some of them moved by so many half steps."""
    times = TIMES.clone()
    for site, by in changes:
        times[site] += by
    return times


def test_a_site_a_step_advances_by_the_period() -> None:
    assert _advance(TIMES, SITES, 8, STEPS) == 8


def test_two_sites_a_step_and_one_in_two() -> None:
    assert _advance(TIMES.repeat_interleave(2), torch.arange(2 * STEPS), 8, STEPS) == 16
    assert _advance(TIMES[::2], torch.arange(STEPS // 2), 8, STEPS) == 4


def test_at_the_borders_a_site_may_have_been_planned_later() -> None:
    assert _advance(moved((0, 4), (3, 2)), SITES, 8, STEPS) == 8
    assert _advance(moved((STEPS - 1, 2)), SITES, 8, STEPS) == 8


def test_but_not_earlier_than_the_rule_would_run_it() -> None:
    assert _advance(moved((4, -2)), SITES, 8, STEPS) is None
    assert _advance(moved((STEPS - 1, -2)), SITES, 8, STEPS) is None


def test_nor_near_the_middle() -> None:
    """Less than a quarter of the op's sites, 16, from the period that is the rule, sites 32 to 39."""
    assert _advance(moved((15, 2)), SITES, 8, STEPS) == 8
    assert _advance(moved((24, 2)), SITES, 8, STEPS) is None
    assert _advance(moved((31, 2)), SITES, 8, STEPS) is None


def test_nor_where_the_rule_would_run_it_before_the_first_step() -> None:
    early = moved(*((q, 2) for q in range(4)))
    assert _advance(early, SITES, 8, STEPS) == 8
    assert (
        _advance(torch.cat([torch.zeros(1, dtype=torch.int64), TIMES]), torch.arange(STEPS + 1) - 1, 8, STEPS) is None
    )


def test_two_periods_in_the_middle_are_alike_or_there_is_no_rule() -> None:
    assert _advance(moved((33, 2)), SITES, 8, STEPS) is None
    assert _advance(moved((41, 2)), SITES, 8, STEPS) is None
    assert _advance(TIMES, SITES.flip(0), 8, STEPS) is None, "it goes backwards"
    assert _advance(TIMES[:8], SITES[:8], 8, STEPS) is None, "nothing there"


def test_a_site_that_no_site_of_the_rule_is_like() -> None:
    """One in two, but for one at an odd place."""
    sites = torch.cat([SITES[::2], torch.tensor([61])])
    assert _advance(torch.cat([TIMES[::2], TIMES[61:62]]), sites, 8, STEPS) is None


def instruction(index: int, times: torch.Tensor) -> Any:
    lead = SimpleNamespace(live=torch.ones(1, len(times), dtype=torch.bool), when=times[None].to(torch.int32))
    return SimpleNamespace(index=index, up=(1, 1), parities=[(0, 0)], lead=lead)


def test_a_period_is_at_most_a_quarter_of_the_steps() -> None:
    """So that there are two of them in the middle, and borders beside those."""

    def every(period: int) -> torch.Tensor:
        """Sites that wait for the first of their period."""
        return 2 * (torch.arange(STEPS) // period * period)

    assert period_of([instruction(0, TIMES)], STEPS, 1) == (1, {(0, (0, 0)): 1})
    assert period_of([instruction(0, TIMES), instruction(3, every(4))], STEPS, 1) == (
        4,
        {(0, (0, 0)): 4, (3, (0, 0)): 4},
    )
    assert period_of([instruction(0, every(16))], STEPS, 16) == (16, {(0, (0, 0)): 16})
    assert period_of([instruction(0, every(32))], STEPS, 32) is None


@pytest.mark.parametrize(
    ("cols", "planned", "length", "found"),
    [
        (64, 64, 200, 200),
        (66, 64, 200, 202),  # a margin
        (95, 64, 200, 231),  # a margin of nearly half
        (97, 64, 200, 2 * 200 - 31),  # two columns a site, but for a margin
        (130, 64, 200, 402),
        (192, 64, 100, 300),
        (1, 64, 200, 1),  # a single value
        (32, 64, 200, 100),
        (16, 64, 201, 51),  # begun strides count
        (18, 64, 200, 52),
        (97, 64, 64, 97),
        (66, 64, 1, 3),
    ],
)
def test_columns_at_another_length(cols: int, planned: int, length: int, found: int) -> None:
    assert grown(cols, planned, length) == found


def test_bounds_at_the_end_move_with_it_and_those_at_the_beginning_stay() -> None:
    packer: Any = object.__new__(Packer)
    packer.schedule = SimpleNamespace(sequence=True)
    own, given = (R.Buffer(**{**dict.fromkeys(R.Buffer._fields, 0), "kind": k, "cols": 50}) for k in (R.STATE, R.COND))
    packer.buffers, packer.grids = [own, given], [(1, 20), (1, 20)]
    zero = dict.fromkeys(R.Tap._fields, 0)
    packer.taps = [R.Tap(**{**zero, "buf": b, "hi_j": hi}) for b in (0, 1) for hi in (20, 18, 11, 10, 3)]
    assert [tap.hi_j for tap in packer._stretched_taps()] == [50, 50, 50, 10, 3, 50, 48, 41, 10, 3]


def test_an_index_along_a_sequence_goes_on_or_is_one_value() -> None:
    along, constant = torch.arange(8).view(1, 1, 8) + 3, torch.full((1, 1, 8), 5)
    assert _stretch(along, 12, "layer").tolist() == [[list(range(3, 15))]]
    assert _stretch(constant, 12, "layer").tolist() == [[[5] * 12]]
    for odd in (
        2 * along,
        along.flip(2),
        torch.tensor([0, 1, 2, 3, 4, 5, 7, 8]).view(1, 1, 8),
        torch.tensor([5] * 7 + [6]).view(1, 1, 8),
    ):
        with pytest.raises(UnsupportedError, match="not laid out along the sequence"):
            _stretch(odd, 12, "layer")
