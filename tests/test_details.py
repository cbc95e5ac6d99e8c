"""Details that a changed line would show in nowhere else: found by changing lines and seeing which tests noticed."""

# As users write: modules are not annotated in full.
# mypy: ignore-errors

from __future__ import annotations

import copy
import math
import queue
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastgen
import fastgen.verify as v
from fastgen.backends.cpu import CpuExecutor
from fastgen.diagnose import _Replay
from fastgen.errors import ModelChangedError, ShapeError, UnsupportedError, VerifyError
from fastgen.heads import Categorical, GaussianMixture, Head
from fastgen.native import native
from fastgen.nn import MaskedLinear, fuse_
from fastgen.train.state import write_text
from fastgen.view import copied, private_view
from tests.test_closed_world import Floats, law
from tests.test_heads import record
from tests.test_nn_life import Block, X
from tests.test_proof import Delayed, planted, sampler_of

CAT = Categorical(4, encode="unit", params="B(n*C)*")


class DelayedImage(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 4, (2, 3))

    def forward(self, x):
        return self.conv(F.pad(x, (1, 1, 2, 0)))[:, :, :-1]


def test_scales_that_overflow():
    head = GaussianMixture(1)
    p = torch.tensor([[0.0, 88.0]])
    u = torch.tensor([[0.5, 1 - 2.0**-33]], dtype=torch.float64)
    ours = head.draw(p, u)
    theirs = torch.from_numpy(native().draw(record(native(), head, 1), p.numpy(), u.numpy()))
    torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_ties_beyond_what_is_likely(monkeypatch):
    sampler = sampler_of(Delayed(4), CAT)
    monkeypatch.setattr(v, "_draws", lambda *a: (12, 12))
    monkeypatch.setattr(Head, "mismatch", lambda self, a, b: torch.full(a.shape[:-1], 1.0 / 64))
    report = sampler.verify()
    assert report.likely_ties == pytest.approx(1) and not report.ok


def test_an_error_above_the_tolerance():
    sampler = sampler_of(Delayed(4), CAT)
    assert not planted(
        sampler, lambda p: torch.full((4,), 1.0).where(torch.arange(4) == 0, torch.tensor(0.0)) * 5e-5
    ).ok


def test_an_error_of_a_distribution_alone():
    def finish(y):
        return torch.cat([y, torch.full_like(y, -14.0)], 1)

    sampler = sampler_of(Delayed(1, finish), GaussianMixture(1, log_scale_floor=-14))
    assert sampler.verify().ok
    report = planted(sampler, lambda p: torch.tensor([9e-6, 0.0]))
    assert report.error < 1e-5 and not report.ok, str(report)


def test_draws_of_another_seed():
    sampler = sampler_of(Delayed(4), CAT)
    run = sampler.executor.run

    def lying(request):
        drawn, theta = run(
            replace(request, seed=request.seed + 1)
        )  # another seed's samples: right parameters, wrong draws
        return drawn, theta

    sampler.executor.run = lying
    report = sampler.verify()
    assert report.near_ties <= 3 and not report.ok, str(report)


def test_a_yardstick_that_is_no_rounding():
    class Two(Delayed):
        def forward(self, x):
            y = super().forward(x)
            return y * 1.5 if x.dtype == torch.float64 else y

    sampler = sampler_of(Two(4), CAT)
    assert sampler.verify().ok
    assert not planted(sampler, lambda p: 1e-2 * torch.tensor([1.0, 0, 0, 0])).ok


def test_forwards_own_rounding_is_measured():
    model = Delayed(5, lambda y: (y * 3e4 + 1e4) * 1e-2 - (y.flip(1) * 3e4 + 1e4) * 1e-2)
    assert sampler_of(model, Categorical(5, encode="symmetric", params="B(n*C)*")).verify().rounding > 1e-6


def test_a_beginning_of_another_length():
    class Long(Delayed):
        def forward(self, x):
            y = super().forward(x)
            return y * (0.5 if 500 < x.shape[-1] < 800 else 2.0)

    sampler = fastgen.compile(Long(4), (1, 1024), CAT, threads=1, verify=False)
    assert not sampler.any_length


def test_slow_positions():
    class Slow(Delayed):
        def forward(self, x):
            return super().forward(x) + 2e-3 * torch.sin(0.1 * torch.arange(x.shape[-1]))

    sampler = fastgen.compile(Slow(4), (1, 100), CAT, threads=1, verify=False)
    assert not sampler.any_length


