"""Which of the op's activations a module applies: one of torch.nn's, or one of somebody's own that says the same."""

from __future__ import annotations

import math
import operator
from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import fx, nn

Activation = tuple[str, Optional[float]]  # name, alpha


class _Function(NamedTuple):
    name: str
    parameters: tuple[str, ...]  # behind the input, in order
    alpha: Optional[tuple[str, float]] = None  # which of them it is, and its default


_RELU, _SILU = _Function("relu", ("inplace",)), _Function("silu", ("inplace",))
_FUNCTIONS: dict[Any, _Function] = {
    F.relu: _RELU, torch.relu: _RELU, "relu": _RELU, F.silu: _SILU, F.relu6: _Function("relu6", ("inplace",)),
    F.hardswish: _Function("hardswish", ("inplace",)), F.gelu: _Function("gelu", ("approximate",)),
    F.elu: _Function("elu", ("alpha", "inplace"), ("alpha", 1.0)),
    F.leaky_relu: _Function("leaky_relu", ("negative_slope", "inplace"), ("negative_slope", 0.01)),
}  # fmt: skip
_SIGMOIDS: tuple[Any, ...] = (torch.sigmoid, F.sigmoid, "sigmoid")
_PRODUCTS: tuple[Any, ...] = (operator.mul, torch.mul, "mul")


def activation_of(module: nn.Module) -> Optional[Activation]:
    """(name, alpha) of a module that applies one of the op's activations and nothing else, or None."""
    found = _applied(module)
    if found is None or found[1] is None:
        return found
    alpha: Any = found[1]
    # The op takes no other.
    number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
    return found if number and math.isfinite(alpha) else None


def _applied(module: nn.Module) -> Optional[Activation]:
    if "forward" in vars(module):
        return None
    forward: Any = type(module).forward
    if isinstance(module, nn.ReLU) and forward is nn.ReLU.forward:
        return "relu", None
    if isinstance(module, nn.ReLU6) and forward is nn.ReLU6.forward:
        return "relu6", None
    if isinstance(module, nn.SiLU) and forward is nn.SiLU.forward:
        return "silu", None
    if isinstance(module, nn.Hardswish) and forward is nn.Hardswish.forward:
        return "hardswish", None
    if isinstance(module, nn.GELU) and forward is nn.GELU.forward:
        return ("gelu_tanh" if module.approximate == "tanh" else "gelu"), None
    if isinstance(module, nn.ELU) and forward is nn.ELU.forward:
        return "elu", module.alpha
    if isinstance(module, nn.LeakyReLU) and forward is nn.LeakyReLU.forward:
        return "leaky_relu", module.negative_slope
    if forward.__module__.startswith("torch."):
        return None
    return _own(module)


def _own(module: nn.Module) -> Optional[Activation]:
    """Of a forward that is one call of such a function, in training as in eval mode. Not where it writes into its
    input, which it cannot be asked about later."""
    if next(module.children(), None) is not None or next(iter(module.state_dict()), None) is not None:
        return None
    found, training = [], module.training
    try:
        for module.training in (False, True):
            found.append(_said_by(fx.Tracer().trace(module)))
    except Exception:  # any forward may fail on a symbolic input in its own way
        return None
    finally:
        module.training = training
    return found[0] if found[0] == found[1] else None


def _said_by(graph: fx.Graph) -> Optional[Activation]:
    nodes = [node for node in graph.nodes if node.op != "placeholder" or node.users]
    if len(nodes) == 4 and _is_silu(*nodes):
        return "silu", None
    if len(nodes) != 3:
        return None
    given, call, output = nodes
    function = _FUNCTIONS.get(call.target) if call.op in ("call_function", "call_method") else None
    if given.op != "placeholder" or function is None or output.args != (call,):
        return None
    values = dict(zip(("input", *function.parameters), call.args)) | call.kwargs
    if values.pop("input", None) is not given or values.pop("inplace", False) is not False:
        return None
    if function.alpha is not None:
        name, default = function.alpha
        alpha = values.pop(name, default)
        return None if values or not isinstance(alpha, (int, float)) else (function.name, float(alpha))
    tanh = values.pop("approximate", "none")
    if values or tanh not in ("none", "tanh"):
        return None
    return (f"{function.name}_tanh" if tanh == "tanh" else function.name), None


def _is_silu(given: fx.Node, sigmoid: fx.Node, product: fx.Node, output: fx.Node) -> bool:
    """x times the sigmoid of x."""
    return (
        given.op == "placeholder" and sigmoid.target in _SIGMOIDS and sigmoid.args == (given,) and not sigmoid.kwargs
        and product.target in _PRODUCTS and product.args in ((given, sigmoid), (sigmoid, given)) and not product.kwargs
        and output.args == (product,)
    )  # fmt: skip
