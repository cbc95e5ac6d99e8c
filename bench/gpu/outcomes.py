"""A plugin of pytest: -p bench.gpu.outcomes --lines FILE writes a row for each test as it ends, {test, outcome, seconds, why,
findings}; with --collect-only one {collected} for each that there is. After a fault of the device (`fault` in its row) no
test of the process can say anything more, so that it ends. --leave-out: kinds of team that tests/gpu leaves alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.gpu.lines import Lines

FAULTS = ("CUDA error", "cudaError", "CUDA driver error")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--lines", type=Path, help="a file for the outcomes, as JSON lines")
    parser.addoption("--leave-out", default="", help="kinds of team, comma-separated, that hang on this device")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Outcomes(Lines(config.getoption("--lines"))), "outcomes-as-lines")


class Outcomes:
    def __init__(self, emit: Lines) -> None:
        self.emit = emit
        self.session: pytest.Session | None = None

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self.session = session

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
        if report.outcome == "failed" and any(word in str(report.longrepr) for word in FAULTS):
            row["fault"] = True
            assert self.session is not None
            self.session.shouldstop = "the device is at fault"
        self.emit(row | dict(report.user_properties))


def _why(report: pytest.TestReport) -> str:
    """One line of what went wrong, or of why it was skipped."""
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2]
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash is not None else report.longrepr).strip().splitlines()[0][:300]
