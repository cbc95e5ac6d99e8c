"""Likelihood of whole samples under a reference model, teacher-forced: one parallel forward."""

import math

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from fastgen.heads import Categorical
from fastgen.models.base import ReferenceModel


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


def nll(model: ReferenceModel, x: Tensor, cond: tuple[Tensor, ...] = ()) -> Tensor:
    """Negative log-likelihood in nats per sample, [B], of x [B, ...] (not delayed) given the conditioning."""
    target = values(model, x)
    sites = tuple(target.shape[1:-2])
    channels = target.shape[-1]
    params = model.head.arrange(model(delayed(model, x), *cond), channels, sites)
    log_prob = model.head.log_prob(params, target)
    return -log_prob.flatten(1).sum(dim=1)


def bits_per_dim(model: ReferenceModel, x: Tensor, cond: tuple[Tensor, ...] = ()) -> Tensor:
    """Negative log-likelihood in bits per value (pixel channel, audio sample), [B].

    A continuous head (levels=None) gives the bits of a density: add log2 of the number of steps per unit to
    compare with a discrete one, 15 for 16-bit audio in [-1, 1].
    """
    return nll(model, x, cond) / (math.log(2.0) * values(model, x[:1]).numel())
