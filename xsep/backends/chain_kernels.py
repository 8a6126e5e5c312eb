"""What the chain on compiled kernels has in common: convolutions, and a load that rounds as every kernel's does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

from torch import Tensor

from ..problem import IDENTITY, Affine, Geometry, Problem, SeparableArgs
from .base import Backend
from .chain import Load, Shortcut, wide
from .chain_aten import AtenChain, activated, gradient_sums, input_gradient

POINT = Geometry(1, 1, 0, 0, 0, 0, 1, 1)
PLAIN = Affine()


def affine_of(load: Load) -> Affine:
    scale, shift = (None, None) if load.vec is None else (load.vec[0], load.vec[1])
    return Affine(scale, shift, load.activation, load.alpha)


class KernelChain(AtenChain):
    """A layer's convolutions by a backend's kernels, the vectors and sums in plain PyTorch."""

    kernels: Backend

    def not_supported_reasons(self, problem: Problem) -> list[str]:
        return self.kernels.not_supported_reasons(problem)

    def loaded_and_activated(self, x: Tensor, load: Load) -> tuple[Tensor, Tensor]:
        u = x
        if load.vec is not None:
            # A depthwise kernel of one tap, 1: the same arithmetic as in every other kernel's load, so that the sign
            # of u is the same in all of them.
            one = x.new_ones((x.shape[1], 1, 1, 1))
            u = self.kernels.depthwise(x, one, affine_of(load._replace(activation=IDENTITY)), PLAIN, POINT)
        return u, u if load.activation == IDENTITY else activated(u, load, x.dtype)

    def depthwise(self, x: Tensor, load: Load, w_dw: Tensor, geometry: Geometry) -> Tensor:
        return self.kernels.depthwise(x, w_dw, affine_of(load), PLAIN, geometry)

    def layer(self, x: Tensor, load: Load, w_dw: Tensor, w_pw: Tensor, geometry: Geometry) -> Tensor:
        scale, shift, activation, alpha = affine_of(load)
        args = SeparableArgs(
            x, w_dw, w_pw, None, None, scale, shift, None, None, None, None, list(geometry),
            [activation, IDENTITY, IDENTITY], [alpha, 0.0, 0.0],
        )  # fmt: skip
        return self.kernels.separable_forward(args)

    def depthwise_backward(
        self, dz: Tensor, x: Tensor, w_dw: Tensor, load: Load, geometry: Geometry, shortcut: Optional[Shortcut],
        operands: Sequence[Tensor], centres: Optional[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """In one pass, the activation's derivative included unless a shortcut has to be added before it."""
        u, act = self.loaded_and_activated(x, load)
        before = shortcut is not None and shortcut.activated
        source, prologue = (act, PLAIN) if before else (u, Affine(None, None, load.activation, load.alpha))
        wanted = (True, True, False, False)
        g = self.kernels.depthwise_backward_kernel(dz, source, w_dw, prologue, geometry, wanted)
        assert g.dx is not None and g.dw_dw is not None
        dx = input_gradient(g.dx, u, load, shortcut, act.dtype, masked=not before)
        return dx, g.dw_dw.to(wide(act.dtype)), gradient_sums(dx, operands, centres)
