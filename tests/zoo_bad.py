"""Modules that must be refused, each with the error that names the reason."""

# As users write: attributes of submodules are not annotated.
# mypy: disable-error-code="no-any-return,arg-type,index,operator,call-overload,no-untyped-call"

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.errors import FastgenError, NotCausalError, ShapeError, UnsupportedError
from fastgen.heads import Bernoulli, Categorical, Head
from tests.cases import BadCase, Case, randomise
from tests.zoo_masked import MaskedConv2d
from tests.zoo_stacks import SqueezedIndex

IMAGE = (1, 6, 7)


class Two(nn.Module):
    """Two masked layers; the subclasses break one thing each."""

    def __init__(self, first: str = "A", n: int = 5) -> None:
        super().__init__()
        self.first = MaskedConv2d(first, 1, 8, 3, padding=1)
        self.second = MaskedConv2d("B", 8, 8, 3, padding=1)
        self.out = nn.Conv2d(8, n, 1)

    def between(self, h: Tensor) -> Tensor:
        return F.relu(h)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.between(self.second(self.between(self.first(x)))))


class Transposed(Two):
    """Causal, but column by column."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(2, 3)).transpose(2, 3)


class ShiftForgotten(nn.Module):
    """A sequence model that predicts the value it is given: `predicts="next"` was meant."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 8)
        self.conv = nn.Conv1d(8, 6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(self.embed(x).transpose(1, 2), (1, 0)))


class CentredPadding(nn.Module):
    """A WaveNet layer padded evenly on both sides: one tap in the future."""

    def __init__(self) -> None:
        super().__init__()
        self.past = nn.Conv1d(1, 8, 2)
        self.centred = nn.Conv1d(8, 8, 3, padding=1)
        self.out = nn.Conv1d(8, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.centred(self.past(F.pad(x, (1, 0)))).relu())


class MixesBatch(Two):
    def between(self, h: Tensor) -> Tensor:
        return F.relu(h - h.mean(0, keepdim=True))


class ReadsItem(Two):
    def between(self, h: Tensor) -> Tensor:
        return F.relu(h) / (1.0 + abs(h[0, 0, 0, 1].item()))


class Branches(Two):
    def between(self, h: Tensor) -> Tensor:
        return F.relu(h) if h.sum() > 0 else h


class InstanceNorm(Two):
    """Statistics over the whole image."""

    def between(self, h: Tensor) -> Tensor:
        return F.relu(F.instance_norm(h))


class Spectrum(Two):
    """Causal, a transform over the channels of a site, but no rule for it."""

    def between(self, h: Tensor) -> Tensor:
        return F.relu(h) + torch.fft.rfft(h, dim=1).real[:, :1]


class Sorted(Two):
    def between(self, h: Tensor) -> Tensor:
        return h.sort(dim=1).values


class Random(Two):
    """Noise in eval: no two runs agree."""

    def between(self, h: Tensor) -> Tensor:
        return F.dropout(h, 0.5, training=True)


class Attends(Two):
    """Softmax attention over all pixels, its mask forgotten."""

    def between(self, h: Tensor) -> Tensor:
        flat = h.flatten(2)
        weights = torch.softmax(flat.transpose(1, 2) @ flat / 8**0.5, dim=-1)
        return (flat @ weights.transpose(1, 2)).view_as(h)


class Recurrent(nn.Module):
    """nn.LSTM that runs backwards in time as well."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.lstm = nn.LSTM(4, 4, batch_first=True, bidirectional=True)
        self.out = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(self.embed(x))[0])


def with_nan() -> nn.Module:
    net = Two()
    randomise(net, 69)
    net.second.weight.data[3, 2, 0, 0] = float("nan")
    return net


def bad(
    name: str,
    model: type[nn.Module],
    error: type[Exception],
    match: str,
    shape: tuple[int, ...] = IMAGE,
    head: Head | None = None,
    **kwargs: Any,
) -> BadCase:
    """A bad case with random weights."""
    head = Categorical(5, encode="symmetric") if head is None else head
    return BadCase(Case(name, lambda: randomise(model(), 60), shape, head, **kwargs), error, match)


class ForgotTypeA(Two):
    def __init__(self) -> None:
        super().__init__(first="B")


class TooManyOutputs(Two):
    def __init__(self) -> None:
        super().__init__(n=7)


class OutputTooNarrow(Two):
    """One column short."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., 1:]


BAD = [
    bad("mask-a-forgotten", ForgotTypeA, NotCausalError, r"(?s)\bfirst\b.*tap.*1.*1"),
    bad("transposed-order", Transposed, NotCausalError, r"\bfirst\b.*convolution.*at distances that change"),
    bad("shift-forgotten", ShiftForgotten, NotCausalError, r"\bconv\b.*tap", (12,), Categorical(6)),
    bad(
        "centred-padding",
        CentredPadding,
        NotCausalError,
        r"\bcentred\b.*tap.*2",
        (1, 12),
        Categorical(6, encode="symmetric"),
        predicts="next",
    ),
    bad("instance-norm", InstanceNorm, NotCausalError, r"batch_norm.*statistics are over sites"),
    bad("attention-unmasked", Attends, NotCausalError, r"attention"),
    bad("mixes-batch", MixesBatch, FastgenError, r"(?i)batch"),
    bad("reads-item", ReadsItem, NotCausalError, r"item"),
    bad("branches-on-data", Branches, FastgenError, r"branch|item|bool"),
    bad("noise-in-eval", Random, FastgenError, r"(?i)random|bernoulli|dropout|differ"),
    bad("outputs-do-not-fit", TooManyOutputs, ShapeError, r"7.*5|5.*7"),
    bad("output-too-narrow", OutputTooNarrow, ShapeError, r"6.*7"),
    BadCase(
        Case("outputs-ambiguous", lambda: randomise(SqueezedIndex(7, 9), 61), (1, 7, 7), Categorical(7)),
        ShapeError,
        r"choose.*params=",
    ),
    bad("spectrum", Spectrum, UnsupportedError, r"fft"),
    bad("sorted", Sorted, UnsupportedError, r"sort"),
    bad(
        "recurrent-both-ways",
        Recurrent,
        FastgenError,
        r"(?i)lstm",
        (10,),
        Categorical(6, params="B*n"),
        predicts="next",
    ),
    bad("wrong-input-channels", Two, ShapeError, r"3.*1|1.*3", (3, 6, 7), Bernoulli()),
    BadCase(
        Case("nan-weights", with_nan, IMAGE, Categorical(5, encode="symmetric")),
        FastgenError,
        r"(?i)second.*(nan|finite)",
    ),
]
