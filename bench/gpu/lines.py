"""Results as JSON lines: what a step found out outlives it, whatever becomes of its process. No torch here."""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Lines:
    """A file of rows, each written whole and flushed; without a path they go nowhere."""

    def __init__(self, path: Path | None) -> None:
        self.file = path.open("a") if path is not None else None

    def __call__(self, row: Row) -> None:
        if self.file is not None:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()


class Tail:
    """The rows of a file that another process writes, as they come. A line that is not whole yet, or never gets so, is
    no row; nor is what no JSON object can be read from."""

    def __init__(self, path: Path) -> None:
        self.path, self.read = path, 0

    def new(self) -> list[Row]:
        """Rows since the last call."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self.read)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self.read += len(whole)
        return [row for row in map(_row, whole.splitlines()) if row is not None]


def _row(line: bytes) -> Row | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def read_lines(path: Path) -> list[Row]:
    """All rows of a file; none where there is no such file."""
    return Tail(path).new()


@contextlib.contextmanager
def turn(path: Path | None, emit: Lines) -> Iterator[None]:
    """One process at a time has the device, while others prepare theirs on the CPU. Its time begins with this line."""
    if path is None:
        yield
        return
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # given back when the file is closed, be it by the end of the process
        emit({"begins": True})
        yield
