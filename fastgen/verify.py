"""Proof that stepping reproduces forward: one sampling pass, one forward on its result, every draw made again.

Errors are judged against what they are errors of, never against the largest number in sight: each parameter against
itself, each step by what its error does to the distribution that is drawn from. What is rounding and what is a fault is
measured, by forward in float64 beside forward in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fastgen import rng
from fastgen.backends.base import CompiledExecutor, Executor
from fastgen.backends.cpu import CpuExecutor
from fastgen.backends.request import Request
from fastgen.diagnose import MIXES, RANDOM, check_logits, of_samples, repeats
from fastgen.errors import UnsupportedError
from fastgen.forward import FORWARD_ERRORS
from fastgen.graph.node import Graph
from fastgen.program.programs import RoundedPrograms
from fastgen.spec import Spec
from fastgen.teacher_forced import by_step, forward_parameters, teacher_forced
from fastgen.variations import Others, batched, first_of
from fastgen.view import copied

# Of a parameter, relative to itself (or to 1), and of a step's distribution, where forward's own rounding is less.
TOLERANCE = 1e-5
ROUNDINGS = 8  # times forward's own rounding error may stepping be off
MOST_ROUNDING = 2e-3  # of a parameter: float32 forward is off by no more, unless it is off for another reason
LOW_ROUNDING = 0.1  # the same of an executor that rounds activations to low precision
PRECISE_SITES = 512  # of a sequence: enough to see how it rounds
TIES = 3  # decisions within an error of a boundary that are always granted; and so many times as many as are expected
TIES_EXPECTED = 4

Truth = Callable[[Tensor], Tensor]  # values [n, H*W, C] -> parameters [n, steps, P]


@dataclass(frozen=True)
class VerifyReport:
    """ok: stepping equals the truth in every parameter, in every step's distribution, and in every draw.

    max_abs_error: largest difference of a parameter at any step of any sample. error: the largest relative one, of a
    parameter to itself (or to 1). distance: the largest total variation (an upper bound, Head.distance) between what a
    step's parameters draw and what the truth's do. tolerance: what `error` and `distance` may come to, each at least this;
    more where forward's own rounding, `rounding` (relative, as error), is more. draws, draws_equal: number of draws, and
    how many the truth's own parameters repeat exactly. near_ties: how many of the others are explained by a decision
    within the parameter error of a boundary; likely_ties: how many may be, by their probability. samples: how many.

    The truth is forward in float32; for weights in low precision it is, after that, the plan in float32 with equally
    rounded weights, run by the cpu executor on the same values.
    """

    ok: bool
    max_abs_error: float
    error: float
    distance: float
    tolerance: float
    rounding: float
    draws: int
    draws_equal: int
    near_ties: int
    likely_ties: float
    samples: int

    def __str__(self) -> str:
        word = "exact" if self.ok else "NOT EXACT"
        return (
            f"{word}: {self.samples} samples, max abs error {self.max_abs_error:.2e} (relative {self.error:.2e}, of a "
            f"distribution {self.distance:.2e}; tolerance {self.tolerance:.0e}, forward rounds by {self.rounding:.0e}), "
            f"{self.draws_equal} of {self.draws} draws equal, {self.near_ties} near ties"
        )


def forward_truth(model: nn.Module, spec: Spec, request: Request, beside: Others | None = None) -> Truth:
    """Forward itself, on the values of a request's samples, and others in the same batch. Raises ShapeError where it does not
    take so many, and UnsupportedError where it does not treat the others apart."""
    return lambda values: of_samples(model, spec, values, request.cond, beside or [])


def precise_truth(model: nn.Module, spec: Spec, request: Request) -> Truth | None:
    """Forward in float64, of the first sample; None where it does not run so."""
    try:
        double = copied(model).double()
    except Exception:  # of a module that cannot be copied
        return None

    short = spec
    if spec.sequence and spec.order is None and not any(map(batched, request.cond)):
        short = spec.at_length(min(spec.sites[0], PRECISE_SITES))

    def truth(values: Tensor) -> Tensor:
        values = values[:1, : short.grid[0] * short.grid[1]]
        cond = first_of(request.cond)
        try:
            return teacher_forced(double, short, values, cond, torch.float64)
        except FORWARD_ERRORS:  # a cast to float32 inside of forward, for one
            return forward_parameters(_nudged(model), short, values, cond).double()

    return truth


def _nudged(model: nn.Module) -> nn.Module:
    """A copy whose weights are off by one unit in their last place: its results are off by about what rounding makes."""
    other, g = copied(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in other.parameters():
            if p.is_floating_point():
                p.mul_(1 + (torch.randint(0, 2, p.shape, generator=g) * 2 - 1).to(p) * 2.0**-23)
    return other


def executed_truth(executor: Executor, request: Request) -> Truth:
    """What another executor computes from the values of a request's samples, all of them given."""

    def truth(values: Tensor) -> Tensor:
        known = replace(
            request, given=values, mask=torch.ones_like(values, dtype=torch.bool), want_params=True, out=None
        )
        params = executor.run(known)[1]
        assert params is not None
        return params.cpu()

    return truth


