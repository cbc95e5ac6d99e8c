"""Masked linear layers, as in MADE (Germain et al. 2015)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastgen.errors import ShapeError
from fastgen.nn import run
from fastgen.nn.choice import Layer
from fastgen.nn.constant import Constant
from fastgen.nn.run import Gate
from fastgen.ops import KernelChoice
from fastgen.ops.checks import GATES

_PRODUCT = KernelChoice("torch", "without concat_elu and gate the layer is one matrix product, which torch has")


class MaskedLinear(Layer, nn.Linear):
    """residual + gate((weight * mask) act(x) + bias) over the last axis: `fastgen.ops.linear_elu` with weights.

    mask: [out_features, in_features], what a weight is multiplied by in every forward (eq. 8, 9); it is no part
    of the state_dict. With a gate ("tanh", "linear") the weight and a mask of out_features rows are doubled, the
    halves a and b; with elu, act is concat_elu and the columns are doubled. Weight and bias are those of
    nn.Linear of these sizes.

    forward(x, residual?): x [..., in_features], residual [..., out_features] -> [..., out_features]. Raises
    ShapeError; the constructor ValueError and ShapeError.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        mask: Tensor,
        *,
        bias: bool = True,
        gate: Gate = "none",
        elu: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if gate not in GATES:
            raise ValueError(f"MaskedLinear: gate={gate!r}, expected one of {', '.join(map(repr, GATES))}")
        if tuple(mask.shape) != (out_features, in_features):
            raise ShapeError(f"MaskedLinear: mask is {list(mask.shape)}, expected {[out_features, in_features]}")
        rows, cols = 1 if gate == "none" else 2, 2 if elu else 1
        super().__init__(in_features * cols, out_features * rows, bias=bias, device=device, dtype=dtype)
        self.gate: Gate = gate
        self.elu = elu
        if mask.is_meta:
            raise ValueError(
                "MaskedLinear: mask is on the meta device, where it has no values; make it with device='cpu'"
            )
        self._mask = Constant(mask.repeat(rows, cols))
        self._finish()

    def _fastgen_choice(self, weight: Tensor) -> KernelChoice:
        return _PRODUCT if self.gate == "none" and not self.elu else super()._fastgen_choice(weight)

    @property
    def mask(self) -> Tensor:
        """What the weight is multiplied by, on its device and of its dtype."""
        assert self._mask is not None
        return self._mask.like(self.weight)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return run.linear(
            self._fastgen_kernel, "MaskedLinear", x, self.weight * self.mask, self.bias, gate=self.gate, elu=self.elu,
            residual=residual,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return super().extra_repr() + f", gate={self.gate}" + (", elu" if self.elu else "")
