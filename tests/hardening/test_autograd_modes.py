"""Autograd as people use it around the op: hooks, offloading, frozen and derived weights, modes, anomalies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import xsep
from tests.test_autograd import function_of
from xsep.testing import Case

CASE = Case(c_in=9, c_out=6, bias=True, activations=("relu", None, "relu"), vectors=("scale_e", "shift_e"))


def layer_and_input(backend: str) -> tuple[Any, Tensor]:
    torch.manual_seed(11)
    layer = xsep.FusedSeparableConv2d(9, 6, 3, padding=1, middle_activation="silu", backend=backend)
    return layer, torch.randn(2, 9, 7, 8, requires_grad=True)


def two_convolutions(layer: Any, x: Tensor) -> Tensor:
    return layer.conv_pw(nn.functional.silu(layer.conv_dw(x)))


def test_tensor_hooks_see_and_change_gradients(backend: str) -> None:
    f, tensors = function_of(CASE, backend)
    plain = torch.autograd.grad(f(*tensors).sum(), tensors)
    seen: list[Tensor] = []
    y = f(*tensors)
    y.register_hook(lambda g: 3 * g)
    handle = tensors[0].register_hook(lambda g: seen.append(g) or -g)  # type: ignore[func-returns-value]
    y.sum().backward()
    handle.remove()
    torch.testing.assert_close(seen[0], 3 * plain[0])
    for leaf, g, factor in zip(tensors, plain, (-3, *[3] * len(plain))):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, factor * g)


def test_module_and_accumulation_hooks_run_once(backend: str) -> None:
    layer, x = layer_and_input(backend)
    calls: list[str] = []
    layer.register_forward_hook(lambda *_: calls.append("forward"))
    layer.register_full_backward_pre_hook(lambda *_: calls.append("before"))
    layer.register_full_backward_hook(lambda *_: calls.append("after"))
    for name, p in layer.named_parameters():
        p.register_post_accumulate_grad_hook(lambda _, name=name: calls.append(name))
    layer(x).sum().backward()
    assert calls[:2] == ["forward", "before"]
    assert sorted(calls[2:]) == sorted(["after", *(name for name, _ in layer.named_parameters())])


@pytest.mark.parametrize("way", ["numpy", "save_on_cpu"])
def test_saved_tensors_may_be_offloaded(way: str, backend: str) -> None:
    f, tensors = function_of(CASE, backend)
    plain = torch.autograd.grad(f(*tensors).sum(), tensors)
    hooks: Any = torch.autograd.graph.save_on_cpu()
    if way == "numpy":
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().numpy().copy(), torch.from_numpy)
    with hooks:
        y = f(*tensors).sum()
    for got, expected in zip(torch.autograd.grad(y, tensors), plain):
        torch.testing.assert_close(got, expected)


def test_weights_that_are_no_leaves(backend: str) -> None:
    """Weight standardisation, and one tensor that is cut into both filters."""
    x = torch.randn(2, 6, 7, 8)
    both = torch.randn(6 * 9 + 5 * 6, requires_grad=True)

    def run(op: Any) -> Tensor:
        w_dw, w_pw = both[:54].view(6, 1, 3, 3), both[54:].view(5, 6, 1, 1)
        w_dw = w_dw - w_dw.mean((1, 2, 3), keepdim=True)
        return op(x, w_dw, w_pw)

    ours = run(lambda x, a, b: xsep.separable_conv2d(x, a, b, backend=backend))
    theirs = run(lambda x, a, b: torch.conv2d(torch.conv2d(x, a, groups=6), b))
    dy = torch.randn_like(ours)
    got, expected = (torch.autograd.grad(y, both, dy)[0] for y in (ours, theirs))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frozen", ["conv_dw", "conv_pw", "both", "input"])
def test_what_is_frozen_gets_no_gradient(frozen: str, backend: str) -> None:
    layer, x = layer_and_input(backend)
    if frozen == "input":
        x = x.detach()
    for name in ("conv_dw", "conv_pw"):
        getattr(layer, name).requires_grad_(frozen not in (name, "both"))
    leaves = [t for t in (x, *layer.parameters()) if t.requires_grad]
    dy = torch.randn(2, 6, 7, 8)
    expected = torch.autograd.grad(two_convolutions(layer, x), leaves, dy)
    layer(x).backward(dy)
    for leaf, g in zip(leaves, expected):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, g, rtol=1e-4, atol=1e-4)
    assert all(t.grad is None for t in (x, *layer.parameters()) if not t.requires_grad)


def test_gradients_add_up_over_two_steps(backend: str) -> None:
    layer, x = layer_and_input(backend)
    layer(x).sum().backward()
    once = [p.grad.clone() for p in layer.parameters()]
    layer(x).sum().backward()
    for p, g in zip(layer.parameters(), once):
        torch.testing.assert_close(p.grad, 2 * g)


def test_inference_tensors_are_refused_for_backward_as_by_conv2d(backend: str) -> None:
    with torch.inference_mode():
        layer, x = layer_and_input(backend)
        y = layer(x)
    assert y.is_inference() and not y.requires_grad
    plain = torch.randn(2, 9, 7, 8, requires_grad=True)
    for run in (layer, lambda v: two_convolutions(layer, v)):
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
            run(plain)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), y)


def test_a_graph_that_was_freed_says_so(backend: str) -> None:
    f, tensors = function_of(CASE, backend)
    y = f(*tensors).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward()


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.filterwarnings("ignore:Error detected in")
def test_anomaly_mode_finds_the_nan_and_nothing_else(backend: str) -> None:
    f, tensors = function_of(CASE, backend)
    with torch.autograd.detect_anomaly(check_nan=True):
        f(*tensors).sum().backward()
        with pytest.raises(RuntimeError, match="returned nan values"):
            torch.autograd.grad(f(*tensors).sum() * torch.nan, tensors)


def test_grad_mode_is_restored_inside_backward_hooks(backend: str) -> None:
    """enable_grad inside no_grad, and the other way round."""
    f, tensors = function_of(CASE, backend)
    with torch.no_grad():
        with torch.enable_grad():
            y = f(*tensors)
        assert y.requires_grad and not f(*tensors).requires_grad
    assert len(torch.autograd.grad(y.sum(), tensors)) == len(tensors)
