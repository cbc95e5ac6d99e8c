"""What the planner finds, on models whose structure can be counted by hand; and the tables as C and Python see them."""

# As users write: modules are not annotated in full.
# mypy: disable-error-code="no-any-return,comparison-overlap"

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastgen
from fastgen import Sampler
from fastgen.errors import UnsupportedError
from fastgen.graph import functions
from fastgen.heads import Categorical
from fastgen.models import build
from fastgen.native import native
from fastgen.plan.plan import classes, plan_stats
from fastgen.program import records as T
from fastgen.program.functions import function_codes
from tests.cases import Case, cases, randomise
from tests.conftest import Compiled
from tests.oracle import at_length, by_name, compile_case

SOURCE = Path(__file__).parent.parent / "csrc" / "plan.h"
FUNCTIONS = SOURCE.parent / "functions.def"


# ---- the tables ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["Buffer", "Tap", "Micro", "Op", "Item", "Head"])
def test_records_are_those_of_the_extension(name: str) -> None:
    ours, theirs = T.dtype_of(getattr(T, name)), native().dtypes()[name]
    assert ours.itemsize == theirs.itemsize and ours.names == theirs.names
    assert {f: ours.fields[f] for f in ours.names} == {f: theirs.fields[f] for f in ours.names}


def parse_enum(name: str) -> dict[str, int]:
    """Members of an enum of csrc/plan.h, without their k, in lower case."""
    found = re.search(rf"enum {name} : int32_t {{(.*?)}};", SOURCE.read_text(), re.DOTALL)
    assert found is not None
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", found[1])
    members, value = {}, -1
    for item in filter(None, (part.strip() for part in text.split(","))):
        label, _, number = (x.strip() for x in item.partition("="))
        value = int(number) if number else value + 1
        members[label.removeprefix("k").lower()] = value
    return members


def test_function_codes_are_those_of_the_header() -> None:
    lines = re.findall(r"^FG_FUNCTION\((\w+), (\w+), (\d+), (\d), (\d+)\)", FUNCTIONS.read_text(), re.MULTILINE)
    assert len(lines) > 50 and len({line[2] for line in lines}) == len(lines)
    assert {name.lower(): int(code) for _, name, code, _, _ in lines} == function_codes()
    assert native().functions() == [(name, int(code), int(operands)) for _, name, code, operands, _ in lines]
    assert all(int(operands) == 0 for kind, _, _, operands, _ in lines if kind == "Move")


def test_the_reference_knows_every_function() -> None:
    known = {"load", "store", "embed", "gather", "fill", "broadcast", "where", "muladd"}
    known |= set(functions.UNARY) | set(functions.WITH_IMM) | set(functions.BINARY) | set(functions.REDUCE)
    assert known == set(function_codes())


def test_constants_are_those_of_the_header() -> None:
    panel = re.search(r"kPanel = (\d+)", SOURCE.read_text())
    assert panel is not None and int(panel[1]) == T.PANEL
    kinds = parse_enum("BufferKind")
    assert (kinds["state"], kinds["input"], kinds["cond"], kinds["const"]) == (T.STATE, T.INPUT, T.COND, T.CONST)
    heads = {h.name.lower(): h.kind for h in fastgen.heads.HEADS}
    assert heads == parse_enum("HeadKind")


