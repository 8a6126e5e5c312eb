"""BatchNorm's statistics from per-tile (K, S, Q): K the tile's float32 mean, S and Q the sums of r - K and its square.

Merged in float64 and always in the same order. Sums of r and r^2 in float32 would lose everything on data whose mean
is large beside its deviation; deviations from the tile's own mean do not.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["pixels", "channel_vecs"])
def tile_statistics(
    r,  # [pixels, C]
    partials,  # [T, 3, C] float32
    counts,  # [T] int32
    pixels,
    channel_vecs,  # C / VEC
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    VEC: tl.constexpr,
):
    """Of a tensor that another kernel wrote. Program (tile, block) has a block of channels of one tile."""
    tile = tl.program_id(0).to(tl.int64)
    channels = channel_vecs * VEC
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    c_ok = c < channels
    m = tile * PIXELS + tl.arange(0, PIXELS)
    mask = (m < pixels)[:, None] & c_ok[None, :]
    v = tl.load(r + (m[:, None] * channels + c[None, :]), mask=mask, other=0.0).to(tl.float32)
    count = tl.sum((m < pixels).to(tl.int32), axis=0)
    centre = tl.sum(v, axis=0) / count.to(tl.float32)
    d = tl.where(mask, v - centre[None, :], 0.0)
    out = partials + tile * 3 * channels + c
    tl.store(out, centre, mask=c_ok)
    tl.store(out + channels, tl.sum(d, axis=0), mask=c_ok)
    tl.store(out + 2 * channels, tl.sum(d * d, axis=0), mask=c_ok)
    tl.store(counts + tile, count, mask=tl.program_id(1) == 0)


@triton.jit(do_not_specialize=["rows", "channels", "share"])
def merge_statistics(
    partials,  # [T, 3, C] float32
    counts,  # [T] int32
    batches,  # [] int64, counted up by one; may be None
    merged,  # [groups, 3, C] float64: count, mean, sum of squared deviations
    rows,  # T
    channels,
    share,  # tiles of a group
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Program (group, block) merges the group's tiles for a block of channels, in two passes over them."""
    group = tl.program_id(0)
    if batches is not None:
        # By one program, and here, so that it is done before those of the next launch divide by it.
        one = (group == 0) & (tl.program_id(1) == 0)
        tl.store(batches, tl.load(batches, mask=one, other=0) + 1, mask=one)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    c_ok = c < channels
    start = group * share
    stop = tl.minimum(start + share, rows)
    total = tl.zeros([ROWS, CHANNELS], tl.float64)
    number = tl.zeros([ROWS], tl.float64)
    for first in range(start, stop, ROWS):
        t = first + tl.arange(0, ROWS)
        mask = (t < stop)[:, None] & c_ok[None, :]
        at = partials + (t.to(tl.int64) * (3 * channels))[:, None] + c[None, :]
        n = tl.load(counts + t, mask=t < stop, other=0).to(tl.float64)
        k = tl.load(at, mask=mask, other=0.0).to(tl.float64)
        s = tl.load(at + channels, mask=mask, other=0.0).to(tl.float64)
        total += n[:, None] * k + s
        number += n
    count = tl.sum(number, axis=0)
    mean = tl.sum(total, axis=0) / tl.maximum(count, 1.0)
    deviations = tl.zeros([ROWS, CHANNELS], tl.float64)
    for first in range(start, stop, ROWS):
        t = first + tl.arange(0, ROWS)
        mask = (t < stop)[:, None] & c_ok[None, :]
        at = partials + (t.to(tl.int64) * (3 * channels))[:, None] + c[None, :]
        n = tl.load(counts + t, mask=t < stop, other=0).to(tl.float64)[:, None]
        k = tl.load(at, mask=mask, other=0.0).to(tl.float64)
        s = tl.load(at + channels, mask=mask, other=0.0).to(tl.float64)
        squares = tl.load(at + 2 * channels, mask=mask, other=0.0).to(tl.float64)
        off = k + s / tl.maximum(n, 1.0) - mean[None, :]
        deviations += tl.where(mask, squares - s * s / tl.maximum(n, 1.0) + n * off * off, 0.0)
    out = merged + group * 3 * channels + c
    tl.store(out, tl.zeros([CHANNELS], tl.float64) + count, mask=c_ok)
    tl.store(out + channels, mean, mask=c_ok)
    tl.store(out + 2 * channels, tl.sum(deviations, axis=0), mask=c_ok)


