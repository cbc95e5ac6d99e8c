"""Runs the stages of a call. Every row that a step writes, and how the step ended, is appended to one file as it comes, so
that a machine that is taken away leaves what was found. No torch here: what it may do to the device is its steps' to do.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from bench.gpu import steps as S
from bench.gpu.lines import Lines, Row, Tail
from bench.gpu.steps import Stage, Step

ROOT = Path(__file__).resolve().parent.parent.parent
LEAST = 3.0  # seconds: with less than that left, a step is not begun
LOOK = 0.02  # seconds between two looks at what runs
LOG_BYTES = 200_000  # of a step's output, its end
GONE = 10.0  # seconds that a killed process may take to be gone
TOOLS = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/nvidia/nsight-compute/*")


class Running:
    """A step under way: its process, and everything that process starts, in a session of its own."""

    def __init__(self, step: Step, places: dict[str, Path], number: int) -> None:
        work = places["work"]
        self.step, self.began, self.turn, self.was_late = step, time.monotonic(), not step.turns, False
        self.log, lines = work / f"{number}.log", work / f"{number}.jsonl"
        self.tail = Tail(lines)
        command = placed(step.command, places | {"lines": lines})
        environment = os.environ | environment_of(work) | step.environment
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=environment,
                start_new_session=True,
            )  # fmt: skip
        self.counts_from = self.began

    def new_rows(self) -> list[Row]:
        rows = self.tail.new()
        if not self.turn and any("begins" in row for row in rows):
            self.turn, self.counts_from = True, time.monotonic()
        return [row for row in rows if row != {"begins": True}]

    def late(self, end: float) -> bool:
        now = time.monotonic()
        return now > end or (self.turn and now > self.counts_from + self.step.limit)

    def kill(self) -> bool:
        """Ends it, and all it started that still runs; false where it would not go."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(GONE)
        return self.process.returncode is not None

    def text(self) -> str:
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - LOG_BYTES))
            return file.read().decode(errors="replace")


