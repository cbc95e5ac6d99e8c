"""Programs that a test sends SIGINT to: what they start with is said, not inherited by chance.

A shell without job control (a script, make, CI) starts what runs behind `&` with SIGINT ignored, and so does whoever
wants a program to outlive Ctrl-C. Programs inherit that, and Python then installs no handler: a test of Ctrl-C would wait
for an answer that never comes.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def children_heed_ctrl_c(heed: bool = True) -> Iterator[None]:
    """Programs started inside have SIGINT at its default, as from a terminal, or ignored, as behind `&`.

    What a parent handles is at its default after an exec, and what it ignores stays ignored; so this process handles or
    ignores it for the moment, and no code has to run between fork and exec, where threads of torch's may hold locks.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler if heed else signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
