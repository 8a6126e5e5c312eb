"""Fused separable forward: z is made in registers and fed to the matrix units; it never reaches memory.

One program makes ``ROWS`` output rows of ``COLS`` groups of ``SIDE`` columns (flat over pictures, as in
``depthwise_fprop``) of ``OUTPUTS`` channels. It walks over the C_mid channels ``DEPTH`` at a time. Every column of x
that the groups meet is taken once, its rows loaded and added to each z that they are a tap of: for one z that is
(SIDE + S - 1) / SIDE * (ROWS + R - 1) / ROWS elements of x, most of them from L1. The ROWS * SIDE tensors z [COLS,
DEPTH] go through the middle and, stacked to ``PART`` pixels, into ``tl.dot`` with a block of w_pw. With all of C_out in
one program z is made once; beyond, the programs of one pixel tile are neighbours in time, so that x comes from L2 when
z is made again.

Without a depthwise filter (``weight`` None, R = S = 1) z is x after the prologue: the pointwise convolution alone,
with the same epilogue and statistics.

Not software-pipelined where there is a filter (``num_stages`` 1): every tap would get its own shared-memory buffers.
Expected traffic: x, residual and y once through memory, w_pw once a pixel tile through L2.
"""

import triton
import triton.language as tl

from .activations import activate, affine, scaled, vector
from .rows import add, stacked
from .tf32 import operand


@triton.jit
def filter_column(weight, s, mid, c, c_ok, R: tl.constexpr, S: tl.constexpr):
    """R taps [1, DEPTH]; of no filter, one that is ()."""
    taps = ()
    if weight is None:
        taps = ((),)
    else:
        for r in tl.static_range(R):
            tap = tl.load(weight + (r * S + s) * mid + c, mask=c_ok, other=0.0)
            taps = taps + (tap.to(tl.float32)[None, :],)
    return taps


@triton.jit
def add_column(
    zs,  # ROWS * SIDE tensors [COLS, DEPTH]
    taps,  # for each of the SIDE columns of z the taps that meet this column of x, () where none does
    weight,  # None where there is no filter
    x,
    addend,
    x_pre,
    k,  # which column of x, from the first that the groups meet
    central,  # whether it holds the pixels of z
    MAY_BE_CENTRAL: tl.constexpr,
    w_k,  # [COLS], where in the picture it lies
    f_ok,
    h0,
    h,
    w,
    row_stride,
    column_stride,
    offsets,
    c_ok,
    scale_p,
    shift_p,
    load_scale,  # what :func:`vector` makes of them
    load_shift,
    alpha_p,
    block,
    once,
    TAP_ROWS: tl.constexpr,
    R: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    CENTRE_R: tl.constexpr,
    ACT_P: tl.constexpr,
    ROWS: tl.constexpr,
):
    """zs with what one column of x adds to them: its rows, each loaded once, with the prologue."""
    LINES: tl.constexpr = (ROWS - 1) * TAP_ROWS + R
    BATCH: tl.constexpr = LINES if addend is None else 1  # rows that are loaded at once: what there are registers for
    SIDE: tl.constexpr = len(taps)
    # All activations are 0 at 0, which is what channels that there are not come to as well.
    PADDED: tl.constexpr = scale_p is not None or shift_p is not None
    w_ok = f_ok & (w_k >= 0) & (w_k < w)
    for start in tl.static_range(0, LINES, BATCH):
        for turn in range(once):
            line = ()
            for t in tl.static_range(start, start + BATCH):
                # Rows that no tap meets (a stride beyond the filter's) are not loaded.
                if t % TAP_ROWS < R:
                    h_t = h0 + t * DILATION_H
                    mask = (w_ok & (h_t >= 0) & (h_t < h))[:, None] & c_ok[None, :]
                    row = h_t.to(tl.int64) * row_stride + k * DILATION_W * column_stride
                    raw = (tl.load((x + row) + offsets, mask=mask, other=0.0),)
                    if addend is not None:
                        raw = raw + (tl.load((addend + row) + offsets, mask=mask, other=0.0),)
                    line = line + (raw,)
                else:
                    line = line + ((),)
            for t in tl.static_range(start, start + BATCH):
                if t % TAP_ROWS < R:
                    h_t = h0 + t * DILATION_H
                    pixel_ok = (w_ok & (h_t >= 0) & (h_t < h))[:, None]
                    v = line[t - start][0].to(tl.float32)
                    if ACT_P != 0 or (PADDED or addend is not None):
                        v = scaled(v, scale_p, shift_p, load_scale, load_shift)
                        if addend is not None:
                            # Rounded as it is stored: backward reads the stored one, and must see the same signs.
                            pre = (v + line[t - start][1].to(tl.float32)).to(x.dtype.element_ty)
                            v = pre.to(tl.float32)
                            if MAY_BE_CENTRAL and (t >= CENTRE_R and t < CENTRE_R + ROWS):
                                row = h_t.to(tl.int64) * row_stride + k * DILATION_W * column_stride
                                mask = pixel_ok & c_ok[None, :] & (central & (block == 0))
                                tl.store((x_pre + row) + offsets, pre, mask=mask)
                        v = activate(v, alpha_p, ACT_P)
                        if PADDED:
                            v = tl.where(pixel_ok, v, 0.0)
                    for i in tl.static_range(ROWS):
                        for j in tl.static_range(SIDE):
                            if (t >= i * TAP_ROWS and t < i * TAP_ROWS + R) and len(taps[j]) > 0:
                                if weight is None:
                                    zs = add(zs, i * SIDE + j, v)
                                else:
                                    zs = add(zs, i * SIDE + j, v * taps[j][t - i * TAP_ROWS])
    return zs


