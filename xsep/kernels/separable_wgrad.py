"""The pointwise weight gradient of a layer of the training chain: neither dr nor z is ever stored.

One program has ``OUTPUTS`` by ``INPUTS`` weights and a group of pixel tiles, each ``ROWS`` rows of ``COLS`` flat
columns as in ``separable_fprop``. Of a tile it makes z again from x (every filter column's rows loaded once and slid
in registers), forms dr from du and r, and multiplies the two; the sum stays in registers until the group ends and is
written as one row of ``partials``, which ``sum_groups`` adds up in a fixed order. No atomics: the groups are the
plan's choice, so the result is the same run after run.

Without a depthwise filter (``weight`` None, R = S = 1) z is x after the prologue: the skip convolution's gradient, or
that of a z which the depthwise kernel has left in L2.

Expected traffic: du and r once for each block of inputs, x once for each block of outputs, the repeats from L2.
"""

import triton
import triton.language as tl

from .activations import activate, scaled, vector
from .raw_gradients import raw_gradient
from .tf32 import operand


@triton.jit(
    do_not_specialize=[
        "n", "h", "w", "in_vecs", "out_vecs", "p", "q", "pooled_p", "pooled_q", "top", "left", "sx_n", "sx_h", "sx_w",
        "pad_top", "pad_left", "tiles", "share",
    ]
)  # fmt: skip
def separable_wgrad_pw(
    du,  # [N, P, Q, C_out], contiguous, or of the pool's resolution beside taps
    taps,  # uint8, like du; may be None
    r,  # [N, P, Q, C_out], contiguous
    coef,  # [3, C_out] float32
    x,  # [N, H, W, C_in], strides sx_n, sx_h, sx_w in units of VEC
    weight,  # [R * S, C_in], may be None
    partials,  # [groups, C_out, C_in] float32
    scale_p,  # [C_in], may be None
    shift_p,  # [C_in], may be None
    alpha_p,
    n,
    h,
    w,
    in_vecs,  # C_in / VEC
    out_vecs,  # C_out / OUT_VEC
    p,
    q,
    pooled_p,
    pooled_q,
    top,
    left,
    sx_n,
    sx_h,
    sx_w,
    pad_top,
    pad_left,
    tiles,  # row tiles of a column block
    share,  # pixel tiles of a group
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    ROW_STEP: tl.constexpr,  # DILATION_H / gcd(STRIDE_H, DILATION_H)
    TAP_STEP: tl.constexpr,  # STRIDE_H / gcd(STRIDE_H, DILATION_H)
    ACT_P: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    VEC: tl.constexpr,
    OUT_VEC: tl.constexpr,
    ACCUMULATE: tl.constexpr,  # add to what an earlier launch, of other pictures, has left in partials
    WIDE: tl.constexpr,
):
    PROLOGUE: tl.constexpr = ACT_P != 0 or (scale_p is not None or shift_p is not None)

    pid = tl.program_id(0)
    ins = in_vecs * VEC
    outs = out_vecs * OUT_VEC
    out_blocks = tl.cdiv(outs, OUTPUTS)
    in_blocks = tl.cdiv(ins, INPUTS)
    # Programs of one group are neighbours in time, so that what they share comes from L2.
    o = (pid % out_blocks) * OUTPUTS + tl.arange(0, OUTPUTS)
    o_ok = o < outs
    c = (pid // out_blocks % in_blocks) * INPUTS + tl.arange(0, INPUTS)
    c_ok = c < ins
    group = pid // (out_blocks * in_blocks)
    acc = tl.zeros([OUTPUTS, INPUTS], tl.float32)
    for t in range(group * share, tl.minimum(group * share + share, tiles * tl.cdiv(n * q, COLS))):
        tile = t % tiles
        p0 = (tile // ROW_STEP) * (ROWS * ROW_STEP) + tile % ROW_STEP
        f = t // tiles * COLS + tl.arange(0, COLS)
        if WIDE:
            f = f.to(tl.int64)
        picture = f // q
        column = f % q
        f_ok = picture < n
        w0 = column * STRIDE_W - pad_left
        h0 = p0 * STRIDE_H - pad_top
        offsets = (picture * (sx_n * VEC) + w0 * (sx_w * VEC))[:, None] + c[None, :]
        zs = ()
        for i in tl.static_range(ROWS):
            zs = zs + (tl.zeros([COLS, INPUTS], tl.float32),)
        # Not unrolled, or the loads of all S columns would be moved to the front and crowd the registers.
        for s in range(S):
            filters = ()
            if weight is not None:
                for j in tl.static_range(R):
                    tap = tl.load(weight + (j * S + s) * ins + c, mask=c_ok, other=0.0)
                    filters = filters + (tap.to(tl.float32)[None, :],)
            # Here, not once: there are no registers to keep them in.
            load_scale = vector(scale_p, c, c_ok)
            load_shift = vector(shift_p, c, c_ok)
            w_s = w0 + s * DILATION_W
            w_ok = f_ok & (w_s >= 0) & (w_s < w)
            for j in tl.static_range((ROWS - 1) * TAP_STEP + R):
                if j % TAP_STEP < R:
                    h_j = h0 + j * DILATION_H
                    pixel_ok = (w_ok & (h_j >= 0) & (h_j < h))[:, None]
                    mask = pixel_ok & c_ok[None, :]
                    row = h_j.to(tl.int64) * (sx_h * VEC) + s * DILATION_W * (sx_w * VEC)
                    v = tl.load((x + row) + offsets, mask=mask, other=0.0).to(tl.float32)
                    if PROLOGUE:
                        v = activate(scaled(v, scale_p, shift_p, load_scale, load_shift), alpha_p, ACT_P)
                        # All activations are 0 at 0, which is what channels that there are not come to as well.
                        if scale_p is not None or shift_p is not None:
                            v = tl.where(pixel_ok, v, 0.0)
                    new = ()
                    for i in tl.static_range(ROWS):
                        if j >= i * TAP_STEP and j < i * TAP_STEP + R:
                            if weight is None:
                                new = new + (v,)
                            else:
                                new = new + (zs[i] + v * filters[j - i * TAP_STEP],)
                        else:
                            new = new + (zs[i],)
                    zs = new
        for i in tl.static_range(ROWS):
            p_i = p0 + i * ROW_STEP
            ok = f_ok & (p_i < p)
            pixel = (picture * p + p_i) * q + column
            dr = raw_gradient(du, taps, r, coef, pixel, ok, o, o_ok, outs, p, q, pooled_p, pooled_q, top, left)
            # The tile may reach past the picture, where taps still meet pixels of x, which may be no numbers.
            z = tl.where(ok[:, None], zs[i], 0.0).to(x.dtype.element_ty)
            dr, z = operand(dr, PRECISION), operand(z, PRECISION)
            acc = tl.dot(tl.trans(dr), z, acc, input_precision=PRECISION)
    at = partials + group.to(tl.int64) * outs * ins + (o.to(tl.int64)[:, None] * ins + c[None, :])
    mask = o_ok[:, None] & c_ok[None, :]
    if ACCUMULATE:
        acc += tl.load(at, mask=mask, other=0.0)
    tl.store(at, acc, mask=mask)


@triton.jit(do_not_specialize=["groups"])
def sum_groups(
    partials,  # [groups, elements] float32
    total,  # [elements] float32
    groups,
    elements,
    ELEMENTS: tl.constexpr,
):
    """The groups one after another, always in the same order."""
    i = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    ok = i < elements
    acc = tl.zeros([ELEMENTS], tl.float32)
    at = partials + i
    for _ in range(groups):
        acc += tl.load(at, mask=ok, other=0.0)
        at += elements
    tl.store(total + i, acc, mask=ok)
