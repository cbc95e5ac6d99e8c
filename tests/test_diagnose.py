"""What is said when stepping is not forward: the layer where an error was planted, or what forward itself does wrong."""

# As users write: modules are not annotated in full.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastgen
from fastgen import UnsupportedError, VerifyError
from fastgen.backends.cpu import CpuExecutor
from fastgen.backends.request import Request
from fastgen.graph.maps import MapNode
from fastgen.graph.node import Graph
from fastgen.graph.refs import Piece
from fastgen.graph.sources import CondNode
from fastgen.graph.taps import TapsNode
from fastgen.heads import Categorical
from fastgen.plan import build

HEAD = Categorical(5, encode="symmetric", params="B(n*C)*")


class Net(nn.Module):
    """Three layers, a label, and padding with a constant."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second, self.out = nn.Conv1d(1, 6, 2), nn.Conv1d(6, 6, 3), nn.Conv1d(6, 5, 1)
        self.label = nn.Embedding(4, 6)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        h = torch.tanh(self.first(F.pad(x, (2, -1)))) * self.label(label)[:, :, None]
        h = torch.tanh(self.second(F.pad(h, (2, 0), value=0.5)))
        return self.out(h)


def compiled(model: nn.Module, **options: Any) -> fastgen.Sampler:
    return fastgen.compile(model.eval(), (1, 12), HEAD, (torch.tensor([1]),), threads=1, **options)


def wrong_weight(graph: Graph) -> None:
    term = layer(graph, "second").taps[1]
    term.weight[2, 3] += 0.1


def wrong_tap(graph: Graph) -> None:
    term = layer(graph, "second").taps[0]
    off = (term.ref.at.off[0], term.ref.at.off[1] - 1)
    term.ref = replace(term.ref, at=replace(term.ref.at, off=off))


def unread_constant(graph: Graph) -> None:
    node = layer(graph, "second")
    assert node.bias is not None and node.bias.dim() == 3, "the constant in the padding is part of it"
    node.bias = node.bias[:, 0, -1]


def frozen(graph: Graph) -> None:
    for node in graph.nodes:
        for pieces in node.operands if isinstance(node, MapNode) else []:
            for k, p in enumerate(pieces):
                if p.ref is not None and isinstance(graph.nodes[p.ref.node], CondNode):
                    pieces[k] = Piece(p.lo, p.hi, const=Net().label.weight.detach()[1, p.lo : p.hi].clone())
                    return
    raise AssertionError("no conditioning is read")


def layer(graph: Graph, path: str) -> TapsNode:
    return next(n for n in graph.nodes if isinstance(n, TapsNode) and n.path == path)


PLANTED: dict[str, tuple[Callable[[Graph], None], str]] = {
    "a weight": (wrong_weight, "layer second: aten.convolution is the first"),
    "a tap": (wrong_tap, "layer second: aten.convolution is the first"),
    "a constant": (unread_constant, "layer second: aten.convolution is the first"),
    "conditioning": (frozen, "layer Net: aten.mul is the first"),
}


@pytest.mark.parametrize("error", PLANTED)
def test_a_planted_error_is_found_where_it_is(error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, where = PLANTED[error]
    capture = build.capture

    def wrong(*args: Any) -> Graph:
        graph = capture(*args)
        plant(graph)
        return graph

    compiled(Net())
    monkeypatch.setattr(build, "capture", wrong)
    with pytest.raises(VerifyError, match=re.escape(where)):
        compiled(Net())


def test_an_error_of_the_program_is_told_from_one_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    run = CpuExecutor.run

    def wrong(self: CpuExecutor, request: Request) -> tuple[Tensor, Tensor | None]:
        values, params = run(self, request)
        return values, None if params is None else params * 1.01

    monkeypatch.setattr(CpuExecutor, "run", wrong)
    with pytest.raises(VerifyError, match="it is the program made of it that differs"):
        compiled(Net())


class Firsts(Net):
    """Adds the first sample's values to all."""

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        out = super().forward(x, label)
        out[1:] += out[:1]
        return out


class Half(Net):
    """Is different for the first sample."""

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        out = super().forward(x, label).clone()
        out[0] += 1
        return out


@pytest.mark.parametrize("model", [Firsts, Half])
def test_samples_that_mix(model: type[nn.Module]) -> None:
    with pytest.raises(UnsupportedError, match="forward mixes the samples of a batch"):
        compiled(model())


class Running(nn.Module):
    """What forward gives hangs on how often it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        self.count += 1
        return self.net(x, label) + self.count


def test_a_forward_that_counts() -> None:
    model = Running()
    with pytest.raises(UnsupportedError, match="different results on the same input"):
        compiled(model)
    assert float(model.count) == 0
