"""The house as docs/design.md draws it: which part may import which, read from the imports themselves."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fastgen"

# From the ground up: a module imports from its own floor and from those below. A folder is one part.
FLOORS = (
    ("errors",),
    ("rng", "native", "steps", "progress", "graph", "kernels", "forward", "kept"),
    ("heads", "view"),
    ("ops", "spec"),
    ("nn", "capture", "checks", "media", "fingerprint"),
    ("models", "files"),
    ("plan",),
    ("program",),
    ("backends",),
    ("placement", "teacher_forced"),
    ("variations",),
    ("diagnose",),
    ("verify", "likelihood", "stream"),
    ("lengths",),
    ("planned",),
    ("sampler",),
    ("api", "pretrained"),
    ("train",),
    ("__init__",),
    ("cli",),
    ("__main__",),
)
FLOOR = {part: k for k, parts in enumerate(FLOORS) for part in parts}
# What may be imported inside a function: what need not be installed, or built.
OPTIONAL = ("fastgen._native", "fastgen.kernels", "scipy", "mlxtend", "triton")
LARGEST, MEDIAN = 320, 130


def modules() -> dict[str, Path]:
    """Dotted names of all modules of the package; a package is its __init__."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ("fastgen", *path.relative_to(PACKAGE).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(dotted name, inside a function) of every import; `from p import m` names p.m where that is a module."""

    def walk(node: ast.AST, inside: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0 and child.module is not None, f"{path}: relative import"
                for alias in child.names:
                    whole = f"{child.module}.{alias.name}"
                    yield (whole if whole in MODULES or child.module == "fastgen" else child.module), inside
            else:
                yield from walk(child, inside or isinstance(child, ast.FunctionDef | ast.Lambda))

    yield from walk(ast.parse(path.read_text()), False)


def part(module: str) -> str:
    """The room of a module: fastgen.plan.fuse is in plan."""
    names = module.split(".")
    return names[1] if len(names) > 1 else "__init__"


def edges() -> dict[str, set[str]]:
    """Imports among the package's own modules."""
    return {name: {i for i, _ in imports(path) if i in MODULES and i != name} for name, path in MODULES.items()}


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Modules from which one comes back to them."""
    reach = {k: set(v) for k, v in graph.items()}
    for via in graph:
        for k in graph:
            if via in reach[k]:
                reach[k] |= reach[via]
    return sorted(k for k in graph if k in reach[k])


def test_every_part_has_a_floor() -> None:
    assert {part(name) for name in MODULES} | {"kernels"} == set(FLOOR)


def test_no_arrow_goes_up() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, others in edges().items()
        for other in sorted(others)
        if part(name) != part(other) and FLOOR[part(other)] >= FLOOR[part(name)]
    ]
    assert not wrong


def test_no_circle() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"], "the test can find one"
    assert circles(edges()) == []


@pytest.mark.parametrize("name", MODULES)
def test_imports_stand_at_the_top(name: str) -> None:
    inside = [what for what, deep in imports(MODULES[name]) if deep]
    assert [w for w in inside if not w.startswith(OPTIONAL)] == []


def test_nothing_is_imported_for_types_alone() -> None:
    """An import under TYPE_CHECKING is an arrow that the interpreter does not see."""
    assert [name for name, path in MODULES.items() if "TYPE_CHECKING" in path.read_text()] == []


def test_files_are_short() -> None:
    lengths = sorted((len(path.read_text().splitlines()), name) for name, path in MODULES.items())
    assert lengths[-1][0] <= LARGEST, lengths[-3:]
    real = [n for n, _ in lengths if n > 0]
    assert real[len(real) // 2] <= MEDIAN


def test_native_sources_include_no_torch() -> None:
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")]
    assert len(sources) > 30
    assert [str(p) for p in sources if "#include <torch" in p.read_text() or "#include <ATen" in p.read_text()] == []
