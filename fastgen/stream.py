"""Streaming: rows or chunks of samples while they are being made."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fastgen.backends.base import Executor
from fastgen.backends.request import Request
from fastgen.checks import check_drawn
from fastgen.errors import Cancelled
from fastgen.spec import Spec
from fastgen.view import neutral


def stream(executor: Executor, spec: Spec, request: Request) -> Iterator[Tensor]:
    """Yields what is new of request's samples; the run goes on in a thread that ends with the iterator."""
    news: queue.Queue[int | BaseException] = queue.Queue()
    stop = threading.Event()
    unit = spec.grid[1] if not spec.sequence else 1
    with neutral():
        request.out = torch.zeros(request.slots, spec.grid[0] * spec.grid[1], spec.channels, dtype=torch.float32)
        # Steps after which the first 1, 2, ... units are complete, in whatever order the sites are drawn.
        ends = spec.timeline.table.amax(0).reshape(-1, unit).amax(1).cummax(0)[0] + 1

    def progress(steps: int) -> bool:
        news.put(steps)
        return not stop.is_set()

    aside = executor.aside()

    def work() -> None:
        try:
            with neutral(), aside:
                executor.run(request)
            news.put(spec.steps)
        except Cancelled:
            pass
        except BaseException as error:
            news.put(error)

    request.progress = progress
    worker = threading.Thread(target=work, name="fastgen-stream")
    worker.start()
    try:
        done = 0
        while done < spec.grid[0] * spec.grid[1]:
            item = news.get()
            if isinstance(item, BaseException):
                raise item
            sites = int(torch.searchsorted(ends, item, right=True)) * unit
            if sites > done:
                with neutral():
                    check_drawn(spec, torch.where(_drawn(request.out, done, sites), request.out, 0.0), request.first)
                yield _chunk(spec, request.out, done, sites).to(executor.device)
                done = sites
    finally:
        stop.set()
        worker.join()


def _drawn(out: Tensor, a: int, b: int) -> Tensor:
    """Whether values [n, H*W, C] are at sites a to b."""
    site = torch.arange(out.shape[1])
    return ((site >= a) & (site < b))[:, None].expand(out.shape[1:]).expand(out.shape)


@neutral()
def _chunk(spec: Spec, out: Tensor, a: int, b: int) -> Tensor:
    part = out[:, a:b].clone()
    if spec.vector:
        return spec.result(part)
    axes = dict(zip(spec.layout, spec.shape, strict=True))
    if spec.sequence:
        axes["T"] = b - a
    else:
        axes["H"] = (b - a) // spec.grid[1]
    return replace(spec, shape=tuple(axes.values()), order=None).result(part)
