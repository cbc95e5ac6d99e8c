"""What a call on a GPU is made of: steps, each a process with a limit, in stages, each with a share of the time."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field

from bench.gpu.lines import Row

NOT_RUN_STATUS = 3  # exit status of a step that does not apply on this machine
CANNOT_STATUS = 2  # of one without which nothing can run here
OK, FAILED, TIMED_OUT, NOT_RUN, NO_TIME = "ok", "FAILED", "TIMED OUT", "NOT RUN", "NO TIME"
ALONE, LEFT_OUT = "AGAIN ALONE", "LEFT OUT"
GOOD = (OK, NOT_RUN, LEFT_OUT)


@dataclass(frozen=True)
class Step:
    """command: where {lines}, {turn}, {work} and {out} stand for the step's results file, the file whose lock is the
    turn on the device, a temporary folder, and the folder of the results.

    limit: seconds from its start, or, if it takes turns, from the line that says its turn has begun. unless: words in
    its output by which a tool says that it cannot work here. alone: where it runs several tests in one process, each by
    itself, named as the test is, for those that a fault leaves without an outcome. peer: somebody else's, which is left
    out where it cannot. kin: steps of the same kin as one that hung are begun behind all others.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    environment: dict[str, str] = field(default_factory=dict)
    unless: tuple[str, ...] = ()
    alone: tuple[Step, ...] = ()
    peer: bool = False
    kin: str = ""

    @property
    def turns(self) -> bool:
        return "{turn}" in self.command


@dataclass(frozen=True)
class Stage:
    """steps: of what was found so far. budget: seconds; what a stage leaves over is the others'. needed: nothing further
    makes sense if one of its steps fails, so that it may take all the time there is."""

    name: str
    budget: float
    steps: Callable[[list[Row]], list[Step]]
    at_once: int = 1
    needed: bool = False


def python(module: str, *arguments: str) -> tuple[str, ...]:
    """The command that runs a module with this interpreter and writes its rows to the step's file."""
    return (sys.executable, "-m", module, *arguments, "--lines", "{lines}")
