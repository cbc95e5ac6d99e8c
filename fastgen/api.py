"""The face: compile a module to a Sampler, or sample in one line."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.backends.base import Cancelled, Executor, Request
from fastgen.backends.cpu import CpuExecutor
from fastgen.backends.cuda import TEAMS, CudaExecutor
from fastgen.backends.naive import NaiveExecutor
from fastgen.backends.reference import ReferenceExecutor
from fastgen.checks import known_values, temperature_of, whole_number
from fastgen.errors import FastgenError, ModelChangedError, ShapeError, VerifyError
from fastgen.fingerprint import changed, check_finite, fingerprint
from fastgen.heads import Head
from fastgen.likelihood import bits_per_dim, log_prob
from fastgen.placement import BACKENDS, device_of, on_cpu, placed
from fastgen.plan.build import Plan, build_plan
from fastgen.plan.harvest import Harvester
from fastgen.rng import seed_of
from fastgen.spec import Spec
from fastgen.stream import stream
from fastgen.verify import VerifyReport, diagnose, verify

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
        self.refresh()

    def refresh(self) -> None:
        """Plans again with the module's present weights."""
        check_finite(self.model)
        # Planning, conditioning and proof are the CPU's, in float32: a GPU's own forward rounds to TF32.
        model = self._on_cpu = on_cpu(self.model)
        self.plan: Plan = build_plan(model, self.spec, self.example)
        self.spec = replace(self.spec, head=self.plan.spec.head, vector=self.plan.spec.vector)
        harvester = Harvester(model, self.plan.spec, self.plan.graph)
        self.executor: Executor
        if self.backend == "naive":
            self.executor = NaiveExecutor(self.model, self.spec)
        elif self.backend == "cuda":
            self.executor = CudaExecutor(self.plan, harvester, self.dtype, self._device, self._team)
            self.plan.notes["cuda"] = self.executor.describe()
        elif self.backend == "reference":
            self.executor = ReferenceExecutor(self.plan, harvester, weight_dtype=self.dtype)
        else:
            self.executor = CpuExecutor(self.plan, harvester, self.dtype, self._threads)
        self._marks = fingerprint(self.model)

    @property
    def _any_length(self) -> bool:
        """A sequence whose length no conditioning decides."""
        return self.plan.layout.sequence and not any(isinstance(c, Tensor) for c in self.example)

    @property
    def receptive_field(self) -> tuple[int, ...]:
        """Extent of the inputs that one output sees: (rows, columns), or (length,) for sequences."""
        return self.plan.receptive_field

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
        callback: Callable[[int, int], bool | None] | None = None,
    ) -> Tensor:
        """Draws n samples: float32 or int64 [n, *shape] on the sampler's device, ready for log_prob and `given=`.

        seed: sample i of a seed depends on nothing else, neither on n nor on the batch. cond: forward's further inputs,
        batch n (or 1, shared); default: the example of compile. temperature: > 0, divides logits and multiplies scales.
        given, mask: values to keep where mask is true (in-painting, priming), shaped like the result. first: index of
        the first sample, so that shards agree with the whole. length: sites of a sequence. callback(done, total) is
        called as steps finish; returning False raises Cancelled. Raises ShapeError, ValueError, ModelChangedError.
        """
        request = self._request(n, seed, cond, temperature, given, mask, first, length)
        spec = self._spec_at(length)
        slots = self.executor.slots(request.length)
        nothing = torch.zeros(0, spec.grid[0] * spec.grid[1], spec.channels, dtype=torch.float32)
        parts = [nothing.to(self.executor.device)]
        with _Bar(progress, spec.steps * n) as bar:
            for start in range(0, request.slots, slots):
                part = _rows(request, start, min(request.slots, start + slots))
                part.progress = bar.watch(start * spec.steps, part.slots, spec.steps * n, callback)
                parts.append(self.executor.run(part)[0])
        return spec.result(torch.cat(parts))

    def stream(self, n: int, **options: Any) -> Iterator[Tensor]:
        """Rows (images) or chunks (sequences) of all n samples as they are made; closing the iterator cancels.

        Options are those of sample, except progress and callback. Yields [n, C, rows, W] or [n, C, k], index layouts
        without their C. Joined along the row or time axis they are what sample returns.
        """
        length = options.get("length")
        names = ("seed", "cond", "temperature", "given", "mask", "first", "length")
        unknown = set(options) - set(names)
        if unknown:
            raise TypeError(f"stream: unknown option {sorted(unknown)[0]!r}; expected {', '.join(names)}")
        defaults = {
            "seed": 0,
            "cond": None,
            "temperature": 1.0,
            "given": None,
            "mask": None,
            "first": 0,
            "length": None,
        }
        request = self._request(n, **{**defaults, **options})
        return stream(self.executor, self._spec_at(length), request) if request.slots else iter(())

    def log_prob(self, x: Tensor, cond: tuple[Any, ...] | None = None) -> Tensor:
        """Log-likelihood of samples x [n, *shape] in nats: [n] (densities where values are continuous)."""
        spec, values = self._values(x)
        return log_prob(self.model, spec, values, self._cond(cond, len(x))).to(self.executor.device)

    def bits_per_dim(self, x: Tensor, cond: tuple[Any, ...] | None = None) -> Tensor:
        """Negative log2-likelihood per value: [n]."""
        return bits_per_dim(self.log_prob(x, cond), self._values(x)[0])

    def verify(self, n: int = 2, seed: int = 0, length: int | None = None) -> VerifyReport:
        """Samples n, runs forward once on the result, and compares every parameter and every draw.

        length: sites of a sequence; by default those of compile, and at most 4,096 where conditioning allows.
        """
        n = whole_number(n, "n", "a number of samples", least=1)
        self._check_weights()
        if length is None and self._any_length:
            length = min(self.spec.sites[0], VERIFY_SITES)
        request = self._request(n, seed, None, 1.0, None, None, 0, length)
        request.want_params = True
        return verify(self._on_cpu, self._spec_at(length), self.executor, request, self.dtype)

    # ---- checks on entry -----------------------------------------------------------------------------------------
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
        self._check_weights()
        n = whole_number(n, "n", "a number of samples")
        first = whole_number(first, "first", "a sample index", most=(1 << 63) - 1 - n)
        spec = self._spec_at(length)
        known, where = known_values(spec, given, mask, n)
        # An image has no length; a plan for one length only says so when asked for another.
        at = spec.grid[1] if self.plan.layout.sequence or spec is not self.spec else None
        return Request(n, seed_of(seed), first, temperature_of(temperature), self._cond(cond, n), known, where, at)

    def _spec_at(self, length: int | None) -> Spec:
        if length is None:
            return self.spec
        if not self.spec.sequence:
            raise ValueError(f"length={length!r}: only sequences have a length; samples are {self.spec.shape}")
        length = whole_number(length, "length", "a number of sites", least=1)
        if length == self.spec.sites[0]:
            return self.spec
        if self.spec.order is not None:
            raise ValueError(
                f"length={length}: the order given at compile time holds for {self.spec.sites[0]} sites only"
            )
        return self.spec.at_length(length)

    def _values(self, x: Tensor) -> tuple[Spec, Tensor]:
        spec = self.spec
        if spec.sequence and x.dim() > 1:
            axis = spec.layout.index("T") + 1 if x.dim() == len(spec.layout) + 1 else -1
            spec = self._spec_at(x.shape[axis])
        return spec, spec.values(x)

    def _cond(self, cond: tuple[Any, ...] | None, n: int) -> tuple[Any, ...]:
        """Conditioning at batch n, checked against the example."""
        example = self.example
        cond = example if cond is None else tuple(cond) if isinstance(cond, tuple | list) else (cond,)
        if len(cond) != len(example):
            raise ShapeError(f"cond has {len(cond)} inputs; forward was compiled with {len(example)}")
        out = []
        for k, (c, e) in enumerate(zip(cond, example, strict=True)):
            if not isinstance(e, Tensor):
                if c is not e and c != e:
                    raise ValueError(f"cond[{k}] is {c!r}; it was bound to {e!r} at compile time")
                out.append(e)
                continue
            if not isinstance(c, Tensor) or c.dtype != e.dtype or c.dim() != e.dim():
                given = f"{c.dtype} {tuple(c.shape)}" if isinstance(c, Tensor) else type(c).__name__
                raise ShapeError(f"cond[{k}] is {given}; expected {e.dtype} [{n}, {', '.join(map(str, e.shape[1:]))}]")
            c = c.cpu()
            fixed = list(range(1, e.dim() - 1 if self.spec.sequence else e.dim()))
            if e.dim() and (c.shape[0] not in (1, n) or any(c.shape[a] != e.shape[a] for a in fixed)):
                raise ShapeError(
                    f"cond[{k}] has shape {tuple(c.shape)}; expected [{n}, {', '.join(map(str, e.shape[1:]))}]"
                )
            out.append(c.expand(n, *c.shape[1:]) if e.dim() else c)
        return tuple(out)

    def _check_weights(self) -> None:
        self.executor.ready()  # first, as weights may be on its device
        name = changed(self.model, self._marks)
        if name is not None:
            raise ModelChangedError(
                f"{name} changed after the sampler was compiled; call sampler.refresh() (or compile again)"
            )


