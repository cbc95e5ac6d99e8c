"""Builds the extension in place, for this machine's GPU alone, and the probe beside it; nothing is installed.

    python -m bench.gpu.build --probe FILE [--lines FILE]

Rows {built, seconds, ...}. Only the extension must be built: without the probe the rest runs. -lineinfo says which line
an instruction comes from (bench/gpu/phases.py), and changes none.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from bench.gpu.driver import ROOT
from bench.gpu.lines import Lines

FOLDER = ROOT / "build" / "gpu"
ARCHITECTURES = {"8.0": "80-real", "9.0": "90a-real"}  # what the kernel is written for; others: CMakeLists.txt's own
HOPPER = "-gencode=arch=compute_90a,code=sm_90a"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="bench.gpu.build", description=(__doc__ or "").split("\n")[0])
    p.add_argument("--probe", type=Path, required=True, help="where the probe's program goes")
    p.add_argument("--lines", type=Path)
    return p.parse_args(arguments)


def find(tool: str) -> str:
    """Beside this Python, where an environment has its own, or on the PATH."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    found = shutil.which(tool, path=path)
    if found is None:
        raise SystemExit(f"bench.gpu.build: {tool} is needed, and was not found")
    return found


def commands(capability: str) -> list[list[str]]:
    """What cmake is called with."""
    import pybind11

    configure = [
        find("cmake"), "-S", str(ROOT), "-B", str(FOLDER), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={find('ninja')}",
        f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        "-DPYBIND11_FINDPYTHON=ON", f"-DCMAKE_CUDA_COMPILER={find('nvcc')}", "-DCMAKE_CUDA_FLAGS=-lineinfo",
    ]  # fmt: skip
    if capability in ARCHITECTURES:
        configure.append(f"-DCMAKE_CUDA_ARCHITECTURES={ARCHITECTURES[capability]}")
    return [configure, [find("cmake"), "--build", str(FOLDER), "--target", "_native"]]


def build_extension(capability: str) -> None:
    """fastgen/_native...so. Raises SystemExit naming the command that failed."""
    cache = FOLDER / "CMakeCache.txt"
    if cache.exists() and f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" not in cache.read_text():
        shutil.rmtree(FOLDER)  # of a checkout elsewhere; CMake refuses it
    for command in commands(capability):
        if subprocess.run(command, check=False).returncode:
            raise SystemExit(f"bench.gpu.build: error: this failed: {' '.join(command)}")
    name = f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    shutil.copy2(FOLDER / name, ROOT / "fastgen" / name)


def link_kernels(root: Path, python: tuple[str, ...] = (sys.executable,)) -> bool:
    """Makes fastgen.kernels importable in a checkout that is not installed: an installation maps kernels/ to that name,
    and here a link does. True where one was made."""
    find_it = "import importlib.util, sys; sys.exit(importlib.util.find_spec('fastgen.kernels') is None)"
    if subprocess.run([*python, "-c", find_it], cwd=root, check=False).returncode == 0:
        return False
    (root / "fastgen" / "kernels").symlink_to("../kernels", target_is_directory=True)
    return True


CHECK = """
from fastgen.native import native
import fastgen.kernels
assert native().has_cuda, "error: the extension was built without CUDA"
print(native().__file__, fastgen.kernels.__path__[0])
"""


def main(arguments: list[str] | None = None) -> int:
    import torch

    args, began = parse(arguments), time.perf_counter()
    emit = Lines(args.lines)
    source = Path(__file__).with_name("probe.cu")
    compiling = subprocess.Popen([find("nvcc"), "-std=c++17", "-O3", HOPPER, str(source), "-o", str(args.probe)])
    try:
        build_extension("{}.{}".format(*torch.cuda.get_device_capability()))
        linked = link_kernels(ROOT)
        if subprocess.run([sys.executable, "-c", CHECK], cwd=ROOT, check=False).returncode:
            raise SystemExit("bench.gpu.build: error: what was built cannot be used")
        emit({"built": "extension", "seconds": time.perf_counter() - began, "linked": linked})
    finally:
        status = compiling.wait()
    emit({"built": "probe" if status == 0 else None, "seconds": time.perf_counter() - began})
    return 0


if __name__ == "__main__":
    sys.exit(main())
