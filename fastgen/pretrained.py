"""Checkpoints: a directory with config.json (which model) and model.safetensors (its weights). No pickle.

A checkpoint is checked against its configuration before any weight is used: a truncated, oversized,
mis-shaped or non-finite one is refused with the tensor's name.
"""

import contextlib
import json
import os
import shutil
import struct
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from fastgen.errors import CheckpointError, FastgenError, OutputError
from fastgen.models.base import ReferenceModel
from fastgen.models.registry import build

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_PARAMETERS = 4  # that may be made for one that stays: weight norm makes new ones of old
Header = tuple[dict[str, Any], int, int]  # tensors by name, where their data starts, bytes of the file
_SHIPPED = Path(__file__).parent / "checkpoints"


def shipped() -> list[str]:
    """Names of the trained checkpoints that come with the package."""
    return sorted(p.parent.name for p in _SHIPPED.glob(f"*/{_CONFIG}"))


def save_pretrained(model: ReferenceModel, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Write model.config and the weights, stored as `dtype`, to the directory `path`.

    A checkpoint there is replaced. The directory appears complete or not at all. Raises OutputError if it
    cannot be written or holds something other than a checkpoint; CheckpointError if a weight is not finite
    (in `dtype`).
    """
    path = Path(path)
    tensors = {}
    for name, tensor in model.state_dict().items():
        stored = tensor.detach().to("cpu", dtype).contiguous()
        if not torch.isfinite(stored).all():
            raise CheckpointError(f"{name} holds values that are not finite in {dtype}; not saved to {path}")
        tensors[name] = stored
    if path.exists() and not _replaceable(path):
        raise OutputError(f"cannot write {path}: it exists and is not a checkpoint directory")
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        temporary.chmod(0o755)
        (temporary / _CONFIG).write_text(json.dumps(model.config, indent=2) + "\n")
        save_file(tensors, temporary / _WEIGHTS)
        (temporary / _WEIGHTS).chmod(0o644)  # safetensors makes it readable for its owner alone
        _replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot write {path}: {error}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _replaceable(path: Path) -> bool:
    return path.is_dir() and {p.name for p in path.iterdir()} <= {_CONFIG, _WEIGHTS}


def _replace(temporary: Path, path: Path) -> None:
    """Move a finished directory to `path`; an older checkpoint there goes once the new one is in place."""
    if not path.exists():
        os.rename(temporary, path)
        return
    older = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    os.rename(path, older / "old")
    try:
        os.rename(temporary, path)
    except OSError:
        os.rename(older / "old", path)
        raise
    finally:
        shutil.rmtree(older, ignore_errors=True)


def from_pretrained(name_or_path: str | Path) -> ReferenceModel:
    """The model of a checkpoint directory, or of a shipped name, in float32 and eval mode on the CPU.

    Raises CheckpointError naming the file or tensor, what was given and what was expected.
    """
    path = Path(name_or_path)
    if not path.is_dir() and str(name_or_path) in shipped():
        path = _SHIPPED / str(name_or_path)
    if not path.is_dir():
        names = ", ".join(shipped()) or "none"
        raise CheckpointError(f"no checkpoint {name_or_path}: no such directory; shipped names: {names}")
    config = _read_config(path / _CONFIG)
    header = _read_header(path / _WEIGHTS)
    try:
        # Shapes only, and no more of them than there are weights for: an absurd configuration must cost neither memory nor time.
        with torch.device("meta"), _at_most(_PARAMETERS * len(header[0]) + _PARAMETERS):
            expected = {k: tuple(t.shape) for k, t in build(config).state_dict().items()}
    except _TooMany:
        raise CheckpointError(
            f"{path / _CONFIG}: describes a model of far more tensors than the {len(header[0])} that {_WEIGHTS} holds"
        ) from None
    except (FastgenError, ValueError, TypeError, RuntimeError, ArithmeticError, MemoryError) as error:
        raise CheckpointError(f"{path / _CONFIG}: {error}") from error
    _check_header(path / _WEIGHTS, header, expected)
    try:
        tensors = load_file(path / _WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path / _WEIGHTS}: {error}") from error
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise CheckpointError(f"{path / _WEIGHTS}: {key} has {bad} values that are not finite, expected none")
    with torch.random.fork_rng(devices=[]):
        model = build(config)
    model.load_state_dict({k: t.to(torch.float32) for k, t in tensors.items()})
    return model.eval()


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(config).__name__}, expected an object")
    return config


class _TooMany(Exception):
    """More parameters are made than may be."""


@contextlib.contextmanager
def _at_most(parameters: int) -> Iterator[None]:
    """Raises _TooMany where this thread makes more parameters meanwhile."""
    thread, made = threading.get_ident(), 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal made
        made += threading.get_ident() == thread
        if made > parameters:
            raise _TooMany

    hook = torch.nn.modules.module.register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def _check_header(path: Path, found: Header, expected: dict[str, tuple[int, ...]]) -> None:
    """Refuse a weight file whose names, shapes or size are not those of the configuration."""
    header, start, size = found
    missing = sorted(expected.keys() - header.keys())
    extra = sorted(header.keys() - expected.keys())
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"holds {extra[0]}, which the configuration does not have"
        raise CheckpointError(f"{path}: {what} ({len(header)} tensors given, {len(expected)} expected)")
    total = start
    for key, shape in expected.items():
        entry = header[key]
        given, dtype = (entry.get("shape"), entry.get("dtype")) if isinstance(entry, dict) else (None, None)
        if given != list(shape):
            raise CheckpointError(f"{path}: {key} has shape {given}, expected {list(shape)}")
        if not isinstance(dtype, str) or dtype not in _BYTES:
            raise CheckpointError(f"{path}: {key} has dtype {dtype!r}, expected one of {', '.join(_BYTES)}")
        total += _BYTES[dtype] * int(torch.Size(shape).numel())
    if size != total:
        problem = "truncated" if size < total else "oversized"
        raise CheckpointError(f"{path}: {problem}: {size} bytes given, expected {total}")


def _read_header(path: Path) -> Header:
    """The tensors named in a safetensors file, where their data starts, and the size of the file (bytes)."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
            if 8 + length > size:
                raise CheckpointError(f"{path}: truncated: {size} bytes given, expected at least {8 + length}")
            header = json.loads(file.read(length))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: its header is a JSON {type(header).__name__}, expected an object")
    header.pop("__metadata__", None)
    return header, 8 + length, size
