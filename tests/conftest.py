"""Shared by all tests: one thread for torch, global settings left alone, and cases compiled once."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastgen
from fastgen import Sampler
from tests.cases import Case
from tests.oracle import compile_case

Compiled = Callable[..., Sampler]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--extension", metavar="FILE", help="a build of fastgen._native to test instead of the installed one"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Tests are many small operations, which torch's threads only slow down."""
    torch.set_num_threads(1)
    if path := config.getoption("--extension"):
        load_extension(path)
    config.addinivalue_line("filterwarnings", "ignore:.*weight_norm.*:FutureWarning")


def load_extension(path: str) -> None:
    """Makes the file fastgen._native, for this process."""
    name = "fastgen._native"
    assert name not in sys.modules, "too late: the installed extension is loaded"
    spec = importlib.util.spec_from_file_location(name, Path(path).resolve(strict=True))
    assert spec is not None and spec.loader is not None, f"--extension {path}: expected a file as {name} is built"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = fastgen._native = module


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` wait for one; python -m bench.gpu runs those of tests/gpu."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(autouse=True)
def _global_state() -> Iterator[None]:
    """Neither fastgen nor a test leaves torch's global settings changed."""
    threads = torch.get_num_threads()
    yield
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()
    assert torch.backends.mkldnn.enabled
    assert torch.get_num_threads() == threads


@pytest.fixture(scope="session")
def compiled() -> Compiled:
    """compile_case(case, **options), remembered: tests that change nothing about a sampler may share it."""
    known: dict[tuple[Any, ...], Sampler] = {}

    def get(case: Case, **options: Any) -> Sampler:
        key = (case.name, case.shape, *sorted(options.items()))
        if key not in known:
            known[key] = compile_case(case, **options)
        return known[key]

    return get
