"""Time against batch, one panel a configuration."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from bench.gpu.timing_tables import FLOOR_KHZ, FLOOR_MS, OURS, Result, timed


def plot(configs: list[Result], about: str, path: Path) -> str:
    """Writes a PNG; returns a line that says what was done."""
    try:
        import matplotlib
    except ImportError:
        return "no plot: matplotlib is not installed"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [c for c in configs if any(map(timed, c["rows"]))]
    if not shown:
        return "no plot: nothing was timed"
    figure, panels = pyplot.subplots(1, len(shown), figsize=(4.2 * len(shown), 4.2), squeeze=False)
    for panel, config in zip(panels[0], shown, strict=True):
        _panel(panel, config)
    panels[0][0].set_ylabel("seconds for the batch")
    figure.suptitle(about)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return f"plot: {path.name}"


def _panel(panel: Any, config: Result) -> None:
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in filter(timed, config["rows"]):
        point = (row["batch"], median(row["step_seconds"]) * config["steps"])
        team = f" {row['team']}" if row.get("team", "auto") != "auto" else ""
        lines.setdefault(f"{row['name']} {row['dtype']}{team}", []).append(point)
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
