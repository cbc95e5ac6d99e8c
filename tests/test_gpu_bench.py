"""The GPU's checks and timings, as far as a machine without one can tell: the check functions on host threads, the timing
on the CPU, the report on fixed results, and bench/gpu.sh with everything it calls replaced."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastgen
from bench import gpu, gpu_checks, gpu_contenders, gpu_report, gpu_small, gpu_timings
from bench.configs import Case
from bench.gpu_checks import Finding, Subject, check_calls, check_case, subject
from fastgen import Sampler
from fastgen.backends.base import Executor
from fastgen.backends.request import Request
from fastgen.backends.team import HostTeamExecutor
from fastgen.models.wavenet import WaveNet
from fastgen.spec import Spec
from tests.oracle import by_name, compile_case

ROOT = Path(__file__).resolve().parent.parent
CPU_REPORTS = 0.05  # seconds between two reports of the cpu executor
TEAMS = {"auto": (2, 2, 1), "cluster16": (4, 1, 2), "cluster8": (3, 1, 1), "grid": (2, 1, 3), "cta": (1, 2, 1)}


# ---- the checks -------------------------------------------------------------------------------------------------------
@functools.cache
def known_subject(name: str) -> Subject:
    return subject(by_name(name)[0])


@pytest.fixture
def image() -> Subject:
    return known_subject("unet-pixelcnnpp")


def on_host(s: Subject, dtype: torch.dtype, rung: str) -> HostTeamExecutor:
    """CTAs, warps and teams of host threads in place of a rung."""
    ranks, warps, teams = TEAMS[rung]
    return HostTeamExecutor(s.sampler.programs, s.conditioning, dtype, ranks, warps, teams)


class Wrong(Executor):
    """An executor whose results somebody changes."""

    name = "wrong"

    def __init__(self, inner: Executor, change: Callable[[Request, Tensor, Tensor], None]) -> None:
        self.inner, self.change = inner, change

    def run(self, request: Request) -> tuple[Tensor, Tensor | None]:
        values, params = self.inner.run(request)
        assert params is not None
        self.change(request, values, params)
        return values, params


def outcome(found: dict[str, Any]) -> dict[str, bool | None]:
    return {f["name"]: f["ok"] for f in found["findings"]}


@pytest.mark.parametrize("name", ["unet-pixelcnnpp", "wavenet-vocoder", "masked-layernorm"])
@pytest.mark.parametrize("dtype", gpu_checks.DTYPES.values(), ids=str)
def test_the_team_interpreter_passes(name: str, dtype: torch.dtype) -> None:
    found = check_case(known_subject(name), on_host, dtype)
    expected = ("parameters", "draws", "known values", "batches", *gpu_checks.RUNGS)
    assert outcome(found) == dict.fromkeys(expected, True), found["findings"]


def one_alone(r: Request, values: Tensor, params: Tensor) -> None:
    if r.slots == 1:
        params[0, 0, 0] = torch.nextafter(params[0, 0, 0], torch.tensor(9e9))


def by_slot(r: Request, values: Tensor, params: Tensor) -> None:
    if r.slots > 1:
        params[1] *= 1.001


def all_params(r: Request, values: Tensor, params: Tensor) -> None:
    params += 0.1


def not_a_number(r: Request, values: Tensor, params: Tensor) -> None:
    params[-1, -1, -1] = float("nan")


def another_draw(r: Request, values: Tensor, params: Tensor) -> None:
    values[-1, -1, -1] = -values[-1, -1, -1]


@pytest.mark.parametrize(
    ("change", "caught"),
    [
        (one_alone, {"batches"}),
        (by_slot, {"parameters", "draws", "known values", "batches"}),
        (all_params, {"parameters", "draws", "known values"}),
        (not_a_number, {"parameters", "draws", "known values", "batches"}),
        (another_draw, {"parameters", "draws", "known values", "batches"}),
    ],
)
def test_a_wrong_executor_is_caught(change: Any, caught: set[str], image: Subject) -> None:
    found = outcome(check_case(image, lambda s, d, rung: Wrong(on_host(s, d, rung), change), torch.float32, ()))
    assert {name for name, ok in found.items() if not ok} >= caught
    assert found["batches"] is not ("batches" in caught)


def test_rungs_that_differ_fail_or_are_not_there(image: Subject) -> None:
    def make(s: Subject, dtype: torch.dtype, rung: str) -> Executor:
        if rung == "cluster16":
            raise ValueError("team='cluster16': this device cannot hold such a team")
        if rung == "cluster8":
            raise RuntimeError("launch failed")
        return Wrong(on_host(s, dtype, rung), all_params) if rung == "grid" else on_host(s, dtype, rung)

    found = outcome(check_case(image, make, torch.float32))
    assert [found[rung] for rung in gpu_checks.RUNGS] == [None, False, False, True]


def test_an_executor_that_cannot_be_made_is_a_failed_check(image: Subject) -> None:
    def make(s: Subject, dtype: torch.dtype, rung: str) -> Executor:
        raise fastgen.FastgenError("no device\nand more")

    found = check_case(image, make, torch.float32)
    assert found["findings"] == [{"name": "executor", "ok": False, "detail": "FastgenError: no device"}]


@pytest.fixture(scope="module")
def samplers() -> tuple[Sampler, Sampler]:
    """A sequence that takes long enough to be cancelled on the way, however fast the machine; and an image."""
    torch.manual_seed(0)
    model = WaveNet(layers=6, stacks=2, residual=16, gate=32, skip=16, output="softmax", classes=32).eval()
    for sites in (1 << k for k in range(15, 22)):
        sequence = fastgen.compile(model, (32, sites), threads=1, verify=False)
        began = time.perf_counter()
        sequence.sample(2)
        if time.perf_counter() - began > 4 * CPU_REPORTS:
            break
    return sequence, compile_case(by_name("unet-pixelcnnpp")[0])


def test_promises_of_a_call_hold_on_the_cpu(samplers: tuple[Sampler, Sampler]) -> None:
    found = check_calls(*samplers)
    assert len(found) == 6 and all(f["ok"] for f in found), found


def test_a_full_device_is_told_to_stop_and_tells_what_is_new(samplers: tuple[Sampler, Sampler]) -> None:
    found = {f["name"]: f for f in gpu_checks.check_full(samplers[0], 3)}
    assert found["cancel of 3 samples"]["ok"] and "not what" not in found["stream of 3 samples"]["detail"]


def test_a_stream_that_comes_all_at_once_is_not_early(
    samplers: tuple[Sampler, Sampler], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Sampler.stream
    monkeypatch.setattr(Sampler, "stream", lambda self, n, **o: iter([torch.cat(list(stream(self, n, **o)), -1)]))
    assert gpu_checks.streaming(samplers[0], -1).ok
    assert not gpu_checks.streaming(samplers[0], -1, early=True).ok


def test_broken_promises_are_noticed(samplers: tuple[Sampler, Sampler], monkeypatch: pytest.MonkeyPatch) -> None:
    sample, stream = Sampler.sample, Sampler.stream

    def deaf(self: Sampler, n: int, **options: Any) -> Tensor:
        return sample(self, n, **{k: v for k, v in options.items() if k != "callback"})

    monkeypatch.setattr(Sampler, "sample", deaf)
    monkeypatch.setattr(Sampler, "stream", lambda self, n, **o: (part.flip(0) for part in stream(self, n, **o)))
    found = {f["name"]: f["ok"] for f in check_calls(*samplers)}
    assert not any(found[name] for name in ("progress", "cancel", "stream of chunks", "stream of rows"))
    assert found["two samplers at once"]


def test_the_program_for_sanitizers_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Host(HostTeamExecutor):
        def __init__(
            self, programs: Any, conditioning: Any, dtype: torch.dtype, device: torch.device, team: str
        ) -> None:
            if team == "cluster16":
                raise ValueError("this device cannot hold such a team")
            super().__init__(programs, conditioning, dtype, *TEAMS[team])

        def rung(self, slots: int) -> dict[str, str]:
            return {"text": f"{self.ranks} CTAs for {slots}"}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_small, "CudaExecutor", Host)
    assert gpu_small.main() == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(gpu_small.CASES) * len(gpu_checks.DTYPES) * len(gpu_small.TEAMS)
    assert said[0].endswith("cannot hold such a team") and "2 CTAs for 3, sum" in said[1]


# ---- contenders, on the CPU -------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def case() -> Case:
    torch.manual_seed(0)
    model = WaveNet(
        layers=4, stacks=2, residual=8, gate=16, skip=8, local_channels=3, upsample_scales=(4, 4), length=96
    )
    model.eval()
    return Case("tiny", model, Spec(model.sample_shape, model.head, model.layout, model.predicts, model.start))


def test_every_contender_gives_a_row_for_every_batch(case: Case) -> None:
    rows: list[dict[str, Any]] = []
    gpu_contenders.ours(
        case, [1, 6], 60.0, rows.append, lambda c: fastgen.compile(c.model, cond=c.cond(1), threads=1, verify=False)
    )
    assert rows[0]["proof"]["ok"] and rows[0]["dtype"] == "float32"
    gpu_contenders.run_kind("peers", case, [1, 6], 60.0, rows.append, "cpu")
    seen = [(r["name"], r["dtype"], r["batch"]) for r in rows[1:]]
    assert seen == [
        (name, dtype, batch)
        for name, dtype in (
            ("fastgen", "float32"), ("naive loop", "bfloat16"), ("naive loop", "float32"), ("eager queues", "float32")
        )
        for batch in (1, 6)
    ]  # fmt: skip
    assert all(r["step_seconds"] and min(r["step_seconds"]) > 0 for r in rows[1:])
    assert "conditioning on the device" in rows[1]["how"] and rows[1]["conditioning_seconds"] > 0


def test_conditioning_is_made_once_and_given_back(case: Case) -> None:
    sampler = fastgen.compile(case.model, cond=case.cond(1), threads=1, verify=False)
    before = sampler.sample(6, cond=gpu_contenders.conditioning(case, 6))
    rows: list[dict[str, Any]] = []
    gpu_contenders.ours(case, [6], 60.0, rows.append, lambda c: sampler)
    assert not isinstance(sampler.executor.conditioning, gpu_contenders.Harvested)  # type: ignore[attr-defined]
    assert torch.equal(sampler.sample(6, cond=gpu_contenders.conditioning(case, 6)), before)


def test_what_takes_too_long_is_extrapolated_or_left_out(case: Case) -> None:
    sampler = fastgen.compile(case.model, cond=case.cond(1), threads=1, verify=False)
    sampler.executor.conditioning = gpu_contenders.Harvested(sampler.executor.conditioning, torch.device("cpu"))  # type: ignore[attr-defined]
    row = gpu_contenders.time_sampler(case, sampler, 2, 1e-9)
    assert "extrapolated" in row["how"] and row["step_seconds"][0] > 0
    rows: list[dict[str, Any]] = []
    gpu_contenders.run_kind("peers", case, [1], 0.0, rows.append, "cpu")
    assert rows and all(r["skipped"] == "no time left" for r in rows)


def test_a_sampler_that_is_not_exact_is_not_timed(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_contenders, "verified", lambda sampler: {"ok": False, "text": "NOT EXACT"})
    rows: list[dict[str, Any]] = []
    gpu_contenders.ours(
        case, [1], 60.0, rows.append, lambda c: fastgen.compile(c.model, cond=c.cond(1), threads=1, verify=False)
    )
    assert rows[1]["failed"] and "step_seconds" not in rows[1]


# ---- processes ----------------------------------------------------------------------------------------------------------
WORKER = """
import json, sys, time
at = {k: sys.argv.index("--" + k) for k in ("config", "out")}
names, out = sys.argv[at["config"] + 1 : at["out"]], sys.argv[at["out"] + 1]
with open(out, "a") as f:
    for name in names:
        print(json.dumps({"config": name, "begins": True, "audio": False, "parameters": 1, "steps": 4}), file=f, flush=True)
        if name == "dies":
            print("it broke"); sys.exit(3)
        if name == "hangs":
            f.write('{"config": "hangs", "cut'); f.flush(); time.sleep(600)
        print(json.dumps({"config": name, "name": "fastgen", "dtype": "bfloat16", "batch": 1, "step_seconds": [1.0]}), file=f)
        print(json.dumps({"config": name, "ends": True}), file=f, flush=True)
