"""How near a kernel must be to float64: shared by Triton's interpreter (kernel_checks.py), a GPU (tests/gpu/test_kernels.py)
and the benchmark of the layers, which times nothing that is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgen import heads, ops, rng
from tests.kernel_shapes import Layer, Tensors


# ---- layers ------------------------------------------------------------------------------------------------
def errors(
    layer: Layer, dtype: torch.dtype, device: str, batch: int = 2, channels_last: bool = True
) -> dict[str, float]:
    """Largest error of the result and of each gradient, of the largest value, against float64 on the same numbers."""
    torch.manual_seed(0)
    tensors = layer.tensors(batch, dtype, device, channels_last)
    exact = {k: v.detach().double().requires_grad_() for k, v in tensors.items()}
    y, wanted = layer.run(tensors, fused=True), layer.run(exact, fused=False)
    seed = torch.randn_like(y)
    found, truth = gradients(y, tensors, seed), gradients(wanted, exact, seed.double())
    pairs = {"y": (y.detach(), wanted.detach())} | dict(zip(tensors, zip(found, truth, strict=True), strict=True))
    return {k: float(((a.double() - b).abs().max() / b.abs().max()).item()) for k, (a, b) in pairs.items()}


def allowed(dtype: torch.dtype) -> float:
    """Four roundings on the way, and a random walk over some thousand terms in float32."""
    return 4 * torch.finfo(dtype).eps + 64 * torch.finfo(torch.float32).eps


def gradients(y: Tensor, tensors: Tensors, seed: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, list(tensors.values()), seed)


def check_layer(layer: Layer, dtype: torch.dtype, device: str, channels_last: bool = True) -> dict[str, float]:
    """The layer's errors, none of which may be more than allowed."""
    found = errors(layer, dtype, device, channels_last=channels_last)
    wrong = {k: e for k, e in found.items() if not e <= allowed(dtype)}
    assert not wrong, f"{layer.name} {dtype}: {wrong}, allowed {allowed(dtype):.2g}"
    return found


def check_whole_graph(layer: Layer, device: str, backend: str = "inductor") -> None:
    """torch.compile takes forward and backward without a break, and changes no number but by a rounding."""
    torch.manual_seed(0)
    tensors = layer.tensors(1, torch.float32, device)
    fast = torch.compile(lambda t: layer.run(t, fused=True) * 2, fullgraph=True, backend=backend)
    y, expected = fast(tensors), layer.run(tensors, fused=True) * 2
    seed = torch.randn_like(expected)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients(y, tensors, seed), gradients(expected, tensors, seed))


# ---- mixtures of logistics ---------------------------------------------------------------------------------
def mixture_case(
    lead: Sequence[int], channels: int, mixtures: int, levels: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    params = torch.randn(*lead, mixtures * (3 if channels == 1 else 10)) * scale
    x = torch.rand(*lead, channels) * 2.2 - 1.1  # a tenth at either end
    x = x.clamp(-1, 1)
    if levels is not None:
        x = ((x + 1) * (levels - 1) / 2).round() / ((levels - 1) / 2) - 1
    return params, x


def check_log_prob(params: Tensor, x: Tensor, levels: int | None, floor: float) -> None:
    """Values to a few rounding steps of the largest term; gradients to the same of the largest derivative."""
    params.requires_grad_()
    exact = params.detach().double().requires_grad_()
    y = ops.logistic_mixture_log_prob(params, x, levels=levels, floor=floor)
    expected = ops.logistic_mixture_log_prob_reference(exact, x.double(), levels=levels, floor=floor)
    assert y.dtype == torch.float32
    assert y.shape == x.shape[:-1]
    if not y.numel():
        return
    eps = torch.finfo(torch.float32).eps
    terms = 1 + float(expected.detach().abs().max()) + float(exact.detach().nan_to_num(neginf=0).abs().max())
    assert float((y - expected).detach().abs().max()) <= 8 * eps * terms
    seed = torch.randn(y.shape, device=y.device)
    (found,) = torch.autograd.grad(y, params, seed)
    (wanted,) = torch.autograd.grad(expected, exact, seed.double())
    assert found.stride() == params.stride() or not params.is_contiguous()
    # A posterior is exp of a difference of terms, so its relative error is that of the terms.
    allowed = (1 + float(wanted.abs().max())) * (16 * eps * terms + 2 * torch.finfo(params.dtype).eps)
    assert float((found - wanted).abs().max()) <= allowed


# ---- draws -------------------------------------------------------------------------------------------------
def check_draws(found: Tensor, wanted: Tensor, head: heads.Head, params: Tensor, args: tuple[Any, ...]) -> None:
    """Equal, or a near tie of the head; and near ties are rare."""
    seed, first, step, temperature = args
    samples = torch.arange(first, first + params.shape[0])
    steps = step if params.dim() == 2 else torch.arange(step, step + params.shape[1])
    u = rng.uniforms(seed, samples, steps, head.num_uniforms(found.shape[-1]))
    differ = (found != wanted).any(-1)
    assert bool((~differ | head.near_tie(params, params, u, found, temperature)).all())
    assert int(differ.sum()) <= (0 if head.discrete or head.grid_levels else 0.01 * differ.numel())


def check_mixture_draws(
    lead: Sequence[int], mixtures: int, channels: int, levels: int | None, dtype: torch.dtype, device: str
) -> None:
    """What a device draws against the reference on the CPU, from the same numbers."""
    params = (torch.randn(*lead, mixtures * (3 if channels == 1 else 10)) * 2).to(dtype)
    args = (2**63 + 1, 2**32 - 3, 7, 0.7)
    found = ops.draw_logistic_mixture(params.to(device), *args, channels=channels, levels=levels).cpu()
    wanted = ops.draw_logistic_mixture_reference(params, *args, channels=channels, levels=levels)
    check_draws(found, wanted, heads.LogisticMixture(mixtures, levels), params, args)


def check_class_draws(lead: Sequence[int], classes: int, dtype: torch.dtype, device: str) -> None:
    logits = (torch.randn(*lead, classes) * 3).to(dtype)
    args = (2**63 + 1, 2**32 - 3, 7, 0.7)
    found = ops.draw_categorical(logits.to(device), *args).cpu()
    wanted = ops.draw_categorical_reference(logits, *args)
    check_draws(found[..., None], wanted[..., None], heads.Categorical(classes), logits, args)
