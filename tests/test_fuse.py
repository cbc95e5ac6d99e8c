"""fuse_: what it recognises in models as people write them, that it changes nothing else, and what it refuses."""

# As users write: modules are not annotated in full.
# mypy: disable-error-code="no-any-return,no-untyped-def,no-untyped-call,operator,union-attr"

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

import fastgen
from fastgen.errors import VerifyError
from fastgen.heads import Bernoulli
from fastgen.nn import FuseReport, fuse_, use_kernels_
from fastgen.ops import KernelChoice


def concat_elu(x: Tensor) -> Tensor:
    axis = len(x.size()) - 3
    return F.elu(torch.cat([x, -x], dim=axis))


class Chunked(nn.Module):
    """Vertical stack: pad, convolution, chunk, tanh·sigmoid, residual."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, (2, 3))

    def forward(self, x):
        a, b = torch.chunk(self.conv(F.pad(x, (1, 1, 1, 0))), 2, dim=1)
        return x + torch.tanh(a) * torch.sigmoid(b)


class SplitSwapped(nn.Module):
    """Gate on the halves the other way round, by split, with methods; the kernel is square and dilated."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = weight_norm(nn.Conv2d(4, 8, 3, padding=2, dilation=2))
        self.shift = nn.Parameter(torch.randn(1, 8, 1, 1))

    def forward(self, x):
        b, a = (self.conv(x) + self.shift).split(4, 1)
        return a.tanh() * b.sigmoid()


class Sliced(nn.Module):
    """Gate by slices, bias free, same padding, old weight norm."""

    def __init__(self) -> None:
        super().__init__()
        with pytest.warns(FutureWarning):
            self.conv = torch.nn.utils.weight_norm(nn.Conv2d(4, 8, 3, padding="same", bias=False))

    def forward(self, x):
        y = self.conv(x)
        return torch.sigmoid(y[:, 4:]) * torch.tanh(y[:, :4])


class Glu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.ZeroPad2d((2, 0, 0, 0)), nn.Conv2d(4, 8, (1, 3), stride=2), nn.GLU(dim=1))

    def forward(self, x):
        return F.relu(self.body(x))


