"""The face: options of sample, streams, likelihoods, cancelling, threads, and what must be left alone."""

# As users write: modules are not annotated in full.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastgen
from fastgen import Cancelled, ModelChangedError, Sampler
from fastgen.models import GatedPixelCNN, build
from fastgen.planned import Planned
from tests.cases import Case, cases
from tests.conftest import Compiled
from tests.interrupts import children_heed_ctrl_c
from tests.oracle import (
    assert_same_samples,
    at_length,
    by_name,
    compile_case,
    noise_of,
    parameters,
    sample_of,
    slow_sample,
    values_of,
)

every_case = pytest.mark.parametrize("case", cases(), ids=str)
backends = pytest.mark.parametrize("backend", ["naive", "reference", "cpu"])
KINDS = by_name(
    "masked-sequential", "rgb-unrolled", "rgb-gaussian", "rgb-colours-last", "unet-pixelcnnpp", "unet-nearest", "tied-onehot",
    "wavenet-onehot", "wavenet-vocoder", "wavenet-channels-last", "masked-mlp", "masked-table", "stereo", "highway-bits",
)  # fmt: skip
kinds = pytest.mark.parametrize("case", KINDS, ids=str)


def only(name: str) -> Case:
    return by_name(name)[0]


# ---- known values ----------------------------------------------------------------------------------------------------
@kinds
def test_in_painting(case: Case, compiled: Compiled) -> None:
    """Known values stay, the others are those of the slow loop with the same ones known."""
    generator = torch.Generator().manual_seed(4)
    known = case.random_values(3, generator)
    mask = torch.rand(known.shape, generator=generator) < 0.4
    slow, params = slow_sample(case, 3, 6, known=torch.where(mask, known, float("nan")))
    for backend in ("cpu", "reference"):
        given, where = sample_of(case, known), sample_of(case, mask.float()).bool()
        x = compiled(case, backend=backend).sample(3, seed=6, cond=case.conds(3), given=given, mask=where)
        assert torch.equal(x[where], given[where])
        assert_same_samples(case, values_of(case, x), slow, params, 6)


@kinds
def test_all_known_or_none(case: Case, compiled: Compiled) -> None:
    sampler, cond = compiled(case), case.conds(2)
    free = sampler.sample(2, seed=1, cond=cond)
    given = sample_of(case, case.random_values(2, torch.Generator().manual_seed(4)))
    everything, nothing = torch.ones(given.shape, dtype=torch.bool), torch.zeros(given.shape, dtype=torch.bool)
    assert torch.equal(sampler.sample(2, seed=1, cond=cond, given=given, mask=everything), given)
    assert torch.equal(sampler.sample(2, seed=1, cond=cond, given=given, mask=nothing), free)


def test_priming_continues_a_sequence(compiled: Compiled) -> None:
    """A sample is its own prime; one prime and one mask may serve all samples, whatever else `given` holds."""
    case = at_length(only("wavenet-onehot"), 80)
    sampler = compiled(case)
    whole = sampler.sample(3, seed=9)
    mask = torch.zeros(1, 80, dtype=torch.bool)
    mask[:, :30] = True
    assert torch.equal(sampler.sample(3, seed=9, given=whole, mask=mask.expand(3, 80)), whole)
    shared = sampler.sample(3, seed=9, given=whole[:1], mask=mask)
    assert torch.equal(shared[:, :30], whole[:1, :30].expand(3, 30))
    assert torch.equal(shared[0], whole[0])
    other = torch.where(mask, whole, 0)
    assert torch.equal(sampler.sample(3, seed=9, given=other, mask=mask), whole)


# ---- options ---------------------------------------------------------------------------------------------------------
@kinds
def test_temperature(case: Case, compiled: Compiled) -> None:
    for temperature in (0.5, 1.7):
        slow, params = slow_sample(case, 2, 3, temperature=temperature)
        x = compiled(case).sample(2, seed=3, cond=case.conds(2), temperature=temperature)
        if case.head.discrete:
            u = noise_of(case, 2, 3)
            again = case.head.draw(
                parameters(case, case.build().eval(), values_of(case, x), case.conds(2)), u, temperature
            )
            assert torch.equal(values_of(case, x).reshape(again.shape), again)
        else:
            torch.testing.assert_close(values_of(case, x), slow, atol=2e-3, rtol=2e-3)
        assert params.isfinite().all()


