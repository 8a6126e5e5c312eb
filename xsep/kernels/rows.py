"""Rows of an image as tuples of tensors, one for each column that a lane has."""

import triton
import triton.language as tl


@triton.jit
def load_row(
    base,
    row,  # which is 0 outside the picture
    height,
    row_stride,
    column_stride,
    offsets,  # [COLS, CHANNELS] of the first column
    mask,  # of each column
    wanted,  # whether the row is looked at
    TAP_COLS: tl.constexpr,
    S: tl.constexpr,
):
    """The columns of one row, as they are stored; those that no tap meets (a stride beyond the filter's) are 0."""
    row_ok = wanted & (row >= 0) & (row < height)
    first = base + row.to(tl.int64) * row_stride
    loaded = ()
    for k in tl.static_range(len(mask)):
        if k % TAP_COLS < S:
            v = tl.load((first + k * column_stride) + offsets, mask=mask[k] & row_ok, other=0.0)
        else:
            v = tl.zeros(offsets.shape, base.dtype.element_ty)
        loaded = loaded + (v,)
    return loaded


@triton.jit
def add(values, index: tl.constexpr, value):
    """The tuple, ``value`` added to its entry at ``index``."""
    return values[:index] + (values[index] + value,) + values[index + 1 :]


@triton.jit
def stacked(tiles):
    """Tensors [COLS, CHANNELS], a power of two of them, as one, the first above the second; no value changes lanes."""
    for _ in tl.static_range(6):
        if len(tiles) > 1:
            pairs = ()
            for i in tl.static_range(len(tiles) // 2):
                both = tl.permute(tl.join(tiles[2 * i], tiles[2 * i + 1]), (2, 0, 1))
                pairs = pairs + (tl.reshape(both, (2 * tiles[0].shape[0], tiles[0].shape[1])),)
            tiles = pairs
    return tiles[0]
