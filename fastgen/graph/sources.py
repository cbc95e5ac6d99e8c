"""Nodes that nothing is computed for: forward's input, conditioning, and operations without a rule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fastgen.graph.node import Coder, Node, Store
from fastgen.graph.refs import Cause, Places, Read
from fastgen.graph.times import NEVER, Ready


@dataclass
class Source(Node):
    """A node that reads no other."""

    source: ClassVar[bool] = True

    def reads(self) -> list[Read]:
        return []

    def ready(self, done: list[Ready], known: Tensor) -> Ready:
        return Ready.uniform(self.channels, self.grid, NEVER)

    def value(self, values: Sequence[Tensor]) -> Tensor:
        raise NotImplementedError(f"{self.op} is given, not computed")

    def restrict(self, chans: list[int], places: Places) -> Node:
        return self  # one buffer holds all of its channels

    def blame(self, chan: int, i: int, j: int) -> Iterator[Cause]:
        return iter(())

    def emit(self, coder: Coder) -> int:
        raise NotImplementedError(f"{self.op} is a source")

    def forget(self, live: set[int]) -> None:
        pass


@dataclass
class InputNode(Source):
    """The sampled tensor as forward sees it (encoded)."""

    def ready(self, done: list[Ready], known: Tensor) -> Ready:
        rows, group = torch.unique(known.reshape(self.channels, -1), dim=0, return_inverse=True)
        return Ready(group, rows.reshape(-1, *self.grid).to(torch.int32))

    def home(self, store: Store) -> int:
        return store.input_buffer()


@dataclass
class CondNode(Source):
    """Values that depend on conditioning alone, from a run of forward at call time (backends/conditioning.py)."""

    of_call: ClassVar[bool] = True

    point: int = -1
    gather: Tensor = field(default_factory=lambda: torch.empty(0))  # [C, H, W] flat index into the batch-1 tensor
    tensor_shape: tuple[int, ...] = ()

    def ready(self, done: list[Ready], known: Tensor) -> Ready:
        return Ready.uniform(self.channels, self.grid, 0)

    def home(self, store: Store) -> int:
        return store.cond_buffer(self)


@dataclass
class OpaqueNode(Source):
    """An operation without a rule. Harmless unless an output depends on it."""

    reason: str = ""

    def value(self, values: Sequence[Tensor]) -> Tensor:
        return torch.full((self.channels, *self.grid), float("nan"), dtype=torch.float64)
