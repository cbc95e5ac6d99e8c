"""The timings of a GPU on the CPU: ours, the peers, and what they do with too little time. Figures mean nothing here."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import fastgen
from bench import configs
from bench.configs import Case
from bench.gpu import ours, peers
from bench.gpu.lines import Row, read_lines
from bench.gpu.steps import NOT_RUN_STATUS
from bench.gpu.timing_tables import arrange
from fastgen import Sampler
from fastgen.models.wavenet import WaveNet
from fastgen.spec import Spec


@pytest.fixture(scope="module")
def case() -> Case:
    torch.manual_seed(0)
    model = WaveNet(
        layers=4, stacks=2, residual=8, gate=16, skip=8, local_channels=3, upsample_scales=(4, 4), length=96
    )
    model.eval()
    return Case("tiny", model, Spec(model.sample_shape, model.head, model.layout, model.predicts, model.start))


@pytest.fixture(scope="module")
def sampler(case: Case) -> Sampler:
    return ours.planned(case)


@pytest.fixture(autouse=True)
def _stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of a move to the GPU."""
    monkeypatch.setattr(ours, "on_team", lambda sampler, dtype, team: copy.copy(sampler))


def time_ours(case: Case, sampler: Sampler, batches: list[int], seconds: float = 60.0) -> tuple[bool, list[Row]]:
    rows: list[Row] = []
    good = ours.run(case, sampler, "grid", [torch.float32], batches, seconds, rows.append)
    return good, rows


# ---- ours ---------------------------------------------------------------------------------------------------------------
def test_every_batch_has_a_row(case: Case, sampler: Sampler) -> None:
    good, rows = time_ours(case, sampler, [1, 6])
    assert good and rows[-1]["proof"]["ok"] and 0 < rows[-1]["call_seconds"] < 1  # behind what is timed
    whole = [r for r in rows[:-1] if r["how"].startswith("whole")]
    assert [(r["name"], r["dtype"], r["team"], r["batch"]) for r in whole] == [
        ("fastgen", "float32", "grid", b) for b in (1, 6)
    ]
    assert all(min(r["step_seconds"]) > 0 for r in whole)
    assert "conditioning on the device" in whole[0]["how"] and whole[0]["conditioning_seconds"] > 0


def test_conditioning_is_made_once_and_given_back(case: Case, sampler: Sampler) -> None:
    before = sampler.sample(6, cond=ours.conditioning(case, 6))
    time_ours(case, sampler, [6])
    assert not isinstance(sampler.executor.conditioning, ours.Harvested)  # type: ignore[attr-defined]
    assert torch.equal(sampler.sample(6, cond=ours.conditioning(case, 6)), before)


