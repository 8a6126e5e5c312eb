"""The measure that a card's results in TF32 are held to (:mod:`tests.tf32`), on a CPU, which has none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests import tf32
from xsep import testing
from xsep.testing import Case, float32_products

CASE = Case(n=2, c_in=48, h=9, w=9, c_out=40, bias=True, residual=True, activations=("relu", None, None))


def test_pytorchs_ways_are_one_but_for_rounding() -> None:
    inputs = testing.make_inputs(CASE, "cpu")
    convolution, product, rounded = tf32.pytorchs_ways(CASE, inputs)
    truth = testing.run_truth(CASE, inputs)
    assert not testing.violations(product, truth, convolution, torch.float32)
    off = {name: float((rounded[name].double() - t).norm() / t.norm()) for name, t in truth.results.items()}
    # Two operands of each product, each off by 2**-11 / sqrt(3) of a number of its binade at most.
    for name in ("y", "dx", "dw_dw", "dw_pw"):
        assert 1e-5 < off[name] < 2.0**-11, f"{name}: off by {off[name]:.3g}"


@pytest.mark.parametrize("seed", range(3))
def test_benchmarks_expect_tf32_where_it_is_allowed(seed: int) -> None:
    """Whatever PyTorch's library made of the shape: here it took all of float32."""
    case = replace(CASE, seed=seed)
    inputs, card, kind = testing.make_inputs(case, "cpu"), torch.device("cuda"), torch.float32
    convolution, _, rounded = tf32.pytorchs_ways(case, inputs)
    truth = testing.run_truth(case, inputs)
    with float32_products("ieee"):
        assert testing.held_as(kind, card) is kind
    with float32_products("tf32"):
        assert testing.held_as(kind, torch.device("cpu")) is kind
        held = testing.held_as(kind, card)
    assert testing.violations(rounded, truth, convolution, kind)
    assert testing.violations(rounded, truth, convolution, held) == []
    off = {name: t + (rounded[name] - t) * 6 for name, t in truth.results.items()}
    assert testing.violations(off, truth, convolution, held)


def test_a_result_is_held_to_the_worst_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = testing.make_inputs(CASE, "cpu")
    *_, rounded = tf32.pytorchs_ways(CASE, inputs)
    monkeypatch.setattr(testing, "make_inputs", lambda *_: inputs)
    monkeypatch.setattr(testing, "run_xsep", lambda *_: rounded)
    tf32.check(CASE, "triton", "cpu")
    off = {name: t + (rounded[name] - t) * 3 for name, t in testing.run_truth(CASE, inputs).results.items()}
    monkeypatch.setattr(testing, "run_xsep", lambda *_: off)
    with pytest.raises(AssertionError, match=r"y: error .*; dx: "):
        tf32.check(CASE, "triton", "cpu")
