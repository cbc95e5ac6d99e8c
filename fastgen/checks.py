"""What callers pass, checked once on entry: each error says what was given and what was expected."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastgen.errors import FastgenError, ShapeError
from fastgen.spec import Spec, number_of

MOST_THREADS = 1024
CONDITIONS = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
    torch.bool, torch.complex64, torch.complex128,
)  # fmt: skip


def whole_number(value: Any, name: str, what: str, least: int = 0, most: int = (1 << 63) - 1) -> int:
    """An int, or what counts as one (numpy's). Raises ValueError."""
    number = None if isinstance(value, bool) or not hasattr(value, "__index__") else operator.index(value)
    if number is None or not least <= number <= most:
        upper = "" if most == (1 << 63) - 1 else f" and <= {most}"
        raise ValueError(f"{name}={value!r}: expected {what} >= {least}{upper}")
    return number


def temperature_of(value: Any) -> float:
    """A temperature that is finite and above 0 in float32, as executors have it. Raises ValueError."""
    number = number_of(value)
    if number is not None and 0 < number < math.inf:
        rounded = float(torch.tensor(number, dtype=torch.float32))
        if 0 < rounded < math.inf:
            return number
    raise ValueError(f"temperature={value!r}: expected a finite float32 > 0")


def _check_dense(t: Tensor, name: str, complex_too: bool = False) -> None:
    """Raises TypeError where a tensor has no numbers side by side to read."""
    if t.layout != torch.strided or t.is_nested:
        how = "nested" if t.is_nested else str(t.layout)
        raise TypeError(f"{name} is {how}; expected a dense tensor ({name}.to_dense() or .to_padded_tensor(...))")
    if t.is_meta:
        raise TypeError(f"{name} is on the meta device, where tensors hold no numbers; expected a CPU or CUDA tensor")
    if t.is_complex() and not complex_too:
        raise TypeError(f"{name} is {t.dtype}; expected real numbers")


def known_values(spec: Spec, given: Any, mask: Any, n: int) -> tuple[Tensor | None, Tensor | None]:
    """Values [n, H*W, C] to keep and where: bool. Raises ShapeError, ValueError, TypeError."""
    if given is None and mask is None:
        return None, None
    if given is None or mask is None:
        raise ValueError("given and mask go together: the values to keep, and where")
    for name, t in (("given", given), ("mask", mask)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} is a {type(t).__name__}; expected a tensor shaped like the samples")
        _check_dense(t, name)
    if given.dim() and len(given) == 1:
        given = given.expand(n, *given.shape[1:])
    known = spec.values(given)
    if len(known) != n:
        raise ShapeError(f"given holds {len(known)} samples; expected {n} (or 1, shared)")
    if mask.shape not in (given.shape, given.shape[1:], (1, *given.shape[1:])):
        raise ShapeError(f"mask has shape {tuple(mask.shape)}; expected that of given, {tuple(given.shape)}")
    if mask.is_floating_point() and bool(mask.isnan().any()):
        raise ValueError("mask holds NaN; expected where values are known: true or false, or 1 or 0")
    where = spec.values(mask.to(given.device).expand(given.shape)) != 0
    fault = spec.head.fault_of(known[where])
    if fault:
        raise ValueError(f"given holds {fault}, where mask says that it is known")
    return known, where


def scored_values(spec: Spec, x: Any) -> Tensor:
    """Samples [n, ...] to be scored, as values [n, H*W, C]. Raises ShapeError, ValueError, TypeError."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x is a {type(x).__name__}; expected a tensor of samples, as sample() returns them")
    _check_dense(x, "x")
    values = spec.values(x)
    fault = spec.head.fault_of(values)
    if fault:
        raise ValueError(f"x holds {fault}; expected samples as sample() returns them")
    return values


def check_drawn(spec: Spec, values: Tensor, first: int) -> None:
    """Raises FastgenError where values [n, H*W, C], the samples from `first` on, were drawn from no distribution: the heads
    give NaN there. Names the first such step."""
    wrong = values.isnan()
    if not bool(wrong.any()):
        return
    step = spec.timeline.table.reshape(spec.phases, -1).t().to(values.device)  # [H*W, phases]
    when = torch.where(wrong, step.expand(*wrong.shape[1:]), spec.steps).reshape(len(values), -1).amin(1)
    sample = int(when.argmin())
    site, phase = (int(t[int(when[sample])]) for t in (spec.timeline.site, spec.timeline.phase))
    raise FastgenError(
        f"sample {first + sample}: the parameters of step {int(when[sample])} (row {site // spec.grid[1]}, column "
        f"{site % spec.grid[1]}{f', value {phase}' if spec.phases > 1 else ''}) are no distribution: NaN, infinite, or no "
        "class is possible; forward gives them for what was drawn before (an overflow, a logarithm of 0, a division by 0?)"
    )


def own_copy(c: Any, k: int) -> Any:
    """The k-th conditioning input, on the CPU and apart from the caller's memory and history. Raises ValueError."""
    if not isinstance(c, Tensor):
        inside = [t for t in tree_leaves(c) if isinstance(t, Tensor)]
        if inside:
            raise TypeError(
                f"cond[{k}] is a {type(c).__name__} that holds tensors; expected tensors themselves, or Python values that "
                "compile binds (wrap the module in one whose forward takes the tensors one by one)"
            )
        return c
    if c.dtype not in CONDITIONS:
        raise TypeError(f"cond[{k}] is {c.dtype}; expected floating-point, integers of 8 to 64 bits, bool or complex")
    _check_dense(c, f"cond[{k}]", complex_too=True)
    c = c.detach().cpu().clone(memory_format=torch.contiguous_format)
    if c.is_floating_point() or c.is_complex():
        bad = int((~c.isfinite()).sum())
        if bad:
            raise ValueError(
                f"cond[{k}] {tuple(c.shape)} holds {bad} values that are NaN or infinite; expected finite ones"
            )
    return c


def conditioning_of(example: tuple[Any, ...], cond: tuple[Any, ...] | None, n: int, sequence: bool) -> tuple[Any, ...]:
    """Conditioning at batch n, checked against the example of compile; None is the example itself.

    The last axis of a sequence's conditioning may have another length. Raises ShapeError, ValueError.
    """
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
        c = own_copy(c, k)
        fixed = list(range(1, e.dim() - 1 if sequence else e.dim()))
        if e.dim() and (c.shape[0] not in (1, n) or any(c.shape[a] != e.shape[a] for a in fixed)):
            raise ShapeError(
                f"cond[{k}] has shape {tuple(c.shape)}; expected [{n}, {', '.join(map(str, e.shape[1:]))}]"
            )
        out.append(c.expand(n, *c.shape[1:]) if e.dim() else c)
    return tuple(out)
