"""Random networks: stepping equals forward for whatever hypothesis can put together, and causality is judged rightly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastgen.heads import Bernoulli, Categorical, GaussianMixture, Head, LogisticMixture
from tests.cases import Case, randomise
from tests.oracle import compile_case, parameters, run_given

SETTINGS = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
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
    (GaussianMixture(1), 1, 2),
]


def check(case: Case) -> None:
    """Both executors verify, and step as forward does through values of our own."""
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
        )
    )
