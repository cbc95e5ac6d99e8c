"""A person's module as fastgen runs it: a private view of the same weights, in eval mode, that nothing else can change.

A view has modules of its own ("shells": the class, attributes and hooks of the person's, and the very same Parameter
objects), so that no training flag is flipped under a training loop, no counter of the person's moves, and two threads
never meet in one module's state.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastgen.errors import UnsupportedError
from fastgen.forward import ModulePath, device_of

CONTAINERS = (list, tuple, set, frozenset, dict, collections.deque)  # with their subclasses
SIMPLE = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
TRACED = (torch.jit.ScriptModule, torch.jit.ScriptFunction)


def private_view(model: nn.Module) -> nn.Module:
    """A copy of all modules that forward may run, in eval mode, with the same parameters and copies of all other tensors.

    Modules are found wherever they hide: in lists, dictionaries, plain objects, bound methods, partial functions and the
    closures of functions that replace a forward. Raises UnsupportedError for a scripted module in training mode, whose
    flag cannot be changed in a copy.
    """
    copier = _Copier()
    viewed: nn.Module = copier(unwrapped(model))
    names = {id(m): name for name, m in viewed.named_modules()}
    for shell in copier.shells:
        ModulePath.follow(shell, names.get(id(shell), "") or type(shell).__name__)
    return viewed


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside of torch.compile's, DataParallel's or DistributedDataParallel's wrapper."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def copied(view: nn.Module) -> nn.Module:
    """A copy of a private view and of its parameters. Tensors that are plain attributes (masks, what hooks compute) come
    along, detached and on the CPU: `deepcopy` refuses those with a history, and `Module.cpu` leaves them where they are."""
    memo: dict[int, Tensor] = {}
    elsewhere = device_of(view).type != "cpu"
    for module in view.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                memo[id(value)] = value.detach().cpu().clone() if elsewhere else value.detach().clone()
    made: nn.Module = copy.deepcopy(view, memo)
    for old, new in zip(view.modules(), made.modules(), strict=True):
        for name in slots_of(old):  # which a module's own way of copying leaves out
            object.__setattr__(new, name, copy.deepcopy(getattr(old, name), memo))
    return made


class _Copier:
    """Copies what holds modules or may be written to, once each; everything else is shared."""

    def __init__(self) -> None:
        self.known: dict[int, Any] = {}
        self.keep: list[Any] = []  # so that no id is taken twice
        self.shells: list[nn.Module] = []
        self.storages: dict[int, torch.UntypedStorage] = {}

    def __call__(self, value: Any) -> Any:
        if isinstance(value, (*SIMPLE, type, types.ModuleType)):
            return value
        if id(value) in self.known:
            return self.known[id(value)]
        self.keep.append(value)
        self.known[id(value)] = value  # a circle that is not through a module ends in the original
        made = self._copy(value)
        self.known[id(value)] = made
        return made

    def _copy(self, value: Any) -> Any:
        if isinstance(value, TRACED):
            if getattr(value, "training", False):
                raise UnsupportedError("a scripted module is in training mode; call .eval() on it first")
            return value
        if isinstance(value, nn.Parameter):
            return value
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, nn.Module):
            return self._module(value)
        if isinstance(value, CONTAINERS):
            return self._container(value)
        if isinstance(value, types.MethodType):
            owner = self(value.__self__)
            return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
        if isinstance(value, functools.partial):
            inside = (value.func, value.args, value.keywords)
            func, args, keywords = map(self, inside)
            return functools.partial(func, *args, **keywords)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        return self._object(value)

    def _tensor(self, t: Tensor) -> Tensor:
        """A copy that shares its storage with the copies of those that it shares it with."""
        if type(t) is not Tensor or t.layout != torch.strided or t.is_quantized:
            return t
        storage = t.untyped_storage()
        if storage._cdata not in self.storages:
            self.storages[storage._cdata] = storage.clone()
        other = torch.empty(0, dtype=t.dtype, device=t.device)
        return other.set_(self.storages[storage._cdata], t.storage_offset(), t.shape, t.stride())

    def _module(self, module: nn.Module) -> nn.Module:
        shell: nn.Module = object.__new__(type(module))
        self.known[id(module)] = shell
        self.shells.append(shell)
        for name, value in vars(module).items():
            if name == "_parameters":
                value = copy.copy(value)
            elif name == "_buffers":
                value = type(value)((k, self(t)) for k, t in value.items())
            else:
                value = self(value)
            shell.__dict__[name] = value
        for name in slots_of(module):
            object.__setattr__(shell, name, self(getattr(module, name)))
        shell.__dict__["training"] = False
        return shell

    def _container(self, value: Any) -> Any:
        """Containers are always copied, as forward may append to them; those of a strange kind only if they must be."""
        inside: Any = (
            {self._key(k): self(v) for k, v in value.items()} if isinstance(value, dict) else [self(v) for v in value]
        )
        if type(value) in CONTAINERS:
            return type(value)(inside)
        try:
            made = copy.copy(value)
            if isinstance(value, dict):
                made.clear()
                made.update(inside)
            elif isinstance(value, list):
                made[:] = inside
            elif hasattr(value, "_replace"):  # a named tuple
                made = type(value)(*inside)
            return made
        except Exception:  # of a class of its own, that cannot be copied this way
            return value

    def _key(self, key: Any) -> Any:
        """A key: a module is led to its shell."""
        return self(key) if isinstance(key, nn.Module) else key

    def _function(self, function: types.FunctionType) -> Any:
        """A function over the copies of what its closure and its defaults hold (a forward put in place of another)."""
        cells = function.__closure__ or ()
        old = [content(c) for c in cells]
        new = [self(v) for v in old]
        defaults = self(function.__defaults__)
        if all(a is b for a, b in zip(old, new, strict=True)) and not any(map(_mutable, function.__defaults__ or ())):
            return function
        kept = [c if a is b else types.CellType(b) for c, a, b in zip(cells, old, new, strict=True)]
        made = types.FunctionType(function.__code__, function.__globals__, function.__name__, defaults, tuple(kept))
        made.__kwdefaults__ = function.__kwdefaults__
        made.__dict__.update(function.__dict__)
        return made

    def _object(self, value: Any) -> Any:
        """An object of a class of the person's, or one that holds modules somewhere, with their shells in it."""
        own = getattr(value, "__dict__", None)
        if not isinstance(own, dict) or type(value).__module__.split(".")[0] in ("torch", "builtins"):
            return value
        if not of_the_person(value) and not _reaches_module(own.values()):
            return value
        inside = {k: self(v) for k, v in own.items()}
        try:
            made = object.__new__(type(value))
            made.__dict__.update(inside)
        except Exception:  # made in another way
            return value
        return made


