"""The benchmark itself: the report of fixed results, the peer against forward, and the layers' timing on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import report
from bench.eager import TOLERANCE, Queue, error_against_forward
from bench.layers import __main__ as layers
from bench.layers import report as layers_report
from fastgen.models import WaveNet
from tests.kernel_shapes import Layer


def results(step_seconds: float, revision: str) -> report.Result:
    rows = [
        {"batch": 4, "name": "naive loop", "how": "one forward x 100 steps", "step_seconds": [2.0, 3.0, 1.0]},
        {
            "batch": 4,
            "name": "fastgen cpu float32",
            "how": "whole runs",
            "step_seconds": [step_seconds],
            "macs_per_step": 1e8,
            "weight_bytes_per_step": 4e7,
        },
        {"batch": 4, "name": "eager queues", "how": "256 steps", "step_seconds": [0.05]},
    ]
    plan = {"plan_seconds": 1.5, "compile_seconds": 2.25, "peak_mib": 900.0}
    names = {"name": "some-wavenet", "audio": True, "parameters": 2_500_000, "steps": 100}
    machine = {
        "cpu": "Some CPU", "cores": 2, "caches": {"L1": "32K"}, "isa": "avx2", "torch": "2.0",
        "date": "2025-01-01", "revision": revision, "load": [0.1, 0.2],
        "gflops": 100.0, "read_gbps": 20.0, "cached_gbps": 50.0,
    }  # fmt: skip
    config = {**names, "plan": plan, "max_abs_error": {"float32": 2e-6}, "rows": rows}
    return {"machine": machine, "options": {"threads": 2, "repeats": 3}, "configs": [config]}


def test_report_states_medians_spread_ratios_and_shares_of_the_machine() -> None:
    lines = report.render(results(0.02, "abc")).splitlines()
    table = {cells[2]: cells for cells in ([c.strip() for c in s.split("|")] for s in lines if s.startswith("| 4 |"))}
    assert table["naive loop"][3:7] == ["0.5", "1.00-0.333", "", "0.025"]
    # 1 / 0.02 s; 2 / 0.02; 0.05 / 0.02; 2 * 1e8 * 4 / 0.02 s = 40 GFLOP/s of 100; 4e7 / 0.02 s = 2 GB/s of 20
    assert table["fastgen cpu float32"][3:11] == ["50.0", "once", "100", "2.50", "40.0", "40%", "2.00", "10%"]
    text = "\n".join(lines)
    assert "2.50M parameters" in text
    assert "peak memory 900 MiB" in text
    assert "naive loop: one forward x 100 steps" in text


def test_images_are_reported_in_seconds_for_the_batch() -> None:
    found = results(0.02, "abc")
    found["configs"][0]["audio"] = False
    text = report.render(found)
    assert "| 4 | fastgen cpu float32 | 2.00 | once | 100 | 40.0 |" in text
    assert "x eager" not in text


def test_comparison_divides_the_old_time_by_the_new() -> None:
    text = report.compare(results(0.02, "new"), results(0.03, "old"))
    assert "new against old" in text
    assert "| some-wavenet | 4 | fastgen cpu float32 | 30.0 | 20.0 | 1.50 |" in text


def tiny(**options: object) -> WaveNet:
    torch.manual_seed(0)
    base = dict(layers=6, stacks=2, residual=8, gate=12, skip=10, hidden=9, length=64)
    return WaveNet(**{**base, **options}).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "model",
    [
        tiny(kernel_size=3, local_channels=5, upsample_scales=(4, 4), global_channels=3, speakers=4),
        tiny(kernel_size=2, input_kernel=2, output="softmax", classes=16, scaled=False),
    ],
    ids=["mixture-conditioned", "softmax"],
)
def test_the_eager_peer_equals_forward_past_the_receptive_field(
    model: WaveNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 3 * model.receptive_field
    cond = tuple(c + torch.arange(c.numel()).view(c.shape) % 3 for c in model.example_cond(2, steps))
    assert error_against_forward(model, steps, cond) < TOLERANCE / 10
    push = Queue.push
    monkeypatch.setattr(Queue, "push", lambda queue, t, x: push(queue, t, x).roll(1, 1))
    assert error_against_forward(model, steps, cond) > TOLERANCE  # the check can tell


def test_the_layers_are_checked_timed_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """bench.layers on the CPU, small; its figures mean nothing, their form does."""
    layer = Layer("small", "wavenet", (2, 8), 3, (2,), {"dilation": 2}, "map", skip=2)
    monkeypatch.setattr(layers, "LAYERS", [layer])
    monkeypatch.setattr(layers, "time_step", lambda *_: pytest.fail("not with --quick"))
    time_loss = layers.time_loss
    monkeypatch.setattr(layers, "time_loss", lambda *a: time_loss(*a, size=2))
    named = dict.fromkeys(("device", "torch", "triton", "cuda", "date", "revision"), "some")
    result: dict[str, Any] = {"machine": named, "options": {"rounds": 1}, "checks": [], "timings": []}
    seen: list[int] = []
    keep = layers.keep_in(result, tmp_path / "layers")

    def kept(kind: str, row: dict[str, Any]) -> None:
        keep(kind, row)
        seen.append(len(json.loads((tmp_path / "layers.json").read_text())["timings"]))  # whole after every row

    args = layers.parse(["--quick", "--batch", "2", "--rounds", "1", "--dtype", "float32"])
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    layers.run(args, kept, "cpu", compiled=False)
    torch.backends.cudnn.allow_tf32 = before[0]
    torch.set_float32_matmul_precision(before[1])
    assert seen == [0, 1, 2] and all(c["right"] for c in result["checks"])
    assert [len(t["rows"]) for t in result["timings"]] == [2, 2]
    rows = [line for line in (tmp_path / "layers.md").read_text().splitlines() if line.startswith("| small")]
    assert [row.split("|")[4].strip() for row in rows] == ["fused", "eager"]
    assert layers_report.plot(result).count("<rect") == 5
    lines = tmp_path / "names"
    assert layers.main(["--list", "--lines", str(lines)]) == 0 and len(lines.read_text().splitlines()) == len(
        layers.NAMES
    )
    if not torch.cuda.is_available():
        capsys.readouterr()
        assert layers.main([]) == 1
        assert "no CUDA device" in capsys.readouterr().out
