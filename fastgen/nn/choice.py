"""Which implementation a layer runs, a Triton kernel or plain torch, and why: decided once for its weights.

The answer follows from what the layer is and from `fastgen.ops.kernel_for` its weights' device and dtype; never from the
shape of an input. Plain torch is ordinary aten operations, so `fastgen.compile` plans through a layer on the CPU.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from fastgen.nn.constant import Constant
from fastgen.ops import KernelChoice, kernel_for

Wish = Literal["auto", "torch"]

_ASKED = KernelChoice("torch", "plain torch was asked for with use_kernels_")


class Deciding(nn.Module):
    """A module that knows its kernel: decided when it is made, and again when its weights move or change dtype."""

    _fastgen_wish: Wish = "auto"
    _fastgen_kernel: KernelChoice

    def _fastgen_decide(self) -> None:
        """Chooses the kernel for the weights as they are now. Called by whatever changes their device or dtype."""
        weight = next(self.parameters(), None)
        self._fastgen_kernel = (
            _ASKED if self._fastgen_wish == "torch" or weight is None else self._fastgen_choice(weight)
        )

    def _fastgen_choice(self, weight: Tensor) -> KernelChoice:
        return kernel_for(weight.device, weight.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._fastgen_decide()
        return self


def decide_again(module: nn.Module, incompatible: Any = None) -> None:
    """After load_state_dict(assign=True) the weights may be of another device or dtype."""
    if isinstance(module, Deciding):
        module._fastgen_decide()


class Layer(Deciding):
    """What every layer of fastgen.nn has: `kernel`."""

    _mask: Constant | None = None

    def _fastgen_decide(self) -> None:
        super()._fastgen_decide()
        if self._mask is not None:
            self._mask.like(next(self.parameters()))  # made now rather than in the middle of something

    def _finish(self) -> None:
        """The end of every constructor."""
        self.register_load_state_dict_post_hook(decide_again)  # type: ignore[no-untyped-call]
        self._fastgen_decide()

    @property
    def kernel(self) -> KernelChoice:
        """The implementation that runs, "triton" or "torch", and the reason; `use_kernels_` can ask for plain torch."""
        return self._fastgen_kernel


def use_kernels_(model: nn.Module, wish: Wish) -> nn.Module:
    """Let every fastgen layer in `model` choose its kernel ("auto"), or run plain torch ("torch"). In place.

    Modules rewritten by `fuse_` count as layers. Returns the model. Raises ValueError for another word.
    """
    if wish not in ("auto", "torch"):
        raise ValueError(f"use_kernels_: {wish!r}, expected 'auto' or 'torch'")
    for module in model.modules():
        if isinstance(module, Deciding):
            module._fastgen_wish = wish
            module._fastgen_decide()
    return model