def compile(
    model: nn.Module,
    shape: tuple[int, ...] | None = None,
    head: Head | None = None,
    cond: tuple[Any, ...] | None = None,
    *,
    layout: str | None = None,
    order: Tensor | None = None,
    predicts: str | None = None,
    start: float | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
    threads: int | None = None,
    team: str = "auto",
    verify: bool = True,
) -> Sampler:
    """Derives an exact incremental sampler from model.forward(x, *cond) -> parameters of the next value at every site.

    shape: one sample as forward takes it, without the batch: (C, H, W), (C, T), (T,); layout names the axes, by default
    from the rank. head: how parameters become a value (fastgen.heads). cond: example conditioning, batch 1. order:
    None for raster (channels in turn), or the step of every site. predicts: "same", or "next" when forward is fed the
    sample delayed by one with `start` in front. device: where to sample; None: where the module is. dtype: of weights,
    float32 or bfloat16; on a GPU, of weights and activations in products, float16 too. backend: auto (cpu or cuda, by
    the device), reference (torch) or naive (the slow loop). threads: of the cpu executor. team: of the cuda executor,
    what shares a sample's work: cluster16, cluster8, grid, cta, or auto, the first that the device can hold. A fastgen
    model knows shape, head and the rest itself.

    Raises NotCausalError (the module reads the future; names layer and tap), UnsupportedError (names the operation),
    ShapeError, VerifyError (stepping does not reproduce forward), all before a sampler exists.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; expected a torch.nn.Module")
    shape = shape if shape is not None else getattr(model, "sample_shape", None)
    head = head if head is not None else getattr(model, "head", None)
    if shape is None or not isinstance(head, Head):
        raise TypeError(
            f"{type(model).__name__} does not say what a sample is; pass shape= (one sample, without the batch) and "
            "head= (fastgen.heads.LogisticMixture, Categorical, Bernoulli or GaussianMixture)"
        )
    if cond is None:
        example: Any = getattr(model, "example_cond", tuple)
        cond = example()
    cond = tuple(cond) if isinstance(cond, tuple | list) else (cond,)
    at, backend = placed(model, device, backend)
    if team not in TEAMS:
        raise ValueError(f"team={team!r}: expected one of {', '.join(TEAMS)}")
    if threads is not None:
        threads = whole_number(threads, "threads", "a number of threads", least=1, most=1024)
    dtypes = (torch.float32, torch.bfloat16) + ((torch.float16,) if backend == "cuda" else ())
    if dtype not in dtypes:
        raise ValueError(f"dtype={dtype}: expected {' or '.join(map(str, dtypes))}")
    for k, c in enumerate(cond):
        if isinstance(c, Tensor) and c.dim() and c.shape[0] != 1:
            raise ShapeError(f"cond[{k}] has shape {tuple(c.shape)}; expected an example of batch 1")
    cond = tuple(c.cpu() if isinstance(c, Tensor) else c for c in cond)
    known: dict[str, Any] = {k: getattr(model, k, None) for k in ("layout", "predicts", "start")}
    layout, predicts = layout or known["layout"] or "", predicts or known["predicts"] or "same"
    spec = Spec(tuple(shape), head, layout, predicts, known["start"] if start is None else start, order)
    sampler = Sampler(model, spec, cond, backend, dtype, threads, at, team)
    if verify and backend != "naive":
        report = sampler.verify()
        if report.ok and sampler._any_length:  # another length too, a crooked one
            report = sampler.verify(length=min(sampler.plan.spec.sites[0], 512) * 5 // 8 | 1)
        if not report.ok:
            why = diagnose(sampler._on_cpu, sampler.spec, Request(2, 0, cond=cond))
            raise VerifyError(f"stepping does not reproduce forward ({report}): {why}")
    return sampler


_samplers: OrderedDict[tuple[Any, ...], Sampler] = OrderedDict()
_REMEMBERED = 8  # samplers that sample() keeps, and with them their modules


def sample(model: nn.Module, n: int, *, cond: tuple[Any, ...] | None = None, **options: Any) -> Tensor:
    """n samples of a model in one line; compiles once and remembers, for the last few models.

    Options of compile (shape, head, layout, predicts, start, dtype, backend, threads, verify) and of Sampler.sample.
    Weights that changed since are planned again.
    """
    names = (
        "shape",
        "head",
        "layout",
        "order",
        "predicts",
        "start",
        "device",
        "dtype",
        "backend",
        "threads",
        "team",
        "verify",
    )
    chosen = {k: options.pop(k) for k in names if k in options}
    if cond is not None:
        cond = tuple(cond) if isinstance(cond, tuple | list) else (cond,)
    key = (
        id(model),
        device_of(model),
        *((k, _key(v)) for k, v in chosen.items()),
        cond is None,
        *map(_kind, cond or ()),
    )
    found = _samplers.pop(key, None)  # a sampler holds its module and options, so their ids stay theirs
    if found is None:
        example = None if cond is None else tuple(c[:1] if isinstance(c, Tensor) and c.dim() else c for c in cond)
        found = compile(model, cond=example, **chosen)
        if len(_samplers) >= _REMEMBERED:
            _samplers.popitem(last=False)
    _samplers[key] = found
    try:
        return found.sample(n, cond=cond, **options)
    except ModelChangedError:
        found.refresh()
        return found.sample(n, cond=cond, **options)


def _key(option: Any) -> Any:
    """An option by value if it has one that can be compared, else by identity."""
    if isinstance(option, list):
        return tuple(option)
    return id(option) if isinstance(option, Tensor) else option


def _kind(c: Any) -> Any:
    """What a sampler binds of a conditioning input: all of it, or a tensor's type."""
    return (c.dtype, c.dim()) if isinstance(c, Tensor) else _key(c)


