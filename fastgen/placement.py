"""Where a module is, where it is to be sampled, and its copy on the CPU."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from fastgen.backends.registry import AUTO, BACKENDS, EXECUTORS
from fastgen.errors import UnsupportedError
from fastgen.forward import device_of


def placed(model: nn.Module, device: str | torch.device | None, backend: str) -> tuple[torch.device, str]:
    """Where to sample, and the executor that `auto` stands for there. Raises ValueError, UnsupportedError."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: expected one of {', '.join(BACKENDS)}")
    kind = None if backend == "auto" else EXECUTORS[backend].device_type
    at = torch.device(device) if device is not None else device_of(model) if kind is None else torch.device(kind)
    if at.type not in AUTO:
        raise UnsupportedError(f"device='{at}': there are executors for {' and '.join(AUTO)}")
    if kind not in (None, at.type):
        raise ValueError(f"backend={backend!r} does not run on device='{at}'; leave one of them out")
    backend = AUTO[at.type] if backend == "auto" else backend
    return EXECUTORS[backend].place(at), backend


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
