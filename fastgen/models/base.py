"""What every reference model carries, so that sampling and training need no further description of it."""

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from fastgen.errors import ShapeError
from fastgen.heads import Head


class ReferenceModel(nn.Module):
    """A module with the attributes below; forward(x, *cond) returns the parameters of all sites at once.

    sample_shape: one sample as forward takes it, without the batch. head: how parameters become a value.
    layout: the axes of sample_shape, "CHW", "HW" or "CT". predicts: "same", the output at a site is for that
    site; or "next", forward is fed the sample delayed by one with `start` (a value or a class index) in
    front. config: JSON-able; `fastgen.models.build(config)` makes the same model.
    """

    sample_shape: tuple[int, ...]
    head: Head
    layout: Literal["CHW", "HW", "CT"]
    predicts: Literal["same", "next"] = "same"
    start: float | None = None
    config: dict[str, Any]

    def example_cond(self, batch: int = 1) -> tuple[Tensor, ...]:
        """Conditioning inputs of the right shapes, all zero, for one default sample."""
        raise NotImplementedError


def check_cond(model: nn.Module, cond: tuple[Tensor, ...], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ShapeError unless the conditioning has the named shapes, in that order."""
    given = [tuple(c.shape) for c in cond]
    if given != list(expected.values()):
        wanted = ", ".join(f"{name} {list(shape)}" for name, shape in expected.items()) or "none"
        got = ", ".join(str(list(shape)) for shape in given) or "none"
        raise ShapeError(f"{type(model).__name__}: conditioning given: {got}; expected: {wanted}")
