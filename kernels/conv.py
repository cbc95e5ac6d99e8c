"""Convolution with everything around it: pads, concat_elu, bias, conditioning, gate, residual; or residual and skip.

An implicit matrix product. A program owns BM output pixels of one sample and BN gated channels, and makes both halves
a and b of its channels, so that the gate needs nobody else: pre[p, n] = sum over taps and channels of x[p + tap, c]
weight[n, tap, c]. One loop runs over taps times blocks of BK channels, so loads are pipelined across taps; a tap
outside the image is masked to zero, which is all that asymmetric pads, shifts, dilation and causality are. With ELU a
block of x is loaded once and multiplied twice, as elu(x) and elu(-x) of one exponential, by the two halves of the
weight's inputs. The weight is read as [outputs, taps, inputs], the memory of a channels-last weight. Offsets within a
sample are 32-bit, sample bases 64-bit. Programs of the same pixels are neighbours, so that x comes from L2 for all but
the first. A row product is the case of one row of pixels and one tap.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels.common import CONVOLUTION, GATES, SPLIT, Tile, cdiv, choose, elu_pair, product, sigmoid, tanh

# Two accumulators of BM x BN float32 are at most 64 registers a thread; three stages of x and of four blocks of weight
# are at most 74 KiB of shared memory, two programs to a multiprocessor.
TILES = {
    ("half", "small"): Tile(64, 64, 32, 4, 3),
    ("half", "large"): Tile(128, 64, 32, 8, 3),
    ("single", "small"): Tile(64, 32, 32, 8, 2),
    ("single", "large"): Tile(64, 32, 32, 8, 2),
}


@triton.jit
def conv_forward(
    x, weight, bias, cond, residual, y, pre, skip, scale, IH, IW, CIN, OH, OW, COUT, R, top, left, sy, sx, dy, dx,
    KH: tl.constexpr, KW: tl.constexpr, GATE: tl.constexpr, ELU: tl.constexpr, LAST: tl.constexpr,
    COND_MAP: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """COUT: channels behind the gate; GATE as in `GATES`, 3: the first R of COUT are residual, the others skip."""
    GATED: tl.constexpr = GATE == 1 or GATE == 2
    P = OH * OW
    nt = tl.cdiv(COUT, BN)
    mt = tl.cdiv(P, BM)
    pid = tl.program_id(0)
    tile = pid // nt
    b = (tile // mt).to(tl.int64)
    p = (tile % mt) * BM + tl.arange(0, BM)
    n = (pid % nt) * BN + tl.arange(0, BN)
    ih0 = (p // OW) * sy - top
    iw0 = (p % OW) * sx - left
    outputs = COUT * 2 if GATED else COUT
    inputs = CIN * 2 if ELU else CIN
    x += b * CIN * IH * IW
    wn = n[None, :] * (KH * KW * inputs)
    far = COUT * (KH * KW * inputs)  # from the weight of a to that of b
    acc_a = tl.zeros((BM, BN), tl.float32)
    acc_b = tl.zeros((BM, BN), tl.float32)
    blocks = tl.cdiv(CIN, BK)
    for i in range(KH * KW * blocks):
        tap = i // blocks
        c = (i % blocks) * BK + tl.arange(0, BK)
        ih = ih0 + (tap // KW) * dy
        iw = iw0 + (tap % KW) * dx
        inside = (p < P) & (ih >= 0) & (ih < IH) & (iw >= 0) & (iw < IW)
        at = ih * IW + iw
        xo = at[:, None] * CIN + c[None, :] if LAST else at[:, None] + c[None, :] * (IH * IW)
        xt = tl.load(x + xo, mask=inside[:, None] & (c < CIN)[None, :], other=0.0)
        wo = wn + (tap * inputs + c)[:, None]
        wm = (n < COUT)[None, :] & (c < CIN)[:, None]
        if ELU:
            first, second = elu_pair(xt.to(tl.float32))
            first = first.to(DOT)
            second = second.to(DOT)
        else:
            first = xt.to(DOT)
        wa = tl.load(weight + wo, mask=wm, other=0.0).to(DOT)
        acc_a = tl.dot(first, wa, acc_a, input_precision=PRECISION)
        if GATED:
            wb = tl.load(weight + wo + far, mask=wm, other=0.0).to(DOT)
            acc_b = tl.dot(first, wb, acc_b, input_precision=PRECISION)
        if ELU:
            wa = tl.load(weight + wo + CIN, mask=wm, other=0.0).to(DOT)
            acc_a = tl.dot(second, wa, acc_a, input_precision=PRECISION)
            if GATED:
                wb = tl.load(weight + wo + far + CIN, mask=wm, other=0.0).to(DOT)
                acc_b = tl.dot(second, wb, acc_b, input_precision=PRECISION)

    live = (p < P)[:, None] & (n < COUT)[None, :]
    if bias is not None:
        acc_a += tl.load(bias + n, mask=n < COUT, other=0.0).to(tl.float32)[None, :]
        if GATED:
            acc_b += tl.load(bias + COUT + n, mask=n < COUT, other=0.0).to(tl.float32)[None, :]
    front = p[:, None] * outputs + n[None, :] if LAST else p[:, None] + n[None, :] * P
    to_b = COUT if LAST else COUT * P
    if cond is not None:
        if COND_MAP:
            here = cond + b * outputs * P + front
            acc_a += tl.load(here, mask=live, other=0.0).to(tl.float32)
            if GATED:
                acc_b += tl.load(here + to_b, mask=live, other=0.0).to(tl.float32)
        else:
            here = cond + b * outputs + n
            acc_a += tl.load(here, mask=n < COUT, other=0.0).to(tl.float32)[None, :]
            if GATED:
                acc_b += tl.load(here + COUT, mask=n < COUT, other=0.0).to(tl.float32)[None, :]
    if pre is not None:
        here = pre + b * outputs * P + front
        tl.store(here, acc_a, mask=live)
        if GATED:
            tl.store(here + to_b, acc_b, mask=live)
    if GATE == 1:
        acc_a = acc_a * sigmoid(acc_b)
    if GATE == 2:
        acc_a = tanh(acc_a) * sigmoid(acc_b)
    if GATE == 3:
        own = live & (n < R)[None, :]
        at_x = b * R * P + (p[:, None] * R + n[None, :] if LAST else p[:, None] + n[None, :] * P)
        xt = tl.load(residual + at_x, mask=own, other=0.0).to(tl.float32)
        tl.store(y + at_x, (acc_a + xt) * scale, mask=own)
        S = COUT - R
        m = n - R
        at_skip = b * S * P + (p[:, None] * S + m[None, :] if LAST else p[:, None] + m[None, :] * P)
        tl.store(skip + at_skip, acc_a, mask=live & (m >= 0)[None, :])
    else:
        out = b * COUT * P + (p[:, None] * COUT + n[None, :] if LAST else p[:, None] + n[None, :] * P)
        if residual is not None:
            acc_a += tl.load(residual + out, mask=live, other=0.0).to(tl.float32)
        tl.store(y + out, acc_a, mask=live)


def pack(weight: Tensor) -> Tensor:
    """[outputs, inputs, kh, kw] in the memory order that the kernels read; itself if channels-last or 1x1."""
    return weight.contiguous(memory_format=torch.channels_last)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, cond: Tensor | None, residual: Tensor | None, y: Tensor, pre: Tensor,
    geometry: Sequence[int], gate: str, elu: bool, channels_last: bool,
) -> None:  # fmt: skip
    """Fills y and, unless it is empty, pre; all images in the layout that is named."""
    tile = choose(TILES, x.dtype, y.shape[2:], y.shape[1])
    cond_map = cond is not None and cond.shape[2] * cond.shape[3] > 1
    conv_forward[_grid(y, y.shape[1], tile)](
        x, pack(weight), bias, cond, residual, y, pre if pre.numel() else None, None, 1.0,
        x.shape[2], x.shape[3], x.shape[1], y.shape[2], y.shape[3], y.shape[1], 0,
        geometry[2], geometry[0], *geometry[4:8], weight.shape[2], weight.shape[3],
        GATES[gate], elu, channels_last, cond_map, **product(x.dtype, geometry[8]),
        BM=tile.m, BN=tile.n, BK=tile.k, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def residual_skip(
    h: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor, out: Tensor, skip: Tensor, scale: float,
    channels_last: bool,
) -> None:  # fmt: skip
    """Fills out = (x + (weight h + bias)[:R]) * scale and skip = (weight h + bias)[R:]."""
    tile = choose(TILES, h.dtype, h.shape[2:], weight.shape[0])
    size = h.shape[2:]
    conv_forward[_grid(h, weight.shape[0], tile)](
        h, pack(weight), bias, None, x, out, None, skip, scale, *size, h.shape[1], *size, weight.shape[0], x.shape[1],
        0, 0, 1, 1, 1, 1, 1, 1, SPLIT, False, channels_last, False, **product(h.dtype, CONVOLUTION),
        BM=tile.m, BN=tile.n, BK=tile.k, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _grid(y: Tensor, channels: int, tile: Tile) -> tuple[int]:
    pixels = cdiv(y.shape[2] * y.shape[3], tile.m)
    return (y.shape[0] * pixels * cdiv(channels, tile.n),)
