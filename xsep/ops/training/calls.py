"""The chain's ops as Python functions: what they take and give.

Throughout, ``vec`` [2, C] is the scale and shift of the BatchNorm before, or None; ``activation`` a code of
``xsep.problem.ACTIVATIONS`` and ``alpha`` its parameter; vectors, sums and weight gradients are float32, or float64
beside float64 images. ``backend`` is auto, aten, cpu, triton or cuda.

Raises, all of them: ValueError where shapes or types do not fit, naming the argument; RuntimeError where a backend
asked for by name cannot run it, with its reasons.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

from torch import Tensor

from ...backends.chain import Backward, Forward, Load, RawGradient, Shortcut
from ...problem import Geometry
from .registry import OPS


def sep_fprop(
    x: Tensor, vec: Optional[Tensor], residual: Optional[Tensor], activation: int, alpha: float, w_dw: Tensor,
    w_pw: Tensor, geometry: Geometry, statistics: bool = True, backend: str = "auto",
) -> Forward:  # fmt: skip
    """r = pw(dw(act(scale * x + shift + residual))), and what BatchNorm needs to know of r.

    Args:
        x: ``[N, C_in, H, W]``, the layer before's raw output.
        residual: like x, or None. Needs stride 1 and padding that keeps the size.
        w_dw, w_pw: ``[C_in, 1, R, S]`` and ``[C_out, C_in, 1, 1]``, in x's type.
        geometry: of the depthwise convolution.
        statistics: whether to take them; a BatchNorm in eval mode needs none.

    Returns:
        r ``[N, C_out, P, Q]``; partials ``[T, 3, C_out]``, rows K (mean), S and Q (sums of r - K and of its square) of
        T tiles of the rounded r, and their pixel counts ``[T]`` int32, or None, None; and x_pre, scale * x + shift +
        residual rounded to x's type, or None without a residual.
    """
    r, partials, counts, x_pre = OPS.chain_sep_fprop(
        x, vec, activation, alpha, residual, w_dw, w_pw, list(geometry), statistics, backend
    )
    return Forward(
        r, partials if statistics else None, counts if statistics else None, None if residual is None else x_pre
    )


def pw_fprop(x: Tensor, load: Load, w: Tensor, statistics: bool = True, backend: str = "auto") -> Forward:
    """r = pw(load(x)) with the statistics of r; w ``[C_out, C_in, 1, 1]``, a stride is in the view x."""
    r, partials, counts = OPS.chain_pw_fprop(x, *load, w, statistics, backend)
    return Forward(r, partials if statistics else None, counts if statistics else None)


def bn_finalize(
    partials: Tensor, counts: Tensor, gamma: Optional[Tensor] = None, beta: Optional[Tensor] = None,
    running_mean: Optional[Tensor] = None, running_var: Optional[Tensor] = None, batches: Optional[Tensor] = None,
    momentum: Optional[float] = 0.1, eps: float = 1e-5, backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """BatchNorm's vectors from the partials of a forward op, merged in float64.

    For SyncBatchNorm the partials and counts of all ranks are gathered first. Nothing here waits for the device, so
    whoever calls has to refuse a batch of one value a channel, from its shape.

    Args:
        partials, counts: ``[T, 3, C]`` and ``[T]`` int32.
        gamma, beta: ``[C]``, or None for ones and zeros.
        running_mean, running_var: ``[C]`` or both None; moved in place as ``nn.BatchNorm2d`` moves them.
        batches: ``[]`` int64, batches seen before, to which this one is added in place; needed where momentum is None
            (a cumulative average).
        momentum, eps: as ``nn.BatchNorm2d``'s.

    Returns:
        vec ``[2, C]`` (scale, shift), the mean in both rows of ``[2, C]`` (what ``sep_backward`` takes for centres
        beside one operand), 1 / sqrt(variance + eps) ``[C]``, and the number of values a channel ``[]`` float64.
    """
    vec, centres, invstd, count = OPS.chain_bn_finalize(
        partials, counts, gamma, beta, running_mean, running_var, batches, momentum, eps, backend
    )  # fmt: skip
    return vec, centres, invstd, count


def bn_backward_finalize(
    sums: Tensor, mean: Tensor, invstd: Tensor, gamma: Optional[Tensor], count: Tensor, batch: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(coef [3, C], dgamma [C], dbeta [C]) from sums ``[2, C]`` of du and of du * (r - mean).

    dr = coef[0] * du + coef[1] * r + coef[2]. ``batch`` is False where mean and variance were the running ones.
    """
    coef, dgamma, dbeta = OPS.chain_bn_backward_finalize(sums, mean, invstd, gamma, count, batch, backend)
    return coef, dgamma, dbeta


def _raw(dr: RawGradient) -> tuple[Any, ...]:
    return dr.du, dr.taps, dr.r, dr.coef, list(dr.pads) if dr.taps is not None else []


