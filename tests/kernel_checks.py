"""What every Triton kernel must do, run by Triton's interpreter on the CPU: values and gradients against float64.

Runs in a process of its own, as TRITON_INTERPRET=1 must be set before triton is imported: tests/test_kernels.py starts
it, or by hand `TRITON_INTERPRET=1 pytest tests/kernel_checks.py`. Inputs lie between NaNs, so that a read out of bounds
shows, and memory that torch hands out is filled with NaN, so that what is never written shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastgen import heads, ops
from fastgen.errors import ShapeError
from fastgen.kernels import common, conv, conv_grad, draw, mixture
from fastgen.ops.dispatch import interpreted
from tests.kernel_compare import check_draws, check_log_prob, mixture_case

SETTINGS = settings(max_examples=16, deadline=None, derandomize=True)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WALL = 64

pytestmark = pytest.mark.skipif(not common.INTERPRETED, reason="needs TRITON_INTERPRET=1 from the start of the process")


@pytest.fixture(autouse=True, scope="module")
def _poisoned() -> Iterator[None]:
    """Fresh memory is NaN, and CPU tensors go to the kernels."""
    torch.use_deterministic_algorithms(True)
    assert bool(torch.empty(9).isnan().all())
    with interpreted():
        yield
    torch.use_deterministic_algorithms(False)


def walled(t: Tensor, channels_last: bool = False) -> Tensor:
    """A copy of t whose memory has NaN on both sides."""
    if channels_last and t.dim() in (3, 4):
        return walled(t.movedim(1, -1)).movedim(-1, 1)
    buffer = torch.full((t.numel() + 2 * WALL,), math.nan, dtype=t.dtype)
    inner = buffer[WALL : WALL + t.numel()].view(t.shape)
    inner.copy_(t)
    return inner


def walls_stand(t: Tensor) -> bool:
    """Whether nothing was written beside what `walled` returned."""
    buffer = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
    return bool(torch.cat((buffer[:WALL], buffer[-WALL:])).isnan().all())


def compare(
    fused: Callable[..., Any], reference: Callable[..., Any], tensors: dict[str, Tensor], summed: dict[str, int]
) -> None:
    """Values and all gradients of `fused` against `reference` in float64 from the same numbers.

    Allowed, in units of the dtype's rounding step: four (inputs of a product, what is kept, the gradient in front of
    the gate, the result; the interpreter truncates), and a random walk of float32 over the terms of a sum; times the
    largest value and what a sum of so many unit terms (`summed`, else 1) typically is.
    """
    ours = {k: v.requires_grad_() for k, v in tensors.items()}
    exact = {k: v.detach().double().requires_grad_() for k, v in tensors.items()}
    y, expected = fused(**ours), reference(**exact)
    y, expected = [v if isinstance(v, tuple) else (v,) for v in (y, expected)]
    seeds = [torch.randn(v.shape).to(v.dtype) for v in y]
    found = torch.autograd.grad(y, list(ours.values()), seeds)
    wanted = torch.autograd.grad(expected, list(exact.values()), [s.double() for s in seeds])
    pairs = {f"y{i}": pair for i, pair in enumerate(zip(y, expected, strict=True))}
    pairs = {k: (a.detach(), b.detach()) for k, (a, b) in pairs.items()}
    pairs |= dict(zip(tensors, zip(found, wanted, strict=True), strict=True))
    for name, (ours_, exact_) in pairs.items():
        assert ours_.shape == exact_.shape, name
        if not ours_.numel():
            continue
        terms = summed.get(name, 1)
        scale = float(exact_.abs().max()) + math.sqrt(terms)
        fan = max(v.numel() // max(1, v.shape[0]) for k, v in tensors.items() if "weight" in k)
        step = torch.finfo(ours_.dtype).eps
        low = max(torch.finfo(v.dtype).eps for v in (tensors["x"], ours_))
        allowed = scale * (4 * max(step, low) + torch.finfo(torch.float32).eps * math.sqrt(terms + fan))
        error = float((ours_.double() - exact_).abs().max())
        assert error <= allowed, f"{name}: {error:.3g} > {allowed:.3g} (dtype {ours_.dtype})"


def randn(shape: Sequence[int], dtype: torch.dtype, channels_last: bool, scale: float = 1.0) -> Tensor:
    return walled((torch.randn(*shape) * scale).to(dtype), channels_last)


# ---- convolutions ------------------------------------------------------------------------------------------
@SETTINGS
@given(st.data())
def test_gated_conv2d(data: st.DataObject) -> None:
    def pick(*values: Any) -> Any:
        return data.draw(st.sampled_from(values))

    torch.manual_seed(data.draw(st.integers(0, 1000)))
    batch, cin, c = pick(0, 1, 2, 3), pick(1, 3, 5, 33), pick(1, 2, 7, 40)
    h, w = pick(1, 5, 8, 11), pick(1, 4, 7, 13)
    kh, kw, stride, dilation = pick(1, 2, 3), pick(1, 2, 3), (pick(1, 2), pick(1, 1, 3)), (pick(1, 1, 2), pick(1, 2))
    gate, elu, dtype, last = pick("tanh", "linear", "none"), pick(False, True), pick(*DTYPES), pick(False, True)
    # Causal upwards, asymmetric, wide on the right, or cropping a row.
    top, left = (kh - 1) * dilation[0], (kw - 1) * dilation[1]
    pads = pick((left, 0, top, 0), (left // 2, left - left // 2, top + 1, -1), (0, left + 2, top, 1))
    if h + pads[2] + pads[3] <= top or w + pads[0] + pads[1] <= left:
        return
    options = dict(pads=pads, stride=stride, dilation=dilation, gate=gate, elu=elu)
    n, inputs = c * (1 if gate == "none" else 2), cin * (2 if elu else 1)
    make = {"x": (batch, cin, h, w), "weight": (n, inputs, kh, kw), "bias": (n,)}
    oh = (h + pads[2] + pads[3] - top - 1) // stride[0] + 1
    ow = (w + pads[0] + pads[1] - left - 1) // stride[1] + 1
    cond = pick("", "sample", "map")
    if cond:
        make["cond"] = (batch, n, *((1, 1) if cond == "sample" else (oh, ow)))
    if pick(False, True):
        make["residual"] = (batch, c, oh, ow)
    scale = (inputs * kh * kw) ** -0.5
    tensors = {k: randn(s, dtype, last and k != "weight", scale if k == "weight" else 1.0) for k, s in make.items()}
    if "residual" in tensors and pick(False, True):
        tensors["residual"] = tensors["residual"].float()  # beside a 16-bit x
    pixels = batch * oh * ow
    compare(
        lambda **t: ops.gated_conv2d(**t, **options),
        lambda **t: ops.gated_conv2d_reference(**t, **options),
        tensors,
        {"weight": pixels, "bias": pixels, "cond": oh * ow if cond == "sample" else 1, "x": n * kh * kw // inputs + 1},
    )


@SETTINGS
@given(st.data())
def test_wavenet_layer_and_gated_conv1d(data: st.DataObject) -> None:
    def pick(*values: Any) -> Any:
        return data.draw(st.sampled_from(values))

    torch.manual_seed(data.draw(st.integers(0, 1000)))
    batch, r, c, skip, t = pick(0, 1, 2), pick(1, 5, 34), pick(1, 6, 33), pick(1, 3, 35), pick(1, 7, 64, 70)
    k, dilation, dtype = pick(1, 2, 3), pick(1, 2, 8, 200), pick(*DTYPES)
    last, bias = pick(False, True), pick(False, True)
    make: dict[str, tuple[int, ...]] = {"x": (batch, r, t), "weight": (2 * c, r, k)}
    if bias:
        make["bias"] = (2 * c,)
    if pick(False, True):
        make["cond"] = (batch, 2 * c, pick(1, t))
    scales = {"weight": (r * k) ** -0.5, "out_weight": c**-0.5}
    sums = {"weight": batch * t, "bias": batch * t, "cond": t if make.get("cond", (0, 0, t))[2] == 1 else 1,
            "out_weight": batch * t, "out_bias": batch * t, "x": 2 * c * k // r + 2}  # fmt: skip

    def tensors() -> dict[str, Tensor]:
        return {n: randn(s, dtype, last and n in ("x", "cond"), scales.get(n, 1.0)) for n, s in make.items()}

    if pick(False, True):
        gate = pick("tanh", "linear", "none")
        compare(
            lambda **v: ops.gated_conv1d(**v, dilation=dilation, gate=gate),
            lambda **v: ops.gated_conv1d_reference(**v, dilation=dilation, gate=gate),
            tensors(),
            sums,
        )
        return
    make["out_weight"] = (r + skip, c)
    if bias:
        make["out_bias"] = (r + skip,)
    none = {} if bias else {"bias": None, "out_bias": None}
    options = dict(dilation=dilation, residual_scale=0.7)
    compare(
        lambda **v: ops.wavenet_layer(**v, **none, **options),
        lambda **v: ops.wavenet_layer_reference(**v, **none, **options),
        tensors(),
        sums,
    )


@SETTINGS
@given(
    n=st.sampled_from([0, 1, 16, 17, 130]),
    k=st.sampled_from([1, 5, 33]),
    m=st.sampled_from([1, 6, 70]),
    gate=st.sampled_from(["none", "tanh", "linear"]),
    elu=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    residual=st.booleans(),
)
def test_linear_elu(n: int, k: int, m: int, gate: str, elu: bool, dtype: torch.dtype, residual: bool) -> None:
    torch.manual_seed(n + k + m)
    rows, inputs = m * (1 if gate == "none" else 2), k * (2 if elu else 1)
    make = {"x": (n, k), "weight": (rows, inputs), "bias": (rows,)} | ({"residual": (n, m)} if residual else {})
    tensors = {name: randn(s, dtype, False, inputs**-0.5 if name == "weight" else 1.0) for name, s in make.items()}
    compare(
        lambda **t: ops.linear_elu(**t, gate=gate, elu=elu),
        lambda **t: ops.linear_elu_reference(**t, gate=gate, elu=elu),
        tensors,
        {"weight": n, "bias": n, "x": rows // inputs + 1},
    )


def test_narrow_columns() -> None:
    """160 channels are five narrow tiles, of inputs and of outputs."""
    torch.manual_seed(0)
    c, dtype = 160, torch.bfloat16
    assert common.choose(conv.TILES, dtype, (3, 2), c).n == 32
    make = {"x": (1, c, 3, 2), "weight": (2 * c, 2 * c, 1, 2), "bias": (2 * c,)}
    tensors = {k: randn(s, dtype, True, (4 * c) ** -0.5 if k == "weight" else 1.0) for k, s in make.items()}
    options = dict(pads=(1, 0, 0, 0), gate="linear", elu=True)
    compare(
        lambda **t: ops.gated_conv2d(**t, **options),
        lambda **t: ops.gated_conv2d_reference(**t, **options),
        tensors,
        {"weight": 6, "bias": 6, "x": 4},
    )


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("gate", ["none", "tanh", "linear"])
def test_broken_numbers_go_through_elu(gate: str, broken: float) -> None:
    """What is not finite is so behind concat_elu, in values and gradients, where plain torch operations have it."""
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 5, 4), torch.randn(4, 6, 2, 2)
    x[1, 2, 3, 1] = broken
    found, wanted = [], []
    for into, dtype in ((found, torch.float32), (wanted, torch.float64)):  # there are no kernels for float64
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight)]
        y = ops.gated_conv2d(*leaves, pads=(1, 0, 1, 0), gate=gate, elu=True)
        into.extend((y.detach(), *torch.autograd.grad(y.sum(), leaves)))
    assert not all(bool(t.isfinite().all()) for t in wanted) and wanted[0].isfinite().any()
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("last", [False, True])
def test_bytes_do_not_depend_on_the_batch(last: bool) -> None:
    torch.manual_seed(0)
    x = randn((5, 6, 9, 7), torch.float32, last)
    weight = torch.randn(8, 12, 2, 3)
    run = lambda x: ops.gated_conv2d(x, weight, residual=x[:, :4], pads=(1, 1, 1, 0), elu=True)  # noqa: E731
    whole = run(x)
    for i in range(5):
        alone = x[i : i + 1].contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        assert torch.equal(run(alone)[0], whole[i])
    rows, weight = torch.randn(150, 6), torch.randn(8, 12)
    whole = ops.linear_elu(rows, weight, gate="tanh")
    for n in (1, 17, 70):
        assert torch.equal(ops.linear_elu(rows[:n], weight, gate="tanh"), whole[:n])


def test_the_gradient_is_made_only_where_it_is_wanted() -> None:
    """Whatever of x, weight, bias, cond and residual requires a gradient gets the same one."""
    torch.manual_seed(0)
    make = {"x": (2, 3, 4, 5), "weight": (8, 3, 2, 2), "bias": (8,), "cond": (2, 8, 1, 1), "residual": (2, 4, 4, 5)}
    tensors = {k: torch.randn(*s) for k, s in make.items()}
    seed = torch.randn(2, 4, 4, 5)

    def grads(wanted: Sequence[str]) -> dict[str, Tensor]:
        leaves = {k: v.clone().requires_grad_(k in wanted) for k, v in tensors.items()}
        y = ops.gated_conv2d(**leaves, pads=(1, 0, 1, 0))
        return dict(zip(wanted, torch.autograd.grad(y, [leaves[k] for k in wanted], seed), strict=True))

    everything = grads(list(make))
    for name in make:
        assert torch.equal(grads([name])[name], everything[name]), name


@pytest.mark.parametrize("last", [False, True])
def test_convolutions_write_inside_their_tensors(last: bool) -> None:
    """The launchers, with outputs between walls: all is written, and nothing beside it."""
    torch.manual_seed(0)
    fresh = lambda *shape: walled(torch.full(shape, math.nan), last)  # noqa: E731
    x, weight, how = randn((2, 5, 6, 7), torch.float32, last), torch.randn(6, 10, 2, 3), (1, 1, 1, 0, 1, 1, 1, 1, 0)
    y, pre, gx = fresh(2, 3, 6, 7), fresh(2, 6, 6, 7), fresh(2, 5, 6, 7)
    gw = walled(torch.full((6, 10, 2, 3), math.nan))
    conv.forward(x, weight, None, None, None, y, pre, how, "tanh", True, last)
    front, _ = conv_grad.gate_backward(randn((2, 3, 6, 7), torch.float32, last), pre, "tanh", last)
    conv_grad.grad_input(front, x, weight, gx, how, True, last)
    conv_grad.grad_weight(front, x, gw, how, True, last)
    h, out, skip = randn((2, 3, 6, 7), torch.float32, last), fresh(2, 5, 6, 7), fresh(2, 2, 6, 7)
    conv.residual_skip(h, torch.randn(7, 3, 1, 1), None, x, out, skip, 1.0, last)
    for t in (y, pre, gx, gw, out, skip):
        assert not t.isnan().any()
        assert walls_stand(t)


# ---- mixtures of logistics ---------------------------------------------------------------------------------
@SETTINGS
@given(
    lead=st.sampled_from([(1,), (0,), (3, 0, 2), (7,), (2, 33), (2, 3, 5), (2, 3, 4, 1)]),
    channels=st.sampled_from([1, 3]),
    mixtures=st.sampled_from([1, 2, 5, 10, 17]),
    levels=st.sampled_from([256, 2, 32, 65536, None]),
    floor=st.sampled_from([-7.0, -3.0, -14.0]),
    scale=st.sampled_from([0.5, 3.0]),
    dtype=st.sampled_from(DTYPES),
    moved=st.booleans(),
)
def test_log_prob(
    lead: tuple[int, ...], channels: int, mixtures: int, levels: int | None, floor: float, scale: float,
    dtype: torch.dtype, moved: bool,
) -> None:  # fmt: skip
    torch.manual_seed(mixtures)
    params, x = mixture_case(lead, channels, mixtures, levels, scale)
    last = moved and len(lead) > 1
    params, x = (walled(t.movedim(-1, 1)).movedim(1, -1) if last else walled(t) for t in (params.to(dtype), x))
    check_log_prob(params, x, levels, floor)


@pytest.mark.parametrize("levels", [256, None])
@pytest.mark.parametrize("channels", [1, 3])
def test_log_prob_at_its_edges(channels: int, levels: int | None) -> None:
    """Far from every component, scales below the floor, huge and tiny scales, one component alone: finite, and right."""
    torch.manual_seed(0)
    base, x = mixture_case((40,), channels, 5, levels, 1.0)
    per = 15 if channels == 1 else 50
    for change in (lambda p: p + 30, lambda p: p - 30, lambda p: p * 30, lambda p: p * 0, lambda p: p * 1e-6):
        params = change(base)
        assert params.shape[-1] == per
        check_log_prob(params, x, levels, -7.0)
    alone = base.clone()
    alone[:, 1:5] = -math.inf  # logits of the others
    check_log_prob(alone, x, levels, -7.0)
    for at in range(per):  # NaN goes through
        broken = base.clone()
        broken[3, at] = math.nan
        bad = ops.logistic_mixture_log_prob(broken, x, levels=levels).isnan()
        wanted = ops.logistic_mixture_log_prob_reference(broken, x, levels=levels).isnan()
        assert torch.equal(bad, wanted), at


@pytest.mark.parametrize("x", [-1.0, 3 / 255, 1.0])
def test_log_prob_of_every_width_of_a_bin(x: float) -> None:
    """One component at and beside the bin, 1e-7 to 1e5 scales wide: each number to float32's rounding, none excused."""
    widths = torch.logspace(-7, 5, 301, dtype=torch.float64)
    log_scales = (2 / 255 / widths).log()
    eps = torch.finfo(torch.float32).eps
    for beside in (0.0, 0.4, -3.0):  # in scales, but no further than the image
        means = x + (beside * log_scales.exp()).clamp(-2, 2)
        params = torch.stack((torch.zeros(301), means, log_scales), -1).float().requires_grad_()
        exact = params.detach().double().requires_grad_()
        at = torch.full((301, 1), x)
        y = ops.logistic_mixture_log_prob(params, at, floor=-20.0)
        wanted = ops.logistic_mixture_log_prob_reference(exact, at.double(), floor=-20.0)
        # x less the mean is rounded, which counts in scales; at the middle of a bin nothing is.
        inverse = exact.detach()[:, 2].neg().exp()
        moved = eps * inverse * (beside != 0 or abs(x) == 1)
        allowed = 8 * eps * (1 + wanted.detach().abs()) + moved
        assert bool(((y - wanted).detach().abs() <= allowed).all())
        grads = torch.autograd.grad(y.sum(), params)[0], torch.autograd.grad(wanted.sum(), exact)[0]
        by_scale = [g[:, 2] for g in grads]
        error = (by_scale[0] - by_scale[1]).abs()
        assert bool((error <= 16 * eps * (1 + by_scale[1].abs()) + 2 * moved).all())


