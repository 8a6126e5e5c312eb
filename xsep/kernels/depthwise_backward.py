"""Depthwise backward in one pass, filter size, stride and dilation known at compile time, depth multiplier 1.

One program walks over tiles of ``ROWS`` rows and ``COLS`` flat columns of x. At position (h, w) the taps of dz that dx
needs, dz[(h + pad - r d) / stride, ...], are exactly those that x[h, w] meets in dw_dw[r, s]; so one loaded element of
dz is used twice, dx is written once, and the R * S sums of dw_dw stay in registers until the program ends. Then they
are added over the program's columns and written as one row of ``partials``; ``reductions.sum_partials`` adds the
rows in a fixed order. Which tiles a program has is the plan's choice, so the result is the same run after run.

In the training chain (``SUMS`` above 0) a shortcut's gradient joins dx before or behind the activation's derivative,
and in place of the prologue's gradients stand the sums of dx, as it is stored, and of dx * (operand - centre): what
BatchNorm's backward in the layer before asks for.

For stride st only every st-th tap meets a position. Rows start so that which ones is known at compile time; columns
are taken in st interleaved sets for the same reason, so no lane idles.

Expected traffic: x and dz once, dx once, partials about 1 %. Accesses of 16 bytes (LDG.E.128) where VEC times the
element size is 16 and the plan gives a thread VEC channels; for 5 x 5 and 7 x 7 the sums leave room for 4 and 2.
"""

import triton
import triton.language as tl

from .activations import activate, activation_gradient, affine
from .raw_gradients import masked_gradient


