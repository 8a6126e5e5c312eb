"""Depthwise backward in one pass, filter size, stride and dilation known at compile time, depth multiplier 1.

A lane has ``SIDE`` groups of STRIDE_W neighbouring columns of x, a few channels of each, and walks down strips of
``rows`` groups of STRIDE_H rows. At position (h, w) the taps of dz that dx needs, dz[(h + pad - r d) / stride, ...],
are exactly those that x[h, w] meets in dw_dw[r, s]. So each step brings one row of dz and one group of rows of x, and
the row of dz is used for all that it meets: added to the rows of dx that are open, and, multiplied with the rows of x
that are kept, to the sums of dw_dw. The oldest group of rows of dx is then finished and stored. What the next step
wants is loaded before this one is reckoned.

The R * S sums of dw_dw stay in registers until the program ends. Then they are added over the program's columns and
written as one row of ``partials``; ``reductions.sum_partials`` adds the rows in a fixed order. Which strips a program
has is the plan's choice, so the result is the same run after run.

In the training chain (``SUMS`` above 0) a shortcut's gradient joins dx before or behind the activation's derivative,
and in place of the prologue's gradients stand the sums of dx, as it is stored, and of dx * (operand - centre): what
BatchNorm's backward in the layer before asks for.

For stride st only every st-th tap meets a position: groups begin so that which ones is known at compile time, and no
lane idles.

Expected traffic: x and dz once, dx once, partials about 1 %. A lane has 4 channels at 3 x 3 (LDG.E.64 of 16-bit types),
2 at 5 x 5 and 1 at 7 x 7: what the sums leave registers for.
"""

import triton
import triton.language as tl

from .activations import activate, activation_gradient, scaled, vector
from .raw_gradients import masked_gradient
from .rows import add, load_row


@triton.jit
def _operand(image, v, line, at, mask):
    """What dx is multiplied with for a sum: of a row of ``image``, or where there is none, v, which is x."""
    other = v
    if image is not None:
        other = tl.load((image + line) + at, mask=mask, other=0.0).to(tl.float32)
    return other


