"""Internal ops that the training chain stands on: a separable forward that takes BatchNorm's statistics of what it
writes, and the merge of those statistics. No gradients of their own: the chain's layers write them.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from ..backends import triton as backend
from ..backends import triton_launch as launch
from ..backends.triton_plans import chain_tile, device_of, unrolled
from ..problem import Affine, Geometry, Problem
from .definitions import LIBRARY

LIBRARY.define(
    "separable_fprop_statistics(Tensor x, Tensor? vec, Tensor? residual, int activation, float alpha, Tensor w_dw, "
    "Tensor w_pw, SymInt[] geometry, bool statistics) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    "batch_norm_finalize(Tensor partials, Tensor counts, Tensor gamma, Tensor beta, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, Tensor? batches, float momentum, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _problem(x: Tensor, w_dw: Tensor, w_pw: Tensor, geometry: Geometry, activation: int) -> Problem:
    n, c_in, h, w = x.shape
    return Problem(
        "separable", x.device.type, x.dtype, True, n, c_in, h, w, w_dw.shape[0] // c_in, w_dw.shape[2], w_dw.shape[3],
        w_pw.shape[0], geometry, (activation, 0, 0),
    )  # fmt: skip


def _checked(x: Tensor, residual: Optional[Tensor], w_dw: Tensor, w_pw: Tensor, geometry: Geometry) -> None:
    c_in, (c_mid, _, r, s) = x.shape[1], w_dw.shape
    if c_mid != c_in or tuple(w_pw.shape[1:]) != (c_mid, 1, 1):
        raise ValueError(f"w_dw must be [{c_in}, 1, R, S] and w_pw [C_out, {c_in}, 1, 1], got {list(w_dw.shape)} and "
                         f"{list(w_pw.shape)}")  # fmt: skip
    if not unrolled(_problem(x, w_dw, w_pw, geometry, 0)):
        raise ValueError(f"the training chain takes filters up to 7x7 and strides up to 2, got {r}x{s}, {geometry}")
    if residual is None:
        return
    g = geometry
    centred = g.pad_top == g.pad_bottom == g.dilation_h * (r // 2) and g.pad_left == g.pad_right
    centred = centred and g.pad_left == g.dilation_w * (s // 2) and r % 2 == s % 2 == 1 and g.stride == (1, 1)
    if not centred:
        raise ValueError(f"a residual needs stride 1 and padding that keeps the size, got {r}x{s}, {geometry}")
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(f"residual must be like x, {list(x.shape)} {x.dtype}, got {list(residual.shape)} "
                         f"{residual.dtype}")  # fmt: skip


def _images(x: Tensor, w_pw: Tensor, w_dw: Tensor, geometry: Geometry) -> Tensor:
    p, q = geometry.output_size(x.shape[2], x.shape[3], w_dw.shape[2], w_dw.shape[3])
    return backend.new_nhwc(x, x.shape[0], w_pw.shape[0], p, q)


def _outputs(
    x: Tensor, residual: Optional[Tensor], w_dw: Tensor, w_pw: Tensor, geometry: Geometry, statistics: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty r, partials, counts, x_pre; what is not asked for has no elements."""
    _checked(x, residual, w_dw, w_pw, geometry)
    r = _images(x, w_pw, w_dw, geometry)
    device = device_of(x.device.type, x.device.index or 0)
    tile = chain_tile(_problem(x, w_dw, w_pw, geometry, 0), device, backend.tf32_allowed(x.dtype, device))
    tiles = launch.pixel_tiles(r, geometry, tile) if statistics else 0
    return (
        r,
        torch.empty((tiles, 3, w_pw.shape[0]), dtype=torch.float32, device=x.device),
        torch.empty((tiles,), dtype=torch.int32, device=x.device),
        x.new_empty((0,)) if residual is None else backend.new_nhwc(x, *x.shape),
    )


