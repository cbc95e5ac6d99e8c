"""Convolutions in an fx graph: which node is one, what it reads, and how its weight is spelt without calling it."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils.weight_norm import WeightNorm

from fastgen.nn.trace import masked_data

CONVOLUTIONS: dict[Any, int] = {torch.conv1d: 1, torch.conv2d: 2, F.conv1d: 1, F.conv2d: 2}
_ZERO_PADS = (nn.ZeroPad1d, nn.ZeroPad2d, nn.ConstantPad1d, nn.ConstantPad2d)
_PARAMETERS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


@dataclass(frozen=True)
class Conv:
    """One convolution. pads: (left, right, top, bottom), what is read beyond x, negative where it is cropped."""

    node: fx.Node
    name: str
    dims: int
    x: fx.Node
    pads: tuple[int, int, int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    kernel: tuple[int, int]
    outputs: int
    elu: bool = False
    absorbed: tuple[fx.Node, ...] = ()  # nodes between x and the convolution

    def alike(self, other: Conv) -> bool:
        """Whether the two differ in their weights alone."""
        mine = replace(self, node=other.node, name=other.name, absorbed=other.absorbed)
        return mine == other


def module_of(root: nn.Module, node: Any) -> nn.Module | None:
    """The module that a call_module node calls."""
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return None
    return root.get_submodule(str(node.target))


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument by position or keyword."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def is_call(node: Any, functions: tuple[Any, ...], methods: tuple[str, ...] = ()) -> bool:
    """Whether a node calls one of the functions, or one of the methods."""
    if not isinstance(node, fx.Node):
        return False
    if node.op == "call_function":
        return any(node.target is f for f in functions)
    return node.op == "call_method" and node.target in methods


def changes(root: nn.Module, node: fx.Node) -> bool:
    """Whether a node writes to its argument."""
    module = module_of(root, node)
    if module is not None:
        return bool(getattr(module, "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    in_place = name.endswith("_") and not name.startswith("_")
    return in_place or bool(node.kwargs.get("inplace")) or name in ("setitem", "iadd", "imul", "isub", "itruediv")


def conv_at(root: nn.Module, node: Any, shapes: dict[fx.Node, torch.Size]) -> Conv | None:
    """The convolution at a node, with pads and concat_elu in front of it taken in."""
    if not isinstance(node, fx.Node):
        return None
    found = _module_conv(root, node) if node.op == "call_module" else _function_conv(node, shapes)
    if found is None or found.x not in shapes or len(shapes[found.x]) != found.dims + 2:
        return None
    return _with_elu(root, _with_pads(root, found))


def _module_conv(root: nn.Module, node: fx.Node) -> Conv | None:
    module = module_of(root, node)
    if not isinstance(module, nn.Conv1d | nn.Conv2d) or len(node.args) != 1 or not isinstance(node.args[0], fx.Node):
        return None
    kind = type(module)
    plain = any(
        kind.forward is base.forward and kind._conv_forward is base._conv_forward for base in (nn.Conv1d, nn.Conv2d)
    )
    if not plain or module.padding_mode != "zeros" or has_hooks(module):
        return None
    sizes = (tuple(module.kernel_size), module.stride, module.padding, module.dilation, module.groups)
    return _conv(node, str(node.target), node.args[0], module.out_channels, *sizes)


def has_hooks(module: nn.Module) -> bool:
    """Whether a module carries hooks, which nobody calls where it is not called; weight norm's is known."""
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    hooks += [*module._backward_hooks.values(), *module._backward_pre_hooks.values()]
    return any(not isinstance(hook, WeightNorm) or hook.name != "weight" for hook in hooks)


def _function_conv(node: fx.Node, shapes: dict[fx.Node, torch.Size]) -> Conv | None:
    if node.op != "call_function" or node.target not in CONVOLUTIONS:
        return None
    given: dict[str, Any] = dict(zip(_PARAMETERS, node.args, strict=False)) | node.kwargs
    x, weight = given.get("input"), given.get("weight")
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node) or weight not in shapes:
        return None
    rest = (given.get("stride", 1), given.get("padding", 0), given.get("dilation", 1), given.get("groups", 1))
    if any(isinstance(n, fx.Node) for value in rest for n in (value if isinstance(value, tuple | list) else (value,))):
        return None
    named = weight.args[0] if weight.target is masked_data else weight
    name = str(named.target) if isinstance(named, fx.Node) and named.op == "get_attr" else node.name
    return _conv(node, name.removesuffix(".weight"), x, shapes[weight][0], tuple(shapes[weight][2:]), *rest)


