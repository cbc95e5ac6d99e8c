"""Microbenchmarks of the native kernels, per instruction set: pytest bench/test_micro.py --benchmark-enable

Not collected by a plain `pytest`. One thread. extra_info holds GFLOP/s and weight GB/s of the median run.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from fastgen import heads
from fastgen.native import native
from fastgen.program import records as T
from fastgen.program.functions import function_codes
from fastgen.spec import Spec

ISAS: list[str] = native().isas()
# (k, outputs): two of WaveNet, then of PixelCNN++ (cifar) a site's 1x1 and a row's 2x3 convolution
SHAPES = [(128, 128), (64, 192), (320, 160), (1920, 160)]
STREAMED = 64 << 20  # bytes of weights that no cache near a core holds
FLOPS = 1 << 26  # of one timed run, about: so that the call around it does not show
MAPS = ("tanh", "sigmoid", "exp", "log", "elu", "gelu", "add", "muladd", "sum")

each_isa = pytest.mark.parametrize("isa", ISAS)


def linear_tables(k: int, outputs: int, sites: int, copies: int, repeats: int, half: bool) -> dict[str, Any]:
    """One step of `repeats` linear stages [outputs, k] at `sites` sites, with `copies` weights in turn."""
    made = np.random.default_rng(0)
    panels = -(-outputs // T.PANEL)
    size = panels * T.PANEL * k
    weights = torch.from_numpy(made.standard_normal(copies * size, np.float32))
    consts = made.standard_normal(sites * k + panels * T.PANEL, np.float32)  # the inputs, then a bias
    head = np.zeros(1, T.dtype_of(T.Head))
    head["kind"], head["channels"], head["phases"], head["n"], head["params"] = 2, 1, 1, 1, 1  # Bernoulli
    head["enc"], head["table"], head["start"] = 1, -1, -1
    ops = [
        (0, 1, outputs, k, c * size, sites * k, -1, -1, 0, 1, panels * T.PANEL, 1, 1, 0, 0, 1, sites, 0)
        for c in range(copies)
    ]
    return {
        "buffers": np.array(
            [
                (1, 1, 1, 1, 1, T.INPUT, 0),
                (k, 1, sites, 1, sites, T.CONST, 0),
                (outputs, 1, sites, 1, sites, T.STATE, T.PANEL),
            ],
            T.dtype_of(T.Buffer),
        ),
        "taps": np.array(
            [(1, 0, k, 1, 1, 1, 1, 0, 0, 0, 1, 0, sites), (2, 0, 1, 1, 1, 1, 1, 0, 0, 0, 1, 0, sites)],
            T.dtype_of(T.Tap),
        ),
        "code": np.array([(function_codes()["store"], 0, 0, 2, 0, outputs, 0, 0, 0)], T.dtype_of(T.Micro)),
        "ops": np.array(ops, T.dtype_of(T.Op)),
        "row_items": np.array([(r % copies, 0, sites, 1) for r in range(repeats)], T.dtype_of(T.Item)),
        "row_ptr": np.array([0, repeats], np.int32),
        "step_items": np.zeros(0, T.dtype_of(T.Item)),
        "step_ptr": np.zeros(2, np.int32),
        "step_site": np.zeros(1, np.int32),
        "step_phase": np.zeros(1, np.int32),
        "param_ptr": np.array([1, 2], np.int32),
        "weights": weights.bfloat16().view(torch.int16).numpy().view(np.uint16) if half else weights.numpy(),
        "consts": consts,
        "head": head,
        **{"rows": 1, "cols": 1, "steps": 1, "row_len": 1, "period": 1},
        "arena": T.PANEL + -(-outputs * sites // T.PANEL) * T.PANEL,
    }


def bench_linear(benchmark: Any, isa: str, tables: dict[str, Any], slots: int) -> None:
    engine = native().CpuExecutor(tables, 1, isa)
    repeats, op, sites = len(tables["row_items"]), tables["ops"][0], int(tables["row_items"][0]["count"])
    engine.run(slots, 0)
    benchmark(engine.run, slots, 0)
    if benchmark.stats is not None:
        seconds = benchmark.stats["median"]
        macs = float(op["acc"]) * float(op["k"]) * repeats
        benchmark.extra_info["gflops"] = 2e-9 * macs * slots * sites / seconds
        benchmark.extra_info["weight_gbps"] = 1e-9 * macs * tables["weights"].itemsize / seconds


def repeats_for(k: int, outputs: int, columns: int) -> int:
    return max(4, FLOPS // (2 * k * outputs * columns))


@each_isa
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("columns", [1, 4, 16])
@pytest.mark.parametrize(("k", "outputs"), SHAPES)
def test_site_linear_cached(benchmark: Any, k: int, outputs: int, columns: int, half: bool, isa: str) -> None:
    """A site's linear part for 1, 4 or 16 samples, its weights in cache."""
    benchmark.group = f"site linear {outputs}x{k}, {columns} columns"
    tables = linear_tables(k, outputs, 1, 1, repeats_for(k, outputs, columns), half)
    bench_linear(benchmark, isa, tables, columns)