class Driver:
    """path: the file of all rows; log: of what the steps say. seconds: of the whole call, shared by what stages are left as
    their budgets are. after: called behind every stage."""

    def __init__(self, out: Path, call: str, work: Path, seconds: float, after: Callable[[], None]) -> None:
        self.work, self.seconds, self.after = work, seconds, after
        self.places = {"turn": work / "turn", "work": work, "out": out}
        self.path, self.log = out / f"{call}.jsonl", out / f"{call}.log"
        for path in (self.path, self.log):
            path.unlink(missing_ok=True)
        self.emit, self.rows, self.count = Lines(self.path), list[Row](), 0
        self.running: list[Running] = []
        self.hung: set[str] = set()  # kin

    def run(self, stages: list[Stage]) -> None:
        """All stages; of those behind a needed one that failed nothing is begun. What still runs is ended, come what
        may."""
        last, stopped = time.monotonic() + self.seconds, ""
        try:
            for k, stage in enumerate(stages):
                if stopped:
                    self._note(Step(stage.name, (), 0), S.NOT_RUN, 0.0, f"{stopped} failed")
                    continue
                now = time.monotonic()
                share = stage.budget / sum(s.budget for s in stages[k:])
                results = self._stage(stage, last if stage.needed else now + share * (last - now))
                if stage.needed and any(r not in S.GOOD for r in results):
                    stopped = stage.name
                if k + 1 < len(stages):
                    self.after()
        finally:
            for running in self.running:
                running.kill()
            self.after()

    def _stage(self, stage: Stage, end: float) -> list[str]:
        first = len(self.rows)
        waiting = self._in_order(stage.steps(self.rows))
        most = max(1, min(stage.at_once, len(os.sched_getaffinity(0)) // 2))
        while waiting or self.running:
            while waiting and len(self.running) < most:
                self._begin(waiting.popleft(), end)
            for running in list(self.running):
                if self._ended(running, end):
                    self.running.remove(running)
                    waiting = self._in_order([*waiting, *self._judge(running)])
            time.sleep(LOOK)
        return [row["result"] for row in self.rows[first:] if "result" in row]

    def _in_order(self, steps: Sequence[Step]) -> deque[Step]:
        """What is likely to hang costs nobody else's time."""
        return deque(sorted(steps, key=lambda step: step.kin in self.hung))

    def _begin(self, step: Step, end: float) -> None:
        if end - time.monotonic() < LEAST:
            self._note(step, S.NO_TIME, 0.0, "no time was left")
        elif shutil.which(placed(step.command[:1], self.places)[0], path=environment_of(self.work)["PATH"]) is None:
            own = step.command[0].startswith("{")  # something that was to be built
            self._note(step, S.FAILED if own else S.NOT_RUN, 0.0, f"{step.command[0]} is not there")
        else:
            self.count += 1
            self.running.append(Running(step, self.places, self.count))

    def _ended(self, running: Running, end: float) -> bool:
        """Takes over its rows; true when it is over, by itself or not."""
        over = running.process.poll() is not None
        running.was_late = not over and running.late(end)
        if (over or running.was_late) and not running.kill():
            self._keep({"step": running.step.name, "why": "its process cannot be ended"})
        for row in running.new_rows():
            self._keep({"step": running.step.name, **row})
        return over or running.was_late

    def _judge(self, running: Running) -> list[Step]:
        """Notes how a step ended; what is to be tried again, each test by itself."""
        step, text, status = running.step, running.text(), running.process.returncode
        with self.log.open("a") as log:
            log.write(f"\n==== {step.name} (status {status}): {' '.join(step.command)}\n{text}")
        why = last_words(text)
        if running.was_late:
            result = S.TIMED_OUT if running.turn else S.NO_TIME
            why = f"ended; it last said: {why}" if running.turn else "its turn on the device did not come"
        elif status == 0:
            result, why = S.OK, ""
        elif status == S.NOT_RUN_STATUS or any(word in text for word in step.unless):
            result = S.NOT_RUN
        else:
            result = S.FAILED
            why = f"ended by {signal.Signals(-status).name}; it last said: {why}" if status < 0 else why
        if result == S.TIMED_OUT and step.kin:
            self.hung.add(step.kin)
        if step.peer and result not in S.GOOD:
            result = S.LEFT_OUT
        ended = [row for row in self.rows if row["step"] == step.name and "outcome" in row]
        again = self._unknown(step, ended) if result in (S.FAILED, S.TIMED_OUT) else []
        if again and not any(row["outcome"] == "failed" and not row.get("fault") for row in ended):
            result = S.ALONE
        self._note(step, result, time.monotonic() - running.began, why, alone=[one.name for one in again])
        return again

    def _unknown(self, step: Step, ended: list[Row]) -> list[Step]:
        """Tests without an outcome, or with one that is the device's fault, and perhaps another test's doing."""
        faults = {row["test"] for row in ended if row.get("fault")}
        known = {row["test"] for row in ended} - faults
        return [one for one in step.alone if one.name not in known]

    def _note(self, step: Step, result: str, seconds: float, why: str, **more: object) -> None:
        found = {k: v for k, v in more.items() if v}
        self._keep({"step": step.name, "result": result, "seconds": round(seconds, 1), "why": why, **found})
        print(f"{step.name:<44.44} {result:<11} {seconds:5.1f} s  {why[:100]}", flush=True)

    def _keep(self, row: Row) -> None:
        self.rows.append(row)
        self.emit(row)


def placed(command: tuple[str, ...], places: dict[str, Path]) -> list[str]:
    """With the paths that its words stand for."""
    for name, path in places.items():
        command = tuple(word.replace(f"{{{name}}}", str(path)) for word in command)
    return list(command)


def environment_of(work: Path) -> dict[str, str]:
    """For every step: NVIDIA's tools in their usual places, and compilers' caches that go with the call."""
    found = [str(p) for t in TOOLS for p in sorted(Path("/").glob(t.lstrip("/"))) if p.is_dir()]
    return {
        "PATH": os.pathsep.join([os.environ.get("PATH", os.defpath), *found]), "PYTHONUNBUFFERED": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "TRITON_CACHE_DIR": str(work / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
    }  # fmt: skip


def last_words(text: str) -> str:
    """The last line that names an error, or else the last."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "rror:" in line or "Fault" in line]
    return (errors or lines or ["it said nothing"])[-1][:300]


def failed(rows: list[Row]) -> bool:
    """Whether any step did; a group whose tests all pass alone, though not together, did too."""
    results = {row["step"]: row for row in rows if "result" in row}
    for row in results.values():
        if row["result"] == S.ALONE:
            if all(results.get(name, row)["result"] in S.GOOD for name in row["alone"]):
                return True
        elif row["result"] not in S.GOOD:
            return True
    return False


def dump(path: Path, result: Row) -> None:
    """JSON that appears whole or not at all."""
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(result, indent=1) + "\n")
    beside.replace(path)
