"""The ways of a layer's backward that the chain's microbenchmark times, in the emulator."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from xsep import dispatch
from xsep.backends.cuda import CudaBackend

from . import emulated
from .emulated_ops import H200, EmulatedOps

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import bench_chain

pytestmark = pytest.mark.skipif(emulated.missing_tools() is not None, reason=str(emulated.missing_tools()))


@pytest.fixture(autouse=True)
def a_card(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The backend takes CPU tensors meanwhile, and nobody remembers it."""
    dispatch.forget_choices()
    monkeypatch.setattr(CudaBackend, "not_supported_reasons", lambda self, problem: [])
    yield
    dispatch.forget_choices()


def test_every_way_of_the_backward_that_is_timed(operators: EmulatedOps) -> None:
    """As benchmarks/bench_chain.py finds them, each behind its gate; the planner's is one of them."""
    pixels, c = 9 * 9, 16
    operators.on(H200._replace(l2_bytes=2 * 2 * pixels * (c + c) * 2))  # half of it holds two pictures
    a = bench_chain.draw(5, c, c, 9, torch.bfloat16, torch.device("cpu"))
    exact = bench_chain.forward(bench_chain.in_float64(a), "aten")
    b = bench_chain.between(a, exact)
    truth = bench_chain.backward(bench_chain.in_float64(a), bench_chain.Between(*(t.double() for t in b)), "aten")
    own = bench_chain.backward(a, b, "aten")
    ways, planned = bench_chain.backward_ways(a, "cuda")
    assert list(ways) == [f"chain, cuda, {way}" for way in ("kernel by kernel", "in slices", "in one pass")]
    assert planned in ways
    launches = []
    for run in ways.values():
        operators.called.clear()
        assert not bench_chain.wrong(run(b), truth, own, torch.bfloat16)
        launches.append((operators.called["chain_depthwise_bprop"], operators.called["chain_fused_backward"]))
    assert launches == [(1, 0), (3, 0), (0, 1)]
