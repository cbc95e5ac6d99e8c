"""Gated PixelCNN: van den Oord et al. 2016, "Conditional Image Generation with PixelCNN Decoders".

Two stacks without a blind spot: the vertical one sees all rows above, the horizontal one the pixels to the
left and, through a 1x1 convolution, the vertical stack of its own row (Figure 2 of the paper). Pixels are
class indices, as in the PixelCNN priors of discrete autoencoders.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.errors import ShapeError
from fastgen.heads import Categorical
from fastgen.models.base import ReferenceModel, check_cond
from fastgen.nn import DownRightShiftedConv2d, DownShiftedConv2d, GatedConv2d
from fastgen.nn.conv2d import Mask
from fastgen.ops.reference import gated as gate


class GatedLayer(nn.Module):
    """One layer of both stacks: (vertical, horizontal) [B, D, H, W] -> the same (Figure 2 of the paper).

    `first`: mask A, which hides the pixel itself from the horizontal stack and its row from the vertical one,
    and no residual, which would show them again.
    """

    def __init__(self, dim: int, kernel: int, first: bool, classes: int, cond_channels: int) -> None:
        super().__init__()
        reach = kernel // 2 + 1
        mask: Mask = "A" if first else "B"
        self.residual = not first
        self.vertical = DownShiftedConv2d(dim, 2 * dim, (reach, kernel), mask=mask)
        self.horizontal = DownRightShiftedConv2d(dim, dim, (1, reach), mask=mask, gate="tanh")
        self.vertical_to_horizontal = nn.Conv2d(2 * dim, 2 * dim, 1)
        self.out = GatedConv2d(dim, dim, 1, gate="none")
        self.label = nn.Embedding(classes, 2 * dim) if classes else None
        self.cond = nn.Conv2d(cond_channels, 4 * dim, 1, bias=False) if cond_channels else None

    def forward(self, v: Tensor, h: Tensor, label: Tensor | None, cond: Tensor | None) -> tuple[Tensor, Tensor]:
        v_sum = self.vertical(v)  # not gated by the layer: the horizontal stack reads the sum itself
        h_shift = self.vertical_to_horizontal(v_sum)
        if self.label is not None:
            shift = self.label(label)[:, :, None, None]
            v_sum, h_shift = v_sum + shift, h_shift + shift
        if self.cond is not None:
            v_cond, h_cond = self.cond(cond).chunk(2, dim=1)
            v_sum, h_shift = v_sum + v_cond, h_shift + h_cond
        gated = self.horizontal(h, h_shift)
        return gate(v_sum, "tanh"), self.out(gated, residual=h if self.residual else None)


class GatedPixelCNN(ReferenceModel):
    """Gated PixelCNN over index images, optionally conditional on a class and on a spatial map.

    levels: values of a pixel. dim: features of each stack. layers: the first has kernel `first_kernel` and
    mask A, the others `kernel` and mask B. hidden: features of the 1x1 head. classes: number of labels, None
    without. cond_channels: channels of the spatial conditioning, 0 without. shape: (H, W) of one sample.

    forward(x, label?, cond?): x [B, H, W] int64 in [0, levels), label [B] int64, cond [B, cond_channels, H,
    W]; label and cond are taken only where the model has them. Returns logits [B, levels, H, W] of the pixel
    at each site. Raises ShapeError.
    """

    layout = "HW"

    def __init__(
        self,
        levels: int = 256,
        dim: int = 64,
        layers: int = 15,
        classes: int | None = 10,
        cond_channels: int = 0,
        shape: tuple[int, int] = (28, 28),
        first_kernel: int = 7,
        kernel: int = 3,
        hidden: int = 512,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = dict(
            model="gated-pixelcnn", levels=levels, dim=dim, layers=layers, classes=classes,
            cond_channels=cond_channels, shape=list(shape), first_kernel=first_kernel, kernel=kernel,
            hidden=hidden,
        )  # fmt: skip
        self.sample_shape = tuple(shape)
        self.head = Categorical(levels, encode="index")
        self.levels, self.classes, self.cond_channels = levels, classes or 0, cond_channels
        self.embed = nn.Embedding(levels, dim)
        self.layers = nn.ModuleList(
            GatedLayer(dim, first_kernel if i == 0 else kernel, i == 0, self.classes, cond_channels)
            for i in range(layers)
        )
        self.head_in = nn.Conv2d(dim, hidden, 1)
        self.head_out = nn.Conv2d(hidden, levels, 1)

    def example_cond(self, batch: int = 1) -> tuple[Tensor, ...]:
        """Conditioning inputs of the right shapes, all zero, on the model's device."""
        device = self.embed.weight.device
        cond: tuple[Tensor, ...] = ()
        if self.classes:
            cond += (torch.zeros(batch, dtype=torch.int64, device=device),)
        if self.cond_channels:
            cond += (torch.zeros(batch, self.cond_channels, *self.sample_shape, device=device),)
        return cond

    def forward(self, x: Tensor, *cond: Tensor) -> Tensor:
        label, maps = self._check(x, cond)
        v = h = self.embed(x).permute(0, 3, 1, 2)
        for layer in self.layers:
            v, h = layer(v, h, label, maps)
        logits: Tensor = self.head_out(F.relu(self.head_in(h)))
        return logits

    def _check(self, x: Tensor, cond: tuple[Tensor, ...]) -> tuple[Tensor | None, Tensor | None]:
        if x.dim() != 3 or x.dtype != torch.int64:
            raise ShapeError(f"GatedPixelCNN: x is {x.dtype} {list(x.shape)}, expected int64 [B, H, W]")
        expected: dict[str, tuple[int, ...]] = {"label": (x.shape[0],)} if self.classes else {}
        if self.cond_channels:
            expected["cond"] = (x.shape[0], self.cond_channels, *x.shape[1:])
        check_cond(self, cond, expected)
        label = cond[0] if self.classes else None
        return label, (cond[-1] if self.cond_channels else None)
