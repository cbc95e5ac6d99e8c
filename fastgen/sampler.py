"""The sampler: what compile gives, and all that can be asked of it."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.backends.base import CompiledExecutor, Executor
from fastgen.backends.conditioning import Conditioning
from fastgen.checks import check_drawn, scored_values, whole_number
from fastgen.errors import FastgenError
from fastgen.likelihood import bits_per_dim, log_prob
from fastgen.plan.plan import Plan
from fastgen.planned import Choice, Planned
from fastgen.program.programs import Programs
from fastgen.progress import Bar, Callback
from fastgen.spec import Spec
from fastgen.stream import stream
from fastgen.verify import VerifyReport
from fastgen.view import neutral


class Sampler:
    """Samples of one module; made by :func:`compile`.

    Attributes: plan (what runs per row and per site; print it), spec, receptive_field, backend.
    """

    _frozen = False

    def __init__(self, model: nn.Module, spec: Spec, cond: tuple[Any, ...], choice: Choice) -> None:
        self._model: Callable[[], nn.Module | None] = lambda: model
        self.example, self._spec, self._choice = cond, spec, choice
        self._planning = threading.RLock()
        self.planned: Planned
        self.refresh()

    @neutral()
    def refresh(self, changed: bool = False) -> None:
        """Plans again with the module's present weights, and proves that as compile does. changed: only if they changed;
        another thread may have done it. Raises what compile does; the sampler is then what it was."""
        with self._planning:
            if not changed or next(self.planned.changes(), None) is not None:
                self.planned = Planned(self.model, self._spec, self.example, self._choice)

    def with_executor(self, executor: Executor) -> Sampler:
        """Another sampler of the same plan, that runs it in another way."""
        other = copy.copy(self)
        other.planned = copy.copy(self.planned)
        other.planned.executor = executor
        return other

    def frozen(self) -> Sampler:
        """The same sampler for a service that promises not to change its model: nothing is looked at before a call."""
        other = copy.copy(self)
        other._frozen = True
        return other

    def let_go(self) -> None:
        """Does not keep its model alive from here on: whoever asks does."""
        self._model = weakref.ref(self.model)

    @property
    def model(self) -> nn.Module:
        """The person's module."""
        model = self._model()
        if model is None:
            raise FastgenError("the model of this sampler is gone")
        return model

    @property
    def nbytes(self) -> float:
        """About what it holds beside the model: constants as captured, as cut to size, and as packed."""
        return 3.0 * self.programs().weights.nbytes

    @property
    def spec(self) -> Spec:
        """What a sample is, and how forward takes and gives it."""
        return self.planned.spec

    @property
    def plan(self) -> Plan:
        """What runs per row and per site; print it."""
        return self.planned.plan

    @property
    def programs(self) -> Programs:
        """The plan as executors take it."""
        return self.planned.programs

    @property
    def conditioning(self) -> Conditioning:
        """What is asked of forward in a call."""
        return self.planned.conditioning

    @property
    def executor(self) -> Executor:
        """What runs the plan."""
        return self.planned.executor

    @property
    def backend(self) -> str:
        """The name of the executor."""
        return self._choice.backend

    @property
    def dtype(self) -> torch.dtype:
        """Of weights."""
        executor = self.executor
        return executor.dtype if isinstance(executor, CompiledExecutor) else self._choice.dtype

    @property
    def any_length(self) -> bool:
        """A sequence whose length no conditioning decides."""
        return self.planned.any_length

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
        planned = self._unchanged()
        request = planned.request(n, seed, cond, temperature, given, mask, first, length)
        planned.look_at(request)
        spec, executor = planned.spec_at(length), planned.executor
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

    def stream(
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
    ) -> Iterator[Tensor]:
        """Rows (images) or chunks (sequences) of all n samples as they are made; closing the iterator cancels.

        Options are those of sample. Yields [n, C, rows, W] or [n, C, k], index layouts
        without their C. Joined along the row or time axis they are what sample returns.
        """
        planned = self._unchanged()
        request = planned.request(n, seed, cond, temperature, given, mask, first, length)
        planned.look_at(request)
        return stream(planned.executor, planned.spec_at(length), request) if request.slots else iter(())

    @neutral()
    def log_prob(self, x: Tensor, cond: tuple[Any, ...] | None = None) -> Tensor:
        """Log-likelihood of samples x [n, *shape] in nats: [n] (densities where values are continuous)."""
        planned = self.planned
        spec, values = _values(planned, x)
        return log_prob(planned.view, spec, values, planned.cond(cond, len(x))).to(planned.executor.device)

    def bits_per_dim(self, x: Tensor, cond: tuple[Any, ...] | None = None) -> Tensor:
        """Negative log2-likelihood per value: [n]."""
        return bits_per_dim(self.log_prob(x, cond), _values(self.planned, x)[0])

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
        planned = self._unchanged()
        return planned.verify(n, seed, planned.proof_length() if length is None else length, temperature, first)

    @neutral()
    def explain(self) -> str:
        """Why verification may have failed: the first layer whose result is not what was planned.

        Raises UnsupportedError or NotCausalError where forward itself is at fault: it gives NaN, is random, mixes the samples
        of a batch, or reads the future.
        """
        return self.planned.explain()

    def _unchanged(self) -> Planned:
        """What is asked for a call, and kept for it: another thread may plan again meanwhile. Raises ModelChangedError."""
        planned = self.planned
        if self._frozen:
            planned.executor.ready()
        else:
            planned.check_unchanged()
        return planned

    def __copy__(self) -> Sampler:
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        return other

    def __reduce__(self) -> Any:
        """By its model and its plan, so that nothing is planned or proved again where it goes. Raises ModelChangedError where
        these are no longer of each other."""
        planned = self._unchanged()
        return _restored, (self.model, self._spec, self._choice, planned.state())


def _restored(model: nn.Module, spec: Spec, choice: Choice, state: dict[str, Any]) -> Sampler:
    made = object.__new__(Sampler)
    made._model = lambda: model
    made.example, made._spec, made._choice = state["example"], spec, choice
    made._planning = threading.RLock()
    with neutral():
        made.planned = Planned.restored(model, state)
    return made


def _values(planned: Planned, x: Tensor) -> tuple[Spec, Tensor]:
    long = planned.spec.sequence and isinstance(x, Tensor)
    spec = planned.spec_at(planned.spec.as_long_as(x).sites[0] if long else None)
    return spec, scored_values(spec, x)