# ---- counted by hand -------------------------------------------------------------------------------------------------
class TwoStacks(nn.Module):
    """A vertical stack of finished rows and a horizontal one, joined by 1x1: [B, 1, H, W] -> [B, 4, H, W]."""

    def __init__(self, vertical: int = 16, horizontal: int = 8) -> None:
        super().__init__()
        self.v1 = nn.Conv2d(1, vertical, (2, 3), padding=(0, 1))
        self.v2 = nn.Conv2d(vertical, vertical, (2, 3), padding=(0, 1))
        self.h1 = nn.Conv2d(1, horizontal, (1, 2))
        self.link = nn.Conv2d(vertical, horizontal, 1)
        self.out = nn.Conv2d(horizontal, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        v = self.v1(F.pad(x, (0, 0, 2, -1)))
        v = self.v2(F.pad(v.relu(), (0, 0, 1, 0)))
        h = self.h1(F.pad(x, (2, -1)))
        return self.out((h + self.link(v.tanh())).relu())


HEAD = Categorical(4, encode="symmetric", params="BnC*")


def two_stacks(rows: int, cols: int) -> Sampler:
    torch.manual_seed(0)
    return fastgen.compile(
        TwoStacks(), (1, rows, cols), Categorical(4, encode="symmetric", params="B(n*C)*"), threads=1
    )


def test_rows_wait_and_sites_do_not() -> None:
    """The vertical stack and its link run once a row; what is left per pixel is the horizontal stack."""
    rows, cols = 6, 9
    sites = rows * cols
    plan = two_stacks(rows, cols).plan
    work = classes(plan)
    vertical, link = (1 * 16 * 6 + 16 * 16 * 6) * sites, 16 * 8 * sites
    assert work["row"].macs + work["hoisted"].macs == vertical + link
    assert work["hoisted"].macs == link, "the link feeds a sum that must wait for the pixel"
    assert work["site"].macs == (1 * 8 * 2 + 8 * 4) * sites
    paths = {i.lead.path: "row" if i.lead.row else "site" for i in plan.schedule.instrs}
    assert paths["v1"] == paths["v2"] == "row" and paths["out"] == "site"
    stats = plan_stats(plan)
    assert stats["row_macs"] == vertical + link and stats["steps"] == sites
    assert stats["site_executions_per_step"] == 2, "one pass for the sum, one for the output"


def test_dead_work_is_not_done() -> None:
    """Layers, channels and taps that no output depends on cost nothing."""

    class Wasteful(TwoStacks):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Conv2d(16, 64, 3, padding=1)
            self.v2.weight.data[:, :, 0] = 0  # finished rows read twice, once in vain

        def forward(self, x: Tensor) -> Tensor:
            self.unused(torch.zeros(x.shape[0], 16, *x.shape[2:]) + x)
            return super().forward(x)

    torch.manual_seed(0)
    plan = fastgen.compile(Wasteful(), (1, 6, 9), Categorical(4, encode="symmetric", params="B(n*C)*")).plan
    work = classes(plan)
    assert work["row"].macs == (1 * 16 * 6 + 16 * 16 * 3) * 54
    assert all("unused" not in i.lead.path for i in plan.schedule.instrs)


def test_colours_are_phases(compiled: Compiled) -> None:
    """Three values a pixel: of every layer just the third that is due runs at each step."""
    for case in by_name("rgb-thirds", "rgb-interleaved", "rgb-unrolled"):
        sampler = compiled(case)
        plan, program = sampler.plan, sampler.programs()
        assert plan.spec.phases == 3 == int(program.head["phases"]) and program.steps == case.steps
        assert program.row_len == 3 * case.sites[1]
        last = max(i.index for i in plan.schedule.instrs)
        per_step = np.diff(program.step_ptr)
        assert per_step.min() > 0 and per_step.max() < last + 1, "no step runs everything"


def test_vectors_are_one_site(compiled: Compiled) -> None:
    (case,) = by_name("masked-mlp")
    sampler = compiled(case)
    plan = sampler.plan
    assert plan.spec.vector and plan.spec.grid == (1, 1) and sampler.programs().steps == 14
    hidden = [i for i in plan.schedule.instrs if i.host is not None]
    ready = [int(i.lead.ready.max()) for i in hidden]
    assert len(set(ready)) >= 13, "each degree has units of its own"


# ---- sequences -------------------------------------------------------------------------------------------------------
SEQUENCES = [c for c in cases() if "T" in c.axes and not c.cond() and c.name.startswith(("wavenet", "stereo"))]


@pytest.mark.parametrize("case", SEQUENCES, ids=str)
def test_memory_does_not_grow_with_the_length(case: Case, compiled: Compiled) -> None:
    sampler = compiled(at_length(case, 96))
    programs = [sampler.programs(length) for length in (96, 500, 20_000)]
    assert len({p.arena for p in programs}) == 1
    assert len({(len(p.ops), len(p.step_items), len(p.row_items), p.period, len(p.weights)) for p in programs}) == 1
    assert [p.steps for p in programs] == [n * sampler.spec.phases for n in (96, 500, 20_000)]
    assert programs[0].arena < 20_000


def test_rings_are_as_long_as_the_reach() -> None:
    """A dilation of d reads d sites back, so a ring of about that many sites, whatever runs ahead in chunks, holds."""
    (case,) = by_name("wavenet-onehot")
    program = compile_case(at_length(case, 96)).programs(5000)
    rings = program.buffers["ring_cols"]
    assert rings.max() <= 4 + 8 + 2 and (program.buffers["cols"] == 5000).all()


def test_long_sequences_are_planned_short() -> None:
    (case,) = by_name("wavenet-onehot")
    long = compile_case(at_length(case, 100_000))
    assert long.plan.spec.sites[0] <= 1024 and long.spec.sites == (100_000,)
    assert long.programs(100_000).steps == 100_000 == long.programs(long.spec.grid[1]).steps
    assert long.verify().ok
    short = compile_case(at_length(case, 64)).sample(2, seed=3, length=700)
    assert torch.equal(long.sample(2, seed=3, length=700), short)


class Ending(nn.Module):
    """A causal layer with something else at its first and last sites."""

    def __init__(self, mask: Callable[[int], Tensor]) -> None:
        super().__init__()
        self.a, self.out, self.mask = nn.Conv1d(1, 8, 3), nn.Conv1d(8, 3, 1), mask

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.a(F.pad(x, (3, -1))) * self.mask(x.shape[-1])))


