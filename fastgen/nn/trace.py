"""A module's forward as an fx graph, without running anything twice or leaving a trace on the module.

Modules of torch.nn and fastgen.nn stay calls; a user's own submodules are inlined where they can be traced, and stay
calls where they cannot. What tracing could get wrong is refused: forwards that ask for `self.training`, that make
constant tensors, or that take something other than tensors and plain values.
"""

from __future__ import annotations

import contextlib
import inspect
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from fastgen.nn.choice import Deciding

Plain = bool | int | float | str | None


class CannotTrace(Exception):
    """Why a forward is left as it is."""


@dataclass(frozen=True)
class Call:
    """How a module was called on the example: the value, or the shape, dtype and device, of every parameter of forward."""

    plain: dict[str, Plain]
    tensors: dict[str, tuple[torch.Size, torch.dtype, torch.device]]

    def zeros(self) -> dict[str, Tensor]:
        """Tensors like those of the call."""
        return {k: torch.zeros(s, dtype=dtype, device=device) for k, (s, dtype, device) in self.tensors.items()}


def call_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    """The call by parameter names; None if an argument is neither tensor nor plain value."""
    signature = inspect.signature(type(module).forward)
    fixed = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    if any(p.kind not in fixed for p in signature.parameters.values()):
        return None
    bound = signature.bind(module, *args, **kwargs)
    bound.apply_defaults()
    values = dict(list(bound.arguments.items())[1:])
    tensors = {k: (v.shape, v.dtype, v.device) for k, v in values.items() if isinstance(v, Tensor)}
    plain = {k: v for k, v in values.items() if not isinstance(v, Tensor)}
    if any(v is not None and type(v) not in (bool, int, float, str) for v in plain.values()):
        return None
    return Call(plain, tensors)


def is_leaf(module: nn.Module) -> bool:
    """Whether a module stays a call: torch.nn's own, fastgen's, what has been rewritten, and what carries hooks."""
    kind = type(module)
    if parametrize.is_parametrized(module):
        kind = kind.__bases__[0]
    own = kind.__module__.startswith(("torch.nn", "fastgen.nn")) and not issubclass(kind, nn.Sequential)
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_hooks, module._backward_pre_hooks)
    hooked = any(hooks)
    return own or hooked or isinstance(module, Deciding)


class _Proxy(fx.Proxy):
    """A value in tracing that knows its rank, which users ask for to find an axis."""

    def __getattr__(self, k: str) -> Any:
        return self.dim() if k == "ndim" else _Attribute(self, k)

    def __len__(self) -> int:
        return _known(self).length(self.node)

    def dim(self) -> int:
        """Number of axes, as on the example."""
        return _known(self).rank(self.node)


class _Attribute(fx.proxy.Attribute):
    def __len__(self) -> int:
        return _known(self).length(self.node)


def _known(proxy: fx.Proxy) -> _Tracer:
    assert isinstance(proxy.tracer, _Tracer)
    return proxy.tracer


class _Tracer(fx.Tracer):
    """Inlines a user's submodules. Ranks are found by running the graph so far on zeros, or `replay`ed in order."""

    def __init__(self, call: Call, replay: list[int] | None) -> None:
        super().__init__()
        self.ranks: list[int] = []
        self.replay = None if replay is None else iter(replay)
        self.values = Values(call)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        known, stack = set(self.graph.nodes), dict(self.module_stack)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            for node in reversed([n for n in self.graph.nodes if n not in known]):
                self.graph.erase_node(node)
            self.module_stack.clear()
            self.module_stack.update(stack)
            return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)

    def rank(self, node: fx.Node) -> int:
        """Axes of a tensor."""
        if self.replay is not None:
            self.ranks.append(next(self.replay, -1))
        else:
            with _untraced():
                self.ranks.append(self.values.up_to(self.root, self.graph, node).dim())
        return self.ranks[-1]

    def length(self, node: fx.Node) -> int:
        """Length of a tensor's size."""
        source = node.args[0] if node.args else None
        of_size = (node.op == "call_method" and node.target == "size" and len(node.args) == 1) or (
            node.op == "call_function" and node.target is getattr and node.args[1] == "shape"
        )
        if not of_size or not isinstance(source, fx.Node):
            raise CannotTrace("it takes the length of a tensor")
        return self.rank(source)


_CALL, _GETATTR = nn.Module.__call__, nn.Module.__getattr__


@contextlib.contextmanager
def _untraced() -> Iterator[None]:
    """Modules run, rather than being recorded, while a trace is under way."""
    patched = nn.Module.__call__, nn.Module.__getattr__
    nn.Module.__call__, nn.Module.__getattr__ = _CALL, _GETATTR  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__, nn.Module.__getattr__ = patched  # type: ignore[method-assign]


