"""Progress of a call: a bar, and the caller's callback."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm

Callback = Callable[[int, int], bool | None]  # (done, total) of the call's steps; False cancels


class Bar:
    """tqdm, if wanted, and the caller's callback."""

    def __init__(self, wanted: bool, total: int) -> None:
        self.bar: Any = None
        if wanted:
            self.bar = tqdm(total=total, unit="step", unit_scale=True)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            if error[0] is None:
                self.bar.update(self.bar.total - self.bar.n)
            self.bar.close()

    def watch(
        self, before: int, slots: int, total: int, callback: Callback | None
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
