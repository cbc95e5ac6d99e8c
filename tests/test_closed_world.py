"""What capture does not know it refuses, by name: reads that leave torch, arguments, types, and operations of others.

Each use below stands between a causal layer and the output. It is exact, against forward itself, or refused for the reason
that is written beside it; `verify=False` throughout, as the planner is to find it out without the proof.
"""

# As users write: lambdas are not annotated.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastgen
from fastgen import NotCausalError, UnsupportedError
from fastgen.errors import ShapeError
from fastgen.heads import Categorical

N, WIDTH, T = 5, 8, 12
Use = Callable[..., Any]


class Floats(nn.Module):
    """Classes as numbers in [-1, 1]."""

    def __init__(self, use: Use) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.use, self.out = nn.Conv1d(1, WIDTH, 3), use, nn.Conv1d(WIDTH, N, 1)

    def forward(self, x: Tensor, *cond: Tensor) -> Tensor:
        return self.out(self.use(2 * self.first(F.pad(x, (2, 0))), *cond).float())


class Indices(nn.Module):
    """Classes as int64, looked up."""

    def __init__(self, use: Use) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.use, self.table = use, nn.Embedding(64, WIDTH)
        self.conv, self.out = nn.Conv1d(WIDTH, WIDTH, 3), nn.Conv1d(WIDTH, N, 1)

    def forward(self, x: Tensor, *cond: Tensor) -> Tensor:
        h = self.table(self.use(x, *cond)).transpose(1, 2)
        return self.out(torch.tanh(self.conv(F.pad(h, (2, 0)))))


def law(model: nn.Module, cond: tuple[Tensor, ...] = (), others: tuple[tuple[Tensor, ...], ...] = ()) -> None:
    """Stepping equals forward, for every conditioning."""
    indices = isinstance(model, Indices)
    head = Categorical(N, encode="index" if indices else "symmetric", params="B(n*C)*")
    shape = (T,) if indices else (1, T)
    sampler = fastgen.compile(model, shape, head, cond, predicts="next", verify=False, threads=1)
    for given in (cond, *others):
        request = sampler.planned.request(24, 1, given, 1.0, None, None, 0, None)
        request.want_params = True
        values, params = sampler.executor.run(request)
        classes = values[..., 0].long()
        x = classes if indices else (2 * classes.float() / (N - 1) - 1)[:, None]
        x = torch.cat([torch.zeros_like(x[..., :1]), x[..., :-1]], -1)
        with torch.no_grad():
            truth = model(x, *(c.expand(24, *c.shape[1:]) if c.dim() else c for c in given)).transpose(1, 2)
        assert params is not None
        torch.testing.assert_close(params.view_as(truth), truth, atol=2e-5, rtol=2e-5)


def outcome(model: nn.Module, reason: str, cond: tuple[Tensor, ...] = (), *others: tuple[Tensor, ...]) -> None:
    if not reason:
        return law(model, cond, others)
    with pytest.raises((UnsupportedError, NotCausalError), match=reason):  # the reason stands in both
        law(model, cond)
    return None


def raising(check: Callable[[Tensor], Any]) -> Use:
    def use(h: Tensor) -> Tensor:
        if check(h):
            raise ValueError("out of range")
        return torch.tanh(h)

    return use


def asserting(h: Tensor) -> Tensor:
    """As assert does it (pytest's own asks more, for its message)."""
    if not ((h > -1e6).all() and not h.isnan().any()):
        raise AssertionError(f"{h} {h.max().item()}")
    if torch.equal(h, h + 1):
        raise SystemExit("of yes or no, too")
    return h


def correlated(h: Tensor) -> Tensor:
    """Each answer alone, turned round, ends in an error; both together do not."""
    small, big = bool(h.abs().max() <= 2.5), bool(h.abs().max() > 2.5)
    if small == big:
        raise AssertionError
    return h if small else h * 0.5


def looser(h: Tensor) -> Tensor:
    zero = torch.zeros_like(h)
    near, far = torch.allclose(h, zero, atol=2.5), torch.allclose(h, zero, atol=1e6)
    if not far:
        raise ValueError
    return h if near else h * 0.5


def filled_by_numpy(h: Tensor) -> Tensor:
    return h + torch.from_numpy(np.sign(h.numpy()))