"""


@pytest.mark.parametrize("kind", ["ours", "peers"])
def test_a_contender_that_dies_or_hangs_costs_only_its_own_rows(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_timings, "START", 0.1)
    monkeypatch.setattr(gpu_timings, "GRACE", 0.1)
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    began = time.perf_counter()
    names = ["a", "dies", "b", "hangs", "c"]
    rows = gpu_timings.supervise(kind, [sys.executable, str(script)], names, 3.0, tmp_path / "rows")
    assert time.perf_counter() - began < 20
    table = {c["name"]: c for c in gpu_timings.arrange(rows, tuple(names))}
    assert list(table) == names
    assert table["a"]["rows"][0]["step_seconds"] == table["b"]["rows"][0]["step_seconds"] == [1.0]
    word = "failed" if kind == "ours" else "skipped"
    assert table["dies"]["rows"][0][word] == "its process ended with status 3: it broke"
    assert table["hangs"]["rows"][0]["skipped"].startswith("late: ended after")
    assert table["c"]["rows"][0]["skipped"] == "no time left"


def test_the_worker_writes_lines_as_it_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(kind: str, case: Case, batches: list[int], seconds: float, emit: Any, device: str) -> None:
        emit({"config": case.name, "name": kind, "seconds": seconds})
        if case.name == "wavenet-nv-large":
            raise RuntimeError("sticky")

    monkeypatch.setattr(gpu_contenders, "run_kind", run)
    with pytest.raises(RuntimeError, match="sticky"):
        gpu_timings.worker("peers", ["wavenet-nv", "wavenet-nv-large"], [1], 64, 10.0, tmp_path / "rows", "cpu")
    rows = gpu_timings.read_lines(tmp_path / "rows")
    assert [list(r)[1] for r in rows] == ["begins", "name", "ends", "begins", "name"]
    assert 4 < rows[1]["seconds"] < 5 < rows[4]["seconds"] < 10


def test_timings_are_written_with_date_revision_and_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"config": "wavenet-nv", "begins": True, "audio": True, "parameters": 1, "steps": 4},
        {"config": "wavenet-nv", **row("fastgen", 1, 8e-6)}, {"config": "wavenet-nv", "ends": True},
    ]  # fmt: skip
    monkeypatch.setattr(gpu, "describe", lambda revision: result()["machine"] | {"device": "Some GPU/2"})
    monkeypatch.setattr(gpu_timings, "run", lambda *arguments: list(rows))
    args = gpu.parse(["timings", "--out", str(tmp_path / "new")])
    assert gpu.timings(args) == 0
    written = {p.name for p in (tmp_path / "new").iterdir()} - {"2026-01-01-abc-Some-GPU-2.png"}
    assert written == {"2026-01-01-abc-Some-GPU-2.json", "2026-01-01-abc-Some-GPU-2.md"}
    found = json.loads((tmp_path / "new" / "2026-01-01-abc-Some-GPU-2.json").read_text())
    assert found["targets"][3]["reached"] and found["configs"][0]["rows"][0]["step_seconds"] == [8e-6]
    rows.insert(2, {"config": "wavenet-nv", "name": "fastgen", "dtype": "float32", "batch": 1, "failed": "lost"})
    assert gpu.timings(args) == 1


def test_cases_are_written_as_they_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def host(programs: Any, conditioning: Any, dtype: torch.dtype, device: torch.device, team: str) -> Executor:
        return HostTeamExecutor(programs, conditioning, dtype, *TEAMS[team])

    monkeypatch.setattr("fastgen.backends.cuda.CudaExecutor", host)
    monkeypatch.setattr("tests.cases.cases", lambda: by_name("wavenet-embedded"))
    out = tmp_path / "cases.json"
    assert gpu.cases(out, 60.0) == 0
    found = json.loads(out.read_text())
    assert [(r["case"], r["dtype"]) for r in found["results"]] == [("wavenet-embedded", d) for d in gpu_checks.DTYPES]
    assert gpu.cases(out, -1.0) == 1
    assert json.loads(out.read_text())["left_out"] == ["wavenet-embedded"]


@pytest.mark.parametrize("arguments", [["cases"], ["contenders", "--out", "x"], ["cases", "ours", "--out", "x"]])
def test_arguments_that_make_no_sense(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.parse(arguments)


# ---- the report ---------------------------------------------------------------------------------------------------------
def row(name: str, batch: int, seconds: float, dtype: str = "bfloat16", **more: Any) -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "batch": batch, "step_seconds": [seconds], "how": "whole runs", **more}


def result() -> dict[str, Any]:
    proof = {"dtype": "bfloat16", "ok": True, "text": "exact: 2 samples"}
    cifar = [
        row("fastgen", 1, 30e-6, rung="1 cluster of 16 CTAs"), row("fastgen", 1, 9.0, "float32"),
        row("fastgen", 4, 40e-6), row("naive loop", 1, 3e-3), row("naive loop, CUDA graph", 1, 1.5e-3),
        row("fastgen", 16, 70e-6), {"name": "fastgen", "dtype": "bfloat16", "batch": 1024, "skipped": "out of memory"},
    ]  # fmt: skip
    nv = [row("fastgen", 1, 8e-6), row("fastgen", 64, 20e-6), row("eager queues", 1, 1e-3, "float32")]
    configs = [
        {
            "name": "pixelcnnpp-cifar",
            "audio": False,
            "parameters": 53_660_000,
            "steps": 1024,
            "proofs": [proof],
            "rows": cifar,
        },
        {"name": "wavenet-nv", "audio": True, "parameters": 710_000, "steps": 4096, "proofs": [], "rows": nv},
    ]
    made: dict[str, Any] = {
        "machine": {
            "device": "GPU",
            "driver": "1",
            "torch": "2",
            "cuda": "13",
            "date": "2026-01-01",
            "revision": "abc",
        },
        "configs": configs,
    }
    return made | {"targets": gpu_report.judge(made), "left_out": gpu_report.left_out(configs)}


def test_targets_are_judged_in_their_own_units() -> None:
    judged = {(t["config"], t["batch"]): (t["measured"], t["reached"]) for t in result()["targets"]}
    assert judged["pixelcnnpp-cifar", 1] == (pytest.approx(30.72), True)  # ms, at most 40
    assert judged["pixelcnnpp-cifar", 16] == (pytest.approx(71.68), False)  # at most 60
    assert judged["pixelcnnpp-cifar", 1024] == (None, None)
    assert judged["wavenet-nv", 1] == (pytest.approx(125.0), True)  # kHz, at least 100
    assert judged["wavenet-mol", 1] == (None, None)


def test_the_report() -> None:
    text = gpu_report.render(result())
    assert "| pixelcnnpp-cifar, batch 16 | ≤ 60.0 ms | 71.7 ms | **not reached** |" in text
    assert "| wavenet-mol, batch 1 | ≥ 50.0 kHz |  | not measured |" in text
    # against the faster of the naive loops; floor of the batch itself, of a smaller one, or none
    assert "| 1 | fastgen bfloat16 | **30.7** | 32.6 | 15.0 | 50.0 | 1 cluster of 16 CTAs |" in text
    assert "| 4 | fastgen bfloat16 | **41.0** | 97.7 | > 15.0 |  |  |" in text
    assert "| 1 | fastgen bfloat16 | **125** | 125,000 | 190 |  |  |" in text
    assert "| 64 | fastgen bfloat16 | **50.0** | 3,200,000 |  |  |  |" in text
    assert "- pixelcnnpp-cifar, fastgen bfloat16, batch 1024: out of memory" in text
    assert "bfloat16: exact: 2 samples." in text


def test_a_plot_is_drawn_or_it_is_said_why_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plot.png"
    if importlib.util.find_spec("matplotlib") is not None:
        assert gpu_report.plot(result(), path) == "plot: plot.png"
        assert path.read_bytes().startswith(b"\x89PNG")
        assert gpu_report.plot({**result(), "configs": []}, path) == "no plot: nothing was timed"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert gpu_report.plot(result(), tmp_path / "none.png") == "no plot: matplotlib is not installed"


def test_checks_are_gathered_whatever_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finding = vars(Finding("draws", False, "7/8 equal"))
    (tmp_path / "cases.json").write_text(
        json.dumps({"results": [{"case": "a", "dtype": "float32", "findings": [finding]}], "left_out": []})
    )
    (tmp_path / "steps").write_text("build\tok\t12\t\nprobe\tFAILED\t3\tno clusters\n")
    gpu_report.main(["gather", str(tmp_path), str(tmp_path)])
    found = json.loads((tmp_path / "checks.json").read_text())
    assert found["probe"] is None and found["steps"][1] == {
        "name": "probe", "result": "FAILED", "seconds": 3, "remark": "no clusters"
    }  # fmt: skip
    assert "FAILED a float32: draws: 7/8 equal" in capsys.readouterr().out


# ---- bench/gpu.sh -------------------------------------------------------------------------------------------------------
def gpu_sh(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "bench" / "gpu.sh"), *arguments], env={**os.environ, **variables}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize(
    "arguments", [(), ("out", "--part", "some"), ("out", "--fast"), ("one", "two"), ("out", "--part")]
)
def test_gpu_sh_refuses_what_it_does_not_know(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = gpu_sh(*(str(tmp_path / a) if a in ("out", "one", "two") else a for a in arguments))
    assert done.returncode == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU; what is said without one cannot be seen")
def test_gpu_sh_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = gpu_sh(str(tmp_path), PATH=path)
    assert done.returncode == 2
    assert "bench/gpu.py: " in done.stdout and "nothing was run" in done.stdout


PYTHON = """#!/usr/bin/env bash
echo "python3 $*" >>"$CALLS"
case "$*" in
  *gpu_report.py*) exec "$REAL" "$@" ;;
  *"gpu.py machine"*) echo '{}' >"${4}" ;;
  *"gpu.py cases"*) echo 'all right'; exit "${CASES:-0}" ;;
  *"gpu.py timings"*) echo '| a table |' ;;
  *" -m gpu"*) exit 5 ;;
  *pip*) exit "${PIP:-0}" ;;
