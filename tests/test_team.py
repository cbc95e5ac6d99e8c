"""The GPU's interpreter on host threads, over every case: the law, equal bytes whatever the team is, and what the compiled
kernels are made of."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import fastgen
from fastgen import Sampler
from fastgen.backends.cuda import cuda_device
from fastgen.backends.request import Request
from fastgen.backends.team import HostTeamExecutor
from fastgen.errors import UnsupportedError
from fastgen.native import native
from fastgen.verify import verify
from tests.cases import Case, cases
from tests.conftest import Compiled
from tests.oracle import at_length, by_name

every_case = pytest.mark.parametrize("case", cases(), ids=str)
TEAMS = ((1, 1, 1), (3, 1, 2), (4, 2, 1))  # CTAs, warps, teams
A_FEW = by_name("unet-pixelcnnpp", "wavenet-vocoder", "masked-layernorm")


def team(sampler: Sampler, dtype: torch.dtype = torch.float32, **options: Any) -> HostTeamExecutor:
    conditioning = sampler.conditioning
    return HostTeamExecutor(sampler.programs, conditioning, dtype, **options)


def request(sampler: Sampler, n: int = 3, **options: Any) -> Request:
    known = {"seed": 5, "cond": None, "temperature": 1.0, "given": None, "mask": None, "first": 0, "length": None}
    wanted = sampler.planned.request(n, **{**known, **options})
    wanted.want_params = True
    return wanted


# ---- the law -----------------------------------------------------------------------------------------------------
@every_case
def test_stepping_equals_forward(case: Case, compiled: Compiled) -> None:
    sampler = compiled(case)
    report = verify(sampler.planned.on_cpu, sampler.spec, team(sampler), request(sampler))
    assert report.ok, str(report)


@every_case
def test_bytes_do_not_depend_on_the_team(case: Case, compiled: Compiled) -> None:
    sampler = compiled(case)
    (values, params), *others = (
        team(sampler, ranks=r, warps=w, teams=t).run(request(sampler)) for r, w, t in TEAMS
    )  # fmt: skip
    assert params is not None and not bool(params.isnan().any())
    for other in others:
        assert torch.equal(other[0], values) and torch.equal(other[1], params)


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_sixteen_bit_products(case: Case, dtype: torch.dtype, compiled: Compiled) -> None:
    sampler = compiled(case)
    report = verify(sampler.planned.on_cpu, sampler.spec, team(sampler, dtype), request(sampler), threads=1)
    assert report.ok, str(report)
    assert report.max_abs_error > 1e-5  # something was rounded


@pytest.mark.parametrize("case", A_FEW, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_bytes_do_not_depend_on_the_batch_or_on_shared_memory(
    case: Case, dtype: torch.dtype, compiled: Compiled
) -> None:
    sampler = compiled(case)
    whole, params = team(sampler, dtype, ranks=2).run(request(sampler, 9))
    for first, n, options in ((0, 1, {}), (3, 6, {"ranks": 3}), (2, 5, {"warps": 2, "shared_bytes": 40 << 10})):
        part = request(sampler, n, first=first)
        part.cond = tuple(c[first : first + n] if isinstance(c, torch.Tensor) and c.dim() else c
                          for c in request(sampler, 9).cond)  # fmt: skip
        values, theirs = team(sampler, dtype, **options).run(part)
        assert torch.equal(values, whole[first : first + n])
        assert params is not None and theirs is not None
        assert torch.equal(theirs, params[first : first + n])


@pytest.mark.parametrize("case", A_FEW, ids=str)
def test_values_are_the_cpu_executors(case: Case, compiled: Compiled) -> None:
    """Noise is the same everywhere: the same values but for decisions within float rounding of a boundary."""
    sampler = compiled(case)
    here, _ = team(sampler, ranks=2).run(request(sampler, 4))
    there, _ = sampler.executor.run(request(sampler, 4))
    assert float(((here - there).abs() < 1e-4).float().mean()) > 0.99


@pytest.mark.parametrize("case", A_FEW, ids=str)
def test_known_values_and_temperature(case: Case, compiled: Compiled) -> None:
    sampler = compiled(case)
    given = sampler.sample(3, seed=9)
    mask = torch.rand(given.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    asked = {"given": given, "mask": mask, "temperature": 0.7}
    wanted = request(sampler, 3, **asked)
    here, _ = team(sampler, ranks=2, warps=2).run(wanted)
    there, _ = sampler.executor.run(request(sampler, 3, **asked))
    assert wanted.mask is not None and wanted.given is not None
    assert torch.equal(here[wanted.mask], wanted.given[wanted.mask].to(here.dtype))
    assert float(((here - there).abs() < 1e-4).float().mean()) > 0.99


def test_a_sequence_at_other_lengths(compiled: Compiled) -> None:
    sampler = compiled(at_length(by_name("wavenet-onehot")[0], 160))
    for length in (1, 77, 300):
        report = verify(
            sampler.planned.on_cpu,
            sampler.planned.spec_at(length),
            team(sampler, ranks=3),
            request(sampler, 2, length=length),
        )
        assert report.ok, f"{length}: {report}"


# ---- lowering ----------------------------------------------------------------------------------------------------
def test_gates_and_residuals_are_fibers(compiled: Compiled) -> None:
    """Only what mixes lanes (a layer norm here) needs whole columns."""
    for case in cases():
        lowered = team(compiled(case)).lowered(None)
        mixes = case.name == "masked-layernorm"
        assert bool(lowered.column_stages) == mixes, f"{case}: {lowered.column_stages} of {lowered.stages}"


def test_too_little_shared_memory_is_named(compiled: Compiled) -> None:
    with pytest.raises(ValueError, match=r"op \d+ .*does not fit -?\d+ bytes of shared memory"):
        team(compiled(A_FEW[0]), shared_bytes=6 << 10).lowered(None)


@pytest.mark.parametrize("precision", ["float64", ""])
def test_unknown_precisions(precision: str, compiled: Compiled) -> None:
    tables = compiled(A_FEW[0]).programs().tables()
    with pytest.raises(ValueError, match="precision"):
        native().lower(tables, precision, 1 << 16)


# ---- the ladder --------------------------------------------------------------------------------------------------
H200 = dict(ctas=132, clusters16=8, clusters8=16, cooperative=True)


@pytest.mark.parametrize(
    ("limits", "slots", "wanted", "text"),
    [
        (H200, 1, "auto", "1 cluster of 16 CTAs"),
        (H200, 4, "auto", "4 clusters of 16 CTAs"),
        (H200, 1000, "auto", "8 clusters of 16 CTAs"),
        (H200, 1000, "cluster8", "16 clusters of 8 CTAs"),
        (H200, 1000, "grid", "8 teams of 16 CTAs"),
        (H200, 1000, "cta", "132 CTAs"),
        ({**H200, "clusters16": 0}, 3, "auto", "3 clusters of 8 CTAs"),
        ({**H200, "clusters16": 0, "clusters8": 0}, 1, "auto", "1 team of 16 CTAs"),
        (dict(ctas=108, clusters16=0, clusters8=0, cooperative=False), 1, "auto", "1 CTA"),
    ],
)
def test_ladder(limits: dict[str, Any], slots: int, wanted: str, text: str) -> None:
    assert native().choose_rung(limits, slots, wanted)["text"] == text


@pytest.mark.parametrize("wanted", ["cluster16", "clusters", ""])
def test_a_rung_that_is_not_there(wanted: str) -> None:
    with pytest.raises(ValueError, match="team='"):
        native().choose_rung({**H200, "clusters16": 0}, 1, wanted)


# ---- without a GPU -----------------------------------------------------------------------------------------------
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU; what is said without one cannot be seen")
def test_without_a_gpu_it_says_so() -> None:
    model = torch.nn.Conv2d(1, 2, 1)
    with pytest.raises(UnsupportedError, match=r"device='cuda'.*(without CUDA|no CUDA device)"):
        fastgen.compile(model, (1, 4, 4), fastgen.heads.Categorical(2), device="cuda")
    with pytest.raises(UnsupportedError, match=r"device='cuda:3'"):
        cuda_device(torch.device("cuda:3"))


@pytest.mark.skipif(not native().has_cuda, reason="built without nvcc")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_native_code_answers_without_a_driver() -> None:
    with pytest.raises(native().CudaError, match="no CUDA device can be used: cudaError"):
        native().cuda_device(0)


@pytest.mark.skipif(native().has_cuda, reason="built with nvcc; make test-without-cuda tests the other build")
@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        ("cuda_device", (0,)),
        ("cuda_limits", (0, "float32", 1 << 16)),
        (
            "run_on_device",
            ({"temperature": 1.0}, 0, 0, 0, {"kind": 0, "ctas": 1, "teams": 1}, "float32", 1 << 16, None),
        ),
    ],
)
def test_without_nvcc_what_needs_a_device_is_refused_by_name(call: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(native().CudaError, match=f"{call}: this extension was built without CUDA"):
        getattr(native(), call)(*arguments)


def nvidia_tool(name: str) -> str:
    """One of NVIDIA's tools that Triton's package carries."""
    spec = importlib.util.find_spec("triton")
    assert spec is not None and spec.origin is not None
    return str(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name)


def cuobjdump(*arguments: str, cwd: Path | None = None) -> str:
    """NVIDIA's disassembler on the extension."""
    return subprocess.run(
        [nvidia_tool("cuobjdump"), *arguments, native().__file__], check=True, capture_output=True, text=True, cwd=cwd
    ).stdout  # fmt: skip


