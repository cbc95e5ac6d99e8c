"""What is wrong with a forward (probabilities where logits belong, NaN, random numbers, samples that mix), or with a plan."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastgen.backends.base import Executor
from fastgen.backends.request import Request
from fastgen.capture.capture import capture
from fastgen.capture.ids import col_of, row_of
from fastgen.capture.tracer import Tracer
from fastgen.checks import check_drawn
from fastgen.errors import FastgenError, ShapeError, UnsupportedError
from fastgen.forward import FORWARD_ERRORS, refused
from fastgen.graph.node import Graph, Node
from fastgen.graph.sources import CondNode, InputNode
from fastgen.plan.plan import Plan
from fastgen.spec import Spec
from fastgen.teacher_forced import by_step, forward_parameters
from fastgen.variations import Others, batched

RANDOM = "forward gives different results on the same input: it is random even in eval mode (dropout?)"
MIXES = (
    "forward mixes the samples of a batch: a sample's parameters change with what else is in it (values or conditioning of the "
    "first used for all of them? a batch that is not the first axis?)"
)

LEAK_STEPS, LEAK_SECONDS = 64, 3.0  # of asking forward whether it reads the future


def check_logits(spec: Spec, graph: Graph, true: Tensor) -> None:
    """Raises UnsupportedError where forward's parameters [n, steps, P] are probabilities, and the head takes logits.

    Of classes: numbers that are nowhere negative and sum to one at every step. Of a coin: numbers from 0 to 1 that are the
    result of a function, not of a sum of weighted terms, which may lie there by chance.
    """
    if not spec.head.discrete or not bool(((true >= 0) & (true <= 1)).all()):
        return
    if true.shape[-1] == 1:
        found, what, cure = all(graph.made_by_map(k) for k in graph.params), "from 0 to 1", "torch.logit(p)"
    else:
        found = bool(((true.sum(-1) - 1).abs() < 1e-4).all())
        what, cure = "never negative, and sum to 1 at every step", "torch.log(p)"
    if found:
        raise UnsupportedError(
            f"forward returns probabilities (its outputs are {what}), and {spec.head.name} takes logits; return {cure}"
        )


def of_batch(model: nn.Module, spec: Spec, values: Tensor, cond: tuple[Any, ...]) -> Tensor:
    """Forward's parameters for several samples. Raises ShapeError where it does not take so many."""
    try:
        return forward_parameters(model, spec, values, cond)
    except FORWARD_ERRORS as error:
        if isinstance(error, FastgenError) or len(values) == 1:
            raise
        raise ShapeError(
            f"{refused(spec.encode(values), cond, error)}; it takes one sample but not {len(values)} at once: does it keep "
            "something of the size of the first batch that it saw, or of the batch that it was traced with?"
        ) from error


