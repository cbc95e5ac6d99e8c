"""What is wrong with a forward: probabilities where logits belong, NaN, random numbers, samples that mix."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastgen.backends.request import Request
from fastgen.errors import UnsupportedError
from fastgen.graph.node import Graph
from fastgen.spec import Spec
from fastgen.teacher_forced import forward_parameters
from fastgen.variations import batched


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


def diagnose(model: nn.Module, spec: Spec, request: Request) -> str:
    """Why verification may have failed: forward gives NaN, is random, or mixes the samples of a batch."""
    n = 2
    values = spec.example_values(n)
    cond = tuple(c[:1].expand(n, *c.shape[1:]) if batched(c) else c for c in request.cond)
    with _first_nan(model) as culprit:
        first = forward_parameters(model, spec, values, cond)
    if bool(first.isnan().any()):
        return f"forward gives NaN, from {f'layer {culprit[0]}' if culprit and culprit[0] else 'its own code'} on"
    again = forward_parameters(model, spec, values, cond)
    if not torch.equal(first, again):
        return "forward gives different results on the same input: it is random even in eval mode (dropout?)"
    one = tuple(c[:1] if batched(c) else c for c in cond)
    alone = forward_parameters(model, spec, values[:1], one)
    if float((first[:1] - alone).abs().max()) > 1e-3 * max(1.0, float(alone.abs().max())):
        return "forward mixes the samples of a batch: a sample's parameters change with what else is in it"
    return "the plan does not reproduce this module; please report it"