def test_a_low_temperature_takes_the_likeliest_class(compiled: Compiled) -> None:
    case = only("masked-sequential")
    x = compiled(case).sample(2, temperature=1e-20)
    assert torch.equal(x, compiled(case).sample(2, temperature=1e-20, seed=77))
    theta = parameters(case, case.build().eval(), values_of(case, x), ())
    assert torch.equal(values_of(case, x).reshape(2, -1), theta.argmax(-1).float())


@backends
def test_callback_counts_and_cancels(backend: str) -> None:
    case = only("masked-sequential")
    sampler = compile_case(case, backend=backend)
    calls: list[tuple[int, int]] = []

    def stop_half_way(done: int, total: int) -> bool:
        calls.append((done, total))
        return done < total // 2

    with pytest.raises(Cancelled):
        sampler.sample(2, callback=stop_half_way)
    assert all(total == 2 * case.steps for _, total in calls)
    assert [d for d, _ in calls] == sorted(d for d, _ in calls) and calls[-1][0] < 2 * case.steps
    seen: list[int] = []
    x = sampler.sample(2, callback=lambda done, total: seen.append(done))
    assert torch.equal(x, sampler.sample(2)), "the sampler must be usable after a cancelled run"
    assert seen and max(seen) <= 2 * case.steps


@backends
def test_an_error_in_the_callback_comes_out(backend: str) -> None:
    sampler = compile_case(only("masked-sequential"), backend=backend)

    def broken(done: int, total: int) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        sampler.sample(2, callback=broken)
    assert sampler.sample(1).shape == (1, 1, 8, 8)


def test_progress_bar(capsys: pytest.CaptureFixture[str], compiled: Compiled) -> None:
    compiled(only("masked-sequential")).sample(2, progress=True)
    shown = capsys.readouterr().err
    assert "100%" in shown and "128" in shown


def test_generator_seeds(compiled: Compiled) -> None:
    sampler = compiled(only("masked-sequential"))
    generator = torch.Generator().manual_seed(3)
    first, second = sampler.sample(2, seed=generator), sampler.sample(2, seed=generator)
    assert not torch.equal(first, second)
    assert torch.equal(first, sampler.sample(2, seed=torch.Generator().manual_seed(3)))
    assert not torch.equal(sampler.sample(2, seed=1), sampler.sample(2, seed=2**64 - 1))


def test_conditioning_per_sample_or_shared(compiled: Compiled) -> None:
    case = only("gated-cropped")
    sampler, conds = compiled(case), case.conds(3)
    together = sampler.sample(3, seed=5, cond=conds)
    for i in range(3):
        alone = sampler.sample(1, seed=5, cond=tuple(c[i : i + 1] for c in conds), first=i)
        assert torch.equal(alone[0], together[i])
    one = tuple(c[1:2] for c in conds)
    assert torch.equal(sampler.sample(3, seed=5, cond=one)[1], together[1])
    assert torch.equal(sampler.sample(2, seed=5), sampler.sample(2, seed=5, cond=case.cond()))


# ---- streams ---------------------------------------------------------------------------------------------------------
@backends
@kinds
def test_stream_joins_to_sample(case: Case, backend: str, compiled: Compiled) -> None:
    sampler, cond = compiled(case, backend=backend), case.conds(2)
    chunks = list(sampler.stream(2, seed=8, cond=cond))
    whole = sampler.sample(2, seed=8, cond=cond)
    squeezed = whole.dim() == len(case.sites) + 1
    axes = case.axes.replace("C", "") if squeezed else case.axes
    axis = 1 + axes.index("H" if "H" in axes else "T")
    assert torch.equal(torch.cat(chunks, axis), whole)
    if "H" in axes:
        assert len(chunks) > 1, "rows should come before the last one is done"


def test_stream_of_another_length(compiled: Compiled) -> None:
    case = at_length(only("wavenet-embedded"), 64)
    chunks = list(compiled(case).stream(2, seed=1, length=101))
    assert torch.equal(torch.cat(chunks, 1), compiled(case).sample(2, seed=1, length=101))


def streaming_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "fastgen-stream"]


