"""What the kernels share: activations, Philox, tiles, and the interpreter's gaps.

Under TRITON_INTERPRET=1 kernels run as NumPy on CPU tensors. There a product of bfloat16 tiles is wrong without a word
and libdevice does not exist; so tiles are widened to float32 before a product when interpreting, and tanh is made of
exp everywhere. Rounding of float32 to bfloat16 differs there too (it truncates), which tests allow for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
GATES = {"none": 0, "linear": 1, "tanh": 2}
SPLIT = 3  # no gate: residual and skip


class Tile(NamedTuple):
    """Rows (pixels), columns and depth of a program's product; warps and pipeline stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


def cdiv(a: int, b: int) -> int:
    """a / b rounded up; Triton's own takes 5 us when it is called outside a kernel."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()


CONVOLUTION, MATRIX = 0, 1  # whose setting for float32 a product follows


def product(dtype: torch.dtype, kind: int) -> dict[str, Any]:
    """In what type tiles are multiplied: DOT and PRECISION of the kernels.

    float32 as torch's own operations of that kind, so by default convolutions in TF32 and matrix products exactly:
    torch.backends.cudnn.conv.fp32_precision and torch.backends.cuda.matmul.fp32_precision.
    """
    setting = torch.backends.cudnn.conv if kind == CONVOLUTION else torch.backends.cuda.matmul
    types = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    precision = "tf32" if setting.fp32_precision == "tf32" else "ieee"
    return {"DOT": tl.float32 if INTERPRETED else types[dtype], "PRECISION": precision}


NARROW = 32  # columns


def choose(tiles: dict[tuple[str, str], Tile], dtype: torch.dtype, size: Sequence[int], channels: int) -> Tile:
    """From a table by width of the numbers and size of an image; with narrow columns where more than a tenth of wide
    ones would be empty: few channels, or 160, which are five times 32 but three times 64.

    The batch has no say, nor has the length of a single row of pixels, which may be the rows of a product: so the bytes
    of a sample, or of such a row, do not depend on how many others there are.
    """
    width = "single" if dtype == torch.float32 else "half"
    tile = tiles[width, "small" if size[0] == 1 or size[0] * size[1] <= 64 else "large"]
    saved = cdiv(channels, tile.n) * tile.n - cdiv(channels, NARROW) * NARROW
    return tile._replace(n=NARROW) if 10 * saved > channels else tile


# ---- activations -------------------------------------------------------------------------------------------
@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    e = tl.exp(-2.0 * tl.abs(x))  # never overflows
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def elu_pair(x):
    """elu(x) and elu(-x), the two halves of concat_elu: one is |x|, the other e^-|x| - 1. NaN goes into both."""
    e = tl.exp(-tl.abs(x)) - 1.0
    return tl.where(x > 0, x, e), tl.where(x < 0, -x, e)


@triton.jit
def elu_slopes(x):
    """The slopes of ELU at x and at -x."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x > 0, 1.0, e), tl.where(x < 0, 1.0, e)


# ---- noise -------------------------------------------------------------------------------------------------
@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 as in fastgen/rng.py and csrc/rng.h; all words uint32."""
    for _ in tl.static_range(10):
        even = c0.to(tl.uint64) * 0xD2511F53
        odd = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (odd >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (even >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = (odd & 0xFFFFFFFF).to(tl.uint32)
        c3 = (even & 0xFFFFFFFF).to(tl.uint32)
        k0 = (k0.to(tl.uint64) + 0x9E3779B9).to(tl.uint32)
        k1 = (k1.to(tl.uint64) + 0xBB67AE85).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def unit_interval(bits):
    """32 random bits as an odd multiple of 2**-33 inside (0, 1), in float64; exact."""
    return (bits.to(tl.float64) + 0.5) * 2.3283064365386963e-10
