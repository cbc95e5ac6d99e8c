"""Small changes of what forward reads are seen: the last byte, a shape, a type, a default."""

# As users write: modules are not annotated in full.
# mypy: disable-error-code="no-any-return,no-untyped-def"

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastgen
from fastgen.fingerprint import Fingerprint, check_finite, marks
from fastgen.native import native


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
    before = Fingerprint(model)
    assert next(before.changed(), None) is None
    CHANGES[name](model)
    assert next(before.changed(), None) is not None


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
        a = marks([t])[0]
        t[-1] = 1
        assert marks([t])[0] != a, n


def test_rows_that_change_places():
    t = torch.arange(64.0)
    a = marks([t])[0]
    assert marks([t.view(4, 16).flip(0).reshape(-1)])[0] != a


def test_many_pieces_on_several_threads_are_those_of_each() -> None:
    """Sizes around a thread's worth, empty ones and bytes that are no whole words among them."""
    g = torch.Generator().manual_seed(0)
    pieces = [
        torch.randint(0, 255, (n,), generator=g, dtype=torch.uint8) for n in (0, 1, 63, 64, 65, 5 << 20, 4 << 20, 7)
    ]
    alone = [native().checksums([(t.data_ptr(), t.numel())], 1)[0] for t in pieces]
    for threads in (1, 2, 5, 64):
        assert native().checksums([(t.data_ptr(), t.numel()) for t in pieces], threads) == alone
    assert len(set(alone)) == len(alone) and native().checksums([], 3) == []


def test_a_dictionary_that_was_empty() -> None:
    """A hook, a buffer and a child where there were none."""
    for change, name in (
        (lambda m: m[0].register_forward_hook(lambda *_: None), "a hook of 0"),
        (lambda m: m[0].register_buffer("more", torch.ones(1)), "0.more|0"),
        (lambda m: m[0].add_module("child", nn.Linear(1, 1)), "0.child|0"),
    ):
        model = nn.Sequential(nn.Linear(2, 2))
        print_ = Fingerprint(model)
        assert not list(print_.changed())
        change(model)  # type: ignore[no-untyped-call]
        assert any(re.match(name, found) for _, found in print_.changed()), name
