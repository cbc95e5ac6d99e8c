"""What the calls on a GPU are made of: every command line is one that its program takes, and the whole with stand-ins."""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench import configs
from bench.gpu import __main__ as main_module
from bench.gpu import calls
from bench.gpu import steps as S
from bench.gpu.lines import Row, read_lines
from bench.gpu.steps import Stage, Step, python
from bench.gpu.timing_tables import TARGETS
from bench.layers.__main__ import NAMES
from fastgen.backends.cuda import TEAMS
from tests.oracle import by_name

ROOT = Path(__file__).resolve().parent.parent
FILES = ("test_cases.py", "test_kernels.py", "test_promises.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """What the step that collects the tests writes; and the layers' names."""
    lines = tmp_path_factory.mktemp("collect") / "lines"
    stage = next(s for s in calls.first("") if s.name == "probe")
    command = [
        w.replace("{lines}", str(lines)) for w in next(s for s in stage.steps([]) if s.name == "collect").command
    ]
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [{"step": "collect", **row} for row in read_lines(lines)] + [{"step": "names", "named": n} for n in NAMES]


def every_step(call: str, rows: list[Row]) -> list[Step]:
    return [step for stage in calls.CALLS[call]("abc") for step in stage.steps(rows)]


def parsed(step: Step, rows: list[Row]) -> argparse.Namespace | None:
    """What the program makes of its arguments; SystemExit where it makes nothing."""
    command = [*step.command]
    if sys.executable not in command:
        assert command == ["{work}/probe", "{lines}"]
        return None
    command = command[command.index(sys.executable) :]
    assert command[1] == "-m" and "{lines}" in command
    if command[2] == "pytest":
        names = [word for word in command[3:] if word.startswith("tests/")]
        there = {row["collected"] for row in rows if "collected" in row}
        assert names and all(name in there or (ROOT / name).exists() for name in names)
        return None
    parse: Callable[[list[str]], argparse.Namespace] = importlib.import_module(
        command[2] if command[2] != "bench.layers" else "bench.layers.__main__"
    ).parse
    return parse(command[3:])


# ---- the lists ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("call", calls.CALLS)
def test_every_command_line_is_one_that_its_program_takes(call: str, found: list[Row]) -> None:
    steps = every_step(call, found)
    for step in [*steps, *(one for group in steps for one in group.alone)]:
        parsed(step, found)
        assert step.limit > 0
    names = [step.name for step in steps]
    assert len(set(names)) == len(names) > 10


def test_a_command_line_that_is_wrong_would_be_noticed(found: list[Row]) -> None:
    for command in (python("bench.gpu.ours", "no-such-model"), python("bench.gpu.smoke", "x", "--team", "big")):
        with pytest.raises(SystemExit):
            parsed(Step("x", command, 9), found)
    with pytest.raises(AssertionError):
        parsed(Step("x", python("pytest", "tests/gpu/test_cases.py::test_case[none]"), 9), found)


@pytest.mark.parametrize("call", calls.CALLS)
def test_the_budgets_are_those_of_a_call(call: str) -> None:
    assert sum(stage.budget for stage in calls.CALLS[call]("")) == main_module.SECONDS <= 9 * 60


def test_the_names_are_those_that_there_are() -> None:
    """The driver knows no torch, and so not the tables of what it names."""
    assert TEAMS[1:] == calls.RUNGS
    assert set(calls.DTYPES) == set(configs.DTYPES)
    assert set(calls.CONFIGS) < set(configs.NAMES) and set(calls.HEADLINES) < set(calls.CONFIGS)
    assert {t.config for t in TARGETS} < set(calls.CONFIGS)
    assert [case.name for case in by_name(*calls.SMOKE)] == list(calls.SMOKE)
    assert all(sum(name in other for other in NAMES) == 1 for name in NAMES)  # --only means one


def test_the_driver_leaves_the_device_alone() -> None:
    code = "import bench.gpu.__main__, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_every_rung_is_smoked_in_every_dtype_and_timed(found: list[Row]) -> None:
    asked = [parsed(step, found) for step in calls.smoke()]
    assert {(a.case, a.team, a.dtype) for a in asked if a} == {
        (c, t, d) for c in calls.SMOKE for t in TEAMS[1:] for d in configs.DTYPES
    }
    timed = [parsed(step, found) for step in calls.headlines()]
    assert {(a.config, a.team, tuple(a.batch)) for a in timed if a} == {
        (c, t, b) for t in TEAMS[1:] for c, b in (("wavenet-nv", (1,)), ("pixelcnnpp-cifar", (1, 16, 1024)))
    }


def smoked(team: str, result: str) -> Row:
    return {"step": f"smoke unet-pixelcnnpp {team} bfloat16", "result": result}


def test_a_rung_that_hung_is_left_out_of_what_would_hang_with_it(found: list[Row]) -> None:
    rows = [*found, smoked("cluster16", S.TIMED_OUT), smoked("cluster8", S.OK), smoked("grid", S.FAILED)]
    assert calls.hung(rows) == ["cluster16"]
    for group in calls.groups(rows, "test_cases.py"):
        for step in (group, *group.alone):
            assert step.command[step.command.index("--leave-out") + 1] == "cluster16"
    assert [parsed(step, found).team for step in calls.profiles(rows)] == ["cluster8"] * 2  # type: ignore[union-attr]
    assert [parsed(step, found).team for step in calls.profiles(found)] == ["auto"] * 2  # type: ignore[union-attr]
    assert "--leave-out" not in calls.groups(found, "test_cases.py")[0].command
    assert calls.hung([smoked(rung, S.TIMED_OUT) for rung in TEAMS[1:]]) == []  # then there is nothing to leave
    assert {step.kin for step in (*calls.smoke(), *calls.headlines())} == set(TEAMS[1:])


@pytest.mark.parametrize("file", FILES)
def test_groups_hold_every_test_once_and_alone_too(file: str, found: list[Row]) -> None:
    there = [row["collected"] for row in found if f"/{file}::" in row.get("collected", "")]
    groups = calls.groups(found, file)
    assert there and [word for group in groups for word in group.command if "::" in word] == there
    assert len(groups) <= calls.GROUPS
    for group in groups:
        alone = tuple(one.name for one in group.alone)
        assert alone == (group.command[-len(alone) :] if len(groups) < len(there) else ())  # a test by itself is alone


def test_tests_that_could_not_be_collected_run_as_a_file() -> None:
    (step,) = calls.groups([], "test_cases.py")
    assert step.command[-1] == "tests/gpu/test_cases.py"


# ---- the tests as lines -----------------------------------------------------------------------------------------------------
TESTS = """
import pytest
def test_good(record_property): record_property("findings", [{"ok": True}])
def test_bad(): assert 1 == 2, "7/8 equal\\nmore"
@pytest.mark.skip(reason="no GPU")
def test_skipped(): pass
@pytest.fixture
def broken(): raise ValueError("in front")
def test_in_front(broken): pass
def test_left_out(request): assert request.config.getoption("--leave-out", "") == "grid,cta"
def test_fault(): raise RuntimeError("CUDA error: an illegal memory access\\nmore")
def test_never(): pass
"""


def test_outcomes_are_written_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "bench.gpu.outcomes", "--lines", str(tmp_path / "lines")]
    done = subprocess.run(
        [*command, "--leave-out", "grid,cta", "-o", "addopts=", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)], cwd=ROOT,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    rows = {row["test"].split("::")[1]: row for row in read_lines(tmp_path / "lines")}
    assert {k: v["outcome"] for k, v in rows.items()} == {
        "test_good": "passed", "test_bad": "failed", "test_skipped": "skipped", "test_in_front": "failed",
        "test_left_out": "passed", "test_fault": "failed",
    }, done.stdout  # fmt: skip
    assert rows["test_good"]["findings"] == [{"ok": True}]
    assert rows["test_bad"]["why"].startswith("AssertionError: 7/8 equal") and "fault" not in rows["test_bad"]
    assert (
        rows["test_fault"]["why"] == "RuntimeError: CUDA error: an illegal memory access"
        and rows["test_fault"]["fault"]
    )
    assert "no GPU" in rows["test_skipped"]["why"] and rows["test_in_front"]["why"] == "ValueError: in front"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_its_tests_are_skipped_and_say_so() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "tests/gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "no GPU" in done.stdout and "passed" not in done.stdout


