"""Everything that needs a GPU, in three calls of at most ten minutes; bench/gpu/README.md says what they do.

    python -m bench.gpu first OUT [--revision ID]
    python -m bench.gpu second OUT
    python -m bench.gpu third OUT
    python -m bench.gpu report OUT/first.jsonl

Exit status: 0; 1 if a step failed or there was no time for it; 2 if nothing can run here. A step that does not apply here
(no ncu, say) is NOT RUN, which is no failure, and is said.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from pathlib import Path

from bench.gpu import calls, report
from bench.gpu.driver import Driver
from bench.gpu.steps import CANNOT_STATUS, GOOD

SECONDS = 540.0  # of a call


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="bench.gpu", description=(__doc__ or "").split("\n")[0])
    p.add_argument("call", choices=[*calls.CALLS, "report"])
    p.add_argument("out", type=Path, help="a folder for the results; of report, the file of rows")
    p.add_argument("--revision", default="", help="where the tree is not a git checkout")
    p.add_argument("--seconds", type=float, default=SECONDS, help="for everything (default: 540)")
    return p.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if args.call == "report":
        print(report.write(args.out, calls.CONFIGS).read_text(), end="")
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    out = args.out.resolve()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended too
    with tempfile.TemporaryDirectory(prefix="fastgen-gpu-") as work:
        driver = Driver(out, args.call, Path(work), args.seconds, lambda: _report(driver))
        driver.run(calls.CALLS[args.call](args.revision))
    about = next(row for row in driver.rows if "result" in row)
    if about["result"] not in GOOD:
        print(about["why"])
        return CANNOT_STATUS
    text = report.write(driver.path, calls.CONFIGS)
    print(f"\n{text.read_text()}\nwritten to {text}")
    return int(report.failed(driver.rows))


def _report(driver: Driver) -> Path | None:
    """Of what there is so far; none before the machine is known."""
    known = any("device" in row for row in driver.rows)
    return report.write(driver.path, calls.CONFIGS) if known else None


if __name__ == "__main__":
    sys.exit(main())
