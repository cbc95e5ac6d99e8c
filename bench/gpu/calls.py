"""What the three calls on a GPU are made of. Each fits ten minutes on one Hopper GPU; none needs a network. No torch here.

first    does it build, does it run, is it right, and how fast is every rung: what decides comes first
second   ours against the naive loop and against careful loops with cached activations
third    against torch.compile, and the training layers
"""

from __future__ import annotations

from bench.gpu.lines import Row
from bench.gpu.steps import TIMED_OUT, Stage, Step, python
from bench.gpu.timing_tables import RUNGS

CONFIGS = ("pixelcnnpp-cifar", "wavenet-nv", "wavenet-mol", "gated-pixelcnn-64", "wavenet-nv-large")
WAVENETS = tuple(name for name in CONFIGS if name.startswith("wavenet"))
DTYPES = ("bfloat16", "float32", "float16")
SMOKE = ("unet-pixelcnnpp", "wavenet-vocoder")  # of tests/cases.py: an image and a sequence
HEADLINES = {"wavenet-nv": "1", "pixelcnnpp-cifar": "1,16,1024"}  # batches
BATCHES = "1,4,16,64,256,1024"
FEW_BATCHES = "1,16"
GROUPS = 8  # processes that share the tests of a file, all of a case's dtypes in one
# What tools say that cannot work on this machine: neither is an error of ours.
UNABLE = ("Device not supported", "ERR_NVGPUCTRPERM", "LibraryNotLoaded")


def _begin(revision: str) -> list[Stage]:
    """What every call begins with; nothing makes sense without."""
    about = Step("machine", python("bench.gpu.device", "--revision", revision), 60)
    built = Step("build", python("bench.gpu.build", "--probe", "{work}/probe"), 200)
    return [
        Stage("machine", 20, lambda rows: [about], needed=True),
        Stage("build", 110, lambda rows: [built], needed=True),
    ]


def first(revision: str) -> list[Stage]:
    probe = Step("probe", ("{work}/probe", "{lines}"), 30)
    return [
        *_begin(revision),
        Stage(
            "probe", 30, lambda rows: [probe, Step("collect", _pytest("--collect-only", "tests/gpu"), 30)], at_once=2
        ),
        Stage("smoke", 60, lambda rows: smoke(), at_once=6),
        Stage("headline", 120, lambda rows: headlines(), at_once=4),
        Stage("phases", 50, profiles),
        Stage("cases", 50, lambda rows: groups(rows, "test_cases.py"), at_once=6),
        Stage("promises", 20, lambda rows: groups(rows, "test_promises.py")),
        Stage("kernels", 40, lambda rows: groups(rows, "test_kernels.py"), at_once=8),
        Stage("sanitizers", 40, lambda rows: sanitizers(), at_once=2),
    ]


def second(revision: str) -> list[Stage]:
    mine = [ours(name, "auto", BATCHES, "bfloat16,float32", 38) for name in CONFIGS]
    naive = [peer(name, kind, BATCHES, 9) for kind in ("eager", "graph") for name in CONFIGS]
    cached = [peer(name, "queues", BATCHES, 9) for name in WAVENETS]
    compiled = [peer(name, "compile", FEW_BATCHES, 35) for name in WAVENETS[:2]]
    return [
        *_begin(revision),
        Stage("ours", 200, lambda rows: mine, at_once=3),
        Stage("peers", 130, lambda rows: naive + cached, at_once=3),
        Stage("compiled peers", 80, lambda rows: compiled, at_once=2),
    ]


def third(revision: str) -> list[Stage]:
    mine = [ours(name, "auto", FEW_BATCHES, "bfloat16", 12) for name in CONFIGS]
    # A PixelCNN++ takes the compiler minutes, so it comes last.
    compiled = [peer(name, "compile", FEW_BATCHES, 25) for name in CONFIGS[1:]] + [
        peer(CONFIGS[0], "compile", "1", 120)
    ]
    named = Step("names of layers", python("bench.layers", "--list"), 30)
    return [
        *_begin(revision),
        Stage("ours", 70, lambda rows: mine, at_once=3),
        Stage("names", 15, lambda rows: [named]),
        Stage("layers", 165, layers),
        Stage("compiled peers", 160, lambda rows: compiled, at_once=2),
    ]


CALLS = {"first": first, "second": second, "third": third}


