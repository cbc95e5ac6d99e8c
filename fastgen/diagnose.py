"""What is wrong with a forward (probabilities where logits belong, NaN, random numbers, samples that mix), or with a plan."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastgen.backends.base import Executor
from fastgen.backends.request import Request
from fastgen.capture.capture import capture
from fastgen.capture.ids import col_of, row_of
from fastgen.capture.ranges import Ranges
from fastgen.capture.tracer import Tracer
from fastgen.checks import check_drawn
from fastgen.errors import FastgenError, ShapeError, UnsupportedError
from fastgen.forward import FORWARD_ERRORS, refused
from fastgen.graph.maps import MapNode
from fastgen.graph.node import Graph, Node
from fastgen.graph.sources import CondNode, InputNode
from fastgen.plan.plan import Plan
from fastgen.spec import Spec
from fastgen.teacher_forced import by_step, forward_parameters, teacher_forced
from fastgen.variations import Others, batched
from fastgen.view import copied

RANDOM = (
    "forward gives different results on the same input: it is random even in eval mode (dropout?), or counts its calls"
)
MIXES = (
    "forward mixes the samples of a batch: a sample's parameters change with what else is in it (values or conditioning of the "
    "first used for all of them? a batch that is not the first axis?)"
)

LEAK_STEPS, LEAK_SECONDS = 64, 3.0  # of asking forward whether it reads the future


def check_logits(spec: Spec, graph: Graph, true: Tensor) -> None:
    """Raises UnsupportedError where forward's parameters [n, steps, P] are probabilities, and the head takes logits.

    Of classes: numbers that are nowhere negative and sum to one at every step, or such as are made of a softmax by sums,
    positive factors and limits. Of a coin: numbers from 0 to 1 that are made so of a sigmoid (or what has its range): sums
    of other terms may lie there by chance.
    """
    if not spec.head.discrete or not bool(((true >= 0) & (true <= 1.1)).all()):
        return
    if true.shape[-1] == 1:
        found, what, cure = bool((true <= 1).all()) and graph.made_of(_sigmoid(graph)), "from 0 to 1", "torch.logit(p)"
    else:
        found = bool(((true.sum(-1) - 1).abs() < 1e-4).all()) or graph.made_of(_softmax(graph))
        what, cure = "never negative, and sum to 1 at every step, or are made of what does", "torch.log(p)"
    if found:
        raise UnsupportedError(
            f"forward returns probabilities (its outputs are {what}), and {spec.head.name} takes logits; return {cure}"
        )


def _softmax(graph: Graph) -> Callable[[Node], bool]:
    """Whether a node is a quotient of an exponential."""

    def like(node: Node) -> bool:
        if not isinstance(node, MapNode) or node.fn != "div":
            return False
        return all(p.ref is not None and graph.nodes[p.ref.node].name == "exp" for p in node.operands[0])

    return like


def _sigmoid(graph: Graph) -> Callable[[Node], bool]:
    """Whether a node lies between 0 and 1 whatever sums it is made of; or is a softmax."""
    softmax, ranges = _softmax(graph), Ranges(graph.nodes, None, {n.index: None for n in graph.nodes if n.linear})

    def like(node: Node) -> bool:
        found = None if node.linear else ranges.of_node(node.index)
        return softmax(node) or (found is not None and 0 <= found[0] < found[1] <= 1)

    return like


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


def repeats(ask: Callable[[], Tensor]) -> bool:
    """Whether forward gives the same results on the same input; asked four times, as it may go in turns."""
    first = ask()
    return all(torch.equal(first, ask()) for _ in range(3))


def check_forward(model: nn.Module, spec: Spec, request: Request) -> None:
    """Raises UnsupportedError where forward gives NaN, is random, or mixes the samples of a batch, so that there is nothing
    to reproduce. request: of two samples or more."""
    values, cond = spec.example_values(request.slots), request.cond
    with _first_nan(model) as culprit:
        first = forward_parameters(model, spec, values, cond)
    if bool(first.isnan().any()):
        where = f"layer {culprit[0]}" if culprit and culprit[0] else "its own code"
        raise UnsupportedError(f"forward gives NaN, from {where} on")
    if not repeats(lambda: forward_parameters(model, spec, values, cond)):
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
        raise UnsupportedError(MIXES if repeats(lambda: forward_parameters(model, spec, values, cond)) else RANDOM)


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
        if not repeats(lambda: forward_parameters(model, spec, ours[:1], cond)):
            return None
        plain = [forward_parameters(model, spec, a[None], cond)[0] for a in ours]
        for step in sorted(steps, key=lambda t: t * 7919 % 8191):  # in no order, as not all may be asked
            for a, b, before in zip(ours, theirs, plain, strict=True):
                values = torch.where(drawn_at >= step, b, a)[None]
                after = forward_parameters(model, spec, values, cond)[0]
                late = _apart((before, after), step, 1e-4)
                if late is not None and _not_rounding(model, spec, (a[None], values), cond, (before, after), step):
                    row, column = divmod(int(spec.timeline.site[late]), spec.grid[1])
                    return f"the parameters of step {late} (row {row}, column {column}) change with values from step {step} on"
            if time.monotonic() - began > LEAK_SECONDS:
                break
    except (FastgenError, *FORWARD_ERRORS):
        pass
    return None


def _apart(both: tuple[Tensor, Tensor], step: int, least: float) -> int | None:
    """The first step, up to this one, at which two lots of parameters [steps, P] differ, relative to themselves or to 1."""
    before, after = (t[: step + 1].double() for t in both)
    off = ((after - before).abs() > least * before.abs().clamp(min=1)).any(-1)
    return int(off.nonzero()[0]) if bool(off.any()) else None


def _not_rounding(
    model: nn.Module,
    spec: Spec,
    values: tuple[Tensor, Tensor],
    cond: tuple[Any, ...],
    found: tuple[Tensor, Tensor],
    step: int,
) -> bool:
    """Whether a difference is there in float64 too; where forward does not run so, whether it is large."""
    try:
        double = copied(model).double()
        a, b = (teacher_forced(double, spec, v, cond, torch.float64)[0] for v in values)
    except Exception:  # of a module that cannot be copied, or a cast inside of forward
        return _apart(found, step, 1e-2) is not None
    return _apart((a, b), step, 1e-6) is not None


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
        self.lost = ""  # where the graph is another than the plan's, so that there is nothing more to compare

    def __call__(self, tr: Tracer, t: Tensor) -> None:
        if not self.lost:
            try:
                self._compare(tr, t)
            except Exception:  # of shapes that do not go together
                self.lost = f"layer {tr.path.current}: aten.{tr.call[1]}"

    def _compare(self, tr: Tracer, t: Tensor) -> None:
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
    if replay.first is None and replay.lost:
        return f"from {replay.lost} on another graph is captured with these values than was planned; please report it"
    if replay.first is None:
        return "every layer agrees with its plan, so that it is the program made of it that differs; please report it"
    where, off = replay.first
    return f"{where} is the first whose result is not what was planned (off by {off:.1e}); please report it"
