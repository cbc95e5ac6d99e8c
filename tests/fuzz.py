"""Random modules, judged by a loop that knows nothing of fastgen but its heads and its noise.

    python -m tests.fuzz --seeds 0 5000        (make fuzz)

A module is causal by construction, or has one leak into the future. It mixes layers, functions, integers, conditioning in
many styles, checks, and reads. What may come of it: samples exact for every conditioning and length tried; or a refusal. What
may not: a wrong sample, a VerifyError (the planner did not see what the proof did), an exception of another kind, a leaky
module accepted, or one called non-causal that is not.
"""

from __future__ import annotations

import argparse
import random
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastgen
from fastgen.errors import FastgenError, NotCausalError, UnsupportedError, VerifyError
from fastgen.heads import Bernoulli, Categorical, GaussianMixture, Head, LogisticMixture
from tests.cases import Case, changed
from tests.oracle import assert_same_samples, at_length, noise_of, parameters, slow_sample, values_of

Function = Callable[[Tensor], Tensor]

FUNCTIONS: dict[str, Function] = {
    "tanh": torch.tanh, "relu": F.relu, "elu": F.elu, "gelu": F.gelu, "silu": F.silu, "sigmoid": torch.sigmoid,
    "leaky": lambda h: F.leaky_relu(h, 0.3), "softplus": F.softplus, "hardswish": F.hardswish, "mish": F.mish,
    "celu": lambda h: F.celu(h, 0.7), "rrelu": lambda h: F.rrelu(h, 0.1, 0.3), "softsign": F.softsign,
    "square": lambda h: h.clamp(-2, 2) ** 2, "abs": torch.abs, "sin": torch.sin, "log": lambda h: torch.log1p(h.abs()),
    "scaled": lambda h: torch.add(h, h, alpha=0.5), "rsub": lambda h: 1 - h, "threshold": lambda h: F.threshold(h, 0.1, 0.0),
    "round": lambda h: torch.round(h * 3) / 3, "decimals": lambda h: torch.round(h, decimals=1),
    "down": lambda h: h // 0.25, "wrap": lambda h: (h * 100).to(torch.int8).float() / 50, "half": lambda h: h.half().float(),
    "long": lambda h: (h * 2).long().float() / 2, "where": lambda h: torch.where(h > 0, h, -0.1 * h),
    "not": lambda h: h * ~(h > 0.5), "bools": lambda h: ((h > 0) + (h > 0.5)).float(), "double": lambda h: h.double().tanh().float(),
    "addcmul": lambda h: torch.addcmul(h, h, h.tanh(), value=0.3), "masked": lambda h: h.masked_fill(h > 1, 1.0),
    "lerp": lambda h: torch.lerp(h, h.tanh(), 0.3), "zero": lambda h: h + 0.0 * h.flip(1), "clamp": lambda h: h.clamp(max=0.7),
    "out": lambda h: torch.mul(h, 0.5, out=torch.empty_like(h)), "complex": lambda h: (h * 1j).imag,
}  # fmt: skip
CHANNELS: dict[str, Function] = {
    "flip": lambda h: h.flip(1), "chunks": lambda h: torch.cat(h.chunk(2, 1)[::-1], 1), "roll": lambda h: h.roll(1, 1),
    "gate": lambda h: torch.cat([h[:, ::2].tanh() * h[:, 1::2].sigmoid()] * 2, 1), "softmax": lambda h: F.softmax(h, 1) * 3,
    "mean": lambda h: h - h.mean(1, keepdim=True), "norm": lambda h: h / (1 + h.pow(2).sum(1, keepdim=True).sqrt()),
    "max": lambda h: h - h.amax(1, keepdim=True) / 2, "var": lambda h: h / (1 + h.var(1, keepdim=True, correction=0)),
    "patched": lambda h: torch.cat([h[:, :1] * 2, h[:, 1:]], 1), "norm of layers": lambda h: F.layer_norm(h.movedim(1, -1), (h.shape[1],)).movedim(-1, 1),
    "glu": lambda h: F.glu(torch.cat([h, h.flip(1)], 1), 1), "prelu": lambda h: F.prelu(h, torch.linspace(0, 1, h.shape[1])),
    "in place": lambda h: h.clone().mul_(1.1).add_(0.1), "channel set": lambda h: _set(h.clone(), 0, 0.5),
    "counts": lambda h: h + (h > 0).sum(1, keepdim=True) * 0.1,
}  # fmt: skip