compiled_kernels = pytest.mark.skipif(
    not native().has_cuda or importlib.util.find_spec("triton") is None,
    reason="built without nvcc, or no Triton (whose package carries cuobjdump)",
)


@compiled_kernels
def test_kernels_neither_spill_nor_use_local_memory() -> None:
    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", cuobjdump("-res-usage"))
    kernels = [(name, int(stack), int(local)) for name, _, stack, local in usage if "run_program" in name]
    assert len(kernels) == 6  # three precisions, two architectures
    assert all(stack == local == 0 for _, stack, local in kernels), kernels


@compiled_kernels
def test_sixteen_bit_kernels_use_the_tensor_cores() -> None:
    counts: dict[str, Counter[str]] = {}
    current = ""
    arch = ""
    for line in cuobjdump("-sass").splitlines():
        if found := re.search(r"arch = (sm_\w+)", line):
            arch = found.group(1)
        elif found := re.search(r"Function : (\S+)", line):
            current = f"{arch} {found.group(1)}"
        elif found := re.search(r"\b(HMMA|LDL|STL)\b", line):
            counts.setdefault(current, Counter())[found.group(1)] += 1
    half = {name: c for name, c in counts.items() if "run_program" in name}
    assert len(half) == 4, half  # bfloat16 and float16 on two architectures; float32 has none of these
    assert all(c["HMMA"] > 0 and c["LDL"] == c["STL"] == 0 for c in half.values()), half