class Slow:
    """A sampler that reports every eighth of a run, and takes its time."""

    def __init__(self, steps: int, nap: float) -> None:
        self.steps, self.nap, self.runs = steps, nap, 0
        self.executor = type("Executor", (), {"conditioning": type("Conditioning", (), {"seconds": 0.0})()})()

    def sample(self, n: int, *, cond: Any, seed: int, callback: Any = None) -> None:
        self.runs += 1
        for k in range(8):
            time.sleep(self.nap)
            if callback is not None and callback((k + 1) * self.steps * n // 8, self.steps * n) is False:
                raise fastgen.errors.Cancelled


def test_the_first_sites_are_told_before_the_run_is_over(case: Case) -> None:
    rows: list[Row] = []
    slow: Any = Slow(96, 0.02)
    ours.time_batch(case, slow, 3, 60.0, rows.append)
    assert [r["how"] for r in rows] == ["steps 12 to 60 of 96", "whole runs, conditioning on the device before"]
    assert all(0.02 / 12 < t < 0.2 / 12 for r in rows for t in r["step_seconds"])
    assert len(rows[1]["step_seconds"]) == ours.REPEATS == slow.runs - 1


def test_a_run_that_takes_too_long_is_stopped_behind_its_first_sites(case: Case) -> None:
    rows: list[Row] = []
    slow: Any = Slow(96, 0.05)
    ours.time_batch(case, slow, 1, 0.02, rows.append)
    assert slow.runs == 1 and rows and {r["how"] for r in rows} == {"steps 12 to 60 of 96"}


def test_no_time_is_said(case: Case, sampler: Sampler) -> None:
    assert [r.get("skipped") for r in time_ours(case, sampler, [1, 2], 0.0)[1][:-1]] == ["no time left"] * 2


def test_a_sampler_that_is_not_exact_is_timed_and_says_so(
    case: Case, sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours, "proved", lambda case, sampler: {"ok": False, "text": "NOT EXACT"})
    good, rows = time_ours(case, sampler, [1])
    (config,) = arrange(rows)
    assert not good and config["rows"] and all(r["inexact"] and r["step_seconds"] for r in config["rows"])


def test_an_error_costs_its_own_row(case: Case, sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    time_batch = ours.time_batch

    def broken(case: Case, sampler: Sampler, batch: int, *rest: Any) -> None:
        if batch == 2:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")
        if batch == 3:
            raise torch.cuda.OutOfMemoryError
        time_batch(case, sampler, batch, *rest)

    monkeypatch.setattr(ours, "time_batch", broken)
    good, rows = time_ours(case, sampler, [2, 3, 1])
    assert not good
    assert rows[0]["failed"] == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert rows[1]["skipped"] == "out of memory" and rows[-2]["step_seconds"]


@pytest.fixture
def no_gpu_needed(case: Case, sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "make", lambda *a: case)
    monkeypatch.setattr(ours, "planned", lambda case: sampler)


def test_the_program_takes_its_turn_and_writes_its_rows(no_gpu_needed: None, tmp_path: Path) -> None:
    lines = tmp_path / "lines"
    assert ours.main(["wavenet-mol", "--batch", "1,2", "--turn", str(tmp_path / "turn"), "--lines", str(lines)]) == 0
    rows = read_lines(lines)
    assert rows[0] == {"begins": True} and rows[1]["parameters"] == case_parameters(rows[1])
    assert {r["batch"] for r in rows if "batch" in r} == {1, 2} and rows[-1]["proof"]["ok"]


def case_parameters(row: Row) -> int:
    assert row["config"] == "tiny" and row["audio"] and row["steps"] == 96
    return int(row["parameters"])


def test_a_rung_that_is_not_there_is_not_run(no_gpu_needed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def move(sampler: Sampler, dtype: torch.dtype, team: str) -> Sampler:
        raise ValueError(f"team='{team}': this device cannot hold such a team")

    monkeypatch.setattr(ours, "on_team", move)
    assert ours.main(["wavenet-mol", "--team", "cluster16"]) == NOT_RUN_STATUS


def test_a_sequence_is_proved_on_its_first_sites(case: Case, sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int | None] = []
    report = sampler.verify()
    monkeypatch.setattr(Sampler, "verify", lambda self, length: asked.append(length) or report)
    ours.proved(case, sampler)
    free = configs.make("wavenet-nv", 4096)
    ours.proved(free, sampler)
    assert asked == [None, ours.PROOF_SITES]  # the first has conditioning of one length


# ---- peers --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "seen"),
    [("eager", [("naive loop", "bfloat16"), ("naive loop", "float32")]), ("queues", [("eager queues", "float32")])],
)
def test_every_peer_gives_a_row_for_every_batch(kind: str, seen: list[tuple[str, str]], case: Case) -> None:
    rows: list[Row] = []
    peers.run(kind, case, [1, 6], 60.0, rows.append, "cpu")
    assert [(r["name"], r["dtype"], r["batch"]) for r in rows] == [(*s, batch) for s in seen for batch in (1, 6)]
    assert all(r["step_seconds"] and min(r["step_seconds"]) > 0 for r in rows)


def test_a_peer_that_cannot_is_left_out(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(*_: Any) -> Row:
        raise RuntimeError("no such backend\nmore")

    monkeypatch.setattr(peers, "_one_forward", cannot)
    rows: list[Row] = []
    peers.run("compile", case, [1], 60.0, rows.append, "cpu")
    assert [r["skipped"] for r in rows] == ["RuntimeError: no such backend"]
    peers.run("eager", case, [1], 0.0, rows.append, "cpu")
    assert rows[-1]["skipped"] == "no time left"


def test_the_program_of_a_peer_writes_its_rows(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "make", lambda *a: case)
    monkeypatch.setattr(peers.run, "__defaults__", ("cpu",))
    before = torch.backends.cudnn.benchmark
    lines = tmp_path / "lines"
    assert peers.main(["wavenet-mol", "queues", "--turn", str(tmp_path / "turn"), "--lines", str(lines)]) == 0
    torch.backends.cudnn.benchmark = before
    assert [next(iter(row)) for row in read_lines(lines)] == ["begins", "config", "config"]


@pytest.mark.parametrize("arguments", [["no-such"], ["wavenet-nv", "--batch", "0"], ["wavenet-nv", "--dtype", "int8"]])
def test_arguments_that_make_no_sense(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        ours.parse(arguments)


def test_an_image_of_fewer_rows() -> None:
    made = configs.make("pixelcnnpp-mnist", 64, rows=4)
    assert made.spec.shape == (1, 4, 28) and made.spec.steps == 112
    assert configs.make("wavenet-nv", 64, rows=4).spec.sites == (64,)
