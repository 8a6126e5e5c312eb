"""Second, deterministic stages: sums of partial gradients."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows", "entries", "taps", "channels"])
def sum_partials(
    partials,  # [rows, entries, C] float32
    dw,  # [C, taps], may be None
    dvectors,  # [entries - taps, C] float32, may be None
    rows,
    entries,
    taps,
    channels,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Adds the rows, always in the same order. Program (k, block) makes entry k of a block of channels."""
    k = tl.program_id(0)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    c_ok = c < channels
    row = tl.arange(0, ROWS)
    acc = tl.zeros([ROWS, CHANNELS], tl.float32)
    for start in range(0, rows, ROWS):
        t = (start + row).to(tl.int64)
        offsets = (t * entries + k)[:, None] * channels + c[None, :]
        acc += tl.load(partials + offsets, mask=(t < rows)[:, None] & c_ok[None, :], other=0.0)
    total = tl.sum(acc, axis=0)
    if dw is not None:
        tl.store(dw + c * taps + k, total.to(dw.dtype.element_ty), mask=c_ok & (k < taps))
    if dvectors is not None:
        tl.store(dvectors + (k - taps) * channels + c, total, mask=c_ok & (k >= taps))
