"""Training and sampling operations: fused kernels on NVIDIA GPUs, plain torch elsewhere, the same function names.

Every operation checks its arguments once and calls a torch custom op (`torch.ops.fastgen.*`) with a fake kernel and
autograd, so it composes with autocast, `torch.compile`, checkpointing and data-parallel training. Which
implementation a device and dtype get is `kernel_for(device, dtype)`, decided by nothing else. Each has a twin
`*_reference` of plain torch operations: its specification. Gradients of gradients are not supported by the custom ops;
the references have them.
"""

from fastgen.ops.conv import gated_conv1d, gated_conv2d, wavenet_layer
from fastgen.ops.dispatch import KernelChoice, kernel_for
from fastgen.ops.draw import draw_categorical, draw_logistic_mixture
from fastgen.ops.linear import linear_elu
from fastgen.ops.mixture import logistic_mixture_log_prob
from fastgen.ops.reference import (
    concat_elu,
    draw_categorical_reference,
    draw_logistic_mixture_reference,
    gated_conv1d_reference,
    gated_conv2d_reference,
    linear_elu_reference,
    logistic_mixture_log_prob_reference,
    wavenet_layer_reference,
)

__all__ = [
    "KernelChoice", "concat_elu", "draw_categorical", "draw_categorical_reference", "draw_logistic_mixture",
    "draw_logistic_mixture_reference", "gated_conv1d", "gated_conv1d_reference", "gated_conv2d",
    "gated_conv2d_reference", "kernel_for", "linear_elu", "linear_elu_reference", "logistic_mixture_log_prob",
    "logistic_mixture_log_prob_reference", "wavenet_layer", "wavenet_layer_reference",
]  # fmt: skip
