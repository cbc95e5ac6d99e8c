"""Layers of fastgen.nn: torch.nn's weights, what they read, every way in which people train with them, and bad input.

"op" runs what a GPU would run as far as the registered op and its own backward; "plain" is what the CPU chooses.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

import fastgen
from fastgen import ops
from fastgen.errors import ShapeError
from fastgen.heads import Bernoulli, LogisticMixture
from fastgen.nn import (
    CausalConv1d,
    DownRightShiftedConv2d,
    DownRightShiftedConvTranspose2d,
    DownShiftedConv2d,
    DownShiftedConvTranspose2d,
    GatedConv2d,
    GatedResidual1d,
    MaskedConv2d,
    MaskedLinear,
    use_kernels_,
)
from fastgen.nn.choice import Deciding
from fastgen.ops import KernelChoice

IMAGE, SEQUENCE = (2, 6, 5, 7), (2, 6, 9)
MASK = torch.tril(torch.ones(4, 6))
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Callable[[], nn.Module]]] = {
    # layer, shape of its input, the torch.nn layer with the same weights
    "masked-A": (lambda: MaskedConv2d(6, 9, 3, "A", channel_groups=3), IMAGE, lambda: nn.Conv2d(6, 9, 3)),
    "masked-row": (lambda: MaskedConv2d(6, 4, (1, 5), gate="tanh"), IMAGE, lambda: nn.Conv2d(6, 8, (1, 5))),
    "masked-dilated": (lambda: MaskedConv2d(6, 4, (3, 5), dilation=2), IMAGE, lambda: nn.Conv2d(6, 4, (3, 5))),
    "down": (lambda: DownShiftedConv2d(6, 4, (2, 3), gate="linear", elu=True), IMAGE, lambda: nn.Conv2d(12, 8, (2, 3))),
    "down-A": (lambda: DownShiftedConv2d(6, 4, (3, 3), mask="A"), IMAGE, lambda: nn.Conv2d(6, 4, 3)),
    "down-strided": (lambda: DownShiftedConv2d(6, 4, (2, 3), stride=2), IMAGE, lambda: nn.Conv2d(6, 4, (2, 3))),
    "right": (lambda: DownRightShiftedConv2d(6, 4, 2, dilation=(1, 2)), IMAGE, lambda: nn.Conv2d(6, 4, 2)),
    "right-A": (lambda: DownRightShiftedConv2d(6, 4, (1, 2), mask="A"), IMAGE, lambda: nn.Conv2d(6, 4, (1, 2))),
    "gated": (lambda: GatedConv2d(6, 4, 3, padding=1), IMAGE, lambda: nn.Conv2d(6, 8, 3)),
    "gated-glu": (lambda: GatedConv2d(6, 4, 1, gate="linear", bias=False), IMAGE, lambda: nn.Conv2d(6, 8, 1, bias=False)),
    "down-up": (lambda: DownShiftedConvTranspose2d(6, 4, (2, 3)), IMAGE, lambda: nn.ConvTranspose2d(6, 4, (2, 3))),
    "right-up": (lambda: DownRightShiftedConvTranspose2d(6, 4, 3), IMAGE, lambda: nn.ConvTranspose2d(6, 4, 3)),
    "causal": (lambda: CausalConv1d(6, 4, 3, 2, gate="tanh"), SEQUENCE, lambda: nn.Conv1d(6, 8, 3)),
    "causal-plain": (lambda: CausalConv1d(6, 4, 2), SEQUENCE, lambda: nn.Conv1d(6, 4, 2)),
    "linear": (lambda: MaskedLinear(6, 4, MASK), (2, 3, 6), lambda: nn.Linear(6, 4)),
    "linear-gated": (lambda: MaskedLinear(6, 4, MASK, gate="linear", elu=True), (5, 6), lambda: nn.Linear(12, 8)),
}  # fmt: skip
FUSED = [name for name in LAYERS if name not in ("down-up", "right-up", "linear")]
ROUTES = ["plain", "op"]


def made(name: str, route: str = "plain") -> tuple[nn.Module, Tensor]:
    """A layer and an input, the same every time."""
    torch.manual_seed(1)
    layer, shape = LAYERS[name][0](), LAYERS[name][1]
    return on(layer, route), torch.randn(shape)


def on(model: nn.Module, route: str) -> nn.Module:
    """Lets the layers that have kernels run their op."""
    for m in model.modules():
        if route == "op" and isinstance(m, Deciding) and "NVIDIA" in m._fastgen_kernel.reason:
            m._fastgen_kernel = KernelChoice("triton", "this test")
    return model


def results(run: Callable[..., Any], layer: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """Output and gradients of everything."""
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs]
    outputs = run(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    total = sum((y.float() * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum() for y in outputs)
    return [*outputs, *torch.autograd.grad(total, [*leaves, *layer.parameters()])]


def agree(a: list[Tensor], b: list[Tensor], rtol: float = 1e-5) -> bool:
    return len(a) == len(b) and all(
        x.shape == y.shape and (x.float() - y.float()).abs().max() <= rtol * (1.0 + y.abs().max())
        for x, y in zip(a, b, strict=True)
    )


# ---- weights -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", LAYERS)
def test_weights_are_those_of_torch_nn(name: str) -> None:
    make, _, twin = LAYERS[name]
    torch.manual_seed(4)
    layer = make()
    torch.manual_seed(4)
    plain = twin()
    for key, value in plain.state_dict().items():
        assert torch.equal(layer.state_dict()[key], value), key
    assert list(layer.state_dict()) == list(plain.state_dict())
    layer.load_state_dict(twin().state_dict())
    plain.load_state_dict(layer.state_dict())
    assert isinstance(layer, type(plain))


@pytest.mark.parametrize("name", LAYERS)
def test_copies_and_pickles(name: str) -> None:
    layer, x = made(name)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
        assert str(twin) == str(layer)


# ---- what they compute -------------------------------------------------------------------------------------------
def test_masked_convolution_is_the_whole_one_with_zeros() -> None:
    """Against nn.Conv2d with its padding and a mask written down by hand."""
    for mask, centre in (("A", 0.0), ("B", 1.0)):
        layer = MaskedConv2d(3, 4, (3, 5), mask, dilation=(1, 2))
        by_hand = torch.tensor([[1.0] * 5, [1, 1, centre, 0, 0], [0.0] * 5])
        x = torch.randn(2, 3, 6, 8)
        expected = F.conv2d(x, layer.weight * by_hand, layer.bias, padding=(1, 4), dilation=(1, 2))
        assert torch.allclose(layer(x), expected, atol=1e-6)


def test_gated_convolution_is_its_formula() -> None:
    x, cond, residual = torch.randn(2, 3, 5, 6), torch.randn(2, 8, 1, 1), torch.randn(2, 4, 5, 6)
    for gate in ("tanh", "linear"):
        layer = GatedConv2d(3, 4, (2, 3), padding=(1, 1, 1, 0), gate=gate, elu=True)  # type: ignore[arg-type]
        y = F.conv2d(F.pad(F.elu(torch.cat((x, -x), 1)), (1, 1, 1, 0)), layer.weight, layer.bias) + cond
        a, b = y[:, :4], y[:, 4:]
        expected = residual + (torch.tanh(a) if gate == "tanh" else a) * torch.sigmoid(b)
        assert torch.allclose(layer(x, cond, residual), expected, atol=1e-6)
        activated = F.elu(torch.cat((x, -x), 1))
        assert torch.equal(layer(activated, cond, residual, activated=True), layer(x, cond, residual))


@pytest.mark.parametrize(
    ("kind", "kernel", "left"), [(DownShiftedConvTranspose2d, (2, 3), 1), (DownRightShiftedConvTranspose2d, (5, 3), 0)]
)
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_transposed_is_the_whole_one_cropped(kind: Any, kernel: tuple[int, int], left: int, stride: int) -> None:
    layer = kind(3, 4, kernel, stride=stride)
    x = torch.randn(2, 3, 4, 5)
    whole = F.pad(F.conv_transpose2d(x, layer.weight, stride=stride), (0, stride, 0, stride))
    expected = whole[:, :, : 4 * stride, left : left + 5 * stride] + layer.bias[:, None, None]
    assert torch.allclose(layer(x), expected, atol=1e-6)
    assert torch.equal(layer(x, [4 * stride, 5 * stride]), layer(x))
    with pytest.raises(ShapeError, match="output_size"):
        layer(x, [4 * stride, 5 * stride + 1])


@pytest.mark.parametrize("route", ROUTES)
def test_residual_layer_is_its_formula(route: str) -> None:
    layer = on(GatedResidual1d(6, 4, 5, 2, 3, residual_scale=0.5), route)
    assert isinstance(layer, GatedResidual1d)
    x, cond = torch.randn(2, 6, 9), torch.randn(2, 8, 1)
    pre = F.conv1d(F.pad(x, (3, 0)), layer.dilated.weight, layer.dilated.bias, dilation=3) + cond
    h = torch.tanh(pre[:, :4]) * torch.sigmoid(pre[:, 4:])
    expected = ((x + layer.residual(h)) * 0.5, layer.skip(h))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(layer(x, cond), expected, strict=True))
    plain = copy.deepcopy(layer)
    use_kernels_(plain, "torch")
    assert agree(results(layer, layer, x, cond), results(plain, plain, x, cond))


def reads(layer: nn.Module, x: Tensor, site: tuple[int, ...], channels: slice = slice(None)) -> Tensor:
    """Which inputs [C, ...] the outputs of a site depend on: bool."""
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    y[(0, channels, *site)].sum().backward()
    assert leaf.grad is not None
    return leaf.grad[0] != 0


@pytest.mark.parametrize(
    ("make", "seen"),
    [  # rows and columns around the output's own pixel, marked o (seen) or . (hidden)
        (lambda: MaskedConv2d(2, 3, 3, "A"), "+++ +.- ---"),
        (lambda: MaskedConv2d(2, 3, 3, "B"), "+++ ++- ---"),
        (lambda: MaskedConv2d(2, 3, (1, 3), "B"), "--- ++- ---"),
        (lambda: DownShiftedConv2d(2, 3, (2, 3), mask="A"), "+++ -.- ---"),
        (lambda: DownShiftedConv2d(2, 3, (2, 3)), "+++ +++ ---"),
        (lambda: DownRightShiftedConv2d(2, 3, 2, mask="A"), "++- +.- ---"),
        (lambda: DownRightShiftedConv2d(2, 3, 2), "++- ++- ---"),
    ],
)
def test_what_an_output_reads(make: Callable[[], nn.Module], seen: str) -> None:
    expected = torch.zeros(7, 7, dtype=torch.bool)
    expected[2:5, 2:5] = torch.tensor([[c == "+" for c in row] for row in seen.split()])
    assert torch.equal(reads(make(), torch.randn(1, 2, 7, 7), (3, 3)).any(0), expected)


@pytest.mark.parametrize("mask", ["A", "B"])
def test_channel_groups_are_drawn_in_turn(mask: Any) -> None:
    """At the pixel itself: red reads nothing (A) or red (B), green also red, blue also green; halves of a gate alike."""
    layer = MaskedConv2d(6, 9, 3, mask, channel_groups=3, gate="tanh", elu=True)
    x = torch.randn(1, 6, 5, 5)
    for group in range(3):
        here = reads(layer, x, (2, 2), slice(3 * group, 3 * group + 3))[:, 2, 2]
        last = 2 * group + (2 if mask == "B" else 0)
        assert here[:last].all() and not here[last:].any()


def test_strided_layers_read_no_later_pixel() -> None:
    x = torch.randn(1, 2, 8, 8)
    for layer in (DownShiftedConv2d(2, 3, (2, 3), stride=2), DownRightShiftedConv2d(2, 3, 2, stride=2)):
        seen = reads(layer, x, (2, 2)).any(0)
        assert not seen[5:].any() and seen[4, 4]
        assert layer(x).shape == (1, 3, 4, 4)


# ---- the decision ------------------------------------------------------------------------------------------------
def test_kernel_is_decided_by_weights_alone() -> None:
    layer, x = made("gated")
    assert isinstance(layer, GatedConv2d)
    assert layer.kernel == ops.kernel_for("cpu", torch.float32)
    assert layer.kernel.name == "torch" and "this is cpu" in layer.kernel.reason
    before = layer.kernel
    layer(x[:1, :, :2])
    assert layer.kernel is before
    assert "float64" in layer.double().kernel.reason
    assert "this is cpu" in layer.float().kernel.reason
    layer.load_state_dict({k: v.double() for k, v in layer.state_dict().items()}, assign=True)
    assert "float64" in layer.kernel.reason
    assert "asked for" in use_kernels_(layer, "torch").kernel.reason  # type: ignore[union-attr,operator]
    assert use_kernels_(layer, "auto").kernel == ops.kernel_for("cpu", torch.float64)
    assert "no kernel of their own" in made("down-up")[0].kernel.reason  # type: ignore[union-attr,operator]
    assert "one matrix product" in made("linear")[0].kernel.reason  # type: ignore[union-attr,operator]
    with torch.device("meta"):
        assert "this is meta" in GatedConv2d(2, 2, 1).kernel.reason


@pytest.mark.parametrize("name", FUSED)
def test_the_op_is_called_where_it_is_chosen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for op in ("gated_conv2d", "gated_conv1d", "linear_elu"):
        whole = getattr(ops, op)
        monkeypatch.setattr(ops, op, lambda *a, whole=whole, **k: calls.append(1) or whole(*a, **k))
    for route, count in (("plain", 0), ("op", 1)):
        layer, x = made(name, route)
        layer(x)
        assert len(calls) == count


@pytest.mark.parametrize("name", FUSED)
def test_op_and_plain_agree(name: str) -> None:
    (plain, x), (layer, _) = made(name), made(name, "op")
    assert agree(results(layer, layer, x), results(plain, plain, x))


# ---- ways of training --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", FUSED)
def test_autocast(name: str, route: str) -> None:
    layer, x = made(name, route)
    expected = results(layer, layer, x)

    def run(*inputs: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return layer(*inputs)

    given = results(run, layer, x)
    assert given[0].dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in given[1:])
    assert agree(given, expected, 0.03)  # 2**-8 an operand


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", FUSED)
def test_compile_fullgraph(name: str, route: str) -> None:
    layer, x = made(name, route)
    torch.compiler.reset()  # layers of one class share a code object, and its limit of graphs
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert agree(results(compiled, layer, x), results(layer, layer, x))


@pytest.mark.parametrize("route", ROUTES)
def test_compile_with_dynamic_shapes(route: str) -> None:
    """One graph for every batch and size."""
    net = on(nn.Sequential(MaskedConv2d(2, 4, 3, "A"), GatedConv2d(4, 4, 1, elu=True)), route)
    torch.compiler.reset()
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend="aot_eager")
    x = torch.randn(5, 2, 7, 6)
    assert torch.allclose(compiled(x), net(x), atol=1e-6)
    x = torch.randn(3, 2, 9, 8)
    with torch.compiler.set_stance("fail_on_recompile"):
        y = compiled(x)
    assert torch.allclose(y, net(x), atol=1e-6)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", FUSED)
def test_gradient_checkpointing(name: str, route: str) -> None:
    layer, x = made(name, route)
    expected = results(layer, layer, x)
    given = results(lambda *a: checkpoint(layer, *a, use_reentrant=False), layer, x)
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", [n for n in FUSED if LAYERS[n][1] is IMAGE])
def test_channels_last(name: str, route: str) -> None:
    layer, x = made(name, route)
    expected = results(layer, layer, x)
    layer = on(layer.to(memory_format=torch.channels_last), route)
    given = results(layer, layer, x.to(memory_format=torch.channels_last))
    assert given[0].is_contiguous(memory_format=torch.channels_last)
    assert agree(given, expected)


# ---- models of these layers are sampled --------------------------------------------------------------------------
class Rgb(nn.Module):
    """Masked convolutions in three colour groups, a gate, a residual, half resolution and back."""

    def __init__(self) -> None:
        super().__init__()
        self.first = MaskedConv2d(3, 6, 3, "A", channel_groups=3)
        self.mid = weight_norm(MaskedConv2d(6, 6, 3, channel_groups=3, gate="tanh", elu=True))
        self.down = DownRightShiftedConv2d(3, 4, 2, stride=2, mask="A")
        self.up = DownRightShiftedConvTranspose2d(4, 6, 2)
        self.out = MaskedConv2d(6, 3, 1, channel_groups=3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = self.mid(h, None, h)
        far = self.up(self.down(F.pad(x, (2, -2))))  # blocks of two to the left: known to all of a block
        return self.out(h + far)


class Made(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        before, until = torch.tril(torch.ones(5, 5), -1), torch.tril(torch.ones(5, 5))
        self.hidden, self.out = MaskedLinear(5, 5, before, gate="tanh"), MaskedLinear(5, 5, until, elu=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.hidden(x))


class Audio(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = CausalConv1d(1, 4, 2)
        self.layers = nn.ModuleList(GatedResidual1d(4, 4, 6, 2, d) for d in (1, 2, 4))

    def forward(self, x: Tensor) -> Tensor:
        h, total = self.first(F.pad(x, (1, -1))), torch.zeros(())
        for layer in self.layers:
            h, skip = layer(h)
            total = total + skip
        return total


@pytest.mark.parametrize(
    ("make", "shape", "head", "layout"),
    [(Rgb, (3, 6, 6), Bernoulli(), "CHW"), (Made, (5,), Bernoulli(), "T"), (Audio, (1, 40), LogisticMixture(2), "CT")],
)
def test_stepping_equals_forward(make: Callable[[], nn.Module], shape: tuple[int, ...], head: Any, layout: Any) -> None:
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    sampler = fastgen.compile(model, shape, head, layout=layout, verify=False)
    report = sampler.verify()
    assert report.ok, report


# ---- bad input ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("route", ROUTES)
def test_bad_input_is_one_clear_error(route: str) -> None:
    conv, x = made("gated", route)
    causal, s = made("causal", route)
    for layer, given, message in (
        (conv, x[:, :5], r"GatedConv2d: x is float32 \[2, 5, 5, 7\], expected 6 channels, \[B, Cin, H, W\]"),
        (conv, x[0], r"GatedConv2d: x is float32 \[6, 5, 7\], expected floating-point \[B, Cin, H, W\]"),
        (conv, x.long(), r"GatedConv2d: x is int64 \[2, 6, 5, 7\], expected floating-point"),
        (conv, x.double(), r"GatedConv2d: x is float64 .* and the weights torch.float32, expected one dtype; convert"),
        (conv, x.to("meta"), r"GatedConv2d: x is on meta and the weights on cpu, expected one device"),
        (causal, s[:, :5], r"CausalConv1d: x is float32 \[2, 5, 9\], expected 6 channels"),
        (causal, s.half(), r"CausalConv1d: x is float16 .*expected one dtype"),
        (
            made("linear-gated", route)[0],
            torch.randn(2, 5),
            r"MaskedLinear: x is float32 \[2, 5\], expected .* \[..., 6\]",
        ),
        (made("down-up", route)[0], x[:, :5], r"DownShiftedConvTranspose2d: x is .* expected 6 channels"),
    ):
        with pytest.raises(ShapeError, match=message):
            layer(given)
    with pytest.raises(ShapeError, match=r"cond is float32 \[2, 4, 1, 1\], expected \[2, 8, 1, 1\] or \[2, 8, 5, 7\]"):
        conv(x, torch.randn(2, 4, 1, 1))
    with pytest.raises(ShapeError, match=r"residual is float32 \[2, 8, 5, 7\], expected \[2, 4, 5, 7\]"):
        conv(x, None, torch.randn(2, 8, 5, 7))
    with pytest.raises(ShapeError, match=r"cond is float32 \[2, 8, 8\], expected \[2, 8, 1\] or \[2, 8, 9\]"):
        causal(s, torch.randn(2, 8, 8))


def test_strided_input_is_refused_by_the_op_alone() -> None:
    plain, layer = made("gated")[0], made("gated", "op")[0]
    strided = torch.randn(2, 6, 5, 14)[..., ::2]
    assert plain(strided).shape == (2, 4, 5, 7)
    with pytest.raises(
        ShapeError, match=r"has strides .* expected a contiguous or channels-last tensor; call .contiguous"
    ):
        layer(strided)


def test_impossible_layers_are_refused() -> None:
    for mask in ("A", "B"):
        with pytest.raises(ShapeError, match=r"MaskedConv2d: kernel_size=\(3, 4\), expected odd sides"):
            MaskedConv2d(2, 2, (3, 4), mask)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="MaskedConv2d: mask='C', expected 'A' or 'B'"):
        MaskedConv2d(2, 2, 3, "C")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="MaskedConv2d: 3 and 4 channels, expected multiples of channel_groups=3"):
        MaskedConv2d(3, 4, 3, channel_groups=3)
    for kind in (DownShiftedConv2d, DownShiftedConvTranspose2d):
        with pytest.raises(ShapeError, match="expected an odd width: it is centred"):
            kind(2, 2, (2, 2))
    with pytest.raises(ShapeError, match=r"MaskedLinear: mask is \[6, 4\], expected \[4, 6\]"):
        MaskedLinear(6, 4, MASK.t())
    for make in (
        lambda: GatedConv2d(2, 2, 1, gate="relu"),  # type: ignore[arg-type]
        lambda: CausalConv1d(2, 2, 1, gate="relu"),  # type: ignore[arg-type]
        lambda: MaskedLinear(6, 4, MASK, gate="relu"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match="gate='relu', expected one of 'tanh', 'linear', 'none'"):
            make()
