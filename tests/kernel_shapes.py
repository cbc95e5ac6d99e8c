"""The layers of the named configurations: what the tests compile the kernels for and what bench.layers times.

A layer says which operation of fastgen.ops it is, its sizes, and makes its tensors; `run` computes it fused or as the
plain torch reference. A layer added to LAYERS is compiled and timed by that alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastgen import ops

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Layer:
    """op: "conv2d", "wavenet" or "linear"; x: one input without the batch; options: what the operation is told.

    outputs: channels behind the gate. cond: "", "sample" or "map". For "wavenet", skip is the number of skip channels.
    """

    name: str
    op: str
    x: tuple[int, ...]
    outputs: int
    kernel: tuple[int, ...] = (1, 1)
    options: dict[str, Any] = field(default_factory=dict)
    cond: str = ""
    residual: bool = False
    skip: int = 0

    def tensors(self, batch: int, dtype: torch.dtype, device: str = "cpu", channels_last: bool = True) -> Tensors:
        """Random inputs and parameters that require gradients; weights of a size that keeps values near one."""
        gate = self.options.get("gate", "none")
        rows = self.outputs * (1 if self.op != "wavenet" and gate == "none" else 2)
        inputs = self.x[0] * (2 if self.options.get("elu") else 1)
        made: Tensors = {}

        def make(name: str, *shape: int, scale: float = 1.0) -> None:
            t = torch.randn(*shape, device=device) * scale
            t = t.to(memory_format=torch.channels_last) if channels_last and t.dim() == 4 else t
            if channels_last and t.dim() == 3 and name in ("x", "cond"):
                t = t.transpose(1, 2).contiguous().transpose(1, 2)
            made[name] = t.to(dtype).requires_grad_()

        if self.op == "linear":
            make("x", batch * self.x[1], self.x[0])
            make("weight", rows, inputs, scale=inputs**-0.5)
        else:
            make("x", batch, *self.x)
            make("weight", rows, inputs, *self.kernel, scale=(inputs * _product(self.kernel)) ** -0.5)
        make("bias", rows)
        size = tuple(self.y(batch)[2:])
        if self.cond:
            make("cond", batch, rows, *(size if self.cond == "map" else (1,) * len(size)))
        if self.residual:
            make("residual", *self.y(batch))
        if self.op == "wavenet":
            make("out_weight", self.x[0] + self.skip, self.outputs, scale=self.outputs**-0.5)
            make("out_bias", self.x[0] + self.skip)
        return made

    def y(self, batch: int) -> tuple[int, ...]:
        """Shape of the result; for "wavenet" in front of the 1x1 product."""
        if self.op == "linear":
            return (batch * self.x[1], self.outputs)
        stride = self.options.get("stride", (1, 1))
        size = (
            self.x[1:] if self.op == "wavenet" else tuple(-(-s // d) for s, d in zip(self.x[1:], stride, strict=True))
        )
        return (batch, self.outputs, *size)

    def run(self, tensors: Tensors, fused: bool) -> Tensor:
        """The result; of "wavenet" both, side by side."""
        name = {"conv2d": "gated_conv2d", "wavenet": "wavenet_layer", "linear": "linear_elu"}[self.op]
        function: Callable[..., Any] = getattr(ops, name if fused else f"{name}_reference")
        y = function(**tensors, **self.options)
        return torch.cat(y, 1) if isinstance(y, tuple) else y


def _product(sizes: tuple[int, ...]) -> int:
    return int(torch.Size(sizes).numel())


def _resnet(name: str, size: int, kernel: tuple[int, int], filters: int = 160) -> list[Layer]:
    """The two convolutions of a gated resnet of PixelCNN++ at one resolution."""
    pads = (kernel[1] // 2, kernel[1] // 2, 1, 0) if kernel[1] == 3 else (1, 0, 1, 0)
    x, gate = (filters, size, size), {"gate": "linear", "elu": True, "pads": pads}
    return [
        Layer(f"{name} in", "conv2d", x, filters, kernel, {**gate, "gate": "none"}, residual=True),
        Layer(f"{name} out", "conv2d", x, filters, kernel, gate, residual=True),
    ]


LAYERS = [
    *_resnet("pixelcnnpp-cifar vertical 32", 32, (2, 3)),
    *_resnet("pixelcnnpp-cifar horizontal 32", 32, (2, 2)),
    *_resnet("pixelcnnpp-cifar vertical 8", 8, (2, 3)),
    Layer("pixelcnnpp-cifar skip 32", "conv2d", (320, 32, 32), 160, (1, 1), {"gate": "none", "elu": True}),
    Layer("pixelcnnpp-cifar halve", "conv2d", (160, 32, 32), 160, (2, 3),
          {"gate": "none", "pads": (1, 1, 1, 0), "stride": (2, 2)}),
    Layer("gated-pixelcnn-64 vertical", "conv2d", (64, 28, 28), 64, (2, 3), {"gate": "tanh", "pads": (1, 1, 1, 0)}, "sample"),
    Layer("gated-pixelcnn-64 horizontal", "conv2d", (64, 28, 28), 64, (1, 2), {"gate": "tanh", "pads": (1, 0, 0, 0)}, "map"),
    Layer("wavenet-nv", "wavenet", (64, 16384), 64, (2,), {"dilation": 512}, skip=128),
    Layer("wavenet-mol", "wavenet", (128, 16384), 128, (3,), {"dilation": 16, "residual_scale": 0.5**0.5}, "map", skip=128),
    Layer("rows of pixelcnnpp-cifar", "linear", (320, 32), 160, (), {"gate": "linear", "elu": True}, residual=True),
]  # fmt: skip
