"""The training chain's pointwise products over flat pixels, their left operand formed on load.

``pointwise_fprop`` multiplies act(scale * x + shift), x read through strides (every second pixel of a picture is a
view), and takes the statistics of what it stores. ``pointwise_dgrad`` multiplies dr, made of du, r and three vectors.
Programs of one pixel tile are neighbours in time, so that the left operand comes from L2 when it is formed again.
Expected traffic: operands and result once through memory, weights once a pixel tile through L2.
"""

import triton
import triton.language as tl

from .activations import activate, affine
from .raw_gradients import raw_gradient
from .tf32 import operand


@triton.jit(
    do_not_specialize=["pixels", "h", "w", "in_vecs", "out_vecs", "sx_n", "sx_h", "sx_w"]
)  # fmt: skip
def pointwise_fprop(
    x,  # [N, H, W, C_in], strides sx_n, sx_h, sx_w in units of VEC
    w_pw,  # [C_out, C_in]; rounded beforehand where PRECISION is "tf32"
    y,  # [N, H, W, C_out], contiguous
    partials,  # [pixel tiles, 3, C_out] float32: K, S, Q of the rounded y; may be None
    counts,  # [pixel tiles] int32: pixels of each; may be None
    scale_p,  # [C_in], may be None
    shift_p,  # [C_in], may be None
    alpha_p,
    pixels,  # N * H * W
    h,
    w,
    in_vecs,  # C_in / VEC
    out_vecs,  # C_out / OUT_VEC
    sx_n,
    sx_h,
    sx_w,
    ACT_P: tl.constexpr,
    PRECISION: tl.constexpr,  # "ieee" or "tf32", of float32 products
    PIXELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    VEC: tl.constexpr,
    OUT_VEC: tl.constexpr,
    WIDE: tl.constexpr,
):
    pid = tl.program_id(0)
    ins = in_vecs * VEC
    outs = out_vecs * OUT_VEC
    blocks = tl.cdiv(outs, OUTPUTS)
    block = pid % blocks
    tile = pid // blocks
    o = block * OUTPUTS + tl.arange(0, OUTPUTS)
    o_ok = o < outs
    if WIDE:
        o = o.to(tl.int64)
        tile = tile.to(tl.int64)
    m = tile * PIXELS + tl.arange(0, PIXELS)
    m_ok = m < pixels
    rows = (m // w) % h
    start = (m // w // h) * (sx_n * VEC) + rows * (sx_h * VEC) + (m % w) * (sx_w * VEC)
    acc = tl.zeros([PIXELS, OUTPUTS], tl.float32)
    for k0 in range(0, ins, DEPTH):
        c = k0 + tl.arange(0, DEPTH)
        c_ok = c < ins
        v = tl.load(x + (start[:, None] + c[None, :]), mask=m_ok[:, None] & c_ok[None, :], other=0.0)
        v = activate(affine(v.to(tl.float32), scale_p, shift_p, c, c_ok), alpha_p, ACT_P).to(x.dtype.element_ty)
        filters = tl.load(w_pw + (o[:, None] * ins + c[None, :]), mask=o_ok[:, None] & c_ok[None, :], other=0.0)
        acc = tl.dot(operand(v, PRECISION), tl.trans(filters), acc, input_precision=PRECISION)
    mask = m_ok[:, None] & o_ok[None, :]
    rounded = acc.to(y.dtype.element_ty)
    tl.store(y + (m[:, None] * outs + o[None, :]), rounded, mask=mask)
    if partials is not None:
        kept = tl.where(mask, rounded.to(tl.float32), 0.0)
        count = tl.sum(m_ok.to(tl.int32), axis=0)
        centre = tl.sum(kept, axis=0) / tl.maximum(count, 1).to(tl.float32)
        d = tl.where(m_ok[:, None], kept - centre[None, :], 0.0)
        sums = partials + tile.to(tl.int64) * 3 * outs
        tl.store(sums + o, centre, mask=o_ok)
        tl.store(sums + outs + o, tl.sum(d, axis=0), mask=o_ok)
        tl.store(sums + 2 * outs + o, tl.sum(d * d, axis=0), mask=o_ok)
        tl.store(counts + tile, count, mask=block == 0)


@triton.jit(
    do_not_specialize=["pixels", "p", "q", "pooled_p", "pooled_q", "top", "left", "in_vecs", "out_vecs"]
)  # fmt: skip
def pointwise_dgrad(
    du,  # [N, P, Q, C_out], contiguous, or of the pool's resolution beside taps
    taps,  # uint8, like du; may be None
    r,  # [N, P, Q, C_out], contiguous
    coef,  # [3, C_out] float32
    w_pw,  # [C_out, C_in]; rounded beforehand where PRECISION is "tf32"
    dz,  # [N, P, Q, C_in], contiguous
    pixels,  # N * P * Q
    p,
    q,
    pooled_p,
    pooled_q,
    top,
    left,
    in_vecs,  # C_in / VEC
    out_vecs,  # C_out / OUT_VEC
    PRECISION: tl.constexpr,
    PIXELS: tl.constexpr,
    INPUTS: tl.constexpr,
    DEPTH: tl.constexpr,  # output channels at a time
    VEC: tl.constexpr,
    OUT_VEC: tl.constexpr,
    WIDE: tl.constexpr,
):
    """dz[m, c] = sum over o of dr[m, o] * w_pw[o, c]."""
    pid = tl.program_id(0)
    ins = in_vecs * VEC
    outs = out_vecs * OUT_VEC
    blocks = tl.cdiv(ins, INPUTS)
    c = (pid % blocks) * INPUTS + tl.arange(0, INPUTS)
    c_ok = c < ins
    tile = pid // blocks
    if WIDE:
        tile = tile.to(tl.int64)
    m = tile * PIXELS + tl.arange(0, PIXELS)
    m_ok = m < pixels
    acc = tl.zeros([PIXELS, INPUTS], tl.float32)
    for k0 in range(0, outs, DEPTH):
        o = k0 + tl.arange(0, DEPTH)
        o_ok = o < outs
        dr = raw_gradient(du, taps, r, coef, m, m_ok, o, o_ok, outs, p, q, pooled_p, pooled_q, top, left)
        rows = o.to(tl.int64) if WIDE else o
        filters = tl.load(w_pw + (rows[:, None] * ins + c[None, :]), mask=o_ok[:, None] & c_ok[None, :], other=0.0)
        acc = tl.dot(operand(dr, PRECISION), filters, acc, input_precision=PRECISION)
    tl.store(dz + (m[:, None] * ins + c[None, :]), acc.to(dz.dtype.element_ty), mask=m_ok[:, None] & c_ok[None, :])