@triton.jit(do_not_specialize=["groups", "channels"])
def finalize_statistics(
    merged,  # [groups, 3, C] float64
    gamma,  # [C]
    beta,  # [C]
    running_mean,  # [C], updated; may be None
    running_var,  # [C], updated; may be None
    batches,  # [] int64: batches seen, this one included, for a cumulative average; None: use momentum
    vec,  # [2, C] float32: scale, shift
    centres_out,  # [2, C] float32: the mean, twice
    invstd_out,  # [C] float32
    count_out,  # [] float64
    momentum,
    eps,
    groups,
    channels,
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """BatchNorm's vectors, and its running statistics as nn.BatchNorm2d moves them (unbiased variance)."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    c_ok = c < channels
    g = tl.arange(0, GROUPS)
    mask = (g < groups)[:, None] & c_ok[None, :]
    at = merged + (g * (3 * channels))[:, None] + c[None, :]
    n = tl.load(at, mask=mask, other=0.0)
    means = tl.load(at + channels, mask=mask, other=0.0)
    count = tl.sum(n, axis=0)
    mean = tl.sum(n * means, axis=0) / tl.maximum(count, 1.0)
    off = means - mean[None, :]
    deviations = tl.sum(tl.load(at + 2 * channels, mask=mask, other=0.0) + n * off * off, axis=0)

    invstd = 1.0 / tl.sqrt(deviations / tl.maximum(count, 1.0) + eps)
    # The shift is taken from the scale as it is stored, so that scale * mean + shift is beta.
    scale = (tl.load(gamma + c, mask=c_ok, other=0.0).to(tl.float64) * invstd).to(tl.float32)
    shift = tl.load(beta + c, mask=c_ok, other=0.0).to(tl.float64) - mean * scale.to(tl.float64)
    tl.store(vec + c, scale, mask=c_ok)
    tl.store(vec + channels + c, shift.to(tl.float32), mask=c_ok)
    tl.store(centres_out + c, mean.to(tl.float32), mask=c_ok)
    tl.store(centres_out + channels + c, mean.to(tl.float32), mask=c_ok)
    tl.store(invstd_out + c, invstd.to(tl.float32), mask=c_ok)
    tl.store(count_out + c, count, mask=c_ok & (c == 0))
    if running_mean is not None:
        if batches is None:
            weight = tl.zeros([CHANNELS], tl.float64) + momentum
        else:
            weight = 1.0 / (tl.zeros([CHANNELS], tl.float64) + tl.load(batches).to(tl.float64))
        old_mean = tl.load(running_mean + c, mask=c_ok, other=0.0).to(tl.float64)
        old_var = tl.load(running_var + c, mask=c_ok, other=0.0).to(tl.float64)
        unbiased = deviations / tl.maximum(count - 1.0, 1.0)
        new_mean = old_mean + weight * (mean - old_mean)
        new_var = old_var + weight * (unbiased - old_var)
        tl.store(running_mean + c, new_mean.to(running_mean.dtype.element_ty), mask=c_ok)
        tl.store(running_var + c, new_var.to(running_var.dtype.element_ty), mask=c_ok)


@triton.jit(do_not_specialize=["channels"])
def finalize_backward(
    sums,  # [2, C] float32: of du and of du * (r - mean)
    mean,  # [C] float32
    invstd,  # [C] float32
    gamma,  # [C], may be None
    count,  # [] float64
    coef,  # [3, C] float32: dr = coef[0] * du + coef[1] * r + coef[2]
    dgamma,  # [C] float32
    dbeta,  # [C] float32
    channels,
    BATCH: tl.constexpr,  # whether mean and variance were the batch's own; fixed ones have no gradient
    CHANNELS: tl.constexpr,
):
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    c_ok = c < channels
    first = tl.load(sums + c, mask=c_ok, other=0.0).to(tl.float64)
    second = tl.load(sums + channels + c, mask=c_ok, other=0.0).to(tl.float64)
    i = tl.load(invstd + c, mask=c_ok, other=0.0).to(tl.float64)
    a = i
    if gamma is not None:
        a = a * tl.load(gamma + c, mask=c_ok, other=0.0).to(tl.float64)
    b = tl.zeros([CHANNELS], tl.float64)
    d = tl.zeros([CHANNELS], tl.float64)
    if BATCH:
        number = tl.zeros([CHANNELS], tl.float64) + tl.load(count)
        slope = i * i * second / number
        b = -a * slope
        d = a * (slope * tl.load(mean + c, mask=c_ok, other=0.0).to(tl.float64) - first / number)
    tl.store(coef + c, a.to(tl.float32), mask=c_ok)
    tl.store(coef + channels + c, b.to(tl.float32), mask=c_ok)
    tl.store(coef + 2 * channels + c, d.to(tl.float32), mask=c_ok)
    tl.store(dgamma + c, (i * second).to(tl.float32), mask=c_ok)
    tl.store(dbeta + c, first.to(tl.float32), mask=c_ok)