@pytest.mark.parametrize(
    "forget",
    [
        lambda r: {"temperature": 1.0},
        lambda r: {"first": r.first % 2**32},
        lambda r: {"seed": r.seed & ~1},
        lambda r: {"seed": r.seed % 2**32},
    ],
)
@pytest.mark.parametrize("sequence", [True, False])
def test_an_executor_that_forgets(monkeypatch, forget, sequence):
    """The temperature, the upper half of an index, a bit of the seed: found at compile, of sequences as of images."""
    model, shape = (Delayed(4), (1, 80)) if sequence else (DelayedImage(), (1, 6, 5))
    assert fastgen.compile(model, shape, CAT, threads=1).verify().ok
    run = CpuExecutor.run
    monkeypatch.setattr(CpuExecutor, "run", lambda self, request: run(self, replace(request, **forget(request))))
    with pytest.raises(VerifyError, match="every layer agrees with its plan"):
        fastgen.compile(model, shape, CAT, threads=1)


@pytest.mark.parametrize("verify", [True, False])
def test_new_weights_are_proved_as_the_first_were(monkeypatch, verify):
    """And where they cannot be, the sampler is what it was: for the old weights."""
    model = DelayedImage()
    sampler = fastgen.compile(model, (1, 6, 5), CAT, threads=1, verify=verify)
    old, plan, run = sampler.sample(2), sampler.plan, CpuExecutor.run
    with torch.no_grad():
        model.conv.weight.mul_(2)
    monkeypatch.setattr(CpuExecutor, "run", lambda self, request: run(self, replace(request, temperature=1.0)))
    if not verify:
        sampler.refresh()
        assert sampler.plan is not plan
        return
    with pytest.raises(VerifyError):
        sampler.refresh()
    with pytest.raises(VerifyError):
        sampler.refresh()
    with pytest.raises(ModelChangedError):
        sampler.sample(2)
    with torch.no_grad():
        model.conv.weight.div_(2)
    assert torch.equal(sampler.sample(2), old) and sampler.plan is plan


def test_the_one_liner_proves_new_weights(monkeypatch):
    model, run = DelayedImage(), CpuExecutor.run
    fastgen.sample(model, 2, shape=(1, 6, 5), head=CAT)
    with torch.no_grad():
        model.conv.weight.mul_(2)
    monkeypatch.setattr(CpuExecutor, "run", lambda self, request: run(self, replace(request, temperature=1.0)))
    with pytest.raises(VerifyError):
        fastgen.sample(model, 2, shape=(1, 6, 5), head=CAT)


def test_the_first_difference_may_be_small():
    replay = _Replay(None)
    replay.errors = [("a", 1e-6), ("b", 5e-4), ("c", 2e-3)][:2]
    assert replay.first == ("b", 5e-4)


def test_parameters_lost_by_the_executor(monkeypatch):
    run = CpuExecutor.run

    def wrong(self, request):
        values, params = run(self, request)
        values[:, 5:] = math.nan
        if params is not None:
            params[:, 5:] = math.nan
        return values, params

    monkeypatch.setattr(CpuExecutor, "run", wrong)
    with pytest.raises(VerifyError, match="stepping does not reproduce forward"):
        fastgen.compile(Delayed(4), (1, 32), CAT, threads=1)


