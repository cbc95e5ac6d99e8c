"""The Triton kernels without a GPU: all checks of kernel_checks.py under the interpreter, and cubins for sm_80 and sm_90."""

from __future__ import annotations

import ast
import functools
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import pytest
import torch

from fastgen import ops
from fastgen.ops.dispatch import interpreted
from tests.kernel_shapes import LAYERS, Layer

pytest.importorskip("triton", reason="Triton has packages for Linux alone")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastgen.kernels import common, conv, conv_grad, draw, mixture

CHECKS = Path(__file__).with_name("kernel_checks.py")
NAMES = [
    n.name for n in ast.parse(CHECKS.read_text()).body if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")
]
KERNELS = [
    (conv, "conv_forward"), (conv_grad, "front_backward"), (conv_grad, "input_backward"),
    (conv_grad, "weight_backward"), (mixture, "mixture"), (draw, "mixture_draw"), (draw, "class_draw"),
]  # fmt: skip
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64"}
Launch = tuple[Any, dict[str, Any]]


# ---- the interpreter ---------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Each check's outcome, "" when it passed; from one process, as the interpreter must be chosen at its start."""
    versions = [tuple(map(int, v.split(".")[:2])) for v in (triton.__version__, numpy.__version__)]
    if versions[0] < (3, 9) and versions[1] >= (2, 4):  # seen with 3.6
        pytest.skip(f"the interpreter of triton {triton.__version__} reads arrays as numpy < 2.4 lets it")
    report = tmp_path_factory.mktemp("kernels") / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", str(CHECKS)]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=CHECKS.parent.parent, capture_output=True, text=True
    )
    if not report.exists():
        pytest.fail(f"the checks did not run:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return {
        case.get("name", ""): "\n".join(f"{child.tag}: {child.get('message')}\n{child.text}" for child in case
                                        if child.tag in ("failure", "error", "skipped"))
        for case in ET.parse(report).iter("testcase")
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_interpreted(name: str, outcomes: dict[str, str]) -> None:
    own = {k: v for k, v in outcomes.items() if k.split("[")[0] == name}
    assert own, f"{name} did not run"
    failed = {k: v for k, v in own.items() if v}
    assert not failed, "\n".join(f"{k}\n{v}" for k, v in failed.items())


# ---- cubins ------------------------------------------------------------------------------------------------
class Recorder:
    """Stands for a kernel and keeps what it would be launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launches = kernel, list[Launch]()

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert all(0 < n < 2**31 for n in grid)
        return lambda *args, **options: self.launches.append(
            (dict(zip(self.kernel.arg_names, args, strict=False)) | options, options)
        )


@contextmanager
def recorded() -> Iterator[dict[str, Recorder]]:
    """Inside, CPU tensors reach the launchers, and kernels are recorded rather than launched."""
    with ExitStack() as stack:
        recorders = {name: Recorder(getattr(module, name)) for module, name in KERNELS}
        for module, name in KERNELS:
            stack.enter_context(mock.patch.object(module, name, recorders[name]))
        stack.enter_context(interpreted())
        yield recorders


def source(kernel: Any, arguments: dict[str, Any]) -> ASTSource:
    """What Triton makes of a launch: types, constants, and which numbers are divisible by 16."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    divisible: dict[tuple[int, ...], Any] = {}
    for i, p in enumerate(kernel.params):
        value = arguments[p.name]
        one = type(value) is int and value == 1 and not p.do_not_specialize
        if p.is_constexpr or value is None or one:
            signature[p.name], constants[p.name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[p.name] = POINTERS[value.dtype]
        elif isinstance(value, int):
            signature[p.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        else:
            signature[p.name] = "fp32"
        number = isinstance(value, int) and value % 16 == 0 and not p.do_not_specialize
        if isinstance(value, torch.Tensor) or number:
            divisible[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, divisible)


@functools.cache
def compiled(key: str, capability: int) -> Any:
    made, options = PENDING[key]
    return triton.compile(made, target=GPUTarget("cuda", capability, 32), options=options)


PENDING: dict[str, tuple[ASTSource, dict[str, int]]] = {}  # by hash, so that equal launches compile once


def cubins(recorder: Recorder, capability: int) -> Iterator[Any]:
    for arguments, options in recorder.launches:
        made = source(recorder.kernel, arguments)
        chosen = {k: options[k] for k in ("num_warps", "num_stages") if k in options}
        key = f"{made.hash()} {chosen}"
        PENDING.setdefault(key, (made, chosen))
        yield compiled(key, capability)


real = pytest.mark.skipif(common.INTERPRETED, reason="TRITON_INTERPRET=1: this process has no compiler")
CASES = [
    *((layer, torch.bfloat16, 90) for layer in LAYERS),
    *((LAYERS[1], dtype, 90) for dtype in (torch.float16, torch.float32)),
    *((layer, torch.bfloat16, 80) for layer in (LAYERS[1], LAYERS[9])),
    (LAYERS[9], torch.float32, 80),
]


@real
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(
    ("layer", "dtype", "capability"), CASES, ids=lambda v: getattr(v, "name", str(v)).removeprefix("torch.")
)
def test_layers_compile(layer: Layer, dtype: torch.dtype, capability: int) -> None:
    """Forward and backward of a real layer to machine code, its products on tensor cores where numbers are 16-bit."""
    tensors = layer.tensors(1, dtype)
    with recorded() as recorders:
        layer.run(tensors, fused=True).sum().backward()
    products = [r for name, r in recorders.items() if name in ("conv_forward", "input_backward", "weight_backward")]
    assert all(r.launches for r in products)
    for name, recorder in recorders.items():
        for made in cubins(recorder, capability):
            assert len(made.asm["cubin"]) > 1000
            if recorder in products and dtype != torch.float32:
                assert ("wgmma" if capability == 90 else "mma.sync") in made.asm["ptx"], name


@real
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("capability", [80, 90])
def test_heads_compile(capability: int) -> None:
    with recorded() as recorders:
        for channels, size, levels in ((1, 30, None), (3, 100, 256)):
            params = torch.randn(2, size, 64).transpose(1, 2).requires_grad_()
            ops.logistic_mixture_log_prob(params, torch.zeros(2, 64, channels), levels=levels).sum().backward()
            ops.draw_logistic_mixture(torch.zeros(64, size), 2**40, channels=channels, levels=levels)
        ops.draw_categorical(torch.zeros(64, 256), 1)
    for name in ("mixture", "mixture_draw", "class_draw"):
        assert recorders[name].launches
        for made in cubins(recorders[name], capability):
            assert len(made.asm["cubin"]) > 1000


@pytest.mark.parametrize("allowed", [False, True])
def test_float32_products_follow_torch(allowed: bool) -> None:
    """Convolutions cuDNN's setting, matrix products cuBLAS's, by the old switches as by the new."""
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    found = []
    try:
        torch.backends.cudnn.allow_tf32 = allowed
        torch.set_float32_matmul_precision("highest" if allowed else "high")
        for kind in (common.CONVOLUTION, common.MATRIX):
            found.append(common.product(torch.float32, kind)["PRECISION"])
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])
    assert found == (["tf32", "ieee"] if allowed else ["ieee", "tf32"])


@pytest.mark.parametrize(
    ("channels", "columns"),
    [(1, 32), (32, 32), (33, 64), (64, 64), (96, 32), (130, 32), (160, 32), (320, 64), (352, 64)],
)
def test_columns_fit_the_channels(channels: int, columns: int) -> None:
    for table in (conv.TILES, conv_grad.INPUT_TILES, conv_grad.WEIGHT_TILES):
        assert common.choose(table, torch.bfloat16, (32, 32), channels).n == columns
        assert common.choose(table, torch.float32, (32, 32), channels).n == 32


def test_every_kernel_is_compiled() -> None:
    """What is launched anywhere in kernels/ is in the list above."""
    launched = {
        node.func.value.id
        for module in {module for module, _ in KERNELS}
        for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript) and isinstance(node.func.value, ast.Name)
    }
    assert launched == {name for _, name in KERNELS}