class Values:
    """Values of a graph's nodes for a call with zeros, made as far as they are asked for. Needs evaluation mode."""

    def __init__(self, call: Call) -> None:
        self.inputs: dict[str, Any] = {**call.plain, **call.zeros()}
        self.known: dict[fx.Node, Any] = {}

    def up_to(self, root: nn.Module, graph: fx.Graph, last: fx.Node | None = None) -> Any:
        """The value of a node; of the output without one."""
        _, *parameters = inspect.signature(type(root).forward).parameters  # whatever its first is called
        names = iter(self.inputs[name] for name in parameters)
        value = None
        with torch.no_grad():
            for node in graph.nodes:
                given = next(names) if node.op == "placeholder" else None
                if node not in self.known:
                    self.known[node] = given if node.op == "placeholder" else self._run(root, node)
                value = self.known[node]
                if node is last:
                    break
        return value

    def _run(self, root: nn.Module, node: fx.Node) -> Any:
        args = fx.node.map_arg(node.args, self.known.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, self.known.__getitem__)
        if node.op == "output":
            return args[0]
        if node.op == "call_function":
            return node.target(*args, **kwargs)  # type: ignore[operator]
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        found = operator.attrgetter(str(node.target))(root)
        return found if node.op == "get_attr" else found(*args, **kwargs)

    def shapes(self) -> dict[fx.Node, torch.Size]:
        """Shapes of the tensors known."""
        return {node: value.shape for node, value in self.known.items() if isinstance(value, Tensor)}


def trace(module: nn.Module, call: Call) -> tuple[fx.Graph, dict[fx.Node, torch.Size]]:
    """The graph of module's forward for calls of this structure, with shapes. Raises CannotTrace."""
    graph, tracer = _trace(module, call, None)
    other, _ = _trace(module, call, tracer.ranks)
    _follow_training(graph, other)
    if _text(graph) != _text(other):
        raise CannotTrace("its forward differs between training and evaluation")
    _keep_masks(graph)
    values = Values(call)
    try:
        values.up_to(module, graph)
    except Exception as error:
        raise CannotTrace(f"its traced forward does not run: {error}") from error
    return graph, values.shapes()


def _text(graph: fx.Graph) -> str:
    return "\n".join(f"{n.op} {n.target} {n.args} {n.kwargs}" for n in graph.nodes)


def _trace(module: nn.Module, call: Call, ranks: list[int] | None) -> tuple[fx.Graph, _Tracer]:
    """In evaluation mode, or, with the ranks found there, in training mode."""
    modes = [(m, m.training) for m in module.modules()]
    before, tracer = set(module.__dict__), _Tracer(call, ranks)
    try:
        for m, _ in modes:
            m.training = ranks is not None
        with torch.no_grad():
            graph = tracer.trace(module, concrete_args=dict(call.plain) or None)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
        raise CannotTrace(f"its forward cannot be traced: {reason}") from error
    finally:
        for m, mode in modes:
            m.training = mode
        made = set(module.__dict__) - before
        for name in made:
            delattr(module, name)
    if made:
        raise CannotTrace("its forward makes a tensor that is no parameter or buffer")
    return graph, tracer


def _follow_training(graph: fx.Graph, other: fx.Graph) -> None:
    """`F.dropout(x, p, self.training)` is traced with a constant: make it ask again, in both modes' graphs."""
    if len(graph.nodes) != len(other.nodes):
        return
    for pair in list(zip(graph.nodes, other.nodes, strict=True)):
        if pair[0].target not in _DROPOUTS or [n.kwargs.get("training") for n in pair] != [False, True]:
            continue
        for node in pair:
            owner = next(reversed(node.meta.get("nn_module_stack", {}).values()), ("",))[0]
            with node.graph.inserting_before(node):
                training = node.graph.get_attr(f"{owner}.training" if owner else "training")
            node.kwargs = {**node.kwargs, "training": training}


_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.alpha_dropout, F.feature_alpha_dropout)


def _keep_masks(graph: fx.Graph) -> None:
    """`self.weight.data *= self.mask` leaves no write in a graph; here it becomes one. Raises CannotTrace for others."""
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not getattr or node.args[1] != "data":
            continue
        weight, users = node.args[0], list(node.users)
        product = users[0] if len(users) == 1 else node
        times = product.target in (operator.mul, "mul_") and not product.users and product.args[0] is node
        if not times or weight.op != "get_attr" or getattr(product.args[1], "op", "") != "get_attr":
            raise CannotTrace("its forward uses .data")
        with graph.inserting_after(product):
            masked = graph.call_function(masked_data, (weight, product.args[1]))
        weight.replace_all_uses_with(masked, delete_user_cb=lambda user: user not in (node, masked))  # noqa: B023
        graph.erase_node(product)
        graph.erase_node(node)


def masked_data(weight: Tensor, mask: Tensor) -> Tensor:
    """The weight, multiplied by the mask in place and unseen by autograd, as `weight.data *= mask` does."""
    weight.data.mul_(mask)
    return weight
