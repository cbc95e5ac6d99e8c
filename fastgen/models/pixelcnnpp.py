"""PixelCNN++: Salimans et al. 2017, "PixelCNN++: Improving the PixelCNN with Discretized Logistic Mixture
Likelihood".

The layer layout is that of the authors' code (openai/pixel-cnn), so trained weights of its PyTorch port fit:
see `convert_pclucas14`. Two streams: the *vertical* one (`u`) sees the rows above, the *horizontal* one
(`ul`) also the pixels to the left. Convolutions are causal by shifting: padded above and at the sides, or
above and to the left.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from fastgen.errors import CheckpointError, ShapeError
from fastgen.heads import LogisticMixture
from fastgen.models.base import ReferenceModel, check_cond
from fastgen.nn import (
    DownRightShiftedConv2d,
    DownRightShiftedConvTranspose2d,
    DownShiftedConv2d,
    DownShiftedConvTranspose2d,
    GatedConv2d,
)
from fastgen.ops import concat_elu


class ShiftedConv2d(nn.Module):
    """Weight-normalised convolution that reads only above (`vertical`) or above and to the left.

    `fastgen.nn.DownShiftedConv2d` or `DownRightShiftedConv2d`, with their options: a gate, concat_elu in front.
    """

    def __init__(self, cin: int, cout: int, kernel: tuple[int, int], vertical: bool, **options: Any) -> None:
        super().__init__()
        kind = DownShiftedConv2d if vertical else DownRightShiftedConv2d
        self.conv = weight_norm(kind(cin, cout, kernel, **options))

    def forward(
        self, x: Tensor, cond: Tensor | None = None, residual: Tensor | None = None, activated: bool = False
    ) -> Tensor:
        y: Tensor = self.conv(x, cond, residual, activated=activated)
        return y


class ShiftedUpsample2d(nn.Module):
    """Weight-normalised transposed convolution of stride 2 whose output reads nothing below (or right of) it.

    [B, D, H, W] -> [B, D, 2H, 2W]. vertical: kernel (2, 3), else (2, 2).
    """

    def __init__(self, dim: int, vertical: bool) -> None:
        super().__init__()
        kind = DownShiftedConvTranspose2d if vertical else DownRightShiftedConvTranspose2d
        self.conv = weight_norm(kind(dim, dim, (2, 3) if vertical else (2, 2), stride=2))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y


class GatedResnet(nn.Module):
    """Gated residual block: x + a * sigmoid(b) (the authors' `gated_resnet`).

    dim: features. skip: channels of the second input, 0 without one. Shapes: x [B, D, H, W], other [B, skip,
    H, W], label [B] -> [B, D, H, W].
    """

    def __init__(self, dim: int, vertical: bool, skip: int, dropout: float, classes: int) -> None:
        super().__init__()
        kernel = (2, 3) if vertical else (2, 2)
        self.conv_in = ShiftedConv2d(dim, dim, kernel, vertical, elu=True)
        self.skip = weight_norm(GatedConv2d(skip, dim, 1, gate="none", elu=True)) if skip else None
        self.dropout = nn.Dropout(dropout)
        self.conv_out = ShiftedConv2d(dim, dim, kernel, vertical, elu=True, gate="linear")
        self.label = nn.Embedding(classes, 2 * dim) if classes else None

    def forward(self, x: Tensor, other: Tensor | None, label: Tensor | None) -> Tensor:
        skip = self.skip(other) if self.skip is not None and other is not None else None
        shift = self.label(label)[:, :, None, None] if self.label is not None else None
        y = self.conv_in(x, residual=skip)
        dropped = self.training and self.dropout.p > 0.0
        if dropped:  # it falls on concat_elu's result, which a fused layer never makes
            y = self.dropout(concat_elu(y))
        out: Tensor = self.conv_out(y, shift, x, activated=dropped)
        return out


class Level(nn.Module):
    """The blocks of one resolution, on the way in (`outward` False) or on the way out.

    On the way in, block outputs are pushed on the two stacks of features; on the way out they are popped and
    enter as skip connections.
    """

    def __init__(self, blocks: int, dim: int, outward: bool, dropout: float, classes: int) -> None:
        super().__init__()
        skips = (dim, 2 * dim) if outward else (0, dim)
        self.outward = outward
        self.vertical = nn.ModuleList(GatedResnet(dim, True, skips[0], dropout, classes) for _ in range(blocks))
        self.horizontal = nn.ModuleList(GatedResnet(dim, False, skips[1], dropout, classes) for _ in range(blocks))

    def forward(
        self, u: Tensor, ul: Tensor, us: list[Tensor], uls: list[Tensor], label: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        for vertical, horizontal in zip(self.vertical, self.horizontal, strict=True):
            if self.outward:
                u = vertical(u, us.pop(), label)
                ul = horizontal(ul, torch.cat((u, uls.pop()), dim=1), label)
            else:
                u = vertical(u, None, label)
                ul = horizontal(ul, u, label)
                us.append(u)
                uls.append(ul)
        return u, ul


class PixelCNNpp(ReferenceModel):
    """PixelCNN++ over images in [-1, 1].

    nr_resnet: blocks per resolution. nr_filters: features of each stream. nr_mix: logistic mixture
    components. shape: (C, H, W) of one sample, C 1 or 3, H and W divisible by 4. dropout: its probability in
    training. classes: number of labels, None without; a label shifts the gate of every block, as in the
    authors' code.

    forward(x, label?): x [B, C, H, W] float, label [B] int64 if the model has classes. Returns mixture
    parameters [B, P, H, W] of the pixel at each site: P = 10 nr_mix with 3 channels, 3 nr_mix with one
    (`LogisticMixture`). Raises ShapeError.
    """

    layout = "CHW"

    def __init__(
        self,
        nr_resnet: int = 5,
        nr_filters: int = 160,
        nr_mix: int = 10,
        shape: tuple[int, int, int] = (3, 32, 32),
        dropout: float = 0.5,
        classes: int | None = None,
    ) -> None:
        super().__init__()
        channels, rows, cols = shape
        if channels not in (1, 3) or rows % 4 or cols % 4:
            raise ShapeError(f"PixelCNNpp: shape {tuple(shape)}, expected 1 or 3 channels, H and W divisible by 4")
        self.config: dict[str, Any] = dict(
            model="pixelcnnpp", nr_resnet=nr_resnet, nr_filters=nr_filters, nr_mix=nr_mix, shape=list(shape),
            dropout=dropout, classes=classes,
        )  # fmt: skip
        self.sample_shape = tuple(shape)
        self.head = LogisticMixture(nr_mix)
        self.classes = classes or 0
        dim, n = nr_filters, self.classes
        self.first_vertical = ShiftedConv2d(channels + 1, dim, (2, 3), True)
        self.first_above = ShiftedConv2d(channels + 1, dim, (1, 3), True)
        self.first_left = ShiftedConv2d(channels + 1, dim, (2, 1), False)
        self.inward = nn.ModuleList(Level(nr_resnet, dim, False, dropout, n) for _ in range(3))
        self.outward = nn.ModuleList(Level(nr_resnet + (i > 0), dim, True, dropout, n) for i in range(3))
        self.halve_vertical = nn.ModuleList(ShiftedConv2d(dim, dim, (2, 3), True, stride=2) for _ in range(2))
        self.halve_horizontal = nn.ModuleList(ShiftedConv2d(dim, dim, (2, 2), False, stride=2) for _ in range(2))
        self.double_vertical = nn.ModuleList(ShiftedUpsample2d(dim, True) for _ in range(2))
        self.double_horizontal = nn.ModuleList(ShiftedUpsample2d(dim, False) for _ in range(2))
        self.params = weight_norm(nn.Conv2d(dim, self.head.num_params(channels), 1))

    def example_cond(self, batch: int = 1) -> tuple[Tensor, ...]:
        """Conditioning inputs of the right shapes, all zero, on the model's device."""
        device = next(self.parameters()).device
        return (torch.zeros(batch, dtype=torch.int64, device=device),) if self.classes else ()

    def forward(self, x: Tensor, *cond: Tensor) -> Tensor:
        label = self._check(x, cond)
        # The ones channel tells the image from the zeros around it (authors' code).
        x = torch.cat((x, torch.ones_like(x[:, :1])), dim=1)
        u = self._down(self.first_vertical(x))
        ul = self._down(self.first_above(x)) + self._right(self.first_left(x))
        us, uls = [u], [ul]
        for i, level in enumerate(self.inward):
            u, ul = level(u, ul, us, uls, label)
            if i < 2:
                u, ul = self.halve_vertical[i](u), self.halve_horizontal[i](ul)
                us.append(u)
                uls.append(ul)
        us.pop()
        uls.pop()
        for i, level in enumerate(self.outward):
            u, ul = level(u, ul, us, uls, label)
            if i < 2:
                u, ul = self.double_vertical[i](u), self.double_horizontal[i](ul)
        params: Tensor = self.params(F.elu(ul))
        return params

    @staticmethod
    def _down(x: Tensor) -> Tensor:
        """The image one row lower, zeros in the first row."""
        return F.pad(x[:, :, :-1], (0, 0, 1, 0))

    @staticmethod
    def _right(x: Tensor) -> Tensor:
        """The image one column further right, zeros in the first column."""
        return F.pad(x[:, :, :, :-1], (1, 0, 0, 0))

    def _check(self, x: Tensor, cond: tuple[Tensor, ...]) -> Tensor | None:
        channels = self.sample_shape[0]
        if x.dim() != 4 or x.shape[1] != channels or x.shape[2] % 4 or x.shape[3] % 4:
            raise ShapeError(
                f"PixelCNNpp: x is {list(x.shape)}, expected [B, {channels}, H, W], H and W divisible by 4"
            )
        check_cond(self, cond, {"label": (x.shape[0],)} if self.classes else {})
        return cond[0] if self.classes else None


# Names of the PyTorch port (left) and ours. A `nin` there is a Linear over channels, here a 1x1 convolution.
_RENAMES = (
    (r"^module\.", ""),
    (r"^u_init\.conv\.", "first_vertical.conv."),
    (r"^ul_init\.0\.conv\.", "first_above.conv."),
    (r"^ul_init\.1\.conv\.", "first_left.conv."),
    (r"^up_layers\.", "inward."),
    (r"^down_layers\.", "outward."),
    (r"^downsize_u_stream\.", "halve_vertical."),
    (r"^downsize_ul_stream\.", "halve_horizontal."),
    (r"^upsize_u_stream\.(\d)\.deconv\.", r"double_vertical.\1.conv."),
    (r"^upsize_ul_stream\.(\d)\.deconv\.", r"double_horizontal.\1.conv."),
    (r"\.u_stream\.", ".vertical."),
    (r"\.ul_stream\.", ".horizontal."),
    (r"\.conv_input\.", ".conv_in."),
    (r"\.nin_skip\.lin_a\.", ".skip."),
    (r"^nin_out\.lin_a\.", "params."),
    (r"(\.|^)(weight_g|parametrizations\.weight\.original0)$", r"\1parametrizations.weight.original0"),
    (r"(\.|^)(weight_v|parametrizations\.weight\.original1)$", r"\1parametrizations.weight.original1"),
)


def convert_pclucas14(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state_dict of pclucas14/pixel-cnn-pp under this module's names, for `PixelCNNpp.load_state_dict`.

    up_layers.i.u_stream.j -> inward.i.vertical.j, ul_stream -> horizontal, down_layers -> outward, conv_input
    -> conv_in, nin_skip.lin_a -> skip, nin_out.lin_a -> params, u_init -> first_vertical, ul_init.0/1 ->
    first_above/ first_left, downsize_* -> halve_*, upsize_* -> double_*. Linear weights [out, in] become
    [out, in, 1, 1]. Both weight-norm spellings (weight_g/weight_v and parametrizations) and fused weights are
    taken, with or without a "module." prefix. Raises CheckpointError if two names become one.
    """
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        renamed = name
        for pattern, replacement in _RENAMES:
            renamed = re.sub(pattern, replacement, renamed)
        entries = {renamed: tensor}
        if renamed.endswith(".weight"):  # fused: magnitude and direction are recovered from the product
            stem = renamed.removesuffix("weight") + "parametrizations.weight.original"
            norm = tensor.flatten(1).norm(dim=1).reshape(-1, *[1] * (tensor.dim() - 1))
            entries = {stem + "0": norm, stem + "1": tensor}
        for key, value in entries.items():
            if key in out:
                raise CheckpointError(f"convert_pclucas14: two tensors for {key}, the second is {name}")
            out[key] = value if ".bias" in key or value.dim() == 4 else value[:, :, None, None]
    return out
