# Everything from a fresh machine: Python >= 3.11 with venv, make and a C++ compiler are all that must be there.
#   make sample    install, build, and draw images with the shipped model to samples.png
#   make test      install, build, run the tests              (ARGS="-k wavenet" goes to pytest; JOBS=0 in one process)
#   make test-without-cuda   the extension as it is built without nvcc, in a folder of its own, and its tests
#   make lint      ruff, mypy, clang-format                   (make format applies the formatters)
#   make sanitize  the C++ tests under address, undefined-behaviour and thread sanitizers
#   make fuzz      random modules against the slow loop       (ARGS="--seeds 0 5000")
#   make bench | make train NAME=recipe | make clean | make distclean (also removes the environment)
PYTHON ?= python3
VENV   ?= .venv
# Any torch >= 2.11 serves; this one is pinned so that two machines test the same thing.
TORCH  ?= torch==2.13.0
ARGS   ?=
# Processes that test side by side, a file of tests in one; each loads torch.
JOBS   ?= auto

PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip --disable-pip-version-check -q
CXXSRC := $(shell find csrc bench/gpu -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
BUILDSRC := $(CXXSRC) csrc/functions.def
BUILT  := $(wildcard fastgen/_native*.so)
say     = @printf 'fastgen: %s\n' "$(1)"

.PHONY: build sample test test-without-cuda lint lint-ruff lint-mypy lint-clang-format format sanitize sanitize-address \
  sanitize-thread fuzz bench train clean distclean FORCE
.DEFAULT_GOAL := build

build: $(VENV)/.built

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "fastgen needs Python >= 3.11, and $(PYTHON) is %d.%d; choose another with make PYTHON=python3.12" % v[:2])'
	$(call say,making the environment $(VENV))
	@$(PYTHON) -m venv $(VENV)
	$(call say,installing $(TORCH) (the largest download; a few minutes on a slow line))
	@$(PIP) install "$(TORCH)" "setuptools>=77" "cmake>=3.26" ninja "pybind11>=2.13"
	@touch $@

# A second run compiles only what changed: setup.py keeps its build folder.
$(VENV)/.built: $(VENV)/.made pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/cmake/*) $(BUILDSRC) $(if $(BUILT),,FORCE)
	$(call say,building the extension and installing the package)
	@$(PIP) install --no-build-isolation -e ".[test]"
	@touch $@

$(VENV)/.dev: $(VENV)/.built
	$(call say,installing ruff and mypy and clang-format)
	@$(PIP) install --no-build-isolation -e ".[dev]"
	@touch $@

sample: build
	@$(PY) -m fastgen sample --out samples.png $(ARGS)

test: build
	$(call say,testing)
	@$(PY) -m pytest -q -n $(JOBS) --maxprocesses 8 --dist loadfile $(ARGS)

# Not optimised: it is compiled in half the time, and the tests that it is for take seconds.
test-without-cuda: $(VENV)/.built
	$(call say,building without CUDA)
	@$(VENV)/bin/cmake -S . -B build/$@ -G Ninja -DCMAKE_MAKE_PROGRAM="$(abspath $(VENV))/bin/ninja" -DFASTGEN_CUDA=OFF \
	  -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG=-O0 -DPYBIND11_FINDPYTHON=ON \
	  "-DPython_EXECUTABLE=$(abspath $(PY))" "-Dpybind11_DIR=$$($(PY) -m pybind11 --cmakedir)" >build/$@.log
	@$(VENV)/bin/cmake --build build/$@ --target _native >build/$@.log 2>&1 || { cat build/$@.log; exit 1; }
	$(call say,testing without CUDA)
	@$(PY) -m pytest -q --extension build/$@/_native*.so tests/test_team.py tests/test_cuda.py tests/test_errors.py

lint: lint-ruff lint-mypy lint-clang-format
lint-ruff: $(VENV)/.dev
	$(call say,ruff)
	@$(PY) -m ruff check -q --output-format concise .
	@$(PY) -m ruff format -q --output-format concise --check .
lint-mypy: $(VENV)/.dev
	$(call say,mypy --strict)
	@$(PY) -m mypy --strict fastgen
lint-clang-format: $(VENV)/.dev
	$(call say,clang-format)
	@$(VENV)/bin/clang-format --dry-run -Werror $(CXXSRC)

format: $(VENV)/.dev
	@$(PY) -m ruff check -q --fix . ; $(PY) -m ruff format -q .
	@$(VENV)/bin/clang-format -i $(CXXSRC)

sanitize: sanitize-address sanitize-thread
sanitize-address: SANITIZERS = address;undefined
sanitize-thread: SANITIZERS = thread
sanitize-address sanitize-thread: $(VENV)/.built
	$(call say,C++ tests under -fsanitize=$(SANITIZERS))
	@$(PY) -W ignore -m tests.dump_programs build/$@/programs
	@$(VENV)/bin/cmake -S . -B build/$@ -G Ninja -DCMAKE_MAKE_PROGRAM="$(abspath $(VENV))/bin/ninja" \
	  "-DFASTGEN_SANITIZE=$(SANITIZERS)" "-DFASTGEN_PROGRAMS=$(abspath build/$@/programs)" >build/$@.log
	@$(VENV)/bin/cmake --build build/$@ >build/$@.log 2>&1 || { cat build/$@.log; exit 1; }
	@cd build/$@ && "$(abspath $(VENV))/bin/ctest" -j 2 --output-on-failure --no-tests=error

fuzz: build
	@$(PY) -W ignore -m tests.fuzz $(ARGS)

bench: build
	@$(PY) -m bench.run $(ARGS)

train: build
	@test -n "$(NAME)" || { echo "which recipe? make train NAME=...; python -m fastgen train --help lists them"; exit 2; }
	@$(PY) -m fastgen train $(NAME) $(ARGS)

clean:
	rm -rf build dist *.egg-info fastgen/_native*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis samples.png
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