def _rows(r: Request, a: int, b: int) -> Request:
    """Samples a to b of a request."""
    cond = tuple(c[a:b] if isinstance(c, Tensor) and c.dim() else c for c in r.cond)
    given, mask = (None if t is None else t[a:b] for t in (r.given, r.mask))
    return Request(b - a, r.seed, r.first + a, r.temperature, cond, given, mask, r.length, r.want_params)


class _Bar:
    """tqdm, if wanted, and the caller's callback."""

    def __init__(self, wanted: bool, total: int) -> None:
        self.bar: Any = None
        if wanted:
            from tqdm.auto import tqdm

            self.bar = tqdm(total=total, unit="step", unit_scale=True)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            if error[0] is None:
                self.bar.update(self.bar.total - self.bar.n)
            self.bar.close()

    def watch(
        self, before: int, slots: int, total: int, callback: Callable[[int, int], bool | None] | None
    ) -> Callable[[int], bool | None] | None:
        """A progress function for a run of `slots` samples."""
        if self.bar is None and callback is None:
            return None

        def progress(steps: int) -> bool | None:
            done = before + steps * slots
            if self.bar is not None:
                self.bar.update(done - self.bar.n)
            return None if callback is None else callback(done, total)

        return progress


__all__ = ["BACKENDS", "Cancelled", "FastgenError", "Sampler", "compile", "sample"]