def test_closing_a_stream_ends_its_thread() -> None:
    case = at_length(only("wavenet-onehot"), 64)
    sampler = compile_case(case)
    stream = sampler.stream(8, length=200_000)
    assert not streaming_threads(), "nothing runs before the first chunk is asked for"
    assert next(stream).shape[0] == 8
    assert streaming_threads()
    began = time.monotonic()
    stream.close()  # type: ignore[attr-defined]
    assert not streaming_threads() and time.monotonic() - began < 5
    assert sampler.sample(1).shape == (1, 64)


def test_an_error_of_a_stream_comes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = compile_case(only("masked-sequential"))

    def broken(request: Any) -> None:
        raise MemoryError("out of it")

    monkeypatch.setattr(sampler.executor, "run", broken)
    with pytest.raises(MemoryError, match="out of it"):
        list(sampler.stream(1))
    assert not streaming_threads()
    with pytest.raises(TypeError, match="callback"):
        sampler.stream(1, callback=print)


# ---- likelihood ------------------------------------------------------------------------------------------------------
@every_case
def test_log_prob(case: Case, compiled: Compiled) -> None:
    """Equal to the sum over steps of the head's log-likelihood, from forward and from stepping alike."""
    sampler, cond = compiled(case), case.conds(3)
    values = case.random_values(3, torch.Generator().manual_seed(6))
    x = sample_of(case, values)
    nats = sampler.log_prob(x, cond)
    theta = parameters(case, case.build().eval(), values, cond).double()
    per_step = case.by_step(values).double()
    slow = torch.stack([case.head.log_prob(theta[:, t], per_step[:, t]) for t in range(case.steps)], 1).sum(1)
    torch.testing.assert_close(nats, slow, rtol=1e-5, atol=1e-4)
    values_count = values[0].numel()
    torch.testing.assert_close(
        sampler.bits_per_dim(x, cond), -nats / values_count / torch.log(torch.tensor(2.0)).double()
    )
    alone = torch.cat([sampler.log_prob(x[i : i + 1], tuple(c[i : i + 1] for c in cond)) for i in range(3)])
    torch.testing.assert_close(nats, alone, rtol=1e-5, atol=1e-4)


def test_log_prob_of_many_and_of_none(compiled: Compiled) -> None:
    case = only("masked-table")
    sampler = compiled(case)
    x = sampler.sample(37, seed=2, cond=case.conds(37))
    nats = sampler.log_prob(x, case.conds(37))
    assert nats.shape == (37,)
    torch.testing.assert_close(nats[36:], sampler.log_prob(x[36:], tuple(c[36:] for c in case.conds(37))))
    assert sampler.log_prob(x[:0], case.conds(0)).shape == (0,)


def test_log_prob_at_another_length(compiled: Compiled) -> None:
    case = at_length(only("wavenet-one-row"), 64)
    x = compiled(case).sample(2, length=90)
    torch.testing.assert_close(compiled(case).log_prob(x), compiled(at_length(case, 90)).log_prob(x))


# ---- what is left alone ----------------------------------------------------------------------------------------------
def test_modes_and_random_state_are_left_alone() -> None:
    case = only("unet-pixelcnnpp")  # has dropout
    model = case.build().train()
    model.h1.eval()  # type: ignore[union-attr]
    before = {name: m.training for name, m in model.named_modules()}
    weights = {name: p.clone() for name, p in model.state_dict().items()}
    state = torch.get_rng_state()
    sampler = fastgen.compile(model, case.shape, case.head)
    x = sampler.sample(2)
    sampler.log_prob(x)
    list(sampler.stream(1))
    fastgen.compile(model, case.shape, case.head, backend="naive").sample(1)
    assert {name: m.training for name, m in model.named_modules()} == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weights[name], p) for name, p in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not x.requires_grad


def test_modes_are_restored_after_an_error() -> None:
    case = only("gated-embedding")
    model = case.build().train()
    sampler = fastgen.compile(model, case.shape, case.head, case.cond(), layout=case.layout)
    with pytest.raises((IndexError, ValueError), match="index"):
        sampler.sample(1, cond=(torch.tensor([99]),))
    assert all(m.training for m in model.modules())
    assert sampler.sample(1).shape == (1, 6, 7)


