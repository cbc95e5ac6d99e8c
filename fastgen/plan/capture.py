"""Capture: run forward once on real tensors and record, in shadow memory, which plan element every number is.

Every storage that has held a sampled value carries an int64 *shadow*, one id per element (see fit.py). The shadow is read
with the tensor's own size, stride and offset, so views, slices, permutes, expands and in-place writes through views need
no rules; what does is in rules.py. Weight norm, masks, dtype casts of weights and the like simply execute.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastgen.errors import FastgenError, ShapeError, UnsupportedError
from fastgen.plan import fit
from fastgen.plan.ir import CondNode, Graph, InputNode, Node, OpaqueNode, Pair

METADATA_OPS = frozenset(
    [
        "transpose_",
        "t_",
        "squeeze_",
        "unsqueeze_",
        "detach_",
        "swapaxes_",
        "swapdims_",
        "as_strided_",
        "set_",
        "resize_",
    ]
)
FRESH_OPS = frozenset(
    f"{a}_{b}" for a in ("new",) for b in ("zeros", "ones", "full", "empty", "empty_strided")
) | frozenset(["zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like"])

WHOLE = {
    "lstm": "a recurrence", "gru": "a recurrence", "rnn_tanh": "a recurrence", "rnn_relu": "a recurrence",
    "lstm_cell": "a recurrence", "gru_cell": "a recurrence", "scaled_dot_product_attention": "attention",
    "multi_head_attention_forward": "attention",
}  # fmt: skip


FORWARD_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, AssertionError)


class ModulePath:
    """Keeps the dotted path of the module whose forward is running."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {id(m): n or type(m).__name__ for n, m in model.named_modules()}
        self.stack: list[str] = []

    @property
    def current(self) -> str:
        """Path of the innermost running module; "forward" outside all."""
        return self.stack[-1] if self.stack else "forward"

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks the forward of every module that this thread runs, for the duration."""
        hooks = nn.modules.module
        here = threading.get_ident()

        def enter(module: nn.Module, args: Any) -> None:
            if threading.get_ident() == here:
                self.stack.append(self.names.get(id(module), type(module).__name__))

        def leave(module: nn.Module, args: Any, result: Any) -> None:
            if threading.get_ident() == here:
                self.stack.pop()

        pre = hooks.register_module_forward_pre_hook(enter)
        post = hooks.register_module_forward_hook(leave, always_call=True)
        try:
            yield
        finally:
            pre.remove()
            post.remove()


class _Shadow:
    """Ids of one storage: in closed form, or one per element."""

    def __init__(self, ref: StorageWeakRef, size: int, itemsize: int) -> None:
        self.ref, self.size, self.itemsize = ref, size, itemsize
        self.field: fit.Field | None = None
        self.ids: Tensor | None = None

    def dense(self) -> Tensor:
        """One id per element of the storage."""
        if self.ids is None:
            self.ids = torch.full((self.size,), fit.CONST) if self.field is None else self.field.ids().reshape(-1)
        return self.ids

    def window(self, t: Tensor) -> fit.Field | None:
        """The closed form as t [1, C, (H,) W] sees it: whole channels, a box of sites."""
        f = self.field
        if (
            f is None
            or t.dim() not in (3, 4)
            or t.shape[0] != 1
            or min(t.shape) < 1
            or t.element_size() != self.itemsize
        ):
            return None
        (height, width), plane = f.grid, f.grid[0] * f.grid[1]
        wanted = (plane, width, 1) if t.dim() == 4 else (plane, 1)
        if t.dim() == 3 and height != 1:
            return None
        if any(s != w for s, w, n in zip(t.stride()[1:], wanted, t.shape[1:], strict=True) if n > 1):
            return None
        c, rest = divmod(int(t.storage_offset()), plane)
        i, j = divmod(rest, width)
        grid = (1, t.shape[2]) if t.dim() == 3 else (t.shape[2], t.shape[3])
        if c + t.shape[1] > len(f.lanes) or i + grid[0] > height or j + grid[1] > width:
            return None
        return f.window((c, c + t.shape[1]), (i, j), grid)


class Tracer(TorchDispatchMode):
    """The dispatch mode that executes forward and builds the graph beside it."""

    def __init__(self, path: ModulePath) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.path = path
        self.nodes: list[Node] = []
        self.points: list[tuple[str, str, int, int]] = []
        self.notes: list[str] = []
        self.data_grid: Pair = (1, 1)
        self.calls: Counter[tuple[str, str]] = Counter()
        self.depth = 0
        self.call: tuple[str, str, int] = ("", "", 0)
        self.call_args: list[Tensor] = []
        self._shadow: dict[int, _Shadow] = {}
        self._sources: dict[Any, list[tuple[Tensor, int]]] = {}
        self._kept: list[Tensor] = []

    # ---- shadow memory -------------------------------------------------------------------------------------------
    def _entry(self, t: Tensor) -> _Shadow | None:
        found = self._shadow.get(t.untyped_storage()._cdata)
        return None if found is None or found.ref.expired() else found

    def _make(self, t: Tensor) -> _Shadow:
        storage = t.untyped_storage()
        if len(self._shadow) % 64 == 63:  # storages that died take their shadows along
            self._shadow = {k: v for k, v in self._shadow.items() if not v.ref.expired()}
        entry = _Shadow(StorageWeakRef(storage), max(1, storage.nbytes() // t.element_size()), t.element_size())
        self._shadow[storage._cdata] = entry
        return entry

    def ids(self, t: Tensor) -> Tensor:
        """Ids of the elements of t, shaped like it."""
        entry = self._entry(t)
        if entry is None:
            return torch.full((), fit.CONST, dtype=torch.int64).expand(t.shape)
        if t.element_size() != entry.itemsize:  # bytes read as another type: one mark for all
            return entry.dense().max().expand(t.shape)
        return entry.dense().as_strided(t.shape, t.stride(), t.storage_offset())

    def field(self, t: Tensor) -> fit.Field | None:
        """The ids of t [1, C, (H,) W] in closed form, if they have one."""
        entry = self._entry(t)
        return None if entry is None else entry.window(t)

    def put(self, t: Tensor, ids: Tensor | fit.Field) -> None:
        """Writes ids for the elements of t."""
        entry = self._entry(t)
        if isinstance(ids, fit.Field):
            entry = entry or self._make(t)
            if t.is_contiguous() and t.numel() == entry.size:
                entry.field, entry.ids = ids, None
                return
            ids = ids.ids()
        if entry is None:
            if not bool((ids != fit.CONST).any()):
                return
            entry = self._make(t)
        entry.dense().as_strided(t.shape, t.stride(), t.storage_offset()).copy_(ids.reshape(t.shape))
        entry.field = None

    def dynamic(self, t: Any) -> bool:
        """Whether any element depends on the sample (or is planned from conditioning)."""
        entry = self._entry(t) if isinstance(t, Tensor) else None
        return entry is not None and (entry.window(t) is not None or bool((self.ids(t) >= 0).any()))

    def conditional(self, t: Any) -> bool:
        """Whether any element depends on conditioning and is left to torch."""
        entry = self._entry(t) if isinstance(t, Tensor) else None
        return entry is not None and entry.field is None and bool((self.ids(t) == fit.COND).any())

    # ---- nodes ---------------------------------------------------------------------------------------------------
    def add(self, make: Callable[..., Node], op: str, channels: int, grid: Pair, **fields: Any) -> Node:
        """Appends a node made by the module that is running now."""
        limits = (fit.MAX_CHANNELS, fit.MAX_ROWS, fit.MAX_COLS)
        if channels > limits[0] or grid[0] > limits[1] or grid[1] > limits[2] or len(self.nodes) >= fit.MAX_NODES:
            raise UnsupportedError(
                f"{self.path.current}: {op} has {channels} channels on a grid of {grid[0]}x{grid[1]}; "
                f"the planner takes up to {limits[0]} channels and {limits[1]}x{limits[2]} sites"
            )
        node = make(len(self.nodes), self.path.current, op, channels, grid, **fields)
        self.nodes.append(node)
        return node

    def opaque(self, out: Tensor, op: str, reason: str) -> Tensor:
        """Ids of a result without a rule: an error only if an output needs it."""
        node = self.add(OpaqueNode, op, 1, (1, 1), reason=reason)
        return torch.full(out.shape, int(fit.pack(node.index, *(torch.zeros((), dtype=torch.int64),) * 3)))

    def opaque_ids(self, tensors: list[Tensor]) -> int | None:
        """The id of the first result without a rule among some tensors, if any."""
        opaque = [n.index for n in self.nodes if isinstance(n, OpaqueNode)]
        if not opaque:
            return None
        marks = torch.tensor(opaque)
        for t in tensors:
            if self.field(t) is not None:  # closed forms are never opaque
                continue
            ids = self.ids(t)
            hit = ids[torch.isin(ids >> 48, marks) & (ids >= 0)]
            if len(hit):
                return int(hit[0])
        return None

    def cond_source(self, t: Tensor, index: Tensor, grid: Pair) -> int:
        """A node for conditioning values: index [C, H, W] are flat positions in t, an argument of the running call."""
        position = next((k for k, a in enumerate(self.call_args) if a is t), None)
        if position is None:
            raise UnsupportedError(
                f"{self.path.current}: {self.call[1]} uses conditioning inside a composite operation; compute it outside"
            )
        same = (t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride(), t._version)
        for known, number in self._sources.get(same, []):
            if torch.equal(known, index):
                return number
        point = (*self.call, position)
        if point not in self.points:
            self.points.append(point)
        node = self.add(
            CondNode,
            "cond",
            index.shape[0],
            grid,
            point=self.points.index(point),
            gather=index,
            tensor_shape=tuple(t.shape),
        )
        self._sources.setdefault(same, []).append((index, node.index))
        self._kept.append(t)  # so that no other tensor takes its storage's place
        return node.index

    # ---- dispatch ------------------------------------------------------------------------------------------------
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        from fastgen.plan import (
            rules,
        )  # the two modules are one room with a door: rules need the tracer's type

        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        if self.depth == 0:
            key = (self.path.current, name)
            self.call, self.call_args = (*key, self.calls[key]), tensors
            self.calls[key] += 1
        return rules.dispatch(self, func, name, args, kwargs, tensors)


class _WholeCalls(TorchFunctionMode):
    """Sees calls that torch would take apart before the tracer does, and refuses them by name."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in WHOLE and any(self.tracer.dynamic(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)):
            raise UnsupportedError(
                f"layer {self.tracer.path.current}: {name} is {WHOLE[name]}, which is not planned yet"
            )
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients (nor inference mode, which hides operations from capture), restored afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for m, training in modes:
            m.training = training


