"""Depthwise forward, filter size, stride and dilation known at compile time: rows of x slide through registers.

A lane has ``SIDE`` output columns of a few channels and walks down a strip of rows. Each step brings the rows of x that
the next output row adds, loads them once for all the columns (SIDE + S - 1 of them at stride 1), and adds them to every
output row that they are a tap of; the oldest of those is then finished and stored. What the next step wants is loaded
before this one is reckoned. Lanes are flat over (picture, group of columns), so that small maps waste few.

So an element is loaded (SIDE + S - 1) / SIDE times, all but the first time from L1, and converted and given the
prologue as often; rows that two strips share come from L2. Rows and columns of one lane lie ``ROW_STEP`` and
``COL_STEP`` apart: with dilation d the rows p, p + d, p + 2 d share their taps.

Expected traffic: x once and y once through memory. Accesses of 16 bytes (LDG.E.128, STG.E.128) where a lane has so many
channels and VEC allows it; filters of more than 9 taps leave registers for fewer.
"""

import triton
import triton.language as tl

from .activations import activate, scaled, vector
from .rows import add, load_row


@triton.jit(
    do_not_specialize=[
        "n", "h", "w", "channel_vecs", "p", "q", "sx_n", "sx_h", "sx_w", "pad_top", "pad_left", "groups", "strips",
        "rows",
    ]
)  # fmt: skip
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
    groups,  # of SIDE columns in a row of y
    strips,  # of ``rows`` rows in a column of y
    rows,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    ROW_STEP: tl.constexpr,  # DILATION_H / gcd(STRIDE_H, DILATION_H)
    TAP_ROWS: tl.constexpr,  # STRIDE_H / gcd(STRIDE_H, DILATION_H): rows of taps between two output rows
    COL_STEP: tl.constexpr,  # the same of columns
    TAP_COLS: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    ACT_P: tl.constexpr,
    ACT_E: tl.constexpr,
    SIDE: tl.constexpr,
    UNROLL: tl.constexpr,  # steps of the loop; with 2, no register is moved into another
    COLS: tl.constexpr,
    CHANNELS: tl.constexpr,
    VEC: tl.constexpr,
    WIDE: tl.constexpr,  # whether offsets over (picture, column, channel) need 64 bits; rows always have them
):
    PROLOGUE: tl.constexpr = ACT_P != 0 or (scale_p is not None or shift_p is not None)
    LOADED: tl.constexpr = R if TAP_ROWS > R else TAP_ROWS  # rows of a step; the rest of them no tap meets
    OPEN: tl.constexpr = (R + TAP_ROWS - 1) // TAP_ROWS  # output rows that a step adds to
    COLUMNS: tl.constexpr = (SIDE - 1) * TAP_COLS + S

    pid = tl.program_id(0)
    channels = channel_vecs * VEC
    blocks = tl.cdiv(channels, CHANNELS)
    c = (pid % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    pid = pid // blocks
    strip = pid % strips
    # A strip is ``rows`` rows of one phase of the ROW_STEP interleaved ones.
    p0 = (strip // ROW_STEP) * (rows * ROW_STEP) + strip % ROW_STEP
    f = pid // strips * COLS + tl.arange(0, COLS)
    if WIDE:
        f = f.to(tl.int64)
    picture = f // groups
    group = f % groups
    column = (group // COL_STEP) * (SIDE * COL_STEP) + group % COL_STEP

    c_ok = c < channels
    f_ok = picture < n
    c_x = c if MULTIPLIER == 1 else c // MULTIPLIER
    w0 = column * STRIDE_W - pad_left
    h0 = p0 * STRIDE_H - pad_top
    offsets = (picture * (sx_n * VEC) + w0 * (sx_w * VEC))[:, None] + c_x[None, :]
    out = (picture * (p * q) + column)[:, None] * channels + c[None, :]

    pixel_ok = ()  # [COLS, 1]
    mask = ()  # [COLS, CHANNELS]
    for k in tl.static_range(COLUMNS):
        w_k = w0 + k * DILATION_W
        pixel_ok = pixel_ok + ((f_ok & (w_k >= 0) & (w_k < w))[:, None],)
        mask = mask + (pixel_ok[k] & c_ok[None, :],)
    taps = ()
    for i in tl.static_range(R * S):
        taps = taps + (tl.load(weight + i * channels + c, mask=c_ok, other=0.0).to(tl.float32)[None, :],)
    load_scale = vector(scale_p, c_x, c_ok)
    load_shift = vector(shift_p, c_x, c_ok)
    store_scale = vector(scale_e, c, c_ok)
    store_shift = vector(shift_e, c, c_ok)

    acc = ()
    for _ in tl.static_range(OPEN * SIDE):
        acc = acc + (tl.zeros([COLS, CHANNELS], tl.float32),)
    made = tl.minimum(rows, tl.cdiv(p - p0, ROW_STEP))
    ahead = ()
    for t in tl.static_range(LOADED):
        h_t = h0 + t * DILATION_H
        ahead = ahead + load_row(x, h_t, h, sx_h * VEC, DILATION_W * (sx_w * VEC), offsets, mask, made > 0, TAP_COLS, S)
    for k in tl.range(0, made + OPEN - 1, loop_unroll_factor=UNROLL):
        step = ahead
        ahead = ()
        for t in tl.static_range(LOADED):
            # Unless all of the output rows that it is a tap of are the next strip's.
            wanted = k + 1 < made + (R - 1 - t) // TAP_ROWS
            h_t = h0 + ((k + 1) * TAP_ROWS + t) * DILATION_H
            ahead = ahead + load_row(
                x, h_t, h, sx_h * VEC, DILATION_W * (sx_w * VEC), offsets, mask, wanted, TAP_COLS, S
            )
        for t in tl.static_range(LOADED):
            h_t = h0 + (k * TAP_ROWS + t) * DILATION_H
            row_ok = (h_t >= 0) & (h_t < h)
            for column_k in tl.static_range(COLUMNS):
                v = step[t * COLUMNS + column_k].to(tl.float32)
                if PROLOGUE:
                    v = activate(scaled(v, scale_p, shift_p, load_scale, load_shift), alpha_p, ACT_P)
                    # All activations are 0 at 0.
                    if scale_p is not None or shift_p is not None:
                        v = tl.where(pixel_ok[column_k] & row_ok, v, 0.0)
                for m in tl.static_range(OPEN):  # output rows, from the newest
                    for j in tl.static_range(SIDE):
                        if t + m * TAP_ROWS < R and (column_k >= j * TAP_COLS and column_k < j * TAP_COLS + S):
                            tap = taps[(t + m * TAP_ROWS) * S + column_k - j * TAP_COLS]
                            acc = add(acc, (OPEN - 1 - m) * SIDE + j, v * tap)
        done = k - (OPEN - 1)
        row = y + (p0 + done * ROW_STEP).to(tl.int64) * (q * channels)
        for j in tl.static_range(SIDE):
            u = activate(scaled(acc[j], scale_e, shift_e, store_scale, store_shift), alpha_e, ACT_E)
            q_ok = (f_ok & (column + j * COL_STEP < q) & (done >= 0))[:, None] & c_ok[None, :]
            tl.store((row + j * COL_STEP * channels) + out, u.to(y.dtype.element_ty), mask=q_ok)
        acc = acc[SIDE:]
        for _ in tl.static_range(SIDE):
            acc = acc + (tl.zeros([COLS, CHANNELS], tl.float32),)
