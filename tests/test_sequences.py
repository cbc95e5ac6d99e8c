"""Sequences with something of their own at the beginning, in their length, or in the order of their axes."""

# As users write: modules are not annotated in full.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastgen
from fastgen import UnsupportedError
from fastgen.errors import FastgenError
from fastgen.heads import Categorical, GaussianMixture

N, WIDTH = 7, 8
HEAD = Categorical(N, encode="index", params="B(n*C)*")


class Tokens(nn.Module):
    """Tokens, causal convolutions over their embeddings [B, C, T], logits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.label = nn.Embedding(N, WIDTH), nn.Embedding(5, WIDTH)
        self.a, self.b = nn.Conv1d(WIDTH, WIDTH, 2), nn.Conv1d(WIDTH, WIDTH, 2, dilation=2)
        self.line, self.out = nn.Linear(WIDTH, WIDTH), nn.Conv1d(WIDTH, N, 1)

    def hidden(self, h: Tensor) -> Tensor:
        h = torch.tanh(self.a(F.pad(h, (1, 0))))
        return h + torch.tanh(self.b(F.pad(h, (2, 0))))


class Front(Tokens):
    """A class token in front of the tokens."""

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        h = torch.cat([self.label(label)[:, None], self.embed(x)], 1)[:, :-1]
        return self.out(self.hidden(h.transpose(1, 2)))


class FrontLinear(Tokens):
    """The same, and a layer over it before it is turned round."""

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        h = self.line(torch.cat([self.label(label)[:, None], self.embed(x)], 1)[:, :-1])
        return self.out(self.hidden(h.transpose(1, 2)))


class FrontIndex(Tokens):
    """The label as a token among tokens."""

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return self.out(self.hidden(self.embed(torch.cat([label[:, None], x], 1)[:, :-1]).transpose(1, 2)))


class Prompt(Tokens):
    """Five tokens of a prompt in front."""

    def forward(self, x: Tensor, prompt: Tensor) -> Tensor:
        h = torch.cat([self.label(prompt), self.embed(x)], 1).transpose(1, 2)
        return self.out(self.hidden(h * 1.0))[..., prompt.shape[1] - 1 : -1]


class Overwritten(Tokens):
    """The first sites are the conditioning's, written over what is there."""

    def forward(self, x: Tensor, prompt: Tensor) -> Tensor:
        h = F.pad(self.embed(x).transpose(1, 2), (1, -1))
        h[..., : prompt.shape[1]] = self.label(prompt).transpose(1, 2)
        return self.out(self.hidden(h))


class History(nn.Module):
    """A forecast: what was before is conditioning, and both are one sequence to the layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv1d(1, WIDTH, 3), nn.Conv1d(WIDTH, 2, 3)

    def forward(self, x: Tensor, history: Tensor) -> Tensor:
        both = torch.cat([history, x], 2)
        h = torch.tanh(self.a(F.pad(both, (3, -1))))
        return 0.5 * self.b(F.pad(h, (2, 0)))[..., history.shape[2] :]


BEGINNINGS: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "class token": (Front, ()), "a linear layer over it": (FrontLinear, ()), "a label among tokens": (FrontIndex, ()),
    "a prompt": (Prompt, (5,)), "sites written over": (Overwritten, (5,)), "a history": (History, (1, 9)),
}  # fmt: skip


@pytest.mark.parametrize("length", [20, 72])
@pytest.mark.parametrize("name", BEGINNINGS)
def test_conditioning_at_the_beginning(name: str, length: int) -> None:
    kind, shape = BEGINNINGS[name]
    g = torch.Generator().manual_seed(1)

    def cond(n: int) -> tuple[Tensor, ...]:
        if kind is History:
            return (torch.randn(n, *shape, generator=g),)
        return (torch.randint(0, 5, (n, *shape), generator=g),)

    head = GaussianMixture(1, params="B(n*C)*", value_range=(-1, 1)) if kind is History else HEAD
    size = (1, length) if kind is History else (length,)
    model, given = kind().eval(), cond(4)
    options: Any = dict(cond=cond(1), threads=1)
    sampler = fastgen.compile(model, size, head, verify=False, **options)
    assert sampler.verify().ok
    naive = fastgen.compile(model, size, head, backend="naive", **options)
    ours, slow = sampler.sample(4, cond=given), naive.sample(4, cond=given)
    torch.testing.assert_close(ours, slow, rtol=1e-4, atol=1e-4)
    assert len(ours.unique(dim=0)) == 4


# ---- no period ---------------------------------------------------------------------------------------------------
class PaddedOnce(nn.Module):
    """The receptive field is padded once in front; layers that follow are of other lengths."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.out = nn.Conv1d(N, 8, 2), nn.Conv1d(8, 8, 2, dilation=2), nn.Conv1d(8, N, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(F.pad(x, (3, 0))))
        return self.out(torch.tanh(self.b(h)) + h[..., 2:])


