"""Which numbers of a forward depend on sampled values, in a run for conditioning alone: per element, as capture has it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fastgen.capture.convolution import CONVOLUTIONS
from fastgen.capture.linear import LINEAR
from fastgen.capture.lookup import PICKS
from fastgen.capture.moves import MOVEMENT, PATCHES
from fastgen.capture.norms import NORMS
from fastgen.capture.pointwise import POINTWISE

UNARY = ("sum", "mean", "avg_pool1d", "avg_pool2d")


class Marks:
    """Marks of storages: all of one, or some of its elements."""

    def __init__(self) -> None:
        self._of: dict[int, Tensor | None] = {}  # None: all of it
        self._keep: list[torch.UntypedStorage] = []  # so that no other takes a place, whatever becomes of its tensors

    def of(self, t: Tensor) -> Tensor | None:
        """Which elements of t are marked, bool as t; None where none is."""
        if t.layout != torch.strided or t.untyped_storage()._cdata not in self._of:
            return None
        marks = self._of[t.untyped_storage()._cdata]
        if marks is None or marks.numel() != _size(t):
            return torch.ones((), dtype=torch.bool).expand(t.shape)
        seen = marks.as_strided(t.shape, t.stride(), t.storage_offset())
        return seen if bool(seen.any()) else None

    def put(self, t: Tensor, marks: Tensor | None = None) -> None:
        """Marks t: all of it, or those elements; others of it are then not."""
        place = t.untyped_storage()._cdata
        self._keep.append(t.untyped_storage())
        if marks is None and t.numel() == _size(t):
            self._of[place] = None
            return
        own = self._of.get(place, torch.zeros(0))
        if own is None or own.numel() != _size(t):
            own = self._of[place] = torch.full((_size(t),), own is None)
        own.as_strided(t.shape, t.stride(), t.storage_offset()).copy_(torch.tensor(True) if marks is None else marks)

    def follow(self, func: Any, name: str, args: Any, kwargs: Any, out: Any, written: list[Tensor]) -> None:
        """Marks the results of a call that was executed, some of whose operands are marked; and what it wrote to."""
        tensors = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        places = {t.untyped_storage()._cdata for t in tensors if t.layout == torch.strided}
        results = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.layout == torch.strided]
        marks = self._moved(func, name.rstrip("_"), args, kwargs, [*written, *results][:1], tensors)
        for t in written or [t for t in results if t.untyped_storage()._cdata not in places]:
            self.put(t, marks if marks is not None and marks.shape == t.shape else None)

    def _moved(
        self, func: Any, base: str, args: Any, kwargs: Any, like: list[Tensor], tensors: list[Tensor]
    ) -> Tensor | None:
        """The marks of a result whose elements are those of the operands, or functions of one each; None: all."""
        if not like or all(self._all(t) for t in tensors):
            return None
        if base in ("copy", "fill"):
            source = self.of(args[1]) if isinstance(args[1], Tensor) else None
            return torch.zeros(like[0].shape, dtype=torch.bool) if source is None else source.expand(like[0].shape)
        if base in POINTWISE:
            found = [m for t in tensors if (m := self.of(t)) is not None]
            try:
                return torch.stack([m.expand(like[0].shape) for m in found]).any(0)
            except RuntimeError:
                return None
        try:
            if base in LINEAR or base in CONVOLUTIONS:
                return self._weighed(func, base, args, kwargs)
            if base in NORMS:  # what is made of NaN is NaN
                made = func(*tree_map(self._unknown, args), **kwargs)
                return next(t for t in tree_leaves(made) if isinstance(t, Tensor)).isnan()
            if base in MOVEMENT or base in PATCHES or base in PICKS:
                rest = [t for t in tree_leaves(args[1:]) if isinstance(t, Tensor)]
                if base in PICKS and any(self.of(t) is not None for t in rest):
                    return None  # a sampled index
                operands = 2 if base in PATCHES else 1  # what moves; others say whereto
                moved: Tensor = func(*tree_map(self._numbers, args[:operands]), *args[operands:], **kwargs)
                return moved != 0
        except Exception:  # not of numbers
            pass
        return None

    def _weighed(self, func: Any, base: str, args: Any, kwargs: Any) -> Tensor:
        """The marks of a sum or a product of matrices: of what marked elements are in with a weight that is not zero."""
        # Which arguments are multiplied; what is added to them comes before or after.
        product = [0] if base in UNARY else [1, 2] if base == "addmm" else [0, 1]
        bare: list[Any] = [None if k not in product and isinstance(a, Tensor) else a for k, a in enumerate(args)]
        if base == "addmm":
            bare[0] = args[0].new_zeros(args[0].shape)
        found: list[Tensor] = []
        for k in product:
            if self.of(args[k]) is not None:
                some = [
                    self._numbers(a) if j == k else self._not_zero(a) if j in product else a for j, a in enumerate(bare)
                ]
                found.append(func(*some, **kwargs) != 0)
        for k, a in enumerate(args):
            if k not in product and isinstance(a, Tensor) and (marks := self.of(a)) is not None:
                wide = [1, -1] + [1] * (args[0].dim() - 2) if base in CONVOLUTIONS else marks.shape
                found.append(marks.reshape(wide))
        return torch.stack(torch.broadcast_tensors(*found)).any(0)

    def _all(self, t: Tensor) -> bool:
        marks = self.of(t)
        return marks is not None and bool(marks.all())

    def _not_zero(self, t: Tensor) -> Tensor:
        marks = self.of(t)
        return (t != 0 if marks is None else (t != 0) | marks).to(torch.float32)

    def _unknown(self, t: Any) -> Any:
        if not isinstance(t, Tensor) or (marks := self.of(t)) is None:
            return t
        return torch.where(marks, torch.nan, t.detach())

    def _numbers(self, t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        marks = self.of(t)
        return torch.zeros(t.shape) if marks is None else marks.float()


def _size(t: Tensor) -> int:
    return max(1, math.ceil(t.untyped_storage().nbytes() / t.element_size()))
