"""Random networks: stepping equals forward for whatever hypothesis can put together, and causality is judged rightly."""

# As users write: modules are not annotated in full.
# mypy: disable-error-code="no-any-return,operator,arg-type"

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastgen import NotCausalError, Sampler, UnsupportedError
from fastgen.heads import Bernoulli, Categorical, GaussianMixture, Head, LogisticMixture
from tests.cases import Case, randomise
from tests.oracle import at_length, compile_case, noise_of, parameters, run_given, values_of

SETTINGS = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
ACTIVATIONS = {
    "relu": F.relu, "elu": F.elu, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "silu": F.silu, "gelu": F.gelu,
    "leaky": lambda x: F.leaky_relu(x, 0.2), "softplus": F.softplus, "glu": lambda x: F.glu(torch.cat([x, x.flip(1)], 1), 1),
    "concat_elu": lambda x: F.elu(torch.cat([x, -x], 1)), "square": lambda x: x * x * 0.3, "none": lambda x: x,
}  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """One causal layer: what it is and its sizes; `skip` is what becomes of its input."""

    kind: str  # above, left, both, down-up, mask
    width: int
    kernel: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    act: str
    skip: str  # none, add, cat, gate
    bias: bool


class RandomImageNet(nn.Module):
    """Causal layers on an image; the first one hides the pixel itself."""

    def __init__(self, channels: int, layers: list[Layer], out: int) -> None:
        super().__init__()
        self.plan = layers
        self.first = nn.Conv2d(channels, 6, (2, 3))
        self.convs, self.ups = nn.ModuleList(), nn.ModuleList()
        width = 6
        for layer in layers:
            width_in = width * (2 if layer.act == "concat_elu" else 1)
            groups = layer.groups if width_in % layer.groups == 0 else 1
            made = layer.width * groups * (2 if layer.skip == "gate" else 1)
            stride = 2 if layer.kind == "down-up" else 1
            kernel = (2, 2) if layer.kind == "down-up" else layer.kernel
            dilation = (1, 1) if layer.kind == "down-up" else layer.dilation
            self.convs.append(nn.Conv2d(width_in, made, kernel, stride, 0, dilation, groups, layer.bias))
            self.ups.append(nn.ConvTranspose2d(made, made, 2, 2) if layer.kind == "down-up" else nn.Identity())
            made //= 2 if layer.skip == "gate" else 1
            width = made + width if layer.skip == "cat" else made
        self.out = nn.Conv2d(width, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        rows, cols = x.shape[2:]
        h = F.pad(x, (2, 1, 1, 0))  # the row above and the two pixels to the left
        weight = self.first.weight.clone()
        weight[:, :, 1, 2:] = 0
        h = F.conv2d(h, weight, self.first.bias)[..., :rows, :cols]
        for layer, conv, up in zip(self.plan, self.convs, self.ups, strict=True):
            h = self._layer(h, layer, conv, up, rows, cols)
        return self.out(h)

    def _layer(self, h: Tensor, layer: Layer, conv: nn.Module, up: nn.Module, rows: int, cols: int) -> Tensor:
        assert isinstance(conv, nn.Conv2d)
        y = ACTIVATIONS[layer.act](h)
        (kh, kw), (dh, dw) = conv.kernel_size, conv.dilation
        if layer.kind == "down-up":
            y = conv(F.pad(y, (0, cols % 2, 0, rows % 2)))  # blocks of 2x2, which a fine site may not read
            y = up(y)
            y = F.pad(y, (0, 0, 2, 0))[..., :rows, :cols]  # so down by a block
        elif layer.kind == "above":  # finished rows, to both sides
            side = (kw - 1) * dw
            y = conv(F.pad(y, (side // 2, side - side // 2, (kh - 1) * dh + 1, 0)))[..., :rows, :]
        elif layer.kind == "left":
            y = (
                conv(F.pad(y, ((kw - 1) * dw, 0, 0, (kh - 1) * dh)))[..., :rows, :]
                if kh == 1
                else conv(F.pad(y, ((kw - 1) * dw, 0, (kh - 1) * dh, 0)))
            )
        else:  # mask: a centred kernel whose future is zero
            weight = conv.weight.clone()
            if kh > 1 and kw > 1:
                weight[:, :, kh // 2, kw // 2 + 1 :] = 0
                weight[:, :, kh // 2 + 1 :] = 0
            else:
                weight[:, :, kh // 2 + 1 :] = 0
                weight[:, :, :, kw // 2 + 1 :] = 0
            up_pad, left = (kh // 2) * dh, (kw // 2) * dw
            y = F.pad(y, (left, (kw - 1) * dw - left, up_pad, (kh - 1) * dh - up_pad))
            y = F.conv2d(y, weight, conv.bias, 1, 0, conv.dilation, conv.groups)
        if layer.skip == "gate":
            a, b = y.chunk(2, 1)
            y = torch.tanh(a) * torch.sigmoid(b)
        if layer.skip == "add" and h.shape[1] == y.shape[1]:
            y = h + y
        return torch.cat([y, h], 1) if layer.skip == "cat" else y


sizes = st.integers(1, 9)
image_layers = st.lists(
    st.builds(
        Layer, st.sampled_from(["above", "left", "mask", "down-up"]), st.integers(1, 9),
        st.tuples(st.integers(1, 3), st.integers(1, 4)), st.tuples(st.integers(1, 2), st.integers(1, 3)),
        st.sampled_from([1, 1, 2, 3]), st.sampled_from(sorted(ACTIVATIONS)),
        st.sampled_from(["none", "add", "cat", "gate"]), st.booleans(),
    ),
    min_size=0, max_size=4,
)  # fmt: skip
HEADS: list[tuple[Head, int, int]] = [  # head, value channels, outputs a site
    (Categorical(5, encode="symmetric"), 1, 5),
    (Bernoulli(), 1, 1),
    (LogisticMixture(2), 3, 20),
    (LogisticMixture(2, levels=8), 1, 6),
    (GaussianMixture(1, value_range=(-1.0, 1.0)), 1, 2),
]


def check(case: Case, *refusals: str) -> None:
    """Both executors verify, and step as forward does through values of our own; or the refusal is one of these."""
    try:
        compile_case(case)
    except UnsupportedError as error:
        assume(not any(text in str(error) for text in refusals))
        raise
    model, values = case.build().eval(), case.random_values(2, torch.Generator().manual_seed(3))
    truth = parameters(case, model, values, ())
    scale = max(1.0, float(truth.abs().max()))
    for backend in ("reference", "cpu"):
        sampler = compile_case(case, backend=backend)
        report = sampler.verify()
        assert report.ok, f"{backend}: {report}"
        params = run_given(sampler, values)
        assert float((params - truth).abs().max()) <= 2e-5 * scale, backend


@SETTINGS
@given(
    size=st.tuples(sizes, sizes),
    layers=image_layers,
    which=st.sampled_from(range(len(HEADS))),
    seed=st.integers(0, 99),
)
def test_random_image_networks(size: tuple[int, int], layers: list[Layer], which: int, seed: int) -> None:
    head, channels, out = HEADS[which]
    head = head.with_layout("B(n*C)*")
    check(
        Case(
            "random",
            lambda: randomise(RandomImageNet(channels, layers, out), seed, 1.1),
            (channels, *size),
            head,
        ),
        "does not depend on the sampled tensor",  # blocks that leave a small image, moved down
        *(
            ["what is one channel here comes from"] if min(size) < 4 else []
        ),  # what is a row and what a block cannot be told apart
    )


class RandomSequenceNet(nn.Module):
    """Causal dilated layers on [B, C, T]; strided ones see finished blocks only."""

    def __init__(self, channels: int, layers: list[tuple[str, int, int, int, str, str]], out: int) -> None:
        super().__init__()
        self.plan = layers
        width = 6
        self.first = nn.Conv1d(channels, width, 2)
        self.convs, self.ups = nn.ModuleList(), nn.ModuleList()
        for kind, made, kernel, dilation, act, skip in layers:
            width_in = width * (2 if act == "concat_elu" else 1)
            double = made * (2 if skip == "gate" else 1)
            strided = kind == "strided"
            self.convs.append(
                nn.Conv1d(width_in, double, kernel, dilation if strided else 1, 0, 1 if strided else dilation)
            )
            self.ups.append(nn.ConvTranspose1d(double, double, dilation, dilation) if strided else nn.Identity())
            width = made + width if skip == "cat" else made
        self.out = nn.Conv1d(width, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(F.pad(x, (1, 0)))
        for (kind, _, kernel, step, act, skip), conv, up in zip(self.plan, self.convs, self.ups, strict=True):
            y = ACTIVATIONS[act](h)
            if kind == "strided":  # block k sees inputs up to step * k, and serves the sites from there on
                y = up(conv(F.pad(y, (kernel - 1, 0))))[..., : h.shape[2]]
                y = F.pad(y, (0, h.shape[2] - y.shape[2]))
            else:
                y = conv(F.pad(y, ((kernel - 1) * step, 0)))
            if skip == "gate":
                a, b = y.chunk(2, 1)
                y = torch.tanh(a) * torch.sigmoid(b)
            if skip == "add" and h.shape[1] == y.shape[1]:
                y = h + y
            h = torch.cat([y, h], 1) if skip == "cat" else y
        return self.out(h)


sequence_layers = st.lists(
    st.tuples(
        st.sampled_from(["dilated", "dilated", "strided"]), st.integers(1, 8), st.integers(1, 4), st.integers(1, 4),
        st.sampled_from(sorted(ACTIVATIONS)), st.sampled_from(["none", "add", "cat", "gate"]),
    ),
    max_size=4,
)  # fmt: skip
SEQUENCE_HEADS: list[tuple[Head, int, int]] = [
    (Categorical(6, encode="mulaw"), 1, 6),
    (Categorical(4, encode="onehot"), 4, 4),
    (LogisticMixture(2), 1, 6),
    (GaussianMixture(1, value_range=(-1.0, 1.0)), 1, 2),
]


def check_length(sampler: Sampler, case: Case, length: int) -> None:
    """A sampler compiled at another length: every draw is the one that forward at this length asks for."""
    here = at_length(case, length)
    values = values_of(here, sampler.sample(2, seed=length, length=length))
    truth = parameters(here, here.build().eval(), values, ())
    again = here.head.draw(truth, noise_of(here, 2, length))
    drawn = here.by_step(values)
    near = here.head.near_tie(
        truth, truth + 1e-5 * max(1.0, float(truth.abs().max())), noise_of(here, 2, length), drawn
    )
    assert bool(((drawn - again).abs() <= 1e-4).all(-1).logical_or(near).all()), f"length {length}"


@SETTINGS
@given(
    length=st.sampled_from([3, 17, 64, 67, 80, 96]), layers=sequence_layers, which=st.sampled_from(range(len(SEQUENCE_HEADS))),
    seed=st.integers(0, 99), others=st.lists(st.integers(1, 150), min_size=2, max_size=4),
)  # fmt: skip
def test_random_sequence_networks(
    length: int, layers: list[tuple[str, int, int, int, str, str]], which: int, seed: int, others: list[int]
) -> None:
    head, channels, out = SEQUENCE_HEADS[which]
    case = Case(
        "random", lambda: randomise(RandomSequenceNet(channels, layers, out), seed, 1.1), (channels, length),
        head.with_layout("B(n*C)*"), predicts="next",
    )  # fmt: skip
    check(case)
    if length >= 64:
        sampler = compile_case(case)
        for other in others if sampler.plan.schedule.sequence else [length]:  # what has no period is planned whole
            check_length(sampler, case, other)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 70])
def test_strided_sequences_shorter_than_a_stride(length: int) -> None:
    layers = [("strided", 3, 2, 2, "concat_elu", "cat")] * 2
    head, channels, out = SEQUENCE_HEADS[0]
    case = Case(
        "strided", lambda: randomise(RandomSequenceNet(channels, layers, out), 5, 1.1), (channels, 96),
        head.with_layout("B(n*C)*"), predicts="next",
    )  # fmt: skip
    check_length(compile_case(case), case, length)


# ---- the planner's verdict -------------------------------------------------------------------------------------------
class MaskedNet(nn.Module):
    """Linear taps with random zeros: whether it is causal depends on where they are."""

    def __init__(self, masks: tuple[Tensor, ...], out: int) -> None:
        super().__init__()
        self.masks = masks
        width = 1
        self.convs = nn.ModuleList()
        for mask in masks:
            self.convs.append(
                nn.Conv2d(width, mask.shape[0], mask.shape[2:], padding=tuple(k // 2 for k in mask.shape[2:]))
            )
            width = mask.shape[0]
        self.out = nn.Conv2d(width, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        for conv, mask in zip(self.convs, self.masks, strict=True):
            assert isinstance(conv, nn.Conv2d)
            x = torch.tanh(F.conv2d(x, conv.weight * mask, conv.bias, padding=conv.padding))
        return self.out(x)


@st.composite
def masks(draw: st.DrawFn) -> tuple[Tensor, ...]:
    """Masks of two layers; causal ones with random further zeros, and sometimes a one where none may be."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    made, width = [], 1
    for layer in range(2):
        mask = (torch.rand(3, width, 3, 3, generator=generator) < 0.6).float()
        mask[:, :, 1, (1 if layer == 0 else 2) :] = 0
        mask[:, :, 2] = 0
        if draw(st.sampled_from([True, False, False])):
            i, j = draw(st.sampled_from([(1, 1), (1, 2), (2, 0), (2, 1)]))
            mask[draw(st.integers(0, 2)), draw(st.integers(0, width - 1)), i, j] = 1
        made.append(mask)
        width = 3
    return tuple(made)


@settings(SETTINGS, max_examples=25)
@given(masks=masks(), size=st.tuples(st.integers(2, 4), st.integers(2, 4)), seed=st.integers(0, 99))
def test_causality_is_judged_rightly(masks: tuple[Tensor, ...], size: tuple[int, int], seed: int) -> None:
    """The planner refuses just those masks for which some parameter moves when a value not yet drawn changes."""
    case = Case(
        "masks",
        lambda: randomise(MaskedNet(masks, 4), seed, 2.0),
        (1, *size),
        Categorical(4, encode="symmetric", params="B(n*C)*"),
    )
    if reads_the_future(case):
        with pytest.raises(NotCausalError, match=r"parameters of step \d+ .* depend on the value drawn at step"):
            compile_case(case)
    else:
        assert compile_case(case, verify=True).verify().ok


def reads_the_future(case: Case) -> bool:
    """By gradients in float64, which are exactly zero where there is no path."""
    model = case.build().double().eval()
    x = case.to_input(case.random_values(1, torch.Generator().manual_seed(2))).double().requires_grad_()
    theta = case.head.parameters_of(model(x), case.channels, case.sites).reshape(case.steps, -1)
    for t in range(case.steps):
        (slope,) = torch.autograd.grad(theta[t].sum(), x, retain_graph=True)
        if bool((slope.reshape(-1)[t:] != 0).any()):
            return True
    return False
