"""What is kept between calls: the last few of something, by key, whichever threads ask."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Kept(Generic[K, V]):
    """At most `limit` values; the one that was asked for longest ago goes first."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.RLock()  # makers may ask too
        self._values: OrderedDict[K, V] = OrderedDict()

    def clear(self) -> None:
        """Forgets all, in a child process too, where whoever held the lock is not."""
        self._lock = threading.RLock()
        self._values = OrderedDict()

    def get(self, key: K) -> V | None:
        """The value of a key, if it is kept."""
        with self._lock:
            found = self._values.get(key)
            if key in self._values:
                self._values.move_to_end(key)
            return found

    def put(self, key: K, value: V) -> None:
        """Keeps a value."""
        with self._lock:
            self._values[key] = value
            self._values.move_to_end(key)
            while len(self._values) > self.limit:
                self._values.popitem(last=False)

    def made(self, key: K, make: Callable[[], V]) -> V:
        """The value of a key, made if it is not kept; by one thread while others wait."""
        with self._lock:
            found = self.get(key)
            if found is None:
                found = make()
                self.put(key, found)
            return found
