"""Run with TRITON_INTERPRET=1: a training step of small reference models through the Triton kernels against plain torch.

Prints one line a model: its name, the difference of the losses, and that of the gradients as a part of the largest.
"""

from __future__ import annotations

from typing import Any

import torch

from fastgen.heads import LogisticMixture
from fastgen.models import PixelCNNpp, ReferenceModel, build
from fastgen.nn.choice import Deciding
from fastgen.ops.dispatch import interpreted
from fastgen.train import bits_per_dim
from tests.test_train_fused import batch


class Blocks(ReferenceModel):
    """The first layers of a PixelCNN++: all of them take too long in the interpreter."""

    layout = "CHW"

    def __init__(self) -> None:
        super().__init__()
        self.sample_shape, self.head = (3, 4, 5), LogisticMixture(2)
        whole = PixelCNNpp(1, 4, 2, (3, 4, 4), dropout=0.2)
        self.first, self.halve = whole.first_vertical, whole.halve_vertical[0]
        self.level, self.out = whole.inward[0], whole.params

    def example_cond(self, batch: int = 1) -> tuple[torch.Tensor, ...]:
        return ()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        u = self.first(torch.cat((x, torch.ones_like(x[:, :1])), 1))
        u, ul = self.level(u, u, [], [], None)
        return self.out(ul) + self.halve(u).mean()  # type: ignore[no-any-return]


SMALL: dict[str, dict[str, Any] | None] = {
    "pixelcnnpp": None,
    "gated-pixelcnn": dict(
        model="gated-pixelcnn", levels=4, dim=6, layers=2, classes=3, cond_channels=2, shape=[5, 6], hidden=8
    ),
    "wavenet": dict(
        model="wavenet", layers=2, stacks=1, residual=6, gate=8, skip=5, mixtures=2, global_channels=4, speakers=3,
        length=20,
    ),
}  # fmt: skip


def step(model: ReferenceModel) -> list[torch.Tensor]:
    """Loss and gradients."""
    x, cond = batch(model, 0)
    torch.manual_seed(1)
    loss = bits_per_dim(model, x, cond).mean()
    params = list(model.parameters())
    found = torch.autograd.grad(loss, params, allow_unused=True)
    return [loss.detach(), *(torch.zeros_like(p) if g is None else g for p, g in zip(params, found, strict=True))]


def main() -> None:
    torch.set_num_threads(1)
    for name, config in SMALL.items():
        torch.manual_seed(0)
        model = Blocks() if config is None else build(config)
        plain = step(model)
        with interpreted():
            layers = [m for m in model.modules() if isinstance(m, Deciding)]
            for layer in layers:
                layer._fastgen_decide()
            assert sum(layer._fastgen_kernel.name == "triton" for layer in layers) >= 3
            fused = step(model)
        errors = [float((a - b).abs().max()) for a, b in zip(plain, fused, strict=True)]
        largest = max(float(g.abs().max()) for g in plain[1:])
        print(name, errors[0], max(errors[1:]) / largest)


if __name__ == "__main__":
    main()
