"""GPU results as a person reads them: tables, what was to be reached, and a plot. Plain data in, text out; no torch.

python bench/gpu_report.py gather WORK OUT     what the steps of bench/gpu.sh left in WORK, as OUT/checks.json
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

Row = dict[str, Any]
Result = dict[str, Any]
OURS = "fastgen"

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


def number(x: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}" if x >= 1 else f"{x:.3g}"


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


# ---- targets --------------------------------------------------------------------------------------------------------
def judge(result: Result) -> list[Row]:
    """Every target with what was measured: {config, batch, bound, unit, measured, reached}; None where it was not."""
    return [_judged(target, result) for target in TARGETS]


def _judged(target: Target, result: Result) -> Row:
    measured: float | None = None
    for config in result["configs"]:
        for row in config["rows"]:
            mine = row["name"] == OURS and row["dtype"] == "bfloat16" and row["batch"] == target.batch
            if config["name"] == target.config and mine and timed(row):
                measured = value(config, row, target.unit)
    better = None if measured is None else measured <= target.bound if target.unit == "ms" else measured >= target.bound
    return {
        "config": target.config, "batch": target.batch, "bound": target.bound, "unit": target.unit,
        "measured": measured, "reached": better,
    }  # fmt: skip


def targets_table(judged: list[Row]) -> list[str]:
    lines = ["| target, bfloat16 | wanted | measured | |", "|---|---:|---:|---|"]
    for t in judged:
        wanted = f"{'≤' if t['unit'] == 'ms' else '≥'} {number(t['bound'])} {t['unit']}"
        measured = "" if t["measured"] is None else f"{number(t['measured'])} {t['unit']}"
        verdict = {None: "not measured", True: "reached", False: "**not reached**"}[t["reached"]]
        lines.append(f"| {t['config']}, batch {t['batch']} | {wanted} | {measured} | {verdict} |")
    return lines


# ---- timings --------------------------------------------------------------------------------------------------------
def render(result: Result) -> str:
    """The whole report."""
    m = result["machine"]
    lines = [
        f"{m['device']}, driver {m['driver']}, torch {m['torch']} (CUDA {m['cuda']}); {m['date']}; revision "
        f"{m['revision']}.",
        "Medians of repeated runs. Naive loop: one forward a step of the module in plain torch, measured and multiplied "
        "by the steps; eager queues: a careful loop with cached activations. Floor: derived, not measured.",
        "",
        *targets_table(result["targets"]),
    ]
    for config in result["configs"]:
        lines += ["", *_config(config)]
    if result["left_out"]:
        lines += ["", "Not timed:", "", *(f"- {text}" for text in result["left_out"])]
    return "\n".join(lines) + "\n"


def _config(config: Result) -> list[str]:
    unit = "kHz a stream" if config["audio"] else "ms for the batch"
    lines = [f"### {config['name']}", f"{config['parameters'] / 1e6:.2f}M parameters, {config['steps']} steps."]
    lines += [f"{p['dtype']}: {p['text']}." for p in config["proofs"]]
    if not any(map(timed, config["rows"])):
        return lines
    lines += [
        "",
        f"| batch | method | {unit} | samples/s | floor | x naive | teams |",
        "|---:|---|---:|---:|---:|---:|---|",
    ]
    for row in sorted(
        filter(timed, config["rows"]), key=lambda r: (r["batch"], r["name"] != OURS, r["name"], r["dtype"])
    ):
        lines.append(_line(config, row))
    notes = dict.fromkeys(f"{r['name']}: {r['how']}" for r in config["rows"] if timed(r) and r["how"] != "whole runs")
    return [*lines, "", f"Timed: {'; '.join([*notes, 'the others: whole runs'])}."]


def _line(config: Result, row: Row) -> str:
    mine = row["name"] == OURS
    audio = config["audio"]
    main = number(value(config, row, "kHz" if audio else "ms"))
    per_second = row["batch"] / median(row["step_seconds"]) / (1 if audio else config["steps"])
    cells = [str(row["batch"]), f"{row['name']} {row['dtype']}", f"**{main}**" if mine else main, number(per_second)]
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
                key = (config["name"], row["name"], row["dtype"], f"FAILED: {why}" if "failed" in row else why)
                groups.setdefault(key, []).append(str(row["batch"]))
    return [f"{c}, {n} {d}, batch {', '.join(b)}: {why}" for (c, n, d, why), b in groups.items()]


def plot(result: Result, path: Path) -> str:
    """Time against batch, one panel a configuration; returns a line that says what was done."""
    try:
        import matplotlib
    except ImportError:
        return "no plot: matplotlib is not installed"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [c for c in result["configs"] if any(map(timed, c["rows"]))]
    if not shown:
        return "no plot: nothing was timed"
    figure, panels = pyplot.subplots(1, len(shown), figsize=(4.2 * len(shown), 4.2), squeeze=False)
    for panel, config in zip(panels[0], shown, strict=True):
        _panel(panel, config)
    panels[0][0].set_ylabel("seconds for the batch")
    figure.suptitle(f"{result['machine']['device']}, {result['machine']['date'][:10]}, {result['machine']['revision']}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return f"plot: {path.name}"


def _panel(panel: Any, config: Result) -> None:
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in filter(timed, config["rows"]):
        point = (row["batch"], median(row["step_seconds"]) * config["steps"])
        lines.setdefault(f"{row['name']} {row['dtype']}", []).append(point)
    for label, points in sorted(lines.items(), key=lambda item: not item[0].startswith(OURS)):
        xs, ys = zip(*sorted(points), strict=True)
        ours = label.startswith(OURS)
        panel.plot(xs, ys, marker="o", label=label, linewidth=2.5 if ours else 1, linestyle="-" if ours else "--")
    known = {b: ms / 1e3 for b, ms in FLOOR_MS.get(config["name"], {}).items()}
    if config["name"] in FLOOR_KHZ:
        known = {1: config["steps"] / (FLOOR_KHZ[config["name"]] * 1e3)}
    if known:
        panel.plot(list(known), list(known.values()), "k_", markersize=12, label="floor (derived)")
    panel.set(xscale="log", yscale="log", xlabel="batch", title=config["name"])
    panel.grid(alpha=0.3)
    panel.legend(fontsize=7)


# ---- checks ---------------------------------------------------------------------------------------------------------
def read(path: Path) -> Any:
    """A JSON file; None where there is none."""
    return json.loads(path.read_text()) if path.exists() else None


def steps(path: Path) -> list[Row]:
    """The lines that gpu.sh wrote: name, result, seconds, remark, with tabs between."""
    lines = path.read_text().splitlines() if path.exists() else []
    parts = [line.split("\t") for line in lines]
    return [{"name": p[0], "result": p[1], "seconds": int(p[2]), "remark": p[3]} for p in parts]


def gather(work: Path) -> Result:
    """What the steps left behind."""
    return {name: read(work / f"{name}.json") for name in ("machine", "probe", "cases", "calls")} | {
        "steps": steps(work / "steps")
    }


def brief(result: Result) -> str:
    """A short table: the probe's main figures, and every check that did not pass."""
    lines = []
    for m in (result["probe"] or {}).get("measurements", []):
        if m["group"] in ("stage", "exchange", "launch") or "256 threads" in m["name"]:
            figure = "failed" if m["value"] is None else f"{m['value']:.3f} {m['unit']}"
            lines.append(f"{m['group']:<9} {m['name']:<52} {figure} {m['note']}".rstrip())
    done = (result["cases"] or {}).get("results", [])
    findings = [(f"{r['case']} {r['dtype']}", f) for r in done for f in r["findings"]]
    findings += [("call", f) for f in result["calls"] or []]
    wrong = [(where, f) for where, f in findings if f["ok"] is not True]
    lines.append(f"{len(findings)} checks of {len(done)} cases and dtypes, and of calls: {len(wrong)} did not pass")
    lines += [f"  {'NOT MADE' if f['ok'] is None else 'FAILED'} {w}: {f['name']}: {f['detail']}" for w, f in wrong[:20]]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("verb", choices=["gather"])
    parser.add_argument("work", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args(arguments)
    result = gather(args.work)
    (args.out / "checks.json").write_text(json.dumps(result, indent=1) + "\n")
    print(brief(result))


if __name__ == "__main__":
    main()
