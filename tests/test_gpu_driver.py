"""The driver of the calls on a GPU, with steps that do nothing there: what hangs, dies, writes half a line or is not there costs
only itself, and all that was written is kept."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import driver as driver_module
from bench.gpu import steps as S
from bench.gpu.driver import Driver, failed, last_words
from bench.gpu.lines import Lines, Row, Tail, read_lines, turn
from bench.gpu.steps import Stage, Step

ROOT = Path(__file__).resolve().parent.parent


def script(name: str, text: str, limit: float = 20.0, **more: Any) -> Step:
    """A step that is a few lines of Python; `emit(text)` writes into its results file, as it is."""
    head = "import os, sys, time\nemit = lambda t: os.write(os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT), t)\n"
    return Step(
        name, (sys.executable, "-c", head + textwrap.dedent(text), "{lines}", *more.pop("words", ())), limit, **more
    )


def stage(*steps: Step, name: str = "stage", budget: float = 30.0, **more: Any) -> Stage:
    return Stage(name, budget, lambda rows: list(steps), **more)


Run = Callable[..., Driver]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs stages, several at once whatever this machine has."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.setattr(driver_module, "LEAST", 0.5)

    def go(*stages: Stage, seconds: float = 60.0, after: Callable[[], None] = lambda: None) -> Driver:
        made = Driver(tmp_path, "first", tmp_path, seconds, after)
        made.run(list(stages))
        return made

    return go


def results(made: Driver) -> dict[str, str]:
    return {row["step"]: row["result"] for row in made.rows if "result" in row}


def why(made: Driver, step: str) -> str:
    return next(str(row["why"]) for row in made.rows if row["step"] == step and "result" in row)


# ---- one step ---------------------------------------------------------------------------------------------------------
def test_rows_are_kept_with_the_step_that_wrote_them(run: Run) -> None:
    made = run(stage(script("a", "emit(b'{\"x\": 1}\\n'); print('said')")))
    assert made.rows[0] == {"step": "a", "x": 1}
    assert made.rows[1] | {"seconds": 0} == {"step": "a", "result": S.OK, "seconds": 0, "why": ""}
    assert read_lines(made.path) == made.rows and not failed(made.rows)
    assert "==== a (status 0)" in made.log.read_text() and "\nsaid\n" in made.log.read_text()


def test_a_step_that_hangs_is_ended_with_all_it_started(run: Run, tmp_path: Path) -> None:
    began = time.monotonic()
    child = "import subprocess; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)']); "
    made = run(stage(
        script("hangs", child + "emit(b'{\"pid\": %d}\\n' % p.pid); print('on it', flush=True); time.sleep(99)", 2.0),
        script("next", "pass"),
    ))  # fmt: skip
    assert time.monotonic() - began < 20
    assert results(made) == {"hangs": S.TIMED_OUT, "next": S.OK} and "on it" in why(made, "hangs")
    assert failed(made.rows)
    pid = next(row["pid"] for row in made.rows if "pid" in row)
    state = Path(f"/proc/{pid}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_step_that_dies_by_a_signal_says_which(run: Run) -> None:
    made = run(stage(script("dies", "emit(b'{\"x\": 1}\\n'); os.kill(os.getpid(), 11)"), script("next", "pass")))
    assert results(made) == {"dies": S.FAILED, "next": S.OK} and "SIGSEGV" in why(made, "dies")
    assert made.rows[0] == {"step": "dies", "x": 1}


def test_half_a_line_is_no_row_and_spoils_none(run: Run) -> None:
    made = run(stage(
        script("half", "emit(b'{\"x\": 1}\\n{\"y\": '); os.kill(os.getpid(), 9)"),
        script("odd", "emit(b'[1]\\nnot json\\n{\"z\": 2}\\n')"),
    ))  # fmt: skip
    assert [row for row in read_lines(made.path) if "result" not in row] == [
        {"step": "half", "x": 1},
        {"step": "odd", "z": 2},
    ]


def test_a_row_is_kept_before_its_step_is_over(run: Run, tmp_path: Path) -> None:
    """What a machine that is taken away leaves."""
    seen = f"time.sleep(0.5); sys.exit('\"x\": 1' not in open({str(tmp_path / 'first.jsonl')!r}).read())"
    assert results(run(stage(script("a", "emit(b'{\"x\": 1}\\n'); " + seen)))) == {"a": S.OK}


@pytest.mark.parametrize("text", ["sys.exit(3)", "print('Error: Device not supported'); sys.exit(1)"])
def test_a_step_that_does_not_apply_is_no_failure(run: Run, text: str) -> None:
    made = run(stage(script("a", text, unless=("Device not supported",))))
    assert results(made) == {"a": S.NOT_RUN} and not failed(made.rows)


def test_what_is_missing_is_not_run_but_what_was_to_be_built_failed(run: Run) -> None:
    made = run(stage(Step("tool", ("no-such-tool", "-x"), 9), Step("own", ("{work}/no-such-program",), 9)))
    assert results(made) == {"tool": S.NOT_RUN, "own": S.FAILED}
    assert why(made, "tool") == "no-such-tool is not there"


def test_a_peer_that_cannot_is_left_out(run: Run) -> None:
    made = run(
        stage(script("peer", "sys.exit('error: no')", peer=True), script("late", "time.sleep(9)", 1.0, peer=True))
    )
    assert results(made) == {"peer": S.LEFT_OUT, "late": S.LEFT_OUT} and not failed(made.rows)


def test_the_words_of_a_failure(run: Run) -> None:
    assert (
        why(run(stage(script("a", "print('RuntimeError: bad'); print('then more'); sys.exit(1)"))), "a")
        == "RuntimeError: bad"
    )
    assert last_words("one\n\ntwo\n\n") == "two" and last_words(" \n") == "it said nothing"


# ---- stages -------------------------------------------------------------------------------------------------------------
def test_nothing_follows_a_needed_stage_that_failed(run: Run) -> None:
    made = run(
        stage(script("build", "sys.exit(1)"), name="built", needed=True), stage(script("a", "pass"), name="rest")
    )
    assert results(made) == {"build": S.FAILED, "rest": S.NOT_RUN}
    assert why(made, "rest") == "built failed" and failed(made.rows)


def test_a_stage_takes_no_more_than_its_share_and_says_what_did_not_fit(run: Run) -> None:
    slow = [script(f"slow {k}", "time.sleep(99)", 60) for k in range(2)]
    made = run(stage(*slow, budget=1, name="slow"), stage(script("a", "pass"), budget=9), seconds=20.0)
    assert results(made) == {"slow 0": S.TIMED_OUT, "slow 1": S.NO_TIME, "a": S.OK}
    assert failed(made.rows)


def test_what_a_stage_leaves_over_is_the_others(run: Run) -> None:
    quick, slow = script("quick", "pass"), script("slow", "time.sleep(2)", 60)
    made = run(stage(quick, budget=9), stage(slow, budget=1), seconds=12.0)
    assert results(made) == {"quick": S.OK, "slow": S.OK}


def test_the_whole_call_keeps_its_time(run: Run) -> None:
    began = time.monotonic()
    made = run(*(stage(script(f"{k}", "time.sleep(99)", 60), needed=False) for k in range(3)), seconds=3.0)
    assert time.monotonic() - began < 9 and set(results(made).values()) == {S.TIMED_OUT}


def test_later_steps_are_made_of_what_was_found(run: Run) -> None:
    def next_steps(rows: list[Row]) -> list[Step]:
        return [script(row["named"], "pass") for row in rows if "named" in row]

    made = run(stage(script("names", 'emit(b\'{"named": "x"}\\n{"named": "y"}\\n\')')), Stage("those", 9, next_steps))
    assert list(results(made)) == ["names", "x", "y"]


def test_several_at_once(run: Run) -> None:
    began = time.monotonic()
    run(stage(*(script(f"{k}", "time.sleep(1.5)") for k in range(8)), at_once=8))
    assert time.monotonic() - began < 8


def test_the_report_is_written_behind_every_stage_and_at_the_end(run: Run) -> None:
    written: list[int] = []
    run(stage(script("a", "pass")), stage(script("b", "pass"), name="other"), after=lambda: written.append(1))
    assert len(written) == 2


# ---- turns --------------------------------------------------------------------------------------------------------------
TURN = """
from pathlib import Path
from bench.gpu.lines import Lines, turn
emit = Lines(Path(sys.argv[1]))
with turn(Path(sys.argv[2]), emit):
    emit({"at": time.time()}); time.sleep(%s); emit({"at": time.time()})