# ---- steps ----------------------------------------------------------------------------------------------------------
def smoke() -> list[Step]:
    """Every rung and dtype by itself: a kernel that hangs or faults takes nothing with it."""
    return [
        Step(
            f"smoke {case} {team} {dtype}",
            python("bench.gpu.smoke", case, "--team", team, "--dtype", dtype),
            20,
            kin=team,
        )
        for dtype in DTYPES
        for team in RUNGS
        for case in SMOKE
    ]


def hung(rows: list[Row]) -> list[str]:
    """The rungs on which a smoke test did not end; none where all did not."""
    late = [r["step"].split()[2] for r in rows if r["step"].startswith("smoke ") and r.get("result") == TIMED_OUT]
    found = [rung for rung in RUNGS if rung in late]
    return found if len(found) < len(RUNGS) else []


def ours(config: str, team: str, batches: str, dtypes: str, seconds: float) -> Step:
    command = python(
        "bench.gpu.ours", config, "--team", team, "--batch", batches, "--dtype", dtypes, "--seconds", f"{seconds:g}",
        "--turn", "{turn}",
    )  # fmt: skip
    return Step(f"{config} {team}", command, _limit(seconds), kin=team)


def _limit(seconds: float) -> float:
    """For what means to take so long: the device opened, and a repeat that takes longer than the others."""
    return 1.25 * seconds + 15


def headlines() -> list[Step]:
    """On every rung."""
    return [ours(config, rung, batches, "bfloat16", 9) for rung in RUNGS for config, batches in HEADLINES.items()]


def profiles(rows: list[Row]) -> list[Step]:
    team = ("--team", next(r for r in RUNGS if r not in hung(rows))) if hung(rows) else ()
    return [
        Step(f"phases {config}", python("bench.gpu.phases", config, "--keep", "{out}", *team), 45, unless=UNABLE)
        for config in HEADLINES
    ]


def peer(config: str, kind: str, batches: str, seconds: float) -> Step:
    command = python(
        "bench.gpu.peers", config, kind, "--batch", batches, "--seconds", f"{seconds:g}", "--turn", "{turn}"
    )
    return Step(f"{config} {kind}", command, _limit(seconds), peer=True)


def _pytest(*arguments: str) -> tuple[str, ...]:
    # Whatever options and plugins a machine has, they are not needed.
    options = ("-q", "--tb=short", "-o", "addopts=", "-p", "no:cacheprovider", "-p", "bench.gpu.outcomes")
    return (*python("pytest", *options), *arguments)


def groups(rows: list[Row], file: str) -> list[Step]:
    """The tests of a file, some in a process, which a fault of the device ends; those that it leaves without an outcome
    run alone. Where they could not be collected, the file as a whole."""
    names = [r["collected"] for r in rows if f"/{file}::" in r.get("collected", "")]
    left = ("--leave-out", ",".join(hung(rows))) if hung(rows) else ()
    if not names:
        return [Step(file, _pytest(*left, f"tests/gpu/{file}"), 60)]
    size = -(-len(names) // GROUPS)
    size = -(-size // len(DTYPES)) * len(DTYPES) if size > 1 else 1
    found = []
    for k in range(0, len(names), size):
        part = names[k : k + size]
        alone = tuple(Step(name, _pytest(*left, name), 20) for name in part) if size > 1 else ()
        found.append(Step(f"{file} {k + 1} to {k + len(part)}", _pytest(*left, *part), 40, alone=alone))
    return found


def layers(rows: list[Row]) -> list[Step]:
    names = [r["named"] for r in rows if "named" in r] or [""]
    return [Step(f"layer {name}", python("bench.layers", "--only", name), 60) for name in names]


def sanitizers() -> list[Step]:
    """On the rung whose barriers lie in memory. Without torch's caching allocator every tensor is an allocation of its
    own, whose end the tool can see."""
    found = []
    for tool in ("memcheck", "racecheck"):
        for case in SMOKE:
            command = (
                "compute-sanitizer", "--tool", tool, "--target-processes", "all", "--error-exitcode", "9",
                "--print-limit", "20", *python("bench.gpu.smoke", case, "--team", "grid", "--dtype", "bfloat16"),
            )  # fmt: skip
            alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            found.append(Step(f"{tool} {case}", command, 90, environment=alone, unless=UNABLE))
    return found
