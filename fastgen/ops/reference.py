"""The operations as plain torch composites: specification of the kernels, any device and dtype, any number of gradients.

Letters: B batch, C gated channels, T time; a, b the two halves of the 2C channels in front of a gate.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.heads.choice import pick
from fastgen.heads.logistic_mixture import LogisticMixture
from fastgen.rng import uniforms


def concat_elu(x: Tensor) -> Tensor:
    """ELU of x and of -x side by side (Shang et al. 2016). [B, C, ...] -> [B, 2C, ...]."""
    return F.elu(torch.cat((x, -x), dim=1))


def gated(pre: Tensor, gate: str) -> Tensor:
    """[B, 2C, ...] -> [B, C, ...]: "tanh" tanh(a) sigmoid(b), "linear" a sigmoid(b); "none": pre itself."""
    if gate == "none":
        return pre
    a, b = pre.chunk(2, dim=1)
    return (torch.tanh(a) if gate == "tanh" else a) * torch.sigmoid(b)


def pre_activation(
    x: Tensor, weight: Tensor, bias: Tensor | None, cond: Tensor | None, geometry: Sequence[int], elu: bool,
) -> Tensor:  # fmt: skip
    """What stands in front of the gate: convolution, bias and conditioning. geometry: pads, stride, dilation."""
    x = concat_elu(x) if elu else x
    if any(geometry[:4]):
        x = F.pad(x, tuple(geometry[:4]))
    pre = F.conv2d(x, weight, bias, tuple(geometry[4:6]), 0, tuple(geometry[6:8]))
    return pre if cond is None else pre + cond


def gated_conv2d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    cond: Tensor | None = None,
    residual: Tensor | None = None,
    pads: Sequence[int] = (0, 0, 0, 0),
    stride: Sequence[int] = (1, 1),
    dilation: Sequence[int] = (1, 1),
    gate: str = "tanh",
    elu: bool = False,
) -> Tensor:
    """`fastgen.ops.gated_conv2d` of plain torch operations; nothing is checked."""
    y = gated(pre_activation(x, weight, bias, cond, (*pads, *stride, *dilation), elu), gate)
    return y if residual is None else residual + y


def gated_conv1d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    cond: Tensor | None = None,
    dilation: int = 1,
    gate: str = "tanh",
) -> Tensor:
    """`fastgen.ops.gated_conv1d` of plain torch operations; nothing is checked."""
    pre = F.conv1d(F.pad(x, ((weight.shape[2] - 1) * dilation, 0)), weight, bias, dilation=dilation)
    return gated(pre if cond is None else pre + cond, gate)


def wavenet_layer_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    *,
    cond: Tensor | None = None,
    dilation: int = 1,
    residual_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`fastgen.ops.wavenet_layer` of plain torch operations; nothing is checked."""
    h = gated_conv1d_reference(x, weight, bias, cond=cond, dilation=dilation)
    z = F.conv1d(h, out_weight[..., None] if out_weight.dim() == 2 else out_weight, out_bias)
    return (x + z[:, : x.shape[1]]) * residual_scale, z[:, x.shape[1] :]


def linear_elu_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gate: str = "none",
    elu: bool = True,
    residual: Tensor | None = None,
) -> Tensor:
    """`fastgen.ops.linear_elu` of plain torch operations; nothing is checked."""
    y = gated(F.linear(concat_elu(x) if elu else x, weight, bias), gate)
    return y if residual is None else residual + y


def logistic_mixture_log_prob_reference(
    params: Tensor, x: Tensor, *, levels: int | None = 256, floor: float = -7.0
) -> Tensor:
    """`fastgen.ops.logistic_mixture_log_prob` by `fastgen.heads.LogisticMixture`."""
    params = params if params.dtype == torch.float64 else params.float()
    n_mix = params.shape[-1] // (10 if x.shape[-1] == 3 else 3)
    return LogisticMixture(n_mix, levels, log_scale_floor=floor).log_prob(params, x)


def _noise(params: Tensor, seed: int, first: int, step: int, count: int) -> Tensor:
    """The uniforms of params [n, P], or of [n, S, P] at steps step .. step + S - 1."""
    samples = torch.arange(first, first + params.shape[0], device=params.device)
    steps = step if params.dim() == 2 else torch.arange(step, step + params.shape[1], device=params.device)
    return uniforms(seed, samples, steps, count)


def draw_logistic_mixture_reference(
    params: Tensor, seed: int, first: int = 0, step: int = 0, temperature: float = 1.0, *,
    channels: int, levels: int | None = 256, floor: float = -7.0,
) -> Tensor:  # fmt: skip
    """`fastgen.ops.draw_logistic_mixture` by `fastgen.heads.LogisticMixture` and `fastgen.rng.uniforms`."""
    head = LogisticMixture(params.shape[-1] // (10 if channels == 3 else 3), levels, log_scale_floor=floor)
    return head.draw(params, _noise(params, seed, first, step, 1 + channels), temperature)


def draw_categorical_reference(
    logits: Tensor, seed: int, first: int = 0, step: int = 0, temperature: float = 1.0
) -> Tensor:
    """`fastgen.ops.draw_categorical` by `fastgen.heads.pick` and `fastgen.rng.uniforms`."""
    return pick(logits.double(), _noise(logits, seed, first, step, 1)[..., 0], temperature)
