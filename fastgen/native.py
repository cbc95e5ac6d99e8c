"""The C++ extension."""

from __future__ import annotations

from typing import Any

from fastgen.errors import FastgenError

try:
    import fastgen._native as _native
except ImportError as error:  # not built: said when it is needed
    _native, _missing = None, error


def native() -> Any:
    """The extension module. Raises FastgenError that says how to build it."""
    if _native is None:
        raise FastgenError(
            f"the C++ extension is not built ({_missing}); run `pip install -e .` or `make`"
        ) from _missing
    return _native