def test_mixtures_write_inside_their_tensors() -> None:
    torch.manual_seed(0)
    params, x = mixture_case((3, 5), 3, 4, 256, 1.0)
    fresh = lambda *shape: walled(torch.full(shape, math.nan))  # noqa: E731
    out, grads, drawn = fresh(3, 5), fresh(3, 5, 40), fresh(3, 5, 3)
    mixture.log_prob(params, x, out, 256, -7.0)
    mixture.gradient(torch.randn(3, 5), params, x, grads, 256, -7.0)
    draw.logistic_mixture(params, drawn, (1, 2), 0, 0, 1.0, 256, -7.0)
    for t in (out, grads, drawn):
        assert not t.isnan().any()
        assert walls_stand(t)


# ---- draws -------------------------------------------------------------------------------------------------
COUNTERS = [(0, 0, 0, 1.0), (2**64 - 1, 2**33 + 5, 2**32 - 40, 0.7), (2**63 + 1, 2**32 - 3, 7, 1.9), (1, 1, 1, 1e-3)]


@pytest.mark.parametrize(("seed", "first", "step", "temperature"), COUNTERS)
@pytest.mark.parametrize("levels", [256, 2, None])
@pytest.mark.parametrize("channels", [1, 3])
def test_mixture_draws(channels: int, levels: int | None, seed: int, first: int, step: int, temperature: float) -> None:
    torch.manual_seed(channels)
    for mixtures, lead, dtype in ((1, (33,), DTYPES[0]), (5, (4, 30), DTYPES[1]), (10, (150,), DTYPES[0])):
        params = walled((torch.randn(*lead, mixtures * (3 if channels == 1 else 10)) * 2).to(dtype))
        args = (seed, first, step, temperature)
        found = ops.draw_logistic_mixture(params, *args, channels=channels, levels=levels)
        wanted = ops.draw_logistic_mixture_reference(params, *args, channels=channels, levels=levels)
        assert found.dtype == torch.float32
        head = heads.LogisticMixture(mixtures, levels)
        check_draws(found, wanted, head, params, args)


