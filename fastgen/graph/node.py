"""The base of all nodes: what every kind must answer, for the planner and the packer to know none of them by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from torch import Tensor

from fastgen.graph.bounds import Range
from fastgen.graph.refs import Cause, Operand, Pair, Piece, Places, Read
from fastgen.graph.times import Ready


class Coder(Protocol):
    """What a node writes its vector program with (program/vector.py): scratch addresses, and micro-ops on them."""

    def alloc(self, n: int) -> int:
        """Scratch for n floats."""

    def emit(
        self, fn: str, dst: int, a: int = 0, b: int = 0, c: int = 0, n: int = 0, imm: tuple[float, ...] = ()
    ) -> None:
        """One micro-op of csrc/plan.h."""

    def address(self, piece: Piece, lo: int, hi: int) -> int:
        """Operand address of lanes [lo, hi) of a piece: scratch offset, or ~offset in consts."""

    def linear(self, terms: list[tuple[Read, Tensor]], bias: Tensor | None, outputs: int) -> int:
        """The linear part: bias [O] or [O, H, W], and the sum of weight [O, n] times what each read gives."""

    def whole(self, operand: Operand) -> int:
        """Address of an operand as one contiguous vector."""

    def constants(self, values: Tensor) -> int:
        """Offset of values in consts."""


class Store(Protocol):
    """Where sources live (program/pack.py)."""

    def input_buffer(self) -> int:
        """The buffer that draws are written to."""

    def cond_buffer(self, node: CondSource) -> int:
        """A new buffer that conditioning fills."""


class CondSource(Protocol):
    """What a conditioning buffer needs of its node."""

    index: int
    channels: int
    grid: Pair


@dataclass
class Node(ABC):
    """`channels` at each site of `grid`; `path` is the module that made it.

    A kind is a subclass. Once captured, references name nodes; `restrict` gives the same kind for some channels with
    references that name units, and from there on the answers are about units.
    """

    index: int
    path: str
    op: str
    channels: int
    grid: Pair
    up: Pair = (1, 1)  # sites are computed parity by parity: q * up + parity

    source: ClassVar[bool] = False  # known before the program runs, or written by the draw: nothing to execute
    of_call: ClassVar[bool] = False  # a source that conditioning fills
    linear: ClassVar[bool] = False  # a sum of weighted terms, which an op's linear part computes

    @property
    def name(self) -> str:
        """What a listing of the plan calls it."""
        return self.op

    @abstractmethod
    def reads(self) -> list[Read]:
        """All references, in the order of execution."""

    @abstractmethod
    def ready(self, done: list[Ready], known: Tensor) -> Ready:
        """After which draw each element is known. done: of the nodes before. known: [C, H, W], of forward's input."""

    @abstractmethod
    def value(self, values: Sequence[Tensor]) -> Tensor:
        """What it computes, float64 [C, H, W]; values: of the nodes before."""

    def bounds(self, known: Mapping[int, Range]) -> Range:
        """Between which two numbers its values lie; known: the same of the nodes before."""
        return None

    def constants(self) -> list[Tensor]:
        """What it adds or computes with that is not a weight: [C], or [C, H, W] where it varies over sites."""
        return []

    @property
    def adds_up(self) -> bool:
        """Whether it is made of what it reads, and of constants that are not negative, by sums, positive factors, limits and
        choices."""
        return False

    @abstractmethod
    def restrict(self, chans: list[int], places: Places) -> Node:
        """The node for some of its channels, references led to units."""

    @abstractmethod
    def blame(self, chan: int, i: int, j: int) -> Iterator[Cause]:
        """What element (chan, i, j) depends on, for messages."""

    @abstractmethod
    def emit(self, coder: Coder) -> int:
        """Writes the vector program of this node; the scratch address of its result."""

    def split(self, waits: Callable[[Read], bool], least: int) -> tuple[Node, Node] | None:
        """(the terms that can wait, the rest), where terms can be summed apart and at least so many channels can."""
        return None

    def home(self, store: Store) -> int:
        """The buffer of a source."""
        raise NotImplementedError(f"{type(self).__name__} is no source")

    @abstractmethod
    def forget(self, live: set[int]) -> None:
        """Drops the reads of units that are never computed: they are outside their bounds everywhere."""


Point = tuple[str, str, int, int]  # module path, aten op, which call of it there, which argument
Call = tuple[str, str, int]
OUTPUT = ("output", "return")  # stands for layer and op where forward's result is read


@dataclass(frozen=True)
class Limit:
    """What conditioning must keep to, asked at every call: the values of some nodes lie between two numbers."""

    path: str
    nodes: tuple[int, ...]
    low: float
    high: float
    what: str  # these values are


@dataclass
class Graph:
    """What capture hands to the planner: nodes in order of execution; `params[f]` is the node with phase f's parameters."""

    nodes: list[Node]
    params: list[int]
    points: list[Point]  # where conditioning is read
    notes: list[str]
    calls: dict[tuple[str, str], int] = field(default_factory=dict)  # of every operation in every module
    numbers: dict[Call, tuple[float, ...]] = field(default_factory=dict)  # Python's, in functions of sampled values
    answers: list[bool | None] = field(
        default_factory=list
    )  # to what Python asks in forward, in turn; None: a constant's
    limits: list[Limit] = field(default_factory=list)
    given: tuple[float, float] | None = None  # between which two numbers the sampled tensor's lie
    shapes: dict[Call, Any] = field(default_factory=dict)  # results of functions of sampled values, on the meta device
    example: tuple[Any, ...] = ()  # types and shapes of the conditioning that all this was seen with

    def reached(self, start: Iterable[int] | None = None) -> set[int]:
        """The nodes that parameters, or some nodes, depend on; these included."""
        todo = list(self.params if start is None else start)
        seen = set(todo)
        while todo:
            for read in self.nodes[todo.pop()].reads():
                if read.ref.node not in seen:
                    seen.add(read.ref.node)
                    todo.append(read.ref.node)
        return seen

    def conditioned(self, start: Iterable[int]) -> set[int]:
        """The sources of conditioning that some nodes depend on."""
        return {k for k in self.reached(start) if self.nodes[k].of_call}

    def made_of(self, kind: Callable[[Node], bool]) -> bool:
        """Whether all parameters are made of nodes of a kind alone, by sums, positive factors, limits and choices."""
        todo, seen = list(self.params), set(self.params)
        while todo:
            node = self.nodes[todo.pop()]
            if kind(node):
                continue
            if not node.adds_up:
                return False
            new = {read.ref.node for read in node.reads()} - seen
            seen |= new
            todo += new
        return True