def sep_wgrad_pw(
    dr: RawGradient, x: Tensor, load: Load, w_dw: Tensor, geometry: Geometry, backend: str = "auto"
) -> Tensor:
    """dw_pw ``[C_out, C_in, 1, 1]``: the sum over pixels of dr * z, z made again from x."""
    return OPS.chain_sep_wgrad_pw(*_raw(dr), x, *load, w_dw, list(geometry), backend)


def _layer(
    dr: RawGradient, w_pw: Tensor, w_dw: Tensor, x: Tensor, load: Load, geometry: Geometry,
    shortcut: Optional[Shortcut], operands: Sequence[Tensor], centres: Optional[Tensor],
) -> tuple[Any, ...]:  # fmt: skip
    short, activated = (None, False) if shortcut is None else shortcut
    return (*_raw(dr), w_pw, w_dw, x, *load, list(geometry), short, activated, list(operands), centres)


def sep_dgrad(
    dr: RawGradient, w_pw: Tensor, w_dw: Tensor, x: Tensor, load: Load, geometry: Geometry,
    shortcut: Optional[Shortcut] = None, operands: Sequence[Tensor] = (), centres: Optional[Tensor] = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dw_dw, sums): dx is the gradient of u = scale * x + shift (+ residual), the shortcut's included.

    sums ``[1 + K, C_in]``: of dx, and of dx * (operand - centre) for each of up to two operands shaped like x;
    centres ``[1 + K, C_in]``, its first row unused.
    """
    dx, dw_dw, sums = OPS.chain_sep_dgrad(
        *_layer(dr, w_pw, w_dw, x, load, geometry, shortcut, operands, centres), backend
    )
    return dx, dw_dw, sums


def sep_backward(
    dr: RawGradient, w_pw: Tensor, w_dw: Tensor, x: Tensor, load: Load, geometry: Geometry,
    shortcut: Optional[Shortcut] = None, operands: Sequence[Tensor] = (), centres: Optional[Tensor] = None,
    wanted: Sequence[bool] = (True, True, True), backend: str = "auto",
) -> Backward:  # fmt: skip
    """``sep_dgrad`` and ``sep_wgrad_pw`` together; ``wanted``: dx and sums, dw_dw, dw_pw."""
    found = OPS.chain_sep_backward(
        *_layer(dr, w_pw, w_dw, x, load, geometry, shortcut, operands, centres), list(wanted), backend
    )
    dx, dw_dw, dw_pw, sums = (t if want else None for t, want in zip(found, (*wanted, wanted[0])))
    return Backward(dx, dw_dw, dw_pw, sums)


def pw_backward(dr: RawGradient, w: Tensor, x: Tensor, load: Load, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """(dw, gradient of load(x)) of ``pw_fprop``, at its resolution."""
    dw, dy = OPS.chain_pw_backward(dr.du, dr.r, dr.coef, w, x, *load, backend)
    return dw, dy


def statistics(r: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """(partials, counts) of a tensor that another kernel wrote."""
    partials, counts = OPS.chain_statistics(r, backend)
    return partials, counts


def bn_pool_add(
    r: Tensor, vec: Tensor, s: Tensor, vec_s: Tensor, pads: tuple[int, int], backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """t = maxpool3x3/2(BN(r)) + BN(s), the tap taken (uint8, in scan order; of equal ones the first), and r there.

    ``pads`` is how far the first window begins above and left: (1, 1) is torch's padding, TensorFlow's SAME begins at
    0 where a size is even. s and the results are ``[N, C, ceil(H / 2), ceil(W / 2)]``.
    """
    t, index, chosen = OPS.chain_bn_pool_add(r, vec, s, vec_s, list(pads), backend)
    return t, index, chosen


def bn_relu_gap(r: Tensor, vec: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """[N, C] each: the mean of relu(u) over the picture, how many u > 0, and the sum of r over those."""
    pooled, positive, total = OPS.chain_bn_relu_gap(r, vec, backend)
    return pooled, positive, total


def bn_relu_gap_backward(
    g: Tensor, r: Tensor, vec: Tensor, mean: Tensor, positive: Tensor, total: Tensor, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """(du ``[N, C, P, Q]``, sums ``[2, C]``) of g ``[N, C]``."""
    du, sums = OPS.chain_bn_relu_gap_backward(g, r, vec, mean, positive, total, backend)
    return du, sums


def apply(x: Tensor, load: Load, residual: Optional[Tensor] = None, backend: str = "auto") -> Tensor:
    """act(scale * x + shift + residual) as an ordinary tensor."""
    return OPS.chain_apply(x, *load, residual, backend)


def apply_backward(
    g: Tensor, x: Tensor, load: Load, residual: Optional[Tensor] = None, operands: Sequence[Tensor] = (),
    centres: Optional[Tensor] = None, backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(du, sums) of ``apply``."""
    du, sums = OPS.chain_apply_backward(g, x, *load, residual, list(operands), centres, backend)
    return du, sums


def bn_dgrad(du: Tensor, r: Tensor, coef: Tensor, backend: str = "auto") -> Tensor:
    """dr itself, for the convolution from which the chain starts."""
    return OPS.chain_bn_dgrad(du, r, coef, backend)
