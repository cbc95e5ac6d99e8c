"""The report of a call on a GPU, from fixed rows: whatever is missing, it is written."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from bench.gpu import check_tables, plot, report, timing_tables
from bench.gpu import steps as S
from bench.gpu.lines import Lines, Row
from bench.layers import report as layers_report

MACHINE = {
    "step": "machine", "device": "Some GPU/2", "multiprocessors": 132, "driver": "1", "torch": "2", "cuda": "13",
    "triton": "3", "date": "2026-01-01 10:00 UTC", "revision": "abc+",
}  # fmt: skip


def timing(config: str, batch: int, seconds: float, team: str = "auto", **more: object) -> Row:
    return {
        "step": f"{config} {team}", "config": config, "name": "fastgen", "dtype": "bfloat16", "batch": batch, "team": team,
        "step_seconds": [seconds], "how": "whole runs", **more,
    }  # fmt: skip


def peer(config: str, batch: int, seconds: float, name: str = "naive loop") -> Row:
    row = timing(config, batch, seconds, name=name)
    del row["team"]
    return row


def about(config: str, audio: bool, steps: int, parameters: int = 710_000) -> Row:
    return {"step": "x", "config": config, "audio": audio, "parameters": parameters, "steps": steps}


def end(step: str, result: str = S.OK, why: str = "", **more: object) -> Row:
    return {"step": step, "result": result, "seconds": 2.0, "why": why, **more}


def rows() -> list[Row]:
    cifar, nv = "pixelcnnpp-cifar", "wavenet-nv"
    return [
        MACHINE, end("machine"), end("build"),
        about(cifar, False, 1024, 53_660_000), about(nv, True, 4096),
        {"step": "x", "config": cifar, "proof": {"ok": True, "text": "exact: 2 samples"}, "dtype": "bfloat16", "team": "auto",
         "call_seconds": 0.02},
        timing(cifar, 1, 30e-6, rung="1 cluster of 16 CTAs"), timing(cifar, 1, 9.0, dtype="float32"),
        timing(cifar, 4, 40e-6), peer(cifar, 1, 3e-3), peer(cifar, 1, 1.5e-3, "naive loop, CUDA graph"),
        timing(cifar, 16, 70e-6),
        {k: v for k, v in timing(cifar, 1024, 1.0).items() if k != "step_seconds"} | {"skipped": "out of memory"},
        timing(nv, 1, 8e-6), timing(nv, 64, 20e-6), peer(nv, 1, 1e-3, "eager queues"),
    ]  # fmt: skip


def text_of(found: list[Row]) -> str:
    return report.render(report.gather(found, "second"))


# ---- timings ------------------------------------------------------------------------------------------------------------
def test_targets_are_judged_in_their_own_units() -> None:
    judged = {(t["config"], t["batch"]): (t["measured"], t["reached"]) for t in report.gather(rows(), "x")["targets"]}
    assert judged["pixelcnnpp-cifar", 1] == (pytest.approx(30.72), True)  # ms, at most 40
    assert judged["pixelcnnpp-cifar", 16] == (pytest.approx(71.68), False)  # at most 60
    assert judged["pixelcnnpp-cifar", 1024] == (None, None)
    assert judged["wavenet-nv", 1] == (pytest.approx(125.0), True)  # kHz, at least 100
    assert judged["wavenet-mol", 1] == (None, None)


def test_a_target_takes_the_best_rung() -> None:
    found = [
        about("wavenet-nv", True, 4096),
        timing("wavenet-nv", 1, 20e-6, "cluster16"),
        timing("wavenet-nv", 1, 9e-6, "cta"),
    ]
    judged = {t["config"]: t["measured"] for t in report.gather(found, "x")["targets"]}
    assert judged["wavenet-nv"] == pytest.approx(1e3 / 9)


def test_the_tables_of_timings() -> None:
    text = text_of(rows())
    assert "| pixelcnnpp-cifar, batch 16 | ≤ 60.0 ms | 71.7 ms | **not reached** |" in text
    assert "| wavenet-mol, batch 1 | ≥ 50.0 kHz |  | not measured |" in text
    # against the faster of the naive loops; floor of the batch itself, of a smaller one, or none
    assert "| 1 | fastgen bfloat16 | **30.7** | 32.6 | 15.0 | 50.0 | 1 cluster of 16 CTAs |" in text
    assert "| 4 | fastgen bfloat16 | **41.0** | 97.7 | > 15.0 |  |  |" in text
    assert "| 1 | fastgen bfloat16 | **125** | 125,000 | 190 |  |  |" in text
    assert "| 64 | fastgen bfloat16 | **50.0** | 3,200,000 |  |  |  |" in text
    assert "- pixelcnnpp-cifar, fastgen auto bfloat16, batch 1024: out of memory" in text
    assert "bfloat16, auto: exact: 2 samples." in text
    assert "Of a whole run 20.0 ms are the call itself." in text


def test_rungs_stand_side_by_side() -> None:
    found = [
        about("wavenet-nv", True, 4096), timing("wavenet-nv", 1, 200e-6, "cluster16"),
        timing("wavenet-nv", 1, 400e-6, "grid", how="steps 8 to 72 of 4096"),
        timing("wavenet-nv", 1, 800e-6, "cta"),
        {"config": "wavenet-nv", "proof": {"ok": False, "text": "NOT EXACT"}, "dtype": "bfloat16", "team": "cta"},
    ]  # fmt: skip
    assert "| 1 | bfloat16 | 200 (5.00 kHz) |  | 400* (2.50 kHz) | 800 (1.25 kHz) NOT EXACT |" in text_of(found)


def test_a_later_figure_of_the_same_replaces_an_earlier_one_but_an_error_does_not() -> None:
    first, whole = timing("wavenet-nv", 1, 1.0, how="steps 0 to 9 of 99"), timing("wavenet-nv", 1, 2.0)
    broken = {**{k: v for k, v in whole.items() if k != "step_seconds"}, "failed": "lost"}
    (config,) = timing_tables.arrange([first, whole, broken])
    assert [r.get("step_seconds") for r in config["rows"]] == [[2.0], None]
    assert timing_tables.left_out([config]) == ["wavenet-nv, fastgen auto bfloat16, batch 1: FAILED: lost"]


def test_a_plot_is_drawn_or_it_is_said_why_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, configs = tmp_path / "plot.png", timing_tables.arrange(rows())
    if importlib.util.find_spec("matplotlib") is not None:
        assert plot.plot(configs, "about", path) == "plot: plot.png"
        assert path.read_bytes().startswith(b"\x89PNG")
        assert plot.plot([], "about", path) == "no plot: nothing was timed"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plot.plot(configs, "about", tmp_path / "none.png") == "no plot: matplotlib is not installed"


# ---- checks -------------------------------------------------------------------------------------------------------------
def smoked(team: str, digest: str = "aa", **more: object) -> Row:
    return {
        "step": f"smoke c {team} bfloat16", "case": "c", "team": team, "dtype": "bfloat16", "ok": True, "error": 1e-3,
        "draws": "3/3", "digest": digest, "limits": {"ctas": 132}, **more,
    }  # fmt: skip


def test_the_smoke_table() -> None:
    missing = {"step": "smoke c cluster16 bfloat16", "case": "c", "team": "cluster16", "dtype": "bfloat16", "ok": None}
    found = [missing, smoked("grid"), smoked("cta", ok=False, error=2.0)]
    lines = check_tables.smoke(found)
    assert "| c | bfloat16 | not held | **nothing** | 1.0e-03 | **WRONG** 2.0e+00, 3/3 draws | yes |" in lines
    assert "- bfloat16: {'ctas': 132}" in lines
    assert not report.failed(found)
    other = [*found, smoked("cluster8", "bb")]
    assert check_tables.smoke(other)[4].endswith("| **no** |") and report.failed(other)


def test_the_probe_table() -> None:
    found = [
        {"step": "probe", "probed": "GPU"},
        {"step": "probe", "group": "stage", "name": "s", "value": 0.5, "unit": "us", "note": "n"},
        {"step": "probe", "group": "barrier", "name": "b, 512 threads", "value": 1.0, "unit": "us", "note": ""},
        {"step": "probe", "group": "exchange", "name": "e", "value": None, "unit": "us", "note": ""},
        {"step": "probe", "error": "launch: cudaErrorX"},
    ]
    assert check_tables.probe(found)[4:] == [
        "| stage | s | 0.500 us n |", "| exchange | e | failed  |", "| FAILED | launch: cudaErrorX | |"
    ]  # fmt: skip


@pytest.mark.parametrize(("finish", "verdict"), [(50, "as expected"), (10, "less than expected")])
def test_the_phases_say_whether_the_account_is_right(finish: int, verdict: str) -> None:
    def row(phase: str, busy: float) -> Row:
        return {"config": "nv", "phase": phase, "samples": 1, "share": busy / 2, "waiting": 0, "of_busy": busy}

    found = [
        {"config": "nv", "profiled": "k", "samples": 200, "waiting": 100}, row("finish", finish / 100), row("multiply", 0.3),
        {"config": "nv", "function": "A::f", "samples": 120},
    ]  # fmt: skip
    text = "\n".join(check_tables.phases(found))
    assert "200 samples, 50% of them at barriers." in text and verdict in text
    assert f"| finish | {finish / 2:.1f}% | {finish:.1f}% |" in text and "A::f 120" in text


def test_tests_are_counted_by_how_they_ended_last() -> None:
    def row(test: str, outcome: str, **more: object) -> Row:
        return {"step": "s", "test": test, "outcome": outcome, **more}

    found = [
        row("a", "passed", findings=[{"ok": True}, {"ok": None}]), row("b", "failed", why="together"), row("b", "passed"),
        *(row(f"tests/gpu/c{k}", "failed", why="7/8 equal") for k in range(5)), row("d", "failed", why="other"),
    ]  # fmt: skip
    lines = check_tables.tests(found)
    assert lines[2] == "2 passed, 6 failed, 0 skipped. 2 findings, of which 1 could not be made."
    assert lines[3:] == ["- FAILED c0, c1, c2 and 2 more: 7/8 equal", "- FAILED d: other"]


def test_steps_that_are_not_ok_are_told() -> None:
    found = [MACHINE, end("machine"), end("phases nv", S.NOT_RUN, "ncu | is not there"), end("x", S.NO_TIME)]
    text = text_of(found)
    assert "1 steps ok" in text and "| phases nv | NOT RUN | 2 | ncu / is not there |" in text
    assert text.splitlines()[0].endswith("FAILED.")  # there was no time for x
    assert "All passed." in text_of(found[:-1])
    many = [end(f"y{k}", S.NO_TIME, "no time was left") for k in range(9)]
    tests = [
        end("tests/gpu/t.py::t", S.FAILED, "in its own section"),
        end("tests/gpu/t.py::u", S.NO_TIME, "no time was left"),
    ]
    text = text_of([MACHINE, *many, *tests])
    assert "| y0, y1, y2 and 7 more | NO TIME | 20 | no time was left |" in text and "in its own section" not in text


def test_layers_have_their_table() -> None:
    timed = {"name": "conv", "dtype": "bfloat16", "batch": 4, "rows": {
        "fused": {"both": [0.001], "forward": [0.0005], "peak_bytes": 2**20},
        "eager": {"both": [0.002], "forward": [0.001], "peak_bytes": 2**21},
    }}  # fmt: skip
    checked = {"checked": "conv", "dtype": "bfloat16", "errors": {"y": 0.5}, "allowed": 0.01, "right": False}
    text = text_of([MACHINE, {"step": "layer conv", **checked}, {"step": "layer conv", **timed}])
    assert "0 of 1 right" in text and "- WRONG: conv bfloat16" in text
    assert "| conv | bfloat16 | 4 | eager | 1.000 (1.000-1.000) | 2.000 (2.000-2.000) | 2.00 | 2 | 2000 |" in text
    assert layers_report.line(timed) == "conv (bfloat16, batch 4): 1.000 ms, 2.00x eager"


# ---- files --------------------------------------------------------------------------------------------------------------
def test_files_are_named_by_date_revision_device_and_call(tmp_path: Path) -> None:
    path = tmp_path / "second.jsonl"
    for row in rows():
        Lines(path)(row)
    with path.open("a") as file:
        file.write('{"step": "cut sho')
    text = report.write(path)
    assert text.name == "2026-01-01-abc-Some-GPU-2-second.md" and text.read_text().startswith("Some GPU/2, driver 1")
    found = json.loads(text.with_suffix(".json").read_text())
    assert found["call"] == "second" and found["targets"][3]["reached"] and not found["failed"]
    assert found["timings"][0]["rows"][0]["step_seconds"] == [30e-6]
    assert {p.suffix for p in tmp_path.iterdir()} - {".png"} == {".jsonl", ".md", ".json"}


def test_nothing_is_enough_for_a_report(tmp_path: Path) -> None:
    assert "unknown" in report.write(tmp_path / "first.jsonl").read_text()
