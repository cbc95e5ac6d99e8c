"""A training run at a step, in one safetensors file: weights, average, Adam's moments, random state."""

import contextlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastgen.errors import CheckpointError, OutputError
from fastgen.models.base import ReferenceModel
from fastgen.train.recipes import Recipe


@dataclass
class TrainState:
    """A model in training. `average` and Adam's moments are kept by parameter name."""

    model: ReferenceModel
    optimiser: torch.optim.Adam
    ema: dict[str, Tensor]
    step: int = 0

    @classmethod
    def fresh(cls, model: ReferenceModel, lr: float) -> "TrainState":
        ema = {name: p.detach().clone() for name, p in model.named_parameters()}
        return cls(model, torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.99)), ema)

    @torch.no_grad()
    def average(self, decay: float) -> None:
        """Move the averaged weights towards the current ones: ema = decay * ema + (1 - decay) * weight."""
        for name, p in self.model.named_parameters():
            self.ema[name].lerp_(p, 1.0 - decay)

    @torch.no_grad()
    def use_average(self) -> None:
        """Put the averaged weights into the model."""
        for name, p in self.model.named_parameters():
            p.copy_(self.ema[name])

    def tensors(self) -> dict[str, Tensor]:
        """Everything as named tensors: weight.*, ema.*, adam.<moment>.*, rng.torch."""
        out = {"rng.torch": torch.get_rng_state()}
        for name, p in self.model.named_parameters():
            out[f"weight.{name}"] = p.detach()
            out[f"ema.{name}"] = self.ema[name]
            moments = self.optimiser.state[p] or {k: torch.zeros_like(p) for k in ("exp_avg", "exp_avg_sq")}
            for kind in ("exp_avg", "exp_avg_sq"):
                out[f"adam.{kind}.{name}"] = moments[kind]
        return {key: t.contiguous() for key, t in out.items()}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], step: int) -> None:
        """The inverse of `tensors`, at optimiser step `step`."""
        for name, p in self.model.named_parameters():
            p.copy_(tensors[f"weight.{name}"])
            self.ema[name].copy_(tensors[f"ema.{name}"])
            if step > 0:
                moments = {k: tensors[f"adam.{k}.{name}"].clone() for k in ("exp_avg", "exp_avg_sq")}
                self.optimiser.state[p] = {"step": torch.tensor(float(step)), **moments}
        self.step = step
        torch.set_rng_state(tensors["rng.torch"])


def save_state(path: Path, state: TrainState, recipe: Recipe, seed: int) -> None:
    """Write the state, replacing an older one in one move. Raises OutputError; nothing half-written stays."""
    about = json.dumps({"step": state.step, "seed": seed, "recipe": asdict(recipe)}, sort_keys=True)
    write_atomically(path, lambda temporary: save_file(state.tensors(), temporary, metadata={"state": about}))


def load_state(path: Path, state: TrainState, recipe: Recipe, seed: int) -> None:
    """Read a state into `state` and the global random state. CheckpointError leaves both unchanged."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("state", "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot resume from {path}: {error}") from error
    if not isinstance(about, dict):
        raise CheckpointError(
            f"cannot resume from {path}: its state is a JSON {type(about).__name__}, expected an object"
        )
    expected = {"seed": seed, "recipe": json.loads(json.dumps(asdict(recipe)))}
    for key, value in expected.items():
        if about.get(key) != value:
            raise CheckpointError(f"cannot resume from {path}: its {key} is {about.get(key)}, expected {value}")
    step = about.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 1 << 31:
        raise CheckpointError(f"cannot resume from {path}: its step is {step!r}, expected a number of steps")
    _check_tensors(path, tensors, state.tensors())
    state.restore(tensors, step)


def _check_tensors(path: Path, given: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Raises CheckpointError where tensors are not such as a run writes."""

    def what(t: Tensor | None) -> str:
        return "missing" if t is None else f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"

    for key in sorted(wanted.keys() | given.keys()):
        found, like = given.get(key), wanted.get(key)
        if found is None or like is None or (found.dtype, found.shape) != (like.dtype, like.shape):
            raise CheckpointError(f"cannot resume from {path}: {key} is {what(found)}, expected {what(like)}")
        if found.is_floating_point() and not bool(found.isfinite().all()):
            raise CheckpointError(f"cannot resume from {path}: {key} holds values that are not finite")
        if key.startswith("adam.exp_avg_sq.") and bool((found < 0).any()):
            raise CheckpointError(f"cannot resume from {path}: {key} holds squares below 0")
    try:
        torch.Generator().set_state(given["rng.torch"])
    except RuntimeError as error:
        raise CheckpointError(f"cannot resume from {path}: rng.torch: {error}") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file in one move. Raises OutputError."""
    write_atomically(path, lambda temporary: temporary.write_text(text))


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then move it there. OutputError: nothing is left behind."""
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        temporary.chmod(0o644)  # temporary files are readable for their owner alone
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        raise OutputError(f"cannot write {path}: {error}") from error