def _set(h: Tensor, k: int, value: float) -> Tensor:
    h[:, k] = value
    return h


def _raises(h: Tensor) -> Tensor:
    if h.max() > 1e6 or not torch.isfinite(h).all():
        raise ValueError("out of range")
    return h


def _branch(h: Tensor) -> Tensor:
    return h * 0.5 if h.max() > 2.5 else h


READS: dict[str, Function] = {
    "check": _raises, "branch": _branch, "item": lambda h: h * (1 + 0.1 * h[0, 0].flatten()[0].item()),
    "numpy": lambda h: h + torch.from_numpy(h.numpy().round() * 0.1), "nonzero": lambda h: h * (1 + len((h > 2.5).nonzero())),
    "print": lambda h: h if f"{h}" else -h,
}  # fmt: skip


class Block(nn.Module):
    """A causal convolution along raster order (rows above whole, and this row so far), dilated in sequences."""

    def __init__(self, rng: random.Random, inputs: int, outputs: int, images: bool, first: bool) -> None:
        super().__init__()
        self.images, self.first = images, first
        if images:
            self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
            mask = torch.ones(3, 3)
            mask[2], mask[1, 2], mask[1, 1] = 0, 0, float(not first)
            self.register_buffer("mask", mask)
        else:
            self.dilation = rng.choice([1, 1, 2, 3])
            self.conv = nn.Conv1d(inputs, outputs, rng.choice([1, 2, 3]), dilation=self.dilation)  # type: ignore[assignment]

    def forward(self, h: Tensor) -> Tensor:
        if self.images:
            return F.conv2d(h, self.conv.weight * self.mask, self.conv.bias, padding=1)  # type: ignore[operator]
        out: Tensor = self.conv(F.pad(h, ((self.conv.kernel_size[0] - 1) * self.dilation, 0)))
        return out


