"""Which part of the interpreter an instruction belongs to: from the line information of its disassembly, which says for each
instruction the line it comes from and every call that was inlined around it.

An instruction is the innermost function's that PHASES knows; a division inside task_at() that multiply_by() calls is
set-up, though it lies in the middle of the product.
"""

from __future__ import annotations

import functools
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

SETUP, STAGING, MULTIPLY, FINISH, BARRIER = "set-up", "staging", "multiply", "finish", "barriers"
PHASES = {  # (class or file's stem, function or *): the first that fits
    ("DeviceTeam", "sync"): BARRIER, ("DeviceTeam", "meet_in_memory"): BARRIER, ("DeviceTeam", "sync_cta"): BARRIER,
    ("FiberStage", "run"): SETUP, ("FiberStage", "share_tasks"): SETUP, ("FiberStage", "task_at"): SETUP,
    ("FiberStage", "end_of"): SETUP, ("FiberBlock", "point"): SETUP, ("FiberBlock", "covered"): SETUP,
    ("FiberBlock", "stage_activations"): STAGING, ("FiberBlock", "load"): STAGING,
    ("FiberStage", "multiply_by"): MULTIPLY, ("FiberStage", "multiply"): MULTIPLY, ("FiberStage", "sum_chunk"): MULTIPLY,
    ("FiberStage", "load"): MULTIPLY, ("FiberStage", "fold"): FINISH, ("FiberStage", "finish"): FINISH,
    ("FiberStage", "finished"): FINISH, ("FiberStage", "add_chunks"): FINISH,
    ("FiberStage", "execute"): FINISH, ("FiberStage", "run_group"): SETUP,
    ("ColumnStage", "*"): "column stages", ("DrawStage", "*"): "draw", ("Interpreter", "*"): "schedule",
}  # fmt: skip
OTHER = "other"

FILE = re.compile(r'//## File "([^"]+)", line (\d+)')
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?(\S+)")
SECTION = re.compile(r"^\.text\.(\S+):")
CLASS = re.compile(r"^(?:class|struct) (\w+)\b[^;]*$")
FUNCTION = re.compile(
    r"^\s*(?:static |template <[^>]*> )*FG_H?D (?:static |inline |constexpr )*[\w:<>*& ]+?[ *&](\w+)\("
)


@dataclass
class Section:
    """One kernel: of each instruction its offset, its opcode, and where it comes from, (file, line), innermost first."""

    name: str
    offsets: list[int] = field(default_factory=list)
    opcodes: list[str] = field(default_factory=list)
    chains: list[tuple[tuple[str, int], ...]] = field(default_factory=list)


def read_disassembly(text: str) -> Iterator[Section]:
    """The kernels in what `nvdisasm -gi` prints."""
    section: Section | None = None
    chain: list[tuple[str, int]] = []
    fresh = False
    for line in text.splitlines():
        if found := SECTION.match(line):
            if section is not None:
                yield section
            section, chain = Section(found.group(1)), []
        elif found := FILE.search(line):
            chain = [] if not fresh else chain
            chain.append((found.group(1), int(found.group(2))))
            fresh = True
        elif section is not None and (found := INSTRUCTION.match(line)) and not found.group(2).startswith("."):
            section.offsets.append(int(found.group(1), 16))
            section.opcodes.append(found.group(2).rstrip(";"))
            section.chains.append(tuple(chain))
            fresh = False
    if section is not None:
        yield section


def disassemble(binary: Path, folder: Path, cuobjdump: str, nvdisasm: str) -> list[Section]:
    """Every kernel in the machine code that `binary` holds."""
    subprocess.run([cuobjdump, "-xelf", "all", str(binary.resolve())], cwd=folder, check=True, capture_output=True)
    sections: list[Section] = []
    for cubin in sorted(folder.glob("*.cubin")):
        done = subprocess.run([nvdisasm, "-gi", str(cubin)], check=True, capture_output=True, text=True)
        sections += read_disassembly(done.stdout)
    return sections


@functools.cache
def _owners(path: str) -> tuple[tuple[int, str, str], ...]:
    """(first line, class, function) of every function of the interpreter in a source file, in order."""
    found, inside = [], Path(path).stem
    file = Path(path)
    for number, line in enumerate(file.read_text().splitlines() if file.exists() else [], 1):
        if match := CLASS.match(line):
            inside = match.group(1)
            found.append((number, inside, ""))
        if match := FUNCTION.match(line):
            found.append((number, inside, match.group(1)))
    return tuple(found)


def function_at(path: str, line: int) -> tuple[str, str]:
    """The class and the function that a line lies in."""
    before = [(inside, name) for first, inside, name in _owners(path) if first <= line]
    return before[-1] if before else (Path(path).stem, "")


def phase_of(chain: tuple[tuple[str, int], ...]) -> tuple[str, str]:
    """The phase of an instruction, and the innermost function it lies in."""
    functions = [function_at(*place) for place in chain]
    label = "::".join(functions[0]) if functions else OTHER
    for inside, name in functions:
        phase = PHASES.get((inside, name)) or PHASES.get((inside, "*"))
        if phase is not None:
            return phase, label
    return OTHER, label
