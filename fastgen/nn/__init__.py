"""Layers of autoregressive networks over `fastgen.ops`: torch.nn's parameter names, one fused kernel a layer on a GPU.

`layer.kernel` says what a layer runs and why. `fuse_` puts the same kernels into a model that is written with torch.nn.
"""

from fastgen.nn.choice import use_kernels_
from fastgen.nn.conv1d import CausalConv1d, GatedResidual1d
from fastgen.nn.conv2d import DownRightShiftedConv2d, DownShiftedConv2d, GatedConv2d, MaskedConv2d
from fastgen.nn.fuse import FuseReport, Swap, fuse_
from fastgen.nn.linear import MaskedLinear
from fastgen.nn.transposed import DownRightShiftedConvTranspose2d, DownShiftedConvTranspose2d

__all__ = [
    "CausalConv1d", "DownRightShiftedConv2d", "DownRightShiftedConvTranspose2d", "DownShiftedConv2d",
    "DownShiftedConvTranspose2d", "FuseReport", "GatedConv2d", "GatedResidual1d", "MaskedConv2d", "MaskedLinear", "Swap",
    "fuse_", "use_kernels_",
]  # fmt: skip
