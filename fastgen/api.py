"""The face: compile a module to a Sampler, or sample in one line."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastgen.backends.cuda import TEAMS
from fastgen.backends.registry import BACKENDS, EXECUTORS
from fastgen.checks import MOST_THREADS, own_copy, whole_number
from fastgen.errors import Cancelled, FastgenError, ModelChangedError, ShapeError
from fastgen.forward import device_of
from fastgen.heads import HEADS, Head
from fastgen.kept import KeptFor
from fastgen.placement import placed
from fastgen.planned import Choice
from fastgen.progress import Callback
from fastgen.sampler import Sampler
from fastgen.spec import Spec
from fastgen.view import neutral

MODELS, MOST_BYTES = 8, 1 << 31  # that sample() remembers


@neutral()
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
    None for raster (channels in turn), or integers, the step of every site [H, W] ([T]) or of every value, channels
    first, [C, H, W] ([D] of a vector); an order holds for one length. predicts: "same", or "next" when forward is fed the
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
            f"head= (of fastgen.heads: {', '.join(h.name for h in HEADS)})"
        )
    if not isinstance(shape, tuple | list | torch.Size):
        raise TypeError(f"shape={shape!r}: expected one sample's shape without the batch, as (1, 28, 28) or (16000,)")
    if cond is None:
        example: Any = getattr(model, "example_cond", tuple)
        cond = example()
    cond = tuple(cond) if isinstance(cond, tuple | list) else (cond,)
    at, backend = placed(model, device, backend)
    if team not in TEAMS:
        raise ValueError(f"team={team!r}: expected one of {', '.join(TEAMS)}")
    if threads is not None:
        threads = whole_number(threads, "threads", "a number of threads", least=1, most=MOST_THREADS)
    dtypes = EXECUTORS[backend].dtypes
    if dtype not in dtypes:
        raise ValueError(f"dtype={dtype}: expected {' or '.join(map(str, dtypes))}")
    for k, c in enumerate(cond):
        if isinstance(c, Tensor) and c.dim() and c.shape[0] != 1:
            raise ShapeError(f"cond[{k}] has shape {tuple(c.shape)}; expected an example of batch 1")
    cond = tuple(own_copy(c, k) for k, c in enumerate(cond))
    known: dict[str, Any] = {k: getattr(model, k, None) for k in ("layout", "predicts", "start")}
    layout, predicts = layout or known["layout"] or "", predicts or known["predicts"] or "same"
    spec = Spec(tuple(shape), head, layout, predicts, known["start"] if start is None else start, order)
    return Sampler(model, spec, cond, Choice(backend, dtype, threads, at, team, verify))


# What sample() keeps: samplers of the last few models that are alive.
_samplers: KeptFor[Sampler] = KeptFor(MODELS, MOST_BYTES, lambda sampler: sampler.nbytes)


def sample(
    model: nn.Module,
    n: int,
    *,
    cond: tuple[Any, ...] | None = None,
    shape: tuple[int, ...] | None = None,
    head: Head | None = None,
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
    seed: int | torch.Generator = 0,
    temperature: float = 1.0,
    given: Tensor | None = None,
    mask: Tensor | None = None,
    first: int = 0,
    length: int | None = None,
    progress: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """n samples of a model in one line: compiles it once, and remembers that while the model lives.

    Options are those of compile, up to verify, and of Sampler.sample. Weights that changed since are planned again, and proved
    as before. Several threads that ask for a new model at once wait for one plan. The samplers of the last eight models are
    kept, as far as they come to 2 GiB; `forget` lets one go.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; expected a torch.nn.Module")
    if cond is not None:
        cond = tuple(cond) if isinstance(cond, tuple | list) else (cond,)
    chosen: dict[str, Any] = dict(
        shape=shape, head=head, layout=layout, order=order, predicts=predicts, start=start, device=device, dtype=dtype,
        backend=backend, threads=threads, team=team, verify=verify,
    )  # fmt: skip
    # A sampler holds its options, so that their ids stay theirs.
    key = (device_of(model), *map(_key, chosen.values()), cond is None, *map(_kind, cond or ()))

    def planned() -> Sampler:
        example = None if cond is None else tuple(c[:1] if isinstance(c, Tensor) and c.dim() else c for c in cond)
        made = compile(model, cond=example, **chosen)
        made.let_go()
        return made

    found = _samplers.made(model, key, planned)
    asked: dict[str, Any] = dict(
        seed=seed, cond=cond, temperature=temperature, given=given, mask=mask, first=first, length=length,
        progress=progress, callback=callback,
    )  # fmt: skip
    try:
        return found.sample(n, **asked)
    except ModelChangedError:
        found.refresh(changed=True)
        return found.sample(n, **asked)


def forget(model: nn.Module | None = None) -> None:
    """Lets go of what `sample` remembers of a model, or of all."""
    if model is None:
        _samplers.clear()
    else:
        _samplers.forget(model)


def _key(option: Any) -> Any:
    """An option by value if it has one that can be compared, else by identity."""
    if isinstance(option, list):
        return tuple(option)
    return id(option) if isinstance(option, Tensor) else option


def _kind(c: Any) -> Any:
    """What a sampler binds of a conditioning input: all of it, or a tensor's type."""
    return (c.dtype, c.dim()) if isinstance(c, Tensor) else _key(c)


__all__ = ["BACKENDS", "Cancelled", "FastgenError", "Sampler", "compile", "forget", "sample"]