def _conv(
    node: fx.Node, name: str, x: fx.Node, outputs: int, kernel: tuple[int, ...], stride: Any, padding: Any, dilation: Any,
    groups: int,
) -> Conv | None:  # fmt: skip
    if groups != 1:
        return None
    dims = len(kernel)
    steps, spread = _each(stride, dims), _each(dilation, dims)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(spread, kernel, strict=True)]
        sides = [(t // 2, t - t // 2) for t in total]
    else:
        sides = [(p, p) for p in _each(0 if padding == "valid" else padding, dims)]
    pads = (*sides[-1], *(sides[0] if dims == 2 else (0, 0)))
    rows = (1,) if dims == 1 else ()  # a sequence is an image of one row
    return Conv(
        node, name, dims, x, pads, _two((*rows, *steps)), _two((*rows, *spread)), _two((*rows, *kernel)), outputs
    )  # fmt: skip


def _each(value: Any, dims: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, tuple | list) else (value,)
    return values * dims if len(values) == 1 else values


def _two(values: tuple[int, ...]) -> tuple[int, int]:
    return values[0], values[1]


def _with_pads(root: nn.Module, conv: Conv) -> Conv:
    """The convolution with a zero pad in front of it taken in."""
    node = conv.x
    pads: Any = None
    if is_call(node, (F.pad, torch.nn.functional.pad)):
        mode, value = argument(node, 2, "mode", "constant"), argument(node, 3, "value")
        if mode == "constant" and not value:
            pads = argument(node, 1, "pad")
    module = module_of(root, node)
    if isinstance(module, _ZERO_PADS) and not module.value:
        pads = module.padding
    if pads is None or len(node.users) != 1 or any(not isinstance(p, int) for p in pads):
        return conv
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or len(pads) > 2 * conv.dims:
        return conv
    pads = (*pads, 0, 0, 0, 0)[:4]
    if any(mine and given < 0 for mine, given in zip(conv.pads, pads, strict=True)):
        return conv  # what has been cut off would come back in the place of a zero
    total = tuple(a + b for a, b in zip(conv.pads, pads, strict=True))
    return replace(conv, x=source, pads=total, absorbed=(*conv.absorbed, node))


def _with_elu(root: nn.Module, conv: Conv) -> Conv:
    """The convolution with a concat_elu in front of it taken in: elu(cat(u, -u)), or cat(elu(u), elu(-u))."""
    outer = conv.x
    inside = elu_of(root, outer)
    parts = _joined(inside if inside is not None else outer)
    if parts is None or len(outer.users) != 1:
        return conv
    a, b, cat = parts
    absorbed = [*conv.absorbed, outer]
    if inside is None:
        absorbed += [n for n in (a, b) if isinstance(n, fx.Node)]
        a, b = elu_of(root, a), elu_of(root, b)
    else:
        absorbed.append(cat)
    negative = is_call(b, (operator.neg, torch.neg), ("neg",))
    if not negative or not isinstance(a, fx.Node) or not isinstance(b, fx.Node) or b.args[0] is not a:
        return conv
    if any(len(n.users) != 1 for n in (*absorbed[len(conv.absorbed) :], b)):
        return conv
    return replace(conv, x=a, elu=True, absorbed=(*absorbed, b))


def elu_of(root: nn.Module, node: Any) -> fx.Node | None:
    """What a node takes the ELU of, with alpha 1."""
    module = module_of(root, node)
    if isinstance(module, nn.ELU) and module.alpha == 1.0:
        source = node.args[0]
    elif is_call(node, (F.elu,)) and argument(node, 1, "alpha", 1.0) == 1.0:
        source = node.args[0] if node.args else None
    else:
        return None
    return source if isinstance(source, fx.Node) else None


def _joined(node: Any) -> tuple[Any, Any, fx.Node] | None:
    """(a, b, cat) of cat((a, b), dim=1)."""
    if not is_call(node, (torch.cat, torch.concat)) or not node.args:
        return None
    parts, dim = node.args[0], argument(node, 1, "dim", 0)
    if not isinstance(parts, tuple | list) or len(parts) != 2 or dim != 1:
        return None
    return parts[0], parts[1], node


def weight_nodes(root: nn.Module, graph: fx.Graph, conv: Conv) -> tuple[fx.Node, Any]:
    """Nodes of the convolution's weight and bias, inserted where the graph inserts now; weight norm is kept."""
    module = module_of(root, conv.node)
    if module is None:
        given = dict(zip(_PARAMETERS, conv.node.args, strict=False)) | conv.node.kwargs
        weight = given["weight"]
        assert isinstance(weight, fx.Node)
        return weight, given.get("bias")
    bias = graph.get_attr(f"{conv.name}.bias") if getattr(module, "bias", None) is not None else None
    norm = next((h for h in module._forward_pre_hooks.values() if isinstance(h, WeightNorm)), None)
    if norm is None:
        return graph.get_attr(f"{conv.name}.weight"), bias
    parts = (graph.get_attr(f"{conv.name}.weight_v"), graph.get_attr(f"{conv.name}.weight_g"), norm.dim)
    return graph.call_function(torch._weight_norm, parts), bias
