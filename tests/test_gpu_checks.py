"""The checks of tests/gpu, as far as a machine without a GPU can tell: on host threads, on the CPU, and in plain torch; each
must notice what is wrong."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastgen
from bench.configs import DTYPES
from bench.gpu import smoke
from bench.gpu.lines import read_lines
from fastgen import Sampler, ops
from fastgen.backends.base import Executor
from fastgen.backends.request import Request
from fastgen.backends.team import HostTeamExecutor
from fastgen.models.wavenet import WaveNet
from tests.gpu import promises
from tests.gpu.checks import RUNGS, Finding, Subject, check_case, settle, subject
from tests.gpu.promises import check_calls, check_full
from tests.kernel_compare import (
    check_class_draws,
    check_layer,
    check_log_prob,
    check_mixture_draws,
    check_whole_graph,
    mixture_case,
)
from tests.kernel_shapes import Layer
from tests.oracle import by_name, compile_case

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


def outcome(found: list[Finding]) -> dict[str, bool | None]:
    return {f.name: f.ok for f in found}


@pytest.mark.parametrize("name", ["unet-pixelcnnpp", "wavenet-vocoder", "masked-layernorm"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_the_team_interpreter_passes(name: str, dtype: torch.dtype) -> None:
    found = check_case(known_subject(name), on_host, dtype)
    expected = ("parameters", "draws", "known values", "batches", *RUNGS)
    assert outcome(found) == dict.fromkeys(expected, True), found


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
    assert [found[rung] for rung in RUNGS] == [None, False, False, True]


def test_an_executor_that_cannot_be_made_is_a_failed_check(image: Subject) -> None:
    def make(s: Subject, dtype: torch.dtype, rung: str) -> Executor:
        raise fastgen.FastgenError("no device\nand more")

    found = check_case(image, make, torch.float32)
    assert found == [Finding("executor", False, "FastgenError: no device")]


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
    assert len(found) == 6 and all(f.ok for f in found), found


def test_a_full_device_is_told_to_stop_and_tells_what_is_new(samplers: tuple[Sampler, Sampler]) -> None:
    found = {f.name: f for f in check_full(samplers[0], 3)}
    assert found["cancel of 3 samples"].ok and "not what" not in found["stream of 3 samples"].detail


def test_a_stream_that_comes_all_at_once_is_not_early(
    samplers: tuple[Sampler, Sampler], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Sampler.stream
    monkeypatch.setattr(Sampler, "stream", lambda self, n, **o: iter([torch.cat(list(stream(self, n, **o)), -1)]))
    assert promises.streaming(samplers[0], -1).ok
    assert not promises.streaming(samplers[0], -1, early=True).ok


def test_broken_promises_are_noticed(samplers: tuple[Sampler, Sampler], monkeypatch: pytest.MonkeyPatch) -> None:
    sample, stream = Sampler.sample, Sampler.stream

    def deaf(self: Sampler, n: int, **options: Any) -> Tensor:
        return sample(self, n, **{k: v for k, v in options.items() if k != "callback"})

    monkeypatch.setattr(Sampler, "sample", deaf)
    monkeypatch.setattr(Sampler, "stream", lambda self, n, **o: (part.flip(0) for part in stream(self, n, **o)))
    found = outcome(check_calls(*samplers))
    assert not any(found[name] for name in ("progress", "cancel", "stream of chunks", "stream of rows"))
    assert found["two samplers at once"]


def test_findings_are_handed_on_and_fail() -> None:
    kept: dict[str, object] = {}
    good, missing, bad = Finding("a", True), Finding("b", None, "not held"), Finding("c", False, "7/8 equal")
    settle([good, missing], kept.__setitem__)
    assert kept["findings"] == [asdict(good), asdict(missing)]
    with pytest.raises(AssertionError, match="c: 7/8 equal"):
        settle([good, bad], kept.__setitem__)
    with pytest.raises(AssertionError):
        settle([], kept.__setitem__)


# ---- the smallest run -------------------------------------------------------------------------------------------------
class Host(HostTeamExecutor):
    """The CUDA executor of a device without clusters of 16, on host threads."""

    limits = {"ctas": 132}  # noqa: RUF012

    def __init__(self, programs: Any, conditioning: Any, dtype: torch.dtype, device: torch.device, team: str) -> None:
        if team == "cluster16":
            raise ValueError("team='cluster16': this device cannot hold such a team")
        super().__init__(programs, conditioning, dtype, *TEAMS[team])

    def rung(self, slots: int) -> dict[str, str]:
        return {"text": f"{self.ranks} CTAs for {slots}"}


@pytest.fixture
def on_host_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoke, "CudaExecutor", Host)


def smoked(tmp_path: Path, team: str, dtype: str = "bfloat16") -> tuple[int, dict[str, Any]]:
    lines = tmp_path / "lines"
    status = smoke.main(["wavenet-vocoder", "--team", team, "--dtype", dtype, "--lines", str(lines)])
    return status, read_lines(lines)[-1]


def test_a_smoke_test_says_how_far_off_it_is(on_host_threads: None, tmp_path: Path) -> None:
    (a, grid), (b, cta) = smoked(tmp_path, "grid"), smoked(tmp_path, "cta")
    assert a == b == 0 and grid["ok"] and 0 < grid["error"] < 0.05
    assert grid["rung"] == "2 CTAs for 3" and grid["limits"] == {"ctas": 132}
    assert grid["digest"] == cta["digest"] != smoked(tmp_path, "cta", "float16")[1]["digest"]


def test_a_smoke_test_on_a_rung_that_is_not_there(on_host_threads: None, tmp_path: Path) -> None:
    status, row = smoked(tmp_path, "cluster16")
    assert status == 3 and row["ok"] is None and "cannot hold" in row["why"]


def test_a_smoke_test_that_is_wrong(on_host_threads: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = HostTeamExecutor.run

    def wrong(self: HostTeamExecutor, request: Request) -> tuple[Tensor, Tensor | None]:
        values, params = run(self, request)
        assert params is not None
        return values, params + 1

    monkeypatch.setattr(HostTeamExecutor, "run", wrong)
    status, row = smoked(tmp_path, "grid")
    assert status == 1 and row["ok"] is False and row["error"] > 0.9


# ---- the kernels' checks ------------------------------------------------------------------------------------------------
SMALL = Layer("small", "wavenet", (2, 8), 3, (2,), {"dilation": 2}, "map", skip=2)


@pytest.mark.parametrize("channels_last", [True, False])
def test_a_layer_is_compared(channels_last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found = check_layer(SMALL, torch.float32, "cpu", channels_last)
    assert set(found) == {"y", *SMALL.tensors(2, torch.float32)} and max(found.values()) > 0
    layer = ops.wavenet_layer
    monkeypatch.setattr(ops, "wavenet_layer", lambda *a, **k: tuple(t * 1.001 for t in layer(*a, **k)))
    with pytest.raises(AssertionError, match="small torch.float32: .*allowed"):
        check_layer(SMALL, torch.float32, "cpu", channels_last)


def test_a_layer_of_nans_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = ops.wavenet_layer
    monkeypatch.setattr(ops, "wavenet_layer", lambda *a, **k: tuple(t * float("nan") for t in layer(*a, **k)))
    with pytest.raises(AssertionError, match="nan"):
        check_layer(SMALL, torch.float32, "cpu")


def test_one_graph_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    check_whole_graph(SMALL, "cpu", "eager")
    layer = ops.wavenet_layer

    def broken(*a: Any, **k: Any) -> Any:
        torch._dynamo.graph_break()
        return layer(*a, **k)

    monkeypatch.setattr(ops, "wavenet_layer", broken)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        check_whole_graph(SMALL, "cpu", "eager")


def test_mixtures_and_draws_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    params, x = mixture_case((2, 9), 3, 4, 256, 1.0)
    check_log_prob(params.clone(), x, 256, -7.0)
    check_mixture_draws((30,), 4, 3, 256, torch.bfloat16, "cpu")
    check_class_draws((3, 20), 256, torch.float32, "cpu")
    log_prob, mixture, category = ops.logistic_mixture_log_prob, ops.draw_logistic_mixture, ops.draw_categorical
    monkeypatch.setattr(ops, "logistic_mixture_log_prob", lambda *a, **k: log_prob(*a, **k) * 1.001)
    monkeypatch.setattr(ops, "draw_logistic_mixture", lambda *a, **k: mixture(*a, **k).flip(0))
    monkeypatch.setattr(ops, "draw_categorical", lambda *a, **k: category(*a, **k).flip(0))
    for check in (
        lambda: check_log_prob(params.clone(), x, 256, -7.0),
        lambda: check_mixture_draws((30,), 4, 3, 256, torch.bfloat16, "cpu"),
        lambda: check_class_draws((3, 20), 256, torch.float32, "cpu"),
    ):
        with pytest.raises(AssertionError):
            check()
