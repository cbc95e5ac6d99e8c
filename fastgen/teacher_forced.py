"""Teacher forcing: the parameters that one forward gives on values that are known."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastgen.errors import UnsupportedError
from fastgen.forward import device_of, first_tensor, plain
from fastgen.spec import Spec
from fastgen.view import neutral


def forward_parameters(model: nn.Module, spec: Spec, values: Tensor, cond: tuple[Any, ...]) -> Tensor:
    """Parameters [n, steps, P] of one teacher-forced forward on values [n, H*W, C], float32."""
    return teacher_forced(model, spec, values, cond, torch.float32).float()


def teacher_forced(model: nn.Module, spec: Spec, values: Tensor, cond: tuple[Any, ...], dtype: torch.dtype) -> Tensor:
    """Parameters [n, steps, P] of one forward on values [n, H*W, C], whose floating-point inputs are of a dtype."""
    device = device_of(model)
    with neutral():
        x, *inputs = (_at(device, plain(t), dtype) for t in (spec.encode(plain(values)), *cond))
        out = spec.parameters(first_tensor(model(x, *inputs))).cpu()
    if len(out) != len(values):
        raise UnsupportedError(f"forward returned parameters of {len(out)} samples for {len(values)}")
    steps = out.permute(0, 3, 1, 2, 4).reshape(out.shape[0], spec.steps, out.shape[-1])
    return steps[:, torch.argsort(spec.timeline.table.reshape(-1))]


def _at(device: torch.device, t: Any, dtype: torch.dtype) -> Any:
    if not isinstance(t, Tensor):
        return t
    return t.to(device, dtype) if t.dtype == torch.float32 else t.to(device)


def by_step(spec: Spec, values: Tensor) -> Tensor:
    """Values [n, H*W, C] in the order they are drawn: [n, steps, V]."""
    if spec.head.at_once:
        return values[:, spec.timeline.site]
    flat = values.transpose(1, 2).reshape(values.shape[0], -1)
    return flat[:, torch.argsort(spec.timeline.table.reshape(-1))].unsqueeze(-1)