class Net(nn.Module):
    """`steps` in turn; see `random_case`."""

    def __init__(self, rng: random.Random, case: dict[str, Any]) -> None:
        super().__init__()
        torch.manual_seed(rng.randrange(1 << 30))
        self.case, width, images = case, case["width"], case["images"]
        self.embed = nn.Embedding(case["classes"], width) if case["integers"] else None
        inputs = width if case["integers"] else case["inputs"]
        self.blocks = nn.ModuleList(
            Block(rng, inputs if k == 0 else width, width, images, k == 0 and case["predicts"] == "same")
            for k in range(case["blocks"])
        )
        conv = nn.Conv2d if images else nn.Conv1d
        self.out = conv(width, case["outputs"], 1)
        self.labels, self.vector = nn.Embedding(4, width), nn.Linear(3, width)
        self.film, self.many = nn.Linear(3, 2 * width), nn.Parameter(torch.randn(4, width, width) * 0.3)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, 0, 1.2 / max(1, p[0].numel()) ** 0.5)

    def forward(self, x: Tensor, *cond: Tensor) -> Tensor:
        h = self.embed(x.squeeze(1)).movedim(-1, 1) if self.embed is not None else x
        for k, (block, names, style, leak) in enumerate(
            zip(self.blocks, self.case["steps"], self.case["styles"], self.case["leaks"], strict=True)
        ):
            before = h
            h = block(h)
            for table, name in names:
                h = table[name](h)
            if style:
                h = self.condition(h, style, cond[0])
            if leak:
                h = LEAKS[leak](h)
            if k and self.case["residual"]:
                h = h + before
        out: Tensor = self.out(h)
        return out

    def condition(self, h: Tensor, style: str, c: Tensor) -> Tensor:
        sites = (1,) * (h.dim() - 2)
        if style in FLOAT_STYLES:
            v = self.vector(c).view(-1, h.shape[1], *sites)
            scale, shift = self.film(c).view(-1, 2 * h.shape[1], *sites).chunk(2, 1)
            return {
                "add": lambda: h + v, "film": lambda: h * (1 + scale) + shift, "gate": lambda: h * torch.sigmoid(v),
                "branch": lambda: h * 2 if c.sum() > 0 else h, "item": lambda: h * c[0, 0].item(),
                "where": lambda: torch.where(v > 0, h, h * 0.5), "fill": lambda: _filled(h, v),
                "full": lambda: h + torch.zeros_like(h) + v, "lerp": lambda: torch.lerp(h, h * v, 0.5),
            }[style]()  # fmt: skip
        e, m, b = self.labels(c).view(-1, h.shape[1], *sites), self.many[c], len(h)
        both = torch.cat([h, e.expand_as(h)], 1)
        stacked = torch.stack([h, h * 2, h * 3, h * 4], 1)
        return {
            "label": lambda: h + e, "one-hot": lambda: h + F.one_hot(c, h.shape[1]).view(-1, h.shape[1], *sites),
            "scaled": lambda: h * e, "int": lambda: h * (1 + int(c[0])), "expert": lambda: h + m.sum(1).view(-1, h.shape[1], *sites),
            "matrix": lambda: torch.einsum("boi,bi...->bo...", m, h), "first": lambda: h + h[:, c[:1]],
            "channel": lambda: h + h.gather(1, c.view(-1, 1, *sites).expand(-1, 1, *h.shape[2:])),
            "bias": lambda: torch.cat([F.conv1d(h[k : k + 1].flatten(2), self.many[0][..., None], e[k].flatten()).view_as(h[:1]) for k in range(b)]),
            "kernel": lambda: F.conv1d(h.reshape(1, -1, h[0, 0].numel()), m.flatten(0, 1)[..., None], e.flatten(), groups=b).view_as(h),
            "masked": lambda: torch.bmm(m * torch.eye(m.shape[1]).tril(), h.flatten(2)).view_as(h) + h,
            "roll": lambda: h.roll(int(c[0]), 1), "chosen": lambda: h + stacked[torch.arange(b), c],
            "taken": lambda: torch.take_along_dim(stacked, c.view(-1, 1, 1, *sites), 1)[:, 0],
            "sums": lambda: torch.einsum("bk...,bk->b...", stacked, F.one_hot(c, 4).float()),
            "check": lambda: _checked(h + e, c), "maximum": lambda: torch.maximum(h, e), "largest": lambda: h + both.amax(1, keepdim=True),
            "mean of both": lambda: h * both.mean(1, keepdim=True), "glu of both": lambda: F.glu(both, 1),
            "linear of both": lambda: F.linear(both.movedim(1, -1), torch.cat([self.many[0], self.many[1]], 1)).movedim(-1, 1),
            "norm of both": lambda: F.layer_norm(both.movedim(1, -1), (2 * h.shape[1],)).movedim(-1, 1)[:, : h.shape[1]],
            "front": lambda: torch.cat([e.expand(*h.shape[:-1], 1), h[..., :-1]], -1), "written": lambda: _written(h, e),
        }[style]()  # fmt: skip


def _written(h: Tensor, e: Tensor) -> Tensor:
    h = h.clone()
    h[..., :2] = e
    return h


def _filled(h: Tensor, v: Tensor) -> Tensor:
    h = h.clone()
    h[:, 0] = v[:, 0]
    return h


def _checked(h: Tensor, c: Tensor) -> Tensor:
    if c.max() > 3:
        raise IndexError("no such class")
    return h


