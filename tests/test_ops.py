"""fastgen.ops on the CPU: the custom ops against their references, gradients, what torch asks of an op, and errors."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastgen import heads, ops
from fastgen.errors import ShapeError
from fastgen.ops import dispatch
from tests.kernel_shapes import LAYERS

Call = Callable[..., Any]


def rand(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0, grad: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)


def conv_inputs(dtype: torch.dtype = torch.float64, gate: str = "tanh", elu: bool = True) -> dict[str, Tensor]:
    n, inputs = 3 if gate == "none" else 6, 4 if elu else 2
    shapes = {
        "x": (2, 2, 4, 5),
        "weight": (n, inputs, 2, 3),
        "bias": (n,),
        "cond": (2, n, 1, 1),
        "residual": (2, 3, 4, 5),
    }
    return {k: rand(*s, dtype=dtype, seed=i) for i, (k, s) in enumerate(shapes.items())}


PADS = (1, 1, 1, 0)
CASES: dict[str, tuple[Call, Call, dict[str, Tensor], dict[str, Any]]] = {
    **{
        f"gated_conv2d {gate} {'elu' if elu else 'plain'}": (
            ops.gated_conv2d, ops.gated_conv2d_reference, conv_inputs(gate=gate, elu=elu),
            dict(pads=PADS, gate=gate, elu=elu),
        )
        for gate in ("tanh", "linear", "none")
        for elu in (False, True)
    },
    "gated_conv2d strided, cropped, cond map": (
        ops.gated_conv2d, ops.gated_conv2d_reference,
        {"x": rand(2, 2, 7, 6), "weight": rand(6, 2, 2, 2), "cond": rand(2, 6, 3, 3)},
        dict(pads=(0, 1, 0, -1), stride=(2, 2), dilation=(1, 2)),
    ),
    "gated_conv1d": (
        ops.gated_conv1d, ops.gated_conv1d_reference,
        {"x": rand(2, 3, 7), "weight": rand(6, 3, 2), "bias": rand(6), "cond": rand(2, 6, 7)}, dict(dilation=2),
    ),
    "wavenet_layer": (
        ops.wavenet_layer, ops.wavenet_layer_reference,
        {"x": rand(2, 3, 7), "weight": rand(4, 3, 2), "bias": rand(4), "out_weight": rand(5, 2), "out_bias": rand(5),
         "cond": rand(2, 4, 1)}, dict(residual_scale=0.5),
    ),
    "linear_elu": (
        ops.linear_elu, ops.linear_elu_reference,
        {"x": rand(3, 2), "weight": rand(6, 4), "bias": rand(6), "residual": rand(3, 3)}, dict(gate="linear"),
    ),
    "linear_elu of one input": (
        ops.linear_elu, ops.linear_elu_reference, {"x": rand(3, 1), "weight": rand(2, 1)}, dict(elu=False),
    ),
}  # fmt: skip


def grads_of(y: Any, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
    parts = y if isinstance(y, tuple) else (y,)
    return torch.autograd.grad(sum((p * p).sum() for p in parts), list(tensors.values()))


@pytest.mark.parametrize("name", CASES)
def test_ops_equal_their_references(name: str) -> None:
    function, reference, tensors, options = CASES[name]
    found, wanted = function(**tensors, **options), reference(**tensors, **options)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(grads_of(found, tensors), grads_of(wanted, tensors))


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name: str) -> None:
    function, _, tensors, options = CASES[name]
    assert torch.autograd.gradcheck(
        lambda *v: function(**dict(zip(tensors, v, strict=True)), **options), [*tensors.values()]
    )


@pytest.mark.parametrize("levels", [None, 4])
@pytest.mark.parametrize(("channels", "size"), [(1, 6), (3, 20)])
def test_gradcheck_of_log_prob(channels: int, size: int, levels: int | None) -> None:
    params = rand(2, 4, size)
    x = torch.tensor([-1.0, -1 / 3, 1 / 3, 1.0], dtype=torch.float64)[:, None].expand(2, 4, channels)
    assert torch.autograd.gradcheck(lambda p: ops.logistic_mixture_log_prob(p, x, levels=levels), params)


@pytest.mark.parametrize("name", CASES)
def test_the_layout_of_x_is_kept(name: str) -> None:
    function, _, tensors, options = CASES[name]
    if tensors["x"].dim() != 4:
        return
    for form in (torch.contiguous_format, torch.channels_last):
        given = {k: v.detach().contiguous(memory_format=form) if v.dim() == 4 else v for k, v in tensors.items()}
        x = given["x"].requires_grad_()
        y = function(**given, **options)
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert y.is_contiguous(memory_format=form)
        assert grad.is_contiguous(memory_format=form)


@pytest.mark.parametrize("gate", ["linear", "none"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck_of_gated_conv(gate: str, channels_last: bool) -> None:
    t = conv_inputs(torch.float32, gate)
    form = torch.channels_last if channels_last else torch.contiguous_format
    x = t["x"].detach().contiguous(memory_format=form).requires_grad_()
    how = ([*PADS, 1, 1, 1, 1, 0], gate, True, channels_last)
    args = (x, t["weight"], t["bias"], t["cond"], t["residual"], *how, gate != "none")
    torch.library.opcheck(torch.ops.fastgen.gated_conv.default, args)
    y, pre = torch.ops.fastgen.gated_conv.default(*args)
    needs = [True, False, True, True]
    args = (y.detach(), x.detach(), t["weight"].detach(), pre.detach(), 1, *how, needs)
    torch.library.opcheck(torch.ops.fastgen.gated_conv_backward.default, args)


def test_opcheck_of_the_other_ops() -> None:
    f32 = torch.float32
    h, weight, x = rand(2, 3, 1, 5, dtype=f32), rand(6, 3, 1, 1, dtype=f32), rand(2, 4, 1, 5, dtype=f32)
    skip = (h, weight, rand(6, dtype=f32), x, 0.5, False)
    back = (
        x.detach(),
        rand(2, 2, 1, 5, dtype=f32, grad=False),
        h.detach(),
        weight.detach(),
        0.5,
        False,
        [True, True, False],
    )
    params, value = rand(2, 5, 30, dtype=f32), torch.zeros(2, 5, 3)
    numbers = (5, 6, 7, 8, 1.0)
    fastgen_ops = torch.ops.fastgen
    for op, args in (
        (fastgen_ops.residual_skip, skip),
        (fastgen_ops.residual_skip_backward, back),
        (fastgen_ops.logistic_mixture_log_prob, (params, value, 256, -7.0)),
        (fastgen_ops.logistic_mixture_log_prob_backward, (torch.ones(2, 5), params.detach(), value, 256, -7.0)),
        (fastgen_ops.draw_logistic_mixture, (params.detach(), *numbers, 3, 256, -7.0)),
        (fastgen_ops.draw_categorical, (params.detach(), *numbers)),
    ):
        torch.library.opcheck(op.default, args)


def test_a_gradient_of_a_gradient_is_refused() -> None:
    t = conv_inputs()
    (grad,) = torch.autograd.grad(ops.gated_conv2d(**t, pads=PADS, elu=True).sum(), t["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="gated_conv_backward"):
        torch.autograd.grad(grad.sum(), t["weight"])


# ---- around an op ------------------------------------------------------------------------------------------
def test_autocast_converts_as_convolutions_do() -> None:
    t = conv_inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.gated_conv2d(**t, pads=PADS, elu=True)
        plain = ops.gated_conv2d(**{k: v for k, v in t.items() if k != "residual"}, pads=PADS, elu=True)
        rows = ops.linear_elu(torch.zeros(3, 4), torch.zeros(2, 8))
        signal = ops.wavenet_layer(torch.zeros(1, 2, 5), torch.zeros(4, 2, 2), None, torch.zeros(3, 2), None)
    assert (y.dtype, plain.dtype, rows.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    assert [s.dtype for s in signal] == [torch.float32, torch.bfloat16]
    half = {k: v.detach().bfloat16() for k, v in t.items()}
    expected = ops.gated_conv2d_reference(**{k: v for k, v in half.items() if k != "residual"}, pads=PADS, elu=True)
    torch.testing.assert_close(plain, expected)
    assert all(g.dtype == torch.float32 for g in grads_of(y, t))


@pytest.mark.parametrize("dynamic", [False, True])
def test_ops_compile_in_one_graph(dynamic: bool) -> None:
    """AOT autograd with real graphs; the code generator behind it is not ours to test."""
    t = conv_inputs(torch.float32)
    params, value = rand(2, 4, 5, 30, dtype=torch.float32), torch.zeros(2, 4, 5, 3)

    def loss(t: dict[str, Tensor], params: Tensor) -> Tensor:
        y = ops.gated_conv2d(**t, pads=PADS, elu=True)
        y = y + ops.linear_elu(y.flatten(1), t["weight"].flatten(1).new_ones(60, 120)).view_as(y)
        return y.square().sum() - ops.logistic_mixture_log_prob(params, value).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    leaves = [*t.values(), params]
    found, wanted = compiled(t, params), loss(t, params)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(found, leaves), torch.autograd.grad(wanted, leaves))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(t, params), loss(t, params))


def test_checkpointing_makes_the_same_gradients() -> None:
    t = conv_inputs()
    run = lambda x: ops.gated_conv2d(**{**t, "x": x}, pads=PADS, elu=True)  # noqa: E731
    torch.testing.assert_close(grads_of(checkpoint(run, t["x"], use_reentrant=False), t), grads_of(run(t["x"]), t))


def test_nothing_is_kept_without_gradients() -> None:
    t = conv_inputs(torch.float32)
    with torch.no_grad():
        assert not ops.gated_conv2d(**t, pads=PADS, elu=True).requires_grad
    y = ops.gated_conv2d(**{k: v.detach() for k, v in t.items()}, pads=PADS, elu=True)
    assert not y.requires_grad


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_named_layers_have_the_shapes_they_say(layer: Any) -> None:
    """What bench.layers times: on the meta device, fused and plain agree."""
    tensors = {k: v.to("meta").requires_grad_() for k, v in layer.tensors(2, torch.float32).items()}
    fused, plain = layer.run(tensors, fused=True), layer.run(tensors, fused=False)
    assert fused.shape == plain.shape
    assert layer.op == "wavenet" or fused.shape == layer.y(2)


# ---- mixtures and draws ------------------------------------------------------------------------------------
def test_log_prob_is_that_of_the_head() -> None:
    head = heads.LogisticMixture(3, levels=256)
    params, x = rand(2, 30, 4, 5, dtype=torch.float32).movedim(1, -1), torch.zeros(2, 4, 5, 3)
    torch.testing.assert_close(ops.logistic_mixture_log_prob(params, x), head.log_prob(params, x))
    half = ops.logistic_mixture_log_prob(params.bfloat16(), x)
    assert half.dtype == torch.float32
    assert ops.logistic_mixture_log_prob(params.double(), x.double()).dtype == torch.float64
    torch.testing.assert_close(half, head.log_prob(params.bfloat16().float(), x))


@pytest.mark.parametrize("levels", [256, 2, None])
@pytest.mark.parametrize(("channels", "size"), [(1, 15), (3, 50)])
def test_the_gradient_of_log_prob_is_that_of_the_head(channels: int, size: int, levels: int | None) -> None:
    """At the ends of the range, below the floor, and far from everything: autograd through the head's formulas."""
    params = torch.cat([rand(30, size, grad=False) * scale for scale in (0.1, 1, 10)]).requires_grad_()
    x = torch.linspace(-1, 1, 90, dtype=torch.float64)[:, None].expand(90, channels)
    if levels is not None:
        x = ((x + 1) * (levels - 1) / 2).round() / ((levels - 1) / 2) - 1
    seed = rand(90, grad=False)
    (found,) = torch.autograd.grad(ops.logistic_mixture_log_prob(params, x, levels=levels), params, seed)
    wanted = torch.autograd.grad(heads.LogisticMixture(5, levels).log_prob(params, x), params, seed)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("draw", ["mixture", "class"])
