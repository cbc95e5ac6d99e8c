"""What was checked and probed, as a person reads it. Rows in, lines of Markdown out; no torch."""

from __future__ import annotations

from bench.gpu.lines import Row
from bench.gpu.timing_tables import RUNGS
from bench.report import number

MOST = 20  # lines of what went wrong
GO = 0.4  # share of finish and set-up that was expected at least; below, the account of where time goes is wrong


def probe(rows: list[Row]) -> list[str]:
    """The figures that decide: barriers of 256 threads, exchanges, stages, launches."""
    rows = [r for r in rows if "group" in r or ("error" in r and "probed" not in r and r["step"] == "probe")]
    if not rows:
        return []
    lines = ["## Probe", "", "| | | |", "|---|---|---:|"]
    for row in rows:
        if "error" in row:
            lines.append(f"| FAILED | {row['error']} | |")
        elif row["group"] in ("stage", "exchange", "launch") or "256 threads" in row["name"]:
            figure = "failed" if row["value"] is None else f"{row['value']:.3f} {row['unit']}".strip()
            lines.append(f"| {row['group']} | {row['name']} | {figure} {row['note']} |")
    return lines


def smoke(rows: list[Row]) -> list[str]:
    """Every rung and dtype: the error against forward. A case's rungs must give the same bytes."""
    rows = [r for r in rows if "case" in r and "team" in r]
    if not rows:
        return []
    columns = " | ".join(RUNGS)
    lines = ["## Smoke", "", f"| case | dtype | {columns} | same bytes |", f"|---|---|{'---|' * len(RUNGS)}---|"]
    for case, dtype in dict.fromkeys((r["case"], r["dtype"]) for r in rows):
        by = {r["team"]: r for r in rows if (r["case"], r["dtype"]) == (case, dtype)}
        cells = [_smoked(by.get(rung)) for rung in RUNGS]
        digests = {r["digest"] for r in by.values() if r.get("digest")}
        lines.append(f"| {case} | {dtype} | {' | '.join(cells)} | {'**no**' if len(digests) > 1 else 'yes'} |")
    limits = dict.fromkeys(f"{r['dtype']}: {r['limits']}" for r in rows if "limits" in r)
    return [*lines, "", "Largest error of a parameter. What the device holds at once:", "", *(f"- {x}" for x in limits)]


def _smoked(row: Row | None) -> str:
    if row is None:
        return "**nothing**"
    if row["ok"] is None:
        return "not held"
    return f"{row['error']:.1e}" if row["ok"] else f"**WRONG** {row['error']:.1e}, {row['draws']} draws"


def same_bytes(rows: list[Row]) -> bool:
    """Whether every case and dtype of the smoke test has one digest."""
    digests: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        if row.get("digest"):
            digests.setdefault((row["case"], row["dtype"]), set()).add(row["digest"])
    return all(len(found) == 1 for found in digests.values())


def phases(rows: list[Row]) -> list[str]:
    """Where the kernel's time goes, and whether that is as expected."""
    rows = [r for r in rows if "phase" in r or "function" in r or "profiled" in r]
    lines: list[str] = []
    for config in dict.fromkeys(r["config"] for r in rows):
        mine = [r for r in rows if r["config"] == config]
        whole = next(r for r in mine if "profiled" in r)
        waiting = whole["waiting"] / max(whole["samples"], 1)
        lines += ["", f"### {config}", f"{whole['samples']} samples, {waiting:.0%} of them at barriers.", ""]
        lines += ["| phase | share of all | of those not at barriers |", "|---|---:|---:|"]
        lines += [f"| {r['phase']} | {r['share']:.1%} | {r['of_busy']:.1%} |" for r in mine if "phase" in r]
        both = sum(r["of_busy"] for r in mine if r.get("phase") in ("finish", "set-up"))
        verdict = "as expected" if both >= GO else "**less than expected: read again where time goes**"
        lines += ["", f"Finish and set-up: {both:.0%} ({verdict}; expected at least {GO:.0%})."]
        most = [r for r in mine if "function" in r][:12]
        lines += ["", "Functions: " + ", ".join(f"{r['function']} {number(r['samples'])}" for r in most) + "."]
    return ["## Phases", *lines] if lines else []


def tests(rows: list[Row]) -> list[str]:
    """How many tests passed; and those that did not, of one reason in one line."""
    last = {r["test"]: r for r in rows if "outcome" in r}  # alone comes after together
    if not last:
        return []
    counts = {word: sum(r["outcome"] == word for r in last.values()) for word in ("passed", "failed", "skipped")}
    lines = ["## Checks", "", ", ".join(f"{n} {word}" for word, n in counts.items()) + "."]
    findings = [f for r in last.values() for f in r.get("findings", [])]
    missing = sum(f["ok"] is None for f in findings)
    lines[-1] += f" {len(findings)} findings, of which {missing} could not be made." if findings else ""
    reasons: dict[str, list[str]] = {}
    for row in last.values():
        if row["outcome"] == "failed":
            reasons.setdefault(row.get("why", ""), []).append(row["test"].removeprefix("tests/gpu/"))
    lines += [f"- FAILED {some(names)}: {why}" for why, names in list(reasons.items())[:MOST]]
    return lines + ([f"- and {len(reasons) - MOST} other reasons"] if len(reasons) > MOST else [])


def some(names: list[str], most: int = 3) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
