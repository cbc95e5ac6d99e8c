"""The command line: what it writes, what it says, and how it fails."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import fastgen
from fastgen import pretrained
from fastgen.cli import commands
from fastgen.cli.main import main
from fastgen.cli.models import rate_of
from fastgen.models import CONFIGS, build
from fastgen.planned import Planned
from fastgen.train import RECIPES
from tests.interrupts import children_heed_ctrl_c

ROOT = Path(__file__).parent.parent
DIGITS: dict[str, Any] = dict(model="gated-pixelcnn", levels=4, dim=4, layers=2, classes=3, shape=[6, 6], hidden=5)
COLOUR: dict[str, Any] = dict(model="pixelcnnpp", nr_resnet=1, nr_filters=4, nr_mix=2, shape=[3, 8, 8])
SOUND: dict[str, Any] = dict(
    model="wavenet", layers=4, stacks=2, residual=4, gate=8, skip=4, kernel_size=2, length=100,
    output="softmax", classes=16,
)  # fmt: skip
SPEAKERS: dict[str, Any] = dict(
    model="wavenet", layers=2, stacks=1, residual=4, gate=8, skip=4, mixtures=2, length=90, local_channels=2,
    upsample_scales=[4], global_channels=3, speakers=2,
)  # fmt: skip
MODELS = {"digits": DIGITS, "colour": COLOUR, "sound": SOUND, "speakers": SPEAKERS}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, config in MODELS.items():
            pretrained.save_pretrained(build(config), folder / name)
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*args: object) -> int:
    return main([str(a) for a in args])


def fails(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """The one line that a failing command says on stderr."""
    assert run(*args, "-q") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fastgen: ")
    assert err.count("\n") == 1
    return err


# ---- sample ------------------------------------------------------------------------------------------------
def test_sample_writes_a_grid(saved: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("sample", saved / "digits", "-n", 6, "--upscale", 1, "--seed", 3) == 0
    out, err = capsys.readouterr()
    assert re.fullmatch(r"wrote samples.png: 6 samples of digits in [\d.]+ s \([\d.e+]+ samples/s\)\n", out)
    assert "sampling 6 with seed 3" in err
    with Image.open(here / "samples.png") as picture:
        page = np.array(picture)
    assert page.shape == (2 * 6 + 2, 3 * 6 + 2 * 2)  # a column for each label
    labels = torch.arange(6) % 3
    expected = fastgen.sample(pretrained.from_pretrained(saved / "digits"), 6, seed=3, cond=(labels,)) * 85
    for k in range(6):
        y, x = k // 3 * 8, k % 3 * 8
        assert np.array_equal(page[y : y + 6, x : x + 6], expected[k].numpy())


def drawn(saved: Path, *args: object, model: str = "digits") -> Tensor:
    assert run("sample", saved / model, "-q", "--no-verify", "--out", "x.npy", *args) == 0
    return torch.from_numpy(np.load("x.npy"))


def test_options_reach_the_sampler(saved: Path) -> None:
    whole = drawn(saved, "-n", 7, "--seed", 5)
    assert whole.shape == (7, 6, 6)
    assert torch.equal(drawn(saved, "-n", 3, "--seed", 5, "--first", 4), whole[4:])
    assert torch.equal(drawn(saved, "-n", 5, "--seed", 5, "--first", 2, "--batch-free"), whole[2:])
    assert torch.equal(drawn(saved, "-n", 7, "--seed", 5, "--label", "0,1,2"), whole)
    assert torch.equal(drawn(saved, "-n", 2, "--seed", 5, "--threads", 1, "--backend", "reference"), whole[:2])
    assert torch.equal(drawn(saved, "-n", 2, "--seed", 5, "--backend", "naive"), whole[:2])
    ones = drawn(saved, "-n", 7, "--seed", 5, "--label", 1)
    assert torch.equal(ones[1::3], whole[1::3])
    assert not torch.equal(ones, whole)
    sharp = drawn(saved, "-n", 7, "--seed", 5, "--temperature", 1e-3)
    assert torch.equal(sharp[0], drawn(saved, "-n", 1, "--seed", 6, "--temperature", 1e-3)[0])


def test_inpainting_keeps_half(saved: Path) -> None:
    first = drawn(saved, "-n", 1, model="colour")
    assert run("sample", saved / "colour", "-q", "-n", 1, "--no-verify", "--upscale", 1, "--out", "one.png") == 0
    for mask, kept in (("bottom", np.s_[:, :, 4:]), ("right", np.s_[:, :, :, 4:])):
        for extra in ((), ("--batch-free",)):
            more = drawn(saved, "-n", 2, "--seed", 9, "--given", "one.png", "--mask", mask, *extra, model="colour")
            torch.testing.assert_close(more[kept], first.expand(2, -1, -1, -1)[kept], rtol=0, atol=1e-6)
            assert not torch.equal(more[:1], first)


def test_sample_writes_audio(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("sample", saved / "sound", "-n", 2, "--no-verify", "-q")
    assert run(*command, "--length", "0.01s") == 0
    assert "wrote samples.wav: 2 samples of sound at 16000 Hz in" in capsys.readouterr().out
    with wave.open("samples.wav") as file:
        assert (file.getframerate(), file.getnframes()) == (16000, 2 * 160 + 4000)
    assert run(*command, "--out", "b.safetensors") == 0
    assert drawn(saved, "-n", 2, "--length", 50, model="sound").shape == (2, 50)
    assert run("sample", saved / "sound", "-n", 1, "-q", "--length", 50, "--seed", 4, "--out", "head.wav") == 0
    head = drawn(saved, "-n", 1, "--length", 50, "--seed", 4, model="sound")
    rest = drawn(saved, "-n", 1, "--length", 90, "--seed", 8, "--given", "head.wav", model="sound")
    assert torch.equal(rest[:, :50], head)


def test_conditioning_of_another_length(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("sample", saved / "speakers", "-n", 2, "--length", 70, "--out", "x.npy", "--no-verify") == 0
    assert np.load("x.npy").shape == (2, 1, 70)
    assert "conditioning [2, 18] is all zero" in capsys.readouterr().err
    assert "expected labels from 0 to 1" in fails(capsys, "sample", saved / "speakers", "--label", 2)


def test_rate_of_a_recipe() -> None:
    recipe = RECIPES["speech-wavenet-small"]
    assert isinstance(recipe.model, str)
    assert rate_of(build(recipe.model)) == recipe.rate
    assert rate_of(build(SOUND)) == 16000


def test_default_model_is_a_shipped_image_model(
    saved: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pretrained, "_SHIPPED", here / "none")
    assert "no trained image model is shipped" in fails(capsys, "sample")
    for name, source in (("a-sound", "sound"), ("b-digits", "digits")):
        shutil.copytree(saved / source, here / "checkpoints" / name)
    (here / "checkpoints" / "b-digits" / "report.json").write_text(json.dumps({"held_out_bits_per_dim": 0.52}))
    monkeypatch.setattr(pretrained, "_SHIPPED", here / "checkpoints")
    assert run("verify", "-q") == 0
    assert capsys.readouterr().out.startswith("b-digits: exact: 2 samples")
    assert run("info") == 0
    out = capsys.readouterr().out
    assert re.search(r"b-digits +0\.0\d MB, 0\.520 bits/dim held out\n", out)
    assert re.search(r"a-sound +0\.0\d MB\n", out)


# ---- failures ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("digits", ("--label", "3"), "--label 3: expected labels from 0 to 2"),
        ("digits", ("--label", "one"), "--label one: expected labels from 0 to 2"),
        ("colour", ("--label", "0"), "--label 0: this model takes no label"),
        ("digits", ("--length", "2s"), "--length 2s: only audio has a length"),
        ("sound", ("--length", "soon"), "--length soon: expected a number of audio samples"),
        ("sound", ("--length", "nans"), "--length nans: expected"),
        ("sound", ("--out", "x.png"), "output x.png: these samples are audio; expected a name in .wav"),
        ("digits", ("--out", "x.jpg"), "output x.jpg: these samples are images; expected a name in .png"),
        ("digits", ("--mask", "top"), "--mask top: needs --given"),
        ("digits", ("--given", "nothing.png"), "No such file or directory: 'nothing.png'"),
        ("digits", ("--temperature", "0"), "temperature=0.0: expected a finite float32 > 0"),
        ("digits", ("--first", "-1"), "first=-1: expected a sample index >= 0"),
        ("digits", ("--seed", "-1"), "seed=-1: expected a number from 0"),
    ],
)
def test_bad_options(
    saved: Path,
    here: Path,
    capsys: pytest.CaptureFixture[str],
    model: str,
    options: tuple[str, ...],
    message: str,
) -> None:
    assert message in fails(capsys, "sample", saved / model, "--no-verify", *options)
    assert not list(here.iterdir())


@pytest.mark.parametrize("options", [("-n", "0"), ("-n", "many"), ("--backend", "abacus"), ("--no-such-option",)])
def test_bad_usage(capsys: pytest.CaptureFixture[str], options: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as exit_:
        run("sample", *options)
    assert exit_.value.code == 2
    assert "usage: fastgen" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["missing/x.png", "file/x.png", "folder.png"])
def test_place_is_checked_before_any_work(
    saved: Path, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (here / "file").write_text("")
    (here / "folder.png").mkdir()
    monkeypatch.setattr(fastgen, "compile", lambda *_args, **_options: pytest.fail("planned all the same"))
    assert f"cannot write {place}: " in fails(capsys, "sample", saved / "digits", "--out", place)
    assert sorted(p.name for p in here.iterdir()) == ["file", "folder.png"]


def test_damaged_checkpoint(saved: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(saved / "digits", here / "cut")
    weights = here / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    assert "model.safetensors: truncated: " in fails(capsys, "sample", here / "cut")
    with pytest.raises(fastgen.CheckpointError, match="truncated"):
        run("sample", here / "cut", "--debug")


def test_unknown_model(capsys: pytest.CaptureFixture[str]) -> None:
    message = fails(capsys, "sample", "pixelrnn")
    assert "no checkpoint pixelrnn" in message
    assert "pixelcnnpp-cifar" in message


def test_failed_check_exits_with_1(
    saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = fastgen.VerifyReport(False, 1.0, 1.0, 0.5, 1e-5, 1e-7, 72, 70, 0, 0.1, 2)
    monkeypatch.setattr(Planned, "verify", lambda *_, **__: wrong)
    assert run("verify", saved / "digits", "-q") == 1
    assert "NOT EXACT" in capsys.readouterr().out
    assert "stepping does not reproduce forward" in fails(capsys, "sample", saved / "digits")


def interrupted(*args: object, heed: bool = True) -> tuple[int, list[str]]:
    """`fastgen sample`, sent SIGINT 0.3 s after it begins to draw: the code it exits with, and the lines it said."""
    command = [sys.executable, "-m", "fastgen", "sample", *map(str, args), "--no-verify", "--threads", "2"]
    with children_heed_ctrl_c(heed):
        process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
    assert process.stderr is not None
    killer = threading.Timer(180, process.kill)  # hangs should fail, not last
    killer.start()
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "sampling" in line:
                threading.Timer(0.3, process.send_signal, [signal.SIGINT]).start()
        return process.wait(), lines
    finally:
        killer.cancel()
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.mark.parametrize("backend", ["cpu", "naive"])
def test_ctrl_c(saved: Path, here: Path, backend: str) -> None:
    size = ("-n", "1000000") if backend == "cpu" else ("-n", "1", "--length", "50000")
    model = "digits" if backend == "cpu" else "sound"
    code, lines = interrupted(saved / model, *size, "--out", "x.npy", "--backend", backend)
    assert code == 130, lines
    assert lines[-1] == "fastgen: interrupted\n"
    assert not any("Traceback" in line for line in lines)
    assert not list(here.iterdir())


def test_ctrl_c_is_ignored_by_a_program_started_so(saved: Path, here: Path) -> None:
    """Whoever runs `nohup fastgen sample &` wants the file."""
    code, lines = interrupted(saved / "digits", "-n", 30_000, "--out", "x.npy", heed=False)
    assert code == 0, lines
    assert len(np.load(here / "x.npy", mmap_mode="r")) == 30_000


def test_tests_of_ctrl_c_do_not_depend_on_how_they_are_started() -> None:
    show = [sys.executable, "-S", "-c", "import signal; print(signal.getsignal(signal.SIGINT) != signal.SIG_IGN)"]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as behind `&` in a script
    try:
        inherited = subprocess.check_output(show, text=True)
        with children_heed_ctrl_c():
            given = subprocess.check_output(show, text=True)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert (inherited, given) == ("False\n", "True\n")


# ---- the other commands ------------------------------------------------------------------------------------
def test_plan_is_printed(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", saved / "sound", "--length", 80) == 0
    assert "80 steps" in capsys.readouterr().out


def test_configuration_has_random_weights(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONFIGS, "tiny", DIGITS)
    state = torch.get_rng_state()
    assert run("sample", "tiny", "-n", 1, "--no-verify") == 0
    out, err = capsys.readouterr()
    assert "tiny (random weights)" in out
    assert "its weights are random" in err
    assert torch.equal(torch.get_rng_state(), state)
    first = Path("samples.png").read_bytes()
    assert run("sample", "tiny", "-n", 1, "-q", "--no-verify") == 0
    assert Path("samples.png").read_bytes() == first


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info") == 0
    out = capsys.readouterr().out
    for word in (
        fastgen.__version__,
        torch.__version__,
        "native executor: ",
        *CONFIGS,
        *pretrained.shipped(),
    ):
        assert word in out


def test_train(
    saved: Path,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    assert run("train", "--list") == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == list(RECIPES)
    assert "train what? expected a recipe: mnist-" in fails(capsys, "train")
    assert "unknown recipe 'cifar'" in fails(capsys, "train", "cifar")
    from dataclasses import replace

    recipe = replace(RECIPES["mnist-gated-pixelcnn-small"], batch=2)
    monkeypatch.setitem(RECIPES, "digits", replace(recipe, model=dict(DIGITS, classes=10, shape=[28, 28])))
    from fastgen.train.data import mnist

    mnist.cache_clear()
    request.addfinalizer(mnist.cache_clear)  # so that nobody else sees this split
    monkeypatch.setattr("fastgen.train.data.HELD_OUT_DIGITS", 4)
    assert run("train", "digits", "--steps", 1, "-q") == 0
    assert re.search(r"wrote runs/digits: .* after 1 steps, [\d.]+ bits/dim held out", capsys.readouterr().out)
    assert "holds a run already" in fails(capsys, "train", "digits", "--steps", 1)
    assert run("train", "digits", "--steps", 2, "--resume", "-q") == 0
    assert run("verify", "runs/digits", "-n", 1, "-q") == 0


def test_bench_runs_the_checkouts_script(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commands, "CHECKOUT", here)
    assert run("bench", "--anything") == 2
    assert "run python -m bench.run in a checkout" in capsys.readouterr().err
    (here / "bench").mkdir()
    (here / "bench" / "run.py").write_text("import sys; sys.exit(len(sys.argv[1]))")
    assert run("bench", "--help") == 6


@pytest.mark.parametrize("command", ["sample", "train", "verify", "plan", "info"])
def test_help_has_examples(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit) as exit_:
        run(command, "--help")
    assert exit_.value.code == 0
    assert f"examples:\n  fastgen {command}" in capsys.readouterr().out


def test_closed_pipe_is_no_error(saved: Path) -> None:
    command = f"{sys.executable} -m fastgen info | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert done.stderr == ""


@pytest.mark.parametrize("command", ["sample", "verify", "plan"])
def test_a_device_that_there_is_not_is_no_failed_check(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "expected cpu or cuda" in fails(capsys, command, "--device", "foo")


def test_an_absurd_rate(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "expected samples per second" in fails(
        capsys, "sample", saved / "sound", "-n", 1, "--length", 10, "--rate", 1 << 32, "-o", "o.wav"
    )


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams(saved: Path, here: Path, closed: str) -> None:
    """Nothing is said; what was asked for is done."""
    command = f"{sys.executable} -m fastgen sample {saved / 'digits'} -n 1 -o x.png {closed}"
    done = subprocess.run(["bash", "-c", command], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
    assert done.returncode == 0 and (here / "x.png").exists()


def test_names_that_the_terminal_cannot_show(saved: Path, here: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastgen", "sample", str(saved / "digits"), "-n", "1", "-o", "\u00fc.png"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and (here / "\u00fc.png").exists() and "xfc.png" in done.stdout
