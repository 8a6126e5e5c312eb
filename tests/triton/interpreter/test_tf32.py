"""Products in TF32: what they are off by is what operands rounded to it are off by, not operands cut off.

The interpreter's ``dot`` drops the low 13 bits of float32 as a tensor core does (``fixes``), and so does the emulator.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import xsep
from tests.tf32 import round_to_tf32
from xsep.backends import chain_triton
from xsep.backends import triton as backend
from xsep.backends.chain import Load, RawGradient
from xsep.ops.training import calls, pw_backward, sep_dgrad, sep_wgrad_pw
from xsep.problem import IDENTITY, Geometry
from xsep.reference import depthwise

SAME = Geometry(1, 1, 1, 1, 1, 1, 1, 1)
RAW = Load(None, IDENTITY)
N, C_IN, C_OUT, SIZE = 2, 48, 40, 9


@pytest.fixture(autouse=True)
def allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "tf32_allowed", lambda dtype, device: dtype is torch.float32)


class Layer:
    """A layer, its z and the gradient dr of its raw output, in float64."""

    def __init__(self) -> None:
        self.x = torch.randn(N, C_IN, SIZE, SIZE).contiguous(memory_format=torch.channels_last)
        self.w_dw, self.w_pw = torch.randn(C_IN, 1, 3, 3), torch.randn(C_OUT, C_IN, 1, 1)
        self.z = depthwise(self.x.double(), self.w_dw.double(), (1, 1), (1, 1, 1, 1), (1, 1))
        du, r = (torch.randn(N, C_OUT, SIZE, SIZE).contiguous(memory_format=torch.channels_last) for _ in range(2))
        self.raw = RawGradient(du, r, torch.randn(3, C_OUT))
        a, b, d = self.raw.coef.double()[:, :, None, None]
        self.dr = a * du.double() + (b * r.double() + d)

    def dx(self, dz: Tensor) -> Tensor:
        """What the depthwise convolution makes of a gradient of z, which is linear."""
        return depthwise(dz, self.w_dw.double().flip(2, 3), (1, 1), (1, 1, 1, 1), (1, 1))


def product(equation: str, *operands: Tensor) -> tuple[Tensor, Tensor]:
    """In float64, of the operands as they are and of what TF32 keeps of them when they are rounded."""
    rounded = [round_to_tf32(t.float()).double() for t in operands]
    return torch.einsum(equation, *(t.double() for t in operands)), torch.einsum(equation, *rounded)


def hold(got: Tensor, exact: Tensor, rounded: Tensor) -> None:
    """By norms; cut-off operands are off by about 2.6 times as much, exact ones by nearly nothing."""
    error, expected = (float((t.double() - exact).norm()) for t in (got, rounded))
    assert 0.95 * expected < error < 1.05 * expected, f"off by {error:.3g}, rounded operands by {expected:.3g}"


def test_numbers_and_what_is_none() -> None:
    at_an_edge = torch.tensor(
        [0, 0x1000, 0xFFF, 0x1FFF, 0x7FFFFF, 0x3F801000, 0x3F800FFF, 0x3F802FFF, 0x7F7FEFFF, 0x7F7FF000, 0x7F800000,
         0x7F800001, 0x7FC00000, 0x7FFFFFFF], dtype=torch.int32,
    )  # fmt: skip
    drawn = torch.randint(-(2**31), 2**31, (5000,)).int()
    weights = torch.cat([at_an_edge, at_an_edge | -(2**31), drawn]).view(torch.float32)
    found = backend.pointwise_weights(weights.view(2, -1, 1, 1), True).flatten()
    assert torch.equal(found.view(torch.int32), round_to_tf32(weights).view(torch.int32))
    low_bits = found.view(torch.int32) & 0x1FFF
    assert not low_bits[~found.isnan()].any() and torch.equal(found.isnan(), weights.isnan())
    near = weights.isfinite() & (weights.abs() > 1e-30) & (weights.abs() < 1e30)
    assert bool(((found - weights).abs() <= 2.0**-11 * weights.abs())[near].all())


@pytest.mark.parametrize("way", ["fused", "staged"])
def test_forward(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = backend.separable_plan

    def chosen(*arguments: Any) -> Any:
        return replace(plan(*arguments), fused=way == "fused", slice_n=1)

    monkeypatch.setattr(backend, "separable_plan", chosen)
    made = Layer()
    y = xsep.separable_conv2d(made.x, made.w_dw, made.w_pw, padding=1, backend="triton")
    hold(y, *product("ncpq,oc->nopq", made.z, made.w_pw.flatten(1)))


def test_forward_of_a_chain() -> None:
    made = Layer()
    r = calls.sep_fprop(made.x, None, None, IDENTITY, 0.0, made.w_dw, made.w_pw, SAME, True, "triton").r
    hold(r, *product("ncpq,oc->nopq", made.z, made.w_pw.flatten(1)))
    r = calls.pw_fprop(made.x, RAW, made.w_pw, True, "triton").r
    hold(r, *product("ncpq,oc->nopq", made.x, made.w_pw.flatten(1)))


@pytest.mark.parametrize("fused", [True, False], ids=["z-on-chip", "z-apart"])
def test_weight_gradient_of_a_chain(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = chain_triton.backward_plan

    def chosen(*arguments: Any) -> Any:
        return replace(plan(*arguments), wgrad_fused=fused, wgrad_slice=1)

    monkeypatch.setattr(chain_triton, "backward_plan", chosen)
    made = Layer()
    dw = sep_wgrad_pw(made.raw, made.x, RAW, made.w_dw, SAME, backend="triton")
    hold(dw.flatten(1), *product("nopq,ncpq->oc", made.dr, made.z))


def test_input_gradient_of_a_chain() -> None:
    made = Layer()
    dz = product("nopq,oc->ncpq", made.dr, made.w_pw.flatten(1))
    dx = sep_dgrad(made.raw, made.w_pw, made.w_dw, made.x, RAW, SAME, backend="triton")[0]
    hold(dx, *(made.dx(t) for t in dz))
    dw, dy = pw_backward(made.raw, made.w_pw, made.x, RAW, backend="triton")
    hold(dy, *dz)
    hold(dw.flatten(1), *product("nopq,ncpq->oc", made.dr, made.x))


def test_sixteen_bits_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where a launch says TF32 of them."""
    made = Layer()
    x, w_dw, w_pw = (t.bfloat16() for t in (made.x, made.w_dw, made.w_pw))
    y = xsep.separable_conv2d(x, w_dw, w_pw, padding=1, backend="triton")
    separable_fprop = backend.launch.separable_fprop

    def said_to_be_tf32(*arguments: Any) -> Any:
        made = separable_fprop(*arguments)
        assert made.constants["PRECISION"] == "ieee"
        made.constants["PRECISION"] = "tf32"
        return made

    monkeypatch.setattr(backend.launch, "separable_fprop", said_to_be_tf32)
    assert torch.equal(xsep.separable_conv2d(x, w_dw, w_pw, padding=1, backend="triton"), y)