def _forward(
    x: Tensor, vec: Optional[Tensor], residual: Optional[Tensor], activation: int, alpha: float, w_dw: Tensor,
    w_pw: Tensor, geometry: list[int], statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    g = Geometry(*geometry)
    problem = _problem(x, w_dw, w_pw, g, activation)
    reasons = backend.TRITON.not_supported_reasons(problem)
    if reasons:
        raise RuntimeError(f"the training chain cannot run {problem}: {'; '.join(reasons)}")
    r, partials, counts, x_pre = _outputs(x, residual, w_dw, w_pw, g, statistics)
    if x.shape[0] == 0:
        return r, partials, counts, x_pre
    device = device_of(x.device.type, x.device.index or 0)
    tf32 = backend.tf32_allowed(x.dtype, device)
    x = backend.nhwc(x) if residual is None else backend.dense_nhwc(x)
    tensors = launch.SeparableTensors(
        x, w_pw.reshape(w_pw.shape[0], -1).contiguous(), r, backend.filters_by_tap(w_dw),
        addend=None if residual is None else backend.dense_nhwc(residual),
        x_pre=None if residual is None else x_pre,
        partials=partials if statistics else None, counts=counts if statistics else None,
    )  # fmt: skip
    scale, shift = (None, None) if vec is None else (vec[0], vec[1])
    launch.separable_fprop(
        tensors, (w_dw.shape[2], w_dw.shape[3]), Affine(scale, shift, activation, alpha), Affine(), Affine(), g,
        chain_tile(problem, device, tf32), tf32,
    ).run(x.device)  # fmt: skip
    return r, partials, counts, x_pre


def _forward_fake(
    x: Tensor, vec: Optional[Tensor], residual: Optional[Tensor], activation: int, alpha: float, w_dw: Tensor,
    w_pw: Tensor, geometry: list[int], statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _outputs(x, residual, w_dw, w_pw, Geometry(*geometry), statistics)


def _finalized(partials: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    c, device = partials.shape[2], partials.device
    return (
        torch.empty((2, c), dtype=torch.float32, device=device),
        torch.empty((c,), dtype=torch.float32, device=device),
        torch.empty((c,), dtype=torch.float32, device=device),
        torch.empty((), dtype=torch.float64, device=device),
    )


def _finalize(
    partials: Tensor, counts: Tensor, gamma: Tensor, beta: Tensor, running_mean: Optional[Tensor],
    running_var: Optional[Tensor], batches: Optional[Tensor], momentum: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var come together or not at all")
    vec, mean, invstd, count = _finalized(partials)
    rows, _, c = partials.shape
    merged = torch.empty(
        (min(launch.STATISTICS_GROUPS, max(rows, 1)), 3, c), dtype=torch.float64, device=partials.device
    )
    launch.merge_statistics(partials.contiguous(), counts.contiguous(), merged).run(partials.device)
    vectors = {
        "gamma": gamma, "beta": beta, "running_mean": running_mean, "running_var": running_var, "batches": batches,
        "vec": vec, "mean_out": mean, "invstd_out": invstd, "count_out": count,
    }  # fmt: skip
    launch.finalize_statistics(merged, vectors, momentum, eps).run(partials.device)
    return vec, mean, invstd, count


def _finalize_fake(partials: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _finalized(partials)


LIBRARY.impl("separable_fprop_statistics", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("batch_norm_finalize", _finalize, "CompositeExplicitAutograd")
torch.library.register_fake("xsep::separable_fprop_statistics", _forward_fake, lib=LIBRARY)
torch.library.register_fake("xsep::batch_norm_finalize", _finalize_fake, lib=LIBRARY)


def separable_fprop_statistics(
    x: Tensor,
    vec: Optional[Tensor],
    residual: Optional[Tensor],
    activation: int,
    alpha: float,
    w_dw: Tensor,
    w_pw: Tensor,
    geometry: Geometry,
    statistics: bool = True,
) -> tuple[Tensor, Optional[Tensor], Optional[Tensor], Optional[Tensor]]:
    """r = pw(dw(act(scale * x + shift + residual))), and what BatchNorm needs to know of r.

    Args:
        x: ``[N, C_in, H, W]``, the layer before's raw output.
        vec: ``[2, C_in]`` float32, scale and shift of the BatchNorm before, or None.
        residual: like x, added before the activation, or None. Needs stride 1 and padding that keeps the size.
        activation, alpha: a code of ``xsep.problem.ACTIVATIONS`` and its parameter.
        w_dw, w_pw: ``[C_in, 1, R, S]`` and ``[C_out, C_in, 1, 1]``, in x's type; R and S up to 7, strides up to 2.
        geometry: of the depthwise convolution.
        statistics: whether to take them; not wanted when a checkpointed layer is run again.

    Returns:
        r ``[N, C_out, P, Q]``; partials ``[T, 3, C_out]`` float32, rows K (mean), S and Q (sums of r - K and of its
        square) of T tiles of the rounded r, and their pixel counts ``[T]`` int32, or None, None; and
        scale * x + shift + residual rounded to x's type, or None without a residual.

    Raises:
        ValueError: shapes or geometry that the chain does not take.
        RuntimeError: Triton cannot run here; the message says why.
    """
    r, partials, counts, x_pre = torch.ops.xsep.separable_fprop_statistics(
        x, vec, residual, activation, alpha, w_dw, w_pw, list(geometry), statistics
    )
    return r, partials if statistics else None, counts if statistics else None, None if residual is None else x_pre


def batch_norm_finalize(
    partials: Tensor,
    counts: Tensor,
    gamma: Tensor,
    beta: Tensor,
    running_mean: Optional[Tensor] = None,
    running_var: Optional[Tensor] = None,
    batches: Optional[Tensor] = None,
    momentum: Optional[float] = 0.1,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """BatchNorm's vectors from the partials of :func:`separable_fprop_statistics`, merged in float64.

    For SyncBatchNorm the partials and counts of all ranks are gathered first. Nothing here waits for the device, so
    whoever calls has to refuse a batch of one value a channel, from its shape.

    Args:
        partials, counts: ``[T, 3, C]`` float32 and ``[T]`` int32.
        gamma, beta: ``[C]``.
        running_mean, running_var: ``[C]`` or both None; moved in place as ``nn.BatchNorm2d`` moves them.
        batches: ``[]`` int64, batches seen with this one; needed where momentum is None (a cumulative average).
        momentum, eps: as ``nn.BatchNorm2d``'s.

    Returns:
        vec ``[2, C]`` float32 (scale, shift), mean ``[C]`` float32, 1 / sqrt(variance + eps) ``[C]`` float32, and the
        number of values a channel ``[]`` float64.

    Raises:
        ValueError: only one of the running statistics, or no ``batches`` where momentum is None.
    """
    if momentum is None and batches is None:
        raise ValueError("momentum is None, so batches must say how many batches have been seen")
    return tuple(
        torch.ops.xsep.batch_norm_finalize(
            partials, counts, gamma, beta, running_mean, running_var, batches if momentum is None else None,
            0.0 if momentum is None else momentum, eps,
        )
    )  # fmt: skip