ENDINGS: dict[str, Callable[[int], Tensor]] = {
    "the last": lambda n: (torch.arange(n) < n - 1).float(),
    "the last twenty": lambda n: torch.where(torch.arange(n) < n - 20, 1.0, 0.5),
    "both ends": lambda n: (torch.arange(n) + 1.0).clamp(max=7) * (n - torch.arange(n)).clamp(max=3),
}


@pytest.mark.parametrize("ends", ENDINGS)
def test_what_a_sequence_ends_with_goes_with_its_end(ends: str) -> None:
    head = Categorical(3, encode="symmetric")
    sampler = fastgen.compile(randomise(Ending(ENDINGS[ends]), 1, 2.0), (1, 100), head, threads=1)
    for length in (63, 99, 150, 700):
        report = sampler.verify(length=length)
        assert report.ok, f"{length}: {report}"


def causal_net(middle: Callable[[Tensor], Tensor]) -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(2)
            self.a, self.out = nn.Conv1d(1, 8, 3), nn.Conv1d(8, 3, 1)
            self.positions = nn.Parameter(torch.randn(8, 100))

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.a(F.pad(x, (3, -1))))
            h = h + self.positions if middle is positions else middle(h)
            out: Tensor = self.out(torch.tanh(h))
            return out

    return Net()


def positions(h: Tensor) -> Tensor:
    raise AssertionError("learned: of the module")


def zeroed(h: Tensor) -> Tensor:
    h = h.clone()
    h[..., -1] = 0
    return h