@each_isa
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("columns", [1, 4, 16])
def test_site_linear_streamed(benchmark: Any, columns: int, half: bool, isa: str) -> None:
    """The same with weights that come from memory or the last-level cache every time."""
    k, outputs = 320, 160
    copies = STREAMED // (k * outputs * (2 if half else 4))
    benchmark.group = f"site linear {outputs}x{k} streamed, {columns} columns"
    bench_linear(benchmark, isa, linear_tables(k, outputs, 1, copies, copies, half), columns)


@each_isa
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("k", "outputs"), SHAPES)
def test_row_linear(benchmark: Any, k: int, outputs: int, half: bool, isa: str) -> None:
    """The linear part of a batched row: 384 columns (say 12 samples of 32 sites)."""
    benchmark.group = f"row linear {outputs}x{k}, 384 columns"
    tables = linear_tables(k, outputs, 384, 1, repeats_for(k, outputs, 384), half)
    bench_linear(benchmark, isa, tables, 1)


@each_isa
@pytest.mark.parametrize("fn", MAPS)
def test_map(benchmark: Any, fn: str, isa: str) -> None:
    """A vector map on 16384 floats (positive, so that log is no special case)."""
    benchmark.group = f"map {fn}"
    x: npt.NDArray[np.float32] = np.random.default_rng(0).uniform(0.1, 3.0, 1 << 14).astype(np.float32)
    operands = {"add": (x, x), "muladd": (x, x, x)}.get(fn, (x,))
    benchmark(native().map, function_codes()[fn], *operands, imm=[1.0, 1.0, 1.0], isa=isa)
    if benchmark.stats is not None:
        benchmark.extra_info["ns_per_float"] = 1e9 * benchmark.stats["median"] / x.size


@pytest.mark.parametrize(
    ("head", "shape"),
    [
        (heads.LogisticMixture(10), (3, 4, 4)),
        (heads.LogisticMixture(10, levels=None), (1, 4, 4)),
        (heads.Categorical(256), (1, 4, 4)),
        (heads.Bernoulli(), (1, 4, 4)),
        (heads.GaussianMixture(10), (1, 4, 4)),
    ],
    ids=["logistic-rgb", "logistic", "categorical-256", "bernoulli", "gaussian"],
)
def test_draw(benchmark: Any, head: heads.Head, shape: tuple[int, ...]) -> None:
    """1024 draws from given parameters and uniforms."""
    benchmark.group = "draw"
    spec = Spec(shape, head)
    record = np.zeros(1, T.dtype_of(T.Head))
    for name, value in spec.native_head().items():
        if name not in ("table", "start"):
            record[name] = value
    record["table"] = record["start"] = -1
    made = np.random.default_rng(0)
    params = made.standard_normal((1024, head.num_params(spec.channels)), np.float32)
    uniforms = made.uniform(1e-6, 1 - 1e-6, (1024, head.num_uniforms(spec.channels))).astype(np.float32)
    benchmark(native().draw, record, params, uniforms)
    if benchmark.stats is not None:
        benchmark.extra_info["ns_per_draw"] = 1e9 * benchmark.stats["median"] / 1024