def test_draws_are_named_by_sample_and_step(draw: str) -> None:
    """In pieces, one step at a time or all at once: the same draws, and those of the head."""
    params = rand(4, 5, 30, dtype=torch.float32, grad=False)

    def run(p: Tensor, first: int, step: int) -> Tensor:
        if draw == "class":
            return ops.draw_categorical(p, 3, first, step, 0.8)
        return ops.draw_logistic_mixture(p, 3, first, step, 0.8, channels=3)

    whole = run(params, 10, 20)
    assert torch.equal(run(params[2:], 12, 20), whole[2:])
    for s in range(5):
        assert torch.equal(run(params[:, s].contiguous(), 10, 20 + s), whole[:, s])
    head = heads.Categorical(30) if draw == "class" else heads.LogisticMixture(3)
    from fastgen.rng import uniforms

    u = uniforms(3, torch.arange(10, 14), torch.arange(20, 25), head.num_uniforms(3))
    assert torch.equal(whole.float(), head.draw(params, u, 0.8).view_as(whole))


# ---- which implementation ----------------------------------------------------------------------------------
def test_the_choice_follows_device_and_dtype_alone() -> None:
    assert ops.kernel_for("cpu", torch.float32).name == "torch"
    assert "cpu" in ops.kernel_for("cpu", torch.float32).reason
    assert "float64" in ops.kernel_for("cuda", torch.float64).reason
    with dispatch.interpreted():
        assert ops.kernel_for("cpu", torch.float32).name == "triton"
        assert ops.kernel_for("cpu", torch.float64).name == "torch"
    assert ops.kernel_for("cpu", torch.float32).name == "torch"


