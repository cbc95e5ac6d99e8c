"""The account of where the kernel's time goes, without a profiler: its table from made-up samples, the lines of its source from
a disassembly; and the build in place."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.gpu import build, phases, source_map
from bench.gpu.lines import read_lines
from bench.gpu.source_map import BARRIER, FINISH, MULTIPLY, OTHER, PHASES, SETUP, Section, phase_of, read_disassembly
from bench.gpu.steps import NOT_RUN_STATUS
from fastgen.native import native

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {path.name: path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cuh", ".cu")}


def place(file: str, text: str) -> tuple[str, int]:
    """The line of a source file that holds this text."""
    lines = SOURCES[file].read_text().splitlines()
    return str(SOURCES[file]), next(k for k, line in enumerate(lines, 1) if text in line)


RUN = place("fiber_stage.h", "run_group(slice0_ == first)")
TASK = place("fiber_stage.h", "t.which = split_ > 0 ? task / tasks_")
IN_MULTIPLY = place("fiber_stage.h", "const Task t = task_at(task)")
IN_FINISH = place("fiber_stage.h", "execute(in, f, mine, column);")
MEET = place("teams.cuh", "red.release.gpu.global.add")
MAP = place("maps.h", "float sigmoid(")


# ---- the source -----------------------------------------------------------------------------------------------------------
def test_every_function_of_the_table_is_in_the_source() -> None:
    """A function that is renamed there must be renamed here."""
    there = {(inside, name) for path in SOURCES.values() for _, inside, name in source_map._owners(str(path))}
    assert {(inside, name) for inside, name in PHASES if name != "*"} <= there
    assert {inside for inside, name in PHASES if name == "*"} <= {inside for inside, _ in there}


def test_an_instruction_is_the_innermost_known_functions() -> None:
    assert phase_of((TASK, IN_MULTIPLY, RUN)) == (SETUP, "FiberStage::task_at")
    assert phase_of((IN_MULTIPLY, RUN))[0] == MULTIPLY
    assert phase_of((MAP, IN_FINISH, RUN))[0] == FINISH  # a function that anybody may call
    assert phase_of((MEET, RUN))[0] == BARRIER
    assert phase_of((("elsewhere.h", 3),))[0] == phase_of(())[0] == OTHER


def disassembly() -> str:
    def at(*chain: tuple[str, int]) -> str:
        outer = [*(f' inlined at "{f}", line {n}' for f, n in chain[1:]), ""]
        return "".join(f'\t//## File "{f}", line {n}{o}\n' for (f, n), o in zip(chain, outer, strict=True))

    return (
        "\t.target\tsm_90a\n.debug_frame:\n        /*0000*/ \t.byte\t0xff, 0xff\n"
        f".text.other_kernel:\n{at(RUN)}        /*0000*/                   EXIT ;\n"
        '.section\t.text.run_program,"ax"\n.text.run_program:\n.L_x_0:\n'
        f"{at(RUN)}        /*0000*/                   LDC R1, c[0x0][0x28] ;\n"
        f"{at(TASK, IN_MULTIPLY, RUN)}        /*0010*/              @!P0 IMAD.MOV.U32 R2, RZ, RZ, R3 ;\n"
        "        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;\n"
        f"{at(IN_MULTIPLY, RUN)}        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;\n"
        f"{at(RUN)}        /*0040*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;\n"
    )


def test_a_disassembly_is_read_with_all_calls_around_an_instruction() -> None:
    other, section = read_disassembly(disassembly())
    assert other.name == "other_kernel" and other.opcodes == ["EXIT"]
    assert section.offsets == [0, 16, 32, 48, 64]
    assert section.opcodes[1:3] == ["IMAD.MOV.U32", "HMMA.16816.F32.BF16"]
    assert section.chains[1] == section.chains[2] == (TASK, IN_MULTIPLY, RUN) and section.chains[3] == (
        IN_MULTIPLY,
        RUN,
    )


# ---- the profile ----------------------------------------------------------------------------------------------------------
HEADER = f'"Address","Source","{phases.SAMPLES}","stall_wait"'


def page(samples: list[int]) -> str:
    """The profiler's source page: a line of the kernel, the table, addresses anywhere."""
    section = list(read_disassembly(disassembly()))[1]
    rows = [
        f'"0x{0x7F00001000 + offset:x}","      @P0 {opcode} R1, R2","{n:,}","0"'
        for offset, opcode, n in zip(section.offsets, section.opcodes, samples, strict=True)
    ]
    return "\n".join(["==PROF== Connected", '"Kernel Name","run_program"', HEADER, *rows]) + "\n"


def test_samples_are_shared_by_phase_and_those_at_barriers_told_apart() -> None:
    samples = phases.read_samples(page([10, 1500, 0, 490, 2000]))
    assert samples[1] == (16, "IMAD.MOV.U32", 1500)
    section = phases.matching(samples, read_disassembly(disassembly()))
    whole, *rows = phases.tabulate(samples, section)
    assert whole == {"profiled": "run_program", "samples": 4000, "waiting": 2000}
    by = {row["phase"]: row for row in rows if "phase" in row}
    assert by[SETUP] == {"phase": SETUP, "samples": 3510, "share": 3510 / 4000, "waiting": 2000, "of_busy": 1510 / 2000}
    assert by[MULTIPLY]["of_busy"] == 490 / 2000
    assert {"function": "FiberStage::task_at", "samples": 1500} in rows


def test_another_kernel_or_no_table_is_an_error() -> None:
    samples = phases.read_samples(page([1] * 5))
    with pytest.raises(ValueError, match="no kernel of the extension is the profiled one"):
        phases.matching(samples, [Section("k", [0, 16], ["LDC", "EXIT"], [(), ()])])
    with pytest.raises(ValueError, match="no table"):
        phases.read_samples("==ERROR== something\n")


