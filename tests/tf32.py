"""TF32 as the tests see it: its numbers, and what PyTorch's own products in it are off by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Optional, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from xsep import testing
from xsep.testing import Case, Inputs, float32_products


def round_to_tf32(t: Tensor) -> Tensor:
    """float32 t to the nearest TF32 numbers, ties away from zero, as ``cvt.rna.tf32`` has it; NaN and infinity stay."""
    bits = t.contiguous().view(torch.int32)
    return torch.where(t.isfinite(), (bits + 0x1000) & ~0x1FFF, bits).view(torch.float32)


class RoundedProduct(torch.autograd.Function):
    """z [M, C_mid] times w [C_out, C_mid] transposed, each product of operands rounded to TF32; sums in float32."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(z, w)
        return round_to_tf32(z) @ round_to_tf32(w).t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Optional[Tensor], ...]:
        (dy,), (z, w) = (round_to_tf32(t) for t in grads), (round_to_tf32(t) for t in ctx.saved_tensors)
        return dy @ w, dy.t() @ z


@contextmanager
def pointwise_as_product(rounded: bool) -> Iterator[None]:
    """In :func:`xsep.reference.two_convolutions` a matrix product in the place of the pointwise convolution."""
    convolution, functional = F.conv2d, cast(Any, F)

    def product(x: Tensor, w: Tensor, *rest: Any) -> Tensor:
        if rest:
            return convolution(x, w, *rest)
        z, flat = x.permute(0, 2, 3, 1).flatten(0, 2), w.flatten(1)
        y = RoundedProduct.apply(z, flat) if rounded else z @ flat.t()
        return y.view(x.shape[0], *x.shape[2:], w.shape[0]).permute(0, 3, 1, 2)

    functional.conv2d = product
    try:
        yield
    finally:
        functional.conv2d = convolution


def pytorchs_ways(case: Case, inputs: Inputs) -> list[testing.Results]:
    """y and every gradient by PyTorch where TF32 is allowed: its convolution, its matrix product, and one rounded here.

    A library may have chosen for a shape not to use what it may use; its error is no measure then.
    """
    with float32_products("tf32"):
        ways = [testing.run_pytorch(case, inputs)]
        for rounded in (False, True):
            with pointwise_as_product(rounded):
                ways.append(testing.run_pytorch(case, inputs))
    return ways


def check(case: Case, backend: str, device: str) -> None:
    """As :func:`xsep.testing.check`, where TF32 is allowed; every result held to the worst of PyTorch's ways."""
    inputs = testing.make_inputs(case, device)
    truth, ways = testing.run_truth(case, inputs), pytorchs_ways(case, inputs)
    with float32_products("tf32"):
        ours = testing.run_xsep(case, inputs, backend)
    found = []
    for name, expected in truth.results.items():
        one = replace(truth, results={name: expected})
        by_way = [testing.violations(ours, one, way, case.dtype) for way in ways]
        if all(by_way):
            found += by_way[-1]
    assert not found, f"{case.id}: " + "; ".join(found)
