"""Writes the packed program of every case to a folder, for csrc/tests/test_cases.cpp: `python -m tests.dump_programs DIR`.

A file is the numbers of the program and then its tables, each behind its size in bytes (all int64, in the order below).
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from tests.cases import cases
from tests.oracle import compile_case

NUMBERS = ("rows", "cols", "steps", "row_len", "period", "arena")
TABLES = (
    "buffers", "taps", "code", "ops", "row_items", "row_ptr", "step_items", "step_ptr", "step_site", "step_phase", "param_ptr",
    "consts", "head",
    "weights",
)  # fmt: skip


def dump(folder: Path) -> int:
    """Writes NAME.program for every case; returns how many."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.program"):
        old.unlink()
    for case in cases():
        tables = compile_case(case).programs().tables()
        parts = [np.array([tables[name] for name in NUMBERS], dtype=np.int64).tobytes()]
        for name in TABLES:
            data = np.ascontiguousarray(tables[name]).tobytes()
            parts += [np.int64(len(data)).tobytes(), data]
        (folder / f"{case.name}.program").write_bytes(b"".join(parts))
    return len(cases())


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"{dump(Path(sys.argv[1]))} programs in {sys.argv[1]}")
