"""A module with the weights that it has now: its private view, the plan, what runs it, and the proof that it is right."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.backends.base import Executor, Setting
from fastgen.backends.conditioning import Conditioning
from fastgen.backends.registry import EXECUTORS
from fastgen.backends.request import Request
from fastgen.checks import conditioning_of, known_values, temperature_of, whole_number
from fastgen.diagnose import check_drift, check_forward, first_difference, reads_future
from fastgen.errors import FastgenError, ModelChangedError, NotCausalError, UnsupportedError, VerifyError
from fastgen.fingerprint import Fingerprint, check_finite
from fastgen.lengths import Looked, lengths_of
from fastgen.placement import in_float32, on_cpu
from fastgen.plan.build import MOST_SITES, build_plan
from fastgen.plan.plan import Plan
from fastgen.program.programs import Programs
from fastgen.rng import seed_of
from fastgen.spec import Spec
from fastgen.variations import first_of, others, variations
from fastgen.verify import VerifyReport, verify
from fastgen.view import neutral, private_view, unwrapped

OTHERS = 2  # conditionings beside the example of compile that a proof is made with
VERIFY_SITES = 4096  # longer sequences are verified on their first so many sites
# What is proved before a sampler is handed over is not what is most often asked for, so that nothing can be forgotten that
# this takes: both words of the seed and of a sample's index, and the temperature.
UNLIKE: dict[str, Any] = {"seed": (1 << 40) + 1, "first": (1 << 33) + 5, "temperature": 0.8}


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Without Python's garbage collector, which would look again and again at many small objects that are not garbage."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@dataclass(frozen=True)
class Choice:
    """What was chosen at compile, beside the module and its samples. proved: whether a plan is proved before it is used."""

    backend: str
    dtype: torch.dtype
    threads: int | None
    device: torch.device
    team: str
    proved: bool


class Planned:
    """Made anew where weights change; nothing in it is changed after it was made, so that threads may hold on to it."""

    @no_collection()
    def __init__(self, model: nn.Module, spec: Spec, example: tuple[Any, ...], choice: Choice) -> None:
        """example: conditioning, batch 1. Raises NotCausalError, UnsupportedError, ShapeError, VerifyError, FastgenError."""
        self.spec, self.example, self.choice = spec, example, choice
        check_finite(model)
        kinds = self._look_into(model)
        before = Fingerprint(self.on_cpu)
        self._plan(whole=False)
        if self.plan.schedule.sequence:
            reach, sites = self.plan.receptive_field[-1], self.plan.spec.sites[0]
            kind = lengths_of(self.on_cpu, self.spec, example, reach, sites)
            self.looked.free = kind != "refused"
            alone = kind == "refused" and not any(isinstance(c, Tensor) for c in example)
            if kind == "one" or alone or (kind == "ends" and not self._proved_along()):
                self._plan(whole=True)
        # What forward itself writes (counters, caches) is not the person's to change; weights that it masks are.
        self._aside = {place for place, _ in before.changed() if not place[0].endswith("_parameters")}
        if kinds:
            self.plan.notes["weights"] = f"{kinds}, computed in float32"
        self._marks = Fingerprint(unwrapped(model))
        if choice.proved and not EXECUTORS[choice.backend].oracle:
            self._prove()

    @classmethod
    def restored(cls, model: nn.Module, state: dict[str, Any]) -> Planned:
        """As it was when `state` was taken, of a model with the same weights: nothing is planned or proved again."""
        made = object.__new__(cls)
        vars(made).update({k: state[k] for k in ("spec", "example", "choice", "plan", "_aside")})
        made._look_into(model)
        made._make_executor()
        made.looked.restore(state["looked"])
        made._marks = Fingerprint(unwrapped(model))
        return made

    def state(self) -> dict[str, Any]:
        """All that it takes to go on elsewhere, but for the model."""
        kept = {k: getattr(self, k) for k in ("spec", "example", "choice", "plan", "_aside")}
        return {**kept, "looked": self.looked.state()}

    def _look_into(self, model: nn.Module) -> str:
        """Makes the private views; what the parameters are, if not float32."""
        self.view, kinds = in_float32(private_view(model))
        # Planning, conditioning and proof are the CPU's, in float32: a GPU's own forward rounds to TF32.
        self.on_cpu = on_cpu(self.view)
        return kinds

    def _plan(self, whole: bool) -> None:
        """Plans, and makes the executor. whole: a sequence for its own length alone."""
        try:
            self.plan: Plan = build_plan(self.on_cpu, self.spec, self.example, whole)
        except UnsupportedError as error:
            future = reads_future(self.on_cpu, self.spec, first_of(self.example))
            if future is None:
                raise
            raise NotCausalError(f"{future} (asked of forward itself; {error})") from error
        self.spec = replace(self.spec, head=self.plan.spec.head, layout=self.plan.spec.layout)
        self._make_executor()

    def _make_executor(self) -> None:
        choice = self.choice
        self.programs = Programs(self.plan)
        self.conditioning = Conditioning(self.on_cpu, self.plan.spec, self.plan.graph)
        setting = Setting(
            self.view, self.spec, self.programs, self.conditioning, choice.dtype, choice.device, choice.threads, choice.team
        )  # fmt: skip
        self.executor: Executor = EXECUTORS[choice.backend].make(setting)
        if self.executor.describe():
            self.plan.notes[self.executor.name] = self.executor.describe()
        self.looked = Looked(self.on_cpu, self.plan, self.spec.sites[0], self.example)

    # ---- weights ---------------------------------------------------------------------------------------------------
    def changes(self) -> Iterator[str]:
        """Names of what forward reads that is not what it was."""
        return (name for _, name in self._marks.changed(self._aside))

    def check_unchanged(self) -> None:
        """Raises ModelChangedError; and FastgenError where the executor cannot run now."""
        self.executor.ready()  # first, as weights may be on its device
        name = next(self.changes(), None)
        if name is not None:
            raise ModelChangedError(
                f"{name} changed after the sampler was compiled; call sampler.refresh() (or compile again)"
            )

    # ---- requests --------------------------------------------------------------------------------------------------
    @neutral()
    def request(
        self,
        n: int,
        seed: Any = 0,
        cond: Any = None,
        temperature: float = 1.0,
        given: Any = None,
        mask: Any = None,
        first: int = 0,
        length: int | None = None,
    ) -> Request:
        """What a caller of Sampler.sample asks for, checked. Raises ShapeError, TypeError, ValueError."""
        n = whole_number(n, "n", "a number of samples")
        first = whole_number(first, "first", "a sample index", most=(1 << 63) - 1 - n)
        spec = self.spec_at(length)
        known, where = known_values(spec, given, mask, n)
        # An image has no length; a plan for one length only says so when asked for another.
        at = spec.grid[1] if self.plan.schedule.sequence or spec is not self.spec else None
        return Request(n, seed_of(seed), first, temperature_of(temperature), self.cond(cond, n), known, where, at)

    def cond(self, cond: tuple[Any, ...] | None, n: int) -> tuple[Any, ...]:
        """Conditioning of n samples; None: the example of compile."""
        return conditioning_of(self.example, cond, n, self.spec.sequence)

    def spec_at(self, length: int | None) -> Spec:
        """The spec of samples of so many sites; None: of the length of compile."""
        if length is None:
            return self.spec
        if not self.spec.sequence:
            raise ValueError(f"length={length!r}: only sequences have a length; samples are {self.spec.shape}")
        return self.spec.at_length(whole_number(length, "length", "a number of sites", least=1))

    def look_at(self, request: Request) -> None:
        """Raises UnsupportedError where forward does something else at the request's length than the plan."""
        if self.spec.sequence and request.slots and not EXECUTORS[self.choice.backend].oracle:
            one = replace(request.rows(0, 1), want_params=True, given=None, mask=None)
            spec = self.spec if one.length is None else self.spec.at_length(one.length)
            self.looked.check(
                spec, one.cond, lambda: verify(self.on_cpu, spec, self.executor, one, threads=self.choice.threads)
            )

    # ---- proof -----------------------------------------------------------------------------------------------------
    @property
    def crooked_length(self) -> int:
        """Another length than the planned one, and no multiple of anything."""
        return min(self.plan.spec.sites[0], 512) * 5 // 8 | 1

    @property
    def any_length(self) -> bool:
        """A sequence whose length no conditioning decides."""
        return self.plan.schedule.sequence and self.looked.free

    def proof_length(self) -> int | None:
        """The length that a sequence is proved at."""
        return min(self.spec.sites[0], VERIFY_SITES) if self.any_length else None

    def verify(
        self, n: int = 2, seed: int = 0, length: int | None = None, temperature: float = 1.0, first: int = 0,
        most: int = OTHERS,
    ) -> VerifyReport:  # fmt: skip
        """See Sampler.verify. length: None for that of compile. most: other conditionings that samples of the proof have, and
        that are in a batch with them."""
        request = self.request(n, seed, None, temperature, None, None, first, length)
        request.want_params = True
        spec = self.spec_at(length)
        found = others(self.on_cpu, spec, first_of(self.example), most)
        request = variations(spec, request, found)
        return verify(self.on_cpu, spec, self.executor, request, self.plan.graph, self.choice.threads, found[1:])

    def _proved_along(self) -> bool:
        """Whether stepping is right at the sequence's own length and at a crooked one (or at their first sites)."""
        return self._proved_at(self.proof_length(), most=1) and self._proved_at(
            self.crooked_length, most=1, temperature=0.8
        )

    def _proved_at(self, length: int | None, **options: Any) -> bool:
        """Whether stepping is right at a length; not where the plan, or forward, has none there."""
        try:
            return self.verify(length=length, **options).ok
        except (FastgenError, ValueError):
            return False

    def _prove(self) -> None:
        """Raises VerifyError where stepping does not reproduce forward, and UnsupportedError where forward is at fault."""
        try:
            self._prove_lengths()
        except (UnsupportedError, VerifyError) as error:
            name = next(self.changes(), None)
            if name is not None:
                raise UnsupportedError(
                    f"{name} changes from one run of forward to the next (by its own code, or by training beside)"
                ) from error
            raise

    def _prove_lengths(self) -> None:
        if self.plan.schedule.sequence:
            if self._proved_as_planned():
                return
            self._plan(whole=True)  # its sites are not alike
        report = self.verify(length=self.proof_length(), **UNLIKE)
        if not report.ok:
            raise VerifyError(f"stepping does not reproduce forward ({report}): {self.explain()}")

    def _proved_as_planned(self) -> bool:
        """Whether a sequence is right at its own length, and at a crooked one where it may have any. Raises what says why it
        can be right at none, where it is too long to be planned site by site."""
        try:
            right = self.verify(length=self.proof_length(), **UNLIKE).ok
            return right and (not self.any_length or self.verify(length=self.crooked_length).ok)
        except (FastgenError, ValueError):
            if self.spec.sites[0] > MOST_SITES:
                raise
            return False

    def explain(self) -> str:
        """See Sampler.explain."""
        length = self.proof_length()
        spec = self.spec_at(length)
        request = variations(spec, self.request(2, length=length), others(self.on_cpu, spec, first_of(self.example), 1))
        check_forward(self.on_cpu, spec, request)
        future = reads_future(self.on_cpu, spec, first_of(request.cond))
        if future is not None:
            raise NotCausalError(f"{future}, in a way that its layers do not show")
        check_drift(self.on_cpu, spec, self.executor, request)
        return first_difference(self.on_cpu, self.plan, first_of(request.cond))