def capture(
    model: nn.Module,
    x: Tensor,
    cond: tuple[Any, ...],
    input_ids: Callable[[int], tuple[Tensor, int, Pair]],
    arrange: Callable[[Tensor], Tensor],
) -> Graph:
    """Runs model(x, *cond) at batch 1 and returns its graph.

    `input_ids(node)` gives (ids shaped like x, channels, grid) of the sampled tensor; `arrange` turns forward's output
    (values or ids alike) into [1, H, W, phases, P]. Raises UnsupportedError, NotCausalError comes later (ready.py).
    """
    from fastgen.plan import rules

    path = ModulePath(model)
    tracer = Tracer(path)
    with eval_mode(model), path.watching():
        x, *cond_list = (plain(t) for t in (x, *cond))
        cond = tuple(cond_list)
        _try_forward(model, x, cond, path)
        ids, channels, grid = input_ids(0)
        tracer.add(InputNode, "input", channels, grid)
        tracer.data_grid = grid
        tracer.put(x, ids)
        for t in cond:
            if isinstance(t, Tensor):
                tracer.put(t, torch.full(t.shape, fit.COND, dtype=torch.int64))
        with tracer, _WholeCalls(tracer):
            out = model(x, *cond)
    return rules.finish(tracer, first_tensor(out), arrange)


