"""What bench.layers measured, as a table and as a plot: seconds, ratios to the fused layer, peak memory."""

from __future__ import annotations

from html import escape
from statistics import median
from typing import Any

Row = dict[str, Any]

_COLOURS = {"eager": "#c44e52", "compile": "#dd8452", "fused": "#4c72b0", "fused, compile": "#55a868"}


def line(row: Row) -> str:
    """A row in one line: a layer's worst error, or how much faster it is than each contender, forward + backward."""
    if "checked" in row:
        worst = max(row["errors"].values())
        return (
            f"{'ok ' if row['right'] else 'BAD'} {row['checked']} {row['dtype']}: {worst:.2g} <= {row['allowed']:.2g}"
        )
    ours = median(row["rows"]["fused"]["both"])
    others = (f"{median(r['both']) / ours:.2f}x {n}" for n, r in row["rows"].items() if n != "fused")
    return f"{row['name']} ({row['dtype']}, batch {row['batch']}): {ours * 1e3:.3f} ms, {', '.join(others)}"


def render(result: Row) -> str:
    """The whole report in markdown."""
    m = result["machine"]
    lines = [
        f"{m['device']}; torch {m['torch']}, triton {m['triton']}, CUDA {m['cuda']}; {m['date']}; revision "
        f"{m['revision']}.",
        f"Medians of {result['options']['rounds']} rounds in turns, with the fastest and slowest; CUDA graphs, but for "
        "the training step, which runs as it is.",
        "",
        *table(result["checks"], result["timings"]),
    ]
    return "\n".join(lines) + "\n"


def table(checks: list[Row], timings: list[Row]) -> list[str]:
    """What was checked, and what was timed."""
    wrong = [c for c in checks if not c["right"]]
    lines = [
        f"Correctness against float64: {len(checks) - len(wrong)} of {len(checks)} right.",
        *(f"- WRONG: {c['checked']} {c['dtype']}: {c['errors']}, allowed {c['allowed']:.2g}" for c in wrong),
        "",
        "| layer | dtype | batch | method | forward ms | forward + backward ms | fused is faster | peak MiB | samples/s |",
        "|---|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for timing in timings:
        ours = median(timing["rows"]["fused"]["both"])
        for name, row in timing["rows"].items():
            both = median(row["both"])
            cells = [
                *(timing["name"], timing["dtype"], str(timing["batch"]), name),
                _ms(row["forward"]) if "forward" in row else "",
                _ms(row["both"]),
                f"{both / ours:.2f}",
                f"{row['peak_bytes'] / 2**20:.0f}",
                f"{timing['batch'] / both:.0f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _ms(seconds: list[float]) -> str:
    middle, low, high = (f"{1e3 * s:.3f}" for s in (median(seconds), min(seconds), max(seconds)))
    return f"{middle} ({low}-{high})"


def plot(result: Row) -> str:
    """Bars of forward + backward time relative to eager (shorter is faster), as SVG."""
    height, left, width = 14, 330, 420
    bars: list[str] = []
    y = 30
    for timing in result["timings"]:
        eager = median(timing["rows"]["eager"]["both"])
        label = f"{timing['name']} {timing['dtype']}"
        bars.append(f'<text x="{left - 8}" y="{y + 11}" text-anchor="end">{escape(label)}</text>')
        for name, row in timing["rows"].items():
            share = median(row["both"]) / eager
            bars.append(
                f'<rect x="{left}" y="{y}" width="{min(share, 2.0) / 2 * width:.1f}" height="{height - 2}" '
                f'fill="{_COLOURS[name]}"/><text x="{left + min(share, 2.0) / 2 * width + 4:.1f}" y="{y + 10}">'
                f"{escape(name)} {share:.2f}</text>"
            )
            y += height
        y += 8
    title = f"forward + backward time, eager = 1 ({result['machine']['device']}, {result['machine']['date']})"
    head = f'<text x="{left}" y="18">{escape(title)}</text>'
    middle = left + width / 2
    rule = f'<line x1="{middle}" y1="26" x2="{middle}" y2="{y}" stroke="#888" stroke-dasharray="3"/>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 110}" height="{y + 10}" '
        f'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>'
        f"{head}{rule}{''.join(bars)}</svg>\n"
    )