def test_under_other_defaults(compiled: Compiled) -> None:
    """Results do not depend on the caller's default dtype, inference mode or gradient mode."""
    for case in by_name("wavenet-vocoder", "masked-mlp", "tied-onehot"):
        expected = compiled(case).sample(2, seed=3, cond=case.conds(2))
        model, example, cond = case.build(), case.cond(), case.conds(2)
        said: dict[str, Any] = dict(layout=case.layout, predicts=case.predicts, start=case.start)
        torch.set_default_dtype(torch.float64)
        try:
            sampler = fastgen.compile(model, case.shape, case.head, example, **said)
            x = sampler.sample(2, seed=3, cond=cond)
            chunks = list(sampler.stream(2, seed=3, cond=cond))
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(x, expected) and x.dtype == chunks[0].dtype == expected.dtype
        with torch.inference_mode():
            again = fastgen.compile(model, case.shape, case.head, example, **said)
            assert torch.equal(again.sample(2, seed=3, cond=cond), expected)


# ---- the one-liner ---------------------------------------------------------------------------------------------------
def test_one_liner_remembers_and_refreshes(monkeypatch: pytest.MonkeyPatch) -> None:
    case = only("masked-sequential")
    model = case.build()
    plans: list[int] = []
    make = Planned.__init__

    def counted(self: Planned, *args: Any) -> None:
        plans.append(1)
        make(self, *args)

    monkeypatch.setattr(Planned, "__init__", counted)
    first = fastgen.sample(model, 2, shape=case.shape, head=case.head, seed=1)
    again = fastgen.sample(model, 2, shape=list(case.shape), head=case.head, seed=1)
    assert torch.equal(first, again) and len(plans) == 1
    bias = next(p for p in model.parameters() if p.dim() == 1 and len(p) > 1)
    bias.data.copy_(bias.data.flip(0).clone())  # the same numbers in another order
    changed = fastgen.sample(model, 2, shape=case.shape, head=case.head, seed=1)
    assert len(plans) == 2 and not torch.equal(first, changed)
    fresh = fastgen.compile(model, case.shape, case.head).sample(2, seed=1)
    assert torch.equal(changed, fresh)


def test_one_liner_tells_models_and_options_apart() -> None:
    case = only("masked-table")
    models = [case.build(), case.build()]
    models[1].get_parameter("out").data.neg_()
    said: dict[str, Any] = dict(shape=case.shape, head=case.head)
    a, b = (fastgen.sample(m, 3, seed=1, cond=case.conds(3), **said) for m in models)
    assert not torch.equal(a, b)
    assert torch.equal(a, fastgen.sample(models[0], 3, seed=1, cond=case.conds(3)[0], **said))
    c = fastgen.sample(models[0], 3, seed=1, cond=case.conds(3), dtype=torch.bfloat16, **said)
    assert torch.equal(
        c,
        fastgen.compile(models[0], cond=case.cond(), dtype=torch.bfloat16, **said).sample(
            3, seed=1, cond=case.conds(3)
        ),
    )


def test_one_liner_binds_what_is_no_tensor() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv1d(1, 4, 2)

        def forward(self, x: Tensor, scale: float) -> Tensor:
            return self.conv(nn.functional.pad(x, (2, -1))) * scale

    model, said = Scaled(), dict(shape=(1, 12), head=fastgen.heads.Categorical(4, encode="unit"))
    for scale in (1.0, 5.0, 1.0):
        x = fastgen.sample(model, 4, cond=(scale,), seed=2, **said)
        assert torch.equal(x, fastgen.compile(model, cond=(scale,), **said).sample(4, seed=2))  # type: ignore[arg-type]


def test_from_checkpoint_to_samples(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build(dict(model="gated-pixelcnn", levels=4, dim=4, layers=2, classes=3, shape=[6, 6], hidden=5))
    fastgen.save_pretrained(model, tmp_path / "saved")
    again = fastgen.from_pretrained(tmp_path / "saved")
    label = (torch.tensor([2]),)
    x = fastgen.sample(model, 3, seed=4, cond=label)
    assert x.shape == (3, 6, 6) and x.dtype == torch.int64
    assert torch.equal(fastgen.sample(again, 3, seed=4, cond=label), x)


# ---- threads and signals ---------------------------------------------------------------------------------------------
def run_both(*work: Callable[[], None]) -> None:
    """Runs each in a thread; the first error of any comes out."""
    errors: list[BaseException] = []

    def guarded(f: Callable[[], None]) -> None:
        try:
            f()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(f,)) for f in work]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
        assert not t.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]


