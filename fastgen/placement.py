"""Where a module is, where it is to be sampled, and its copy on the CPU."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from fastgen.backends.cuda import cuda_device
from fastgen.errors import UnsupportedError

BACKENDS = ("auto", "cpu", "cuda", "reference", "naive")


def device_of(model: nn.Module) -> torch.device:
    """Of its first parameter; the CPU for a module without."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def placed(model: nn.Module, device: str | torch.device | None, backend: str) -> tuple[torch.device, str]:
    """Where to sample, and the executor that `auto` stands for there. Raises ValueError, UnsupportedError."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: expected one of {', '.join(BACKENDS)}")
    at = torch.device(device) if device is not None else torch.device("cuda") if backend == "cuda" else None
    if at is None:
        at = device_of(model) if backend == "auto" else torch.device("cpu")
    if at.type not in ("cpu", "cuda"):
        raise UnsupportedError(f"device='{at}': there are executors for cpu and cuda")
    if backend == "auto":
        backend = at.type
    if (at.type == "cuda") != (backend == "cuda"):
        raise ValueError(f"backend={backend!r} does not run on device='{at}'; leave one of them out")
    return (cuda_device(at)[0] if backend == "cuda" else at), backend


def on_cpu(model: nn.Module) -> nn.Module:
    """The module itself if it is on the CPU, else a copy there."""
    return model if device_of(model).type == "cpu" else copy_to_cpu(model)


def copy_to_cpu(model: nn.Module) -> nn.Module:
    """A copy on the CPU. Tensors that are plain attributes (masks, what hooks compute) come along, detached: `deepcopy`
    refuses those with a history, and `Module.cpu` leaves them where they are."""
    memo: dict[int, Tensor] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                memo[id(value)] = value.detach().cpu().clone()
    return copy.deepcopy(model, memo).cpu()
