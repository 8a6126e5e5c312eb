"""Fused separable forward: z is made in registers and fed to the matrix units; it never reaches memory.

One program makes ``ROWS`` output rows of ``COLS`` flat columns (as in ``depthwise_fprop``) of ``OUTPUTS`` channels. It
walks over the C_mid channels ``DEPTH`` at a time: the input rows of the block are loaded once per filter column and
added to every z row that they are a tap of, the ROWS tiles z [COLS, DEPTH] go through the middle and each into one
``tl.dot`` with the same block of w_pw. With all of C_out in one program z is made once; beyond, the programs of one
pixel tile are neighbours in time, so that x comes from L2 when z is made again.

Without a depthwise filter (``weight`` None, R = S = 1) z is x after the prologue: the pointwise convolution alone,
with the same epilogue and statistics.

Not software-pipelined where there is a filter (``num_stages`` 1): every tap would get its own shared-memory buffers.
Expected traffic: x, residual and y once through memory, w_pw once a pixel tile through L2. x is loaded 16 bytes wide
(LDG.E.128) where VEC times the element size is 16.
"""

import triton
import triton.language as tl

from .activations import activate, affine


@triton.jit(
    do_not_specialize=[
        "n", "h", "w", "mid_vecs", "out_vecs", "p", "q", "sx_n", "sx_h", "sx_w", "pad_top", "pad_left", "tiles",
    ]
)  # fmt: skip
def separable_fprop(
    x,  # [N, H, W, C_in], strides sx_n, sx_h, sx_w in units of VEC
    addend,  # like x, with x's strides; added after scale_p and shift_p; may be None
    x_pre,  # [N, H, W, C_in], contiguous: the prologue before its activation; written if there is an addend
    weight,  # [R * S, C_mid], may be None
    w_pw,  # [C_out, C_mid]
    residual,  # [N, P, Q, C_out], contiguous, may be None
    y,  # [N, P, Q, C_out], contiguous
    partials,  # [pixel tiles, 3, C_out] float32: K, S, Q of the rounded y; may be None
    counts,  # [pixel tiles] int32: pixels of each; may be None
    bias,  # [C_out], may be None
    scale_p,  # [C_in], may be None
    shift_p,  # [C_in], may be None
    scale_m,  # [C_mid], may be None
    shift_m,  # [C_mid], may be None
    scale_e,  # [C_out], may be None
    shift_e,  # [C_out], may be None
    alpha_p,
    alpha_m,
    alpha_e,
    n,
    h,
    w,
    mid_vecs,  # C_mid / VEC
    out_vecs,  # C_out / OUT_VEC
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
    TAP_STEP: tl.constexpr,  # STRIDE_H / gcd(STRIDE_H, DILATION_H)
    MULTIPLIER: tl.constexpr,
    CENTRE_R: tl.constexpr,  # the tap that lies on the output pixel itself, where there is an addend
    CENTRE_S: tl.constexpr,
    ACT_P: tl.constexpr,
    ACT_M: tl.constexpr,
    ACT_E: tl.constexpr,
    PRECISION: tl.constexpr,  # "ieee" or "tf32", of float32 products
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    VEC: tl.constexpr,
    OUT_VEC: tl.constexpr,
    WIDE: tl.constexpr,
):
    PROLOGUE: tl.constexpr = ACT_P != 0 or scale_p is not None or shift_p is not None or addend is not None

    pid = tl.program_id(0)
    mid = mid_vecs * VEC
    outs = out_vecs * OUT_VEC
    blocks = tl.cdiv(outs, OUTPUTS)
    block = pid % blocks
    o = block * OUTPUTS + tl.arange(0, OUTPUTS)
    o_ok = o < outs
    pixel_tile = pid // blocks
    tile = pixel_tile % tiles
    p0 = (tile // ROW_STEP) * (ROWS * ROW_STEP) + tile % ROW_STEP
    f = pixel_tile // tiles * COLS + tl.arange(0, COLS)
    if WIDE:
        f = f.to(tl.int64)
        o = o.to(tl.int64)
    picture = f // q
    column = f % q
    f_ok = picture < n
    w0 = column * STRIDE_W - pad_left
    h0 = p0 * STRIDE_H - pad_top
    pixels = picture * (sx_n * VEC) + w0 * (sx_w * VEC)

    acc = ()
    for _ in tl.static_range(ROWS):
        acc = acc + (tl.zeros([COLS, OUTPUTS], tl.float32),)
    for k0 in range(0, mid, DEPTH):
        c = k0 + tl.arange(0, DEPTH)
        c_ok = c < mid
        c_x = c if MULTIPLIER == 1 else c // MULTIPLIER
        offsets = pixels[:, None] + c_x[None, :]
        zs = ()
        for i in tl.static_range(ROWS):
            zs = zs + (tl.zeros([COLS, DEPTH], tl.float32),)
        # Not unrolled, or the loads of all S columns would be moved to the front and crowd the registers.
        for s in range(S):
            taps = ()
            if weight is not None:
                for r in tl.static_range(R):
                    tap = tl.load(weight + (r * S + s) * mid + c, mask=c_ok, other=0.0)
                    taps = taps + (tap.to(tl.float32)[None, :],)
            w_s = w0 + s * DILATION_W
            w_ok = f_ok & (w_s >= 0) & (w_s < w)
            for j in tl.static_range((ROWS - 1) * TAP_STEP + R):
                if j % TAP_STEP < R:
                    h_j = h0 + j * DILATION_H
                    mask = (w_ok & (h_j >= 0) & (h_j < h))[:, None] & c_ok[None, :]
                    row = h_j.to(tl.int64) * (sx_h * VEC) + s * DILATION_W * (sx_w * VEC)
                    raw = tl.load((x + row) + offsets, mask=mask, other=0.0)
                    v = raw.to(tl.float32)
                    if PROLOGUE:
                        v = affine(v, scale_p, shift_p, c_x, c_ok)
                        if addend is not None:
                            v += tl.load((addend + row) + offsets, mask=mask, other=0.0).to(tl.float32)
                            # Rounded as it is stored: backward reads the stored one, and must see the same signs.
                            pre = v.to(x.dtype.element_ty)
                            v = pre.to(tl.float32)
                            if j >= CENTRE_R and j < CENTRE_R + ROWS:
                                own = (picture * (h * w) + column)[:, None] * mid + c[None, :]
                                at = x_pre + h_j.to(tl.int64) * (w * mid)
                                tl.store(at + own, pre, mask=mask & ((s == CENTRE_S) & (block == 0)))
                        v = tl.where(mask, activate(v, alpha_p, ACT_P), 0.0)
                    new = ()
                    for i in tl.static_range(ROWS):
                        if j >= i * TAP_STEP and j < i * TAP_STEP + R:
                            if weight is None:
                                new = new + (v,)
                            else:
                                new = new + (zs[i] + v * taps[j - i * TAP_STEP],)
                        else:
                            new = new + (zs[i],)
                    zs = new
        filters = tl.load(w_pw + (o[:, None] * mid + c[None, :]), mask=o_ok[:, None] & c_ok[None, :], other=0.0)
        new_acc = ()
        for i in tl.static_range(ROWS):
            z = activate(affine(zs[i], scale_m, shift_m, c, c_ok), alpha_m, ACT_M).to(filters.dtype)
            new_acc = new_acc + (tl.dot(z, tl.trans(filters), acc[i], input_precision=PRECISION),)
        acc = new_acc

    out = (picture * (p * q) + column)[:, None] * outs + o[None, :]
    total = tl.zeros([OUTPUTS], tl.float32)
    count = 0
    rounded = ()
    for i in tl.static_range(ROWS):
        p_i = p0 + i * ROW_STEP
        row_ok = f_ok & (p_i < p)
        mask = row_ok[:, None] & o_ok[None, :]
        u = acc[i]
        if bias is not None:
            u += tl.load(bias + o, mask=o_ok, other=0.0).to(tl.float32)[None, :]
        u = affine(u, scale_e, shift_e, o, o_ok)
        row = p_i.to(tl.int64) * (q * outs)
        if residual is not None:
            u += tl.load((residual + row) + out, mask=mask, other=0.0).to(tl.float32)
        r_i = activate(u, alpha_e, ACT_E).to(y.dtype.element_ty)
        tl.store((y + row) + out, r_i, mask=mask)
        if partials is not None:
            # PyTorch takes the statistics of the rounded result; those of the unrounded one are different numbers.
            count += tl.sum(row_ok.to(tl.int32), axis=0)
            kept = tl.where(mask, r_i.to(tl.float32), 0.0)
            rounded = rounded + (kept,)
            total += tl.sum(kept, axis=0)
    if partials is not None:
        centre = total / tl.maximum(count, 1).to(tl.float32)
        first = tl.zeros([OUTPUTS], tl.float32)
        second = tl.zeros([OUTPUTS], tl.float32)
        for i in tl.static_range(ROWS):
            row_ok = f_ok & (p0 + i * ROW_STEP < p)
            d = tl.where(row_ok[:, None], rounded[i] - centre[None, :], 0.0)
            first += tl.sum(d, axis=0)
            second += tl.sum(d * d, axis=0)
        sums = partials + pixel_tile.to(tl.int64) * 3 * outs
        tl.store(sums + o, centre, mask=o_ok)
        tl.store(sums + outs + o, first, mask=o_ok)
        tl.store(sums + 2 * outs + o, second, mask=o_ok)
        tl.store(counts + pixel_tile, count, mask=block == 0)
