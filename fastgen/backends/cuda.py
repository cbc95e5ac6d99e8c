"""The CUDA executor: one persistent kernel runs the whole loop, with no launch and no Python per step."""

from __future__ import annotations

import itertools
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from fastgen.backends.base import Cancelled, Request
from fastgen.backends.cpu import native
from fastgen.backends.team import Lowered, TeamExecutor
from fastgen.errors import FastgenError, UnsupportedError
from fastgen.plan.build import Plan
from fastgen.plan.harvest import Harvester

TEAMS = ("auto", "cluster16", "cluster8", "grid", "cta")
MOST_SLOTS = 8192
MEMORY_SHARE = 0.8  # of what is free may go to the state of samples in flight
_lost: list[Tensor] = []  # pinned memory that a kernel which was given up may still write to


def cuda_device(device: torch.device) -> tuple[torch.device, dict[str, Any]]:
    """The device with its index, and what it is. Raises UnsupportedError where it cannot be used, saying why."""
    if not native().has_cuda:
        raise UnsupportedError(
            f"device='{device}': the extension was built without CUDA (no nvcc that works, or FASTGEN_CUDA=OFF); install "
            "the CUDA toolkit, 12.0 or newer, and build again"
        )
    if torch.version.cuda is None:
        raise UnsupportedError(f"device='{device}': this torch ({torch.__version__}) is built without CUDA")
    if not torch.cuda.is_available():
        raise UnsupportedError(f"device='{device}': torch finds no CUDA device (no GPU, or no driver that fits)")
    index = torch.cuda.current_device() if device.index is None else device.index
    try:
        properties = native().cuda_device(index)
    except native().CudaError as error:
        raise UnsupportedError(f"device='{device}': {error}") from error
    refuse_capture(torch.device("cuda", index))
    return torch.device("cuda", index), properties


def refuse_capture(device: torch.device) -> None:
    """Raises FastgenError while the current stream is being captured into a CUDA graph."""
    if native().is_capturing(device.index, torch.cuda.current_stream(device).cuda_stream):
        raise FastgenError(
            f"{device}: the current stream is being captured into a CUDA graph, which cannot hold sampling: that allocates, "
            "copies and waits; sample before or after the capture"
        )


class CudaExecutor(TeamExecutor):
    """float32 arithmetic, or bfloat16 or float16 products with float32 sums; runs on the caller's current stream, and
    waits for it: a callback must not give that stream work of its own.

    team: which rung of the ladder (clusters of 16 or 8 CTAs, teams that meet in memory, single CTAs); "auto" takes the
    first that the device can hold. `rung(slots)["text"]` says which.
    """

    name = "cuda"

    def __init__(
        self, plan: Plan, harvester: Harvester, dtype: torch.dtype, device: torch.device, team: str = "auto"
    ) -> None:
        device, self.properties = cuda_device(device)
        self.team = team
        super().__init__(plan, harvester, dtype, device, int(self.properties["shared_bytes"]))
        try:
            self.limits: dict[str, Any] = self._native.cuda_limits(device.index, self.precision, self.shared_bytes)
        except self._native.CudaError as error:
            raise UnsupportedError(f"{device} ({self.properties['name']}): {error}") from error
        self.rung(1)
        self.lowered(None)

    def rung(self, slots: int) -> dict[str, Any]:
        """The teams that run so many samples: {kind, ctas, teams, text}."""
        rung: dict[str, Any] = self._native.choose_rung(self.limits, slots, self.team)
        return rung

    def describe(self) -> str:
        """One line for the plan: device, precision, teams, what was lowered."""
        low = self.lowered(None)
        many = self.rung(MOST_SLOTS)["text"]
        return (
            f"{self.properties['name']}, {self.precision} products; one sample: {self.rung(1)['text']}, many: {many}; "
            f"{low.stages} stages, {low.column_stages} of them whole columns"
        )

    def slots(self, length: int | None) -> int:
        """As many samples at once as the free memory holds. Raises FastgenError where it holds none."""
        each = 4 * self.lowered(length).arena
        free = torch.cuda.mem_get_info(self.device)[0]
        reusable = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        fit = int(MEMORY_SHARE * (free + reusable)) // each
        if fit < 1:
            raise FastgenError(f"{self.device}: one sample needs {each} bytes of state, and {free} are free")
        return min(MOST_SLOTS, fit)

    def aside(self) -> AbstractContextManager[Any]:
        """A stream that waits for what the caller's stream was given so far, and that the caller's does not wait for."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(stream)

    def ready(self) -> None:
        """Nothing may be captured, asked before anything is given to the stream."""
        refuse_capture(self.device)

    def run(self, request: Request) -> tuple[Tensor, Tensor | None]:
        """See Executor; results are on the executor's device. Releases the GIL."""
        self.ready()
        return super().run(request)

    def _values(self, request: Request, *shape: int) -> Tensor:
        """In pinned memory where the caller follows the run: the kernel writes there itself, so that news need no copy,
        which on a full device might wait for the end."""
        if request.out is None:
            return super()._values(request, *shape)
        return torch.zeros(*shape, dtype=torch.float32, pin_memory=True)

    def _launch(self, launch: dict[str, Any], request: Request, out: Tensor, lowered: Lowered) -> None:
        native_ = self._native
        rung = self.rung(request.slots)
        teams = int(rung["teams"])
        sizes = {
            "barrier": native_.BARRIER_BYTES * teams, "fault": native_.FAULT_BYTES, "cancel": 8, "stop": 4 * teams,
            "pulse": 4 * teams,
        }  # fmt: skip
        words = torch.zeros(sum(sizes.values()), dtype=torch.uint8, device=self.device)
        control = torch.zeros(native_.CONTROL_BYTES * (2 * teams + 1), dtype=torch.uint8, pin_memory=True)
        addresses = itertools.accumulate(sizes.values(), initial=words.data_ptr())
        launch |= dict(zip(sizes, addresses, strict=False), control=control.data_ptr())
        stream = torch.cuda.current_stream(self.device)
        # Of another priority than torch hands out otherwise: a stream that nobody waits on, of a pool of its own.
        side = torch.cuda.Stream(self.device, priority=-1)
        news = _News(request, out, self.plan.spec.order is None, lowered)
        try:
            done = native_.run_on_device(
                {**launch, "teams": teams}, self.device.index, stream.cuda_stream, side.cuda_stream, rung,
                self.precision, self.shared_bytes, news if request.progress is not None else None,
            )  # fmt: skip
        except (native_.CudaError, native_.LostPartner) as error:
            raise FastgenError(f"{self.device}: {error}") from error
        except native_.NeverEnded as error:
            _lost.extend((control, out))
            raise FastgenError(f"{self.device}: {error}; this process can use the device no more") from error
        if done < lowered.program.steps or news.refused:
            raise Cancelled


class _News:
    """Told of finished steps while the kernel runs: hands on what is new of `out`, and tells the caller."""

    def __init__(self, request: Request, out: Tensor, raster: bool, lowered: Lowered) -> None:
        self.request, self.out, self.raster = request, out, raster
        self.phases, self.sites = int(lowered.program.head["phases"]), 0
        self.refused = False  # the caller said no, be it at the last step

    def __call__(self, steps: int) -> bool:
        if self.request.out is not None:
            first, last = (self.sites, steps // self.phases) if self.raster else (0, self.out.shape[1])
            self.request.out[:, first:last] = self.out[:, first:last]
            self.sites = last
        assert self.request.progress is not None
        self.refused = self.request.progress(steps) is False
        return not self.refused
