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


def odd_site(model: nn.Module, spec: Spec, cond: tuple[Any, ...], reach: int, planned: int) -> int | None:
    """The first site of a sequence of spec's length that does not do what others do; None: there is none, or it is too
    short to tell."""
    spec, cond = spec.at_length(min(spec.sites[0], LONGEST)), tuple(map(_flat, cond))
    try:
        return _first_odd(_periodic(model, spec, cond), reach, planned)
    except FORWARD_ERRORS as error:
        raise refused(spec.encode(spec.example_values(1)), cond, error) from error


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

    def __init__(self, model: nn.Module, plan: Plan, sites: int, free: bool) -> None:
        """sites: those of compile. free: forward takes any length with the same conditioning."""
        self.model, self.plan, self.sites, self.free = model, plan, sites, free
        self.longest, self.another = sites, False

    def check(self, spec: Spec, cond: tuple[Any, ...], prove: Callable[[], VerifyReport]) -> None:
        """Raises UnsupportedError where forward does something else at spec's length than the plan.

        Of itself where forward is free to be asked; else by a proof at that length, with the conditioning of the call: once at
        another length than that of compile, and at every length that is longer than what was proved.
        """
        length = spec.sites[0]
        if (
            not self.plan.schedule.sequence
            or length == self.sites
            or (length <= self.longest and (self.free or self.another))
        ):
            return
        planned = self.plan.spec.sites[0]
        if self.free:
            odd = odd_site(self.model, spec, cond, self.plan.receptive_field[-1], planned)
            what = (
                None if odd is None else f"from site {odd} on than before (positions, or a constant along the sequence)"
            )
        else:
            report = prove()
            what = None if report.ok else f"than what was planned ({report})"
            self.another = True
        if what is not None:
            raise UnsupportedError(
                f"length {length}: forward does something else {what}, and the plan was made at {planned} sites; compile with "
                "that length"
            )
        self.longest = max(self.longest, length)
