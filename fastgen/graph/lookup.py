"""Lookup in a table by a sampled index: embeddings, and one-hot, which is one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastgen.graph.bounds import Range, of_values
from fastgen.graph.maps import OperandNode
from fastgen.graph.node import Coder


@dataclass
class EmbedNode(OperandNode):
    """out = table[index] with the index read from one lane; table [rows, channels]."""

    table: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def name(self) -> str:
        return "embed"

    def value(self, values: Sequence[Tensor]) -> Tensor:
        index = self.whole(0, values)[0].nan_to_num(0).long().clamp(0, self.table.shape[0] - 1)
        return self.table.double()[index].movedim(-1, 0)

    def bounds(self, known: Mapping[int, Range]) -> Range:
        return of_values(self.table)

    def emit(self, coder: Coder) -> int:
        source = coder.whole(self.operands[0])
        dst = coder.alloc(self.channels)
        if source < 0:  # a constant index: bring it to scratch
            moved = coder.alloc(1)
            coder.emit("copy", moved, source, n=1)
            source = moved
        offset = coder.constants(self.table)
        coder.emit("embed", dst, source, offset, 0, self.channels, (float(self.table.shape[0]),))
        return dst