class MaskA(nn.Conv2d):
    """The masked convolution that most code has: it writes to its weight."""

    def __init__(self, cin, cout, kernel) -> None:
        super().__init__(cin, cout, kernel, padding=kernel // 2)
        self.register_buffer("mask", torch.ones_like(self.weight))
        self.mask[:, :, kernel // 2, kernel // 2 :] = 0
        self.mask[:, :, kernel // 2 + 1 :] = 0

    def forward(self, x):
        self.weight.data *= self.mask
        return super().forward(x)


class MaskB(MaskA):
    """The masked convolution that does not."""

    def forward(self, x):
        return F.conv2d(x, self.weight * self.mask, self.bias, self.stride, self.padding)


class Masked(nn.Module):
    def __init__(self, kind: type[MaskA]) -> None:
        super().__init__()
        self.conv, self.cond = kind(4, 8, 3), nn.Conv2d(4, 8, 1)

    def forward(self, x):
        a, b = torch.split(self.conv(x) + self.cond(x), [4, 4], dim=1)
        return torch.tanh(a) * torch.sigmoid(b)


class Shifted(nn.Module):
    """A wrapper as in ports of PixelCNN++: pad, weight-normalised convolution."""

    def __init__(self, cin, cout) -> None:
        super().__init__()
        self.pad = nn.ZeroPad2d((1, 1, 1, 0))
        self.conv = weight_norm(nn.Conv2d(cin, cout, (2, 3)))

    def forward(self, x):
        return self.conv(self.pad(x))


class Resnet(nn.Module):
    """The gated resnet as its best-known port writes it."""

    def __init__(self, dropout: float = 0.5) -> None:
        super().__init__()
        self.conv_input, self.conv_out = Shifted(8, 4), Shifted(8, 8)
        self.nin_skip = weight_norm(nn.Conv2d(8, 4, 1))
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, og_x, a=None):
        x = self.conv_input(concat_elu(og_x))
        if a is not None:
            x += self.nin_skip(concat_elu(a))
        x = self.dropout(concat_elu(x))
        a, b = torch.chunk(self.conv_out(x), 2, dim=1)
        return og_x + a * torch.sigmoid(b)


class TwoConvs(nn.Module):
    """A WaveNet layer with a convolution for each half, conditioning, and padding cut off at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.filter, self.gate = (nn.Conv1d(4, 6, 2, padding=2, dilation=2) for _ in range(2))
        self.cond_f, self.cond_g = nn.Conv1d(3, 6, 1), nn.Conv1d(3, 6, 1)
        self.out = nn.Conv1d(6, 4, 1)

    def forward(self, x, c):
        f = self.filter(x)[:, :, :-2] + self.cond_f(c)
        g = self.gate(x)[:, :, : x.size(2)] + self.cond_g(c)
        return x + self.out(torch.tanh(f) * torch.sigmoid(g))


class CutAndPadded(nn.Module):
    """The last row is cut off, and the convolution pads a zero there; the gate is of two convolutions, not of halves."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))

    def forward(self, x):
        x = F.pad(x, (0, 0, 1, -1))
        return self.a(x) * torch.sigmoid(self.b(x)) + x


class Vocoder(nn.Module):
    """A WaveNet layer as in vocoders: cropped, halves by computed sizes, conditioning added to each half, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 8, 3, padding=4, dilation=2)
        self.local, self.out = nn.Conv1d(3, 8, 1), nn.Conv1d(4, 4, 1)

    def forward(self, x, c):
        y = self.conv(F.dropout(x, 0.5, self.training))[:, :, : x.size(-1)]
        a, b = y.split(y.size(1) // 2, dim=1)
        ca, cb = torch.split(self.local(c), 4, dim=1)
        return (self.out(torch.tanh(a + ca) * torch.sigmoid(b + cb)) + x) * 0.7


def image(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


X = (image(2, 4, 6, 5),)
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...], list[str]]] = {
    "chunk": (Chunked, X, ["conv2d + tanh·sigmoid + residual"]),
    "split-swapped": (SplitSwapped, X, ["conv2d + conditioning + tanh·sigmoid"]),
    "slices-old-weight-norm": (Sliced, X, ["conv2d + tanh·sigmoid"]),
    "glu-in-sequential": (Glu, X, ["conv2d + GLU"]),
    "mask-written": (lambda: Masked(MaskA), X, ["conv2d + conditioning + tanh·sigmoid"]),
    "mask-multiplied": (lambda: Masked(MaskB), X, ["conv2d + conditioning + tanh·sigmoid"]),
    "gated-resnet": (
        Resnet, (X[0], X[0] * 0.5), ["concat_elu + conv2d + residual", "conv2d + GLU + residual", "concat_elu + conv2d"],
    ),
    "gated-resnet-no-skip": (Resnet, X, ["conv2d + GLU + residual", "concat_elu + conv2d"]),
    "cut-and-padded": (CutAndPadded, X, ["conv2d + GLU + residual"]),
    "vocoder": (Vocoder, (image(2, 4, 9), image(2, 3, 9)), ["conv1d + conditioning + tanh·sigmoid"]),
    "two-convolutions-1d": (TwoConvs, (image(2, 4, 9), image(2, 3, 9)), ["conv1d + conditioning + tanh·sigmoid"]),
}  # fmt: skip


def made(name: str) -> tuple[nn.Module, tuple[Any, ...], list[str]]:
    make, args, expected = CASES[name]
    torch.manual_seed(3)
    model = make()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model, args, expected


def values(model: nn.Module, args: tuple[Any, ...], training: bool) -> list[Tensor]:
    """Output and gradients, the same noise every time."""
    torch.manual_seed(5)
    model.train(training).zero_grad()
    y = model(*args)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def close(a: list[Tensor], b: list[Tensor], rtol: float = 2e-5) -> bool:
    return len(a) == len(b) and all(
        (x - y).abs().max() <= rtol * (1e-3 + y.abs().max()) for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("name", CASES)
def test_recognised_and_equal(name: str) -> None:
    model, args, expected = made(name)
    plain, _, _ = made(name)
    keys, kinds = list(model.state_dict()), [type(m).__name__ for m in plain.modules()]
    report = fuse_(model, args)
    assert sorted(s.what for s in report.swapped) == sorted(expected), report
    assert report.error < 1e-5
    assert list(model.state_dict()) == keys
    assert [type(m).__name__.removeprefix("Fused") for m in model.modules()] == kinds
    smaller = tuple(a[:1, ..., :-1] for a in args)  # a forward of any size, not only the example's
    for training in (False, True):
        for given in (args, smaller):
            assert close(values(model, given, training), values(plain, given, training)), (training, given[0].shape)


@pytest.mark.parametrize("name", CASES)
def test_really_calls_the_fused_convolution(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this the tests of equality would pass for a fuse_ that does nothing."""
    model, args, expected = made(name)
    fuse_(model, args)
    calls = []
    import fastgen.nn.run as run

    whole = run.conv2d
    monkeypatch.setattr(run, "conv2d", lambda *a, **k: calls.append(a[1]) or whole(*a, **k))
    model(*args)
    assert len(calls) == len(expected)


@pytest.mark.parametrize("name", CASES)
def test_through_the_custom_op(name: str) -> None:
    """As on a GPU, where the op and its own backward run."""
    model, args, _ = made(name)
    plain, _, _ = made(name)
    fuse_(model, args)
    for module in model.modules():
        if hasattr(module, "_fastgen_kernel"):
            module._fastgen_kernel = KernelChoice("triton", "this test")
    strided = tuple(torch.stack((a, a), -1)[..., 0] for a in args)  # plain torch takes it, so must this
    for training in (False, True):
        for given in (args, strided):
            assert close(values(model, given, training), values(plain, given, training))


@pytest.mark.parametrize("name", ["split-swapped", "slices-old-weight-norm", "mask-multiplied", "gated-resnet"])
def test_state_dicts_go_both_ways(name: str) -> None:
    model, args, _ = made(name)
    fuse_(model, args)
    torch.manual_seed(11)
    other = CASES[name][0]()
    expected = values(other, args, False)[0]
    model.load_state_dict(other.state_dict())
    assert close([values(model, args, False)[0]], [expected])
    back, _, _ = made(name)
    back.load_state_dict(model.state_dict())
    assert torch.equal(values(back, args, False)[0], expected)


def test_copies_stay_fused_and_pickles_are_plain() -> None:
    model, args, _ = made("chunk")
    expected = values(model, args, False)
    fuse_(model, args)
    twin = copy.deepcopy(model)
    assert type(twin) is type(model) is not Chunked
    twin.conv.weight.data.zero_()
    assert not close(values(twin, args, False), expected)
    assert close(values(model, args, False), expected)
    again = pickle.loads(pickle.dumps(model))
    assert type(again) is Chunked
    assert close(values(again, args, False), expected)
    assert not [k for k in again.__dict__ if "fastgen" in k]
    again.load_state_dict(model.state_dict())


def test_other_calls_run_the_modules_own_forward() -> None:
    """A forward traced with a skip input is not used without one, nor the reverse."""
    for first, second in (((X[0],), (X[0], X[0])), ((X[0], X[0]), (X[0],))):
        model, plain = Resnet(), Resnet()
        plain.load_state_dict(model.state_dict())
        fuse_(model, first)
        for args in (first, second):
            assert close(values(model, args, True), values(plain, args, True))
    assert torch.equal(model.eval()(og_x=X[0], a=X[0]), model(X[0], a=X[0]))


class ReadTwice(nn.Module):
    """What cannot be taken: the sum is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.side = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        y = self.conv(x)
        a, b = y.chunk(2, 1)
        return torch.tanh(a) * torch.sigmoid(b) + self.side(y)


class InPlace(ReadTwice):
    def forward(self, x):
        z = x * 2.0
        y = self.conv(x)
        z.add_(1.0)
        return F.glu(y, dim=1) * z


class Mode(ReadTwice):
    def forward(self, x):
        y = F.glu(self.conv(x), dim=1)
        return y * 2.0 if self.training else y


class Branch(ReadTwice):
    def forward(self, x):
        y = F.glu(self.conv(x), dim=1)
        return y if x.mean() > 0 else -y


class Constant(ReadTwice):
    def forward(self, x):
        return F.glu(self.conv(x + torch.ones(1, 4, 1, 1)), dim=1)


class Uneven(ReadTwice):
    """Not a gate: the halves are those of other convolutions, or no halves."""

    def forward(self, x):
        a, b, _ = self.conv(x).split((3, 3, 2), 1)
        return torch.tanh(a) * torch.sigmoid(b)


class Doubled(ReadTwice):
    """The sum of a convolution with itself."""

    def forward(self, x):
        y = self.conv(x)
        return F.glu(y + y, dim=1)


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 1, groups=2)

    def forward(self, x):
        return F.glu(self.conv(x), dim=1)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (ReadTwice, "a value inside the chain is read elsewhere"),
        (InPlace, "works in place"),
        (Mode, "differs between training and evaluation"),
        (Branch, "cannot be traced"),
        (Constant, "makes a tensor"),
        (Uneven, None),
        (Doubled, None),
        (Grouped, None),
    ],
)
def test_what_is_left_alone(kind: type[nn.Module], reason: str | None) -> None:
    model = kind()
    attributes = set(model.__dict__)
    report = fuse_(model, X[0].clone())
    assert not report.swapped
    assert type(model) is kind
    assert set(model.__dict__) == attributes
    assert [why for _, why in report.left if reason and reason in why] if reason else not report.left, report


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook"])
def test_a_hooked_convolution_is_left_alone(kind: str) -> None:
    model, args, _ = made("chunk")
    seen = []
    getattr(model.conv, f"register_{kind}")(lambda *a: seen.append(1))
    report = fuse_(model, args)
    assert report.left == [("conv", "it carries hooks, which a fused call would pass by")]
    assert not report.swapped
    seen.clear()
    model(*args).sum().backward()
    assert seen == [1]


def test_a_wrong_rewrite_is_caught_and_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, args, _ = made("gated-resnet")
    expected, attributes = values(model, args, True), set(model.__dict__)
    monkeypatch.setattr("fastgen.nn.patterns.run.conv2d", lambda *a, **k: fused_wrong(*a, **k))
    with pytest.raises(
        VerifyError, match=r"output 0 differs by 1\.\de-03 of its scale, expected at most 1e-05; the model is unchanged"
    ):
        fuse_(model, args)
    monkeypatch.undo()
    assert type(model) is Resnet
    assert set(model.__dict__) == attributes
    assert all(torch.equal(a, b) for a, b in zip(values(model, args, True), expected, strict=True))


def fused_wrong(*args: Any, **kwargs: Any) -> Tensor:
    from fastgen.ops import gated_conv2d_reference

    return gated_conv2d_reference(*args[2:], **kwargs) * 1.001


def test_the_callers_state_is_left_alone() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), Chunked(), nn.Dropout(0.3)).train()
    model[2].eval()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before, grads = copy.deepcopy(model.state_dict()), [p.grad for p in model.parameters()]
    state = torch.get_rng_state()
    report = fuse_(model, X)
    assert [s.module for s in report.swapped] == ["1"]
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model] == [True, True, False]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))


def test_fusing_twice_changes_nothing_more() -> None:
    model, args, expected = made("gated-resnet")
    assert len(fuse_(model, args).swapped) == len(expected)
    kind = type(model)
    assert not fuse_(model, args).swapped
    assert type(model) is kind


def test_report_and_kernel_choice() -> None:
    model, args, _ = made("two-convolutions-1d")
    report = fuse_(model, args)
    assert str(report).splitlines()[1] == (
        "  (model): filter and gate: conv1d + conditioning + tanh·sigmoid [torch]"
    )  # fmt: skip
    assert report.swapped[0].kernel.name == "torch"
    use_kernels_(model, "torch")
    assert "asked for" in model._fastgen_kernel.reason  # type: ignore[operator]
    with pytest.raises(ValueError, match="expected 'auto' or 'torch'"):
        use_kernels_(model, "triton")  # type: ignore[arg-type]
    assert isinstance(report, FuseReport)


def test_an_example_is_asked_for() -> None:
    with pytest.raises(ValueError, match="give example=, the arguments of one forward of Chunked"):
        fuse_(Chunked())
    model = fastgen.models.build(dict(model="gated-pixelcnn", levels=4, dim=4, layers=2, hidden=4, shape=[5, 5]))
    assert not fuse_(model).swapped  # its layers are fastgen's own


def test_compiles_with_torch_compile() -> None:
    model, args, _ = made("gated-resnet")
    fuse_(model, args)
    expected = values(model, args, False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert close(values(compiled, args, False), expected)


def test_a_fused_model_is_sampled() -> None:
    """Trained fused, sampled: planning sees through the rewritten forward."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.body, self.out = MaskA(1, 8, 3), Masked(MaskB), nn.Conv2d(4, 1, 1)

        def forward(self, x):
            return self.out(self.body(F.glu(self.first(x), dim=1)))

    torch.manual_seed(0)
    plain = Net()
    model = copy.deepcopy(plain)
    assert len(fuse_(model, image(2, 1, 6, 6)).swapped) == 2
    samples = [fastgen.compile(m, shape=(1, 6, 6), head=Bernoulli()).sample(4, seed=2) for m in (plain, model)]
    assert torch.equal(*samples)


class CallsItselfMe(nn.Module):
    """Whatever a method calls its first argument."""

    def __init__(me) -> None:  # noqa: N805
        super().__init__()
        me.conv = nn.Conv2d(1, 8, (2, 3))

    def forward(me, x: Tensor) -> Tensor:  # noqa: N805
        a, b = me.conv(F.pad(x, (1, 1, 1, 0))).chunk(2, 1)
        return torch.tanh(a) * torch.sigmoid(b)


def test_a_module_that_does_not_say_self() -> None:
    report = fuse_(CallsItselfMe(), torch.randn(2, 1, 5, 5))
    assert len(report.swapped) == 1 and not report.left
