"""Results as a person reads them: one markdown table per configuration, from the JSON that run.py writes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

Result = dict[str, Any]


def number(x: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}" if x >= 1 else f"{x:.3g}"


def render(results: Result) -> str:
    """The whole report, from what run.py wrote."""
    lines = [_machine(results["machine"], results["options"]), ""]
    for config in results["configs"]:
        lines += [*_config(config, results["machine"]), ""]
    return "\n".join(lines).rstrip() + "\n"


def compare(new: Result, old: Result) -> str:
    """How much faster `new` is than `old`, for the rows that both have."""
    before = {(c["name"], r["batch"], r["name"]): r for c in old["configs"] for r in c["rows"]}
    lines = [
        f"{new['machine']['revision']} against {old['machine']['revision']} (in turns):",
        "",
        "| configuration | batch | method | ms a step before | now | times faster |",
        "|---|---:|---|---:|---:|---:|",
    ]
    for c in new["configs"]:
        for r in c["rows"]:
            base = before.get((c["name"], r["batch"], r["name"]))
            if base is not None:
                was, now = median(base["step_seconds"]), median(r["step_seconds"])
                cells = [c["name"], str(r["batch"]), r["name"], number(was * 1e3), number(now * 1e3)]
                lines.append(f"| {' | '.join(cells)} | {was / now:.2f} |")
    return "\n".join(lines) + "\n"


def _machine(m: Result, options: Result) -> str:
    cache = ", ".join(f"{k} {v}" for k, v in m["caches"].items())
    return "\n".join(
        [
            f"{m['cpu']}, {m['cores']} cores ({cache}), {options['threads']} threads, {m['isa']}; "
            f"torch {m['torch']}; {m['date']}; revision {m['revision']}.",
            f"Measured limits of the machine in this run: {m['gflops']:.0f} GFLOP/s (float32), memory "
            f"{m['read_gbps']:.1f} GB/s, the cores' own caches {m['cached_gbps']:.0f} GB/s. "
            f"Load average {m['load'][0]:.1f} before, {m['load'][1]:.1f} after (other work included).",
            f"Medians of {options['repeats']} interleaved runs, with the fastest and slowest.",
        ]
    )


def _config(c: Result, machine: Result) -> list[str]:
    plan = c["plan"]
    peak = "" if plan.get("peak_mib") is None else f", peak memory {number(plan['peak_mib'])} MiB"
    unit = "samples/s per stream" if c["audio"] else "seconds for the batch"
    lines = [
        f"### {c['name']}",
        f"{c['parameters'] / 1e6:.2f}M parameters, {c['steps']} steps. "
        f"Planned in {plan['plan_seconds']:.1f} s, ready in {plan['compile_seconds']:.1f} s{peak}."
        f"{_verified(c)}",
        "",
        f"| batch | method | {unit} | fastest-slowest | x naive |{' x eager |' if c['audio'] else ''} "
        "GFLOP/s | of peak | weights GB/s | of memory |",
        "|---:|---|---:|---:|---:|" + ("---:|" if c["audio"] else "") + "---:|---:|---:|---:|",
    ]
    for row in c["rows"]:
        lines.append(_row(c, row, machine))
    notes = dict.fromkeys(f"{r['name']}: {r['how']}" for r in c["rows"] if r["how"] != "whole runs")
    timed = [*notes, "the others: whole runs"] if notes else ["whole runs"]
    return [*lines, "", f"Timed: {'; '.join(timed)}."]


def _verified(c: Result) -> str:
    errors = "; ".join(f"{name} {error:.1e}" for name, error in c.get("max_abs_error", {}).items())
    return f" Largest error of a parameter against forward: {errors}." if errors else ""


def _row(c: Result, row: Result, machine: Result) -> str:
    """One method at one batch."""
    times = row["step_seconds"]
    mid = median(times)
    rates = [1 / t if c["audio"] else t * c["steps"] for t in (mid, min(times), max(times))]
    cells = [str(row["batch"]), row["name"], number(rates[0])]
    cells.append("once" if len(times) == 1 else f"{number(rates[1])}-{number(rates[2])}")
    cells.append(_ratio(c, row, "naive loop"))
    if c["audio"]:
        cells.append(_ratio(c, row, "eager queues"))
    if "weight_bytes_per_step" in row:
        gflops = 2e-9 * row["macs_per_step"] * row["batch"] / mid
        gbps = 1e-9 * row["weight_bytes_per_step"] / mid
        cells += [number(gflops), f"{gflops / machine['gflops']:.0%}"]
        cells += [number(gbps), f"{gbps / machine['read_gbps']:.0%}"]
    else:
        cells += ["", "", "", ""]
    return f"| {' | '.join(cells)} |"


def _ratio(c: Result, row: Result, peer: str) -> str:
    """How much faster than the peer at the same batch."""
    for other in c["rows"]:
        if other["name"] == peer and other["batch"] == row["batch"] and other is not row:
            return number(median(other["step_seconds"]) / median(row["step_seconds"]))
    return ""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Print the tables of a result file, or compare two.")
    parser.add_argument("new", type=Path)
    parser.add_argument("old", type=Path, nargs="?")
    args = parser.parse_args()
    new = json.loads(args.new.read_text())
    print(compare(new, json.loads(args.old.read_text())) if args.old else render(new), end="")