@contextlib.contextmanager
def _first_nan(model: nn.Module) -> Iterator[list[str]]:
    """Names of the modules (of a private view) whose results have NaN while theirs inputs have none, in order."""
    found: list[str] = []

    def has(given: Any) -> bool:
        return any(bool(t.isnan().any()) for t in tree_leaves(given) if isinstance(t, Tensor) and t.is_floating_point())

    def look(name: str, args: Any, out: Any) -> None:
        if has(out) and not has(args):
            found.append(name)

    hooks = [
        m.register_forward_hook(lambda _, args, out, name=name: look(name, args, out))
        for name, m in model.named_modules()
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def check_forward(model: nn.Module, spec: Spec, request: Request) -> None:
    """Raises UnsupportedError where forward gives NaN, is random, or mixes the samples of a batch, so that there is nothing
    to reproduce. request: of two samples or more."""
    values, cond = spec.example_values(request.slots), request.cond
    with _first_nan(model) as culprit:
        first = forward_parameters(model, spec, values, cond)
    if bool(first.isnan().any()):
        where = f"layer {culprit[0]}" if culprit and culprit[0] else "its own code"
        raise UnsupportedError(f"forward gives NaN, from {where} on")
    if not torch.equal(first, forward_parameters(model, spec, values, cond)):
        raise UnsupportedError(RANDOM)
    alone = [
        forward_parameters(model, spec, values[k : k + 1], tuple(c[k : k + 1] if batched(c) else c for c in cond))
        for k in range(request.slots)
    ]
    _compare_apart(model, spec, values, cond, first, torch.cat(alone))


def of_samples(model: nn.Module, spec: Spec, values: Tensor, cond: tuple[Any, ...], beside: Others) -> Tensor:
    """Forward's parameters for several samples in one batch with others, whose parameters are known: the first example values,
    of other conditioning. Raises UnsupportedError where forward does not treat those apart, and as of_batch does."""
    n = len(values)
    if beside:
        values = torch.cat([values, spec.example_values(1).to(values).expand(len(beside), -1, -1)])
        cond = tuple(torch.cat([c, *(b[k] for b, _ in beside)]) if batched(c) else c for k, c in enumerate(cond))
    params = of_batch(model, spec, values, cond)
    if beside:
        _compare_apart(model, spec, values, cond, params, torch.cat([params[:n], *(alone for _, alone in beside)]))
    return params[:n]


def _compare_apart(
    model: nn.Module, spec: Spec, values: Tensor, cond: tuple[Any, ...], params: Tensor, alone: Tensor
) -> None:
    """Raises UnsupportedError where parameters [n, steps, P] of a batch are not those of each sample alone."""
    off = (params - alone).abs().flatten(1).amax(1) > 1e-3 * alone.abs().flatten(1).amax(1).clamp(min=1)
    if bool(off.any()):
        again = forward_parameters(model, spec, values, cond)
        raise UnsupportedError(MIXES if torch.equal(params, again) else RANDOM)


def reads_future(model: nn.Module, spec: Spec, cond: tuple[Any, ...]) -> str | None:
    """What to say of a forward whose parameters change with values that are drawn at their step or later; None where none is
    seen to, at some steps and values, one sample (cond: batch 1) at a time."""
    ours = spec.example_values(2)
    n = spec.head.n
    theirs = (ours + 1 + ours.flip(1) % max(1, n - 1)) % n if spec.head.discrete else -ours.flip(1)
    drawn_at = spec.timeline.table.flatten(1).t().expand(-1, spec.channels)
    steps = torch.linspace(0, spec.steps - 1, min(spec.steps, LEAK_STEPS)).round().long().unique().tolist()
    began = time.monotonic()
    try:
        plain = [forward_parameters(model, spec, a[None], cond)[0] for a in ours]
        if not torch.equal(plain[0], forward_parameters(model, spec, ours[:1], cond)[0]):
            return None  # random
        for step in sorted(steps, key=lambda t: t * 7919 % 8191):  # in no order, as not all may be asked
            for a, b, before in zip(ours, theirs, plain, strict=True):
                values = torch.where(drawn_at >= step, b, a)[None]
                after = forward_parameters(model, spec, values, cond)[0]
                off = (after - before).abs()[: step + 1] > 1e-4 * before.abs()[: step + 1].clamp(min=1)
                if bool(off.any()):
                    late = int(off.any(-1).nonzero()[0])
                    row, column = divmod(int(spec.timeline.site[late]), spec.grid[1])
                    return f"the parameters of step {late} (row {row}, column {column}) change with values from step {step} on"
            if time.monotonic() - began > LEAK_SECONDS:
                break
    except (FastgenError, *FORWARD_ERRORS):
        pass
    return None


def check_drift(model: nn.Module, spec: Spec, executor: Executor, request: Request) -> None:
    """Raises FastgenError where samples run away until their parameters are no distribution, as forward itself has it: they
    are the plan's up to there, but for rounding, which grows with them."""
    request.want_params = True
    values, params = (t.cpu() for t in executor.run(request) if t is not None)
    lost = by_step(spec, values).isnan().any(-1)
    if not bool(lost.any()):
        return
    true = forward_parameters(model, spec, values.nan_to_num(0.0), request.cond)
    for k, t in enumerate(lost.int().argmax(1).tolist()):
        if bool(lost[k, t]) and not torch.allclose(true[k, t], params[k, t], rtol=1e-2, atol=1e-2, equal_nan=True):
            return
    check_drawn(spec, values, request.first)


class _Replay:
    """Watches forward as it is captured on real values, and computes what the nodes of a plan's graph say of each result."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.values: list[Tensor] = []
        self.errors: list[tuple[str, float]] = []

    def __call__(self, tr: Tracer, t: Tensor) -> None:
        for node in tr.nodes[len(self.values) :]:
            self.values.append(self._value(tr, node))
        ids = tr.ids(t)
        here = ids >= 0
        if not bool(here.any()) or t.is_complex():
            return
        ids, found = ids[here], t.detach()[here].double()
        wanted = torch.empty_like(found)
        for k in (ids >> 48).unique().tolist():
            own = ids[(ids >> 48) == k]
            wanted[(ids >> 48) == k] = self.values[k][(own >> 32) & 0xFFFF, row_of(own), col_of(own)]
        off = torch.where(found == wanted, 0.0, (found - wanted).abs() / found.abs().clamp(min=1))
        self.errors.append((f"layer {tr.path.current}: aten.{tr.call[1]}", float(off.nan_to_num(0.0).max())))

    def _value(self, tr: Tracer, node: Node) -> Tensor:
        if isinstance(node, InputNode):
            x = torch.zeros(node.channels, *node.grid, dtype=torch.float64)
            ids = tr.ids(tr.sampled)
            x[(ids >> 32) & 0xFFFF, row_of(ids), col_of(ids)] = tr.sampled.double()
            return x
        if isinstance(node, CondNode):
            return tr.call_args[tr.points[node.point][3]].detach().double().reshape(-1)[node.gather]
        planned = self.graph.nodes[node.index] if node.index < len(self.graph.nodes) else node
        return (planned if type(planned) is type(node) or planned.linear else node).value(self.values)

    @property
    def first(self) -> tuple[str, float] | None:
        """The first operation whose result differs, and by how much, relative to itself or to 1."""
        for least in (1e-3, 1e-4, 1e-5):
            found = next((e for e in self.errors if e[1] > least), None)
            if found is not None:
                return found
        return None


def first_difference(model: nn.Module, plan: Plan, cond: tuple[Any, ...]) -> str:
    """What to say of a plan that does not reproduce forward: at which layer, for a conditioning (batch 1)."""
    spec, replay = plan.spec, _Replay(plan.graph)
    x = spec.encode(spec.example_values(1))
    try:
        capture(
            model, x, cond, spec.input_channels, spec.grid, spec.laid_out, spec.parameters, spec.input_range, replay
        )
    except (FastgenError, *FORWARD_ERRORS) as error:
        return f"and on other values it cannot be planned: {error}"
    if replay.first is None:
        return "every layer agrees with its plan, so that it is the program made of it that differs; please report it"
    where, off = replay.first
    return f"{where} is the first whose result is not what was planned (off by {off:.1e}); please report it"