@pytest.mark.parametrize("backend", ["cpu", "reference", "naive"])
def test_the_last_report_cancels(backend):
    """The last report is of all steps; False at it cancels."""
    sampler = sampler_of(Delayed(4), CAT, backend=backend)
    seen = []
    sampler.sample(2, callback=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (64, 64)
    with pytest.raises(fastgen.Cancelled):
        sampler.sample(2, callback=lambda done, total: done < total)


def test_given_values_in_a_short_sequence():
    """A value that is drawn where one is given is no near tie."""
    sampler = fastgen.compile(Delayed(4), (1, 6), CAT, threads=1, verify=False)
    run = sampler.executor.run
    sampler.executor.run = lambda request: run(replace(request, given=None, mask=None))
    assert not sampler.verify().ok


class Scaled(Delayed):
    def __init__(self, use):
        super().__init__(4)
        self.use = use

    def forward(self, x, c):
        return self.use(super().forward(x), c)


def test_limits_of_what_no_output_reads():
    sampler = sampler_of(
        Scaled(lambda h, c: ((torch.tanh(h) * c[:, None, None]).long(), h + torch.sin(c)[:, None, None])[1]),
        CAT,
        cond=(torch.ones(1),),
    )
    assert sampler.sample(1, cond=(torch.full((1,), 1e9),)).shape == (1, 1, 32)


def test_a_loop_over_conditioning_that_ends_early():
    def use(h, c):
        for _ in range(c.shape[-1]):
            h = torch.tanh(2 * h)
        return h + c.mean(-1)[:, None, None]

    sampler = sampler_of(Scaled(use), CAT, cond=(torch.ones(1, 5),))
    with pytest.raises(UnsupportedError, match="times, and did"):
        sampler.sample(1, cond=(torch.ones(1, 3),))


def test_conditioning_one_frame_short():
    class Two(Delayed):
        def forward(self, x, c):
            return super().forward(x) + c

    sampler = fastgen.compile(Two(4), (1, 2), CAT, (torch.ones(1, 4, 2),), threads=1, verify=False)
    with pytest.raises((ShapeError, UnsupportedError)):
        sampler.sample(1, cond=(torch.ones(1, 4, 1),))


def test_a_reader_keeps_the_old_file(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    with path.open() as reader:
        write_text(path, "new")
        assert reader.read() == "old" and path.read_text() == "new"


def test_a_bar_ends_full(capsys):
    sampler_of(Delayed(4), CAT, backend="naive").sample(2, progress=True) if False else fastgen.compile(
        Delayed(4), (1, 32), CAT, backend="naive"
    ).sample(2, progress=True)
    assert "100%" in capsys.readouterr().err


def test_a_stream_whose_middle_row_comes_first():
    """The middle row is drawn first."""

    class Middle(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.out = nn.Conv2d(1, 4, 1)

        def forward(self, x):
            return self.out(F.pad(x, (1, 0))[..., :-1])

    order = torch.tensor([1, 0, 2])[:, None] * 4 + torch.arange(4)
    sampler = fastgen.compile(Middle(), (1, 3, 4), CAT, order=order, threads=1)
    chunks = list(sampler.stream(2, seed=1))
    assert torch.equal(torch.cat(chunks, 2), sampler.sample(2, seed=1))


def test_rights_of_a_report(tmp_path):
    write_text(tmp_path / "x", "new")
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o644


def test_the_same_question_twice():
    def use(h):
        ok = (h.abs() < 1e6).all()
        scale = 1.0 if ok else 2.0
        if not ok:
            raise ValueError
        return h * scale

    law(Floats(use))


def test_a_mask_cast_back_and_forth():
    torch.manual_seed(0)
    layer, x = MaskedLinear(6, 4, (torch.rand(4, 6) > 0.5).float()), torch.randn(2, 6)
    wanted = copy.deepcopy(layer).bfloat16()(x.bfloat16())
    layer.double()(x.double())
    assert torch.equal(layer.bfloat16()(x.bfloat16()), wanted)


def test_a_backward_hook_in_front():
    model, seen = Block(), []
    fuse_(model, X)
    model.conv.register_full_backward_pre_hook(lambda *_: seen.append(1))
    model(X).sum().backward()
    assert seen == [1]


def test_a_convolution_of_another_class():
    class Twice(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    fused, plain = Block(), Block()
    fuse_(fused, X)
    for m in (fused, plain):
        new = Twice(6, 12, 3)
        new.load_state_dict(m.conv.state_dict())
        m.conv = new
    assert torch.allclose(fused(X), plain(X), atol=1e-6)


class Of(Delayed):
    """A function of a person's, kept as an attribute, over the layer."""

    def __init__(self, use):
        super().__init__(4)
        self.use = use

    def forward(self, x):
        return self.use(super().forward(x))


def test_defaults_that_forward_appends_to():
    def use(h, acc=[]):  # noqa: B006
        acc.append(1)
        return h * 2

    s = sampler_of(Of(use), CAT)
    s.sample(1)
    s.verify()
    assert use.__defaults__ == ([],)


def test_keyword_defaults():
    drop = nn.Dropout(0.5)

    def use(h, *, scale=2.0):
        return drop(h) * scale

    assert sampler_of(Of(use), CAT).verify().ok


def test_copies_of_slots():
    class Slotted(nn.Module):
        __slots__ = ("scale",)

        def __init__(self):
            super().__init__()
            self.scale = 2.0

        def forward(self, h):
            return h * self.scale

    assert copied(private_view(Slotted())).scale == 2.0


def test_a_module_in_an_object_of_pythons():
    drop = nn.Dropout(0.5)
    q = queue.Queue()
    q.put([[drop]])  # an object of Python's that holds a module, deep

    class M(Delayed):
        def __init__(self):
            super().__init__(4)
            self.q = q

        def forward(self, x):
            return self.q.queue[0][0][0](super().forward(x))

    assert sampler_of(M(), CAT).verify().ok


def test_a_scripted_module_in_training():
    model = torch.jit.script(nn.Sequential(nn.Conv1d(1, 4, 1), nn.Dropout(0.5))).train()
    with pytest.raises(UnsupportedError, match="scripted module is in training mode"):
        fastgen.compile(model, (1, 32), CAT, predicts="next", threads=1)


def test_attributes_of_functions():
    drop = nn.Dropout(0.5)

    def use(h):
        return drop(h) * use.scale

    def other(h):
        return drop(h)

    other.scale = 2.0

    class M(Delayed):
        def __init__(self):
            super().__init__(4)
            self.use = other

        def forward(self, x):
            return self.use(super().forward(x)) * self.use.scale

    assert sampler_of(M(), CAT).verify().ok