@pytest.mark.parametrize(
    ("capability", "installed", "name", "reason"),
    [((9, 0), True, "triton", "9.0"), ((7, 5), True, "torch", "7.5"), ((9, 0), False, "torch", "not installed")],
)
def test_the_choice_on_a_gpu(
    capability: tuple[int, int], installed: bool, name: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda module: object() if installed else None)
    dispatch._of_device.cache_clear()
    choice = ops.kernel_for("cuda:0", torch.bfloat16)
    dispatch._of_device.cache_clear()
    assert choice.name == name
    assert reason in choice.reason


def test_triton_is_optional() -> None:
    """Without triton the package imports and the operations run."""
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, fastgen, fastgen.ops as ops\n"
        "x = torch.randn(2, 3, 4, 5, requires_grad=True)\n"
        "ops.gated_conv2d(x, torch.randn(8, 3, 2, 2)).sum().backward()\n"
        "assert not [m for m in sys.modules if m.startswith('fastgen.kernels')]\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- errors ------------------------------------------------------------------------------------------------
X, W = torch.zeros(2, 3, 6, 5), torch.zeros(8, 3, 2, 2)
S, V = torch.zeros(2, 3, 7), torch.zeros(8, 3, 2)
P, Y = torch.zeros(4, 30), torch.zeros(4, 1)
BAD: list[tuple[str, Call, tuple[type[Exception], str]]] = [
    ("rank", lambda: ops.gated_conv2d(X[0], W), (ShapeError, r"x is float32 \[3, 6, 5\], expected floating-point \[B, Cin, H, W\]")),
    ("integers", lambda: ops.gated_conv2d(X.long(), W), (ShapeError, "x is int64")),
    ("channels", lambda: ops.gated_conv2d(X, W[:, :2]), (ShapeError, r"weight is float32 \[8, 2, 2, 2\], expected \[2C, 3, kh, kw\]")),
    ("elu", lambda: ops.gated_conv2d(X, W, elu=True), (ShapeError, r"expected \[2C, 6, kh, kw\] \(concat_elu of 3")),
    ("odd", lambda: ops.gated_conv2d(X, W[:7]), (ShapeError, r"\[7, 3, 2, 2\], expected \[2C")),
    ("gate", lambda: ops.gated_conv2d(X, W, gate="glu"), (ValueError, "gate='glu', expected one of 'tanh', 'linear', 'none'")),
    ("bias", lambda: ops.gated_conv2d(X, W, torch.zeros(4)), (ShapeError, r"bias is float32 \[4\], expected \[8\]")),
    ("dtype", lambda: ops.gated_conv2d(X, W.half()), (ShapeError, "weight is float16 .* and x float32 .*, expected one dtype")),
    ("device", lambda: ops.gated_conv2d(X, W.to("meta")), (ShapeError, "weight is on meta and x on cpu, expected one device")),
    ("strides", lambda: ops.gated_conv2d(X[..., ::2], W), (ShapeError, "expected a contiguous or channels-last tensor")),
    ("transposed", lambda: ops.gated_conv2d(X.transpose(2, 3), W), (ShapeError, "contiguous or channels-last")),
    ("pads", lambda: ops.gated_conv2d(X, W, pads=(1, 1)), (ValueError, r"pads=\(1, 1\), expected 4 integers")),
    ("stride", lambda: ops.gated_conv2d(X, W, stride=(0, 1)), (ValueError, r"stride=\(0, 1\), expected 2 integers of at least 1")),
    ("kernel", lambda: ops.gated_conv2d(X, W, dilation=(9, 1)), (ShapeError, r"covers \[10, 2\], expected no more than the padded input \[6, 5\]")),
    ("cond", lambda: ops.gated_conv2d(X, W, cond=torch.zeros(2, 8, 6, 5)), (ShapeError, r"expected \[2, 8, 1, 1\] or \[2, 8, 5, 4\]")),
    ("residual", lambda: ops.gated_conv2d(X, W, residual=X), (ShapeError, r"residual is .*, expected \[2, 4, 5, 4\]")),
    ("residual dtype", lambda: ops.gated_conv2d(X, W, residual=torch.zeros(2, 4, 5, 4).double()), (ShapeError, "one dtype")),
    ("1-D rank", lambda: ops.gated_conv1d(X, V), (ShapeError, r"expected floating-point \[B, Cin, T\]")),
    ("1-D weight", lambda: ops.gated_conv1d(S, V[:, :1]), (ShapeError, r"expected \[2C, 3, k\]")),
    ("1-D dilation", lambda: ops.gated_conv1d(S, V, dilation=0), (ValueError, "dilation")),
    ("1-D cond", lambda: ops.gated_conv1d(S, V, cond=torch.zeros(2, 8, 3)), (ShapeError, r"expected \[2, 8, 1\] or \[2, 8, 7\]")),
    ("1-D empty", lambda: ops.gated_conv1d(S[..., :0], V), (ShapeError, "no more than the padded input")),
    ("1-D strides", lambda: ops.gated_conv1d(S[..., ::2], V), (ShapeError, "contiguous")),
    ("skip", lambda: ops.wavenet_layer(S, V, None, torch.zeros(3, 4), None), (ShapeError, r"out_weight is .*, expected \[R \+ S, 4\] with S > 0")),
    ("skip channels", lambda: ops.wavenet_layer(S, V, None, torch.zeros(5, 3), None), (ShapeError, r"expected \[5, 4, 1\]")),
    ("rows", lambda: ops.linear_elu(X, W), (ShapeError, r"expected floating-point \[N, K\]")),
    ("row weight", lambda: ops.linear_elu(P, torch.zeros(4, 30)), (ShapeError, r"expected \[M, 60\]")),
    ("row strides", lambda: ops.linear_elu(P.t(), torch.zeros(4, 8)), (ShapeError, "expected a contiguous tensor")),
    ("row residual", lambda: ops.linear_elu(P, torch.zeros(4, 60), residual=P), (ShapeError, r"expected \[4, 4\]")),
    ("parameters", lambda: ops.logistic_mixture_log_prob(P[:, :29], Y), (ShapeError, r"expected floats \[\.\.\., 3 \* mixtures\]")),
    ("channels of x", lambda: ops.logistic_mixture_log_prob(P, torch.zeros(4, 2)), (ShapeError, "2 value channels, expected 1 or 3")),
    ("lead of x", lambda: ops.logistic_mixture_log_prob(P, Y[:3]), (ShapeError, "same leading axes")),
    ("gradient of x", lambda: ops.logistic_mixture_log_prob(P, Y.clone().requires_grad_()), (ValueError, "x requires a gradient")),
    ("levels", lambda: ops.logistic_mixture_log_prob(P, Y, levels=1), (ValueError, "levels=1")),
    ("seed", lambda: ops.draw_categorical(P, 2**64), (ValueError, "seed")),
    ("seed type", lambda: ops.draw_categorical(P, 1.5), (TypeError, "seed")),
    ("first", lambda: ops.draw_categorical(P, 1, -1), (ValueError, "first=-1")),
    ("step", lambda: ops.draw_categorical(P, 1, 0, 2**32), (ValueError, "step=4294967296")),
    ("temperature", lambda: ops.draw_categorical(P, 1, temperature=0.0), (ValueError, "temperature=0.0")),
    ("draw strides", lambda: ops.draw_categorical(P.t(), 1), (ShapeError, "expected contiguous")),
    ("draw rank", lambda: ops.draw_categorical(P[0], 1), (ShapeError, r"expected floats \[n, P\] or \[n, S, P\]")),
    ("draw channels", lambda: ops.draw_logistic_mixture(P, 1, channels=2), (ShapeError, "2 value channels")),
]  # fmt: skip


@pytest.mark.parametrize(("call", "expected"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_arguments(call: Call, expected: tuple[type[Exception], str]) -> None:
    with pytest.raises(expected[0], match=expected[1]):
        call()
    with dispatch.interpreted(), pytest.raises(expected[0], match=expected[1]):
        call()  # where kernels run, the same, before a launch


@pytest.mark.parametrize("size", [2**31, 2**30])
def test_a_sample_beyond_32_bits_is_refused(size: int) -> None:
    x = torch.empty(1, 1, 1, size, device="meta")
    with pytest.raises(ShapeError, match="more than 2\\*\\*31 - 1 values"):
        ops.gated_conv2d(x, torch.empty(4, 1, 1, 1, device="meta"))
