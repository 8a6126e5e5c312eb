"""No call and no step has the host wait for a card. By PyTorch's own convolutions here; the tests of a GPU, which the
emulator runs too, have the other backends'."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from xsep import ChannelAffine, card_check, depthwise_conv2d, separable_conv2d

from .host_waits import HostWaits

LOOKS: dict[str, Callable[[Tensor], object]] = {
    "lift_fresh": lambda t: t[[0, 1]],
    "_local_scalar_dense": lambda t: t.sum().item(),
    "nonzero": lambda t: t.nonzero(),
}


@pytest.mark.parametrize("name", LOOKS)
def test_a_wait_is_found(name: str) -> None:
    t = torch.ones(2, 3)
    with HostWaits(Path(__file__).parent) as waits:
        LOOKS[name](t)
    assert any(found.startswith(f"{name} at test_host_waits.py:") for found in waits.found)


def test_a_chained_step() -> None:
    network, x = card_check.network("aten", torch.float32, "cpu", (8, 16, 24), (2, 23, 22))
    network.chained(True)
    with HostWaits() as waits:
        network(x).square().sum().backward()
    assert not waits.found
    assert {"chain_sep_backward", "chain_bn_pool_add", "chain_pw_backward", "gather"} <= waits.seen


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_a_call_and_its_backward(activation: str) -> None:
    def vector(c: int) -> Tensor:
        return torch.randn(c, requires_grad=True)

    x, w_dw, w_pw = (torch.randn(s, requires_grad=True) for s in ((2, 8, 9, 7), (8, 1, 3, 3), (12, 8, 1, 1)))
    prologue, middle, epilogue = (ChannelAffine(vector(c), vector(c), activation) for c in (8, 8, 12))
    with HostWaits() as waits:
        y = separable_conv2d(
            x, w_dw, w_pw, vector(12), padding=1, prologue=prologue, middle=middle, epilogue=epilogue,
            residual=torch.randn(2, 12, 9, 7), backend="aten",
        )  # fmt: skip
        z = depthwise_conv2d(x, w_dw, padding="same", prologue=prologue, backend="aten")
        (y.sum() + z.sum()).backward()
    assert not waits.found
    assert {"separable_conv2d_backward", "depthwise_conv2d_backward", "convolution_backward"} <= waits.seen
