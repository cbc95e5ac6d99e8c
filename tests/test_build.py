"""The build as other machines have it: flags in the environment, an nvcc that does not work, and no nvcc."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from fastgen.backends.cpu import native

ROOT = Path(__file__).resolve().parent.parent
TOOLS = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
pybind11 = pytest.importorskip("pybind11", reason="configuring the build needs pybind11")
pytestmark = [
    pytest.mark.skipif(not shutil.which("cmake", path=TOOLS), reason="configuring the build needs cmake"),
    pytest.mark.skipif(not shutil.which("ninja", path=TOOLS), reason="configuring the build needs ninja"),
]
HOST = "-march=native -mavx2 -ffast-math -Ofast"
HOSTILE = {
    "CXXFLAGS": f"{HOST} -funsafe-math-optimizations -fstack-protector-strong -DNAME='a b'",
    "CFLAGS": HOST, "CPPFLAGS": HOST, "LDFLAGS": f"{HOST} -Wl,-z,relro",
    "CUDAFLAGS": "--use_fast_math -ftz true -gencode arch=compute_50,code=sm_50 -Xcompiler -march=native -lineinfo",
    "NVCC_APPEND_FLAGS": "-use_fast_math --fmad=false --expt-relaxed-constexpr", "NVCC_PREPEND_FLAGS": "-arch=sm_50",
}  # fmt: skip


def configure(build: Path, *options: str, **environment: str) -> tuple[int, str]:
    """CMake's exit code, and all that it said."""
    command = [
        "cmake", "-S", ROOT, "-B", build, "-G", "Ninja", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON", "-DPYBIND11_FINDPYTHON=ON",
        f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", *options,
    ]  # fmt: skip
    clean = {k: v for k, v in os.environ.items() if k not in (*HOSTILE, "CUDA_HOME", "CUDA_PATH", "CUDACXX")}
    done = subprocess.run(command, env={**clean, "PATH": TOOLS, **environment}, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


class Configured:
    def __init__(self, build: Path, *options: str, **environment: str) -> None:
        code, self.said = configure(build, *options, **environment)
        assert code == 0, self.said
        self.build = build
        commands: list[dict[str, Any]] = json.loads((build / "compile_commands.json").read_text())
        self.commands = {entry["output"]: shlex.split(entry["command"]) for entry in commands}

    def macros(self, output: str) -> dict[str, str]:
        """What the compiler says it will do, by the flags of an object."""
        command = self.commands[output]
        end = command.index("-o")
        command = [*command[:end], *command[end + 2 :], "-dM", "-E"]
        text = subprocess.run(command, check=True, capture_output=True, text=True, cwd=self.build).stdout
        return {name: value for _, name, value in (f"{line} ".split(" ", 2) for line in text.splitlines())}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Configured:
    return Configured(tmp_path_factory.mktemp("hostile"), CXX="c++ -march=native", **HOSTILE)


def test_flags_of_the_environment_choose_neither_instructions_nor_arithmetic(hostile: Configured) -> None:
    """One build runs anywhere, and bytes do not depend on who built it."""
    objects = [output for output in hostile.commands if output.endswith(".cpp.o")]
    assert any("kernels_baseline" in output for output in objects) and len(objects) > 15
    for output in objects:
        macros = hostile.macros(output)
        for name in ("__FAST_MATH__", "__NO_SIGNED_ZEROS__", "__ASSOCIATIVE_MATH__", "__RECIPROCAL_MATH__"):
            assert name not in macros, f"{output}: {name}"
        assert int(macros.get("__FINITE_MATH_ONLY__", "0")) == 0, output
        vectors = {name for name in ("__SSE3__", "__AVX__", "__AVX2__", "__AVX512F__", "__BMI__") if name in macros}
        wanted = {
            "avx2": {"__SSE3__", "__AVX__", "__AVX2__"},
            "avx512": {"__SSE3__", "__AVX__", "__AVX2__", "__AVX512F__"},
        }
        isa = next((isa for isa in wanted if f"kernels_{isa}." in output), "")
        assert vectors == wanted.get(isa, set()), output


def test_other_flags_are_kept(hostile: Configured) -> None:
    for output, command in hostile.commands.items():
        if output.endswith(".cpp.o"):
            assert "-fstack-protector-strong" in command and "-DNAME=a b" in command
    rules = (hostile.build / "build.ninja").read_text()
    assert "-Wl,-z,relro" in rules and "-ffast-math" not in rules


def test_what_is_dropped_is_said(hostile: Configured) -> None:
    assert "CXXFLAGS: dropped -march=native -mavx2 -ffast-math -Ofast -funsafe-math-optimizations (" in hostile.said
    assert "LDFLAGS: dropped -march=native -mavx2 -ffast-math -Ofast (" in hostile.said
    if native().has_cuda:
        assert "NVCC_APPEND_FLAGS: dropped -use_fast_math --fmad=false (" in hostile.said


@pytest.mark.skipif(not native().has_cuda, reason="built without nvcc")
def test_flags_of_the_environment_do_not_reach_nvcc(hostile: Configured) -> None:
    cuda = [command for output, command in hostile.commands.items() if output.endswith(".cu.o")]
    assert cuda
    for command in cuda:
        text = shlex.join(command)
        assert "-lineinfo" in command
        assert not any(word in text for word in ("use_fast_math", "ftz", "sm_50", "march")), text
    rules = (hostile.build / "build.ninja").read_text()
    assert "NVCC_PREPEND_FLAGS= " in rules and "NVCC_APPEND_FLAGS=--expt-relaxed-constexpr " in rules


# ---- with and without nvcc -------------------------------------------------------------------------------------------
def nvcc_that_says(folder: Path, script: str) -> dict[str, str]:
    """An environment in which nvcc is a script."""
    nvcc = folder / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\n{script}\n")
    nvcc.chmod(0o755)
    return {"CUDA_HOME": str(nvcc.parent.parent)}


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ('case "$1" in --version) echo release 13.0, V13.0.1 ;; *) echo unsupported GNU version >&2; exit 1 ;; esac',
         "cannot compile a test; FASTGEN_CUDA=ON shows what it says"),
        ("echo Cuda compilation tools, release 11.8, V11.8.89", "is of CUDA 11.8; C++20 needs 12.0 or newer"),
        ("exit 1", "--version names no release"),
    ],
    ids=["new-compiler", "old", "broken"],
)  # fmt: skip
def test_an_nvcc_that_does_not_work_leaves_cuda_out(tmp_path: Path, script: str, why: str) -> None:
    environment = nvcc_that_says(tmp_path, script)
    code, said = configure(tmp_path / "auto", **environment)
    assert code == 0 and f"CUDA executor: left out ({tmp_path}/cuda/bin/nvcc {why})" in said, said
    code, said = configure(tmp_path / "auto", **environment)
    assert code == 0 and why in said, "asked again"
    code, said = configure(tmp_path / "on", "-DFASTGEN_CUDA=ON", **environment)
    assert code != 0, said


@pytest.mark.parametrize(("value", "code", "said"), [
    ("OFF", 0, "CUDA executor: left out (FASTGEN_CUDA is OFF)"),
    ("yes", 1, "FASTGEN_CUDA is 'yes': expected AUTO, ON or OFF"),
])  # fmt: skip
def test_the_switch(tmp_path: Path, value: str, code: int, said: str) -> None:
    found, text = configure(tmp_path, f"-DFASTGEN_CUDA={value}")
    assert found == code and said in text, text