def plain(t: Any) -> Any:
    """A tensor that capture may write to and watch: a copy, and no inference tensor."""
    return t.clone() if isinstance(t, Tensor) else t


def _try_forward(model: nn.Module, x: Tensor, cond: tuple[Any, ...], path: ModulePath) -> None:
    """Runs forward once, so that what it cannot take is told apart from what cannot be planned."""
    try:
        model(x.clone(), *cond)
    except FastgenError:
        raise
    except FORWARD_ERRORS as error:
        raise refused(x, cond, error) from error


def refused(x: Tensor, cond: tuple[Any, ...], error: Exception) -> ShapeError:
    """What to tell a person whose forward fails on its inputs."""
    given = ", ".join(str(list(c.shape)) if isinstance(c, Tensor) else repr(c) for c in cond)
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    with_cond = f" with conditioning {given}" if cond else ""
    return ShapeError(f"forward does not take a sample {list(x.shape)} of {x.dtype}{with_cond}: {reason}")


def first_tensor(out: Any) -> Tensor:
    """Forward's parameters: its result, or the first of a tuple or list of results."""
    while isinstance(out, tuple | list) and out:
        out = out[0]
    if not isinstance(out, Tensor):
        raise UnsupportedError(f"forward returned {type(out).__name__}; expected a tensor of parameters")
    return out
