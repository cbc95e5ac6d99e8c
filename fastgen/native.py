"""The C++ extension."""

from __future__ import annotations

from typing import Any

from fastgen.errors import FastgenError


def native() -> Any:
    """The extension module, loaded when it is first needed. Raises FastgenError that says how to build it."""
    try:
        import fastgen._native as _native
    except ImportError as error:
        raise FastgenError(f"the C++ extension is not built ({error}); run `pip install -e .` or `make`") from error
    return _native
