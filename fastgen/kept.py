"""What is kept between calls: the last few of something, by key, whichever threads ask; and for objects that live."""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


_ALL: weakref.WeakSet[Any] = weakref.WeakSet()


def _after_fork() -> None:
    """In a child process whoever held a lock is not there, nor who was making something."""
    for kept in list(_ALL):
        kept.unlock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Kept(Generic[K, V]):
    """At most `limit` values, and as many of them as come to `most` by `weigh`, but at least one; the one that was asked for
    longest ago goes first."""

    def __init__(self, limit: int, most: float = 0.0, weigh: Callable[[V], float] = lambda value: 0.0) -> None:
        self.limit, self.most, self.weigh = limit, most, weigh
        self._values: OrderedDict[K, V] = OrderedDict()
        self.unlock()
        _ALL.add(self)

    def unlock(self) -> None:
        """Begins with locks of its own."""
        self._lock = threading.RLock()
        self._made: dict[K, threading.Event] = {}  # what is being made, and whether it is done

    def clear(self) -> None:
        """Forgets all."""
        with self._lock:
            self._values.clear()

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
            while len(self._values) > max(1, self.limit) or (
                len(self._values) > 1 and sum(map(self.weigh, self._values.values())) > self.most
            ):
                self._values.popitem(last=False)

    def drop(self, of: Callable[[K], bool]) -> None:
        """Forgets the values of some keys."""
        with self._lock:
            for key in [k for k in self._values if of(k)]:
                del self._values[key]

    def made(self, key: K, make: Callable[[], V]) -> V:
        """The value of a key, made if it is not kept; by one thread, while others that ask for the same one wait."""
        while True:
            with self._lock:
                found = self.get(key)
                if found is not None:
                    return found
                other = self._made.get(key)
                if other is None:
                    done = self._made[key] = threading.Event()
                    break
            other.wait()
        try:
            value = make()
            self.put(key, value)
            return value
        finally:
            with self._lock:
                self._made.pop(key, None)
            done.set()


class KeptFor(Generic[V]):
    """Values kept for objects, by a key each, for as long as the object lives and there is room: see Kept."""

    def __init__(self, limit: int, most: float, weigh: Callable[[V], float]) -> None:
        self._kept: Kept[tuple[int, Any], V] = Kept(limit, most, weigh)
        self._gone: deque[int] = deque()  # ids of objects; written to by the garbage collector, wherever it runs

    def clear(self) -> None:
        """Forgets all."""
        self._kept.clear()

    def forget(self, owner: Any) -> None:
        """Forgets what is kept for an object."""
        self._kept.drop(lambda key: key[0] == id(owner))

    def made(self, owner: Any, key: Hashable, make: Callable[[], V]) -> V:
        """The value kept for an object, made if there is none; by one thread, while others that ask for the same one wait."""
        while self._gone:
            gone = self._gone.popleft()
            self._kept.drop(lambda key, gone=gone: key[0] == gone)  # type: ignore[misc]

        def first() -> V:
            weakref.finalize(owner, self._gone.append, id(owner)).atexit = False
            return make()

        return self._kept.made((id(owner), key), first)