@compiled_kernels
def test_binaries_for_ampere_and_hopper_and_code_for_what_comes() -> None:
    """90 and not 90a, whose PTX no other GPU takes."""
    files = cuobjdump("-lelf", "-lptx")
    assert set(re.findall(r"(sm_\w+)\.cubin", files)) == {"sm_80", "sm_90"}
    assert set(re.findall(r"(sm_\w+)\.ptx", files)) == {"sm_90"}
    assert "UCGABAR_WAIT" in cuobjdump("-sass", "-arch", "sm_90") and "UCGABAR" not in cuobjdump(
        "-sass", "-arch", "sm_80"
    )


@pytest.mark.slow
@compiled_kernels
def test_newer_gpus_make_their_code_of_it(tmp_path: Path) -> None:
    """What a driver does at first use, here for sm_120: clusters included, and no spills."""
    tool = nvidia_tool("ptxas-blackwell")
    if not Path(tool).exists():
        pytest.skip("this Triton carries no assembler for sm_120")
    cuobjdump("-xptx", "all", cwd=tmp_path)
    (ptx,) = [file for file in tmp_path.glob("*.ptx") if "run_program" in file.read_text()]
    assert "barrier.cluster" in ptx.read_text()
    made = subprocess.run(
        [tool, "-arch=sm_120", "-v", str(ptx), "-o", str(tmp_path / "made.cubin")],
        check=True, capture_output=True, text=True,
    ).stderr  # fmt: skip
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", made)
    assert len(frames) == 3 and set(frames) == {("0", "0", "0")}, made
