"""Which implementation an operation has on a device: one rule, by device and dtype alone, that anybody can ask."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST = (8, 0)  # bfloat16 matrix instructions and asynchronous copies
_interpreting = False


@dataclass(frozen=True)
class KernelChoice:
    """name: "triton" for the fused kernels, "torch" for plain torch operations; reason: why, in words."""

    name: Literal["triton", "torch"]
    reason: str


def kernel_for(device: torch.device | str, dtype: torch.dtype) -> KernelChoice:
    """What the operations of this package run on tensors of `device` and `dtype`. No shape changes it."""
    device = torch.device(device)
    if dtype not in KERNEL_DTYPES:
        return KernelChoice("torch", f"{dtype}: the kernels take float32, bfloat16 and float16")
    if _interpreting and device.type == "cpu":
        return KernelChoice("triton", "Triton's interpreter, asked for by interpreted()")
    return _of_device(device)


@functools.lru_cache(maxsize=64)
def _of_device(device: torch.device) -> KernelChoice:
    if device.type != "cuda" or torch.version.cuda is None:
        return KernelChoice("torch", f"the kernels are for NVIDIA GPUs; this is {device.type}")
    if importlib.util.find_spec("triton") is None:
        return KernelChoice("torch", "triton is not installed")
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST:
        given, needed = (".".join(map(str, c)) for c in (capability, _OLDEST))
        return KernelChoice("torch", f"compute capability {given}; the kernels need {needed}")
    return KernelChoice("triton", f"compute capability {capability[0]}.{capability[1]}")


def uses_kernel(x: torch.Tensor) -> bool:
    return kernel_for(x.device, x.dtype).name == "triton"


def on_device(x: torch.Tensor) -> AbstractContextManager[object]:
    """Inside, launches go to the GPU that x is on; where that is no GPU, nothing changes."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@contextmanager
def interpreted() -> Iterator[None]:
    """Inside, CPU tensors go to the Triton kernels too. For tests: the process needs TRITON_INTERPRET=1 from its start.

    Not for several threads at once.
    """
    global _interpreting
    before, _interpreting = _interpreting, True
    try:
        yield
    finally:
        _interpreting = before
