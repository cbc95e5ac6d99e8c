"""Small changes of what forward reads are seen: the last byte, a shape, a type, a default."""

# As users write: modules are not annotated in full.
# mypy: disable-error-code="no-any-return,no-untyped-def"

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastgen
from fastgen.fingerprint import Fingerprint, Mark, check_finite


class Held:
    """An object of a person's."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Box(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("table", torch.arange(12.0).view(3, 4))
        self.flag: Any = True
        self.array = np.arange(5, dtype=np.uint8)
        self.deep = Held(Held(Held(1.0)))
        self.part = functools.partial(torch.add, alpha=1)

        def act(h: Tensor, slope: float = 0.1) -> Tensor:
            return h * slope

        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def _swap_array(m: Any) -> None:
    m.array = m.array.copy()
    m.array[-1] += 1


CHANGES: dict[str, Callable[[Any], object]] = {
    "the same bytes in another shape": lambda m: setattr(m, "table", m.table.reshape(4, 3)),
    "the same bytes of another type": lambda m: setattr(m, "table", m.table.view(torch.int32)),
    "one for true": lambda m: setattr(m, "flag", 1), "a float for one": lambda m: setattr(m, "flag", 1.0),
    "the last byte of an array": _swap_array, "three objects deep": lambda m: setattr(m.deep.value.value, "value", 2.0),
    "a default of a function": lambda m: setattr(m.act, "__defaults__", (0.2,)),
    "a keyword of a partial": lambda m: setattr(m, "part", functools.partial(torch.add, alpha=2)),
    "a hook in front": lambda m: m.layer.register_forward_pre_hook(lambda _, args: args),
    "the last element": lambda m: m.table.view(-1)[-1].add_(1),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_small_changes_are_seen(name: str) -> None:
    model = Box()
    marks = Fingerprint(model)
    assert next(marks.changed(), None) is None
    CHANGES[name](model)
    assert next(marks.changed(), None) is not None


def test_buffers_may_be_infinite_and_parameters_may_not() -> None:
    model = Box()
    model.table[0, 0] = -math.inf  # type: ignore[operator]
    check_finite(model)
    with torch.no_grad():
        model.layer.weight[0, 0] = math.inf
    with pytest.raises(fastgen.FastgenError, match=r"layer\.weight"):
        check_finite(model)


def test_the_last_bytes_of_any_size():
    for n in (1, 5, 17, 64, 100):
        t = torch.zeros(n, dtype=torch.uint8)
        a = Mark.of(t)
        t[-1] = 1
        assert Mark.of(t) != a, n


def test_rows_that_change_places():
    t = torch.arange(64.0)
    a = Mark.of(t)
    assert Mark.of(t.view(4, 16).flip(0).reshape(-1)) != a
