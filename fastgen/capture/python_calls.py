"""Calls that must be seen before torch takes them apart, or that leave torch without it being told."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from fastgen.capture.reads import SHOWN, refuse
from fastgen.capture.tracer import Tracer
from fastgen.errors import UnsupportedError

COMPOSITE: dict[str, str] = {
    "lstm": "a recurrence", "gru": "a recurrence", "rnn_tanh": "a recurrence", "rnn_relu": "a recurrence",
    "lstm_cell": "a recurrence", "gru_cell": "a recurrence", "scaled_dot_product_attention": "attention",
    "multi_head_attention_forward": "attention",
}  # fmt: skip
# Numbers that go where no operation of torch is seen.
EXPORTS = frozenset(
    ["numpy", "tolist", "__array__", "__dlpack__", "untyped_storage", "storage", "data_ptr", "__reduce_ex__",
     "__cuda_array_interface__", "apply_", "map_", "map2_"]
)  # fmt: skip
MADE = frozenset(["tensor", "as_tensor", "asarray", "new_tensor"])  # of lists: torch reads what is in them, unseen
SPECIAL = frozenset(COMPOSITE) | EXPORTS | MADE | SHOWN | {"__deepcopy__", "one_hot", "__bool__"}


class PythonCalls(TorchFunctionMode):
    """Refuses what cannot be followed, by name, and has harmless reads taken as such."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        tr, kwargs = self.tracer, kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":  # of a property
            name = getattr(getattr(func, "__self__", None), "__name__", "")
        if name not in SPECIAL:
            return func(*args, **kwargs)
        with _disable_current_modes():  # what is done here is none of forward's doing
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            sampled = [t for t in tensors if tr.dynamic(t)]
            watched = sampled or [t for t in tensors if tr.conditional(t)]
            if name in COMPOSITE and sampled:
                raise UnsupportedError(
                    f"layer {tr.path.current}: {name} is {COMPOSITE[name]}, which is not planned yet"
                )
            if watched and name in EXPORTS:
                refuse(tr, watched[0], f"Tensor.{name}()")
            data = args[1:2] if name == "new_tensor" else args[:1]
            if watched and name in MADE and not (data and isinstance(data[0], Tensor)):
                refuse(tr, watched[0], f"torch.{name}() of a list that holds it", "use torch.stack")
            if watched and name == "__format__" and watched[0].dim() == 0:
                refuse(tr, watched[0], "a formatted string")
            if watched and name == "one_hot" and (args[1] if len(args) > 1 else kwargs.get("num_classes", -1)) < 0:
                refuse(tr, watched[0], "one_hot without num_classes", "say num_classes")
        if not watched:
            return func(*args, **kwargs)
        if name == "__deepcopy__":
            return args[0].clone()
        with tr.reading("" if name != "__bool__" else "bool"):
            return func(*args, **kwargs)
