"""Capture: run forward once on real tensors and record, in shadow memory, which plan element every number is.

Weight norm, masks, dtype casts of weights and the like simply execute; only what meets a sampled value needs a rule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.capture.dispatch import Dispatcher
from fastgen.capture.fit import Irregular, fit, pieces_of
from fastgen.capture.ids import COND, node_ids, sites
from fastgen.capture.python_calls import PythonCalls
from fastgen.capture.ranges import Range
from fastgen.capture.reads import check_reads
from fastgen.capture.tracer import Tracer
from fastgen.errors import UnsupportedError
from fastgen.forward import ModulePath, first_tensor, plain, try_forward
from fastgen.graph.maps import MapNode
from fastgen.graph.node import Graph
from fastgen.graph.refs import Pair
from fastgen.graph.sources import InputNode
from fastgen.view import copied, neutral


def capture(
    model: nn.Module,
    x: Tensor,
    cond: tuple[Any, ...],
    channels: int,
    grid: Pair,
    laid_out: Callable[[Tensor], Tensor],
    parameters_of: Callable[[Tensor], Tensor],
    limits: Range = None,
) -> Graph:
    """Runs model(x, *cond) at batch 1 and returns its graph.

    The sampled tensor has `channels` (encoded) at each site of `grid`; `laid_out` shapes [1, channels, sites] like x, and
    `parameters_of` turns forward's output (values or ids alike) into [1, H, W, phases, P]. `limits`: between which numbers
    the sampled tensor's lie. Raises UnsupportedError and ShapeError; NotCausalError comes later (plan/ready.py).
    """
    path = ModulePath()
    tracer = Tracer(path, grid, limits)
    with neutral(), path.watching():
        x, *cond_list = (plain(t) for t in (x, *cond))
        cond = tuple(cond_list)
        try_forward(model, x, tuple(map(plain, cond)))
        tracer.add(InputNode, "input", channels, grid)
        tracer.put(x, laid_out(node_ids(0, channels, grid)[None]))
        for t in cond:
            if isinstance(t, Tensor):
                tracer.put(t, torch.full(t.shape, COND, dtype=torch.int64))
        with Dispatcher(tracer), PythonCalls(tracer):
            try:
                out = model(x, *cond)
            except NotImplementedError as error:  # of torch: what cannot run under a mode
                reason = str(error).strip().splitlines()[0]
                raise UnsupportedError(f"layer {path.current}: torch cannot show what runs there: {reason}") from error
        if any(tracer.reads):
            other = copied(model)  # what follows an error is not to be done to the module
            tracer.notes += check_reads(tracer.reads, lambda: other(plain(x), *map(plain, cond)))
    return _finish(tracer, first_tensor(out), parameters_of)


def _finish(tr: Tracer, out: Tensor, parameters_of: Callable[[Tensor], Tensor]) -> Graph:
    """Adds one node per phase with the head's parameters at the data's sites, in the head's own order."""
    ids, values = parameters_of(tr.ids(out).contiguous()), parameters_of(out.contiguous())
    if not bool((ids >= 0).any()) and ids.shape[1] * ids.shape[2] * ids.shape[3] > 1:
        raise UnsupportedError(
            "forward's output does not depend on the sampled tensor as far as torch can see "
            "(is it computed outside torch, or by a custom autograd function?)"
        )
    height, width, phases, count = ids.shape[1:]
    blocked = tr.opaque_in(ids)
    if blocked is not None:
        raise UnsupportedError(tr.reason(blocked))
    i, j = sites(height, width)
    params = []
    tr.path.stack = ["output"]
    for f in range(phases):
        part = ids[0, :, :, f].reshape(height * width, count).t()
        value = values[0, :, :, f].reshape(height * width, count).t()
        try:
            groups, constant = fit(part, i, j)
            pieces = pieces_of(groups, constant, value, i, j, (height, width))
        except Irregular as error:
            raise UnsupportedError(f"forward's output: {error}") from error
        params.append(tr.add(MapNode, "params", count, (height, width), fn="copy", operands=[pieces]).index)
    answers = [None if r is None else r.answer for r in tr.reads]
    return Graph(tr.nodes, params, tr.points, tr.notes, dict(tr.calls), tr.numbers, answers)
