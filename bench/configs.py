"""What is timed: the configurations of fastgen.models at their real size, with fresh weights.

Speed does not depend on the values of the weights (no kernel looks for zeros), so nothing need be trained.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastgen import models
from fastgen.models.base import ReferenceModel
from fastgen.models.wavenet import WaveNet
from fastgen.spec import Spec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NAMES = tuple(name for name in models.CONFIGS if not name.endswith("-small"))  # those are to be trained on one core


@dataclass(frozen=True)
class Case:
    """A model and the sample that is timed: of its own shape, or for WaveNets of `length` sites."""

    name: str
    model: ReferenceModel
    spec: Spec

    @property
    def audio(self) -> bool:
        return isinstance(self.model, WaveNet)

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    @property
    def window(self) -> int:
        """Sites of the naive loop's forward: a whole image, or the receptive field of a sequence."""
        if isinstance(self.model, WaveNet):
            return min(self.model.receptive_field, self.spec.sites[0])
        return self.spec.grid[0] * self.spec.grid[1]

    def cond(self, batch: int, sites: int | None = None) -> tuple[Tensor, ...]:
        """Conditioning of the right shapes for a batch, different for every sample."""
        if isinstance(self.model, WaveNet):
            example = self.model.example_cond(batch, sites or self.spec.sites[0])
        else:
            example = self.model.example_cond(batch)
        made = torch.Generator().manual_seed(1)
        return tuple(
            torch.randn(c.shape, generator=made)
            if c.is_floating_point()
            else torch.arange(c.numel()).view(c.shape) % 10
            for c in example
        )

    def forward_inputs(self, batch: int) -> tuple[Any, ...]:
        """What one step of the naive loop hands to forward."""
        spec = self.spec.at_length(self.window) if self.audio else self.spec
        return (spec.encode(spec.example_values(batch)), *self.cond(batch, self.window))


def batches(text: str) -> list[int]:
    """Comma-separated batch sizes, as an option gives them."""
    found = [int(b) for b in text.split(",")]
    if min(found) < 1:
        raise ValueError("batches are at least 1")
    return found


def make(name: str, length: int, rows: int | None = None) -> Case:
    """A case by name; length: sites of a sequence; rows: of an image, fewer than it has. Raises ValueError for an
    unknown name."""
    if name not in NAMES:
        raise ValueError(f"unknown configuration {name!r}, expected one of {', '.join(NAMES)}")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = models.build(name).eval()
    spec = Spec(model.sample_shape, model.head, model.layout, model.predicts, model.start)
    if spec.sequence:
        spec = replace(spec, shape=(model.sample_shape[0], length))
    elif rows is not None:
        spec = replace(spec, shape=(*model.sample_shape[:-2], rows, model.sample_shape[-1]))
    return Case(name, model, spec)