def profiler(text: str, status: int) -> Any:
    """subprocess.run for ncu: the profile, and then its page."""

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        if "--import" in command:
            return SimpleNamespace(returncode=0, stdout=text, stderr="")
        assert command[command.index("-m") + 1 :] == ["bench.gpu.phases", "wavenet-nv", "--team", "cta", "--run"]
        if status == 0:
            Path(command[command.index("--export") + 1]).write_text("profile")
        return SimpleNamespace(returncode=status, stdout=text, stderr="")

    return run


def test_phases_are_written_and_the_profile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, path=None: name)
    monkeypatch.setattr(phases.subprocess, "run", profiler(page([1, 2, 3, 4, 5]), 0))
    monkeypatch.setattr(phases, "disassemble", lambda *a: list(read_disassembly(disassembly())))
    assert (
        phases.main(["wavenet-nv", "--team", "cta", "--keep", str(tmp_path), "--lines", str(tmp_path / "lines")]) == 0
    )
    rows = read_lines(tmp_path / "lines")
    assert rows[0]["samples"] == 15 and {row["config"] for row in rows} == {"wavenet-nv"}
    assert (tmp_path / "phases-wavenet-nv.csv.gz").stat().st_size > 0


@pytest.mark.parametrize("said", ["==ERROR== ERR_NVGPUCTRPERM - permission", "Failed to initialize the profiler: X"])
def test_a_profiler_that_may_not_is_not_run(
    said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    assert (
        phases.main(["wavenet-nv", "--team", "cta"]) == NOT_RUN_STATUS
        and "ncu is not installed" in capsys.readouterr().out
    )
    monkeypatch.setattr(shutil, "which", lambda name, path=None: name)
    monkeypatch.setattr(phases.subprocess, "run", profiler(said, 1))
    assert phases.main(["wavenet-nv", "--team", "cta"]) == NOT_RUN_STATUS
    assert capsys.readouterr().out.splitlines()[-1] == f"ncu: {said}"
    monkeypatch.setattr(phases.subprocess, "run", profiler("a fault in the program", 1))
    with pytest.raises(SystemExit, match="status 1 and no profile"):
        phases.main(["wavenet-nv", "--team", "cta"])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc was not found, which compiles it")
def test_nearly_every_instruction_of_the_real_kernel_has_its_phase(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="its package carries the disassembler")
    subprocess.run(
        ["nvcc", "-std=c++20", "-O3", "-lineinfo", build.HOPPER, "-I", str(ROOT / "csrc"), "-c", str(SOURCES["kernels.cu"]),
         "-o", "k.o"], cwd=tmp_path, check=True,
    )  # fmt: skip
    sections = source_map.disassemble(tmp_path / "k.o", tmp_path, phases.tool("cuobjdump"), phases.tool("nvdisasm"))
    assert len(sections) == 3
    for section in sections:
        found = [phase_of(chain)[0] for chain in section.chains]
        assert len(found) > 10_000 and found.count(OTHER) < 0.05 * len(found)
        assert set(PHASES.values()) <= set(found)
        samples = [(o, op, 1) for o, op in zip(section.offsets, section.opcodes, strict=True)]
        assert phases.matching(samples, sections).opcodes == section.opcodes


# ---- the build ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("installed", [False, True])
def test_the_kernels_can_be_imported_without_an_installation(installed: bool, tmp_path: Path) -> None:
    package = tmp_path / "fastgen" / "kernels" if installed else tmp_path / "kernels"
    package.mkdir(parents=True)
    (tmp_path / "fastgen").mkdir(exist_ok=True)
    (tmp_path / "fastgen" / "__init__.py").write_text("")
    (package / "__init__.py").write_text("HERE = True\n")
    python = (sys.executable, "-S")  # without what is installed in this environment
    assert build.link_kernels(tmp_path, python) is not installed
    assert build.link_kernels(tmp_path, python) is False
    found = subprocess.run([*python, "-c", "import fastgen.kernels as k; assert k.HERE"], cwd=tmp_path, check=False)
    assert found.returncode == 0
    assert (tmp_path / "fastgen" / "kernels").is_symlink() is not installed


@pytest.mark.skipif(not native().has_cuda, reason="built without nvcc")
def test_what_is_asked_of_a_build_is_true_of_this_one() -> None:
    assert subprocess.run([sys.executable, "-c", build.CHECK], cwd=ROOT, check=False).returncode == 0


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc was not found")
def test_cmake_is_called_for_this_machines_gpu() -> None:
    configure, make = build.commands("9.0")
    assert "-DCMAKE_CUDA_ARCHITECTURES=90a-real" in configure and "-DCMAKE_CUDA_FLAGS=-lineinfo" in configure
    assert f"-DPython_EXECUTABLE={sys.executable}" in configure and make[-1] == "_native"
    assert not [word for word in build.commands("12.0")[0] if "ARCHITECTURES" in word]
    names = set(re.findall(r"-D(\w+)=", " ".join(configure)))
    assert {n for n in re.findall(r"-D(\w+)=", (ROOT / "setup.py").read_text()) if n != "CMAKE_MAKE_PROGRAM"} < names


def test_a_tool_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    with pytest.raises(SystemExit, match="ninja is needed"):
        build.find("ninja")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc was not found, which compiles it")
def test_the_probe_compiles_without_spills_and_says_what_it_cannot_do(tmp_path: Path) -> None:
    built = subprocess.run(
        ["nvcc", "-std=c++17", "-O3", build.HOPPER, "-Xptxas", "-v", "-Werror", "all-warnings",
         str(ROOT / "bench" / "gpu" / "probe.cu"), "-o", str(tmp_path / "probe")],
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
