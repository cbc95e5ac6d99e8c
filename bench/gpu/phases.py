"""Where the time of the persistent kernel goes, by the profiler's samples of its program counters.

    python -m bench.gpu.phases wavenet-nv --keep FOLDER [--lines FILE]

One run of one sample in bfloat16 is profiled by ncu: of a sequence its first sites, of an image its first four rows (one
period of the coarse levels). Rows: {phase, samples, share, of_busy, waiting} for each phase (source_map.py), {function,
samples} for the functions, {profiled, ...} for the whole. A warp that waits at a barrier is sampled too, so that
`of_busy` leaves those samples out: the share of what warps did while they did something. The whole table of the profile,
every instruction with its samples and stalls, is kept as FOLDER/phases-CONFIG.csv.gz.

Exit status 3 where ncu is missing or may not profile.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from bench.gpu.lines import Lines, Row
from bench.gpu.source_map import BARRIER, Section, disassemble, phase_of
from bench.gpu.steps import NOT_RUN_STATUS

SITES, ROWS = 128, 4  # of a sequence, of an image
SAMPLES = "Warp Stall Sampling (All Samples)"
OPTIONS = (
    "--section", "SourceCounters", "--section", "WarpStateStats", "--launch-count", "1", "--clock-control", "none",
    "--kernel-name", "regex:run_program",
)  # fmt: skip
REFUSALS = ("ERR_NVGPUCTRPERM", "LibraryNotLoaded", "Failed to initialize the profiler", "not supported on this device")
WAITS = ("BAR.", "UCGABAR", "ERRBAR", "MEMBAR", "CCTL")  # of a barrier, whichever kind
ALIKE = 0.95  # of the opcodes of profile and disassembly, at least


class CannotProfileError(Exception):
    """No profile on this machine, and why."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="bench.gpu.phases", description=(__doc__ or "").split("\n")[0])
    p.add_argument("config", help="of bench/configs.py")
    p.add_argument("--team", default="auto", help="the kind of team")
    p.add_argument("--run", action="store_true", help="only the run that is profiled")
    p.add_argument("--keep", type=Path, help="a folder for the table")
    p.add_argument("--lines", type=Path)
    return p.parse_args(arguments)


def run(config: str, team: str) -> None:
    """What is profiled: its first launch of the kernel."""
    import torch

    from bench import configs
    from bench.gpu.ours import conditioning, on_team, planned

    case = configs.make(config, SITES, ROWS)
    sampler = on_team(planned(case), torch.bfloat16, team)
    print(sampler.executor.rung(1)["text"], flush=True)  # type: ignore[attr-defined]
    sampler.sample(1, cond=conditioning(case, 1))


def profile(config: str, team: str, folder: Path) -> str:
    """The profile's source page as CSV. Raises CannotProfileError."""
    ncu = shutil.which("ncu")
    if ncu is None:
        raise CannotProfileError("ncu is not installed")
    report = folder / "profile.ncu-rep"
    program = [sys.executable, "-m", "bench.gpu.phases", config, "--team", team, "--run"]
    done = subprocess.run(
        [ncu, *OPTIONS, "--export", str(report), *program], capture_output=True, text=True, check=False
    )
    said = done.stdout + done.stderr
    print(said)
    if done.returncode or not report.exists():
        refusal = [line for line in said.splitlines() if any(word in line for word in REFUSALS)]
        if refusal:
            raise CannotProfileError(f"ncu: {refusal[0].strip()}")
        raise SystemExit(f"bench.gpu.phases: error: ncu ended with status {done.returncode} and no profile")
    show = [ncu, "--import", str(report), "--page", "source", "--csv", "--print-source", "sass"]
    return subprocess.run(show, capture_output=True, text=True, check=True).stdout


