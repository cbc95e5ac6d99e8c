"""What every executor offers, and what it is made from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from fastgen.backends.conditioning import Conditioning
from fastgen.backends.request import Request
from fastgen.program.programs import Programs
from fastgen.spec import Spec


@dataclass(frozen=True)
class Setting:
    """What an executor is made from."""

    model: nn.Module  # a private view of the person's, where that is
    spec: Spec
    programs: Programs
    conditioning: Conditioning
    dtype: torch.dtype
    device: torch.device
    threads: int | None = None  # of the cpu executor
    team: str = "auto"  # of the cuda executor


class Executor(ABC):
    """Runs a plan (or, for the oracle, the module itself)."""

    name: ClassVar[str]
    device_type: ClassVar[str] = "cpu"  # of the devices it runs on
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32, torch.bfloat16)  # of weights
    oracle: ClassVar[bool] = False  # runs forward itself, so that there is nothing to verify
    device: torch.device = torch.device("cpu")  # where results are

    @classmethod
    def make(cls, setting: Setting) -> Self:
        """The executor of a sampler, for those in the registry."""
        raise NotImplementedError(f"{cls.__name__} is made by hand, not by compile")

    @classmethod
    def place(cls, device: torch.device) -> torch.device:
        """The device in full. Raises UnsupportedError where it cannot be used."""
        return device

    @abstractmethod
    def run(self, request: Request) -> tuple[Tensor, Tensor | None]:
        """Values [slots, H*W, C] float32, and if wanted the parameters [slots, steps, P] before every draw."""

    def describe(self) -> str:
        """A line for the plan, where there is something to say."""
        return ""

    def slots(self, length: int | None) -> int:
        """How many samples to run at once."""
        return 16

    def ready(self) -> None:
        """Raises FastgenError where a run cannot begin now; asked before anything else."""
        return None

    def aside(self) -> AbstractContextManager[Any]:
        """What a thread enters to run beside the thread that calls this, while that goes on using the device."""
        return nullcontext()


class CompiledExecutor(Executor):
    """One that runs programs."""

    programs: Programs
    conditioning: Conditioning
    dtype: torch.dtype
    rounds_activations: bool = False  # too, in products, where weights are in low precision

    @property
    def weights_in(self) -> torch.dtype:
        """The dtype of its weights."""
        return self.dtype
