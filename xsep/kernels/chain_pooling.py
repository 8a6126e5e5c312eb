"""Pools of the training chain, which read raw outputs: 3x3 of stride 2 with the skip added, and the global average.

Memory-bound: r, the skip's s and the results each once; the repeats of a window come from L1. 16 bytes at a time where
VEC times the element size is 16.
"""

import triton
import triton.language as tl

from .activations import affine


@triton.jit(do_not_specialize=["pixels", "h", "w", "p", "q", "top", "left", "channel_vecs"])
def bn_pool_add(
    r,  # [N, H, W, C], contiguous
    s,  # [N, P, Q, C], contiguous
    vec,  # [2, C] float32: scale and shift of r
    vec_s,  # [2, C] float32: those of s
    t,  # [N, P, Q, C], contiguous
    taps,  # [N, P, Q, C] uint8, contiguous
    chosen,  # [N, P, Q, C], contiguous
    pixels,  # N * P * Q
    h,
    w,
    p,
    q,
    top,  # how far the first window begins above and left of the picture
    left,
    channel_vecs,  # C / VEC
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    VEC: tl.constexpr,
    WIDE: tl.constexpr,
):
    """t = maxpool(vec(r)) + vec_s(s), the tap taken and r there. Of equal taps the first; a NaN wins, as in PyTorch."""
    pid = tl.program_id(0)
    channels = channel_vecs * VEC
    blocks = tl.cdiv(channels, CHANNELS)
    c = (pid % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    c_ok = c < channels
    tile = pid // blocks
    if WIDE:
        tile = tile.to(tl.int64)
    m = tile * PIXELS + tl.arange(0, PIXELS)
    m_ok = m < pixels
    column = m % q * 2 - left
    row = m // q % p * 2 - top
    picture = m // q // p
    scale = tl.load(vec + c, mask=c_ok, other=0.0)[None, :]
    shift = tl.load(vec + channels + c, mask=c_ok, other=0.0)[None, :]
    best = tl.full([PIXELS, CHANNELS], float("-inf"), tl.float32)
    raw = tl.zeros([PIXELS, CHANNELS], r.dtype.element_ty)
    index = tl.full([PIXELS, CHANNELS], 9, tl.int32)
    for k in tl.static_range(9):
        y = row + k // 3
        x = column + k % 3
        inside = m_ok & (y >= 0) & (y < h) & (x >= 0) & (x < w)
        at = ((picture * h + y) * w + x)[:, None] * channels + c[None, :]
        v = tl.load(r + at, mask=inside[:, None] & c_ok[None, :], other=0.0)
        u = v.to(tl.float32) * scale + shift
        # The first tap inside is taken whatever it is, so that a window of -inf alone has one too.
        better = inside[:, None] & ((u > best) | (u != u) | (index == 9))
        best = tl.where(better, u, best)
        raw = tl.where(better, v, raw)
        index = tl.where(better, k, index)
    out = m[:, None] * channels + c[None, :]
    mask = m_ok[:, None] & c_ok[None, :]
    v_s = tl.load(s + out, mask=mask, other=0.0).to(tl.float32)
    total = best + affine(v_s, vec_s, vec_s + channels, c, c_ok)
    tl.store(t + out, total.to(t.dtype.element_ty), mask=mask)
    tl.store(taps + out, index.to(tl.uint8), mask=mask)
    tl.store(chosen + out, raw, mask=mask)


@triton.jit(do_not_specialize=["area", "channel_vecs"])
def bn_relu_gap(
    r,  # [N, H * W, C], contiguous
    vec,  # [2, C] float32
    pooled,  # [N, C]: the mean of relu(u) over the picture
    positive,  # [N, C] float32: pixels with u > 0
    total,  # [N, C] float32: the sum of r over them
    area,  # H * W
    channel_vecs,  # C / VEC
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    VEC: tl.constexpr,
):
    """Program (picture, block) makes a block of channels of one picture."""
    picture = tl.program_id(0).to(tl.int64)
    channels = channel_vecs * VEC
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    c_ok = c < channels
    scale = tl.load(vec + c, mask=c_ok, other=0.0)
    shift = tl.load(vec + channels + c, mask=c_ok, other=0.0)
    number = tl.zeros([PIXELS, CHANNELS], tl.float32)
    sums = tl.zeros([PIXELS, CHANNELS], tl.float32)
    for start in range(0, area, PIXELS):
        m = start + tl.arange(0, PIXELS)
        mask = (m < area)[:, None] & c_ok[None, :]
        at = (picture * area + m)[:, None] * channels + c[None, :]
        v = tl.load(r + at, mask=mask, other=0.0).to(tl.float32)
        open_ = tl.where(mask & (v * scale[None, :] + shift[None, :] > 0.0), 1.0, 0.0)
        number += open_
        # A product, so that what is no number is seen in the sum.
        sums += v * open_
    count = tl.sum(number, axis=0)
    whole = tl.sum(sums, axis=0)
    out = picture * channels + c
    mean = (whole * scale + shift * count) / area.to(tl.float32)
    tl.store(pooled + out, mean.to(pooled.dtype.element_ty), mask=c_ok)
    tl.store(positive + out, count, mask=c_ok)
    tl.store(total + out, whole, mask=c_ok)


@triton.jit(do_not_specialize=["pixels", "area", "channel_vecs"])
def bn_relu_gap_backward(
    g,  # [N, C]
    r,  # [N, H * W, C], contiguous
    vec,  # [2, C] float32
    du,  # [N, H * W, C], contiguous
    pixels,  # N * H * W
    area,  # H * W
    channel_vecs,  # C / VEC
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    VEC: tl.constexpr,
    WIDE: tl.constexpr,
):
    pid = tl.program_id(0)
    channels = channel_vecs * VEC
    blocks = tl.cdiv(channels, CHANNELS)
    c = (pid % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    c_ok = c < channels
    tile = pid // blocks
    if WIDE:
        tile = tile.to(tl.int64)
    m = tile * PIXELS + tl.arange(0, PIXELS)
    mask = (m < pixels)[:, None] & c_ok[None, :]
    at = m[:, None] * channels + c[None, :]
    u = affine(tl.load(r + at, mask=mask, other=0.0).to(tl.float32), vec, vec + channels, c, c_ok)
    share = tl.load(g + ((m // area)[:, None] * channels + c[None, :]), mask=mask, other=0.0).to(tl.float32)
    d = share / area.to(tl.float32) * (u > 0.0).to(tl.float32)
    tl.store(du + at, d.to(du.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n", "area", "channels"])
def bn_relu_gap_sums(
    g,  # [N, C]
    positive,  # [N, C] float32
    total,  # [N, C] float32
    mean,  # [C] float32
    sums,  # [2, C] float32: of du and of du * (r - mean)
    n,
    area,
    channels,
    PICTURES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """From the pictures' own sums, with no look at the pixels."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    c_ok = c < channels
    middle = tl.load(mean + c, mask=c_ok, other=0.0)[None, :]
    first = tl.zeros([PICTURES, CHANNELS], tl.float32)
    second = tl.zeros([PICTURES, CHANNELS], tl.float32)
    for start in range(0, n, PICTURES):
        picture = start + tl.arange(0, PICTURES)
        mask = (picture < n)[:, None] & c_ok[None, :]
        at = picture.to(tl.int64)[:, None] * channels + c[None, :]
        d = tl.load(g + at, mask=mask, other=0.0)
        # As whoever reads du sees it: rounded.
        share = (d.to(tl.float32) / area.to(tl.float32)).to(d.dtype).to(tl.float32)
        number = tl.load(positive + at, mask=mask, other=0.0)
        first += share * number
        second += share * (tl.load(total + at, mask=mask, other=0.0) - middle * number)
    tl.store(sums + c, tl.sum(first, axis=0), mask=c_ok)
    tl.store(sums + channels + c, tl.sum(second, axis=0), mask=c_ok)