@triton.jit(
    do_not_specialize=[
        "n", "h", "w", "mid_vecs", "out_vecs", "p", "q", "sx_n", "sx_h", "sx_w", "pad_top", "pad_left", "tiles",
        "groups",
    ]
)  # fmt: skip
def separable_fprop(
    x,  # [N, H, W, C_in], strides sx_n, sx_h, sx_w in units of VEC
    addend,  # like x, both contiguous; added after scale_p and shift_p; may be None
    x_pre,  # like them: the prologue before its activation; written if there is an addend
    weight,  # [R * S, C_mid], may be None
    w_pw,  # [C_out, C_mid]; rounded beforehand where PRECISION is "tf32"
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
    groups,  # of SIDE columns in a row of y
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    ROW_STEP: tl.constexpr,  # DILATION_H / gcd(STRIDE_H, DILATION_H)
    TAP_ROWS: tl.constexpr,  # STRIDE_H / gcd(STRIDE_H, DILATION_H)
    COL_STEP: tl.constexpr,  # the same of columns
    TAP_COLS: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    CENTRE_R: tl.constexpr,  # the tap that lies on the output pixel itself, where there is an addend
    CENTRE_S: tl.constexpr,
    ACT_P: tl.constexpr,
    ACT_M: tl.constexpr,
    ACT_E: tl.constexpr,
    PRECISION: tl.constexpr,  # "ieee" or "tf32", of float32 products
    ROWS: tl.constexpr,
    SIDE: tl.constexpr,
    COLS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    VEC: tl.constexpr,
    OUT_VEC: tl.constexpr,
    WIDE: tl.constexpr,
):
    COLUMNS: tl.constexpr = (SIDE - 1) * TAP_COLS + S
    # The pixels of one product: 64 are what the matrix units of sm_90 take at once, and few enough for what follows.
    PART: tl.constexpr = COLS if COLS >= 64 else (ROWS * SIDE * COLS if ROWS * SIDE * COLS < 64 else 64)
    PARTS: tl.constexpr = ROWS * SIDE * COLS // PART

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
    first = pixel_tile // tiles * COLS
    f = first + tl.arange(0, COLS)
    if WIDE:
        f = f.to(tl.int64)
        o = o.to(tl.int64)
    picture = f // groups
    group = f % groups
    column = (group // COL_STEP) * (SIDE * COL_STEP) + group % COL_STEP
    f_ok = picture < n
    w0 = column * STRIDE_W - pad_left
    h0 = p0 * STRIDE_H - pad_top
    pixels = picture * (sx_n * VEC) + w0 * (sx_w * VEC)
    # A loop of one turn that the compiler does not see through: without it, the loads of all columns would be moved to
    # the front and crowd the registers.
    once = tl.minimum(tiles, 1)

    acc = ()
    for _ in tl.static_range(PARTS):
        acc = acc + (tl.zeros([PART, OUTPUTS], tl.float32),)
    for k0 in range(0, mid, DEPTH):
        c = k0 + tl.arange(0, DEPTH)
        c_ok = c < mid
        c_x = c if MULTIPLIER == 1 else c // MULTIPLIER
        offsets = pixels[:, None] + c_x[None, :]
        load_scale = vector(scale_p, c_x, c_ok)
        load_shift = vector(shift_p, c_x, c_ok)
        zs = ()
        for i in tl.static_range(ROWS * SIDE):
            zs = zs + (tl.zeros([COLS, DEPTH], tl.float32),)
        if SIDE == 1:
            # Not unrolled, or the loads of all S columns would be moved to the front and crowd the registers.
            for s in range(S):
                taps = filter_column(weight, s, mid, c, c_ok, R, S)
                zs = add_column(
                    zs, (taps,), weight, x, addend, x_pre, s, s == CENTRE_S, True, w0 + s * DILATION_W, f_ok, h0, h, w,
                    sx_h * VEC, sx_w * VEC, offsets, c_ok, scale_p, shift_p, load_scale, load_shift, alpha_p, block,
                    once, TAP_ROWS, R, DILATION_H, DILATION_W, CENTRE_R, ACT_P, ROWS,
                )  # fmt: skip
        else:
            columns = ()
            for k in tl.static_range(COLUMNS):
                if k < S:
                    columns = columns + (filter_column(weight, k, mid, c, c_ok, R, S),)
                mine = ()
                for j in tl.static_range(SIDE):
                    if k >= j * TAP_COLS and k < j * TAP_COLS + S:
                        mine = mine + (columns[k - j * TAP_COLS],)
                    else:
                        mine = mine + ((),)
                for turn in range(once):
                    zs = add_column(
                        zs, mine, weight, x, addend, x_pre, k, True, k >= CENTRE_S and k < CENTRE_S + SIDE,
                        w0 + k * DILATION_W, f_ok, h0, h, w, sx_h * VEC, sx_w * VEC, offsets, c_ok, scale_p,
                        shift_p, load_scale, load_shift, alpha_p, block, once, TAP_ROWS, R, DILATION_H, DILATION_W,
                        CENTRE_R, ACT_P, ROWS,
                    )  # fmt: skip
        filters = tl.load(w_pw + (o[:, None] * mid + c[None, :]), mask=o_ok[:, None] & c_ok[None, :], other=0.0)
        mids = ()
        for i in tl.static_range(ROWS * SIDE):
            z = activate(affine(zs[i], scale_m, shift_m, c, c_ok), alpha_m, ACT_M)
            mids = mids + (operand(z.to(filters.dtype), PRECISION),)
        new = ()
        for i in tl.static_range(PARTS):
            z = stacked(mids[i * (PART // COLS) : (i + 1) * (PART // COLS)])
            new = new + (tl.dot(z, tl.trans(filters), acc[i], input_precision=PRECISION),)
        acc = new

    row = p0.to(tl.int64) * (q * outs)
    total = tl.zeros([OUTPUTS], tl.float32)
    count = 0
    rounded = ()
    oks = ()
    for i in tl.static_range(PARTS):
        # Pixel m of the tile: z's tensor i * SIDE + j, then the group.
        m = i * PART + tl.arange(0, PART)
        f_m = first + m % COLS
        if WIDE:
            f_m = f_m.to(tl.int64)
        picture_m = f_m // groups
        group_m = f_m % groups
        p_m = m // (COLS * SIDE) * ROW_STEP  # from the tile's first row, whose place has 64 bits
        q_m = (group_m // COL_STEP) * (SIDE * COL_STEP) + group_m % COL_STEP + m // COLS % SIDE * COL_STEP
        ok = (picture_m < n) & (p0 + p_m < p) & (q_m < q)
        mask = ok[:, None] & o_ok[None, :]
        out = (picture_m * (p * q) + p_m * q + q_m)[:, None] * outs + o[None, :]
        u = acc[i]
        if bias is not None:
            u += tl.load(bias + o, mask=o_ok, other=0.0).to(tl.float32)[None, :]
        u = affine(u, scale_e, shift_e, o, o_ok)
        if residual is not None:
            u += tl.load((residual + row) + out, mask=mask, other=0.0).to(tl.float32)
        r_i = activate(u, alpha_e, ACT_E).to(y.dtype.element_ty)
        tl.store((y + row) + out, r_i, mask=mask)
        if partials is not None:
            # PyTorch takes the statistics of the rounded result; those of the unrounded one are different numbers.
            count += tl.sum(ok.to(tl.int32), axis=0)
            kept = tl.where(ok[:, None], r_i.to(tl.float32), 0.0)
            rounded = rounded + (kept,)
            oks = oks + (ok,)
            total += tl.sum(kept, axis=0)
    if partials is not None:
        centre = total / tl.maximum(count, 1).to(tl.float32)
        once_more = tl.zeros([OUTPUTS], tl.float32)
        squares = tl.zeros([OUTPUTS], tl.float32)
        for i in tl.static_range(PARTS):
            d = tl.where(oks[i][:, None], rounded[i] - centre[None, :], 0.0)
            once_more += tl.sum(d, axis=0)
            squares += tl.sum(d * d, axis=0)
        sums = partials + pixel_tile.to(tl.int64) * 3 * outs
        tl.store(sums + o, centre, mask=o_ok)
        tl.store(sums + outs + o, once_more, mask=o_ok)
        tl.store(sums + 2 * outs + o, squares, mask=o_ok)
        tl.store(counts + pixel_tile, count, mask=block == 0)