def read_samples(text: str) -> list[tuple[int, str, int]]:
    """(offset from the first instruction, opcode, samples) out of the source page: a table whose header begins with
    Address and Source, with other lines before it. Raises ValueError where there is none."""
    rows = list(csv.reader(text.splitlines()))
    at = next((i for i, row in enumerate(rows) if "Source" in row and SAMPLES in row), None)
    if at is None:
        raise ValueError(f"the profile has no table with the columns Source and {SAMPLES!r}")
    header = rows[at]
    address, source, samples = (header.index(name) for name in ("Address", "Source", SAMPLES))
    found = []
    for row in rows[at + 1 :]:
        if len(row) != len(header) or not row[address].strip():
            break  # another table
        words = [w for w in row[source].split() if not w.startswith("@")]
        number = row[samples].replace(",", "") or "0"
        found.append((int(row[address], 16), words[0].rstrip(";") if words else "", int(float(number))))
    first = found[0][0] if found else 0
    return [(a - first, opcode, n) for a, opcode, n in found]


def matching(samples: list[tuple[int, str, int]], sections: Iterable[Section]) -> Section:
    """The kernel that was profiled: the one whose opcodes are those of the profile. Raises ValueError."""

    def alike(section: Section) -> float:
        there = dict(zip(section.offsets, section.opcodes, strict=True))
        same = sum(there.get(offset) == opcode for offset, opcode, _ in samples)
        return same / max(len(samples), len(there), 1)

    scored = sorted(((alike(s), s) for s in sections), key=lambda pair: pair[0])
    if not scored or scored[-1][0] < ALIKE:
        best = f"{scored[-1][0]:.0%} alike" if scored else "no kernel found"
        raise ValueError(f"no kernel of the extension is the profiled one ({best})")
    return scored[-1][1]


def tabulate(samples: list[tuple[int, str, int]], section: Section) -> list[Row]:
    """Samples by phase and by function."""
    where = dict(zip(section.offsets, section.chains, strict=True))
    phases, functions, waits = Counter[str](), Counter[str](), Counter[str]()
    for offset, opcode, n in samples:
        phase, function = phase_of(where.get(offset, ()))
        phases[phase] += n
        functions[function] += n
        if phase == BARRIER or opcode.startswith(WAITS):
            waits[phase] += n
    total, waiting = phases.total(), waits.total()
    rows: list[Row] = [{"profiled": section.name, "samples": total, "waiting": waiting}]
    for phase, n in phases.most_common():
        busy = n - waits[phase]
        rows.append({"phase": phase, "samples": n, "share": n / max(total, 1), "waiting": waits[phase],
                     "of_busy": busy / max(total - waiting, 1)})  # fmt: skip
    return rows + [{"function": name, "samples": n} for name, n in functions.most_common() if n]


def tool(name: str) -> str:
    """NVIDIA's, on the PATH or in Triton's package."""
    spec = find_spec("triton")
    carried = [] if spec is None or spec.origin is None else [Path(spec.origin).parent / "backends" / "nvidia" / "bin"]
    found = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", os.defpath), *map(str, carried)]))
    if found is None:
        raise CannotProfileError(f"{name} is not installed")
    return found


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if args.run:
        run(args.config, args.team)
        return 0
    emit = Lines(args.lines)
    with tempfile.TemporaryDirectory(prefix="fastgen-phases-") as name:
        folder = Path(name)
        try:
            text = profile(args.config, args.team, folder)
            if args.keep is not None:
                (args.keep / f"phases-{args.config}.csv.gz").write_bytes(gzip.compress(text.encode()))
            cuobjdump, nvdisasm = tool("cuobjdump"), tool("nvdisasm")
        except CannotProfileError as error:
            print(error)
            return NOT_RUN_STATUS
        from fastgen.native import native

        samples = read_samples(text)
        section = matching(samples, disassemble(Path(native().__file__), folder, cuobjdump, nvdisasm))
    for row in tabulate(samples, section):
        emit({"config": args.config, **row})
        print(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