esac
"""


@pytest.fixture
def stubbed(tmp_path: Path) -> Callable[..., tuple[subprocess.CompletedProcess[str], str]]:
    """gpu.sh with a python3, nvcc and compute-sanitizer that only note how they are called."""
    tools = tmp_path / "tools"
    tools.mkdir()
    scripts = {
        "python3": PYTHON,
        "nvcc": '#!/bin/sh\nfor last; do :; done\nprintf "#!/bin/sh\\necho {} >\\$1\\n" >"$last"; chmod +x "$last"\n',
        "compute-sanitizer": '#!/bin/sh\necho "sanitizer $*" >>"$CALLS"\necho "${SANITIZER:-fine}"; [ -z "$SANITIZER" ]\n',
    }
    for name, text in scripts.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)

    def run(*arguments: str, **variables: str) -> tuple[subprocess.CompletedProcess[str], str]:
        calls = tmp_path / "calls"
        path = f"{tools}{os.pathsep}{os.environ['PATH']}"
        out = tmp_path / "out"
        done = gpu_sh(str(out), *arguments, PATH=path, CALLS=str(calls), REAL=sys.executable, **variables)
        assert len([p for p in out.rglob("*") if p.is_file()]) <= 8
        return done, calls.read_text()

    return run


def results_of(text: str) -> dict[str, str]:
    """The table at the end."""
    lines = text[text.index("step               result    time") :].splitlines()[1:]
    return {line[:18].strip(): line[19:28].strip() for line in lines}


CHECKS = ("build", "probe", "cases", "calls", "memcheck", "synccheck", "racecheck", "initcheck", "machine-code")


def test_gpu_sh_runs_every_check(stubbed: Any, tmp_path: Path) -> None:
    done, calls = stubbed("--part", "checks", "--revision", "abc")
    assert done.returncode == 0, done.stdout
    table = results_of(done.stdout)
    assert table == {**dict.fromkeys(CHECKS, "ok"), "gpu-tests": "NOT RUN"}
    assert "--revision abc" in calls and "sanitizer --tool racecheck" in calls
    found = json.loads((tmp_path / "out" / "checks.json").read_text())
    assert {s["name"] for s in found["steps"]} == set(table) and found["probe"] == {}
    assert "==== cases (status 0" in (tmp_path / "out" / "gpu-checks.log").read_text()


def test_gpu_sh_goes_on_after_a_failure(stubbed: Any) -> None:
    done, _ = stubbed("--part", "checks", CASES="1", SANITIZER="1 error")
    assert done.returncode == 1
    table = results_of(done.stdout)
    assert {name for name, word in table.items() if word == "FAILED"} == {
        "cases", "memcheck", "synccheck", "racecheck", "initcheck"
    }  # fmt: skip
    assert table["machine-code"] == "ok"


def test_gpu_sh_tells_a_tool_that_cannot_run_from_one_that_found_something(stubbed: Any) -> None:
    done, _ = stubbed("--part", "checks", SANITIZER="Error: Device not supported")
    assert done.returncode == 0
    assert results_of(done.stdout)["memcheck"] == "NOT RUN"


def test_gpu_sh_times_after_building_in_place_where_pip_cannot(stubbed: Any) -> None:
    done, calls = stubbed("--part", "timings", PIP="1")
    assert done.returncode == 0, done.stdout
    assert "setup.py build_ext --inplace" in calls and "| a table |" in done.stdout
    assert list(results_of(done.stdout)) in (
        ["compiler-cache", "build", "timings", "layers"], ["build", "compiler-cache", "timings", "layers"]
    )  # fmt: skip


# ---- bench/probe.cu -----------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc was not found, which compiles it")
def test_the_probe_compiles_without_spills_and_says_what_it_cannot_do(tmp_path: Path) -> None:
    built = subprocess.run(
        ["nvcc", "-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas", "-v", "-Werror", "all-warnings",
         str(ROOT / "bench" / "probe.cu"), "-o", str(tmp_path / "probe")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    frames = [line.strip() for line in built.stderr.splitlines() if "stack frame" in line]
    assert len(frames) >= 12 and set(frames) == {"0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"}
    if not torch.cuda.is_available():
        done = subprocess.run(
            [str(tmp_path / "probe"), str(tmp_path / "out")], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2 and "no CUDA device can be used" in done.stderr
