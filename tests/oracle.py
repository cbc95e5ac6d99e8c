"""The slow way, written without any of fastgen's machinery but its heads and its noise: what sampling must equal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import fastgen
from fastgen import Sampler, rng
from fastgen.backends.base import Executor
from fastgen.backends.request import Request
from tests.cases import Case, cases


def by_name(*names: str) -> list[Case]:
    """The cases of these names."""
    table = {case.name: case for case in cases()}
    return [table[name] for name in names]


def compile_case(case: Case, **options: Any) -> Sampler:
    """fastgen.compile with all that a case says; one thread, and not verified unless asked to."""
    said = dict(layout=case.layout, predicts=case.predicts, start=case.start, order=case.order, verify=False)
    if options.get("backend") not in ("reference", "naive"):
        said["threads"] = 1
    return fastgen.compile(case.build(), case.shape, case.head, case.cond(), **{**said, **options})


def at_length(case: Case, length: int) -> Case:
    """The same sequence with another number of sites."""
    shape = tuple(length if axis == "T" else size for axis, size in zip(case.axes, case.shape, strict=True))
    return replace(case, shape=shape)


def forward_input(case: Case, values: Tensor) -> Tensor:
    """Values [n, *sites, C] -> what forward is given, delayed by one where the case predicts the next."""
    x = case.to_input(values)
    if case.predicts == "same":
        return x
    start = torch.zeros_like(values) if case.start is None else torch.full_like(values, case.start)
    axis = 1 + case.axes.index("T")
    front = case.to_input(start).narrow(axis, 0, 1)
    if case.start is None:
        front = torch.zeros_like(front)
    return torch.cat([front, x.narrow(axis, 0, x.shape[axis] - 1)], axis)


def parameters(case: Case, model: nn.Module, values: Tensor, cond: tuple[Any, ...]) -> Tensor:
    """One forward on values [n, *sites, C], conditioning at batch n -> parameters [n, steps, P] in drawing order."""
    with torch.no_grad():
        out = model(forward_input(case, values).to(_floating(model, case)), *cond)
    return case.head.parameters_of(out, case.channels, case.sites).reshape(values.shape[0], case.steps, -1)[
        :, case.positions
    ]


def _floating(model: nn.Module, case: Case) -> torch.dtype:
    kinds = [p.dtype for p in model.parameters() if p.is_floating_point()]
    return torch.int64 if case.head.integer_input else kinds[0]


def noise_of(case: Case, n: int, seed: int, first: int = 0) -> Tensor:
    """Uniforms [n, steps, U]."""
    count = case.head.num_uniforms(case.channels)
    return rng.uniforms(seed, torch.arange(n) + first, torch.arange(case.steps), count)


def slow_sample(
    case: Case,
    n: int,
    seed: int,
    *,
    cond: tuple[Any, ...] | None = None,
    temperature: float = 1.0,
    known: Tensor | None = None,
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """One forward per draw. `known` [n, *sites, C]: values to keep, NaN elsewhere. -> (values, parameters [n, steps, P])."""
    model = case.build().eval()
    cond = case.conds(n) if cond is None else cond
    u = noise_of(case, n, seed, first)
    per_step = case.channels if case.head.at_once else 1
    values = torch.zeros(n, case.steps, per_step)
    kept = None if known is None else case.by_step(known)
    params = []
    for t in range(case.steps):
        theta = parameters(case, model, case.from_steps(values), cond)[:, t]
        params.append(theta)
        values[:, t] = case.head.draw(theta, u[:, t], temperature, None if kept is None else kept[:, t])
    return case.from_steps(values), torch.stack(params, 1)


def values_of(case: Case, x: Tensor) -> Tensor:
    """What sample() returned -> values [n, *sites, C]."""
    if x.dim() == 1 + len(case.shape) and "C" in case.axes:
        return x.movedim(1 + case.axes.index("C"), -1).float()
    return x.unsqueeze(-1).float()


def sample_of(case: Case, values: Tensor) -> Tensor:
    """Values [n, *sites, C] as sample() returns them."""
    values = values.long() if case.head.indices else values
    squeezed = "C" not in case.axes or (case.head.indices and case.head.enc > 1 and case.channels == 1)
    return values.squeeze(-1) if squeezed else values.movedim(-1, 1 + case.axes.index("C"))


def assert_same_samples(case: Case, ours: Tensor, slow: Tensor, params: Tensor, seed: int, first: int = 0) -> None:
    """Values [n, *sites, C] are those of the slow loop, whose parameters were `params`.

    Continuous values: close. Others: equal up to a first draw whose uniform lies within 1e-5 of a boundary.
    """
    assert ours.shape == slow.shape
    if not case.head.discrete and not case.head.grid_levels:
        torch.testing.assert_close(ours, slow, atol=2e-3, rtol=2e-3)
        return
    a, b = case.by_step(ours), case.by_step(slow)
    u = noise_of(case, len(ours), seed, first)
    for i, t in enumerate((a != b).any(-1).int().argmax(1).tolist()):
        if torch.equal(a[i, t], b[i, t]):
            continue
        theta = params[i, t]
        near = case.head.near_tie(theta, theta + 1e-5 * max(1.0, float(theta.abs().max())), u[i, t], a[i, t])
        assert bool(near), f"{case}: sample {i} differs from step {t}: {a[i, t].tolist()}, slow loop {b[i, t].tolist()}"


def assert_draws_follow(case: Case, values: Tensor, truth: Tensor, u: Tensor) -> None:
    """Values [n, *sites, C] are what teacher-forced parameters [n, steps, P] and noise [n, steps, U] give, or lie within
    what an error of 1e-5 of the parameters' scale explains."""
    drawn, again = case.by_step(values), case.head.draw(truth, u)
    differ = (drawn != again).any(-1)
    theta = truth[differ]
    error = 1e-5 * theta.abs().amax(-1, keepdim=True).clamp(min=1.0)
    explained = case.head.near_tie(theta, theta + error, u[differ], drawn[differ])
    assert bool(explained.all()), f"{case}: {int((~explained).sum())} of {differ.numel()} draws do not follow forward"
    if case.head.discrete or case.head.grid_levels:
        assert int(differ.sum()) <= max(1, differ.numel() // 100), f"{case}: {int(differ.sum())} near ties"


def flat(sampler: Sampler, values: Tensor) -> Tensor:
    """Values [n, *sites, C] as executors hold them: [n, H*W, C], a vector's as [n, 1, D]."""
    grid = sampler.spec.grid
    return values.reshape(values.shape[0], grid[0] * grid[1], -1)


def run_given(sampler: Sampler, values: Tensor, cond: tuple[Any, ...] = (), executor: Executor | None = None) -> Tensor:
    """Steps through given values [n, *sites, C], all known, which must come back: parameters [n, steps, P]."""
    given = flat(sampler, values)
    request = Request(len(given), 0, cond=cond, given=given, mask=torch.ones_like(given), want_params=True)
    out, params = (executor or sampler.executor).run(request)
    assert torch.equal(out, given), "known values must be kept"
    assert params is not None
    return params
