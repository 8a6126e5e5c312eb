"""The ends of the training chain, where tensors are ordinary ones: into them, back from them, and dr itself.

Everything is NHWC without gaps, seen as [pixels, C]: each tensor is read or written once, 16 bytes at a time where VEC
times the element size is 16.
"""

import triton
import triton.language as tl

from .activations import activate, affine
from .raw_gradients import masked_gradient, raw_gradient


@triton.jit(do_not_specialize=["pixels", "channel_vecs"])
def apply_load(
    x,  # [pixels, C]
    residual,  # [pixels, C], may be None
    y,  # [pixels, C]
    scale,  # [C], may be None
    shift,  # [C], may be None
    alpha,
    pixels,
    channel_vecs,  # C / VEC
    ACT: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    VEC: tl.constexpr,
    WIDE: tl.constexpr,
):
    """y = act(scale * x + shift + residual)."""
    pid = tl.program_id(0)
    channels = channel_vecs * VEC
    blocks = tl.cdiv(channels, CHANNELS)
    c = (pid % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    c_ok = c < channels
    tile = pid // blocks
    if WIDE:
        tile = tile.to(tl.int64)
    m = tile * PIXELS + tl.arange(0, PIXELS)
    at = m[:, None] * channels + c[None, :]
    mask = (m < pixels)[:, None] & c_ok[None, :]
    u = affine(tl.load(x + at, mask=mask, other=0.0).to(tl.float32), scale, shift, c, c_ok)
    if residual is not None:
        u += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + at, activate(u, alpha, ACT).to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["pixels", "channel_vecs", "share"])
def apply_load_backward(
    g,  # [pixels, C]
    x,  # [pixels, C]
    residual,  # [pixels, C], may be None
    operand_1,  # [pixels, C]; None where there is none or it is x
    operand_2,  # likewise
    centres,  # [SUMS, C] float32, its first row unused; may be None where SUMS is 1
    du,  # [pixels, C], may be None: g itself
    partials,  # [programs / channel blocks, SUMS, C] float32: of du and of du * (operand - centre)
    scale,  # [C], may be None
    shift,  # [C], may be None
    alpha,
    pixels,
    channel_vecs,  # C / VEC
    share,  # tiles a program has
    ACT: tl.constexpr,
    SUMS: tl.constexpr,  # 1, and one for each operand
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    VEC: tl.constexpr,
    WIDE: tl.constexpr,
):
    """du = g * act'(scale * x + shift + residual), and its sums, those of a program in registers until it ends."""
    pid = tl.program_id(0)
    channels = channel_vecs * VEC
    blocks = tl.cdiv(channels, CHANNELS)
    c = (pid % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    c_ok = c < channels
    group = pid // blocks
    sums = ()
    middles = ()
    for k in tl.static_range(SUMS):
        sums = sums + (tl.zeros([PIXELS, CHANNELS], tl.float32),)
        if k > 0:
            middles = middles + (tl.load(centres + k * channels + c, mask=c_ok, other=0.0)[None, :],)
    for t in range(group * share, tl.minimum(group * share + share, tl.cdiv(pixels, PIXELS))):
        m = t * PIXELS + tl.arange(0, PIXELS)
        if WIDE:
            m = m.to(tl.int64)
        at = m[:, None] * channels + c[None, :]
        mask = (m < pixels)[:, None] & c_ok[None, :]
        d = tl.load(g + at, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        if ACT != 0:
            u = affine(v, scale, shift, c, c_ok)
            if residual is not None:
                u += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
            d = tl.where(mask, masked_gradient(d, u, alpha, ACT), 0.0)
        if du is not None:
            rounded = d.to(du.dtype.element_ty)
            tl.store(du + at, rounded, mask=mask)
            d = rounded.to(tl.float32)
        new = (sums[0] + d,)
        if SUMS > 1:
            other = v
            if operand_1 is not None:
                other = tl.load(operand_1 + at, mask=mask, other=0.0).to(tl.float32)
            new = new + (sums[1] + d * (other - middles[0]),)
        if SUMS > 2:
            other = v
            if operand_2 is not None:
                other = tl.load(operand_2 + at, mask=mask, other=0.0).to(tl.float32)
            new = new + (sums[2] + d * (other - middles[1]),)
        sums = new
    row = partials + group.to(tl.int64) * SUMS * channels
    for k in tl.static_range(SUMS):
        tl.store(row + k * channels + c, tl.sum(sums[k], axis=0), mask=c_ok)


@triton.jit(do_not_specialize=["pixels", "p", "q", "pooled_p", "pooled_q", "top", "left", "channel_vecs"])
def bn_dgrad(
    du,  # [N, P, Q, C], or of the pool's resolution beside taps
    taps,  # uint8, like du; may be None
    r,  # [N, P, Q, C]
    coef,  # [3, C] float32
    dr,  # [N, P, Q, C]
    pixels,  # N * P * Q
    p,
    q,
    pooled_p,
    pooled_q,
    top,
    left,
    channel_vecs,  # C / VEC
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    VEC: tl.constexpr,
    WIDE: tl.constexpr,
):
    """dr as a tensor, for the ordinary convolution in front of the chain."""
    pid = tl.program_id(0)
    channels = channel_vecs * VEC
    blocks = tl.cdiv(channels, CHANNELS)
    c = (pid % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    c_ok = c < channels
    tile = pid // blocks
    if WIDE:
        tile = tile.to(tl.int64)
    m = tile * PIXELS + tl.arange(0, PIXELS)
    ok = m < pixels
    v = raw_gradient(du, taps, r, coef, m, ok, c, c_ok, channels, p, q, pooled_p, pooled_q, top, left)
    tl.store(dr + (m[:, None] * channels + c[None, :]), v, mask=ok[:, None] & c_ok[None, :])
