"""Writing: the fused call in the place of a chain, and the rewritten graph as a forward."""

from __future__ import annotations

import inspect
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastgen.nn import run
from fastgen.nn.convolutions import weight_nodes
from fastgen.nn.patterns import Match, Nodes
from fastgen.nn.trace import Call
from fastgen.ops import KernelChoice


def replace_match(root: nn.Module, graph: fx.Graph, match: Match, where: str) -> fx.Node:
    """Puts one fused call in the place of a chain and removes the chain."""
    with graph.inserting_before(match.last):
        weights = [weight_nodes(root, graph, conv) for conv in match.convs]
        conds = [_added(graph, nodes) for nodes in match.cond]
        halves = [_added(graph, nodes) for nodes in match.halves]
        conv = match.convs[0]
        args: tuple[Any, ...] = (
            graph.get_attr("_fastgen_kernel"), f"{where}{match.name}", conv.x, [w for w, _ in weights],
            [b for _, b in weights], conds, halves, match.residual,
        )  # fmt: skip
        options: dict[str, Any] = dict(
            pads=conv.pads, stride=conv.stride, dilation=conv.dilation, gate=match.gate, elu=conv.elu
        )
        fused = graph.call_function(fused_conv, args, options | {"swapped": match.swapped})
    match.last.replace_all_uses_with(fused)
    for node in reversed(list(graph.nodes)):
        if node in match.inside and not node.users:
            graph.erase_node(node)
    return fused


def _added(graph: fx.Graph, nodes: Nodes) -> fx.Node | None:
    total: fx.Node | None = None
    for node in nodes:
        total = node if total is None else graph.call_function(operator.add, (total, node))
    return total


def fused_conv(
    kernel: KernelChoice, name: str, x: Tensor, weights: list[Tensor], biases: list[Tensor | None],
    conds: list[Tensor | None], halves: list[Tensor | None], residual: Tensor | None, *, pads: run.Pads,
    stride: run.Pair, dilation: run.Pair, gate: run.Gate, elu: bool, swapped: bool,
) -> Tensor:  # fmt: skip
    """What stands in a rewritten forward: one or two weights of the same input, an image or a sequence."""
    weight, bias, cond = _joined(weights, 0), _joined(biases, 0), _joined(conds, 1)
    assert weight is not None
    of_halves = _joined(halves, 1) if halves[0] is not None else None
    if of_halves is not None:
        cond = of_halves if cond is None else cond + of_halves
    if cond is not None:  # a learned shift has no batch
        cond = cond.expand(x.shape[0], *[-1] * (cond.dim() - 1))
    if swapped:
        weight, bias, cond = weight.roll(weight.shape[0] // 2, 0), _rolled(bias, 0), _rolled(cond, 1)
    options: dict[str, Any] = dict(pads=pads, stride=stride, dilation=dilation, gate=gate, elu=elu)
    if weight.dim() == 4:
        return run.conv2d(kernel, name, _dense(x), weight, bias, cond=cond, residual=residual, **options)
    rows = [None if t is None else t.unsqueeze(2) for t in (cond, residual)]
    x, weight = _dense(x.unsqueeze(2)), weight.unsqueeze(2)
    return run.conv2d(kernel, name, x, weight, bias, cond=rows[0], residual=rows[1], **options).squeeze(2)


def _dense(x: Tensor) -> Tensor:
    """x, copied if it is neither contiguous nor channels-last: what ran before must run after."""
    return x if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def _joined(parts: list[Any], dim: int) -> Tensor | None:
    """The parts side by side; zeros of its size where one of two is missing."""
    if len(parts) == 1 or all(p is None for p in parts):
        return parts[0]  # type: ignore[no-any-return]
    present = next(p for p in parts if p is not None)
    parts = [torch.zeros_like(present) if p is None else p for p in parts]
    if parts[0].shape != parts[1].shape:  # one for every site, the other for all alike
        parts = list(torch.broadcast_tensors(*parts))
    return torch.cat(parts, dim)


def _rolled(t: Tensor | None, dim: int) -> Tensor | None:
    return None if t is None else t.roll(t.shape[dim] // 2, dim)


Watched = list[tuple[tuple[str, ...], Any]]  # submodules by path, and what each was when it was fused


def passed_by(module: nn.Module, graph: fx.Graph) -> Watched:
    """The submodules that a graph does not call any more, as they are now."""
    called = [str(n.target) for n in graph.nodes if n.op == "call_module"]
    names = [n for n, _ in module.named_modules() if n and not any(n == c or n.startswith(f"{c}.") for c in called)]
    return [((), tuple(module._parameters))] + [
        (tuple(name.split(".")), _state(module.get_submodule(name))) for name in names
    ]


def _state(module: nn.Module) -> Any:
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return type(module), tuple(module._parameters), *map(tuple, hooks)


def as_fused(root: nn.Module, watched: Watched) -> bool:
    """Whether the modules that are passed by are what they were: none has been given a hook, a weight norm, a mask of
    pruning, or taken away."""
    if torch.compiler.is_compiling():  # which keeps to what it saw
        return True
    for path, was in watched:
        module: nn.Module | None = root
        for part in path:
            module = None if module is None else module._modules.get(part)
        if module is None or (_state(module) if path else tuple(module._parameters)) != was:
            return False
    return True


def write_forward(module: nn.Module, graph: fx.Graph, call: Call) -> Any:
    """A forward with the signature of the module's own: the graph for calls like `call`, the own one for others, and where
    a submodule was changed since (as_fused)."""
    code = graph.python_code("self")
    space: dict[str, Any] = dict(code.globals)
    exec(compile(code.src, f"<fused forward of {type(module).__name__}>", "exec"), space)
    shim: dict[str, Any] = {"_graph": space["forward"], "_own": type(module).forward, "_Tensor": Tensor}
    shim |= {"_as_fused": as_fused, "_watched": passed_by(module, graph)}
    head, passed, tests, star = ["self"], [], ["_as_fused(self, _watched)"], False
    for name, p in list(inspect.signature(type(module).forward).parameters.items())[1:]:
        if p.kind is inspect.Parameter.KEYWORD_ONLY and not star:
            head.append("*")
            star = True
        shim[f"_default_{name}"] = p.default
        head.append(name if p.default is inspect.Parameter.empty else f"{name}=_default_{name}")
        passed.append(f"{name}={name}" if star else name)
        if name in call.tensors:
            tests.append(f"isinstance({name}, _Tensor)")
        else:
            value = call.plain[name]
            tests.append(
                f"{name} is {value!r}" if value is None or value is True or value is False else f"{name} == {value!r}"
            )
    given = ", ".join(p.split("=")[0] for p in passed)
    source = (
        f"def forward({', '.join(head)}):\n"
        f"    if {' and '.join(tests)}:\n"
        f"        return _graph(self, {given})\n"
        f"    return _own(self, {', '.join(passed)})\n"
    )
    exec(compile(source, f"<forward of fused {type(module).__name__}>", "exec"), shim)
    return shim["forward"]
