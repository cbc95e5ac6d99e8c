"""Capture: run forward once on real tensors and record, in shadow memory, which plan element every number is.

Weight norm, masks, dtype casts of weights and the like simply execute; only what meets a sampled value needs a rule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.capture.dispatch import Dispatcher, Watch
from fastgen.capture.fit import Irregular
from fastgen.capture.ids import COND, node_ids, sites
from fastgen.capture.operands import Elements, elements, pieces
from fastgen.capture.python_calls import PythonCalls
from fastgen.capture.reads import check_reads
from fastgen.capture.signature import forms
from fastgen.capture.tracer import Tracer
from fastgen.errors import FastgenError, UnsupportedError
from fastgen.forward import ModulePath, first_tensor, plain, try_forward
from fastgen.graph.bounds import Range
from fastgen.graph.maps import MapNode
from fastgen.graph.node import OUTPUT, Graph
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
    watch: Watch | None = None,
    plans_conditioning: bool = True,
) -> Graph:
    """Runs model(x, *cond) at batch 1 and returns its graph.

    The sampled tensor has `channels` (encoded) at each site of `grid`; `laid_out` shapes [1, channels, sites] like x, and
    `parameters_of` turns forward's output (values or ids alike) into [1, H, W, phases, P]. `limits`: between which numbers
    the sampled tensor's lie. watch: is shown every result of an operation, as it is made. plans_conditioning: whether a
    convolution of conditioning along a sequence is planned, or left to a run at call time. Raises UnsupportedError and
    ShapeError; NotCausalError comes later (plan/ready.py).
    """
    path = ModulePath()
    tracer = Tracer(path, grid, limits)
    tracer.plans_conditioning = plans_conditioning
    with neutral(), path.watching():
        x, *cond_list = (plain(t) for t in (x, *cond))
        cond = tuple(cond_list)
        try_forward(model, x, tuple(map(plain, cond)))
        tracer.add(InputNode, "input", channels, grid)
        tracer.sampled = x
        tracer.put(x, laid_out(node_ids(0, channels, grid)[None]))
        for t in cond:
            if isinstance(t, Tensor):
                tracer.put(t, torch.full(t.shape, COND, dtype=torch.int64))
        with Dispatcher(tracer, watch), PythonCalls(tracer):
            try:
                out = model(x, *cond)
            except FastgenError:
                raise
            except NotImplementedError as error:  # of torch: what cannot run under a mode
                reason = str(error).strip().splitlines()[0]
                raise UnsupportedError(f"layer {path.current}: torch cannot show what runs there: {reason}") from error
            except Exception as error:  # forward itself has just run
                reason = (str(error).strip() or "no reason given").splitlines()[0]
                raise UnsupportedError(
                    f"layer {path.current}: forward runs, but not while it is watched, after aten.{tracer.call[1]}: "
                    f"{type(error).__name__}: {reason}"
                ) from error
        if any(tracer.reads):
            other = copied(model)  # what follows an error is not to be done to the module
            tracer.notes += check_reads(tracer.reads, lambda: other(plain(x), *map(plain, cond)))
    return _finish(tracer, first_tensor(out), parameters_of, forms(cond))


def _finish(tr: Tracer, out: Tensor, parameters_of: Callable[[Tensor], Tensor], example: tuple[Any, ...]) -> Graph:
    """Adds one node per phase with the head's parameters at the data's sites, in the head's own order."""
    tr.path.stack = [OUTPUT[0]]
    tr.enter(OUTPUT[1], [out])
    e = elements(tr, out.detach()).arranged(lambda t: parameters_of(t.contiguous()))
    e = Elements(out, e.ids, e.values, e.where)
    ids = e.ids
    if len(ids) != 1:
        raise UnsupportedError(f"forward returned parameters of {len(ids)} samples for one")
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
    by_phase = e.arranged(lambda t: t[0].permute(2, 0, 1, 3).reshape(phases, height * width, count))
    for f in range(phases):
        try:
            operand = pieces(tr, by_phase.lanes([f]).arranged(lambda t: t[0].t()), i, j, (height, width))
        except Irregular as error:
            raise UnsupportedError(f"forward's output: {error}") from error
        params.append(tr.add(MapNode, "params", count, (height, width), fn="copy", operands=[operand]).index)
    answers = [None if r is None else r.answer for r in tr.reads]
    return Graph(
        tr.nodes, params, tr.points, tr.notes, dict(tr.calls), tr.numbers, answers, tr.limits, tr.ranges.known[0],
        tr.shapes, example,
    )  # fmt: skip
