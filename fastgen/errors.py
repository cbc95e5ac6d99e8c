"""The errors that fastgen raises. Each message names the thing, what was given and what was expected."""


class FastgenError(Exception):
    """Base class of every error of this package."""


class ShapeError(FastgenError, ValueError):
    """A tensor or a parameter has the wrong shape, dtype or number."""


class NotCausalError(FastgenError):
    """The module reads a value that has not been drawn yet; the message names layer and tap."""


class UnsupportedError(FastgenError):
    """The module uses an operation that the planner or the chosen executor does not have."""


class ModelChangedError(FastgenError):
    """The module's weights differ from those the sampler was compiled with."""


class VerifyError(FastgenError):
    """Stepping does not reproduce the module's forward, so no sampler is handed over."""


class CheckpointError(FastgenError, ValueError):
    """A checkpoint is truncated, oversized, mis-shaped or not finite."""


class OutputError(FastgenError, OSError):
    """An output file cannot be written; nothing has been left behind."""


class Cancelled(FastgenError):
    """A callback ended the sampling."""
