"""The executors by name; an executor is a class and its line here."""

from __future__ import annotations

from fastgen.backends.base import Executor
from fastgen.backends.cpu import CpuExecutor
from fastgen.backends.cuda import CudaExecutor
from fastgen.backends.naive import NaiveExecutor
from fastgen.backends.reference import ReferenceExecutor

EXECUTORS: dict[str, type[Executor]] = {
    executor.name: executor for executor in (CpuExecutor, CudaExecutor, ReferenceExecutor, NaiveExecutor)
}
AUTO = {"cpu": "cpu", "cuda": "cuda"}  # device type -> what backend="auto" stands for there
BACKENDS = ("auto", *EXECUTORS)
