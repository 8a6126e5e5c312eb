"""The ways of a chained layer's backward that are measured beside the planned one, in the emulator."""

from __future__ import annotations

import pytest
import torch

from xsep import extension
from xsep.backends.chain_cuda import CUDA_CHAIN
from xsep.chain import measuring
from xsep.ops.training.selection import chain_backend
from xsep.problem import RELU, Geometry, Problem

from . import emulated
from .emulated_ops import H200, EmulatedOps

pytestmark = [
    pytest.mark.skipif(emulated.missing_tools() is not None, reason=str(emulated.missing_tools())),
    pytest.mark.skipif(extension.binding() is None, reason="xsep's compiled extension is not built"),
]


def problem(n: int, c: int = 16, size: int = 9) -> Problem:
    same = Geometry(1, 1, 1, 1, 1, 1, 1, 1)
    return Problem("separable", "cpu", torch.bfloat16, True, n, c, size, size, 1, 3, 3, c, same, (RELU, 0, 0))


def test_every_way_is_right_and_goes_its_way(operators: EmulatedOps) -> None:
    p = problem(5)
    operators.on(H200._replace(l2_bytes=2 * 2 * 81 * (16 + 16) * 2))  # half of it holds two pictures
    ways = {
        "kernel by kernel": (1, 1, 0, 0, 0), "kernel by kernel, z on the chip": (1, 1, 1, 0, 0),
        "kernel by kernel, dr and z on the chip": (1, 0, 0, 1, 0), "in slices": (3, 3, 0, 0, 0),
        "in one pass": (0, 0, 0, 0, 1),
    }  # fmt: skip
    gate, taken = measuring.Gate(measuring.draw(p)), {}
    for name, chain in {"": CUDA_CHAIN, **{way: chain_backend(f"cuda, {way}") for way in ways}}.items():
        assert not gate.wrong_forward(chain)
        operators.called.clear()
        assert not gate.wrong_backward(chain)
        kernels = (
            "chain_depthwise_bprop", "chain_raw_gradient", "separable_wgrad", "chain_wgrad", "chain_fused_backward",
        )  # fmt: skip
        taken[name] = tuple(operators.called[kernel] for kernel in kernels)
    planned = taken.pop("")
    assert taken == ways
    assert CUDA_CHAIN.other_ways(p) == [way for way, launches in ways.items() if launches != planned]


def test_where_there_is_no_such_way_it_is_as_planned(operators: EmulatedOps) -> None:
    operators.on(H200)
    p = problem(2, c=136)  # too many channels for one pass, and all of it fits L2
    assert CUDA_CHAIN.other_ways(p) == [f"kernel by kernel, {what} on the chip" for what in ("z", "dr and z")]
    gate = measuring.Gate(measuring.draw(p))
    for way in ("in slices", "in one pass"):
        operators.called.clear()
        assert not gate.wrong_backward(chain_backend(f"cuda, {way}"))
        assert operators.called["chain_depthwise_bprop"] == 1 and not operators.called["chain_fused_backward"]
