"""Proof that stepping reproduces forward: one sampling pass, one forward on its result, every draw made again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastgen import rng
from fastgen.backends.base import Executor
from fastgen.backends.request import Request
from fastgen.forward import device_of, first_tensor, plain
from fastgen.spec import Spec
from fastgen.view import neutral

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float64: 1e-9}


@dataclass(frozen=True)
class VerifyReport:
    """ok: stepping equals forward within `tolerance` x `scale` and every draw is equal or a near tie.

    max_abs_error: largest difference of a parameter at any step of any sample. scale: max(1, largest finite parameter).
    draws, draws_equal: number of draws, and how many forward's own parameters repeat exactly. near_ties: how many of
    the others are explained by a decision within the parameter error of a boundary.
    """

    ok: bool
    max_abs_error: float
    scale: float
    tolerance: float
    draws: int
    draws_equal: int
    near_ties: int
    samples: int

    def __str__(self) -> str:
        word = "exact" if self.ok else "NOT EXACT"
        return (
            f"{word}: {self.samples} samples, max abs error {self.max_abs_error:.2e} (scale {self.scale:.3g}, "
            f"tolerance {self.tolerance:.0e}), {self.draws_equal} of {self.draws} draws equal, "
            f"{self.near_ties} near ties"
        )


def forward_parameters(model: nn.Module, spec: Spec, values: Tensor, cond: tuple[Any, ...]) -> Tensor:
    """Parameters [n, steps, P] of one teacher-forced forward on values [n, H*W, C]."""
    device = device_of(model)
    with neutral():
        x, *inputs = (_at(device, plain(t)) for t in (spec.encode(plain(values)), *cond))
        out = spec.parameters(first_tensor(model(x, *inputs))).cpu()
    steps = out.permute(0, 3, 1, 2, 4).reshape(out.shape[0], spec.steps, out.shape[-1])
    return steps[:, torch.argsort(spec.timeline.table.reshape(-1))].float()


def _at(device: torch.device, t: Any) -> Any:
    return t.to(device) if isinstance(t, Tensor) else t


def by_step(spec: Spec, values: Tensor) -> Tensor:
    """Values [n, H*W, C] in the order they are drawn: [n, steps, V]."""
    if spec.head.at_once:
        return values[:, spec.timeline.site]
    flat = values.transpose(1, 2).reshape(values.shape[0], -1)
    return flat[:, torch.argsort(spec.timeline.table.reshape(-1))].unsqueeze(-1)


def verify(model: nn.Module, spec: Spec, executor: Executor, request: Request, dtype: torch.dtype) -> VerifyReport:
    """Runs `request` and checks it; equal to one's own teacher-forced forward everywhere is equal to the naive loop."""
    values, params = executor.run(request)
    assert params is not None
    values, params = values.cpu(), params.cpu()
    truth = forward_parameters(model, spec, values, request.cond)
    same = params == truth  # infinities of a masked class compare equal
    error = float(torch.where(same, 0.0, (params - truth).abs()).max())
    scale = max(1.0, float(torch.where(truth.isfinite(), truth, 0.0).abs().max()))
    head = spec.head
    samples = torch.arange(request.slots) + request.first
    u = rng.uniforms(request.seed, samples, torch.arange(spec.steps), head.num_uniforms(spec.channels))
    drawn = by_step(spec, values)
    again = head.draw(truth, u, request.temperature)
    differ = (drawn != again).any(-1)
    if request.mask is not None:
        differ &= ~by_step(spec, request.mask.float()).bool().any(-1)
    ties = 0
    continuous = not head.discrete and not head.grid_levels
    if bool(differ.any()):
        explained = head.near_tie(truth[differ], params[differ], u[differ], drawn[differ], request.temperature)
        ties = int(explained.sum())
    wrong = int(differ.sum())
    if continuous and ties == wrong:  # values that differ by no more than their parameters do are equal
        ties = wrong = 0
    ok = error <= TOLERANCE[dtype] * scale and ties == wrong and not bool(params.isnan().any())
    return VerifyReport(
        ok, error, scale, TOLERANCE[dtype], differ.numel(), differ.numel() - wrong, ties, request.slots
    )  # fmt: skip


def diagnose(model: nn.Module, spec: Spec, request: Request) -> str:
    """Why verification may have failed: forward is random, or mixes the samples of a batch."""
    n = 2
    values = spec.example_values(n)
    cond = tuple(c[:1].expand(n, *c.shape[1:]) if isinstance(c, Tensor) and c.dim() else c for c in request.cond)
    first, again = (forward_parameters(model, spec, values, cond) for _ in range(2))
    if not torch.equal(first, again):
        return "forward gives different results on the same input: it is random even in eval mode (dropout?)"
    one = tuple(c[:1] if isinstance(c, Tensor) and c.dim() else c for c in cond)
    alone = forward_parameters(model, spec, values[:1], one)
    if float((first[:1] - alone).abs().max()) > 1e-3 * max(1.0, float(alone.abs().max())):
        return "forward mixes the samples of a batch: a sample's parameters change with what else is in it"
    return "the plan does not reproduce this module; please report it"
