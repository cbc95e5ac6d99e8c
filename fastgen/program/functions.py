"""The functions of vector programs by name, as the extension was built with them (csrc/functions.def)."""

from __future__ import annotations

from functools import cache

from fastgen.native import native


@cache
def function_codes() -> dict[str, int]:
    """What stands in Micro.fn, by name."""
    return {name.lower(): code for name, code, _ in native().functions()}


@cache
def function_names() -> dict[int, str]:
    """The inverse."""
    return {code: name for name, code in function_codes().items()}
