"""What is said when stepping is not forward: the layer where an error was planted, or what forward itself does wrong."""

# As users write: modules are not annotated in full.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastgen
from fastgen import NotCausalError, ShapeError, UnsupportedError, VerifyError
from fastgen.backends.cpu import CpuExecutor
from fastgen.backends.request import Request
from fastgen.graph.maps import MapNode
from fastgen.graph.node import Graph
from fastgen.graph.refs import Piece
from fastgen.graph.sources import CondNode
from fastgen.graph.taps import TapsNode
from fastgen.heads import Bernoulli, Categorical
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

    def wrong(*args: Any, **options: Any) -> Graph:
        graph = capture(*args, **options)
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


class Leaky(nn.Module):
    """Causal but for a read of the future in a form that the planner has no rule for."""

    def __init__(self, leak: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.leak = nn.Conv2d(1, 4, (2, 3)), leak

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(F.pad(x, (1, 1, 2, 0)))[:, :, :-1]
        return torch.relu(self.leak(torch.cat([h, x], 1))[:, :4]) + h


LEAKS: dict[str, Callable[[Tensor], Tensor]] = {
    "flip": lambda h: h + h[:, 4:].flip(3),
    "roll": lambda h: h + h[:, 4:].roll(1, 2),
    "transpose": lambda h: h + h[:, 4:].transpose(2, 3),
    "one site": lambda h: torch.cat([h[:, :, :1, :1] + h[:, 4:, 2:, 2:], h.flatten(2)[:, :, None, 1:]], 3).view_as(h),
    "sorted": lambda h: h + h[:, 4:].flatten(2).sort(2).values.view_as(h[:, 4:]),
    "cumsum": lambda h: h + h[:, 4:].flip(2).cumsum(2),
    "attention": lambda h: h + torch.softmax(h.flatten(2).transpose(1, 2) @ h.flatten(2), 1).sum(2).view_as(h[:, 4:]),
}


@pytest.mark.parametrize("leak", LEAKS)
@pytest.mark.parametrize("classes", [2, 4])
def test_what_cannot_be_planned_and_reads_the_future_is_told_so(leak: str, classes: int) -> None:
    head = Categorical(classes, encode="unit", params="B(n*C)*")
    model: nn.Module = Leaky(LEAKS[leak])
    if classes == 2:
        model = nn.Sequential(model, nn.Conv2d(4, 2, 1))
    with pytest.raises(
        NotCausalError, match=r"parameters of step \d+ \(row \d, column \d\) change with values from step \d+ on"
    ):
        fastgen.compile(model.eval(), (1, 3, 3), head)


@pytest.mark.parametrize("past", [lambda h: h[:, :4].sort(1).values, lambda h: h[:, :4] * h[:, :4].cumsum(2)])
def test_what_cannot_be_planned_and_is_causal_is_not(past: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(UnsupportedError, match="aten.(sort|cumsum)"):
        fastgen.compile(Leaky(past).eval(), (1, 3, 3), Categorical(4, encode="unit", params="B(n*C)*"))


def test_a_future_that_torch_does_not_see() -> None:
    """Work in another thread is not watched; the proof finds it, and forward itself says what it was."""

    class Threaded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv2d(1, 4, (2, 3))

        def forward(self, x: Tensor) -> Tensor:
            found: list[Tensor] = []
            thread = threading.Thread(target=lambda: found.append(x.mean((2, 3), keepdim=True)))
            thread.start()
            thread.join()
            return self.conv(F.pad(x, (1, 1, 2, 0)))[:, :, :-1] * (1 + found[0].detach())

    with pytest.raises(NotCausalError, match="change with values from step .* in a way that its layers do not show"):
        fastgen.compile(Threaded().eval(), (1, 4, 4), Categorical(4, encode="unit", params="B(n*C)*"))


@pytest.mark.parametrize(
    ("encode", "cure"),
    [("unit", "encode='index' feeds class indices"), ("index", "'unit', 'symmetric' or 'onehot' feeds numbers")],
)
def test_an_encoding_that_forward_does_not_take(encode: str, cure: str) -> None:
    first: nn.Module = nn.Embedding(4, 4) if encode == "unit" else nn.Linear(1, 4)
    shape: tuple[int, ...] = (6,) if encode == "unit" else (1, 6)
    with pytest.raises(ShapeError, match=cure):
        fastgen.compile(nn.Sequential(first).eval(), shape, Categorical(4, encode=encode, params="B*n"))


class Alternating(nn.Module):
    """A forward that goes in turns: an order-agnostic MADE (Germain et al. 2015), the next masks at every call."""

    def __init__(self, turns: int, in_place: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.turns, self.in_place, self.count, self.line = turns, in_place, 0, nn.Linear(12, 12)
        self.line.weight.data.mul_(8)
        self.masks = torch.ones(12, 12).tril(-1) * (torch.rand(turns, 12, 12) > 0.5)

    def forward(self, x: Tensor) -> Tensor:
        mask = self.masks[self.count % self.turns]
        self.count += 1
        if self.in_place:
            self.line.weight.data *= mask
        return F.linear(x, self.line.weight if self.in_place else self.line.weight * mask, self.line.bias)


@pytest.mark.parametrize("turns", [2, 3, 4])
def test_a_forward_that_goes_in_turns(turns: int) -> None:
    with pytest.raises(UnsupportedError, match="or counts its calls"):
        fastgen.compile(Alternating(turns, False).eval(), (12,), Bernoulli(), layout="D")


@pytest.mark.parametrize("turns", [3, 4])
def test_a_forward_that_changes_its_weights(turns: int) -> None:
    with pytest.raises(UnsupportedError, match="line.weight changes from one run of forward to the next"):
        fastgen.compile(Alternating(turns, True).eval(), (12,), Bernoulli(), layout="D")


@pytest.mark.parametrize("turns", [2, 3])
def test_what_goes_in_turns_is_not_said_to_read_the_future(turns: int) -> None:
    class Turns(Net):
        count = 0

        def forward(self, x: Tensor, label: Tensor) -> Tensor:
            self.count += 1
            return super().forward(x, label).cummax(-1).values * (1 + 0.1 * (self.count % turns))

    with pytest.raises(UnsupportedError, match="cummax"):
        compiled(Turns())


def test_rounding_is_not_said_to_read_the_future() -> None:
    """Sums of the past, as those of everything less those of the future: only what rounds of the future is left."""

    class Cancelling(Net):
        def forward(self, x: Tensor, label: Tensor) -> Tensor:
            h = 1000 * super().forward(x, label)
            return h.sum(-1, keepdim=True) - h.flip(-1).cumsum(-1).flip(-1)

    with pytest.raises(UnsupportedError, match="cumsum"):
        compiled(Cancelling())


def test_a_module_that_takes_two_and_not_one() -> None:
    class Squeezes(Net):
        def forward(self, x: Tensor, label: Tensor) -> Tensor:
            return nn.BatchNorm1d(5).eval()(super().forward(x, label).squeeze(0))

    with pytest.raises(ShapeError, match="it takes two samples at once, but not one"):
        compiled(Squeezes())


def test_an_output_with_the_classes_last() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 12, (2, 3))

        def forward(self, x: Tensor) -> Tensor:
            h = self.conv(F.pad(x, (1, 1, 2, -1)))
            return h.view(len(x), 3, 4, *x.shape[2:]).permute(0, 1, 3, 4, 2)

    model, head = Last().eval(), Categorical(4, encode="unit")
    drawn = fastgen.compile(model, (3, 5, 6), head, threads=1).sample(3)
    assert torch.equal(drawn, fastgen.compile(model, (3, 5, 6), head, backend="naive").sample(3))
    with pytest.raises(ShapeError, match=r"2 ways.*params='BCn\*', params='BC\*n'"):
        fastgen.compile(model, (3, 4, 4), head)
    assert fastgen.compile(model, (3, 4, 4), Categorical(4, encode="unit", params="BC*n"), threads=1).verify().ok