@pytest.mark.parametrize(("seed", "first", "step", "temperature"), COUNTERS)
def test_class_draws(seed: int, first: int, step: int, temperature: float) -> None:
    torch.manual_seed(0)
    for classes, *lead in ((1, 3), (2, 70), (256, 3, 20), (1500, 9)):
        logits = walled((torch.randn(*lead, classes) * 3).to(DTYPES[classes % 3]))
        logits[..., -1:] = logits[..., :1]  # equal classes, and a class of no weight
        logits[..., 1:2] = -math.inf if classes > 2 else 0.0
        args = (seed, first, step, temperature)
        found = ops.draw_categorical(logits, *args)
        wanted = ops.draw_categorical_reference(logits, *args)
        assert found.dtype == torch.int64
        if classes == 1:
            assert not found.any()
        else:
            head = heads.Categorical(classes)
            check_draws(found[..., None], wanted[..., None], head, logits, args)


def test_draws_of_broken_parameters() -> None:
    """NaN gives the last class, or NaN; as in fastgen.heads and csrc/heads.h."""
    logits = torch.randn(4, 20)
    logits[1, 3] = math.nan
    assert torch.equal(ops.draw_categorical(logits, 5), ops.draw_categorical_reference(logits, 5))
    params = torch.randn(4, 30)
    params[2, 10:20] = math.nan  # means
    found = ops.draw_logistic_mixture(params, 5, channels=1)
    torch.testing.assert_close(found, ops.draw_logistic_mixture_reference(params, 5, channels=1), equal_nan=True)
    assert bool(found[2].isnan().all())