"""


def test_turns_do_not_overlap_and_waiting_does_not_count(run: Run) -> None:
    steps = [script(f"{k}", TURN % 1.5, 2.9, words=("{turn}",)) for k in range(3)]
    made = run(stage(*steps, at_once=3))
    assert set(results(made).values()) == {S.OK}
    times = {name: [row["at"] for row in made.rows if row["step"] == name and "at" in row] for name in "012"}
    spans = sorted(times.values())
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))


def test_who_hangs_in_its_turn_loses_it(run: Run) -> None:
    slow, good = (script(n, TURN % t, 1.5, words=("{turn}",)) for n, t in (("slow", 99), ("good", 0)))
    made = run(stage(slow, good, at_once=2))
    assert results(made) == {"slow": S.TIMED_OUT, "good": S.OK}


def test_a_turn_that_does_not_come_is_no_time(run: Run, tmp_path: Path) -> None:
    with turn(tmp_path / "turn", Lines(None)):
        made = run(stage(script("a", TURN % 0, 60, words=("{turn}",))), seconds=3.0)
    assert results(made) == {"a": S.NO_TIME}


# ---- groups of tests ----------------------------------------------------------------------------------------------------
def outcome(test: str, word: str, **more: object) -> str:
    return f"emit(b'{json.dumps({'test': test, 'outcome': word, **more})}\\n')\n"


def alone(*names: str, text: str = "pass") -> tuple[Step, ...]:
    return tuple(script(name, text) for name in names)


def test_what_a_fault_leaves_without_an_outcome_runs_alone(run: Run) -> None:
    tests = (*alone("t1"), script("t2", outcome("t2", "failed") + "sys.exit(1)"), *alone("t3"))
    made = run(stage(script("group", outcome("t1", "passed") + "os.abort()", alone=tests)))
    assert results(made) == {"group": S.ALONE, "t2": S.FAILED, "t3": S.OK}
    assert next(row for row in made.rows if row.get("result") == S.ALONE)["alone"] == ["t2", "t3"]
    assert failed(made.rows)


def test_a_test_that_the_device_failed_runs_alone_too(run: Run) -> None:
    text = outcome("t1", "failed", fault=True) + "sys.exit(1)"
    made = run(stage(script("group", text, alone=alone("t1", "t2", text="sys.exit(1)"))))
    assert results(made) == {"group": S.ALONE, "t1": S.FAILED, "t2": S.FAILED}


def test_a_group_that_hangs_is_taken_apart(run: Run) -> None:
    made = run(stage(script("group", outcome("t1", "passed") + "time.sleep(99)", 1.0, alone=alone("t1", "t2"))))
    assert results(made) == {"group": S.ALONE, "t2": S.OK} and failed(made.rows)  # it hung, though t2 does not alone


def test_a_plain_failure_is_not_tried_again(run: Run) -> None:
    text = outcome("t1", "failed") + outcome("t2", "passed") + "sys.exit(1)"
    made = run(stage(script("group", text, alone=alone("t1", "t2"))))
    assert results(made) == {"group": S.FAILED} and failed(made.rows)
    both = outcome("t1", "failed") + outcome("t2", "failed", fault=True) + "sys.exit(1)"
    made = run(stage(script("group", both, alone=alone("t1", "t2"))))
    assert results(made) == {"group": S.FAILED, "t2": S.OK} and failed(made.rows)


def test_tests_that_pass_alone_but_not_together_are_a_failure(run: Run) -> None:
    made = run(stage(script("group", "sys.exit(1)", alone=alone("t"))))
    assert results(made) == {"group": S.ALONE, "t": S.OK} and failed(made.rows)


def test_a_group_that_passes_is_not_taken_apart(run: Run) -> None:
    made = run(stage(script("group", outcome("t", "passed"), alone=alone("t", text="sys.exit(1)"))))
    assert results(made) == {"group": S.OK}


def test_the_kin_of_what_hung_come_last(run: Run) -> None:
    steps = [script(n, t, 1.0, kin=k) for n, t, k in (
        ("a1", "time.sleep(99)", "a"), ("a2", "pass", "a"), ("b1", "sys.exit(1)", "b"), ("b2", "pass", "b"),
    )]  # fmt: skip
    more = stage(script("a3", "pass", kin="a"), script("b3", "pass", kin="b"), name="more")
    assert list(results(run(stage(*steps), more))) == ["a1", "b1", "b2", "a2", "b3", "a3"]


# ---- ended from outside ---------------------------------------------------------------------------------------------------
def test_a_driver_that_is_told_to_stop_ends_its_steps_and_reports(tmp_path: Path) -> None:
    program = f"""
    import signal, sys
    from pathlib import Path
    from bench.gpu.driver import Driver
    from bench.gpu.steps import Stage, Step
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    out = Path({str(tmp_path)!r})
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(99)"
    step = Step("hangs", (sys.executable, "-c", code), 90)
    Driver(out, "first", out, 90, lambda: (out / "report").write_text("written")).run([Stage("s", 9, lambda rows: [step])])
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT)
    log, end = tmp_path / "1.log", time.monotonic() + 20
    while not (log.exists() and log.read_text().strip()) and time.monotonic() < end:
        time.sleep(0.05)
    pid = int(log.read_text())
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    assert (tmp_path / "report").read_text() == "written"
    state = Path(f"/proc/{pid}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_lines_are_read_as_they_come(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    tail, emit = Tail(path), Lines(path)
    assert tail.new() == []
    emit({"a": 1})
    with path.open("a") as file:
        file.write('{"b": ')
    assert tail.new() == [{"a": 1}] and tail.new() == []
    with path.open("a") as file:
        file.write("2}\n")
    assert tail.new() == [{"b": 2}]
