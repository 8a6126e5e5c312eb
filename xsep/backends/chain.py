"""What a backend of the training chain brings: one method a kernel.

A layer of the chain stores its raw output r, before BatchNorm, and per-channel vectors; whoever reads r applies
``u = scale * r + shift`` and the activation on load. Backward, the gradient of r is never stored either: it is formed
on load from du, r and three vectors. Vectors, sums and weight gradients are float32, or float64 beside a float64 x.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from ..problem import IDENTITY, Geometry, Problem

#: Pixels of a tile of the statistics, where a backend has no reason for another number.
TILE = 128


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type of vectors, sums and weight gradients beside images of a type."""
    return torch.promote_types(dtype, torch.float32)


class Load(NamedTuple):
    """How an image is read: ``act(scale * x + shift)``."""

    vec: Optional[Tensor] = None  # [2, C] scale, shift
    activation: int = IDENTITY
    alpha: float = 0.0


class RawGradient(NamedTuple):
    """The gradient of a raw output, ``dr = a * du + b * r + d``, to be formed where it is read.

    Behind a max-pool, du has the pool's resolution and ``taps`` says which of the window's nine taps, in scan order,
    it belongs to; ``pads`` is how far the first window begins above and left of the picture.
    """

    du: Tensor  # [N, C, P, Q], or [N, C, ceil(P / 2), ceil(Q / 2)] beside taps
    r: Tensor  # [N, C, P, Q]
    coef: Tensor  # [3, C]
    taps: Optional[Tensor] = None  # uint8, like du
    pads: tuple[int, int] = (0, 0)  # top, left


class Shortcut(NamedTuple):
    """A gradient added to that of a layer's input, all of it or its every second row and column."""

    g: Tensor  # [N, C, H, W] or [N, C, ceil(H / 2), ceil(W / 2)]
    activated: bool  # taken behind the activation on load, so added before its derivative is applied


class Forward(NamedTuple):
    r: Tensor  # [N, C_out, P, Q]
    partials: Optional[Tensor]  # [T, 3, C_out]: mean K of a tile, sums of r - K and of its square
    counts: Optional[Tensor]  # [T] int32, pixels of each tile
    x_pre: Optional[Tensor] = None  # [N, C_in, H, W] scale * x + shift + residual, where there is a residual


class Backward(NamedTuple):
    """What was not asked for is None."""

    dx: Optional[Tensor]  # [N, C_in, H, W], gradient of u, not of the x that u was made from
    dw_dw: Optional[Tensor]  # like w_dw
    dw_pw: Optional[Tensor]  # like w_pw
    sums: Optional[Tensor]  # [1 + K, C_in]: of dx, and of dx * (operand - centre) for each operand


