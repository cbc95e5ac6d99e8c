"""The report of a call, from the file of its rows alone: JSON, and the same as a person reads it.

python -m bench.gpu report OUT/first.jsonl     writes it again, where the machine was taken away before the end
"""

from __future__ import annotations

import re
from pathlib import Path

from bench.gpu import check_tables, timing_tables
from bench.gpu import steps as S
from bench.gpu.check_tables import some
from bench.gpu.driver import dump
from bench.gpu.driver import failed as step_failed
from bench.gpu.lines import Row, read_lines
from bench.gpu.plot import plot
from bench.layers import report as layers_report

UNKNOWN: Row = dict.fromkeys(("device", "driver", "torch", "cuda", "triton", "revision"), "unknown")


def slug(text: str) -> str:
    """Letters, digits, dots, dashes and underscores only."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-")


def failed(rows: list[Row]) -> bool:
    """Whether a step failed, or rungs gave different bytes."""
    return step_failed(rows) or not check_tables.same_bytes(rows)


def gather(rows: list[Row], call: str, order: tuple[str, ...] = ()) -> Row:
    """{call, machine, steps, failed, timings, targets, rows}: all that a call found out."""
    machine = next((r for r in rows if "device" in r and "multiprocessors" in r), UNKNOWN | {"date": "unknown"})
    configs = timing_tables.arrange(rows, order)
    ended = [r for r in rows if "result" in r]
    return {
        "call": call, "machine": {k: v for k, v in machine.items() if k != "step"},
        "failed": failed(rows), "steps": ended, "timings": configs,
        "targets": timing_tables.judge(configs),
        "rows": [r for r in rows if "result" not in r and not _timing(r)],
    }  # fmt: skip


def _timing(row: Row) -> bool:
    """Of those that `timings` holds."""
    return "config" in row and any(key in row for key in ("batch", "proof", "parameters"))


def render(result: Row) -> str:
    """The whole report in Markdown."""
    m, rows = result["machine"], result["rows"]
    lines = [
        f"{m['device']}, driver {m['driver']}, torch {m['torch']} (CUDA {m['cuda']}), triton {m['triton']}; {m['date']}; "
        f"revision {m['revision']}; {result['call']} call. {'FAILED' if result['failed'] else 'All passed'}.",
        "",
        *_steps(result["steps"]),
    ]
    layers = [r for r in result["rows"] if "checked" in r], [r for r in result["rows"] if r.get("rows")]
    sections = [
        check_tables.probe(rows), check_tables.smoke(rows),
        timing_tables.tables(result["timings"]) if result["timings"] else [],
        check_tables.phases(rows), check_tables.tests(rows),
        ["## Layers", "", *layers_report.table(*layers)] if any(layers) else [],
    ]  # fmt: skip
    for section in sections:
        lines += ["", *section] if section else []
    return "\n".join(lines) + "\n"


def _steps(ended: list[Row]) -> list[str]:
    """How many steps are plainly ok; and all others, those of one result and reason in one line. Tests that failed have
    their own section."""
    good = [r for r in ended if r["result"] == S.OK]
    lines = [f"{len(good)} steps ok, in {sum(r['seconds'] for r in good):.0f} s of processes."]
    rest: dict[tuple[str, str], list[Row]] = {}
    for row in ended:
        if row["result"] != S.OK and not ("::" in row["step"] and row["result"] == S.FAILED):
            rest.setdefault((row["result"], row["why"]), []).append(row)
    if rest:
        lines += ["", "| step | result | s | |", "|---|---|---:|---|"]
    for (result, why), rows in rest.items():
        seconds = sum(r["seconds"] for r in rows)
        lines.append(f"| {some([r['step'] for r in rows])} | {result} | {seconds:.0f} | {_cell(why)} |")
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")[:200]


def write(path: Path, order: tuple[str, ...] = ()) -> Path:
    """<date>-<revision>-<device>-<call>.json and .md beside the rows, and a plot where peers were timed; the .md's path."""
    result = gather(read_lines(path), path.stem, order)
    m = result["machine"]
    stem = f"{m['date'][:10]}-{slug(m['revision'].rstrip('+'))}-{slug(m['device'])}-{path.stem}"
    text = path.with_name(stem + ".md")
    dump(path.with_name(stem + ".json"), result)
    text.write_text(render(result))
    if any(r["name"] != timing_tables.OURS for c in result["timings"] for r in c["rows"]):
        plot(result["timings"], f"{m['device']}, {m['date'][:10]}, {m['revision']}", path.with_name(stem + ".png"))
    return text
