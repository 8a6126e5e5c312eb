"""BatchNorm's backward on load: the gradient of a raw output, formed where a kernel reads it and never stored."""

import triton
import triton.language as tl

from .activations import RELU, RELU6, activation_gradient


@triton.jit
def raw_gradient(
    du,  # [N, P, Q, C_out] contiguous; of the pool's resolution, [N, POOLED_P, POOLED_Q, C_out], beside taps
    taps,  # uint8, like du: the tap of its 3x3 window that an element belongs to; may be None
    r,  # [N, P, Q, C_out], contiguous
    coef,  # [3, C_out] float32
    pixel,  # [pixels] flat over N, P, Q
    ok,  # [pixels]
    o,  # [channels]
    o_ok,  # [channels]
    outs,
    p,
    q,
    pooled_p,
    pooled_q,
    top,  # how far the first window begins above and left of the picture
    left,
):
    """coef[0] * du + coef[1] * r + coef[2], [pixels, channels] in r's type, 0 outside the masks."""
    mask = ok[:, None] & o_ok[None, :]
    at = pixel[:, None] * outs + o[None, :]
    a = tl.load(coef + o, mask=o_ok, other=0.0)
    b = tl.load(coef + outs + o, mask=o_ok, other=0.0)
    d = tl.load(coef + 2 * outs + o, mask=o_ok, other=0.0)
    if taps is None:
        g = tl.load(du + at, mask=mask, other=0.0).to(tl.float32)
    else:
        # A pixel lies in at most two windows along each side; the one that begins last has the smallest tap.
        column = pixel % q + left
        rest = pixel // q
        row = rest % p + top
        picture = rest // p
        g = tl.zeros([pixel.shape[0], o.shape[0]], tl.float32)
        for i in tl.static_range(2):
            for j in tl.static_range(2):
                window_p = row // 2 - i
                window_q = column // 2 - j
                tap_r = row % 2 + 2 * i
                tap_s = column % 2 + 2 * j
                meets = ok & (tap_r < 3) & (tap_s < 3) & (window_p >= 0) & (window_q >= 0)
                meets = meets & (window_p < pooled_p) & (window_q < pooled_q)
                window = ((picture * pooled_p + window_p) * pooled_q + window_q)[:, None] * outs + o[None, :]
                there = meets[:, None] & o_ok[None, :]
                tap = tl.load(taps + window, mask=there, other=255).to(tl.int32)
                part = tl.load(du + window, mask=there, other=0.0).to(tl.float32)
                g += tl.where(tap == (tap_r * 3 + tap_s)[:, None], part, 0.0)
    v = tl.load(r + at, mask=mask, other=0.0).to(tl.float32)
    v = g * a[None, :] + (v * b[None, :] + d[None, :])
    return tl.where(mask, v, 0.0).to(r.dtype.element_ty)


@triton.jit
def masked_gradient(d, u, alpha, CODE: tl.constexpr):
    """d * act'(u) as a product, so that a gradient that is no number is seen behind a closed ReLU too."""
    if CODE == RELU:
        d = d * (u > 0.0).to(tl.float32)
    elif CODE == RELU6:
        d = d * ((u > 0.0) & (u < 6.0)).to(tl.float32)
    else:
        d = activation_gradient(d, u, alpha, CODE)
    return d
