"""What a rule follows of a call: which arguments, of which provenance, and results of which types. Anything else is refused.

The default is no: an argument that a rule does not name must have its default value, and one that depends on conditioning
must be named as one that may.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastgen.capture.convolution import CONVOLUTIONS
from fastgen.capture.fit import Irregular
from fastgen.capture.linear import LINEAR
from fastgen.capture.lookup import LOOKUP
from fastgen.capture.moves import MOVEMENT, PATCHES
from fastgen.capture.norms import NORMS
from fastgen.capture.pointwise import POINTWISE
from fastgen.capture.ranges import WHOLE, check_cast, check_whole
from fastgen.capture.shadow import Ids
from fastgen.capture.tracer import Tracer

LOW = (torch.float16, torch.bfloat16)
# What these make of sampled values is the plan's, so that a run for conditioning alone may skip it.
COMPUTES = POINTWISE | frozenset([*CONVOLUTIONS, *LINEAR, *LOOKUP, *NORMS])

# Optional arguments that rules follow, by name.
FOLLOWED: dict[str, tuple[str, ...]] = {
    "add": ("alpha",), "sub": ("alpha",), "rsub": ("alpha",), "elu": ("alpha", "scale", "input_scale"),
    "leaky_relu": ("negative_slope",), "gelu": ("approximate",), "softplus": ("beta", "threshold"),
    "hardtanh": ("min_val", "max_val"), "clamp": ("min", "max"), "sum": ("dim", "keepdim", "dtype"),
    "mean": ("dim", "keepdim", "dtype"), "amax": ("dim", "keepdim"), "amin": ("dim", "keepdim"),
    "var": ("dim", "correction", "keepdim"), "addmm": ("beta", "alpha"), "glu": ("dim",), "cat": ("dim",), "stack": ("dim",),
    "avg_pool1d": ("stride", "padding", "ceil_mode"), "avg_pool2d": ("stride", "padding", "ceil_mode"),
    "rrelu_with_noise": ("lower", "upper", "training"), "_to_copy": ("dtype",), "to": ("dtype",), "constant_pad_nd": ("value",),
}  # fmt: skip
# Optional arguments without a say in the values of a result (gradients, memory), and operations whose rule runs the very
# call on positions, so that it follows every argument.
NO_MATTER = frozenset(
    ["memory_format", "layout", "device", "pin_memory", "non_blocking", "copy", "padding_idx", "scale_grad_by_freq",
     "sparse", "sparse_grad", "generator", "implicit", "out", "benchmark", "deterministic", "cudnn_enabled", "allow_tf32"]
)  # fmt: skip
# Arguments without a default that are no tensors.
REQUIRED = frozenset(
    ["self", "other", "exponent", "min", "max", "value", "dim", "dtype", "kernel_size", "stride", "padding", "dilation",
     "transposed", "output_padding", "groups", "training", "momentum", "eps", "exponential_average_factor", "epsilon",
     "normalized_shape"]
)  # fmt: skip
ALL_FOLLOWED = frozenset(MOVEMENT) - {"to", "_to_copy"} | PATCHES
OVERLOADS = {
    "scatter": ("value", "src"),
    "where": ("self", "ScalarSelf", "ScalarOther", "Scalar"),
    "mean": ("dim", "default"),
}

# Arguments, by position, whose conditioning a rule turns into sources of its own; of any other argument the example's value
# would be taken for a constant. (Matrix products and sums refuse by themselves, saying what they cannot mix.)
ANY = range(16)
CONDITIONAL: dict[str, Iterable[int]] = {
    **dict.fromkeys(MOVEMENT, (0,)), **dict.fromkeys(PATCHES, (0, 1)),
    **dict.fromkeys(LINEAR, ANY), **dict.fromkeys(POINTWISE, ANY),
    **dict.fromkeys(["glu", "log_sigmoid_forward", "copy", "fill", "rrelu_with_noise", "amax", "amin", "var", "avg_pool1d",
                     "avg_pool2d"], (0,)),
    **dict.fromkeys(["convolution", "_convolution", "native_batch_norm", "_native_batch_norm_legit_no_training",
                     "cudnn_batch_norm"], (0, 1, 2)),
    **dict.fromkeys(["index", "embedding"], (0, 1)), **dict.fromkeys(["gather", "index_select"], (0, 2)),
    "native_layer_norm": (0, 2, 3),
}  # fmt: skip


def empty(t: Any) -> Any:
    """Shape, strides and type of a tensor: itself without its numbers, on the meta device. What is no tensor stays."""
    return torch.empty_like(t, device="meta") if isinstance(t, Tensor) else t


def forms(cond: Iterable[Any]) -> tuple[tuple[torch.dtype, tuple[int, ...]], ...]:
    """Types and shapes of the tensors of conditioning."""
    return tuple((c.dtype, tuple(c.shape)) for c in cond if isinstance(c, Tensor))


def numbers_of(args: Any, kwargs: Any) -> tuple[float, ...]:
    """The Python numbers among the arguments of a call."""
    return tuple(float(a) for a in tree_leaves((args, kwargs)) if isinstance(a, int | float))


def check_call(tr: Tracer, func: Any, name: str, args: Any, kwargs: Any) -> None:
    """Raises Irregular for an argument that the rule of an operation does not follow."""
    if name in OVERLOADS and func._overloadname not in OVERLOADS[name]:
        raise Irregular(f"its form {func._overloadname!r} is not followed")
    allowed = CONDITIONAL.get(name, ())
    for k, a in [*enumerate(args), *kwargs.items()]:
        if k not in allowed and any(tr.conditional(t) for t in tree_leaves(a) if isinstance(t, Tensor)):
            raise Irregular(f"argument {k} depends on conditioning, and would be frozen at the example's value")
    if name in ALL_FOLLOWED:
        return
    followed = FOLLOWED.get(name, ())
    for k, a in enumerate(func._schema.arguments):
        if a.name in followed or a.name in NO_MATTER:
            continue
        usual = a.default_value if a.has_default_value() else None
        given = args[k] if k < len(args) else kwargs.get(a.name, usual)
        if not a.has_default_value() and ("Tensor" in str(a.type) or a.name in REQUIRED):
            continue
        if isinstance(given, Tensor) or given != usual:
            raise Irregular(f"its argument {a.name}={given!r} is not followed")


def check_type(name: str, dtype: torch.dtype) -> None:
    """Raises Irregular for results that float32 does not stand for."""
    if dtype in LOW:
        raise Irregular(
            f"forward computes in {str(dtype).removeprefix('torch.')} here (autocast inside of forward, or a cast), and plans "
            "in float32; have forward compute in float32 when it is sampled"
        )
    if dtype.is_complex:
        raise Irregular("complex numbers are not planned; compute with their real and imaginary parts")


def check_result(tr: Tracer, name: str, out: Tensor, ids: Ids) -> None:
    """Raises Irregular where integers that were computed may not be whole in float32, or may wrap around."""
    if out.dtype.is_floating_point or out.dtype == torch.bool or name not in COMPUTES:
        return
    found = tr.range_of_ids(ids)
    if found is None and (nodes := tr.nodes_of(ids)):
        info = torch.iinfo(out.dtype)
        if tr.limited(nodes, max(info.min, -WHOLE), min(info.max, WHOLE), "an integer"):
            return
    check_whole(found, "arithmetic")
    check_cast(found, out.dtype)
