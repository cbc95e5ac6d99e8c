"""The same benchmark on another commit: its sources in a temporary folder, built there, timed by today's bench/."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from bench.machine import ROOT


def run_base(revision: str, arguments: list[str]) -> dict[str, Any]:
    """Results of `revision`, which must be able to build its extension with this Python.

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
        shutil.copytree(
            ROOT / "bench", folder / "bench", ignore=shutil.ignore_patterns("results", "__pycache__")
        )
        print(f"building {revision} ...", flush=True)
        _call(folder, ["setup.py", "-q", "build_ext", "--inplace"])
        _call(folder, ["bench/run.py", *arguments, "--only-ours", "--out", "base-results"])
        result: dict[str, Any] = json.loads(next((folder / "base-results").glob("*.json")).read_text())
    result["machine"]["revision"] = known.stdout.strip()
    return result


def _call(folder: Path, command: list[str]) -> None:
    if subprocess.run([sys.executable, *command], cwd=folder, check=False).returncode:
        raise SystemExit(f"bench: {' '.join(command)} failed for the base revision")