FLOAT_STYLES = ("add", "film", "gate", "branch", "item", "where", "fill", "full", "lerp")
LABEL_STYLES = (
    "label", "one-hot", "scaled", "int", "expert", "matrix", "channel", "bias", "roll", "chosen", "check", "maximum", "first",
    "kernel", "masked", "taken", "sums", "largest", "mean of both", "glu of both", "linear of both", "norm of both", "front",
    "written",
)  # fmt: skip
LEAKS: dict[str, Function] = {
    "mean of sites": lambda h: h + h.flatten(2).mean(-1).view(*h.shape[:2], *[1] * (h.dim() - 2)),
    "largest of all": lambda h: h / (1 + h.max().abs()),
    "ahead": lambda h: h + F.pad(h, (0, 2))[..., 2:] * 0.3, "backwards": lambda h: h + h.flip(-1) * 0.3,
    "softmax over sites": lambda h: F.softmax(h, -1) * h.shape[-1], "sorted": lambda h: h.sort(-1)[0],
}  # fmt: skip


def random_case(seed: int) -> tuple[Case, bool]:
    """A case, and whether it leaks."""
    rng = random.Random(seed)
    images, integers = rng.random() < 0.4, rng.random() < 0.4
    heads: list[tuple[Head, int]] = [(Categorical(5, encode="index" if integers else "symmetric", params="B(n*C)*"), 5)]
    if not integers:
        heads += [(Bernoulli(), 1), (LogisticMixture(2, levels=16), 6), (GaussianMixture(2, value_range=(-1, 1)), 6),
                  (Categorical(4, encode="onehot", params="B(n*C)*"), 4)]  # fmt: skip
    head, outputs = rng.choice(heads)
    sites = (rng.choice([1, 3, 4]), rng.choice([3, 5])) if images else (rng.choice([7, 12, 20, 70]),)
    blocks, leaks = rng.choice([1, 2, 2, 3]), rng.random() < 0.25
    tables: list[dict[str, Function]] = [FUNCTIONS, FUNCTIONS, CHANNELS]
    steps = []
    for _ in range(blocks):
        chosen = [rng.choice(tables) for _ in range(rng.choice([0, 1, 1, 2]))]
        if rng.random() < 0.15:
            chosen.append(READS)
        steps.append([(table, rng.choice(sorted(table))) for table in chosen])
    kind = rng.choice(["", "", "float", "label"])
    styles = [
        rng.choice(FLOAT_STYLES if kind == "float" else LABEL_STYLES) if kind and rng.random() < 0.7 else ""
        for _ in range(blocks)
    ]
    if kind and not any(styles):
        kind = ""
    inputs = head.enc
    made = dict(
        width=rng.choice([4, 6]), images=images, integers=integers, classes=5, inputs=inputs, outputs=outputs, blocks=blocks,
        steps=steps, styles=styles, leaks=[""] * blocks, residual=rng.random() < 0.5,
        predicts="same" if images or rng.random() < 0.2 else "next",
    )  # fmt: skip
    if leaks:
        made["leaks"][rng.randrange(blocks)] = rng.choice(sorted(LEAKS))
    if not images and made["predicts"] == "same":
        made["predicts"] = "next"  # the first block of a sequence sees its own site
    dice = rng.randrange(1 << 30)

    def conds(n: int) -> tuple[Any, ...]:
        if kind == "float":
            return (torch.randn(n, 3, generator=torch.Generator().manual_seed(7)),)
        return ((torch.arange(n) * 3 + 1) % 4,) if kind else ()

    case = Case(
        f"fuzz-{seed}", lambda: Net(random.Random(dice), made).eval(), (inputs, *sites), head, conds,
        predicts=made["predicts"],  # type: ignore[arg-type]
    )  # fmt: skip
    return case, leaks


