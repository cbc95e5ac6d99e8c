"""All contenders on all configurations within a given time. Every kind of contender runs in a process of its own, which
works through the configurations and writes a line of JSON for each row; when such a process dies or is late, the
configuration it was at is given up and another process takes over with the next.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.gpu_report import Result, Row

# Most wanted first: where time runs out, the last are left out.
CONFIGS = ("pixelcnnpp-cifar", "wavenet-nv", "wavenet-mol", "gated-pixelcnn-64", "wavenet-nv-large")
BATCHES = (1, 4, 16, 64, 256, 1024)
SITES = 4096
SHARES = {"ours": 0.5, "peers": 0.3, "compile": 0.2}  # of the time; what one leaves over is the next one's
GRACE = 10.0  # seconds that a process may be late before it is ended
START = 8.0  # seconds until it has loaded torch, about


class Lines:
    """Rows as a file of JSON lines, flushed one by one: what was measured outlives the process."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("a")

    def __call__(self, row: Row) -> None:
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()


def read_lines(path: Path) -> list[Row]:
    """Rows that a process has written; a last line cut short does not count."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def worker(
    kind: str, configs: list[str], batches: list[int], sites: int, seconds: float, out: Path, device: str
) -> None:
    """One process: every configuration in turn, each with its share of what is left."""
    from bench import configs as known
    from bench.gpu_contenders import run_kind

    end, emit = time.perf_counter() + seconds, Lines(out)
    for k, name in enumerate(configs):
        case = known.make(name, sites)
        emit({"config": name, "begins": True, "audio": case.audio, "parameters": case.parameters,
              "steps": case.spec.steps})  # fmt: skip
        run_kind(kind, case, batches, (end - time.perf_counter()) / (len(configs) - k), emit, device)
        emit({"config": name, "ends": True})


def supervise(kind: str, command: list[str], configs: list[str], seconds: float, out: Path) -> list[Row]:
    """Runs `command` (see gpu.py) until every configuration has been at it; all rows, and one for each given up."""
    end, waiting, rows = time.perf_counter() + seconds, list(configs), []
    while waiting:
        left = end - time.perf_counter() - START
        if left < START:
            rows += [_given_up(name, kind, "no time left") for name in waiting]
            break
        out.unlink(missing_ok=True)
        why = _call(
            [*command, "--seconds", f"{left:.0f}", "--config", *waiting, "--out", str(out)], left + START + GRACE
        )
        found = read_lines(out)
        rows += found
        ended = [r["config"] for r in found if "ends" in r]
        waiting = [name for name in waiting if name not in ended]
        if waiting:  # the first of them was under way
            rows.append(_given_up(waiting.pop(0), kind, why or "its process ended early"))
    return rows


def _given_up(config: str, kind: str, why: str) -> Row:
    """Only what is ours can fail; a peer that does not run is left out, and so is what came too late."""
    failed = kind == "ours" and not why.startswith(("no time", "late"))
    return {"config": config, "name": f"{kind}, what is not in the table", "dtype": "", "batch": "any",
            "failed" if failed else "skipped": why}  # fmt: skip


def _call(command: list[str], limit: float) -> str:
    """Why it ended badly, if it did. Everything that it started ends with it: torch.compile has processes of its own."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        late = False
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        text = output.read()
    print(text, end="", flush=True)
    if late:
        return f"late: ended after {limit:.0f} s"
    if not process.returncode:
        return ""
    last = text.strip().splitlines()[-1:] or ["it said nothing"]
    return f"its process ended with status {process.returncode}: {last[0][:200]}"


def run(command: list[str], options: list[str], configs: list[str], seconds: float, work: Path) -> list[Row]:
    """All kinds, one after the other: `command KIND options`."""
    end, rows, shares = time.perf_counter() + seconds, [], dict(SHARES)
    for kind in SHARES:
        part = (end - time.perf_counter()) * shares[kind] / sum(shares.values())
        shares.pop(kind)
        # A PixelCNN++ takes the compiler minutes, so it comes last there.
        order = sorted(configs, key=lambda name: name.startswith("pixelcnnpp")) if kind == "compile" else configs
        rows += supervise(kind, [*command, kind, *options], order, part, work / f"{kind}.jsonl")
    return rows


def arrange(rows: list[Row], order: tuple[str, ...] = CONFIGS) -> list[Result]:
    """Rows of all processes by configuration; one that never began has no figures of its own."""
    table: dict[str, dict[str, Any]] = {}
    for row in rows:
        config = table.setdefault(row["config"], {"name": row["config"], "rows": [], "proofs": []})
        if "begins" in row:
            config |= {k: row[k] for k in ("audio", "parameters", "steps")}
        elif "proof" in row:
            known = {k: row[k] for k in ("plan_seconds", "compile_seconds")}
            config["proofs"].append({"dtype": row["dtype"], **row["proof"], **known})
        elif "ends" not in row:
            config["rows"].append({k: v for k, v in row.items() if k != "config"})
    for config in table.values():
        for key, missing in (("audio", False), ("parameters", 0), ("steps", 0)):
            config.setdefault(key, missing)
    return sorted(table.values(), key=lambda c: order.index(c["name"]) if c["name"] in order else len(order))
