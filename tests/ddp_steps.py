"""Run by torchrun: some steps of data-parallel training on the CPU, whose losses and gradients rank 0 writes to argv[1].

Without torchrun, one process does the same with the whole batch.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fastgen.models import build
from fastgen.nn.choice import Deciding
from fastgen.ops import KernelChoice
from fastgen.train import bits_per_dim

IMAGES: dict[str, Any] = dict(model="pixelcnnpp", nr_resnet=1, nr_filters=4, nr_mix=2, shape=[1, 8, 8], dropout=0.0)
AUDIO: dict[str, Any] = dict(model="wavenet", layers=3, stacks=1, residual=4, gate=4, skip=4, mixtures=2, length=32)


def steps(config: dict[str, Any], op: bool, rank: int, world: int) -> dict[str, Tensor]:
    """Three optimiser steps on this rank's part of a batch of four; weights and losses."""
    torch.manual_seed(0)
    model = build(config)
    for m in model.modules():
        if op and isinstance(m, Deciding) and "NVIDIA" in m._fastgen_kernel.reason:
            m._fastgen_kernel = KernelChoice("triton", "this test")
    # The last layer's residual reaches no output: without the op, autograd never hears of its weights.
    ddp = DistributedDataParallel(model, find_unused_parameters=not op) if world > 1 else model
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for step in range(3):
        x = torch.rand(4, *model.sample_shape, generator=torch.Generator().manual_seed(step)) * 2 - 1
        loss = bits_per_dim(model, x.chunk(world)[rank], forward=ddp).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        total = loss.detach() / world
        if world > 1:
            dist.all_reduce(total)
        losses.append(total)
    return {"losses": torch.stack(losses), **{k: v.detach().clone() for k, v in model.state_dict().items()}}


def main(out: str) -> None:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo")
    found = {f"{c['model']} {op}": steps(c, op, rank, world) for c in (IMAGES, AUDIO) for op in (False, True)}
    if rank == 0:
        torch.save(found, out)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
