"""Does a sequence model do the same at every site, and at every length? Asked of forward itself, before a plan is stretched.

Values that repeat with a period give parameters that do, beyond what a site looks back; and a beginning gives the same
parameters whatever its length. Positions, masks of their own and lengths in the arithmetic show in one or the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastgen.errors import UnsupportedError
from fastgen.forward import FORWARD_ERRORS, refused
from fastgen.kept import Kept
from fastgen.plan.plan import Plan
from fastgen.spec import Spec
from fastgen.teacher_forced import forward_parameters
from fastgen.verify import VerifyReport

PERIOD = 192  # sites: a multiple of the strides that people use
LONGEST = 1 << 16  # sites that forward is run on at once
EQUAL = 1e-4  # of a parameter, relative to itself or to 1: another order of the same sums is far closer

Kind = Literal["any", "ends", "one", "refused"]


def lengths_of(model: nn.Module, spec: Spec, cond: tuple[Any, ...], reach: int, planned: int) -> Kind:
    """At which lengths a plan holds. reach, planned: how many sites one looks back over all layers, and the number of sites
    that were planned, of which the last quarter goes with the end.

    "any": forward does the same at every site and length. "ends": the same but near the end. "one": it holds for its own
    length only (positions, numbers that depend on the length). "refused": forward takes no other with this conditioning.
    """
    cond = tuple(map(_flat, cond))
    sites = spec.sites[0]
    many = sites * max(1, -(-(reach + 3 * PERIOD) // sites))
    try:
        repeated = _periodic(model, spec.at_length(many), cond)
        short = spec.at_length((sites * 5 // 8) | 1)
        other = _periodic(model, short, cond)
    except FORWARD_ERRORS:
        return "refused"
    if _first_odd(repeated, reach, planned) is not None:
        return "one"
    apart = _apart(other, repeated[: len(other)])
    if bool(apart[: max(0, len(apart) - planned // 4)].any()):
        return "one"
    return "ends" if bool(apart.any()) else "any"


def _first_odd(params: Tensor, reach: int, planned: int) -> int | None:
    """Of parameters [sites, phases * P] for values with the period, against those of the last period before the end."""
    end = len(params) - planned // 4
    if end <= reach + 1 + PERIOD:
        return None
    at = torch.arange(max(reach + 1, planned // 4), end)
    last = end - PERIOD
    odd = _apart(params[at], params[last + (at - last) % PERIOD])
    return int(at[odd][0]) if bool(odd.any()) else None


def _flat(c: Any) -> Any:
    """Conditioning that is the same along its last axis."""
    return c[..., :1].expand_as(c).contiguous() if isinstance(c, Tensor) and c.dim() > 1 and c.shape[-1] else c


def _periodic(model: nn.Module, spec: Spec, cond: tuple[Any, ...]) -> Tensor:
    """Parameters [sites, phases * P] of values that repeat."""
    sites = spec.sites[0]
    values = spec.at_length(min(sites, PERIOD)).example_values(1)
    values = values.repeat(1, -(-sites // values.shape[1]), 1)[:, :sites]
    return forward_parameters(model, spec, values, cond)[0].reshape(sites, -1)


def _apart(a: Tensor, b: Tensor) -> Tensor:
    """Which sites have different parameters."""
    return (~((a == b) | ((a - b).abs() <= EQUAL * a.abs().clamp(min=1)))).any(1)


class Looked:
    """At which lengths a plan of a sequence was seen to do what forward does; asked before a sample of another is drawn."""

    def __init__(self, model: nn.Module, plan: Plan, sites: int, example: tuple[Any, ...]) -> None:
        """sites, example: the length and the conditioning of compile."""
        self.model, self.plan, self.sites, self._flat = model, plan, sites, tuple(map(_flat, example))
        self.free = False  # forward takes any length with the same conditioning
        self.own = _form(sites, example)
        self.seen: Kept[tuple[int, ...], bool] = Kept(1024)
        self.low = self.high = self.own
        self._own_params: Tensor | None = None  # what forward gives at the length of compile

    def state(self) -> dict[str, Any]:
        """What was seen."""
        return {"free": self.free, "low": self.low, "high": self.high}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes what was seen elsewhere, of the same plan."""
        vars(self).update(state)

    def check(self, spec: Spec, cond: tuple[Any, ...], prove: Callable[[], VerifyReport]) -> None:
        """Raises UnsupportedError where forward does something else than the plan at spec's length, or with conditioning (batch
        1) of another length.

        Where forward is free to be asked, it is: of a length that is new, what it does at its sites, and at the first ones
        at the length of compile. Else by a proof, with the conditioning of the call, at lengths outside of those proved, at
        short ones, and where forward does something else at the first sites than at the length of compile.
        """
        form = _form(spec.sites[0], cond)
        if form == self.own or self.seen.get(form):
            return
        free = self.plan.schedule.sequence and self.free and form[1:] == self.own[1:]
        short = spec.sites[0] <= self.plan.spec.sites[0] // 2  # of which most goes with the end
        between = all(a <= k <= b for a, k, b in zip(self.low, form, self.high, strict=True)) and self.low != self.high
        if free:
            self._ask(spec)
        if short or not (free or (between and self._begins_alike(spec, cond))):
            report = prove()
            if not report.ok:
                raise UnsupportedError(self._refusal(form, f"than what was planned ({report})"))
            self.low = tuple(map(min, self.low, form))
            self.high = tuple(map(max, self.high, form))
        self.seen.put(form, True)

    def _ask(self, spec: Spec) -> None:
        reach, planned = self.plan.receptive_field[-1], self.plan.spec.sites[0]
        spec = spec.at_length(min(spec.sites[0], LONGEST))
        try:
            if self._own_params is None:
                self._own_params = _periodic(self.model, spec.at_length(min(self.sites, LONGEST)), self._flat)
            here, there = _periodic(self.model, spec, self._flat), self._own_params
        except FORWARD_ERRORS as error:
            raise refused(spec.encode(spec.example_values(1)), self._flat, error) from error
        odd = _first_odd(here, reach, planned)
        if odd is None:
            both = min(len(here), len(there)) - planned // 4
            apart = _apart(here[: max(0, both)], there[: max(0, both)])
            odd = int(apart.int().argmax()) if bool(apart.any()) else None
        if odd is not None:
            what = f"from site {odd} on than at {self.sites} sites (positions, or a constant along the sequence or of its length)"
            raise UnsupportedError(self._refusal((spec.sites[0],), what))

    def _begins_alike(self, spec: Spec, cond: tuple[Any, ...]) -> bool:
        """Whether forward gives the same parameters at the first sites with the conditioning of a call as at the length of
        compile, with as much of that conditioning, or with more of it."""
        own, planned = spec.at_length(self.sites), self.plan.spec.sites[0]
        values = (own if self.sites > spec.sites[0] else spec).example_values(1)
        cut = tuple(_as_long_as(c, like) for c, like in zip(cond, self._flat, strict=True))
        try:
            here = forward_parameters(self.model, spec, values[:, : spec.sites[0]], cond)[0]
            there = forward_parameters(self.model, own, values[:, : self.sites], cut)[0]
        except FORWARD_ERRORS:
            return False
        both = min(len(here), len(there)) - planned // 4 * spec.phases
        return both > 0 and not bool(_apart(here[:both], there[:both]).any())

    def _refusal(self, form: tuple[int, ...], what: str) -> str:
        lengths = ", ".join(str(n) for n, own in zip(form[1:], self.own[1:], strict=True) if n != own)
        of_cond = f" with conditioning of length {lengths}" if lengths else ""
        return f"length {form[0]}{of_cond}: forward does something else {what}; compile with that"


def _form(sites: int, cond: tuple[Any, ...]) -> tuple[int, ...]:
    """The lengths that a forward hangs on: of the sample, and of all axes of its conditioning but the batch."""
    return (sites, *(n for c in cond if isinstance(c, Tensor) for n in c.shape[1:]))


def _as_long_as(c: Any, like: Any) -> Any:
    """Conditioning cut to the lengths of another, or begun again from its start where that is longer."""
    if not isinstance(c, Tensor) or not isinstance(like, Tensor):
        return c
    for axis in range(1, c.dim()):
        if c.shape[axis] != like.shape[axis]:
            c = c.index_select(axis, torch.arange(like.shape[axis]) % max(1, c.shape[axis]))
    return c
