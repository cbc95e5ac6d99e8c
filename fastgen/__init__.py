"""fastgen: exact, fast incremental sampling of trained autoregressive PyTorch modules, as they are."""

from fastgen import heads, models
from fastgen.api import Sampler, compile, forget, sample
from fastgen.errors import (
    Cancelled,
    CheckpointError,
    FastgenError,
    ModelChangedError,
    NotCausalError,
    OutputError,
    ShapeError,
    UnsupportedError,
    VerifyError,
)
from fastgen.pretrained import from_pretrained, save_pretrained
from fastgen.verify import VerifyReport

__version__ = "0.1.0"

__all__ = [
    "Cancelled", "CheckpointError", "FastgenError", "ModelChangedError", "NotCausalError", "OutputError", "Sampler",
    "ShapeError", "UnsupportedError", "VerifyError", "VerifyReport", "compile", "forget", "from_pretrained", "heads", "models",
    "sample", "save_pretrained",
]  # fmt: skip
