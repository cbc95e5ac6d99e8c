"""Likelihood of whole samples under a reference model, teacher-forced: one parallel forward."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from fastgen.heads import Categorical, Head, LogisticMixture
from fastgen.models.base import ReferenceModel
from fastgen.ops import kernel_for, logistic_mixture_log_prob


def values(model: ReferenceModel, x: Tensor) -> Tensor:
    """Forward's input x as the values its head draws: [B, *sites, phases, V].

    Image [B, C, H, W] of a head that draws a pixel at once -> [B, H, W, 1, C]; indices [B, H, W] -> [B, H, W,
    1, 1]; sequence [B, 1, T] -> [B, T, 1, 1]; one-hot [B, n, T] -> class indices [B, T, 1, 1].
    """
    if model.layout == "HW":
        return x[..., None, None]
    if model.layout == "CT" and isinstance(model.head, Categorical):
        return x.argmax(dim=1)[..., None, None]
    return x.movedim(1, -1).unsqueeze(-2)


def delayed(model: ReferenceModel, x: Tensor) -> Tensor:
    """What forward is fed to predict x: x itself, or for predicts="next" x behind `start`, less its end."""
    if model.predicts == "same":
        return x
    assert model.start is not None
    start = torch.full_like(x[:, :1, :1], model.start)
    if isinstance(model.head, Categorical):
        start = one_hot(start[:, 0].long(), model.head.n).transpose(1, 2).to(x)
    return torch.cat((start, x[:, :, :-1]), dim=2)


def log_prob(head: Head, params: Tensor, value: Tensor) -> Tensor:
    """`head.log_prob` in float32 at least: mixtures of logistics by `fastgen.ops` where that has a kernel for params."""
    if isinstance(head, LogisticMixture) and kernel_for(params.device, params.dtype).name == "triton":
        return logistic_mixture_log_prob(params, value, levels=head.levels, floor=head.log_scale_floor)
    return head.log_prob(params.to(torch.promote_types(params.dtype, torch.float32)), value)


def nll(
    model: ReferenceModel,
    x: Tensor,
    cond: tuple[Tensor, ...] = (),
    forward: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Negative log-likelihood in nats per sample, [B], of x [B, ...] (not delayed) given the conditioning.

    forward: what is called in the place of model, if that has been wrapped: DistributedDataParallel's or
    torch.compile's module. Under autocast the parameters may be 16-bit; their likelihood is float32.
    """
    target = values(model, x)
    sites = tuple(target.shape[1:-2])
    channels = target.shape[-1]
    params = (model if forward is None else forward)(delayed(model, x), *cond)
    params = model.head.parameters_of(params, channels, sites)
    return -log_prob(model.head, params, target).flatten(1).sum(dim=1)


def bits_per_dim(
    model: ReferenceModel,
    x: Tensor,
    cond: tuple[Tensor, ...] = (),
    forward: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Negative log-likelihood in bits per value (pixel channel, audio sample), [B]; arguments as `nll`.

    A continuous head (levels=None) gives the bits of a density: add log2 of the number of steps per unit to
    compare with a discrete one, 15 for 16-bit audio in [-1, 1].
    """
    return nll(model, x, cond, forward) / (math.log(2.0) * values(model, x[:1]).numel())
