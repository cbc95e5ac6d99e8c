"""This tree against another commit, which is built in a temporary folder and timed by today's bench/."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from bench.machine import ROOT
from bench.report import Result

ROUNDS = 2  # the two take turns, so that a change of the machine's speed does not pass for a change of ours


def against(revision: str, arguments: list[str]) -> tuple[Result, Result]:
    """Our own rows here and at `revision`, which must be able to build its extension with this Python.

    Raises SystemExit when the revision is unknown, does not build or does not run.
    """
    known = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "--verify", f"{revision}^{{commit}}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if known.returncode:
        raise SystemExit(f"bench: no commit {revision!r} in {ROOT}")
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", revision], capture_output=True, check=True)
    with tempfile.TemporaryDirectory(prefix="fastgen-base-") as name:
        folder = Path(name)
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
            tar.extractall(folder, filter="data")
        shutil.rmtree(folder / "bench", ignore_errors=True)
        leave = shutil.ignore_patterns("results", "__pycache__")
        shutil.copytree(ROOT / "bench", folder / "bench", ignore=leave)
        _call(folder, ["setup.py", "-q", "build_ext", "--inplace"])
        runs: tuple[list[Result], list[Result]] = ([], [])
        for turn in range(ROUNDS):
            for results, tree in zip(runs, (ROOT, folder), strict=True):
                out = folder / f"bench-{len(runs[0])}-{len(runs[1])}-{turn}"
                _call(tree, ["-m", "bench.run", *arguments, "--only-ours", "--out", str(out)])
                results.append(json.loads(next(out.glob("*.json")).read_text()))
    here, there = (_merged(results) for results in runs)
    there["machine"]["revision"] = known.stdout.strip()
    return here, there


def _merged(results: list[Result]) -> Result:
    """The times of several runs of the same as those of one."""
    merged = results[0]
    for more in results[1:]:
        for config, other in zip(merged["configs"], more["configs"], strict=True):
            for row, again in zip(config["rows"], other["rows"], strict=True):
                row["step_seconds"] += again["step_seconds"]
    return merged


def _call(folder: Path, command: list[str]) -> None:
    done = subprocess.run([sys.executable, *command], cwd=folder, stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise SystemExit(f"bench: {' '.join(command)} failed in {folder}")