def aside(h: Tensor) -> Tensor:
    """Numbers that go nowhere."""
    text = f"{h} {h[0, 0, 0]!r}" + str(h.mean())
    return h * (1.0 if text else 2.0)


BRANCH = "Python reads a yes or no on sampled values: forward goes another way"
NUMBER = r"Python reads a sampled value \({}"
READS: dict[str, tuple[Use, str]] = {
    "a check that raises": (raising(lambda h: h.max() > 1e6), ""),
    "a check of the smallest": (raising(lambda h: (h.min() < -1e6).item()), ""),
    "a check in one word": (raising(lambda h: not torch.isfinite(h).all()), ""),
    "assertions": (asserting, ""),
    "a print": (aside, ""),
    "a deep copy": (lambda h: copy.deepcopy(h) * 2, ""),
    "branch on max": (lambda h: h * 0.5 if h.max() > 2.9 else h, BRANCH),
    "branch on any": (lambda h: h * 0.5 if (h > 2.9).any() else h, BRANCH),
    "branch on a number as bool": (lambda h: h * 0.5 if F.relu(h - 2.9).sum() else h, BRANCH),
    "branch on allclose": (lambda h: h if torch.allclose(h, torch.zeros_like(h), atol=2.9) else h * 2, BRANCH),
    "branch on equal": (lambda h: h if torch.equal(h, h.clamp(-2.9, 2.9)) else h * 2, BRANCH),
    "in": (lambda h: h * 2 if 7.0 in h else h, BRANCH),
    "correlated answers": (correlated, BRANCH), "a looser second answer": (looser, BRANCH),
    "a key of two answers": (lambda h: h * {(True, False): 0.5, (False, True): 1.0}[bool(h.max() > 2.5), bool(h.max() <= 2.5)], BRANCH),
    "in a list": (lambda h: h * torch.tensor([h[0, 0, 4], 1.0])[0], r"torch\.tensor\(\) of a list"),
    "formatted": (lambda h: h * float(f"{h[0, 0, 5]:.4f}"), "a formatted string"),
    "item": (lambda h: h / (1 + abs(h[0, 0, 3].item())), NUMBER.format(r"\.item\(\)")),
    "float": (lambda h: h / (1 + float(h.max())), "what has no rule: layer Floats: aten.max is the largest of all values"),
    "int": (lambda h: h * int(h[0, 0, 0]), NUMBER.format(r"\.item\(\)")),
    "tolist": (lambda h: h * len(str(h.tolist())), NUMBER.format(r"Tensor\.tolist")),
    "numpy": (filled_by_numpy, NUMBER.format(r"Tensor\.numpy")),
    "a ufunc": (lambda h: h + np.tanh(h), NUMBER.format(r"Tensor\.(numpy|__array__)")),
    "asarray": (lambda h: h + torch.as_tensor(np.asarray(h)), NUMBER.format(r"Tensor\.(numpy|__array__)")),
    "dlpack": (lambda h: h + torch.from_dlpack(np.from_dlpack(h)), NUMBER.format("Tensor")),
    "storage": (lambda h: h * sum(h.untyped_storage().tolist()), NUMBER.format("Tensor.untyped_storage")),
    "nonzero": (lambda h: h * len((h > 1).nonzero()), NUMBER.format("aten.nonzero")),
    "boolean index": (lambda h: h * (1 + h[h > 1].numel()), NUMBER.format("aten.index")),
    "masked select": (lambda h: h * (1 + h.masked_select(h > 1).numel()), NUMBER.format("aten.masked_select")),
    "unique": (lambda h: h * torch.unique(h.sign()).numel(), NUMBER.format("aten._unique2")),
    "bincount": (lambda h: h * len(torch.bincount((h > 1).long().flatten())), NUMBER.format("aten.bincount")),
    "the largest as a tensor": (lambda h: h / (1 + h.max()), "aten.max is the largest of all values, later ones too"),
    "smallest and largest": (lambda h: h - torch.aminmax(h)[0], "aten.aminmax is the smallest and largest of all"),
    "random": (lambda h: h + torch.rand(1), "aten.rand is random"),
    "random in place": (lambda h: h + torch.empty(WIDTH, 1).normal_(), "aten.normal_ is random"),
    "dropout in eval mode": (lambda h: F.dropout(h, 0.5), "aten.(bernoulli_|native_dropout) is random"),
    "random and unread": (lambda h: (torch.rand(3), h)[1], ""),
}  # fmt: skip


