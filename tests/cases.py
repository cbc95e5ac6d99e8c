"""Models that a user might have written, as cases that every executor must take as they are.

How to add one: in the tests/zoo_*.py that fits (tests/zoo.py gathers them) write the module as a person would, small (some
hundred values a sample), and append to that file's CASES

    Case("name-of-what-is-odd", lambda: randomise(Net(8), 70), (3, 6, 5), Categorical(6, params="B(n*C)*"))

`randomise` gives weights that keep activations alive; the seed is any number no other case has. What else `compile` must be
told (conditioning, layout, predicts, start, order) are fields of `Case`. That is all: test_cases.py checks that the module is
causal in its order and alive, test_law.py, test_native.py and test_team.py run it on every executor, test_properties.py at
other lengths, `make sanitize` its program in C++. What must be refused is a `bad(...)` in tests/zoo_bad.py.

`cases()` lists them, `bad_cases()` lists modules that must be refused, each with its error. A case added to
one of the lists (see tests/zoo.py) is tested on every executor by that alone. `assert_causal` checks a case
against its own declared order by perturbing its input, without any of the planner's machinery.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastgen.heads import Head

Conds = Callable[[int], tuple[Any, ...]]


def unconditional(n: int) -> tuple[Any, ...]:
    """No further inputs, whatever the batch `n`."""
    return ()


@dataclass(frozen=True)
class Case:
    """A module and all that `fastgen.compile` must be told about it."""

    name: str
    build: Callable[[], nn.Module]  # a fresh module, the same weights every time
    shape: tuple[int, ...]  # one sample as forward takes it, without the batch
    head: Head
    conds: Conds = unconditional  # n -> forward's further inputs for a batch of n; sample i's do not depend on n
    predicts: Literal["same", "next"] = "same"
    layout: str | None = None
    start: float | None = None  # predicts="next": the value (class index) in front; None: zeros
    order: Tensor | None = field(default=None, compare=False)  # the step of every site or value; None: raster

    def __str__(self) -> str:
        return self.name

    def cond(self) -> tuple[Any, ...]:
        """Example conditioning, batch 1."""
        return self.conds(1)

    @property
    def axes(self) -> str:
        """Names of the axes of `shape`."""
        return self.layout or {1: "T", 2: "CT", 3: "CHW"}[len(self.shape)]

    @property
    def sites(self) -> tuple[int, ...]:
        """Size of the grid: (H, W) or (T,)."""
        return tuple(size for axis, size in zip(self.axes, self.shape, strict=True) if axis != "C")

    @property
    def channels(self) -> int:
        """Value channels of a site (encoded channels counted once)."""
        return self.shape[self.axes.index("C")] // self.head.enc if "C" in self.axes else 1

    @property
    def steps(self) -> int:
        """Draws of one sample."""
        return math.prod(self.sites) * (1 if self.head.at_once else self.channels)

    @property
    def positions(self) -> Tensor:
        """Of every step, in raster order with the values of a site in turn: int64 [steps]."""
        if self.order is None:
            return torch.arange(self.steps)
        each = self.steps // math.prod(self.sites)
        order = self.order.reshape(-1, math.prod(self.sites))  # [1 or values of a site, sites]
        if len(order) < each:
            order = order * each + torch.arange(each)[:, None]
        return torch.argsort(order.t().reshape(-1))

    def by_step(self, values: Tensor) -> Tensor:
        """Values [n, *sites, C] in drawing order: [n, steps, V]."""
        return values.reshape(values.shape[0], self.steps, -1)[:, self.positions]

    def from_steps(self, drawn: Tensor) -> Tensor:
        """The inverse of by_step."""
        return drawn[:, torch.argsort(self.positions)].reshape(drawn.shape[0], *self.sites, self.channels)

    def to_input(self, values: Tensor) -> Tensor:
        """Values [B, *sites, C] (class indices or levels) -> forward's input [B, *shape]."""
        x = values.long() if self.head.integer_input else self.head.encode(values)
        moved = x.movedim(-1, 1 + self.axes.index("C")).contiguous() if "C" in self.axes else x.squeeze(-1)
        return moved

    def parameters(self, model: nn.Module, values: Tensor, cond: tuple[Any, ...] | None = None) -> Tensor:
        """One forward on values [B, *sites, C] -> parameters [B, steps, P] in drawing order; the one `cond` serves
        the whole batch.
        """
        n = values.shape[0]
        cond = self.cond() if cond is None else cond
        further = [c.repeat(n, *[1] * (c.dim() - 1)) if isinstance(c, Tensor) else c for c in cond]
        with torch.inference_mode():
            out = self.head.parameters_of(model(self.to_input(values), *further), self.channels, self.sites)
        return out.reshape(n, self.steps, -1)[:, self.positions]

    def random_values(self, n: int, generator: torch.Generator) -> Tensor:
        """Values [n, *sites, C] such as the head could draw."""
        shape = (n, *self.sites, self.channels)
        if self.head.discrete:
            return torch.randint(classes(self.head), shape, generator=generator).float()
        values = (0.5 * torch.randn(shape, generator=generator)).clamp(-1, 1)
        levels = getattr(self.head, "levels", None)
        return torch.round((values + 1) * (levels - 1) / 2) * (2 / (levels - 1)) - 1 if levels else values


