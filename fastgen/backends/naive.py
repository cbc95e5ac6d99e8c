"""The oracle: one whole forward per step, as a person samples without fastgen."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from fastgen import rng
from fastgen.backends.base import Executor, Setting
from fastgen.backends.request import Request
from fastgen.errors import Cancelled, FastgenError
from fastgen.forward import FORWARD_ERRORS, device_of, first_tensor, refused
from fastgen.spec import Spec
from fastgen.view import neutral


class NaiveExecutor(Executor):
    """Reruns forward for every draw and keeps one value of its output."""

    name = "naive"
    oracle = True

    def __init__(self, model: nn.Module, spec: Spec) -> None:
        self.model, self.spec = model, spec

    @classmethod
    def make(cls, setting: Setting) -> Self:
        """See Executor."""
        return cls(setting.model, setting.spec)

    def run(self, request: Request) -> tuple[Tensor, Tensor | None]:
        """See Executor."""
        spec = self.spec if request.length is None else self.spec.at_length(request.length)
        with neutral():
            return self._loop(spec, request)

    def _loop(self, spec: Spec, r: Request) -> tuple[Tensor, Tensor | None]:
        head = spec.head
        device = device_of(self.model)
        cond = tuple(c.to(device) if isinstance(c, Tensor) else c for c in r.cond)
        out = (
            torch.zeros(r.slots, spec.grid[0] * spec.grid[1], spec.channels, dtype=torch.float32)
            if r.out is None
            else r.out.zero_()
        )
        params = (
            torch.zeros(r.slots, spec.steps, head.num_params(spec.channels), dtype=torch.float32)
            if r.want_params
            else None
        )
        samples = torch.arange(r.slots) + r.first
        steps = spec.timeline
        for t, (site, f) in enumerate(zip(steps.site.tolist(), steps.phase.tolist(), strict=True)):
            if r.progress is not None and r.progress(t) is False:
                raise Cancelled
            x = spec.encode(out).to(device)
            try:
                theta = spec.parameters(first_tensor(self.model(x, *cond)))
            except FORWARD_ERRORS as error:
                raise error if isinstance(error, FastgenError) else refused(x, cond, error) from error
            theta = theta.reshape(r.slots, -1, spec.phases, theta.shape[-1])[:, site, f].float().cpu()
            if params is not None:
                params[:, t] = theta
            which = slice(0, spec.channels) if head.at_once else slice(f, f + 1)
            u = rng.uniforms(r.seed, samples, t, head.num_uniforms(spec.channels))
            value = head.draw(theta, u, r.temperature, r.known(site, which))
            out[:, site, which] = value
        if r.progress is not None and r.progress(spec.steps) is False:
            raise Cancelled
        return out, params
