"""Checksums of every table of every case's program: `python -m tests.program_bytes [TABLE ...] > FILE`.

Two revisions that plan alike print the same lines, so `diff` shows that a change of structure changed no behaviour. Each
case is packed in float32 and bfloat16; sequences also at 96 sites, and from there at 301.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from fastgen import Sampler
from fastgen.errors import FastgenError
from tests.cases import Case, cases
from tests.oracle import at_length, compile_case

DTYPES = (torch.float32, torch.bfloat16)
PLANNED, LONGER = 96, 301


def packed(sampler: Sampler, length: int | None, dtype: torch.dtype) -> Any:
    """The program of a sampler."""
    return (getattr(sampler, "programs", None) or sampler.plan.program)(length, dtype)


def programs(case: Case) -> Iterator[tuple[str, Any]]:
    """(label, program or the error) of each dtype and length of a case."""
    subjects: list[tuple[Case, int | None]] = [(case, None)]
    if "T" in case.axes and len(case.shape) > 1:
        subjects += [(at_length(case, PLANNED), None), (at_length(case, PLANNED), LONGER)]
    for subject, length in subjects:
        for dtype in DTYPES:
            label = f"{case.name} {str(dtype)[6:]} {subject.sites} {length or ''}"
            try:
                yield label, packed(compile_case(subject), length, dtype)
            except (FastgenError, RuntimeError, IndexError) as error:
                yield label, str(error).splitlines()[0]


def digest(table: Any) -> str:
    """A short checksum of an array's bytes (of records field by field: padding is nobody's), or the number itself."""
    if not isinstance(table, np.ndarray | np.generic):
        return str(table)
    fields = [table] if table.dtype.names is None else [table[name] for name in table.dtype.names]
    return hashlib.sha256(b"".join(np.ascontiguousarray(f).tobytes() for f in fields)).hexdigest()[:16]


def lines(wanted: set[str]) -> Iterator[str]:
    """One line a table."""
    for case in cases():
        for label, program in programs(case):
            if isinstance(program, str):
                yield f"{label}: {program}"
                continue
            for name, table in sorted(program.__dict__.items()):
                if not wanted or name in wanted:
                    yield f"{label} {name} {digest(table)}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in lines(set(sys.argv[1:])):
        print(line)
