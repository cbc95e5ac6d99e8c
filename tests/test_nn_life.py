"""The life of a layer after it was made: on the meta device, cast, assigned, hooked, pruned, normed; fused or not."""

# As users write: modules are not annotated in full.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.utils.prune as prune
from torch import Tensor, nn

from fastgen.nn import MaskedLinear, fuse_
from tests.test_nn import LAYERS

MASKED = [name for name in LAYERS if getattr(LAYERS[name][0](), "mask", None) is not None]


def filled_by_to_empty(layer: nn.Module) -> nn.Module:
    return layer.to_empty(device="cpu")


def filled_one_by_one(layer: nn.Module) -> nn.Module:
    """As loaders of large models do: each tensor is replaced in its module."""
    for module in layer.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                module._parameters[name] = nn.Parameter(torch.full_like(p, torch.nan, device="cpu"))
        for name, b in list(module._buffers.items()):
            if b is not None:
                module._buffers[name] = torch.full_like(b, torch.nan, device="cpu")
    return layer


@pytest.mark.parametrize("fill", [filled_by_to_empty, filled_one_by_one])
@pytest.mark.parametrize("name", LAYERS)
def test_made_on_the_meta_device(name: str, fill: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    make, shape, _ = LAYERS[name]
    ready, x = make(), torch.randn(shape)
    with torch.device("meta"):
        layer = make()
    layer = fill(layer)
    layer.load_state_dict(ready.state_dict())
    assert torch.equal(layer(x), ready(x))


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("change", ["to", "assign", "deepcopy", "pickle"])
def test_the_mask_follows_the_weight(name: str, change: str) -> None:
    make, shape, _ = LAYERS[name]
    torch.manual_seed(0)
    layer, x = make(), torch.randn(shape)
    wanted = copy.deepcopy(layer).double()
    if change == "to":
        layer = layer.double()
    elif change == "assign":
        layer.load_state_dict({k: v.double() for k, v in layer.state_dict().items()}, assign=True)
    elif change == "deepcopy":
        layer = copy.deepcopy(layer).double()
    else:
        layer = pickle.loads(pickle.dumps(layer)).double()
    assert torch.equal(layer(x.double()), wanted(x.double()))
    assert isinstance(layer.mask, Tensor) and layer.mask.dtype == torch.float64
    assert "mask" not in layer.state_dict() and not list(layer.buffers())


def test_a_mask_without_values() -> None:
    with torch.device("meta"):
        mask = torch.ones(4, 6)
    with pytest.raises(ValueError, match="mask is on the meta device"):
        MaskedLinear(6, 4, mask)


# ---- after fuse_ -------------------------------------------------------------------------------------------------
class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.pad, self.conv = nn.ZeroPad2d((1, 1, 2, 0)), nn.Conv2d(6, 12, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.conv(self.pad(x)).chunk(2, 1)
        return x + torch.tanh(a) * torch.sigmoid(b)


X = torch.linspace(-1, 1, 6 * 25).reshape(1, 6, 5, 5)
CHANGES: dict[str, Callable[[Any], object]] = {
    "old weight norm": lambda m: nn.utils.weight_norm(m.conv),
    "weight norm": lambda m: nn.utils.parametrizations.weight_norm(m.conv),
    "spectral norm": lambda m: nn.utils.parametrizations.spectral_norm(m.conv.eval()),
    "pruning": lambda m: prune.l1_unstructured(m.conv, "weight", 0.5),
    "a hook that changes the output": lambda m: m.conv.register_forward_hook(lambda _, args, out: out * 2),
    "a hook that changes the input": lambda m: m.conv.register_forward_pre_hook(lambda _, args: (args[0] * 2,)),
    "a hook on the pad": lambda m: m.pad.register_forward_hook(lambda _, args, out: out + 1),
    "another layer in its place": lambda m: setattr(m, "conv", nn.Sequential(m.conv, nn.Tanh())),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_after_fuse_is_heeded(change: str) -> None:
    fused, plain = Block(), Block()
    assert fuse_(fused, X).swapped
    wanted = plain(X)
    assert torch.allclose(fused(X), wanted, atol=1e-6)
    for model in (fused, plain):
        torch.manual_seed(1)  # spectral norm starts anywhere
        CHANGES[change](model)
        for name, p in model.named_parameters():  # as an optimiser does
            if name.endswith(("weight_g", "weight_orig", "original0")):
                p.data.mul_(3)
    assert torch.equal(fused(X), plain(X)), "its own forward runs"
    for model in (fused, plain):
        model.zero_grad()
        model(X).pow(2).sum().backward()
    for a, b in zip(fused.parameters(), plain.parameters(), strict=True):
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad)  # type: ignore[arg-type]


def test_a_backward_hook_after_fuse_is_called() -> None:
    model, seen = Block(), []
    fuse_(model, X)
    handle = model.conv.register_full_backward_hook(lambda *_: seen.append(1))
    model(X).sum().backward()
    assert seen == [1]
    handle.remove()
    model(X).sum().backward()
    assert seen == [1]