# ---- as torch operations -----------------------------------------------------------------------------------
def test_the_kernels_pass_opcheck() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 4, 5, requires_grad=True), torch.randn(8, 6, 2, 2, requires_grad=True)
    bias, cond = torch.randn(8, requires_grad=True), torch.randn(2, 8, 1, 1, requires_grad=True)
    residual = torch.randn(2, 4, 4, 5, requires_grad=True)
    args = (x, weight, bias, cond, residual, [1, 0, 1, 0, 1, 1, 1, 1, 0], "tanh", True, False, True)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.fastgen.gated_conv.default, args, test_utils=tests)
    params, value = mixture_case((2, 9), 3, 4, 256, 1.0)
    args = (params.requires_grad_(), value, 256, -7.0)
    torch.library.opcheck(torch.ops.fastgen.logistic_mixture_log_prob.default, args, test_utils=tests)


def test_what_is_refused_is_refused_before_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    def launched(*_: Any, **__: Any) -> None:
        raise AssertionError("launched")

    monkeypatch.setattr(conv, "forward", launched)
    x, weight = torch.randn(2, 3, 4, 5), torch.randn(8, 3, 2, 2)
    with pytest.raises(ShapeError, match="expected a contiguous or channels-last"):
        ops.gated_conv2d(x[:, :, :, ::2], weight)
    with pytest.raises(AssertionError, match="launched"):
        ops.gated_conv2d(x, weight)
