"""Gradients of the convolutions in conv.py: front (gate and bias), input, weight.

The front kernels turn the gradient of y into that of what stands in front of the gate, once, for the two products that
read it (per tap and per tile they would make it again some twenty times); while they hold it they sum it over their
pixels, so that the gradients of bias and of conditioning per sample cost no further pass. Partial sums go to a buffer
and are added in a fixed order: no atomics. The input's gradient is the forward's loop turned round: a program owns BM
input pixels and BN input channels, and with concat_elu both halves of the doubled inputs, which the slope of ELU joins
at the end. The weight's gradient is a product over pixels: a program owns BM outputs, BN inputs and one tap, and goes
through a share of all chunks of BK pixels; so many shares that the GPU is full, added afterwards in order. x is read in
place and ELU made again on the fly, so neither concat_elu nor a padded copy is ever kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels.common import GATES, SPLIT, Tile, cdiv, choose, elu_pair, elu_slopes, product, sigmoid, tanh
from fastgen.kernels.conv import pack

FRONT_TILE = Tile(32, 32, 0, 4, 1)
INPUT_TILES = {
    ("half", "small"): Tile(64, 64, 32, 4, 3),
    ("half", "large"): Tile(128, 64, 32, 8, 3),
    ("single", "small"): Tile(64, 32, 32, 8, 2),
    ("single", "large"): Tile(64, 32, 32, 8, 2),
}
WEIGHT_TILES = {
    ("half", "small"): Tile(64, 64, 64, 4, 3),
    ("half", "large"): Tile(64, 64, 64, 4, 3),
    ("single", "small"): Tile(32, 32, 32, 4, 2),
    ("single", "large"): Tile(32, 32, 32, 4, 2),
}
FILL = 528  # programs that fill a large GPU: four to each of 132 multiprocessors


@triton.jit
def front_backward(
    grad, other, front, partial, scale, P, C, S, GATE: tl.constexpr, LAST: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """grad [B, C, P]; other: what stood in front of a gate [B, 2C, P], or for GATE 3 the gradient of skip [B, S, P].

    front [B, 2C or C + S, P]; partial [B, blocks of pixels, 2C or C + S].
    """
    outputs = C + S if GATE == 3 else 2 * C
    columns = outputs if GATE == 3 else C
    nt = tl.cdiv(columns, BN)
    mt = tl.cdiv(P, BM)
    pid = tl.program_id(0)
    tile = (pid // nt).to(tl.int64)
    b = tile // mt
    p = (pid // nt) % mt * BM + tl.arange(0, BM)
    n = (pid % nt) * BN + tl.arange(0, BN)
    live = (p < P)[:, None] & (n < columns)[None, :]
    into = front + b * outputs * P + (p[:, None] * outputs + n[None, :] if LAST else p[:, None] + n[None, :] * P)
    sums = partial + tile * outputs + n
    own = live & (n < C)[None, :]
    at = b * C * P + (p[:, None] * C + n[None, :] if LAST else p[:, None] + n[None, :] * P)
    g = tl.load(grad + at, mask=own, other=0.0).to(tl.float32)
    if GATE == 3:
        m = n - C
        at = b * S * P + (p[:, None] * S + m[None, :] if LAST else p[:, None] + m[None, :] * P)
        g_skip = tl.load(other + at, mask=live & (m >= 0)[None, :], other=0.0).to(tl.float32)
        g = g * scale + g_skip
        tl.store(into, g, mask=live)
        tl.store(sums, tl.sum(g, 0), mask=n < columns)
    else:
        to_b = C if LAST else C * P
        at = b * outputs * P + (p[:, None] * outputs + n[None, :] if LAST else p[:, None] + n[None, :] * P)
        u = tl.load(other + at, mask=live, other=0.0).to(tl.float32)
        s = sigmoid(tl.load(other + at + to_b, mask=live, other=0.0).to(tl.float32))
        if GATE == 2:
            u = tanh(u)
        ga = g * s * (1.0 - u * u) if GATE == 2 else g * s
        gb = g * u * s * (1.0 - s)
        tl.store(into, ga, mask=live)
        tl.store(into + to_b, gb, mask=live)
        tl.store(sums, tl.sum(ga, 0), mask=n < C)
        tl.store(sums + C, tl.sum(gb, 0), mask=n < C)


@triton.jit
def input_backward(
    front, weight, x, grad, IH, IW, CIN, OH, OW, N, top, left, sy, sx, dy, dx,
    KH: tl.constexpr, KW: tl.constexpr, ELU: tl.constexpr, STRIDED: tl.constexpr, LAST: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """grad[b, c, q] = sum over taps and outputs of front[b, n, (q + pad - tap) / stride] weight[n, tap, c]."""
    P = IH * IW
    nt = tl.cdiv(CIN, BN)
    mt = tl.cdiv(P, BM)
    pid = tl.program_id(0)
    tile = pid // nt
    b = (tile // mt).to(tl.int64)
    q = (tile % mt) * BM + tl.arange(0, BM)
    c = (pid % nt) * BN + tl.arange(0, BN)
    oh0 = q // IW + top
    ow0 = q % IW + left
    inputs = CIN * 2 if ELU else CIN
    front += b * N * OH * OW
    acc = tl.zeros((BM, BN), tl.float32)
    acc2 = tl.zeros((BM, BN), tl.float32)
    blocks = tl.cdiv(N, BK)
    for i in range(KH * KW * blocks):
        tap = i // blocks
        n = (i % blocks) * BK + tl.arange(0, BK)
        oh = oh0 - (tap // KW) * dy
        ow = ow0 - (tap % KW) * dx
        inside = (q < P) & (oh >= 0) & (ow >= 0)
        if STRIDED:  # of the taps of a pixel those that a window put there
            inside = inside & (oh % sy == 0) & (ow % sx == 0)
            oh = oh // sy
            ow = ow // sx
        inside = inside & (oh < OH) & (ow < OW)
        at = oh * OW + ow
        fo = at[:, None] * N + n[None, :] if LAST else at[:, None] + n[None, :] * (OH * OW)
        g = tl.load(front + fo, mask=inside[:, None] & (n < N)[None, :], other=0.0).to(DOT)
        wo = n[:, None] * (KH * KW * inputs) + (tap * inputs + c)[None, :]
        wm = (n < N)[:, None] & (c < CIN)[None, :]
        w = tl.load(weight + wo, mask=wm, other=0.0).to(DOT)
        acc = tl.dot(g, w, acc, input_precision=PRECISION)
        if ELU:
            w = tl.load(weight + wo + CIN, mask=wm, other=0.0).to(DOT)
            acc2 = tl.dot(g, w, acc2, input_precision=PRECISION)
    live = (q < P)[:, None] & (c < CIN)[None, :]
    at = b * CIN * P + (q[:, None] * CIN + c[None, :] if LAST else q[:, None] + c[None, :] * P)
    if ELU:
        xt = tl.load(x + at, mask=live, other=0.0).to(tl.float32)
        rising, falling = elu_slopes(xt)
        acc = acc * rising - acc2 * falling
    tl.store(grad + at, acc, mask=live)


@triton.jit
def weight_backward(
    front, x, partial, B, IH, IW, CIN, OH, OW, N, top, left, sy, sx, dy, dx, share,
    KH: tl.constexpr, KW: tl.constexpr, ELU: tl.constexpr, LAST: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """partial[s, n, tap, c] = sum over the pixels of share s of front[b, n, p] act(x)[b, c, p * stride + tap - pad]."""
    P = OH * OW
    nt = tl.cdiv(N, BM)
    ct = tl.cdiv(CIN, BN)
    pid = tl.program_id(0)
    c = (pid % ct) * BN + tl.arange(0, BN)
    n = (pid // ct % nt) * BM + tl.arange(0, BM)
    tap = pid // (ct * nt) % (KH * KW)
    s = pid // (ct * nt * KH * KW)
    inputs = CIN * 2 if ELU else CIN
    acc = tl.zeros((BM, BN), tl.float32)
    acc2 = tl.zeros((BM, BN), tl.float32)
    mt = tl.cdiv(P, BK)
    for chunk in range(s * share, tl.minimum((s + 1) * share, B * mt)):
        b = (chunk // mt).to(tl.int64)
        p = (chunk % mt) * BK + tl.arange(0, BK)
        ih = (p // OW) * sy - top + (tap // KW) * dy
        iw = (p % OW) * sx - left + (tap % KW) * dx
        inside = (p < P) & (ih >= 0) & (ih < IH) & (iw >= 0) & (iw < IW)
        at = ih * IW + iw
        go = n[:, None] + p[None, :] * N if LAST else n[:, None] * P + p[None, :]
        g = tl.load(front + b * N * P + go, mask=(n < N)[:, None] & (p < P)[None, :], other=0.0).to(DOT)
        xo = at[:, None] * CIN + c[None, :] if LAST else at[:, None] + c[None, :] * (IH * IW)
        xt = tl.load(x + b * CIN * IH * IW + xo, mask=inside[:, None] & (c < CIN)[None, :], other=0.0)
        if ELU:
            first, second = elu_pair(xt.to(tl.float32))
            acc = tl.dot(g, first.to(DOT), acc, input_precision=PRECISION)
            acc2 = tl.dot(g, second.to(DOT), acc2, input_precision=PRECISION)
        else:
            acc = tl.dot(g, xt.to(DOT), acc, input_precision=PRECISION)
    row = (s * N + n).to(tl.int64) * (KH * KW * inputs)
    into = partial + row[:, None] + (tap * inputs + c)[None, :]
    live = (n < N)[:, None] & (c < CIN)[None, :]
    tl.store(into, acc, mask=live)
    if ELU:
        tl.store(into + CIN, acc2, mask=live)


def gate_backward(grad: Tensor, pre: Tensor, gate: str, channels_last: bool) -> tuple[Tensor, Tensor]:
    """Gradient of pre [B, 2C, H', W'] in its dtype, and its sums over pixels, float32 [B, 2C]."""
    return _front(grad, pre, torch.empty_like(pre), 0, GATES[gate], 1.0, channels_last)


def split_backward(
    grad: Tensor, grad_skip: Tensor, dtype: torch.dtype, scale: float, channels_last: bool
) -> tuple[Tensor, Tensor]:
    """Gradient [B, R + S, H, W] of z with out = (x + z[:, :R]) * scale and skip = z[:, R:]; and its sums [B, R + S]."""
    shape = (grad.shape[0], grad.shape[1] + grad_skip.shape[1], *grad.shape[2:])
    form = torch.channels_last if channels_last else torch.contiguous_format
    front = torch.empty(shape, dtype=dtype, device=grad.device, memory_format=form)
    return _front(grad, grad_skip, front, grad_skip.shape[1], SPLIT, scale, channels_last)


def _front(
    grad: Tensor, other: Tensor, front: Tensor, skip: int, gate: int, scale: float, channels_last: bool
) -> tuple[Tensor, Tensor]:
    batch, outputs, rows, cols = front.shape
    blocks = cdiv(rows * cols, FRONT_TILE.m)
    partial = torch.empty((batch, blocks, outputs), dtype=torch.float32, device=front.device)
    columns = outputs if gate == SPLIT else grad.shape[1]
    front_backward[(batch * blocks * cdiv(columns, FRONT_TILE.n),)](
        grad, other, front, partial, scale, rows * cols, grad.shape[1], skip, gate, channels_last,
        BM=FRONT_TILE.m, BN=FRONT_TILE.n, num_warps=FRONT_TILE.warps,
    )  # fmt: skip
    return front, partial.sum(1)


def grad_input(
    front: Tensor, x: Tensor, weight: Tensor, grad: Tensor, geometry: Sequence[int], elu: bool, channels_last: bool,
) -> None:  # fmt: skip
    """Fills grad, the gradient of x, from front [B, outputs, H', W']."""
    batch, cin, rows, cols = x.shape
    tile = choose(INPUT_TILES, x.dtype, (rows, cols), cin)
    programs = batch * cdiv(rows * cols, tile.m) * cdiv(cin, tile.n)
    input_backward[(programs,)](
        front, pack(weight), x, grad, rows, cols, cin, *front.shape[2:], front.shape[1], geometry[2], geometry[0],
        *geometry[4:8], *weight.shape[2:], elu, max(geometry[4:6]) > 1, channels_last, **product(x.dtype, geometry[8]),
        BM=tile.m, BN=tile.n, BK=tile.k, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def grad_weight(
    front: Tensor, x: Tensor, grad: Tensor, geometry: Sequence[int], elu: bool, channels_last: bool,
) -> None:  # fmt: skip
    """Fills grad, the gradient of the weight, from front [B, outputs, H', W']."""
    batch, cin, rows, cols = x.shape
    outputs, inputs, kh, kw = grad.shape
    pixels = front.shape[2] * front.shape[3]
    tile = choose(WEIGHT_TILES, x.dtype, front.shape[2:], cin)
    tiles = cdiv(outputs, tile.m) * cdiv(cin, tile.n) * kh * kw
    chunks = batch * cdiv(pixels, tile.k)
    share = cdiv(chunks, max(1, FILL // tiles))
    shares = cdiv(chunks, share)
    partial = torch.empty((shares, outputs, kh, kw, inputs), dtype=torch.float32, device=x.device)
    weight_backward[(shares * tiles,)](
        front, x, partial, batch, rows, cols, cin, *front.shape[2:], outputs, geometry[2], geometry[0],
        *geometry[4:8], share, kh, kw, elu, channels_last, **product(x.dtype, geometry[8]),
        BM=tile.m, BN=tile.n, BK=tile.k, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    grad.copy_(partial.sum(0).permute(0, 3, 1, 2))
