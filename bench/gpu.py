"""What bench/gpu.sh runs on a machine with a GPU; each verb is one of its steps.

    python bench/gpu.py machine --out FILE                  what this is; refuses without a GPU
    python bench/gpu.py cases --out FILE --seconds S        every case of tests/cases.py, every dtype and kind of team
    python bench/gpu.py calls --out FILE                    progress, cancelling, streaming, two samplers at once
    python bench/gpu.py timings --out DIR --seconds S       <date>-<revision>-<device>.json, .md and .png
    python bench/gpu.py contenders KIND --out FILE ...      one process of timings

Exit status 1: something did not pass; 2: it cannot run here.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import fastgen
from bench import gpu_report, gpu_timings, machine
from fastgen.native import native

SEQUENCE_SITES = 1 << 15  # of the sequence that is cancelled on the way
FULL_SITES = 1 << 13  # of one of which there are many


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="bench/gpu.py", description=(__doc__ or "").split("\n")[0])
    p.add_argument("verb", choices=["machine", "cases", "calls", "timings", "contenders"])
    p.add_argument("kind", nargs="?", choices=list(gpu_timings.SHARES), help="of contenders")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--seconds", type=float, default=400.0, help="the time it may take; what does not fit is left out")
    p.add_argument("--revision", default="", help="where the tree is not a git checkout")
    p.add_argument("--config", nargs="+", default=list(gpu_timings.CONFIGS), metavar="NAME")
    p.add_argument("--batch", type=_batches, default=list(gpu_timings.BATCHES), help="comma-separated")
    p.add_argument("--sites", type=int, default=gpu_timings.SITES, help="of a sequence")
    args = p.parse_args(arguments)
    if (args.verb == "contenders") != (args.kind is not None):
        p.error("a kind is for the verb contenders")
    return args


def _batches(text: str) -> list[int]:
    batches = [int(b) for b in text.split(",")]
    if min(batches) < 1:
        raise ValueError("batches are at least 1")
    return batches


def why_not() -> str | None:
    """Why nothing can run here, if so."""
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device can be used (no GPU, or no driver that fits)"
    return None


def describe(revision: str) -> dict[str, Any]:
    """The device and the versions."""
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info(0)
    return {
        "device": properties.name, "multiprocessors": properties.multi_processor_count,
        "memory_gb": total / 1e9, "free_gb": free / 1e9, "driver": _driver(), "cuda": torch.version.cuda,
        "torch": torch.__version__, "python": sys.version.split()[0], "cores": machine.cores(),
        "revision": revision or machine.revision(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }  # fmt: skip


def _driver() -> str:
    """The kernel driver's version, where the system shows it."""
    path = Path("/proc/driver/nvidia/version")
    found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", path.read_text()) if path.exists() else None
    return found.group(0) if found else "unknown"