def verify(
    model: nn.Module, spec: Spec, executor: Executor, request: Request, graph: Graph | None = None,
    threads: int | None = None, beside: Others | None = None,
) -> VerifyReport:  # fmt: skip
    """Checks an executor on a request. model: a private view on the CPU. Weights in low precision are proved in two steps:
    the plan in float32 against forward; and the executor against the plan in float32 with equally rounded weights.
    graph: of the plan; with it, what forward returns is looked at too (check_logits). threads: of the cpu executor, which
    runs the plan in float32. beside: other conditionings, that forward must treat apart from the request's."""
    plain: Executor = executor
    rounded, forward = None, forward_truth(model, spec, request, beside)
    alone = forward_truth(model, spec, request.rows(0, 1))
    if isinstance(executor, CompiledExecutor) and executor.weights_in != torch.float32:
        both = executor.programs, RoundedPrograms(executor.programs, executor.weights_in)
        plain, rounded = (CpuExecutor(p, executor.conditioning, threads=threads) for p in both)

    def truth(values: Tensor) -> Tensor:
        true = forward(values)
        if graph is not None:
            check_logits(spec, graph, true)
        return true

    noise: Noise | None
    report, noise = _verify(spec, plain, request, truth, precise_truth(model, spec, request), alone=alone)
    if rounded is None or not report.ok:
        return report
    full = None
    if isinstance(executor, CompiledExecutor) and executor.rounds_activations:
        # Which comes to about as much as the rounding of weights does.
        full, noise = executed_truth(plain, request), None
    return _verify(spec, executor, request, executed_truth(rounded, request), full, noise)[0]


Noise = tuple[float, float]  # rounding errors, of a parameter (relative) and of a distribution


def _verify(
    spec: Spec, executor: Executor, request: Request, truth: Truth, fine: Truth | None, noise: Noise | None = None,
    alone: Truth | None = None,
) -> tuple[VerifyReport, Noise]:  # fmt: skip
    """Runs `request` and checks it; equal to one's own teacher-forced forward everywhere is equal to the naive loop.

    alone: the truth of the first sample without the others. Raises UnsupportedError where it is another.
    """
    values, params = executor.run(request)
    assert params is not None
    values, params = values.cpu(), params.cpu()
    true = truth(values.nan_to_num(0.0))  # where parameters are no distribution there is nothing to compare
    single = true if alone is None or len(true) == 1 else alone(values[:1].nan_to_num(0.0))
    if noise is None:
        most = LOW_ROUNDING if alone is None else MOST_ROUNDING
        noise = _rounding(spec, true, single, fine, values.nan_to_num(0.0), most)
    if _relative(true[: len(single)], single) > max(TOLERANCE, ROUNDINGS * noise[0]):
        again = repeats(lambda: truth(values.nan_to_num(0.0)))
        raise UnsupportedError(MIXES if again else RANDOM)
    error, apart = _relative(params, true), torch.where(params == true, 0.0, (params - true).abs())
    distance = float(spec.head.distance(true, params).max())
    differ, ties = _draws(spec, request, values, params, true)
    likely = float(spec.head.mismatch(true, params).sum())
    if not spec.head.discrete and not spec.head.grid_levels and ties == differ:
        differ = ties = 0  # values that differ by no more than their parameters do are equal
    ok = (
        not bool(values.isnan().any())
        and error <= max(TOLERANCE, ROUNDINGS * noise[0])
        and distance <= max(TOLERANCE, ROUNDINGS * noise[1])
        and ties == differ
        and ties <= TIES + TIES_EXPECTED * likely
    )
    draws = values.shape[0] * spec.steps
    worst = float(apart.nan_to_num(float("inf")).max())
    report = VerifyReport(
        ok, worst, error, distance, TOLERANCE, noise[0], draws, draws - differ, ties, likely, request.slots
    )
    return report, noise


def _relative(params: Tensor, true: Tensor) -> float:
    """The largest error of a parameter relative to itself, or to 1. Infinite for NaN, and for an infinity that is not there."""
    off = torch.where(params == true, 0.0, (params.double() - true.double()).abs() / true.double().abs().clamp(min=1))
    return float(off.nan_to_num(float("inf")).max())


def _rounding(
    spec: Spec, true: Tensor, single: Tensor, precise: Truth | None, values: Tensor, most: float
) -> Noise:  # fmt: skip
    """Forward's own rounding: the largest relative one of a parameter, and the largest of a step's distribution; at least
    what two units in the last place of every parameter come to. single: the parameters of the first sample alone, which are
    compared with precise ones."""
    nudged = _nudged_parameters(true)
    least = _relative(true, nudged), float(spec.head.distance(nudged, true).max())
    if precise is None:
        return least
    fine = precise(values)
    if fine.shape[-1] != single.shape[-1]:
        return least
    single = single[: fine.shape[0], : fine.shape[1]]
    found = _relative(single, fine), float(spec.head.distance(fine, single).max())
    if not found[0] < most:  # that is something else
        return least
    return max(least[0], found[0]), max(least[1], found[1])


def _nudged_parameters(true: Tensor) -> Tensor:
    """Parameters off by two units in their last place (of 1, if they are less), one up and the next down; in float64."""
    signs = torch.ones(true.shape[-1]).cumsum(0) % 2 * 2 - 1
    return true.double() + 2.0**-22 * signs * true.double().abs().clamp(min=1)


def _draws(spec: Spec, request: Request, values: Tensor, params: Tensor, true: Tensor) -> tuple[int, int]:
    """Of the draws, how many the true parameters do not repeat, and how many of those are near ties."""
    head = spec.head
    samples = torch.arange(request.slots) + request.first
    u = rng.uniforms(request.seed, samples, torch.arange(spec.steps), head.num_uniforms(spec.channels))
    drawn = by_step(spec, values)
    known = None
    if request.mask is not None and request.given is not None:
        known = by_step(spec, torch.where(request.mask.bool(), request.given, float("nan")))
    again = head.draw(true, u, request.temperature, known)
    differ = (drawn != again).any(-1)
    if not bool(differ.any()):
        return 0, 0
    explained = head.near_tie(true[differ], params[differ], u[differ], drawn[differ], request.temperature)
    if known is not None:  # what is given is kept, or it is a fault
        explained &= ~((known != drawn) & ~known.isnan())[differ].any(-1)
    return int(differ.sum()), int(explained.sum())
