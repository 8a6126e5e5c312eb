"""Depthwise forward and backward for everything: any filter, stride, dilation and depth multiplier, at run time.

No unrolling and no reuse of taps in registers: these serve the shapes that the fast kernels do not take. Triton may
tell strides, dilations and multipliers of 1 from others, which saves divisions and is the layer's own; no number that
changes with the batch or the map.
"""

import triton
import triton.language as tl

from .activations import activate, activation_gradient, affine


@triton.jit(
    do_not_specialize=[
        "n", "h", "w", "channel_vecs", "p", "q", "sx_n", "sx_h", "sx_w", "pad_top", "pad_left", "r_size", "s_size",
    ]
)  # fmt: skip
def fprop_general(
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
    r_size,
    s_size,
    stride_h,
    stride_w,
    dilation_h,
    dilation_w,
    multiplier,
    ACT_P: tl.constexpr,
    ACT_E: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    VEC: tl.constexpr,
):
    pid = tl.program_id(0)
    channels = channel_vecs * VEC
    blocks = tl.cdiv(channels, CHANNELS)
    c = (pid % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    c_ok = c < channels
    c_x = c // multiplier
    f = tl.cast(pid // blocks, tl.int64) * PIXELS + tl.arange(0, PIXELS)
    column = f % q
    row = f // q % p
    picture = f // q // p
    f_ok = picture < n
    h0 = row * stride_h - pad_top
    w0 = column * stride_w - pad_left
    acc = tl.zeros([PIXELS, CHANNELS], tl.float32)
    for r in range(r_size):
        h_r = h0 + r * dilation_h
        for s in range(s_size):
            w_s = w0 + s * dilation_w
            mask = (f_ok & (h_r >= 0) & (h_r < h) & (w_s >= 0) & (w_s < w))[:, None] & c_ok[None, :]
            offsets = ((picture * sx_n + h_r * sx_h + w_s * sx_w) * VEC)[:, None] + c_x[None, :]
            v = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
            v = tl.where(mask, activate(affine(v, scale_p, shift_p, c_x, c_ok), alpha_p, ACT_P), 0.0)
            tap = tl.load(weight + (r * s_size + s) * channels + c, mask=c_ok, other=0.0)
            acc += v * tap.to(tl.float32)[None, :]
    acc = activate(affine(acc, scale_e, shift_e, c, c_ok), alpha_e, ACT_E)
    tl.store(y + (f[:, None] * channels + c[None, :]), acc.to(y.dtype.element_ty), mask=f_ok[:, None] & c_ok[None, :])


@triton.jit(
    do_not_specialize=[
        "n", "h", "w", "channel_vecs", "p", "q", "sx_n", "sx_h", "sx_w", "sd_n", "sd_h", "sd_w", "pad_top", "pad_left",
        "r_size", "s_size",
    ]
)  # fmt: skip
def dgrad_general(
    x,  # [N, H, W, C_in], strides sx_n, sx_h, sx_w in units of VEC
    dz,  # [N, P, Q, C_in * multiplier], strides sd_n, sd_h, sd_w in units of VEC
    weight,  # [R * S, C_in * multiplier]
    dx,  # [N, H, W, C_in], contiguous
    partials,  # [pixel blocks, 2, C_in] float32: sums for dscale_p, dshift_p; written if WANT_AFFINE
    scale_p,  # [C_in], may be None
    shift_p,  # [C_in], may be None
    alpha_p,
    n,
    h,
    w,
    channel_vecs,  # C_in / VEC
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
    r_size,
    s_size,
    stride_h,
    stride_w,
    dilation_h,
    dilation_w,
    multiplier,
    ACT_P: tl.constexpr,
    WANT_AFFINE: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    VEC: tl.constexpr,
):
    pid = tl.program_id(0)
    channels = channel_vecs * VEC
    blocks = tl.cdiv(channels, CHANNELS)
    c = (pid % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    c_ok = c < channels
    f = tl.cast(pid // blocks, tl.int64) * PIXELS + tl.arange(0, PIXELS)
    column = f % w
    row = f // w % h
    picture = f // w // h
    f_ok = picture < n
    acc = tl.zeros([PIXELS, CHANNELS], tl.float32)
    for m in range(multiplier):
        c_z = c * multiplier + m
        for r in range(r_size):
            h_r = row + pad_top - r * dilation_h
            p_r = h_r // stride_h
            r_ok = f_ok & (h_r >= 0) & (h_r % stride_h == 0) & (p_r < p)
            for s in range(s_size):
                w_s = column + pad_left - s * dilation_w
                q_s = w_s // stride_w
                mask = (r_ok & (w_s >= 0) & (w_s % stride_w == 0) & (q_s < q))[:, None] & c_ok[None, :]
                offsets = ((picture * sd_n + p_r * sd_h + q_s * sd_w) * VEC)[:, None] + c_z[None, :]
                g = tl.load(dz + offsets, mask=mask, other=0.0).to(tl.float32)
                tap = tl.load(weight + (r * s_size + s) * (channels * multiplier) + c_z, mask=c_ok, other=0.0)
                acc += g * tap.to(tl.float32)[None, :]
    mask = f_ok[:, None] & c_ok[None, :]
    if ACT_P != 0 or WANT_AFFINE:
        offsets = ((picture * sx_n + row * sx_h + column * sx_w) * VEC)[:, None] + c[None, :]
        v = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
        acc = activation_gradient(acc, affine(v, scale_p, shift_p, c, c_ok), alpha_p, ACT_P)
        if WANT_AFFINE:
            sums = partials + tl.cast(pid // blocks, tl.int64) * 2 * channels
            tl.store(sums + c, tl.sum(acc * v, axis=0), mask=c_ok)
            tl.store(sums + channels + c, tl.sum(acc, axis=0), mask=c_ok)
    acc = affine(acc, scale_p, None, c, c_ok)
    tl.store(dx + (f[:, None] * channels + c[None, :]), acc.to(dx.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=[
        "n", "h", "w", "channel_vecs", "p", "q", "sx_n", "sx_h", "sx_w", "sd_n", "sd_h", "sd_w", "pad_top", "pad_left",
        "r_size", "s_size", "share",
    ]
)  # fmt: skip
def wgrad_general(
    x,  # [N, H, W, C_in], strides sx_n, sx_h, sx_w in units of VEC
    dz,  # [N, P, Q, C_mid], strides sd_n, sd_h, sd_w in units of VEC
    partials,  # [programs / taps / channel blocks, R * S + 2, C_mid] float32
    scale_p,  # [C_in], may be None
    shift_p,  # [C_in], may be None
    alpha_p,
    n,
    h,
    w,
    channel_vecs,  # C_mid / VEC
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
    r_size,
    s_size,
    stride_h,
    stride_w,
    dilation_h,
    dilation_w,
    multiplier,
    share,  # pixel blocks a program has
    ACT_P: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    VEC: tl.constexpr,
):
    """A program makes one tap's sum over a share of the output pixels; those of one share are neighbours in time."""
    channels = channel_vecs * VEC
    taps = r_size * s_size
    tap = tl.program_id(0) % taps
    pid = tl.program_id(0) // taps
    blocks = tl.cdiv(channels, CHANNELS)
    c = (pid % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    c_ok = c < channels
    c_x = c // multiplier
    pid = tl.cast(pid // blocks, tl.int64)
    acc = tl.zeros([PIXELS, CHANNELS], tl.float32)
    for block in range(share):
        f = (pid * share + block) * PIXELS + tl.arange(0, PIXELS)
        column = f % q
        row = f // q % p
        picture = f // q // p
        h_r = row * stride_h - pad_top + tap // s_size * dilation_h
        w_s = column * stride_w - pad_left + tap % s_size * dilation_w
        ok = (picture < n) & (h_r >= 0) & (h_r < h) & (w_s >= 0) & (w_s < w)
        mask = ok[:, None] & c_ok[None, :]
        x_offsets = ((picture * sx_n + h_r * sx_h + w_s * sx_w) * VEC)[:, None] + c_x[None, :]
        d_offsets = ((picture * sd_n + row * sd_h + column * sd_w) * VEC)[:, None] + c[None, :]
        v = tl.load(x + x_offsets, mask=mask, other=0.0).to(tl.float32)
        v = tl.where(mask, activate(affine(v, scale_p, shift_p, c_x, c_ok), alpha_p, ACT_P), 0.0)
        acc += v * tl.load(dz + d_offsets, mask=mask, other=0.0).to(tl.float32)
    row_of = (pid * (taps + 2) + tap) * channels
    tl.store(partials + row_of + c, tl.sum(acc, axis=0), mask=c_ok)