UNLIKE: dict[str, Callable[[Tensor], Tensor]] = {
    "learned positions": positions, "sinusoids": lambda h: h + torch.sin(torch.arange(h.shape[-1]) * 0.1),
    "the length": lambda h: h * 100 / h.shape[-1], "half a length ago": lambda h: h + F.pad(h, (h.shape[-1] // 2, 0))[..., : h.shape[-1]],
    "until 90": lambda h: h * (torch.arange(h.shape[-1]) < 90), "one site": lambda h: h * (1 + 1.0 * (torch.arange(h.shape[-1]) == 47)),
    "patched": lambda h: torch.cat([h[..., :70] * 2, h[..., 70:]], -1), "if long": lambda h: h * (2.0 if h.shape[-1] > 90 else 0.5),
    "split": lambda h: torch.cat([t * 0.5 + 0.1 for t in h.split(1, 2)], 2), "the last zeroed": zeroed,
    "multiples of four": lambda h: F.pad(h.view(*h.shape[:2], -1, 4).sum(-1).repeat_interleave(4, -1), (4, 0))[..., : h.shape[-1]],
}  # fmt: skip


@pytest.mark.parametrize("verified", [True, False])
@pytest.mark.parametrize("name", UNLIKE)
def test_sites_that_are_not_alike(name: str, verified: bool) -> None:
    """A sequence whose sites or lengths differ is planned for its own length, which the plan says, and for no other."""
    head = Categorical(3, encode="symmetric", params="B(n*C)*")
    sampler = fastgen.compile(causal_net(UNLIKE[name]), (1, 100), head, threads=1, verify=verified)
    assert sampler.verify().ok
    if sampler.any_length:  # all the same
        assert name == "split" or sampler.verify(length=150).ok
        return
    assert "100 sites only" in str(sampler.plan)
    with pytest.raises(UnsupportedError, match="length 101: the plan holds for 100 sites only"):
        sampler.sample(1, length=101)


def test_a_constant_beyond_what_was_planned() -> None:
    """At 1,024 sites all is alike; the longer sequence is refused where it is asked for, with the site."""
    net = causal_net(lambda h: h * (1 + 1.0 * (torch.arange(h.shape[-1]) >= 4500)))
    head = Categorical(3, encode="symmetric", params="B(n*C)*")
    with pytest.raises(UnsupportedError, match="6000 sites that are not alike"):
        fastgen.compile(net, (1, 6000), head, threads=1)
    sampler = fastgen.compile(net, (1, 1500), head, threads=1)
    assert sampler.sample(1, length=3000).shape == (1, 1, 3000)
    with pytest.raises(UnsupportedError, match=r"length 6000: forward does something else from site \d+ on"):
        sampler.sample(1, length=6000)


@pytest.mark.parametrize("length", [6, 8, 14, 32, 70, 80])
def test_constants_beside_repeated_sites_count_once(length: int) -> None:
    """Every other value of the past, repeated, plus one: the copy with regular labels holds the ones already."""

    class Repeated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.c, self.o = nn.Conv1d(1, 4, 2), nn.Conv1d(4, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = self.c(F.pad(x, (2, -1)))
            y = F.interpolate(F.pad(h, (1, 0))[..., ::2], scale_factor=2, mode="nearest")[..., : h.shape[-1]]
            out: Tensor = self.o(y + 1)
            return out

    head = Categorical(3, encode="symmetric", params="B(n*C)*")
    report = fastgen.compile(Repeated(), (1, length), head, verify=False, threads=1).verify()
    assert report.ok, str(report)


# ---- receptive fields ------------------------------------------------------------------------------------------------
def test_receptive_field_of_images() -> None:
    assert two_stacks(12, 12).receptive_field == (4, 5)  # 3 rows above and its own; 2 columns to either side


@pytest.mark.parametrize("kernel", [2, 3])
def test_receptive_field_of_wavenets(kernel: int) -> None:
    model = build(
        dict(
            model="wavenet",
            layers=8,
            stacks=2,
            residual=4,
            gate=4,
            skip=4,
            kernel_size=kernel,
            output="softmax",
            classes=5,
            length=200,
        )
    )
    sampler = fastgen.compile(model, threads=1)
    assert sampler.receptive_field == (model.receptive_field,)
    assert sampler.receptive_field == (1 + 2 * (1 + 2 + 4 + 8) * (kernel - 1),)


@pytest.mark.parametrize(
    "case", by_name("masked-sequential", "unet-nearest", "wavenet-embedded", "pooled-rows", "rgb-thirds"), ids=str
)
def test_receptive_field_is_a_bound(case: Case, compiled: Compiled) -> None:
    """No output moves when an input outside of it does."""
    field = compiled(case).receptive_field
    model = case.build().eval()
    values = case.random_values(1, torch.Generator().manual_seed(0))
    base = case.parameters(model, values)
    steps = base.shape[1] // values[0, ..., 0].numel()
    for site in ((0,) * len(case.sites), tuple(s // 3 for s in case.sites)):
        other = values.clone()
        other[(0, *site)] = (
            1 - other[(0, *site)]
            if case.head.discrete and case.head.n == 2
            else -other[(0, *site)] + ((case.head.n - 1) if case.head.discrete else 0.3)
        )
        moved = (case.parameters(model, other) - base).abs().amax(-1).reshape(*case.sites, steps).amax(-1) > 1e-6
        for i in moved.nonzero().tolist():
            away = [abs(a - b) for a, b in zip(i, site, strict=True)]
            assert all(d < f for d, f in zip(away, field, strict=True)), f"{i} reads {site}, field {field}"
        assert moved.any()


# ---- printing --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", cases(), ids=str)
def test_plans_can_be_read(case: Case, compiled: Compiled) -> None:
    sampler = compiled(case)
    text = str(sampler.plan)
    assert str(sampler.plan.spec.shape) in text and case.head.name in text
    assert f"{sampler.plan.spec.steps} steps" in text
    assert "per row" in text and "per site" in text and "receptive field" in text
    named = {"output", *(name or type(module).__name__ for name, module in sampler.model.named_modules())}
    listed = [line.split("   (and")[0] for line in text.splitlines() if line.startswith("    ")]
    assert listed and {line.split()[-1] for line in listed} <= named, "layers go by their names"
    assert max(map(len, text.splitlines())) < 160


def test_plan_counts_what_it_says() -> None:
    text = str(two_stacks(6, 9).plan)
    assert "54 steps in rows of 9" in text
    assert re.search(r"per row .* 1\.63 kMAC a step", text), text  # 96 + 1536
    assert re.search(r"hoisted to row .* 128 MAC a step", text), text
    assert re.search(r"per site .* 48 MAC a step", text), text


# ---- what does not matter --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", ["mul", "where", "muladd", "sites"])
def test_constant_masks(how: str) -> None:
    """Channels or sites that a constant mask puts out carry no dependency, and are no trouble."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.left, self.out = nn.Conv2d(1, 4, (1, 2)), nn.Conv2d(4, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = self.left(F.pad(x, (2, -1)))
            mask = torch.tensor([1.0, 0, 1, 0]).view(1, 4, 1, 1)
            if how == "sites":
                mask = (torch.arange(x.shape[3]) % 2).float()
            if how == "where":
                return self.out(torch.where(mask > 0, h, torch.zeros(())))
            return self.out(h * mask + h if how == "muladd" else h * mask)

    head = Categorical(5, encode="symmetric", params="B(n*C)*")
    assert fastgen.compile(Masked(), (1, 6, 7), head).verify().ok
