"""Shadow memory: which plan element every number of a storage is.

The shadow is read with a tensor's own size, stride and offset, so views, slices, permutes, expands and in-place writes
through views need no rules.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fastgen.capture.closed_form import ClosedForm
from fastgen.capture.ids import COND, CONST

Ids = Tensor | ClosedForm


def dense(ids: Ids, shape: torch.Size) -> Tensor:
    """One id per element of a result."""
    return (ids.ids() if isinstance(ids, ClosedForm) else ids).reshape(shape)


class Shadow:
    """Ids of one storage: in closed form, or one per element."""

    def __init__(self, ref: StorageWeakRef, size: int, dtype: torch.dtype) -> None:
        self.ref, self.size, self.dtype = ref, size, dtype
        self.foreign: int | None = None  # the id of sampled values that are read as another type
        self.closed: ClosedForm | None = None
        self.ids: Tensor | None = None

    def grow(self, size: int) -> None:
        """After resize_: what is new holds nothing yet."""
        if size > self.size:
            self.ids = torch.cat([self.dense(), torch.full((size - self.size,), CONST)])
            self.size, self.closed = size, None

    def dense(self) -> Tensor:
        """One id per element of the storage."""
        if self.ids is None:
            self.ids = torch.full((self.size,), CONST) if self.closed is None else self.closed.ids().reshape(-1)
        return self.ids

    def window(self, t: Tensor) -> ClosedForm | None:
        """The closed form as t [1, C, (H,) W] sees it: whole channels, a box of sites."""
        f = self.closed
        if f is None or t.dim() not in (3, 4) or t.shape[0] != 1 or min(t.shape) < 1 or t.dtype != self.dtype:
            return None
        (height, width), plane = f.grid, f.grid[0] * f.grid[1]
        wanted = (plane, width, 1) if t.dim() == 4 else (plane, 1)
        if t.dim() == 3 and height != 1:
            return None
        if any(s != w for s, w, n in zip(t.stride()[1:], wanted, t.shape[1:], strict=True) if n > 1):
            return None
        c, rest = divmod(int(t.storage_offset()), plane)
        i, j = divmod(rest, width)
        grid = (1, t.shape[2]) if t.dim() == 3 else (t.shape[2], t.shape[3])
        if c + t.shape[1] > len(f.lanes) or i + grid[0] > height or j + grid[1] > width:
            return None
        return f.window((c, c + t.shape[1]), (i, j), grid)


class ShadowMemory:
    """The shadows of all storages that have held a sampled or conditioning value."""

    def __init__(self) -> None:
        self._shadow: dict[int, Shadow] = {}
        self._places: dict[int, Shadow] = {}  # by address: memory that came back as another storage (DLPack)

    def _entry(self, t: Tensor) -> Shadow | None:
        if t.layout != torch.strided:
            return None
        storage = t.untyped_storage()
        found = self._shadow.get(storage._cdata)
        if found is None:
            found = self._places.get(storage.data_ptr())
            if found is not None and found.size < storage.nbytes() // t.element_size():
                found = None
        if found is None or found.ref.expired():
            return None
        found.grow(storage.nbytes() // t.element_size() if t.dtype == found.dtype else 0)
        return found

    def _make(self, t: Tensor) -> Shadow:
        storage = t.untyped_storage()
        if len(self._shadow) % 64 == 63:  # storages that died take their shadows along
            self._shadow = {k: v for k, v in self._shadow.items() if not v.ref.expired()}
            self._places = {k: v for k, v in self._places.items() if not v.ref.expired()}
        entry = Shadow(StorageWeakRef(storage), max(1, storage.nbytes() // t.element_size()), t.dtype)
        self._shadow[storage._cdata] = self._places[storage.data_ptr()] = entry
        return entry

    def no_rule(self, t: Tensor, ids: Tensor) -> int:
        """The id of what is made by reading or writing t, the bytes of another type; ids: what they are."""
        raise NotImplementedError("a tracer knows")

    def _foreign(self, entry: Shadow, t: Tensor) -> int:
        """The one id of a storage whose bytes t reads as another type."""
        ids = entry.dense()
        if not bool((ids >= 0).any()):
            return COND if bool((ids == COND).any()) else CONST
        if entry.foreign is None:
            entry.foreign = self.no_rule(t, ids)
        return entry.foreign

    def ids(self, t: Tensor) -> Tensor:
        """Ids of the elements of t, shaped like it."""
        entry = self._entry(t)
        if entry is None:
            return torch.full((), CONST, dtype=torch.int64).expand(t.shape)
        if t.dtype != entry.dtype:
            return torch.full((), self._foreign(entry, t)).expand(t.shape)
        return entry.dense().as_strided(t.shape, t.stride(), t.storage_offset())

    def closed(self, t: Tensor) -> ClosedForm | None:
        """The ids of t [1, C, (H,) W] in closed form, if they have one."""
        entry = self._entry(t)
        return None if entry is None else entry.window(t)

    def put(self, t: Tensor, ids: Tensor | ClosedForm) -> None:
        """Writes ids for the elements of t."""
        entry = self._entry(t)
        if isinstance(ids, ClosedForm):
            entry = entry or self._make(t)
            if t.is_contiguous() and t.numel() == entry.size:
                entry.closed, entry.ids = ids, None
                return
            ids = ids.ids()
        if entry is None:
            if not bool((ids != CONST).any()):
                return
            entry = self._make(t)
        if t.dtype != entry.dtype:  # all of the storage, wherever t is in it
            entry.dense().fill_(int(ids.max()) if bool((ids < 0).all()) else self.no_rule(t, ids))
            entry.closed = None
            return
        own = entry.dense()
        if ids.untyped_storage()._cdata == own.untyped_storage()._cdata:  # ids of the same storage, seen otherwise
            ids = ids.clone()
        own.as_strided(t.shape, t.stride(), t.storage_offset()).copy_(ids.reshape(t.shape))
        entry.closed = None

    def dynamic(self, t: Any) -> bool:
        """Whether any element depends on the sample (or is planned from conditioning)."""
        entry = self._entry(t) if isinstance(t, Tensor) else None
        return entry is not None and (entry.window(t) is not None or bool((self.ids(t) >= 0).any()))

    def fixed(self, t: Tensor) -> bool:
        """Whether every element is a constant."""
        return not self.dynamic(t) and not self.conditional(t)

    def conditional(self, t: Any) -> bool:
        """Whether any element depends on conditioning and is left to torch."""
        entry = self._entry(t) if isinstance(t, Tensor) else None
        return entry is not None and entry.closed is None and bool((self.ids(t) == COND).any())
