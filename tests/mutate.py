"""Mutates the tables of a program at random and runs what is not refused: `python -m tests.mutate CASE [SEED [N]]`.

Prints each mutation before it is tried, so that the last line before a crash names it, and at the end how many were
refused and how many ran.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np
import torch

from fastgen.backends.request import Request
from fastgen.native import native
from tests.oracle import by_name, compile_case

TABLES = (
    "buffers",
    "taps",
    "code",
    "ops",
    "row_items",
    "step_items",
    "head",
    "row_ptr",
    "step_ptr",
    "step_site",
    "step_phase",
    "param_ptr",
)
NUMBERS = ("rows", "cols", "steps", "row_len", "period", "arena")
INTS = (
    -(2**31),
    -1000,
    -3,
    -2,
    -1,
    0,
    1,
    2,
    3,
    5,
    15,
    16,
    17,
    63,
    64,
    65,
    255,
    4096,
    1 << 20,
    1 << 24,
    2**31 - 2,
    2**31 - 1,
)
FLOATS = (0.0, -1.0, 0.5, 1e9, -1e9, 3e38, float("inf"), -float("inf"), float("nan"))


def mutate(tables: dict[str, Any], kind: str, rng: np.random.Generator) -> tuple[dict[str, Any], str]:
    """One or two changes: of a field, or of a table's length."""
    out = {k: v.copy() if isinstance(v, np.ndarray) else v for k, v in tables.items()}
    said = []
    for _ in range(int(rng.integers(1, 3))):
        if kind == "cut":
            name = str(rng.choice([*TABLES, "weights", "consts"]))
            keep = int(rng.integers(0, len(out[name]) + 1))
            out[name] = (
                np.ascontiguousarray(out[name][:keep])
                if rng.random() < 0.8
                else np.concatenate([out[name], out[name][:1]])
            )
            said.append(f"{name}[:{keep}]")
        elif kind == "int" and rng.random() < 0.15:
            name = str(rng.choice(NUMBERS))
            out[name] = nearby(int(out[name]), rng)
            said.append(f"{name}={out[name]}")
        else:
            said.append(change(out, kind, rng))
    return out, " ".join(said)


def nearby(value: int, rng: np.random.Generator) -> int:
    """Another integer: a little off, or one of the awkward ones."""
    return value + int(rng.integers(-2, 3)) if rng.random() < 0.4 else int(rng.choice(INTS))


def change(out: dict[str, Any], kind: str, rng: np.random.Generator) -> str:
    """Changes one field of one record."""
    name = str(rng.choice(["code", "head", "consts", "weights"])) if kind == "float" else str(rng.choice(TABLES))
    table = out[name]
    if not len(table):
        return f"{name} is empty"
    row = int(rng.integers(len(table)))
    if table.dtype.names is None:
        table[row] = (
            rng.choice(FLOATS)
            if kind == "float"
            else np.int32(max(-(2**31), min(2**31 - 1, nearby(int(table[row]), rng))))
        )
        return f"{name}[{row}]={table[row]}"
    wanted = "f" if kind == "float" else "i"
    fields = [f for f in table.dtype.names if table.dtype[f].base.kind == wanted]
    field = str(rng.choice(fields))
    cell = table[field]
    if cell.ndim > 1:
        column = int(rng.integers(cell.shape[1]))
        cell[row, column] = nearby(int(cell[row, column]), rng) if abs(int(cell[row, column])) < 2**30 else 0
        return f"{name}[{row}].{field}[{column}]={cell[row, column]}"
    if wanted == "f":
        cell[row] = rng.choice(FLOATS)
    else:
        limit = 2**31 - 1 if table.dtype[field].itemsize == 4 else 2**62
        cell[row] = max(-limit, min(limit, nearby(int(cell[row]), rng)))
    return f"{name}[{row}].{field}={cell[row]}"


def main(name: str, seed: int = 0, count: int = 300) -> None:
    """Tries `count` mutations, of all kinds in turn."""
    torch.set_num_threads(1)
    (case,) = by_name(name)
    sampler = compile_case(case)
    program = sampler.programs(None)
    tables = program.tables()
    cond = [c.numpy() for c in sampler.executor.conditioning.sources(program, Request(2, 0, cond=case.conds(2)))]  # type: ignore[attr-defined]
    rng = np.random.default_rng(seed)
    refused = ran = 0
    for k in range(count):
        changed, what = mutate(tables, ("int", "cut", "float")[k % 3], rng)
        print(what, flush=True)
        if int(changed["arena"]) > 1 << 24 or int(changed["steps"]) > 1 << 16:
            changed["arena"], changed["steps"] = (
                min(int(changed["arena"]), 1 << 24),
                min(int(changed["steps"]), 1 << 16),
            )
        try:
            engine = native().CpuExecutor(changed, 2)
            deadline = time.monotonic() + 2
            engine.run(2, 1, 0, 1.0, cond, None, None, True, lambda steps, end=deadline: time.monotonic() < end)
            ran += 1
        except (ValueError, native().Cancelled, MemoryError) as error:
            assert str(error), "an error must say what is wrong"
            refused += 1
    print(refused, ran)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
