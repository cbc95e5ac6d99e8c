"""The zoo: modules as users write them, gathered from the files beside this one. `tests.cases` says what a
case is.
"""

from __future__ import annotations

from tests import zoo_audio, zoo_bad, zoo_colour, zoo_masked, zoo_orders, zoo_stacks, zoo_unets, zoo_vectors
from tests.cases import BadCase, Case

CASES: list[Case] = [
    *zoo_masked.CASES,
    *zoo_colour.CASES,
    *zoo_stacks.CASES,
    *zoo_unets.CASES,
    *zoo_audio.CASES,
    *zoo_vectors.CASES,
    *zoo_orders.CASES,
]
BAD: list[BadCase] = zoo_bad.BAD
