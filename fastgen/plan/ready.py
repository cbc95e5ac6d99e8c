"""Ready times of a graph, and what they decide: is the module causal, and which layer reads the future if not.

A weight of zero, a product with a constant zero and an untaken branch of a constant `where` carry no dependency
(graph/); causality, sub-pixel phases and masked orders all follow from that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen.errors import NotCausalError, UnsupportedError
from fastgen.graph.node import Graph, Node
from fastgen.graph.refs import Cause
from fastgen.graph.sources import OpaqueNode
from fastgen.graph.times import Ready


def check_supported(graph: Graph) -> None:
    """Raises UnsupportedError for the first operation without a rule that an output depends on."""
    reached = (graph.nodes[k] for k in graph.reached())
    found = [node for node in reached if isinstance(node, OpaqueNode)]
    if found:
        first = min(found, key=lambda n: n.index)
        raise UnsupportedError(f"layer {first.path}: {first.reason}")


def ready_times(graph: Graph, known: Tensor) -> list[Ready]:
    """Ready of every node; `known` [C, H, W] holds the times at which the sampled tensor's elements are known."""
    done: list[Ready] = []
    for node in graph.nodes:
        done.append(node.ready(done, known))
    return done


def check_causal(graph: Graph, ready: list[Ready], steps: Tensor) -> None:
    """Raises NotCausalError unless each phase's parameters are known at their step; steps [phases, H, W]."""
    for f, index in enumerate(graph.params):
        node, r = graph.nodes[index], ready[index]
        late = r.times > 2 * steps[f].to(torch.int32)[None] + 1
        if bool(late.any()):
            g, i, j = late.nonzero()[0].tolist()
            chan = int((r.group == g).nonzero()[0])
            step = int(steps[f, i, j])
            chain, source = _blame(graph, ready, node, chan, i, j)
            last = int(r.times[g, i, j]) // 2 - 1
            own = " (of a forward that is fed the sample delayed by one, say predicts='next')" if last == step else ""
            raise NotCausalError(
                f"the parameters of step {step} (row {i}, column {j}) depend on the value drawn at step "
                f"{last}{own}: {' <- '.join(chain)} <- {source}"
            )


def _blame(graph: Graph, ready: list[Ready], node: Node, chan: int, i: int, j: int) -> tuple[list[str], str]:
    """The chain of layers and taps along the latest dependency of one element."""
    chain: list[str] = []
    while not node.source:
        cause, i, j = _latest(node, ready, chan, i, j)
        if cause.label:
            chain.append(cause.label)
        chan, node = cause.ref.chans[cause.lane], graph.nodes[cause.ref.node]
    return chain, f"x[channel {chan}, row {i}, column {j}]"


def _latest(node: Node, ready: list[Ready], chan: int, i: int, j: int) -> tuple[Cause, int, int]:
    """What one element waits for longest, and the site of that."""
    best: tuple[int, Cause, int, int] | None = None
    for cause in node.blame(chan, i, j):
        at, source = cause.ref.at, ready[cause.ref.node]
        si, sj = int(at.rows(torch.tensor(cause.i))), int(at.cols(torch.tensor(cause.j)))
        if not bool(at.inside(torch.tensor(si), torch.tensor(sj))):
            continue
        if not (0 <= si < source.times.shape[1] and 0 <= sj < source.times.shape[2]):
            continue
        time = int(source.times[source.group[cause.ref.chans[cause.lane]], si, sj])
        if best is None or time > best[0]:
            best = (time, cause, si, sj)
    assert best is not None
    return best[1], best[2], best[3]