def reads_the_future(case: Case) -> bool:
    """By perturbation: parameters of a step that change with values drawn later, or at it; of one sample, as a branch may be
    taken for the whole batch because of another."""
    g = torch.Generator().manual_seed(0)
    model, values = case.build(), case.random_values(1, g)
    if not case.head.discrete:  # falling ones: a branch may be taken for few values
        values = (-torch.arange(values.numel()).view_as(values) * 272 / 4095) % 2 - 1
    for k in range(16):
        falling = k == 0 and not case.head.discrete
        other = -values.flatten().flip(0).view_as(values) if falling else changed(case, values, g)
        for t in sorted({0, 1, case.steps // 2, case.steps - 1}):
            mixed = case.by_step(values).clone()
            mixed[:, t:] = case.by_step(other)[:, t:]
            a, b = (_parameters(case, model, v) for v in (values, case.from_steps(mixed)))
            if not torch.allclose(a[:, : t + 1], b[:, : t + 1], atol=1e-5, rtol=1e-5):
                return True
        values = other
    return False


def _parameters(case: Case, model: nn.Module, values: Tensor) -> Tensor:
    return parameters(case, model, values, case.conds(len(values)))


def _assert_same(case: Case, ours: Tensor, slow: Tensor, params: Tensor) -> None:
    """Samples are the slow loop's. Continuous ones may run apart where a step makes more of what the last one rounded: then
    each of their steps must be what forward gives for those before."""
    try:
        assert_same_samples(case, ours, slow, params, 11)
    except AssertionError:
        if case.head.discrete or case.head.grid_levels:
            raise
        truth = parameters(case, case.build().eval(), ours, case.conds(len(ours)))
        again = case.head.draw(truth, noise_of(case, len(ours), 11))
        torch.testing.assert_close(case.by_step(ours), again, atol=1e-4, rtol=1e-4)


def outcome(seed: int) -> str:
    """What came of a seed; a fault begins with a capital letter."""
    case, leaks = random_case(seed)
    torch.manual_seed(0)
    try:
        sampler = fastgen.compile(case.build(), case.shape, case.head, case.cond(), predicts=case.predicts, threads=1)
    except NotCausalError:
        # What Python reads of all values at once is of the future too, however seldom it decides anything.
        reads = any(name in READS for step in case.build().case["steps"] for _, name in step)
        return "refused: reads the future" if leaks or reads or reads_the_future(case) else "FALSE NotCausalError"
    except VerifyError as error:
        return "refused: NaN" if "NaN" in str(error) else f"VERIFY {error}"
    except UnsupportedError as error:
        words = str(error).split(": ", 1)[1].replace("aten.", "") if ": " in str(error) else str(error)
        return f"refused: {' '.join(words.split()[:5])}"
    except FastgenError as error:
        return f"refused: {type(error).__name__} {' '.join(str(error).split()[:6])}"
    except Exception as error:
        return f"RAW {type(error).__name__} {error} {traceback.extract_tb(error.__traceback__)[-1]}"
    if leaks and reads_the_future(case):
        return "LEAK accepted"
    lengths = [case.shape[-1]]
    if sampler.any_length and sampler.spec.sites[0] >= 64:
        lengths.append(75)
    for length in lengths:
        wanted = case if length == case.shape[-1] else at_length(case, length)
        slow, params = slow_sample(wanted, 3, 11)
        if not bool(slow.isfinite().all()):
            return "refused: NaN"
        try:
            ours = sampler.sample(
                3, seed=11, cond=case.conds(3) or None, length=None if length == case.shape[-1] else length
            )
            _assert_same(wanted, values_of(wanted, ours), slow, params)
        except AssertionError as error:
            return f"WRONG {error}"
        except FastgenError as error:
            return f"refused at call: {' '.join(str(error).split()[:6])}"
        except Exception as error:
            return f"RAW {type(error).__name__} {error}"
    return "exact"


def main() -> int:
    p = argparse.ArgumentParser(prog="tests.fuzz", description=(__doc__ or "").split("\n")[0])
    p.add_argument("--seeds", type=int, nargs=2, metavar=("FROM", "TO"), default=(0, 5000))
    args = p.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found: Counter[str] = Counter()
    faults = 0
    for seed in range(*args.seeds):
        what = outcome(seed)
        found[what] += 1
        if what[:2].isupper():
            faults += 1
            print(f"seed {seed}: {what}", flush=True)
    for what, count in found.most_common():
        print(f"{count:6d}  {what}")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