@pytest.mark.parametrize("shared", [True, False])
def test_samplers_side_by_side(shared: bool) -> None:
    """Samplers, with conditioning, run from several threads; the module's own forward goes on meanwhile."""
    case = only("gated-embedding")
    one = compile_case(case)
    samplers = [one, one if shared else compile_case(case)]
    expected = one.sample(3, seed=1, cond=case.conds(3))
    same: list[bool] = []

    def sample(sampler: Sampler) -> Callable[[], None]:
        return lambda: same.extend(
            torch.equal(sampler.sample(3, seed=1, cond=case.conds(3)), expected) for _ in range(15)
        )

    busy = nn.Sequential(nn.Linear(2, 2), nn.ReLU())

    def forward() -> None:
        for _ in range(300):
            busy(torch.zeros(1, 2))

    run_both(sample(samplers[0]), sample(samplers[1]), forward)
    assert len(same) == 30 and all(same)


def test_other_threads_run_meanwhile() -> None:
    """The interpreter lock is free while the native loop runs."""
    sampler = compile_case(at_length(only("wavenet-onehot"), 64))
    ticks: list[float] = []
    done = threading.Event()

    def tick() -> None:
        while not done.is_set():
            ticks.append(time.monotonic())
            time.sleep(0.002)

    other = threading.Thread(target=tick)
    other.start()
    try:
        began = time.monotonic()
        sampler.sample(16, length=20_000)
        ended = time.monotonic()
    finally:
        done.set()
        other.join()
    during = [t for t in ticks if began < t < ended]
    assert len(during) > 0.05 * (ended - began) / 0.002, f"{len(during)} ticks in {ended - began:.2f} s"


CTRL_C = """
    import threading, time, sys
    import torch, fastgen
    from tests.oracle import at_length, by_name, compile_case
    sampler = compile_case(at_length(by_name("wavenet-onehot")[0], 64))
    sampler.sample(1)
    print("running", flush=True)
    began = time.monotonic()
    try:
        {run}
    except KeyboardInterrupt:
        assert time.monotonic() - began < 30
        assert threading.active_count() == 1, threading.enumerate()
        assert sampler.sample(1).shape == (1, 64)
        print("interrupted", flush=True)
"""


@pytest.mark.parametrize("run", ["sampler.sample(64, length=2_000_000)", "list(sampler.stream(64, length=2_000_000))"])
def test_ctrl_c(run: str) -> None:
    code = textwrap.dedent(CTRL_C).replace("{run}", run)
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path), OMP_NUM_THREADS="1")
    with children_heed_ctrl_c():
        child = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
        )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == "running\n"
        time.sleep(0.5)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
    assert out == "interrupted\n" and child.returncode == 0, err


def test_changed_weights_are_refused_until_refreshed() -> None:
    case = only("masked-sequential")
    sampler = compile_case(case)
    old = sampler.sample(2)
    name, weight = next((n, p) for n, p in sampler.model.named_parameters() if p.dim() == 4)
    weight.data.mul_(-1)
    for use in (lambda: sampler.sample(1), lambda: next(iter(sampler.stream(1))), sampler.verify):
        with pytest.raises(ModelChangedError, match=rf"{name} changed.*refresh"):
            use()
    sampler.refresh()
    assert sampler.verify().ok and not torch.equal(sampler.sample(2), old)


FORWARDS: list[int] = []


def test_conditioning_is_computed_once() -> None:
    """What depends on labels alone is torch's to compute: once for each label, whatever the batch and the call."""
    model = GatedPixelCNN(levels=7, dim=8, layers=2, classes=5, shape=(4, 4), hidden=8, first_kernel=3)
    forwards = FORWARDS  # no closure over it, of which the sampler's view would have a copy
    model.register_forward_pre_hook(lambda module, args: FORWARDS.append(len(args[0])))
    sampler = fastgen.compile(model, verify=False)
    forwards.clear()
    labels = torch.tensor([3, 1, 3, 3])
    drawn = sampler.sample(4, cond=(labels,))
    assert forwards == [1, 1]
    assert torch.equal(sampler.sample(4, cond=(labels,)), drawn) and forwards == [1, 1]
    assert torch.equal(sampler.sample(1, cond=(labels[:1],)), drawn[:1]) and forwards == [1, 1]
    with torch.no_grad():
        model.layers[1].label.weight.mul_(3.0)  # type: ignore[union-attr, operator]
    sampler.refresh()
    forwards.clear()
    sampler.sample(4, cond=(labels,))
    assert forwards == [1, 1]
