"""Where a module is, where it is to be sampled, and its copy on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastgen.backends.registry import AUTO, BACKENDS, EXECUTORS
from fastgen.errors import UnsupportedError
from fastgen.forward import device_of
from fastgen.view import copied


def placed(model: nn.Module, device: str | torch.device | None, backend: str) -> tuple[torch.device, str]:
    """Where to sample, and the executor that `auto` stands for there. Raises ValueError, UnsupportedError."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: expected one of {', '.join(BACKENDS)}")
    kind = None if backend == "auto" else EXECUTORS[backend].device_type
    try:
        at = torch.device(device) if device is not None else device_of(model) if kind is None else torch.device(kind)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={device!r}: expected {' or '.join(AUTO)}, or a torch.device") from error
    if at.type not in AUTO:
        raise UnsupportedError(f"device='{at}': there are executors for {' and '.join(AUTO)}")
    if kind not in (None, at.type):
        raise ValueError(f"backend={backend!r} does not run on device='{at}'; leave one of them out")
    backend = AUTO[at.type] if backend == "auto" else backend
    return EXECUTORS[backend].place(at), backend


def on_cpu(view: nn.Module) -> nn.Module:
    """A private view itself if it is on the CPU, else a copy there."""
    return view if device_of(view).type == "cpu" else copied(view).cpu()


def in_float32(view: nn.Module) -> tuple[nn.Module, str]:
    """A private view itself if its parameters are float32, else a copy that is; and what they were, "" if that."""
    kinds = {p.dtype for p in view.parameters() if p.is_floating_point()} - {torch.float32}
    if not kinds:
        return view, ""
    made = copied(view).float()
    for module in made.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.dtype in kinds:
                vars(module)[name] = value.float()
    return made, " and ".join(sorted(str(k).removeprefix("torch.") for k in kinds))
