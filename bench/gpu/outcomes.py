"""A plugin of pytest: -p bench.gpu.outcomes --lines FILE writes a row for each test as it ends, {test, outcome, seconds, why,
findings}; with --collect-only one {collected} for each that there is."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.gpu.lines import Lines


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--lines", type=Path, help="a file for the outcomes, as JSON lines")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Outcomes(Lines(config.getoption("--lines"))), "outcomes-as-lines")


class Outcomes:
    def __init__(self, emit: Lines) -> None:
        self.emit = emit

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if session.config.option.collectonly:
            for item in session.items:
                self.emit({"collected": item.nodeid})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        row = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
        if report.outcome != "passed":
            row["why"] = _why(report)
        self.emit(row | dict(report.user_properties))


def _why(report: pytest.TestReport) -> str:
    """One line of what went wrong, or of why it was skipped."""
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2]
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash is not None else report.longrepr).strip().splitlines()[0][:300]
