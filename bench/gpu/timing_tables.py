"""Timings as a person reads them: what was to be reached, the rungs side by side, and a table for each configuration.
Rows in (bench/gpu/ours.py, bench/gpu/peers.py), lines of Markdown out; no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from bench.gpu.lines import Row
from bench.report import number

Result = Row  # of one configuration: {name, audio, parameters, steps, proofs, rows}
OURS = "fastgen"
RUNGS = ("cluster16", "cluster8", "grid", "cta")

# Least times on one H200, derived and not measured: the dependent stages of a step times the cheapest known way to hand
# a stage's result on (a cluster's barrier and distributed shared memory), or the arithmetic where that is more.
# Images: milliseconds of a whole batch. Sequences: thousand samples a second of one stream at small batches.
FLOOR_MS: dict[str, dict[int, float]] = {"pixelcnnpp-cifar": {1: 15, 16: 20, 128: 28, 1024: 115}}
CLUSTERS = 8  # of 16 CTAs: as many streams run side by side before they share one
FLOOR_KHZ: dict[str, float] = {"wavenet-nv": 190, "wavenet-mol": 120}


@dataclass(frozen=True)
class Target:
    """What bfloat16 must reach on one H200. unit: ms a batch (at most), images/s or kHz a stream (at least)."""

    config: str
    batch: int
    bound: float
    unit: str


TARGETS = (
    Target("pixelcnnpp-cifar", 1, 40, "ms"),
    Target("pixelcnnpp-cifar", 16, 60, "ms"),
    Target("pixelcnnpp-cifar", 1024, 2000, "images/s"),
    Target("wavenet-nv", 1, 100, "kHz"),
    Target("wavenet-mol", 1, 50, "kHz"),
)


def timed(row: Row) -> bool:
    return bool(row.get("step_seconds"))


def value(config: Result, row: Row, unit: str) -> float:
    """The median of a row in ms a batch, images/s, or kHz a stream."""
    step: float = median(row["step_seconds"])
    if unit == "kHz":
        return 1e-3 / step
    seconds = step * float(config["steps"])
    return seconds * 1e3 if unit == "ms" else float(row["batch"]) / seconds


def floor(config: Result, batch: int) -> str:
    """The least value known: for an image batch between two of the list, that of the smaller one."""
    name = config["name"]
    if name in FLOOR_KHZ:
        return number(FLOOR_KHZ[name]) if batch <= CLUSTERS else ""
    known = FLOOR_MS.get(name, {})
    below = [b for b in known if b <= batch]
    if not below:
        return ""
    least = number(known[max(below)])
    return least if batch in known else f"> {least}"


# ---- rows by configuration ------------------------------------------------------------------------------------------
def arrange(rows: list[Row], order: Sequence[str] = ()) -> list[Result]:
    """Rows of all steps by configuration. What was timed later counts; an error behind a figure stands beside it."""
    table: dict[str, Result] = {}
    for row in rows:
        if "config" not in row:
            continue
        config = table.setdefault(row["config"], {"name": row["config"], "rows": [], "proofs": []})
        if "parameters" in row:
            config |= {k: row[k] for k in ("audio", "parameters", "steps")}
        elif "proof" in row:
            of = {k: row[k] for k in ("dtype", "team", "call_seconds") if k in row}
            config["proofs"].append({**of, **row["proof"]})
        elif "batch" in row:
            _put(config["rows"], {k: v for k, v in row.items() if k not in ("config", "step")})
    for config in table.values():
        wrong = {(p["dtype"], p["team"]) for p in config["proofs"] if not p["ok"]}
        for row in config["rows"]:
            row |= {"inexact": True} if (row["dtype"], row.get("team")) in wrong else {}
        for key, missing in (("audio", False), ("parameters", 0), ("steps", 0)):
            config.setdefault(key, missing)
    return sorted(table.values(), key=lambda c: list(order).index(c["name"]) if c["name"] in order else len(order))


def _put(rows: list[Row], row: Row) -> None:
    key = ("name", "dtype", "batch", "team")
    for k, other in enumerate(rows):
        if timed(row) and timed(other) and all(row.get(name) == other.get(name) for name in key):
            rows[k] = row
            return
    rows.append(row)


# ---- targets --------------------------------------------------------------------------------------------------------
def judge(configs: list[Result]) -> list[Row]:
    """Every target with the best that was measured: {config, batch, bound, unit, measured, reached}; None where nothing
    was."""
    return [_judged(target, configs) for target in TARGETS]


def _judged(target: Target, configs: list[Result]) -> Row:
    found = [
        value(config, row, target.unit)
        for config in configs
        if config["name"] == target.config
        for row in config["rows"]
        if row["name"] == OURS and row["dtype"] == "bfloat16" and row["batch"] == target.batch and timed(row)
    ]
    least = target.unit == "ms"
    measured = (min(found) if least else max(found)) if found else None
    reached = None if measured is None else measured <= target.bound if least else measured >= target.bound
    return {
        "config": target.config, "batch": target.batch, "bound": target.bound, "unit": target.unit,
        "measured": measured, "reached": reached,
    }  # fmt: skip


def targets_table(judged: list[Row]) -> list[str]:
    lines = ["| target, bfloat16 | wanted | measured | |", "|---|---:|---:|---|"]
    for t in judged:
        wanted = f"{'≤' if t['unit'] == 'ms' else '≥'} {number(t['bound'])} {t['unit']}"
        measured = "" if t["measured"] is None else f"{number(t['measured'])} {t['unit']}"
        verdict = {None: "not measured", True: "reached", False: "**not reached**"}[t["reached"]]
        lines.append(f"| {t['config']}, batch {t['batch']} | {wanted} | {measured} | {verdict} |")
    return lines


# ---- tables ---------------------------------------------------------------------------------------------------------
def tables(configs: list[Result]) -> list[str]:
    """Everything that was timed, and what was not and why."""
    lines = ["## Timings", ""]
    lines += [
        "Medians of repeated runs. Naive loop: one forward a step of the module in plain torch, measured and multiplied "
        "by the steps; eager queues: a careful loop with cached activations. Floor: derived, not measured.",
        "",
        *targets_table(judge(configs)),
    ]
    for config in configs:
        lines += ["", *_config(config), *_rungs(config), *_methods(config)]
    left = left_out(configs)
    return lines + (["", "Not timed:", "", *(f"- {text}" for text in left)] if left else [])


def _config(config: Result) -> list[str]:
    lines = [f"### {config['name']}", f"{config['parameters'] / 1e6:.2f}M parameters, {config['steps']} steps."]
    lines += [f"{p['dtype']}, {p['team']}: {p['text']}." for p in config["proofs"]]
    calls = [p["call_seconds"] for p in config["proofs"] if "call_seconds" in p]
    return lines + ([f"Of a whole run {number(median(calls) * 1e3)} ms are the call itself."] if calls else [])


def _rungs(config: Result) -> list[str]:
    """The kinds of team side by side, if several were asked for."""
    rows = [r for r in config["rows"] if timed(r) and r.get("team") in RUNGS]
    if not rows:
        return []
    lines = ["", f"| batch | dtype | {' | '.join(RUNGS)} |", f"|---:|---|{'---:|' * len(RUNGS)}"]
    for batch, dtype in dict.fromkeys((r["batch"], r["dtype"]) for r in rows):
        by = {r["team"]: r for r in rows if (r["batch"], r["dtype"]) == (batch, dtype)}
        cells = [_rung(config, by[rung]) if rung in by else "" for rung in RUNGS]
        lines.append(f"| {batch} | {dtype} | {' | '.join(cells)} |")
    return [*lines, "", "Microseconds of a step of the whole batch; *: of the first sites alone."]


def _rung(config: Result, row: Row) -> str:
    unit = "kHz" if config["audio"] else "ms"
    star = "" if row["how"].startswith("whole") else "*"
    wrong = " NOT EXACT" if row.get("inexact") else ""
    return f"{number(median(row['step_seconds']) * 1e6)}{star} ({number(value(config, row, unit))} {unit}){wrong}"


def _methods(config: Result) -> list[str]:
    """Ours on the rung that auto takes, and the peers."""
    rows = [r for r in config["rows"] if timed(r) and r.get("team") not in RUNGS]
    if not rows:
        return []
    unit = "kHz a stream" if config["audio"] else "ms for the batch"
    lines = [
        "",
        f"| batch | method | {unit} | samples/s | floor | x naive | teams |",
        "|---:|---|---:|---:|---:|---:|---|",
    ]
    rows.sort(key=lambda r: (r["batch"], r["name"] != OURS, r["name"], r["dtype"]))
    lines += [_line(config, row) for row in rows]
    notes = dict.fromkeys(f"{r['name']}: {r['how']}" for r in rows if r["how"] != "whole runs")
    return [*lines, "", f"Timed: {'; '.join([*notes, 'the others: whole runs'])}."]


def _line(config: Result, row: Row) -> str:
    mine = row["name"] == OURS
    audio = config["audio"]
    main = number(value(config, row, "kHz" if audio else "ms"))
    main = "NOT EXACT " + main if row.get("inexact") else f"**{main}**" if mine else main
    per_second = row["batch"] / median(row["step_seconds"]) / (1 if audio else config["steps"])
    cells = [str(row["batch"]), f"{row['name']} {row['dtype']}", main, number(per_second)]
    cells += [floor(config, row["batch"]) if mine else "", _ratio(config, row) if mine else "", row.get("rung", "")]
    return f"| {' | '.join(cells)} |"


def _ratio(config: Result, row: Row) -> str:
    """How much faster than the fastest naive loop at the same batch."""
    naive = [median(r["step_seconds"]) for r in config["rows"]
             if timed(r) and r["name"].startswith("naive") and r["batch"] == row["batch"]]  # fmt: skip
    return number(min(naive) / median(row["step_seconds"])) if naive else ""


def left_out(configs: list[Result]) -> list[str]:
    """One line for each contender and reason, with the batches."""
    groups: dict[tuple[str, str, str, str], list[str]] = {}
    for config in configs:
        for row in config["rows"]:
            if not timed(row):
                why = row.get("failed") or row.get("skipped", "")
                who = f"{row['name']} {row['team']}" if "team" in row else row["name"]
                key = (config["name"], who, row["dtype"], f"FAILED: {why}" if "failed" in row else why)
                groups.setdefault(key, []).append(str(row["batch"]))
    return [f"{c}, {n} {d}, batch {', '.join(b)}: {why}" for (c, n, d, why), b in groups.items()]
