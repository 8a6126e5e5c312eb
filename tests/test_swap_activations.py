"""Activations that are somebody's own modules, and modules that hand a value on until they drop some of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xsep.swap import swap_separable_convs
from xsep.swap.activations import activation_of

from .swap_patterns import assert_same_results, depthwise, fused_calls, picture, pointwise


def own(function: Callable[[Any], Any], **attributes: Any) -> nn.Module:
    """A module whose forward is the function."""

    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    made = Own()
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


class Slope(nn.Module):
    def __init__(self, slope: float, inplace: bool = False) -> None:
        super().__init__()
        self.slope, self.inplace = slope, inplace

    def forward(self, input: Tensor, other: Any = None) -> Tensor:
        return F.leaky_relu(input, self.slope, self.inplace)


KNOWN: dict[str, tuple[Callable[[], nn.Module], tuple[str, Any]]] = {
    "relu": (lambda: own(F.relu), ("relu", None)),
    "torch.relu": (lambda: own(torch.relu), ("relu", None)),
    "relu-method": (lambda: own(lambda x: x.relu()), ("relu", None)),
    "relu6": (lambda: own(F.relu6), ("relu6", None)),
    "silu": (lambda: own(lambda x: F.silu(x, inplace=False)), ("silu", None)),
    "swish": (lambda: own(lambda x: x * torch.sigmoid(x)), ("silu", None)),
    "swish-turned-round": (lambda: own(lambda x: F.sigmoid(x) * x), ("silu", None)),
    "swish-methods": (lambda: own(lambda x: x.mul(x.sigmoid())), ("silu", None)),
    "hardswish": (lambda: own(F.hardswish), ("hardswish", None)),
    "gelu": (lambda: own(F.gelu), ("gelu", None)),
    "gelu-none": (lambda: own(lambda x: F.gelu(x, approximate="none")), ("gelu", None)),
    "gelu-tanh": (lambda: own(lambda x: F.gelu(x, approximate="tanh")), ("gelu_tanh", None)),
    "elu": (lambda: own(F.elu), ("elu", 1.0)),
    "elu-alpha": (lambda: own(lambda x: F.elu(x, alpha=0.5)), ("elu", 0.5)),
    "leaky_relu": (lambda: own(F.leaky_relu), ("leaky_relu", 0.01)),
    "slope": (lambda: Slope(0.3), ("leaky_relu", 0.3)),
}


@pytest.mark.parametrize("name", KNOWN)
def test_an_own_activation_runs_with_the_pair(name: str) -> None:
    make, expected = KNOWN[name]
    assert activation_of(make()) == expected
    truth = nn.Sequential(depthwise(5), make(), pointwise(5, 4)).double()
    model = copy.deepcopy(truth)
    report = swap_separable_convs(model, report=False)
    assert [s.members for s in report.swapped] == [("0", "1", "2")]
    x = picture(dtype=torch.float64)
    assert fused_calls(model, x) == 1
    assert_same_results(model, truth, x, 1e-12)


def failing(x: Any) -> Any:
    raise RuntimeError("of its own")


class ByMode(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x) if self.training else F.silu(x)


class OfTwo(nn.Module):
    def forward(self, x: Tensor, y: Any = 1.0) -> Tensor:
        return x * torch.sigmoid(y)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x)


UNKNOWN: dict[str, Callable[[], nn.Module]] = {
    "another": lambda: own(torch.tanh),
    "twice": lambda: own(lambda x: F.relu(F.relu(x))),
    "and-more": lambda: own(lambda x: F.relu(x) + 1),
    "something-before": lambda: own(lambda x: F.relu(x + 1)),
    "nothing": lambda: own(lambda x: x),
    "in-place": lambda: own(lambda x: F.relu(x, inplace=True)),
    "in-place-by-place": lambda: Slope(0.3, inplace=True),
    "sigmoid-alone": lambda: own(torch.sigmoid),
    "square": lambda: own(lambda x: x * x),
    "sigmoid-of-another": OfTwo,
    "fails": lambda: own(failing),
    "two-modes": ByMode,
    "a-parameter": Scaled,
    "a-child": lambda: own(F.relu, child=nn.ReLU()),
    "two-results": lambda: own(lambda x: (F.relu(x), x)),
    "another-gelu": lambda: own(lambda x: F.gelu(x, approximate=x)),
    "an-alpha-that-is-a-tensor": lambda: own(lambda x: F.elu(x, alpha=x)),
    "an-alpha-that-is-no-number": lambda: nn.ELU(float("nan")),
    "an-alpha-without-end": lambda: Slope(float("inf")),
    "silu-and-x": lambda: own(lambda x: x * torch.sigmoid(x) * x),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_no_such_function_alone_is_left(name: str) -> None:
    module = UNKNOWN[name]().train(name != "two-modes")
    training = module.training
    assert activation_of(module) is None and module.training == training
    report = swap_separable_convs(nn.Sequential(depthwise(5), module, pointwise(5, 4)), report=False)
    assert len(report) == 0 and "neither a batch norm nor a known activation" in report.missed[0].reason


def test_a_forward_put_on_the_instance_is_nobodys() -> None:
    module = own(F.relu)
    module.forward = lambda x: x
    assert activation_of(module) is None


@pytest.mark.parametrize("dropout", [nn.Dropout, nn.Dropout2d])
@pytest.mark.parametrize("place", [1, 2], ids=["between", "behind"])
def test_a_dropout_is_passed_while_it_drops_nothing(dropout: Callable[[float], nn.Module], place: int) -> None:
    parts = [depthwise(5), pointwise(5, 4), nn.ReLU()]
    parts.insert(place, dropout(0.0))
    truth = nn.Sequential(*parts)
    model = copy.deepcopy(truth)
    report = swap_separable_convs(model, report=False)
    assert [s.members for s in report.swapped] == [tuple(str(i) for i in range(4) if i != place)]
    x = picture()
    # Behind the pair, what it drops is dropped from the fused op's result, and the ReLU runs by itself.
    for p, train, fused in ((0.0, True, 1), (0.5, False, 1), (0.5, True, place - 1), (0.0, True, 1)):
        for m in (model, truth):
            m.train(train)
            dropped: Any = m[place]
            dropped.p = p
        assert fused_calls(model, x) == fused
        torch.manual_seed(3)
        expected = truth(x)
        torch.manual_seed(3)
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
