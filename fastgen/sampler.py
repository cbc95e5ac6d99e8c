"""The sampler: what compile gives, and all that can be asked of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.backends.base import Executor, Setting
from fastgen.backends.conditioning import Conditioning
from fastgen.backends.registry import EXECUTORS
from fastgen.backends.request import Request
from fastgen.checks import check_drawn, conditioning_of, known_values, scored_values, temperature_of, whole_number
from fastgen.diagnose import check_drift, check_forward, first_difference, reads_future
from fastgen.errors import FastgenError, ModelChangedError, NotCausalError, UnsupportedError
from fastgen.fingerprint import Fingerprint, check_finite
from fastgen.lengths import Looked, lengths_of
from fastgen.likelihood import bits_per_dim, log_prob
from fastgen.placement import in_float32, on_cpu
from fastgen.plan.build import build_plan
from fastgen.plan.plan import Plan
from fastgen.program.programs import Programs
from fastgen.progress import Bar, Callback
from fastgen.rng import seed_of
from fastgen.spec import Spec
from fastgen.stream import stream
from fastgen.variations import first_of, others, variations
from fastgen.verify import VerifyReport, verify
from fastgen.view import neutral, private_view, unwrapped

OTHERS = 2  # conditionings beside the example of compile that a proof is made with
VERIFY_SITES = 4096  # longer sequences are verified on their first so many sites


class Sampler:
    """Samples of one module; made by :func:`compile`.

    Attributes: plan (what runs per row and per site; print it), spec, receptive_field, backend.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: Spec,
        cond: tuple[Any, ...],
        backend: str,
        dtype: torch.dtype,
        threads: int | None,
        device: torch.device,
        team: str,
    ) -> None:
        self.model, self.spec, self.example, self.dtype, self.backend = model, spec, cond, dtype, backend
        self._threads, self._device, self._team = threads, device, team
        self._planning = threading.RLock()
        self.refresh()

    @neutral()
    def refresh(self, changed: bool = False) -> None:
        """Plans again with the module's present weights. changed: only if they changed; another thread may have done it."""
        with self._planning:
            if not changed or next(self._marks.changed(self._aside), None) is not None:
                self._refresh()

    def _refresh(self) -> None:
        check_finite(self.model)
        self.view, kinds = in_float32(private_view(self.model))
        # Planning, conditioning and proof are the CPU's, in float32: a GPU's own forward rounds to TF32.
        model = self.on_cpu = on_cpu(self.view)
        before = Fingerprint(model)
        self._plan(whole=False)
        if self.plan.schedule.sequence:
            kind = lengths_of(model, self.spec, self.example, self.plan.receptive_field[-1], self.plan.spec.sites[0])
            self._looked.free = kind != "refused"
            alone = kind == "refused" and not any(isinstance(c, Tensor) for c in self.example)
            if kind == "one" or alone or (kind == "ends" and not self._proved_along()):
                self._plan(whole=True)
        # What forward itself writes (counters, caches) is not the person's to change; weights that it masks are.
        self._aside = {place for place, _ in before.changed() if not place[0].endswith("_parameters")}
        if kinds:
            self.plan.notes["weights"] = f"{kinds}, computed in float32"
        self._marks = Fingerprint(unwrapped(self.model))

    def _plan(self, whole: bool) -> None:
        """Plans, and makes the executor. whole: a sequence for its own length alone."""
        model = self.on_cpu
        try:
            self.plan: Plan = build_plan(model, self.spec, self.example, whole)
        except UnsupportedError as error:
            future = reads_future(model, self.spec, first_of(self.example))
            if future is None:
                raise
            raise NotCausalError(f"{future} (asked of forward itself; {error})") from error
        self.spec = replace(self.spec, head=self.plan.spec.head, layout=self.plan.spec.layout)
        self.programs = Programs(self.plan)
        self.conditioning = Conditioning(model, self.plan.spec, self.plan.graph)
        setting = Setting(
            self.view, self.spec, self.programs, self.conditioning, self.dtype, self._device, self._threads, self._team
        )
        self.executor: Executor = EXECUTORS[self.backend].make(setting)
        if self.executor.describe():
            self.plan.notes[self.executor.name] = self.executor.describe()
        self._looked = Looked(model, self.plan, self.spec.sites[0], self.example)

    def _proved_along(self) -> bool:
        """Whether stepping is right at the sequence's own length and at a crooked one (or at their first sites)."""
        try:
            return all(
                self._verify(2, 0, n, t).ok for n, t in ((self._proof_length(), 1.0), (self.crooked_length, 0.8))
            )
        except (FastgenError, ValueError):
            return False

    def fix_length(self) -> bool:
        """Plans a sequence again for its own length alone, if that is not what was done."""
        if not self.plan.schedule.sequence:
            return False
        self._plan(whole=True)
        return True

    @property
    def crooked_length(self) -> int:
        """Another length than the planned one, and no multiple of anything."""
        return min(self.plan.spec.sites[0], 512) * 5 // 8 | 1

    @property
    def any_length(self) -> bool:
        """A sequence whose length no conditioning decides."""
        return self.plan.schedule.sequence and self._looked.free

    @property
    def receptive_field(self) -> tuple[int, ...]:
        """Extent of the inputs that one output sees: (rows, columns), or (length,) for sequences."""
        return self.plan.receptive_field

    @neutral()
    def sample(
        self,
        n: int,
        *,
        seed: int | torch.Generator = 0,
        cond: tuple[Any, ...] | None = None,
        temperature: float = 1.0,
        given: Tensor | None = None,
        mask: Tensor | None = None,
        first: int = 0,
        length: int | None = None,
        progress: bool = False,
        callback: Callback | None = None,
    ) -> Tensor:
        """Draws n samples: float32 or int64 [n, *shape] on the sampler's device, ready for log_prob and `given=`.

        seed: sample i of a seed depends on nothing else, neither on n nor on the batch. cond: forward's further inputs,
        batch n (or 1, shared); default: the example of compile. temperature: > 0, divides logits and multiplies scales.
        given, mask: values to keep where mask is true (in-painting, priming), shaped like the result. first: index of
        the first sample, so that shards agree with the whole. length: sites of a sequence. callback(done, total) is
        called as steps finish; returning False raises Cancelled. Raises ShapeError, ValueError, ModelChangedError.
        """
        self._check_weights()
        request = self._request(n, seed, cond, temperature, given, mask, first, length)
        self._look_at(request)
        spec, executor = self._spec_at(length), self.executor  # which another thread may replace (refresh)
        slots = executor.slots(request.length)
        nothing = torch.zeros(0, spec.grid[0] * spec.grid[1], spec.channels, dtype=torch.float32)
        parts = [nothing.to(executor.device)]
        with Bar(progress, spec.steps * n) as bar:
            for start in range(0, request.slots, slots):
                part = request.rows(start, min(request.slots, start + slots))
                part.progress = bar.watch(start * spec.steps, part.slots, spec.steps * n, callback)
                parts.append(executor.run(part)[0])
                check_drawn(spec, parts[-1], part.first)
        return spec.result(torch.cat(parts))

    def stream(self, n: int, **options: Any) -> Iterator[Tensor]:
        """Rows (images) or chunks (sequences) of all n samples as they are made; closing the iterator cancels.

        Options are those of sample, except progress and callback. Yields [n, C, rows, W] or [n, C, k], index layouts
        without their C. Joined along the row or time axis they are what sample returns.
        """
        length = options.get("length")
        defaults = dict(seed=0, cond=None, temperature=1.0, given=None, mask=None, first=0, length=None)
        unknown = set(options) - set(defaults)
        if unknown:
            raise TypeError(f"stream: unknown option {sorted(unknown)[0]!r}; expected {', '.join(defaults)}")
        self._check_weights()
        request = self._request(n, **{**defaults, **options})
        self._look_at(request)
        return stream(self.executor, self._spec_at(length), request) if request.slots else iter(())

    @neutral()
    def log_prob(self, x: Tensor, cond: tuple[Any, ...] | None = None) -> Tensor:
        """Log-likelihood of samples x [n, *shape] in nats: [n] (densities where values are continuous)."""
        spec, values = self._values(x)
        return log_prob(self.view, spec, values, self._cond(cond, len(x))).to(self.executor.device)

    def bits_per_dim(self, x: Tensor, cond: tuple[Any, ...] | None = None) -> Tensor:
        """Negative log2-likelihood per value: [n]."""
        return bits_per_dim(self.log_prob(x, cond), self._values(x)[0])

    @neutral()
    def verify(
        self, n: int = 2, seed: int = 0, length: int | None = None, temperature: float = 1.0, first: int = 0
    ) -> VerifyReport:
        """Samples n, runs forward once on the result, and compares every parameter and every draw.

        Samples have another conditioning than the example of compile, where forward takes one that is found, and of several
        the last is half given. Weights in low precision are proved in two steps: the plan in float32 against forward, and
        the executor against the plan with equally rounded weights.

        length: sites of a sequence; by default those of compile, and at most 4,096 where conditioning allows. Raises
        UnsupportedError where forward returns probabilities.
        """
        n = whole_number(n, "n", "a number of samples", least=1)
        self._check_weights()
        at = self._proof_length() if length is None else length
        return self._verify(n, seed, at, temperature, first, OTHERS)

    @neutral()
    def explain(self) -> str:
        """Why verification may have failed: the first layer whose result is not what was planned.

        Raises UnsupportedError or NotCausalError where forward itself is at fault: it gives NaN, is random, mixes the samples
        of a batch, or reads the future.
        """
        length = self._proof_length()
        spec = self._spec_at(length)
        request, cond = self._request(2, 0, None, 1.0, None, None, 0, length), first_of(self.example)
        request = variations(spec, request, others(self.on_cpu, spec, cond, 1))
        check_forward(self.on_cpu, spec, request)
        future = reads_future(self.on_cpu, spec, first_of(request.cond))
        if future is not None:
            raise NotCausalError(f"{future}, in a way that its layers do not show")
        check_drift(self.on_cpu, spec, self.executor, request)
        return first_difference(self.on_cpu, self.plan, first_of(request.cond))

    def _proof_length(self) -> int | None:
        return min(self.spec.sites[0], VERIFY_SITES) if self.any_length else None

    def _verify(
        self, n: int, seed: int, length: int | None, temperature: float, first: int = 0, most: int = 1
    ) -> VerifyReport:
        """most: other conditionings that samples of the proof have, and that are in a batch with them."""
        request = self._request(n, seed, None, temperature, None, None, first, length)
        request.want_params = True
        spec = self._spec_at(length)
        found = others(self.on_cpu, spec, first_of(self.example), most)
        request = variations(spec, request, found)
        return verify(self.on_cpu, spec, self.executor, request, self.plan.graph, self._threads, found[1:])

    def __copy__(self) -> Sampler:
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        return other

    def __reduce__(self) -> Any:
        raise TypeError(
            "a Sampler holds threads and native memory of this process, and is neither pickled nor copied; send the module "
            "and compile it there"
        )

    # ---- checks on entry -----------------------------------------------------------------------------------------
    @neutral()
    def _request(
        self,
        n: int,
        seed: Any,
        cond: Any,
        temperature: float,
        given: Any,
        mask: Any,
        first: int,
        length: int | None,
    ) -> Request:
        n = whole_number(n, "n", "a number of samples")
        first = whole_number(first, "first", "a sample index", most=(1 << 63) - 1 - n)
        spec = self._spec_at(length)
        known, where = known_values(spec, given, mask, n)
        # An image has no length; a plan for one length only says so when asked for another.
        at = spec.grid[1] if self.plan.schedule.sequence or spec is not self.spec else None
        return Request(n, seed_of(seed), first, temperature_of(temperature), self._cond(cond, n), known, where, at)

    def _spec_at(self, length: int | None) -> Spec:
        if length is None:
            return self.spec
        if not self.spec.sequence:
            raise ValueError(f"length={length!r}: only sequences have a length; samples are {self.spec.shape}")
        return self.spec.at_length(whole_number(length, "length", "a number of sites", least=1))

    def _look_at(self, request: Request) -> None:
        """Raises UnsupportedError where forward does something else at the request's length than the plan."""
        if self.spec.sequence and request.slots and not EXECUTORS[self.backend].oracle:
            one = replace(request.rows(0, 1), want_params=True, given=None, mask=None)
            spec, run = self.spec if one.length is None else self.spec.at_length(one.length), self.executor
            self._looked.check(spec, one.cond, lambda: verify(self.on_cpu, spec, run, one, threads=self._threads))

    def _values(self, x: Tensor) -> tuple[Spec, Tensor]:
        long = self.spec.sequence and isinstance(x, Tensor)
        spec = self._spec_at(self.spec.as_long_as(x).sites[0] if long else None)
        return spec, scored_values(spec, x)

    def _cond(self, cond: tuple[Any, ...] | None, n: int) -> tuple[Any, ...]:
        return conditioning_of(self.example, cond, n, self.spec.sequence)

    def _check_weights(self) -> None:
        self.executor.ready()  # first, as weights may be on its device
        name = next((name for _, name in self._marks.changed(self._aside)), None)
        if name is not None:
            raise ModelChangedError(
                f"{name} changed after the sampler was compiled; call sampler.refresh() (or compile again)"
            )