@triton.jit(
    do_not_specialize=[
        "n", "h", "w", "channel_vecs", "p", "q", "sx_n", "sx_h", "sx_w", "sd_n", "sd_h", "sd_w", "pad_top", "pad_left",
        "row_tiles", "groups", "share", "short_h", "short_w",
    ]
)  # fmt: skip
def depthwise_backward(
    x,  # [N, H, W, C], strides sx_n, sx_h, sx_w in units of VEC
    dz,  # [N, P, Q, C], strides sd_n, sd_h, sd_w in units of VEC
    weight,  # [R * S, C]
    dx,  # [N, H, W, C], contiguous; written if WANT_DX
    partials,  # [programs / channel blocks, R * S + 2 or SUMS, C] float32: sums for dw_dw, dscale_p, dshift_p, or SUMS
    scale_p,  # [C], may be None
    shift_p,  # [C], may be None
    shortcut,  # [N, SHORT_H, SHORT_W, C], contiguous; may be None
    operand_1,  # [N, H, W, C], contiguous; None where there is none or it is x
    operand_2,  # likewise
    centres,  # [SUMS, C] float32, its first row unused; may be None where SUMS is up to 1
    alpha_p,
    n,
    h,
    w,
    channel_vecs,  # C / VEC
    p,
    q,
    sx_n,
    sx_h,
    sx_w,
    sd_n,
    sd_h,
    sd_w,
    pad_top,
    pad_left,
    row_tiles,
    groups,  # sets of STRIDE_W neighbouring columns in a row of x
    share,  # tiles a program has
    short_h,  # H, or half of it where the shortcut is that of every second row and column
    short_w,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    ACT_P: tl.constexpr,
    WANT_DX: tl.constexpr,
    WANT_DW: tl.constexpr,
    WANT_AFFINE: tl.constexpr,
    SHORT_STEP: tl.constexpr,  # 1 or 2: rows and columns of x between two of the shortcut's
    ACTIVATED: tl.constexpr,  # whether the shortcut is added before the activation's derivative is applied
    SUMS: tl.constexpr,  # 0, or 1 and one more for each operand
    ROWS: tl.constexpr,  # a multiple of STRIDE_H
    COLS: tl.constexpr,
    CHANNELS: tl.constexpr,
    VEC: tl.constexpr,
    WIDE: tl.constexpr,
):
    tl.static_assert(STRIDE_H == 1 or DILATION_H == 1)
    tl.static_assert(ROWS % STRIDE_H == 0)
    tl.static_assert(SUMS == 0 or not WANT_AFFINE)
    ROW_STEP: tl.constexpr = DILATION_H if STRIDE_H == 1 else 1
    LEAD: tl.constexpr = (R - 1) // STRIDE_H
    PROLOGUE: tl.constexpr = ACT_P != 0 or scale_p is not None or shift_p is not None

    pid = tl.program_id(0)
    channels = channel_vecs * VEC
    blocks = tl.cdiv(channels, CHANNELS)
    c = (pid % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    c_ok = c < channels
    pid = pid // blocks
    shift_w = pad_left % STRIDE_W
    first = pad_left // STRIDE_W

    dw = ()  # by filter column: entry s * R + r
    for _ in tl.static_range(R * S if WANT_DW else 1):
        dw = dw + (tl.zeros([COLS, CHANNELS], tl.float32),)
    dscale = tl.zeros([COLS, CHANNELS], tl.float32)
    dshift = tl.zeros([COLS, CHANNELS], tl.float32)
    sums = ()
    middles = ()
    for k in tl.static_range(SUMS):
        sums = sums + (tl.zeros([COLS, CHANNELS], tl.float32),)
        if k > 0:
            middles = middles + (tl.load(centres + k * channels + c, mask=c_ok, other=0.0)[None, :],)

    # A loop of one turn that the compiler does not see through: without it, the loads of all S columns would be moved
    # to the front and crowd the sums out of the registers.
    once = tl.minimum(share, 1)
    tiles = row_tiles * tl.cdiv(n * groups, COLS)
    for t in range(pid * share, tl.minimum(pid * share + share, tiles)):
        # Row tiles of one column block follow each other, so that the halo rows of dz are found in L1.
        tile = t % row_tiles
        h0 = (tile // ROW_STEP) * (ROWS * ROW_STEP) + tile % ROW_STEP - pad_top % STRIDE_H
        p0 = (h0 + pad_top) // STRIDE_H
        f = t // row_tiles * COLS + tl.arange(0, COLS)
        if WIDE:
            f = f.to(tl.int64)
        picture = f // groups
        group = f % groups
        f_ok = picture < n
        for b in tl.static_range(STRIDE_W):
            w_b = group * STRIDE_W - shift_w + b
            w_ok = f_ok & (w_b >= 0) & (w_b < w)
            x_offsets = (picture * (sx_n * VEC) + w_b * (sx_w * VEC))[:, None] + c[None, :]
            xs = ()
            us = ()
            vs = ()
            ds = ()
            for i in tl.static_range(ROWS):
                h_i = h0 + i * ROW_STEP
                mask = (w_ok & (h_i >= 0) & (h_i < h))[:, None] & c_ok[None, :]
                v = tl.load((x + h_i.to(tl.int64) * (sx_h * VEC)) + x_offsets, mask=mask, other=0.0).to(tl.float32)
                xs = xs + (v,)
                if PROLOGUE:
                    u = affine(v, scale_p, shift_p, c, c_ok)
                    us = us + (u,)
                    v = tl.where(mask, activate(u, alpha_p, ACT_P), 0.0)
                vs = vs + (v,)
                ds = ds + (tl.zeros([COLS, CHANNELS], tl.float32),)
            d_offsets = (picture * (sd_n * VEC) + (group + first) * (sd_w * VEC))[:, None] + c[None, :]
            for s in tl.static_range(S):
                if (s * DILATION_W - b) % STRIDE_W == 0:
                    back = (s * DILATION_W - b) // STRIDE_W
                    q_s = group + first - back
                    q_ok = f_ok & (q_s >= 0) & (q_s < q)
                    for turn in range(once):
                        taps = ()
                        if WANT_DX:
                            for r in tl.static_range(R):
                                tap = tl.load(weight + (r * S + s) * channels + c, mask=c_ok, other=0.0)
                                taps = taps + (tap.to(tl.float32)[None, :],)
                        column = dw[s * R : s * R + R] if WANT_DW else ()
                        # k counts rows of dz that meet the tile, from the last tap of the first row on; row i of x
                        # meets it in tap r where i - r = (k - LEAD) * STRIDE_H.
                        for k in tl.static_range(LEAD + (ROWS - 1) // STRIDE_H + 1):
                            p_k = p0 + (k - LEAD) * ROW_STEP
                            mask = (q_ok & (p_k >= 0) & (p_k < p))[:, None] & c_ok[None, :]
                            base = dz + (p_k.to(tl.int64) * (sd_h * VEC) - back * (sd_w * VEC))
                            g = tl.load(base + d_offsets, mask=mask, other=0.0).to(tl.float32)
                            if WANT_DX:
                                new_ds = ()
                                for i in tl.static_range(ROWS):
                                    if i >= (k - LEAD) * STRIDE_H and i < (k - LEAD) * STRIDE_H + R:
                                        new_ds = new_ds + (ds[i] + g * taps[i - (k - LEAD) * STRIDE_H],)
                                    else:
                                        new_ds = new_ds + (ds[i],)
                                ds = new_ds
                            if WANT_DW:
                                new_column = ()
                                for r in tl.static_range(R):
                                    if r + (k - LEAD) * STRIDE_H >= 0 and r + (k - LEAD) * STRIDE_H < ROWS:
                                        new_column = new_column + (column[r] + g * vs[r + (k - LEAD) * STRIDE_H],)
                                    else:
                                        new_column = new_column + (column[r],)
                                column = new_column
                        if WANT_DW:
                            dw = dw[: s * R] + column + dw[s * R + R :]
            if WANT_DX:
                out = (picture * (h * w) + w_b)[:, None] * channels + c[None, :]
                for i in tl.static_range(ROWS):
                    h_i = h0 + i * ROW_STEP
                    mask = (w_ok & (h_i >= 0) & (h_i < h))[:, None] & c_ok[None, :]
                    d = ds[i]
                    if shortcut is not None:
                        there = mask
                        if SHORT_STEP == 2:
                            there = mask & ((h_i % 2 == 0) & (w_b % 2 == 0))[:, None]
                        place = (picture * short_h + h_i // SHORT_STEP) * short_w + w_b // SHORT_STEP
                        at = place[:, None] * channels + c[None, :]
                        joined = tl.load(shortcut + at, mask=there, other=0.0).to(tl.float32)
                    if shortcut is not None and ACTIVATED:
                        d += joined
                    if PROLOGUE:
                        if SUMS > 0:
                            d = masked_gradient(d, us[i], alpha_p, ACT_P)
                        else:
                            d = activation_gradient(d, us[i], alpha_p, ACT_P)
                    if shortcut is not None and not ACTIVATED:
                        d += joined
                    if WANT_AFFINE:
                        # The tile may reach past the picture, where the taps of dz still are.
                        d = tl.where(mask, d, 0.0)
                        dscale += d * xs[i]
                        dshift += d
                    if SUMS > 0:
                        # As whoever reads dx will see it: rounded.
                        kept = tl.where(mask, d.to(dx.dtype.element_ty).to(tl.float32), 0.0)
                        new_sums = (sums[0] + kept,)
                        if SUMS > 1:
                            other = xs[i]
                            if operand_1 is not None:
                                row = operand_1 + h_i.to(tl.int64) * (w * channels)
                                other = tl.load(row + out, mask=mask, other=0.0).to(tl.float32)
                            new_sums = new_sums + (sums[1] + kept * (other - middles[0]),)
                        if SUMS > 2:
                            other = xs[i]
                            if operand_2 is not None:
                                row = operand_2 + h_i.to(tl.int64) * (w * channels)
                                other = tl.load(row + out, mask=mask, other=0.0).to(tl.float32)
                            new_sums = new_sums + (sums[2] + kept * (other - middles[1]),)
                        sums = new_sums
                    elif scale_p is not None:
                        d = affine(d, scale_p, None, c, c_ok)
                    tl.store((dx + h_i.to(tl.int64) * (w * channels)) + out, d.to(dx.dtype.element_ty), mask=mask)

    row = partials + pid.to(tl.int64) * (R * S + (SUMS if SUMS > 0 else 2)) * channels
    if WANT_DW:
        for j in tl.static_range(R * S):
            tl.store(row + (j % R * S + j // R) * channels + c, tl.sum(dw[j], axis=0), mask=c_ok)
    if WANT_AFFINE:
        tl.store(row + R * S * channels + c, tl.sum(dscale, axis=0), mask=c_ok)
        tl.store(row + (R * S + 1) * channels + c, tl.sum(dshift, axis=0), mask=c_ok)
    for k in tl.static_range(SUMS):
        tl.store(row + (R * S + k) * channels + c, tl.sum(sums[k], axis=0), mask=c_ok)