class ChainBackend(ABC):
    """One way to run the chain's kernels. Images come in any layout and may be returned in any."""

    name: str

    @abstractmethod
    def not_supported_reasons(self, problem: Problem) -> list[str]:
        """Why this backend cannot run a layer: sentences, or an empty list where it can."""

    @property
    def label(self) -> str:
        """The name, and the way that it goes where it is not the planned one; as measurements have it."""
        return self.name

    def other_ways(self, problem: Problem) -> list[str]:
        """Ways of a layer's backward beside the one that is planned, by the names that measurements have for them."""
        return []

    def tiles(self, problem: Problem) -> int:
        """Tiles of the statistics that ``sep_fprop`` takes of a layer; known without data, for traced code."""
        p, q = problem.output_size
        return tiles_of(problem.n * p * q)

    @abstractmethod
    def sep_fprop(
        self, x: Tensor, load: Load, residual: Optional[Tensor], w_dw: Tensor, w_pw: Tensor, geometry: Geometry,
        statistics: bool,
    ) -> Forward:  # fmt: skip
        """r = pw(dw(load(x + residual))), zero padding after the load; statistics of the rounded r."""

    @abstractmethod
    def pw_fprop(self, x: Tensor, load: Load, w: Tensor, statistics: bool) -> Forward:
        """r = pw(load(x)); a stride is in the view x."""

    @abstractmethod
    def statistics(self, r: Tensor) -> tuple[Tensor, Tensor]:
        """(partials, counts) of a tensor that another kernel wrote."""

    @abstractmethod
    def bn_finalize(
        self, partials: Tensor, counts: Tensor, gamma: Optional[Tensor], beta: Optional[Tensor],
        running_mean: Optional[Tensor], running_var: Optional[Tensor], batches: Optional[Tensor],
        momentum: Optional[float], eps: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """(vec [2, C], centres [2, C], 1 / sqrt(variance + eps) [C], count []), the partials merged in float64.

        Both rows of the centres are the mean. Counts the batch in ``batches``, and moves the running statistics by
        ``momentum``, or by one over the batches where that is None.
        """

    @abstractmethod
    def bn_backward_finalize(
        self, sums: Tensor, mean: Tensor, invstd: Tensor, gamma: Optional[Tensor], count: Tensor, batch: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(coef [3, C], dgamma [C], dbeta [C]) of sums [2, C], of du and of du * (r - mean).

        ``batch``: whether mean and variance were the batch's own; fixed ones have no gradient.
        """

    @abstractmethod
    def sep_wgrad_pw(self, dr: RawGradient, x: Tensor, load: Load, w_dw: Tensor, geometry: Geometry) -> Tensor:
        """dw_pw [C_out, C_in, 1, 1] = sum over pixels of dr * z, z made again from x."""

    @abstractmethod
    def sep_dgrad(
        self, dr: RawGradient, w_pw: Tensor, w_dw: Tensor, x: Tensor, load: Load, geometry: Geometry,
        shortcut: Optional[Shortcut], operands: Sequence[Tensor], centres: Optional[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """(dx, dw_dw, sums); centres [1 + K, C] beside K operands shaped like x, its first row unused."""

    def sep_backward(
        self, dr: RawGradient, w_pw: Tensor, w_dw: Tensor, x: Tensor, load: Load, geometry: Geometry,
        shortcut: Optional[Shortcut], operands: Sequence[Tensor], centres: Optional[Tensor], wanted: Sequence[bool],
    ) -> Backward:  # fmt: skip
        """All of a layer's backward; ``wanted``: dx and its sums, dw_dw, dw_pw."""
        dw_pw = self.sep_wgrad_pw(dr, x, load, w_dw, geometry) if wanted[2] else None
        if not (wanted[0] or wanted[1]):
            return Backward(None, None, dw_pw, None)
        dx, dw_dw, sums = self.sep_dgrad(dr, w_pw, w_dw, x, load, geometry, shortcut, operands, centres)
        return Backward(dx, dw_dw, dw_pw, sums)

    @abstractmethod
    def pw_backward(self, dr: RawGradient, w: Tensor, x: Tensor, load: Load) -> tuple[Tensor, Tensor]:
        """(dw, gradient of load(x)) of ``pw_fprop``, both at its resolution."""

    @abstractmethod
    def bn_pool_add(
        self, r: Tensor, vec: Tensor, s: Tensor, vec_s: Tensor, pads: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """t = maxpool3x3/2(vec(r)) + vec_s(s), the tap taken (uint8; of equal ones the first) and r there."""

    @abstractmethod
    def bn_relu_gap(self, r: Tensor, vec: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean of relu(u) over the picture [N, C], pixels with u > 0 [N, C], and the sum of r over them [N, C]."""

    @abstractmethod
    def bn_relu_gap_backward(
        self, g: Tensor, r: Tensor, vec: Tensor, mean: Tensor, positive: Tensor, total: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(du [N, C, P, Q], sums [2, C]) of g [N, C]."""

    @abstractmethod
    def apply(self, x: Tensor, load: Load, residual: Optional[Tensor]) -> Tensor:
        """load(x + residual) as an ordinary tensor: the way out of the chain."""

    @abstractmethod
    def apply_backward(
        self, g: Tensor, x: Tensor, load: Load, residual: Optional[Tensor], operands: Sequence[Tensor],
        centres: Optional[Tensor],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """(du, sums) of ``apply``."""

    @abstractmethod
    def bn_dgrad(self, dr: RawGradient) -> Tensor:
        """dr itself, for the convolution from which the chain starts."""


def tiles_of(rows: int, tile: int = TILE) -> int:
    return (rows + tile - 1) // tile
