"""Constants of layers: made from geometry, not trained, in no state_dict."""

from __future__ import annotations

import torch
from torch import Tensor


class Constant:
    """A tensor that a layer multiplies into its weight, wherever that is and whatever its type.

    It is no buffer: those that are in no state_dict hold whatever lay in memory after a module was made on the meta device
    (FSDP, from_pretrained of large models), and keep their type where weights are cast or assigned.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values.detach().to("cpu", torch.float32)
        self._fastgen_made: Tensor | None = None  # as it was asked for last

    def like(self, weight: Tensor) -> Tensor:
        """The constant on the device and of the dtype of a weight."""
        if self.values.device == weight.device and self.values.dtype == weight.dtype:
            return self.values
        made = self._fastgen_made
        if made is None or made.device != weight.device or made.dtype != weight.dtype:
            with torch.inference_mode(False):
                made = self.values.to(weight.device, weight.dtype)
            if type(made) is Tensor and not torch.compiler.is_compiling():
                self._fastgen_made = made
        return made