def slug(text: str) -> str:
    """Letters, digits, dots, dashes and underscores only."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-")


# ---- checks ---------------------------------------------------------------------------------------------------------
def cases(out: Path, seconds: float) -> int:
    """Writes {results, limits, left_out} after every case; 1 if a check failed or cases were left out."""
    from bench.gpu_checks import DTYPES, Subject, check_case, subject
    from fastgen.backends.cuda import CudaExecutor
    from tests.cases import cases as every_case

    def make(s: Subject, dtype: torch.dtype, team: str) -> CudaExecutor:
        return CudaExecutor(s.sampler.programs, s.conditioning, dtype, torch.device("cuda"), team)

    torch.set_num_threads(1)  # many small operations
    end, failed = time.perf_counter() + seconds, False
    result: dict[str, list[Any]] = {"results": [], "left_out": []}
    for case in every_case():
        if time.perf_counter() > end:
            result["left_out"].append(case.name)
            continue
        planned = subject(case)
        for dtype in DTYPES.values():
            found = check_case(planned, make, dtype)
            result["results"].append(found)
            failed |= any(f["ok"] is False for f in found["findings"])
            print(_line(found), flush=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
    if result["left_out"]:
        print(f"no time was left for {', '.join(result['left_out'])}")
    out.write_text(json.dumps(result, indent=1) + "\n")
    return int(failed or bool(result["left_out"]))


def _line(found: dict[str, Any]) -> str:
    word = {True: "ok", None: "not made", False: "FAILED"}
    parts = [f"{f['name']} {word[f['ok']]} ({f['detail']})".removesuffix(" ()") for f in found["findings"]]
    return f"{found['case']} {found['dtype']}: {'; '.join(parts)}"


def calls(out: Path) -> int:
    from bench.gpu_checks import check_calls, check_full
    from fastgen.models.wavenet import WaveNet
    from tests.oracle import by_name, compile_case

    torch.manual_seed(0)
    model = WaveNet(
        layers=8, stacks=2, residual=32, gate=64, skip=32, output="softmax", classes=64, length=SEQUENCE_SITES
    )
    sequence = fastgen.compile(model.eval(), device="cuda", dtype=torch.bfloat16)
    image = compile_case(by_name("unet-pixelcnnpp")[0], device="cuda", threads=None)
    print(sequence.plan)
    found = check_calls(sequence, image)
    # Single CTAs, two samples each: the rung that leaves no multiprocessor free.
    alone = fastgen.compile(model, (64, FULL_SITES), device="cuda", dtype=torch.bfloat16, team="cta", verify=False)
    found += check_full(alone, 2 * torch.cuda.get_device_properties(0).multi_processor_count)
    out.write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join(f"{f['name']}: {f['ok']} {f['detail']}" for f in found))
    return int(any(f["ok"] is False for f in found))


# ---- timings --------------------------------------------------------------------------------------------------------
def timings(args: argparse.Namespace) -> int:
    """Times everything, and writes the report; 1 if a contender failed. Targets are reported, not enforced."""
    about = describe(args.revision)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended too
    with tempfile.TemporaryDirectory(prefix="fastgen-timings-") as work:
        command = [sys.executable, str(Path(__file__).resolve()), "contenders"]
        options = ["--batch", ",".join(map(str, args.batch)), "--sites", str(args.sites)]
        rows = gpu_timings.run(command, options, args.config, args.seconds, Path(work))
    configs = gpu_timings.arrange(rows)
    result: gpu_report.Result = {
        "machine": about,
        "options": {"batch": args.batch, "sites": args.sites},
        "configs": configs,
    }
    result |= {"targets": gpu_report.judge(result), "left_out": gpu_report.left_out(configs)}
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{about['date'][:10]}-{slug(about['revision'].rstrip('+'))}-{slug(about['device'])}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    text = gpu_report.render(result)
    path.with_suffix(".md").write_text(text)
    print(gpu_report.plot(result, path.with_suffix(".png")))
    print(text, end="")
    return int(any("failed" in row for config in configs for row in config["rows"]))


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    reason = why_not()
    if reason is not None:
        print(f"bench/gpu.py: {reason}; nothing was run", file=sys.stderr)
        return 2
    if args.verb == "machine":
        about = describe(args.revision)
        args.out.write_text(json.dumps(about, indent=1) + "\n")
        print(
            f"{about['device']}, {about['multiprocessors']} multiprocessors, driver {about['driver']}, torch {about['torch']}"
        )
        return 0
    needs_extension = args.verb != "contenders" or args.kind == "ours"
    if needs_extension and not native().has_cuda:
        print(
            "bench/gpu.py: the extension was built without CUDA (nvcc was not found); nothing was run", file=sys.stderr
        )
        return 2
    if args.verb == "cases":
        return cases(args.out, args.seconds)
    if args.verb == "calls":
        return calls(args.out)
    if args.verb == "timings":
        return timings(args)
    gpu_timings.worker(args.kind, args.config, args.batch, args.sites, args.seconds, args.out, "cuda")
    return 0


if __name__ == "__main__":
    sys.exit(main())
