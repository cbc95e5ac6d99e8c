"""The choice of a class: by inverse CDF of a softmax; how far two choices are apart; and errors of scales."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def pick(logits: Tensor, u: Tensor, temperature: float) -> Tensor:
    """Inverse CDF of a softmax: the first k with cumsum_k > u * total. [..., n], [...] -> int64 [...]."""
    weights = torch.exp((logits - logits.amax(-1, keepdim=True)) / temperature)
    cumulative = weights.cumsum(-1)
    beyond = cumulative > u[..., None] * cumulative[..., -1:]
    return (~beyond).sum(-1).clamp(max=logits.shape[-1] - 1)


def unequal(a: Tensor, b: Tensor) -> Tensor:
    """The measure of the uniforms from which `pick` takes another class of logits b than of a [..., n]: [...]."""
    below, above = (pad(x.softmax(-1).cumsum(-1), (1, 0)) for x in (a, b))
    common = torch.minimum(below[..., 1:], above[..., 1:]) - torch.maximum(below[..., :-1], above[..., :-1])
    return (1 - common.clamp(min=0).sum(-1)).clamp(min=0)


def variation(a: Tensor, b: Tensor) -> Tensor:
    """Total variation between the softmaxes of logits [..., n]: [...]."""
    return 0.5 * (a.softmax(-1) - b.softmax(-1)).abs().sum(-1)


def possible(logits: Tensor) -> Tensor:
    """Whether logits [..., n] are those of a distribution, none NaN or +inf and some finite: bool [...]."""
    return logits.amax(-1).isfinite()


def pickable(logits: Tensor, error: Tensor, u: Tensor, temperature: float) -> Tensor:
    """Classes that `pick` gives for some logits within `error` of these: bool [..., n]."""
    z, e = logits / temperature, error / temperature
    top = (z + e).amax(-1, keepdim=True)
    most, least = torch.exp(z + e - top), torch.exp(z - e - top)
    below = pad(least.cumsum(-1), (1, -1))  # the least mass in front of each class
    above = pad(least.flip(-1).cumsum(-1), (1, -1)).flip(-1)
    first = below / (below + most.flip(-1).cumsum(-1).flip(-1))  # the smallest CDF in front of it
    last = most.cumsum(-1)
    last = last / (last + above)  # the largest CDF up to it
    return (first <= u[..., None]) & (u[..., None] < last) & (most > 0)


def scale_error(log_scales: Tensor, error: Tensor, floor: float) -> Tensor:
    """By which part of itself exp(log_scales), bounded below, may be off where log_scales are by so much."""
    base = log_scales.clamp(min=floor)
    more, less = ((log_scales + e).clamp(min=floor) - base for e in (error, -error))
    return torch.maximum(torch.expm1(more), -torch.expm1(less))