@triton.jit(
    do_not_specialize=[
        "n", "h", "w", "channel_vecs", "p", "q", "sx_n", "sx_h", "sx_w", "sd_n", "sd_h", "sd_w", "pad_top", "pad_left",
        "strips", "rows", "groups", "share", "short_h", "short_w",
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
    strips,  # of ``rows`` groups of rows in a column of x
    rows,
    groups,  # of SIDE times STRIDE_W columns in a row of x
    share,  # strips that a program has
    short_h,  # H, or half of it where the shortcut is that of every second row and column
    short_w,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr,  # 1 where STRIDE_H is more
    DILATION_W: tl.constexpr,  # 1 where STRIDE_W is more
    ACT_P: tl.constexpr,
    WANT_DX: tl.constexpr,
    WANT_DW: tl.constexpr,
    WANT_AFFINE: tl.constexpr,
    SHORT_STEP: tl.constexpr,  # 1 or 2: rows and columns of x between two of the shortcut's
    ACTIVATED: tl.constexpr,  # whether the shortcut is added before the activation's derivative is applied
    SUMS: tl.constexpr,  # 0, or 1 and one more for each operand
    SIDE: tl.constexpr,
    UNROLL: tl.constexpr,  # steps of the loop; with 2, no register is moved into another
    COLS: tl.constexpr,
    CHANNELS: tl.constexpr,
    VEC: tl.constexpr,
    WIDE: tl.constexpr,
):
    tl.static_assert(STRIDE_H == 1 or DILATION_H == 1)
    tl.static_assert(STRIDE_W == 1 or DILATION_W == 1)
    tl.static_assert(SUMS == 0 or not WANT_AFFINE)
    PROLOGUE: tl.constexpr = ACT_P != 0 or (scale_p is not None or shift_p is not None)
    # Groups of rows that lie above the one a row of dz belongs to and meet it; columns of dz left of a group's own.
    LEAD: tl.constexpr = (R - 1) // STRIDE_H
    LEAD_COLS: tl.constexpr = (S - 1) // STRIDE_W
    OPEN: tl.constexpr = LEAD + 1
    COLUMNS: tl.constexpr = SIDE * STRIDE_W
    ROW: tl.constexpr = STRIDE_H * COLUMNS  # tensors of a group of rows
    GRADS: tl.constexpr = SIDE + LEAD_COLS

    pid = tl.program_id(0)
    channels = channel_vecs * VEC
    blocks = tl.cdiv(channels, CHANNELS)
    c = (pid % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    c_ok = c < channels
    pid = pid // blocks
    above = pad_top % STRIDE_H
    before = pad_left % STRIDE_W

    taps = ()
    for i in tl.static_range(R * S if WANT_DX else 0):
        taps = taps + (tl.load(weight + i * channels + c, mask=c_ok, other=0.0).to(tl.float32)[None, :],)
    load_scale = vector(scale_p, c, c_ok)
    load_shift = vector(shift_p, c, c_ok)
    dw = ()
    for _ in tl.static_range(R * S if WANT_DW else 0):
        dw = dw + (tl.zeros([COLS, CHANNELS], tl.float32),)
    sums = ()  # the prologue's gradients, or SUMS
    middles = ()
    for i in tl.static_range(2 if WANT_AFFINE else SUMS):
        sums = sums + (tl.zeros([COLS, CHANNELS], tl.float32),)
        if i > 0 and SUMS > 0:
            middles = middles + (tl.load(centres + i * channels + c, mask=c_ok, other=0.0)[None, :],)

    tiles = strips * tl.cdiv(n * groups, COLS)
    for tile in range(pid * share, tl.minimum(pid * share + share, tiles)):
        strip = tile % strips
        # A strip is ``rows`` groups of one phase of the DILATION_H interleaved ones.
        g0 = (strip // DILATION_H) * (rows * DILATION_H) + strip % DILATION_H
        h0 = g0 * STRIDE_H - above
        p0 = g0 + pad_top // STRIDE_H
        made = tl.minimum(rows, tl.cdiv(h + above - g0 * STRIDE_H, STRIDE_H * DILATION_H))
        f = tile // strips * COLS + tl.arange(0, COLS)
        if WIDE:
            f = f.to(tl.int64)
        picture = f // groups
        group = f % groups
        f_ok = picture < n
        first = (group // DILATION_W) * (SIDE * DILATION_W) + group % DILATION_W
        w0 = first * STRIDE_W - before
        q0 = first + pad_left // STRIDE_W - LEAD_COLS * DILATION_W
        x_offsets = (picture * (sx_n * VEC) + w0 * (sx_w * VEC))[:, None] + c[None, :]
        d_offsets = (picture * (sd_n * VEC) + q0 * (sd_w * VEC))[:, None] + c[None, :]
        out = (picture * (h * w) + w0)[:, None] * channels + c[None, :]
        pixel_ok = ()  # [COLS, 1]
        x_mask = ()  # [COLS, CHANNELS]
        for j in tl.static_range(COLUMNS):
            w_j = w0 + j * DILATION_W
            pixel_ok = pixel_ok + ((f_ok & (w_j >= 0) & (w_j < w))[:, None],)
            x_mask = x_mask + (pixel_ok[j] & c_ok[None, :],)
        d_mask = ()
        for j in tl.static_range(GRADS):
            q_j = q0 + j * DILATION_W
            d_mask = d_mask + ((f_ok & (q_j >= 0) & (q_j < q))[:, None] & c_ok[None, :],)

        kept = ()  # OPEN groups of rows of x, the newest last: with the prologue
        raw = ()  # and as they are stored
        ds = ()  # rows of dx, the newest last
        for _ in tl.static_range(OPEN * ROW):
            kept = kept + (tl.zeros([COLS, CHANNELS], tl.float32),)
            raw = raw + (tl.zeros([COLS, CHANNELS], x.dtype.element_ty),)
            ds = ds + (tl.zeros([COLS, CHANNELS], tl.float32),)
        d_ahead = load_row(
            dz, p0 - LEAD * DILATION_H, p, sd_h * VEC, DILATION_W * (sd_w * VEC), d_offsets, d_mask, made > 0, 1, 1
        )
        x_ahead = ()
        for t in tl.static_range(STRIDE_H):
            x_ahead = x_ahead + load_row(
                x, h0 + t, h, sx_h * VEC, DILATION_W * (sx_w * VEC), x_offsets, x_mask, made > 0, 1, 1
            )
        for k in tl.range(0, made + LEAD, loop_unroll_factor=UNROLL):
            d_row = d_ahead
            x_rows = x_ahead
            d_ahead = load_row(
                dz, p0 + (k + 1 - LEAD) * DILATION_H, p, sd_h * VEC, DILATION_W * (sd_w * VEC), d_offsets, d_mask,
                k + 1 < made + LEAD, 1, 1,
            )  # fmt: skip
            x_ahead = ()
            for t in tl.static_range(STRIDE_H):
                x_ahead = x_ahead + load_row(
                    x, h0 + (k + 1) * (STRIDE_H * DILATION_H) + t, h, sx_h * VEC, DILATION_W * (sx_w * VEC), x_offsets,
                    x_mask, k + 1 < made, 1, 1,
                )  # fmt: skip
            kept = kept[ROW:]
            raw = raw[ROW:] + x_rows
            ds = ds[ROW:]
            for t in tl.static_range(STRIDE_H):
                h_k = h0 + k * (STRIDE_H * DILATION_H) + t
                row_ok = (k < made) & (h_k >= 0) & (h_k < h)
                for j in tl.static_range(COLUMNS):
                    v = x_rows[t * COLUMNS + j].to(tl.float32)
                    if PROLOGUE:
                        v = activate(scaled(v, scale_p, shift_p, load_scale, load_shift), alpha_p, ACT_P)
                        # All activations are 0 at 0.
                        if scale_p is not None or shift_p is not None:
                            v = tl.where(pixel_ok[j] & row_ok, v, 0.0)
                    kept = kept + (v,)
                    ds = ds + (tl.zeros([COLS, CHANNELS], tl.float32),)
            # The row of dz meets row t of the group b below its own in tap r = t + b * STRIDE_H.
            for column in tl.static_range(GRADS):
                g = d_row[column].to(tl.float32)
                for b in tl.static_range(OPEN):
                    for t in tl.static_range(STRIDE_H):
                        for j in tl.static_range(COLUMNS):
                            # Column j of x meets it in tap s = j % STRIDE_W + (j // STRIDE_W - column + LEAD_COLS) *
                            # STRIDE_W.
                            if t + b * STRIDE_H < R and (
                                j + (LEAD_COLS - column) * STRIDE_W >= 0 and j + (LEAD_COLS - column) * STRIDE_W < S
                            ):
                                if WANT_DX:
                                    tap = taps[(t + b * STRIDE_H) * S + j + (LEAD_COLS - column) * STRIDE_W]
                                    ds = add(ds, (b * STRIDE_H + t) * COLUMNS + j, g * tap)
                                if WANT_DW:
                                    met = kept[(b * STRIDE_H + t) * COLUMNS + j]
                                    dw = add(dw, (t + b * STRIDE_H) * S + j + (LEAD_COLS - column) * STRIDE_W, g * met)
            if WANT_DX:
                done = k - LEAD
                for t in tl.static_range(STRIDE_H):
                    h_i = h0 + done * (STRIDE_H * DILATION_H) + t
                    row_ok = (done >= 0) & (h_i >= 0) & (h_i < h)
                    row = dx + h_i.to(tl.int64) * (w * channels)
                    for j in tl.static_range(COLUMNS):
                        w_j = w0 + j * DILATION_W
                        at = out + j * DILATION_W * channels
                        mask = x_mask[j] & row_ok
                        d = ds[t * COLUMNS + j]
                        v = raw[t * COLUMNS + j].to(tl.float32)
                        if shortcut is not None:
                            there = mask
                            if SHORT_STEP == 2:
                                there = mask & ((h_i % 2 == 0) & (w_j % 2 == 0))[:, None]
                            place = (picture * short_h + h_i // SHORT_STEP) * short_w + w_j // SHORT_STEP
                            short_at = place[:, None] * channels + c[None, :]
                            joined = tl.load(shortcut + short_at, mask=there, other=0.0).to(tl.float32)
                        if shortcut is not None and ACTIVATED:
                            d += joined
                        if PROLOGUE:
                            u = scaled(v, scale_p, shift_p, load_scale, load_shift)
                            if SUMS > 0:
                                d = masked_gradient(d, u, alpha_p, ACT_P)
                            else:
                                d = activation_gradient(d, u, alpha_p, ACT_P)
                        if shortcut is not None and not ACTIVATED:
                            d += joined
                        if WANT_AFFINE:
                            # The strip may reach past the picture, where the taps of dz still are.
                            d = tl.where(pixel_ok[j] & row_ok, d, 0.0)
                            sums = add(add(sums, 0, d * v), 1, d)
                        if SUMS > 0:
                            # As whoever reads dx will see it: rounded.
                            seen = tl.where(pixel_ok[j] & row_ok, d.to(dx.dtype.element_ty).to(tl.float32), 0.0)
                            sums = add(sums, 0, seen)
                            line = h_i.to(tl.int64) * (w * channels)
                            if SUMS > 1:
                                sums = add(sums, 1, seen * (_operand(operand_1, v, line, at, mask) - middles[0]))
                            if SUMS > 2:
                                sums = add(sums, 2, seen * (_operand(operand_2, v, line, at, mask) - middles[1]))
                        elif scale_p is not None:
                            d = d * load_scale[0]
                        tl.store(row + at, d.to(dx.dtype.element_ty), mask=mask)

    own = pid.to(tl.int64) * (R * S + (SUMS if SUMS > 0 else 2)) * channels
    if WANT_DW:
        for i in tl.static_range(R * S):
            tl.store(partials + own + i * channels + c, tl.sum(dw[i], axis=0), mask=c_ok)
    for i in tl.static_range(2 if WANT_AFFINE else SUMS):
        tl.store(partials + own + (R * S + i) * channels + c, tl.sum(sums[i], axis=0), mask=c_ok)
