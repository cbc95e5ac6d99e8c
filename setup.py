"""Builds fastgen._native by calling CMake, and names the packages, as kernels/ is installed as fastgen.kernels; all else
is in pyproject.toml."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
COMPILERS = ("c++", "g++", "clang++")
OPTIONS = {
    "FASTGEN_CUDA": "AUTO",
    "FASTGEN_CUDA_ARCHITECTURES": "",
}  # of CMake, from the environment; see CMakeLists.txt
PATH = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])


def find_tool(name: str) -> str:
    """`name` on the PATH or beside this Python: a virtual environment need not be activated."""
    path = shutil.which(name, path=PATH)
    if path is None:
        raise SystemExit(f"fastgen: building needs {name}, and it was not found; try pip install {name}")
    return path


def check_compiler() -> None:
    wanted = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else COMPILERS
    if not any(map(shutil.which, wanted)):
        raise SystemExit(
            f"fastgen: building needs a C++20 compiler, g++ >= 11 or clang++ >= 14, and found none of "
            f"{', '.join(wanted)}. On Debian and Ubuntu: apt-get install g++; on macOS: "
            "xcode-select --install; or set CXX to the compiler's path."
        )


class CMakeBuild(build_ext):
    """Builds the target `_native`; the build folder stays, so that a rebuild compiles what changed."""

    def build_extension(self, ext: Extension) -> None:
        check_compiler()
        import pybind11

        build = ROOT / "build" / f"native-{sys.implementation.cache_tag}"
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        cache = build / "CMakeCache.txt"
        if cache.exists() and f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" not in cache.read_text():
            shutil.rmtree(build)  # the checkout was moved or copied; CMake refuses such a folder
        cmake = find_tool("cmake")
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            "-DPYBIND11_FINDPYTHON=ON",
            *(f"-D{name}={os.environ.get(name) or default}" for name, default in OPTIONS.items()),
        ]
        for command in (configure, [cmake, "--build", str(build), "--target", "_native"]):
            if subprocess.run(command, check=False).returncode:
                raise SystemExit(f"fastgen: building the extension failed at: {' '.join(command)}")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(build / target.name, target)


setup(
    packages=[*find_packages(include=["fastgen", "fastgen.*"], exclude=["fastgen.kernels"]), "fastgen.kernels"],
    package_dir={"fastgen.kernels": "kernels"},
    ext_modules=[Extension("fastgen._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
