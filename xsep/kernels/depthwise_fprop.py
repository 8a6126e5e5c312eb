"""Depthwise forward, filter size, stride and dilation known at compile time: every tap column is loaded once.

One program makes ``ROWS`` output rows of ``COLS`` columns of ``CHANNELS`` channels. Columns are flat over (picture,
output column), so that small maps waste none; rows are compile-time registers. For one filter column s the program
walks down the input rows, loads each once, and adds it to every output row that it is a tap of. So each input element
is loaded S times (the S - 1 repeats hit L1, their lines are S neighbouring pixels of one program), not R * S times,
and comes over L2 about (ROWS + R - 1) / ROWS times. Output rows of one program lie ``ROW_STEP`` apart: with dilation
d the rows p, p + d, p + 2 d share their taps.

Expected traffic: x once and y once through memory (the halo rows come from L2). A thread holds VEC consecutive
channels: 16-byte accesses (LDG.E.128, STG.E.128) where VEC times the element size is 16.
"""

import triton
import triton.language as tl

from .activations import activate, affine


@triton.jit(
    do_not_specialize=["n", "h", "w", "channel_vecs", "p", "q", "sx_n", "sx_h", "sx_w", "pad_top", "pad_left", "tiles"]
)
def depthwise_fprop(
    x,  # [N, H, W, C_in], strides sx_n, sx_h, sx_w in units of VEC
    weight,  # [R * S, C_mid]
    y,  # [N, P, Q, C_mid], contiguous
    scale_p,  # [C_in], may be None
    shift_p,  # [C_in], may be None
    scale_e,  # [C_mid], may be None
    shift_e,  # [C_mid], may be None
    alpha_p,
    alpha_e,
    n,
    h,
    w,
    channel_vecs,  # C_mid / VEC
    p,
    q,
    sx_n,
    sx_h,
    sx_w,
    pad_top,
    pad_left,
    tiles,  # row tiles of a column block
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    ROW_STEP: tl.constexpr,  # DILATION_H / gcd(STRIDE_H, DILATION_H)
    TAP_STEP: tl.constexpr,  # STRIDE_H / gcd(STRIDE_H, DILATION_H): rows of taps between two output rows
    MULTIPLIER: tl.constexpr,
    ACT_P: tl.constexpr,
    ACT_E: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    CHANNELS: tl.constexpr,
    VEC: tl.constexpr,
    WIDE: tl.constexpr,  # whether offsets over (picture, column, channel) need 64 bits; rows always have them
):
    pid = tl.program_id(0)
    channels = channel_vecs * VEC
    blocks = tl.cdiv(channels, CHANNELS)
    c = (pid % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    pid = pid // blocks
    tile = pid % tiles
    # A tile is ROWS rows of one phase of the ROW_STEP interleaved ones.
    p0 = (tile // ROW_STEP) * (ROWS * ROW_STEP) + tile % ROW_STEP
    f = pid // tiles * COLS + tl.arange(0, COLS)
    if WIDE:
        f = f.to(tl.int64)
    picture = f // q
    column = f % q

    c_ok = c < channels
    f_ok = picture < n
    c_x = c if MULTIPLIER == 1 else c // MULTIPLIER
    w0 = column * STRIDE_W - pad_left
    h0 = p0 * STRIDE_H - pad_top
    offsets = (picture * (sx_n * VEC) + w0 * (sx_w * VEC))[:, None] + c_x[None, :]

    acc = ()
    for _ in tl.static_range(ROWS):
        acc = acc + (tl.zeros([COLS, CHANNELS], tl.float32),)
    # Not unrolled: the compiler would move the loads of all S columns to the front and run out of registers.
    for s in range(S):
        taps = ()
        for r in tl.static_range(R):
            tap = tl.load(weight + (r * S + s) * channels + c, mask=c_ok, other=0.0)
            taps = taps + (tap.to(tl.float32)[None, :],)
        w_s = w0 + s * DILATION_W
        w_ok = f_ok & (w_s >= 0) & (w_s < w)
        for j in tl.static_range((ROWS - 1) * TAP_STEP + R):
            # Rows of taps that no output row of this program uses are not loaded (stride larger than the filter).
            if j % TAP_STEP < R:
                h_j = h0 + j * DILATION_H
                mask = (w_ok & (h_j >= 0) & (h_j < h))[:, None] & c_ok[None, :]
                base = x + (h_j.to(tl.int64) * (sx_h * VEC) + s * DILATION_W * (sx_w * VEC))
                v = tl.load(base + offsets, mask=mask, other=0.0).to(tl.float32)
                if ACT_P != 0 or scale_p is not None or shift_p is not None:
                    v = activate(affine(v, scale_p, shift_p, c_x, c_ok), alpha_p, ACT_P)
                    v = tl.where(mask, v, 0.0)
                new = ()
                for i in tl.static_range(ROWS):
                    if j >= i * TAP_STEP and j < i * TAP_STEP + R:
                        new = new + (acc[i] + v * taps[j - i * TAP_STEP],)
                    else:
                        new = new + (acc[i],)
                acc = new

    out = (picture * (p * q) + column)[:, None] * channels + c[None, :]
    mask = f_ok[:, None] & c_ok[None, :]
    us = ()
    for i in tl.static_range(ROWS):
        us = us + (activate(affine(acc[i], scale_e, shift_e, c, c_ok), alpha_e, ACT_E).to(y.dtype.element_ty),)
    for i in tl.static_range(ROWS):
        p_i = p0 + i * ROW_STEP
        row = p_i.to(tl.int64) * (q * channels)
        tl.store((y + row) + out, us[i], mask=mask & (p_i < p))