@pytest.mark.parametrize("length", [40, 64, 130])
def test_padded_once_in_front(length: int) -> None:
    head = Categorical(N, encode="onehot", params="B(n*C)*")
    model = PaddedOnce().eval()
    sampler = fastgen.compile(model, (N, length), head, predicts="next", threads=1)
    naive = fastgen.compile(model, (N, length), head, predicts="next", backend="naive")
    assert torch.equal(sampler.sample(2), naive.sample(2))
    with pytest.raises(UnsupportedError, match=f"the plan holds for {length} sites only"):
        sampler.sample(1, length=length + 10)


# ---- other lengths beside conditioning -------------------------------------------------------------------------------
class Odd(nn.Module):
    """A layer, conditioning, and something that is different at one site, or hangs on the length."""

    def __init__(self, what: str, frames: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.what, self.frames = what, frames
        self.first, self.out = nn.Conv1d(1, WIDTH, 3), nn.Conv1d(WIDTH, N, 1)
        self.label, self.mel = nn.Embedding(5, WIDTH), nn.Conv1d(3, WIDTH, 1)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        h, t = torch.tanh(self.first(F.pad(x, (2, 0)))), x.shape[-1]
        h = h + (self.mel(cond) if self.frames else self.label(cond)[:, :, None])
        if self.what == "a site beyond":
            h = h + 2.0 * (torch.arange(t) == 85)
        if self.what == "a tensor of the length":
            h = h * torch.tensor(1 + t / 100)
        return self.out(h)


@pytest.mark.parametrize("frames", [False, True])
@pytest.mark.parametrize("what", ["nothing", "a site beyond", "a tensor of the length"])
def test_lengths_beside_conditioning(what: str, frames: bool) -> None:
    """What the planned length does not show is seen before a sample of another length is drawn."""
    head = Categorical(N, encode="symmetric", params="B(n*C)*")
    model = Odd(what, frames).eval()

    def cond(n: int, length: int) -> tuple[Tensor, ...]:
        g = torch.Generator().manual_seed(length)
        return (torch.randn(n, 3, length, generator=g) if frames else torch.randint(0, 5, (n,), generator=g),)

    options: Any = dict(predicts="next", threads=1)
    sampler = fastgen.compile(model, (1, 80), head, cond(1, 80), **options)
    for length in (80, 40, 120, 100):
        given = cond(3, length)
        naive = fastgen.compile(model, (1, length), head, cond(1, length), backend="naive", **options)
        try:
            ours = sampler.sample(3, cond=given, length=length)
        except UnsupportedError as error:
            assert what != "nothing" and length != 80 and "length" in str(error)
            continue
        assert torch.equal(ours, naive.sample(3, cond=given))
        assert what == "nothing" or length == 80 or (what == "a site beyond" and length == 40)


class Of(nn.Module):
    """A layer, and a use of the length and of conditioning, if there is any."""

    def __init__(self, use: Any) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.use, self.first, self.out = use, nn.Conv1d(1, WIDTH, 2), nn.Conv1d(WIDTH, N, 1)
        self.label, self.mel = nn.Embedding(5, WIDTH), nn.Conv1d(2, WIDTH, 1)
        self.table = nn.Parameter(torch.randn(1, WIDTH, 1300))

    def forward(self, x: Tensor, *cond: Tensor) -> Tensor:
        h = torch.tanh(self.first(F.pad(x, (2, -1))))
        return 3 * self.out(self.use(self, h, x.shape[-1], *cond))


OF_LENGTH: dict[str, Any] = {
    "beyond 800": lambda m, h, t: h * max(1.0, t / 800) ** 2, "below 64": lambda m, h, t: h * min(1.0, t / 64),
    "another function": lambda m, h, t: h.relu() if t < 32 else h, "by the thousand": lambda m, h, t: h + t // 1000,
    "a position of the length": lambda m, h, t: h + m.table[..., t - 1 : t], "every third": lambda m, h, t: h * (1 + (t % 3 == 0)),
    "a mean of positions": lambda m, h, t: h + m.table[..., :t].mean(-1, keepdim=True),
    "a shift": lambda m, h, t: F.pad(h, (t // 50, -(t // 50))), "a sum of ones": lambda m, h, t: h * torch.ones(t).sum() / 100,
}  # fmt: skip


def agree_or_refuse(
    model: nn.Module, shape: tuple[int, ...], cond: Any, lengths: dict[int, tuple[Tensor, ...]]
) -> None:
    """Samples at other lengths are those of a sampler of that length, or refused with the length."""
    head = Categorical(N, encode="symmetric", params="B(n*C)*")
    sampler = fastgen.compile(model, shape, head, cond, threads=1)
    for length, given in lengths.items():
        one = tuple(c[:1] for c in given)
        try:
            ours = sampler.sample(2, seed=2, length=length, cond=given or None)
        except UnsupportedError as error:
            assert "length" in str(error)
            continue
        there = fastgen.compile(model, (1, length), head, one, threads=1)
        assert torch.equal(ours, there.sample(2, seed=2, cond=given or None)), length


@pytest.mark.parametrize("name", OF_LENGTH)
def test_arithmetic_of_the_length(name: str) -> None:
    agree_or_refuse(Of(OF_LENGTH[name]).eval(), (1, 150), None, {25: (), 120: (), 151: (), 300: (), 1200: ()})


@pytest.mark.parametrize("name", OF_LENGTH)
def test_arithmetic_of_the_length_beside_a_label(name: str) -> None:
    model = Of(lambda m, h, t, c: OF_LENGTH[name](m, h, t) + m.label(c)[:, :, None])
    labels = (torch.tensor([1, 3]),)
    agree_or_refuse(model.eval(), (1, 150), (labels[0][:1],), {25: labels, 120: labels, 170: labels, 1200: labels})


OF_FRAMES: dict[str, Any] = {
    "a sum of ones": lambda m, h, t, c: h * torch.ones(c.shape[-1]).sum() / 20, "a roll": lambda m, h, t, c: h.roll(c.shape[-1], 1),
    "a position": lambda m, h, t, c: h + m.table[..., c.shape[-1] : c.shape[-1] + 1],
    "a mask": lambda m, h, t, c: h * (1 + (torch.arange(t) < c.shape[-1])), "nothing": lambda m, h, t, c: h,
}  # fmt: skip


@pytest.mark.parametrize("name", OF_FRAMES)
def test_arithmetic_of_the_length_of_conditioning(name: str) -> None:
    model = Of(lambda m, h, t, c: OF_FRAMES[name](m, h, t, c) + m.mel(c).mean(-1, keepdim=True)).eval()
    head, g = Categorical(N, encode="symmetric", params="B(n*C)*"), torch.Generator().manual_seed(0)
    sampler = fastgen.compile(model, (1, 24), head, (torch.randn(1, 2, 16, generator=g),), threads=1)
    for frames in (16, 60, 30, 4):
        cond = torch.randn(2, 2, frames, generator=g)
        naive = fastgen.compile(model, (1, 24), head, (cond[:1],), backend="naive")
        try:
            assert torch.equal(sampler.sample(2, cond=(cond,)), naive.sample(2, cond=(cond,)))
        except UnsupportedError as error:
            assert "length" in str(error) and name != "nothing"


# ---- refused, and why --------------------------------------------------------------------------------------------
class TimeMajor(Tokens):
    """Takes and gives [T, B]."""

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.hidden(F.pad(self.embed(x).permute(1, 2, 0), (1, -1)))).permute(2, 0, 1)


class Packed(Tokens):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(F.pad(x, (1, -1)))
        packed = nn.utils.rnn.pack_padded_sequence(h, torch.full((len(x),), x.shape[1]), batch_first=True)
        h, _ = nn.utils.rnn.pad_packed_sequence(self.cell(packed)[0], batch_first=True)
        return self.out(h.transpose(1, 2))


class Recurrent(Packed):
    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cell(self.embed(F.pad(x, (1, -1))))[0].transpose(1, 2))


REFUSED: dict[str, tuple[type[nn.Module], str]] = {
    "packed sequences": (Packed, "_pack_padded_sequence"), "a recurrence": (Recurrent, "gru is a recurrence, which is not planned yet"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_reasons(name: str) -> None:
    kind, reason = REFUSED[name]
    with pytest.raises(UnsupportedError, match=reason):
        fastgen.compile(kind().eval(), (24,), HEAD, threads=1)


def test_time_first() -> None:
    """Not a sequence [B, T]: a batch of one happens to look like one."""
    with pytest.raises(FastgenError, match="does not depend on the sampled tensor"):
        fastgen.compile(TimeMajor().eval(), (24,), Categorical(N, encode="index", params="B*n"), threads=1)


# ---- lengths that were not proved ------------------------------------------------------------------------------------
class Blocks(nn.Module):
    """Blocks of eight, padded in front: which sites a block holds depends on the length. Frames of conditioning decide it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.down = nn.Conv1d(1, 6, 2), nn.Conv1d(6, 6, 8, stride=8)
        self.up, self.out = nn.ConvTranspose1d(3, 6, 4, 4), nn.Conv1d(6, 5, 1)

    def forward(self, x: Tensor, mel: Tensor) -> Tensor:
        h = torch.tanh(self.first(F.pad(x, (1, 0))))
        more = -x.shape[-1] % 8
        z = F.pad(self.down(F.pad(h, (more, 0))), (1, -1)).repeat_interleave(8, 2)[..., more:]
        return 2 * self.out(torch.tanh(h + 2 * z + self.up(mel)))


class Rolled(Blocks):
    """The same, and which site is first depends on the number of frames."""

    def forward(self, x: Tensor, mel: Tensor) -> Tensor:
        h = torch.tanh(self.first(F.pad(x, (1, 0))))
        return 2 * self.out(torch.tanh(F.pad(h, (mel.shape[-1] % 3, 0))[..., : x.shape[-1]] + self.up(mel)))


@pytest.mark.parametrize("model", [Blocks, Rolled])
@pytest.mark.parametrize("verify", [True, False])
def test_a_length_between_two_that_were_proved(model: type[nn.Module], verify: bool) -> None:
    head, g = Categorical(5, encode="symmetric", params="B(n*C)*"), torch.Generator().manual_seed(0)
    net = model().eval()

    def mel(sites: int) -> Tensor:
        return torch.randn(2, 3, sites // 4, generator=g)

    sampler = fastgen.compile(net, (1, 80), head, (mel(80)[:1],), predicts="next", threads=1, verify=verify)
    exact = 0
    for sites in (240, 100, 124, 128, 92, 104, 236):
        given = (mel(sites),)
        try:
            drawn = sampler.sample(2, cond=given, length=sites)
        except UnsupportedError as error:
            assert "forward does something else" in str(error)
            continue
        slow = fastgen.compile(net, (1, sites), head, (given[0][:1],), predicts="next", backend="naive")
        assert torch.equal(drawn, slow.sample(2, cond=given))
        exact += 1
    assert exact


@pytest.mark.parametrize("sites", [64, 100, 1500])
@pytest.mark.parametrize("verify", [True, False])
def test_a_constant_with_a_period(sites: int, verify: bool) -> None:
    """A number of each phase of a frame: it repeats, and is planned for its own length."""

    class Phases(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.out, self.phase = nn.Conv1d(1, 6, 2), nn.Conv1d(6, 5, 1), nn.Parameter(torch.randn(6, 4))

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.first(F.pad(x, (2, -1))))
            return self.out(torch.tanh(h + self.phase.repeat(1, -(-x.shape[-1] // 4))[:, : x.shape[-1]]))

    sampler = fastgen.compile(
        Phases().eval(), (1, sites), Categorical(5, encode="unit", params="B(n*C)*"), threads=1, verify=verify
    )
    assert sampler.verify().ok


ENCODERS: dict[str, Any] = {
    "group norm": lambda z: F.group_norm(z, 2), "instance norm": F.instance_norm, "cumsum": lambda z: z.cumsum(-1),
    "backwards": lambda z: z.flip(-1), "largest so far": lambda z: F.max_pool1d(z, 3, 1, 1), "sorted": lambda z: z.sort(-1).values,
}  # fmt: skip


@pytest.mark.parametrize("frames", [24, 26])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_what_is_of_conditioning_alone_needs_no_rule(encoder: str, frames: int) -> None:
    class Encoded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.encode, self.out = nn.Conv1d(1, 6, 3), nn.Conv1d(2, 6, 3, padding=1), nn.Conv1d(6, 5, 1)

        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            given = ENCODERS[encoder](self.encode(c))[..., : x.shape[-1]]
            return 2 * self.out(torch.tanh(self.first(F.pad(x, (2, 0))) + given))

    head, c = Categorical(5, encode="symmetric", params="B(n*C)*"), torch.randn(3, 2, frames)
    net = Encoded().eval()
    sampler = fastgen.compile(net, (1, 24), head, (c[:1],), predicts="next", threads=1)
    slow = fastgen.compile(net, (1, 24), head, (c[:1],), predicts="next", backend="naive")
    assert torch.equal(sampler.sample(3, cond=(c,)), slow.sample(3, cond=(c,)))


def test_a_check_of_conditioning_after_its_last_use() -> None:
    class Late(Front):
        def forward(self, x: Tensor, label: Tensor) -> Tensor:
            out = super().forward(x, label)
            if bool((label >= 3).any()):
                raise ValueError("no such label")
            return out

    sampler = fastgen.compile(Late().eval(), (20,), HEAD, (torch.tensor([1]),), predicts="same", threads=1)
    assert sampler.sample(2, cond=(torch.tensor([0, 2]),)).shape == (2, 20)
    with pytest.raises(FastgenError, match="no such label"):
        sampler.sample(2, cond=(torch.tensor([0, 4]),))