@dataclass(frozen=True)
class BadCase:
    """A case that `compile` must refuse, with this error and a message that matches."""

    case: Case
    error: type[Exception]
    match: str

    def __str__(self) -> str:
        return self.case.name


def classes(head: Head) -> int:
    """Number of values that a discrete head draws from."""
    return int(getattr(head, "n", 2))


def changed(case: Case, values: Tensor, generator: torch.Generator) -> Tensor:
    """Values that differ from the given ones in every element."""
    if case.head.discrete:
        n = classes(case.head)
        return (values + torch.randint(1, n, values.shape, generator=generator)) % n
    other = case.random_values(values.shape[0], generator)
    return torch.where((other - values).abs() < 0.1, -values.sign() * 0.5 + values / 4, other)


def assert_causal(case: Case, batch: int = 64) -> None:
    """Parameters of step t ignore every value of step >= t (> t in a delayed input) and depend on earlier
    ones.
    """
    model, generator = case.build().eval(), torch.Generator().manual_seed(1)
    base = case.random_values(1, generator)
    other = changed(case, base, generator)
    step = torch.argsort(case.positions).reshape(*case.sites, -1).expand(*case.sites, case.channels)
    last = 0 if case.predicts == "next" else -1  # step t may read inputs up to t + last
    expected = case.parameters(model, base)[0]
    tolerance = 1e-5 * max(1.0, expected.abs().max().item())
    depends = 0
    for ts in torch.split(torch.arange(case.steps), batch):
        future = step[None] > (ts + last).view(-1, *[1] * step.dim())
        rows = torch.arange(len(ts))
        same = case.parameters(model, torch.where(future, other, base))[rows, ts]
        error = (same - expected[ts]).abs().amax(-1)
        assert error.max() <= tolerance, f"{case}: step {ts[error.argmax()]} reads a value that is not drawn yet"
        moved = case.parameters(model, torch.where(future, base, other))[rows, ts]
        depends += int(((moved - expected[ts]).abs().amax(-1) > tolerance).sum())
    assert depends >= 0.8 * (case.steps - 1), f"{case}: only {depends} of {case.steps} steps depend on the past"


def randomise(model: nn.Module, seed: int, gain: float = 1.5) -> nn.Module:
    """Weights that keep activations near 1, biases and running statistics that are not zero; to eval."""
    g = torch.Generator().manual_seed(seed)
    for module in model.modules():
        norm = isinstance(module, nn.modules.batchnorm._BatchNorm | nn.LayerNorm | nn.GroupNorm)
        for name, p in module.named_parameters(recurse=False):
            if isinstance(module, nn.Embedding):
                new = torch.randn(p.shape, generator=g)
            elif name in ("weight_g", "original0"):  # the length of a weight-normalised row
                new = gain * (0.7 + 0.6 * torch.rand(p.shape, generator=g))
            elif p.dim() >= 2:
                new = torch.randn(p.shape, generator=g) * gain / math.sqrt(p[0].numel())
            elif norm and name == "weight":
                new = 0.7 + 0.6 * torch.rand(p.shape, generator=g)
            else:
                new = 0.3 * torch.randn(p.shape, generator=g)
            p.data.copy_(new)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.copy_(0.2 * torch.randn(module.running_mean.shape, generator=g))
            assert module.running_var is not None
            module.running_var.copy_(0.5 + torch.rand(module.running_var.shape, generator=g))
    return model.eval()


def narrow(bias: Tensor | None, n_mix: int, colours: int = 1, by: float = 2.5) -> None:
    """Lower the log-scales of a mixture head's last bias, so that draws do not all end at the clip."""
    assert bias is not None
    log_scales = bias.data[2 * n_mix :] if colours == 1 else bias.data[n_mix:].view(3, 3, n_mix)[:, 1]
    log_scales -= by


def labels(n_classes: int) -> Conds:
    """Class labels [n], int64."""
    return lambda n: (torch.arange(n) % n_classes,)


def noise(*shape: int) -> Conds:
    """A float map [n, *shape]; sample i's does not depend on n."""
    return lambda n: (torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(n)]),)


def both(*conds: Conds) -> Conds:
    """The inputs of several, in turn."""
    return lambda n: tuple(c for each in conds for c in each(n))


def cases() -> list[Case]:
    """Every case."""
    from tests import zoo  # late: the zoo's files import this one

    return zoo.CASES


def bad_cases() -> list[BadCase]:
    """Every module that must be refused."""
    from tests import zoo

    return zoo.BAD