@torch.jit.script  # type: ignore[untyped-decorator]
def scripted(h: Tensor) -> Tensor:
    return torch.tanh(h) * 0.5 + h


def in_place(h: Tensor) -> Tensor:
    h = h.clone()
    h[:, :4] *= 2
    h[:, 0] += 1
    h[:, 1:3] += h[:, 3:5]
    h[..., ::2].mul_(0.5)
    return h


def _part(h: Tensor) -> Tensor:
    h[:, 1:3] = h[:, 3:5] * 2
    h[:, :, 1:] += 0.5
    return h


def foreach(h: Tensor) -> Tensor:
    other = h.clone()
    torch._foreach_add_([other], 1.0)
    return other


OPERATIONS: dict[str, tuple[Use, str]] = {
    "round to decimals": (lambda h: torch.round(h, decimals=1), "its argument decimals=1"),
    "addcmul": (lambda h: torch.addcmul(h, h, h, value=0.5), "its argument value=0.5"),
    "addcmul in place": (lambda h: h.clone().addcmul_(h, h, value=0.5), "its argument value=0.5"),
    "division down": (lambda h: h // 0.25, "rounding_mode='floor'"),
    "variance": (lambda h: h + h.var(1, keepdim=True, correction=0), ""),
    "variance, biased": (lambda h: h + h.var(1, keepdim=True, unbiased=False), ""),
    "pool by another divisor": (
        lambda h: F.avg_pool2d(F.pad(h, (1, 0))[:, None], (1, 2), 1, divisor_override=3)[:, 0], "divisor_override=3"),
    "bfloat16": (lambda h: h.bfloat16(), "computes in bfloat16 here"),
    "half and back": (lambda h: torch.relu(h.half()).float() + h, "computes in float16 here"),
    "copied to bfloat16": (lambda h: torch.empty_like(h, dtype=torch.bfloat16).copy_(h), "computes in bfloat16 here"),
    "double": (lambda h: torch.tanh(h.double()), ""),
    "int8 that may wrap": (lambda h: (h * 100).to(torch.int8).float(), "cast to int8 of values .* which may not fit"),
    "int8 that cannot": (lambda h: (torch.tanh(h) * 100).to(torch.int8).float(), ""),
    "uint8 arithmetic": (
        lambda h: ((torch.sigmoid(h) * 200).to(torch.uint8) * 2).float(), "cast to uint8 of values from 0 to 400"),
    "truncating copy": (lambda h: torch.zeros(h.shape, dtype=torch.int64).copy_(h * 3).float(), ""),
    "bool of numbers": (lambda h: torch.round(h).bool().float(), ""),
    "sum of bools": (lambda h: ((h > 0) + (h > -1)).float(), ""),
    "product of bools": (lambda h: ((h > 0) * (h > -1)).float(), ""),
    "count": (lambda h: h + (h > 0).sum(1, keepdim=True), ""),
    "not": (lambda h: h * ~(h > 0), ""),
    "xor": (lambda h: h * ((h > 0) ^ (h > 0.5)), ""),
    "and of bools": (lambda h: h * ((h > 0) & (h < 0.5)), ""),
    "logical xor of numbers": (lambda h: torch.logical_xor(h.round(), h.floor()), "numbers other than yes and no"),
    "complex view": (lambda h: torch.view_as_complex(h.view(1, 4, 2, T).transpose(2, 3).contiguous()).abs().repeat(1, 2, 1),
                     "complex numbers"),
    "complex factor": (lambda h: (h * 1j).imag, "complex numbers"),
    "complex parts": (lambda h: torch.complex(h, h).real, ""),
    "bits": (lambda h: (h.view(torch.int32) & 0x7FFFFFFF).view(torch.float32), "bytes of sampled values are taken for int32"),
    "bits of a half": (lambda h: h.view(torch.uint8)[..., ::4].float(), "bytes of sampled values are taken for uint8"),
    "foreach": (lambda h: torch._foreach_add([h], 1.0)[0], "aten._foreach_add is an operation without a rule"),
    "foreach in place": (foreach, "aten._foreach_add"),
    "out": (lambda h: torch.mul(h, torch.tanh(h), out=torch.empty_like(h)), ""),
    "rrelu": (lambda h: F.rrelu(h, 0.1, 0.4), ""),
    "cast by a view of a constant": (lambda h: h + torch.arange(WIDTH, dtype=torch.int32).view(torch.float32)[:, None], ""),
    "part in place": (in_place, ""), "scripted": (lambda h: scripted(h), ""), "part set": (lambda h: _part(h.clone()), ""),
    "divided by zero": (lambda h: (h / 0.0).clamp(-1, 1), ""),
    "celu": (lambda h: F.celu(h, 0.7), ""),
    "of one name": (lambda h: torch.ops.closed_world.silu(h), "closed_world.silu is an operation of its own kind"),
}  # fmt: skip

INTEGERS: dict[str, tuple[Use, str]] = {
    "and": (lambda x: x & 3, "bits of integers"), "or": (lambda x: x | 1, "bits of integers"),
    "xor": (lambda x: x ^ 1, "bits of integers"), "complement": (lambda x: ~x + 6, "bits of integers"),
    "shift": (lambda x: x >> 1, "an operation without a rule"), "halves": (lambda x: x // 2, "rounding_mode='floor'"),
    "affine": (lambda x: (x * 7 + 3) % N, ""), "down and around": (lambda x: (x - 3) % 4, ""),
    "quotients": (lambda x: (x * 10 / 41 + x / 5).long(), ""), "shares": (lambda x: (x * 41 / 41).long(), ""),
    "clamped": (lambda x: (x * 1000).clamp(1, 3), ""), "absolute": (lambda x: (x - 2).abs(), ""),
    "compared": (lambda x: (x > 2).long() * 2 + (x == 1).long(), ""), "one or none": (lambda x: x.bool().long(), ""),
    "hashed": (lambda x: (x * 123457 + F.pad(x, (1, 0))[..., :-1] * 7919333) % 64, "integers up to 3.17e.07, beyond 2"),
    "wrapping": (lambda x: (x - 3).to(torch.uint8).long() % 64, "cast to uint8 of values from -3 to 1"),
    "not wrapping": (lambda x: x.to(torch.uint8).long() + 1, ""),
    "beyond the table": (lambda x: x * 16, "from 0 to 64 in a table of 64 rows; expected 0 to 63"),
    "from numbers": (lambda x: (torch.sin(x.float()) * 20 + 20).long(), ""),
    "from numbers without bounds": (lambda x: (torch.exp(x.float())).long(), r"whose range is not known \(clamp them first\)"),
    "from numbers that are clamped": (lambda x: torch.exp(x.float()).clamp(0, 63).long(), ""),
    "one-hot": (lambda x: F.one_hot(x, N).argmax(-1), "an operation without a rule|argmax"),
    "one-hot, summed": (lambda x: (F.one_hot(x, N) * torch.arange(N)).sum(-1), ""),
    "one-hot of any size": (lambda x: (F.one_hot(x) * torch.arange(5)).sum(-1), "one_hot without num_classes"),
    "table read backwards": (lambda x: torch.arange(8)[x - 3], "from -3 to 1 in a table of 8 rows"),
    "table": (lambda x: torch.arange(8).flip(0)[x], ""),
    "isin": (lambda x: torch.isin(x, torch.tensor([1, 3])).long(), ""),
}  # fmt: skip


@torch.library.custom_op("closed_world::silu", mutates_args=())
def other_silu(x: Tensor) -> Tensor:
    """Not torch's."""
    return x * torch.sigmoid(1.7 * x)


@pytest.mark.parametrize("name", READS)
def test_reads(name: str) -> None:
    outcome(Floats(READS[name][0]), READS[name][1])


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name: str) -> None:
    outcome(Floats(OPERATIONS[name][0]), OPERATIONS[name][1])


@pytest.mark.parametrize("name", INTEGERS)
def test_integers(name: str) -> None:
    outcome(Indices(INTEGERS[name][0]), INTEGERS[name][1])


# ---- conditioning ------------------------------------------------------------------------------------------------
def checked(h: Tensor, c: Tensor) -> Tensor:
    if c.max() >= 5 or (c < 0).any():
        raise ValueError("no such class")
    return h + c[:, None, None] * 0.1


def shown(h: Tensor, c: Tensor) -> Tensor:
    return h + (c[:, None, None] if f"{c}" else 0)


def _wide(c: Tensor) -> Tensor:
    return torch.sin(c[:, None, None] + torch.arange(WIDTH)[:, None]).expand(-1, -1, T)


def _beside(both: Tensor) -> Tensor:
    """Samples and conditioning in one tensor, computed with apart."""
    a, b = both.chunk(2, 1)
    return a + torch.tanh(b) * 2 + torch.relu(both)[:, WIDTH:]


def _beside_in_place(h: Tensor, e: Tensor) -> Tensor:
    both = torch.zeros(h.shape[0], 2 * WIDTH, T)
    both[:, :WIDTH], both[:, WIDTH:] = h, e
    both[:, WIDTH:].mul_(2)
    return both[:, :WIDTH] + torch.cos(both[:, WIDTH:])


ANOTHER = "is another for every sample"
CONDITIONING: dict[str, tuple[Use, str]] = {
    "a check": (checked, ""), "a print": (shown, ""),
    "a check of activations first": (lambda h, c: raising(lambda h: h.max() > 1e6)(h) + c[:, None, None], ""),
    "beside samples": (lambda h, c: _beside(torch.cat([h, _wide(c)], 1)), ""),
    "beside samples, in place": (lambda h, c: _beside_in_place(h, _wide(c)), ""),
    "before samples": (lambda h, c: h + torch.exp(torch.cat([_wide(c) * 0.1, h], 2)[:, :, :1]), ""),
    "one-hot": (lambda h, c: h + F.one_hot(c, WIDTH)[:, :, None], ""),
    "branch": (lambda h, c: h * 2 if c.sum() > 0 else h, "yes or no on conditioning values"),
    "int": (lambda h, c: h * int(c), ANOTHER), "item": (lambda h, c: h * c.sum().item(), ANOTHER),
    "tolist": (lambda h, c: h * c.tolist()[0], ANOTHER), "numpy": (lambda h, c: h * float(c.numpy()[0]), ANOTHER),
    "an index": (lambda h, c: h[:, : int(c) + 1].sum(1, keepdim=True).expand(h.shape), ANOTHER),
    "a list of layers": (lambda h, c: [h, h * 2, h * 3, h * 4, h * 5][c], ANOTHER),
    "a roll": (lambda h, c: h.roll(c, 1), ANOTHER), "nonzero": (lambda h, c: h * (1 + len(c.nonzero())), ANOTHER),
    "boolean index": (lambda h, c: h * (1 + c[c > 2].numel()), ANOTHER),
    "full of it": (lambda h, c: h + torch.full((1, WIDTH, 1), c.item()), ANOTHER),
    "alpha": (lambda h, c: torch.add(h, h, alpha=c.item()), ANOTHER),
    "one-hot of any size": (lambda h, c: h + F.pad(F.one_hot(c), (0, 8))[:, :WIDTH, None], "one_hot without num_classes"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONDITIONING)
def test_conditioning(name: str) -> None:
    use, reason = CONDITIONING[name]
    outcome(Floats(use), reason, *((torch.tensor([k]),) for k in (1, 0, 2, 4)))


def test_scalar_conditioning_is_not_frozen() -> None:
    """Tensors without axes, which a proof cannot vary over a batch: in a list, in a text, in a cache by identity."""

    class Cached(Floats):
        key: Tensor | None = None

        def kept(self, h: Tensor, c: Tensor) -> Tensor:
            if self.key is not c:
                self.key, self.value = c, c * 0.3
            return h + self.value

    cached = Cached(lambda h, c: h)
    cached.use = lambda h, c: Cached.kept(cached, h, c)
    outcome(cached, "", (torch.tensor(1.0),), (torch.tensor(2.0),), (torch.tensor(0.0),))
    for use in (lambda h, c: h * torch.tensor([c, 1.0])[0], lambda h, c: h * h.new_tensor([c])[0]):
        outcome(Floats(use), "of a list", (torch.tensor(1.0),))
    outcome(Floats(lambda h, c: {"c1": h, "c2": h * 2}[f"c{c}"]), "a formatted string", (torch.tensor(1),))


def test_an_error_that_is_provoked_does_nothing_to_the_module() -> None:
    class Spiteful(Floats):
        def forward(self, x: Tensor, *cond: Tensor) -> Tensor:
            if not torch.isfinite(x).all():
                self.first.weight.data.zero_()
                raise ValueError("no")
            return super().forward(x)

    model = Spiteful(lambda h: h)
    before = model.first.weight.clone()
    law(model)
    assert torch.equal(model.first.weight, before)


def test_a_check_of_conditioning_is_repeated() -> None:
    sampler = fastgen.compile(
        Floats(checked), (1, T), Categorical(N, encode="symmetric", params="B(n*C)*"), (torch.tensor([1]),),
        predicts="next", threads=1,
    )  # fmt: skip
    with pytest.raises(ShapeError, match="no such class"):
        sampler.sample(1, cond=(torch.tensor([7]),))
    assert sampler.sample(2, cond=(torch.tensor([4, 3]),)).shape == (2, 1, T)


def test_checks_are_notes_of_the_plan() -> None:
    head = Categorical(N, encode="symmetric", params="B(n*C)*")
    sampler = fastgen.compile(Floats(asserting), (1, T), head, predicts="next", threads=1)
    assert "taken as a check" in str(sampler.plan)


@pytest.mark.parametrize("length", [80, 40])
def test_conditioning_of_another_length_than_the_sample(length: int) -> None:
    """Forward itself refuses it, and so does the sampler, though it would stop forward before the sum."""

    class Mel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.mel, self.out = nn.Conv1d(1, 6, 2), nn.ConvTranspose1d(3, 6, 4, 4), nn.Conv1d(6, N, 1)

        def forward(self, x: Tensor, mel: Tensor) -> Tensor:
            return self.out(torch.tanh(self.first(F.pad(x, (1, 0))) + self.mel(mel)))

    mel = torch.randn(1, 3, 40)
    head = Categorical(N, encode="symmetric", params="B(n*C)*")
    sampler = fastgen.compile(Mel(), (1, 80), head, (mel[..., :20],), predicts="next", threads=1)
    assert torch.equal(sampler.sample(1, cond=(mel,), length=160)[..., :80], sampler.sample(1, cond=(mel[..., :20],)))
    with pytest.raises(ShapeError, match=r"forward does not take a sample \[1, 1, \d+\].*(must match|broadcast)"):
        sampler.sample(1, cond=(mel,), length=length)


SHAPES: dict[str, tuple[Use, str]] = {
    "a mean by hand": (lambda h, c: h * c.sum(-1, keepdim=True)[..., None] / c.shape[-1], r"aten.div has the number \(9.0,\)"),
    "a layer for each": (lambda h, c: _layers(h, c), r"calls aten\.\w+ \d+ times, and did \d+ times"),
    "a branch": (lambda h, c: h * 0.3 + c.mean() if c.shape[-1] > 5 else h + c.mean(), "another path|has the number"),
    "a mean": (lambda h, c: h * c.mean(-1, keepdim=True)[..., None], ""),
}  # fmt: skip


def _layers(h: Tensor, c: Tensor) -> Tensor:
    for k in range(c.shape[-1]):
        h = torch.tanh(h + c[:, None, k : k + 1])
    return h


@pytest.mark.parametrize("name", SHAPES)
def test_the_length_of_conditioning(name: str) -> None:
    """Read as a Python number, it is that of compile: refused at another."""
    use, reason = SHAPES[name]
    model, cond = Floats(use), (torch.randn(1, 4),)
    law(model, cond)
    sampler = fastgen.compile(
        model,
        (1, T),
        Categorical(N, encode="symmetric", params="B(n*C)*"),
        cond,
        predicts="next",
        verify=False,
        threads=1,
    )
    if not reason:
        return law(model, cond, ((torch.randn(1, 9),),))
    with pytest.raises(UnsupportedError, match=reason):
        sampler.sample(1, cond=(torch.randn(1, 9),))
    return None


def test_the_length_of_a_sample_beside_conditioning() -> None:
    model = Floats(lambda h, c: h * c[:, :, None] * (40 / h.shape[-1]))
    head = Categorical(N, encode="symmetric", params="B(n*C)*")
    sampler = fastgen.compile(model, (1, 80), head, (torch.randn(1, 1),), predicts="next", threads=1)
    assert sampler.sample(1, cond=(torch.randn(1, 1),)).shape == (1, 1, 80)
    with pytest.raises(UnsupportedError, match="length 100: the plan holds for 80 sites only"):
        sampler.sample(1, length=100)