# ---- a whole call -----------------------------------------------------------------------------------------------------------
MACHINE = (
    '{"device": "Stand-in", "multiprocessors": 132, "driver": "1", "torch": "2", "cuda": "13", "triton": "3", '
    '"date": "2026-01-01 10:00 UTC", "revision": "abc"}'
)


def stand_in(name: str, text: str) -> Step:
    return Step(name, (sys.executable, "-c", f"import sys; out = open(sys.argv[1], 'a'); {text}", "{lines}"), 30)


def run_call(monkeypatch: pytest.MonkeyPatch, out: Path, *steps: Step) -> int:
    stages = [Stage(step.name, 10, lambda rows, step=step: [step], needed=k == 0) for k, step in enumerate(steps)]
    monkeypatch.setitem(calls.CALLS, "first", lambda revision: stages)
    return main_module.main(["first", str(out)])


def test_a_call_writes_its_rows_its_log_and_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = stand_in("machine", f"print({MACHINE!r}, file=out)")
    assert run_call(monkeypatch, tmp_path / "new", machine, stand_in("a", "print('hello')")) == 0
    written = {p.name for p in (tmp_path / "new").iterdir()}
    assert written == {
        "first.jsonl",
        "first.log",
        "2026-01-01-abc-Stand-in-first.md",
        "2026-01-01-abc-Stand-in-first.json",
    }
    said = capsys.readouterr().out
    assert "Stand-in, driver 1" in said and "All passed." in said
    assert run_call(monkeypatch, tmp_path / "new", machine, stand_in("a", "sys.exit('error: bad')")) == 1
    assert "| a | FAILED |" in capsys.readouterr().out
    assert main_module.main(["report", str(tmp_path / "new" / "first.jsonl")]) == 0
    assert "| a | FAILED |" in capsys.readouterr().out


def test_nothing_runs_on_a_machine_that_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = stand_in("machine", "print('no device'); sys.exit(2)")
    assert run_call(monkeypatch, tmp_path, bad, stand_in("a", "pass")) == 2
    assert capsys.readouterr().out.endswith("no device\n")
    assert not list(tmp_path.glob("*.md"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU; what is said without one cannot be seen")
def test_the_real_call_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.gpu", "first", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "nothing was run" in done.stdout


@pytest.mark.parametrize(
    "arguments", [[], ["first"], ["fourth", "out"], ["first", "out", "--fast"], ["first", "a", "b"]]
)
def test_arguments_that_make_no_sense(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        main_module.parse(arguments)