def slots_of(value: Any) -> list[str]:
    """Names of the attributes that an object keeps in slots."""
    names = [n for c in type(value).__mro__ for n in _names(c) if not n.startswith("__")]
    return [n for n in names if hasattr(value, n)]


def _names(kind: type) -> list[str]:
    slots = vars(kind).get("__slots__", ())
    return [slots] if isinstance(slots, str) else [n for n in slots if isinstance(n, str)]


def of_the_person(value: Any) -> bool:
    """Whether an object is of a class that is neither Python's nor torch's nor NumPy's; a SimpleNamespace counts."""
    home = type(value).__module__.split(".")[0]
    known = home in sys.stdlib_module_names or home in ("torch", "numpy")
    return isinstance(value, types.SimpleNamespace) or not known


def _reaches_module(values: Any, depth: int = 4) -> bool:
    """Whether a module is among some values, or in containers, methods and objects among them."""
    for v in values:
        if isinstance(v, nn.Module):
            return True
        if not depth or isinstance(v, SIMPLE):
            continue
        inside: Any = ()
        if isinstance(v, dict):
            inside = v.values()
        elif isinstance(v, CONTAINERS):
            inside = v
        elif isinstance(v, types.MethodType):
            inside = (v.__self__,)
        elif not isinstance(v, Tensor | type | types.ModuleType | types.FunctionType):
            inside = getattr(v, "__dict__", {}).values()
        if _reaches_module(list(inside), depth - 1):
            return True
    return False


def _mutable(value: Any) -> bool:
    return isinstance(value, (nn.Module, Tensor, *CONTAINERS))


def content(cell: types.CellType) -> Any:
    """What a cell of a closure holds."""
    try:
        return cell.cell_contents
    except ValueError:  # not bound yet
        return None


class _Float32(TorchFunctionMode):
    """Tensors made without a dtype are float32, whatever the process's default is."""

    FLOATS = frozenset(
        getattr(torch, name)
        for name in ("zeros", "ones", "empty", "rand", "randn", "linspace", "logspace", "eye", "scalar_tensor",
                     "hann_window", "hamming_window", "bartlett_window", "blackman_window")
    )  # fmt: skip
    INFERRED = frozenset([torch.full, torch.tensor, torch.as_tensor, torch.arange])  # the type is that of what is given

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") is None and kwargs.get("out") is None:
            if func in self.FLOATS:
                kwargs["dtype"] = torch.float32
            elif func in self.INFERRED and not any(hasattr(a, "dtype") for a in args):
                made = func(*args, **kwargs)
                return made.to(torch.float32) if made.is_floating_point() else made
        return func(*args, **kwargs)


@contextlib.contextmanager
def neutral() -> Iterator[None]:
    """What surrounds a call of fastgen does not reach forward: gradients, inference mode, autocast, default device and
    default dtype, of this thread alone."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if torch.get_default_dtype() != torch.float32:
            stack.enter_context(_Float32())
        yield
