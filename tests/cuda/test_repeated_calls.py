"""Calls that C++ makes again by the cuda backend's operators, which the emulator runs: as Python's way makes them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Optional

import pytest
import torch
from torch import Tensor

from xsep import ChannelAffine, depthwise_conv2d, dispatch, extension, repeated, separable_conv2d
from xsep.backends.cuda import CudaBackend
from xsep.checked import checked_depthwise_args, checked_separable_args
from xsep.ops import depthwise, separable

from . import emulated, emulated_ops
from .emulated_ops import EmulatedOps, misaligned

#: Those that C++ asks PyTorch's dispatcher for. Kept: C++ remembers where it found them.
OPS = ("cuda_depthwise_fprop", "cuda_depthwise_bprop", "cuda_separable_fprop", "cuda_separable_bprop")
SCHEMAS = torch.library.Library("xsep", "FRAGMENT")
LAYOUTS = {"NHWC": torch.channels_last, "NCHW": torch.contiguous_format}
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)

Call = dict[str, Any]


@pytest.fixture(scope="module", autouse=True)
def schemas() -> None:
    """Where the library is not built, or older than its sources, the dispatcher hears of its operators from here."""
    if emulated.missing_tools() is not None:
        pytest.skip(str(emulated.missing_tools()))
    extension.load_cuda()
    for name in set(OPS) - {known.removeprefix("xsep::") for known in torch._C._dispatch_get_all_op_names()}:
        schema = str(getattr(emulated_ops.library().ops, name).default._schema)
        SCHEMAS.define(schema.removeprefix("xsep_emulated::"))


@pytest.fixture(autouse=True)
def dispatched(schemas: None, operators: EmulatedOps, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The dispatcher has the emulator's operators for a CPU's tensors, and nothing is known of any call."""
    own = torch.library.Library("xsep", "IMPL")
    for name in OPS:
        own.impl(name, lambda *given, name=name: getattr(torch.ops.xsep, name)(*given), "CPU")
    monkeypatch.setattr(CudaBackend, "not_supported_reasons", lambda self, problem: [])
    dispatch.forget_choices()
    yield
    own._destroy()
    dispatch.forget_choices()


def draw(
    c_in: int, c_out: Optional[int], layout: torch.memory_format, gradients: bool, everything: bool = False,
    multiplier: int = 1, dtype: torch.dtype = torch.bfloat16,
) -> Call:  # fmt: skip
    """A separable convolution behind a ReLU, or a depthwise one where there is no c_out."""
    c_mid = c_in * multiplier

    def randn(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape).to(kind).requires_grad_(gradients)

    x = torch.randn(2, c_in, 9, 7).to(dtype).contiguous(memory_format=layout).requires_grad_(gradients)
    call: Call = {"x": x, "w_dw": randn(c_mid, 1, 3, 3), "padding": 1, "backend": "cuda"}
    wide = torch.float32
    scale, shift = (randn(c_in, kind=wide), randn(c_in, kind=wide)) if everything else (None, None)
    call["prologue"] = ChannelAffine(scale, shift, "relu")
    call["bias"] = randn(c_mid if c_out is None else c_out)
    if c_out is not None:
        call["w_pw"] = randn(c_out, c_mid, 1, 1)
        if everything:
            residual = torch.randn(2, c_out, 9, 7).to(dtype).contiguous(memory_format=layout)
            call |= {
                "middle": ChannelAffine(randn(c_mid, kind=wide), randn(c_mid, kind=wide), "silu"),
                "epilogue": ChannelAffine(randn(c_out, kind=wide), randn(c_out, kind=wide), "relu"),
                "residual": residual,
            }
    return call


def run(call: Call) -> Tensor:
    return separable_conv2d(**call) if "w_pw" in call else depthwise_conv2d(**call)


DEPTHWISE = ("x", "w_dw", "bias", "stride", "padding", "dilation", "prologue", "epilogue")
SEPARABLE = (*DEPTHWISE[:2], "w_pw", *DEPTHWISE[2:7], "middle", "epilogue", "residual")


def in_order(call: Call) -> list[Any]:
    """The arguments of the function that checks them."""
    given = {"stride": 1, "dilation": 1, **call}
    return [given.get(name) for name in (SEPARABLE if "w_pw" in call else DEPTHWISE)]


def by_python(call: Call) -> Tensor:
    if "w_pw" in call:
        args, problem = checked_separable_args(*in_order(call))
        return separable(args, "cuda", problem)
    alone, problem = checked_depthwise_args(*in_order(call))
    return depthwise(alone, "cuda", problem)


def made_again(call: Call) -> Any:
    """y by C++, of a call that it knows; None where it leaves it to Python."""
    return repeated.again(*in_order(call), "cuda")


def leaves(call: Call) -> list[Tensor]:
    found = [call[name] for name in ("x", "w_dw", "w_pw", "bias") if call.get(name) is not None]
    prologue = call["prologue"]
    return [*found, *(v for v in (prologue.scale, prologue.shift) if v is not None)]


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype and found.stride() == expected.stride() and torch.equal(found, expected)


#: c_in, c_out, multiplier, everything, the operator.
FORWARDS = {
    "fused": (8, 16, 1, False, "separable_fprop"), "fused-everything": (8, 16, 1, True, "separable_fprop"),
    "staged": (5, 7, 1, False, "separable_fprop"), "multiplier": (5, 7, 2, False, "separable_fprop"),
    "depthwise": (8, None, 1, False, "depthwise_fprop"), "depthwise-multiplier": (5, None, 3, True, "depthwise_fprop"),
}  # fmt: skip


@each_layout
@pytest.mark.parametrize("name", FORWARDS)
def test_forward(operators: EmulatedOps, name: str, layout: torch.memory_format) -> None:
    c_in, c_out, multiplier, everything, op = FORWARDS[name]
    call = draw(c_in, c_out, layout, False, everything, multiplier)
    assert made_again(call) is NotImplemented
    first, expected = run(call), by_python(call)
    assert operators.called == {op: 2}
    again = made_again(call)
    assert isinstance(again, Tensor) and operators.called == {op: 3}
    assert_same(first, expected)
    assert_same(again, expected)


@each_layout
@pytest.mark.parametrize("frozen", ["", "x", "w_dw", "w_pw", "bias"])
@pytest.mark.parametrize("name", ["fused", "staged", "multiplier", "depthwise", "depthwise-multiplier"])
def test_gradients(operators: EmulatedOps, name: str, frozen: str, layout: torch.memory_format) -> None:
    c_in, c_out, multiplier, everything, _ = FORWARDS[name]
    call = draw(c_in, c_out, layout, True, everything, multiplier)
    if frozen in call:
        call[frozen].requires_grad_(False)
    run(call)  # which C++ knows from here on
    inputs = [t for t in leaves(call) if t.requires_grad]
    dy = torch.randn(2, c_out or c_in * multiplier, 9, 7).bfloat16().contiguous(memory_format=layout)
    operators.called.clear()
    y = made_again(call)
    assert isinstance(y, Tensor) and y.grad_fn is not None and "Convolution" in y.grad_fn.name()
    found = torch.autograd.grad(y, inputs, dy)
    forward, backward = operators.called
    assert operators.called == {forward: 1, backward: 1} and forward[:-5] == backward[:-5]
    expected = torch.autograd.grad(by_python(call), inputs, dy)
    for mine, right in zip(found, expected, strict=True):
        assert_same(mine, right)


def test_gradient_of_a_gradient() -> None:
    """By the library's own op, which is asked for the same backend."""
    call = draw(8, 16, torch.channels_last, True, dtype=torch.float32)
    inputs = leaves(call)
    found = []
    for way in (run, run, by_python):
        y = way(call)
        first = torch.autograd.grad(y, inputs, torch.ones_like(y), create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))  # type: ignore[arg-type]
    for once, again, right in zip(*found, strict=True):
        torch.testing.assert_close(once, right)
        torch.testing.assert_close(again, right)


def test_what_is_not_one_call_is_pythons(operators: EmulatedOps) -> None:
    """Of channels that are not fused, with an epilogue that a product does not take along."""
    call = draw(5, 7, torch.channels_last, False, everything=True)
    assert_same(run(call), by_python(call))
    assert made_again(call) is None and operators.called == {"depthwise_fprop": 2}


def test_what_stands_behind_w_pw_is_pythons_in_training(operators: EmulatedOps) -> None:
    call = draw(8, 16, torch.channels_last, True, everything=True)
    run(call)
    assert made_again(call) is None
    with torch.no_grad():
        assert isinstance(made_again(call), Tensor)


def test_a_plan_is_of_an_address(operators: EmulatedOps) -> None:
    """The fused kernel needs 16-byte accesses: the same shapes elsewhere are another call."""
    call = draw(8, 16, torch.channels_last, False, everything=True)
    run(call)
    moved = {**call, "x": misaligned(call["x"])}
    assert made_again(moved) is NotImplemented
    operators.called.clear()
    assert_same(run(moved), by_python(moved))
    assert operators.called == {"depthwise_fprop": 2} and made_again(moved) is None
    assert isinstance(made_again(call), Tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_float32_of_a_gpu_is_pythons(dtype: torch.dtype) -> None:
    """Whose settings for TF32 may be other ones at the next call."""
    call = draw(8, 16, torch.channels_last, False, dtype=dtype)
    given = in_order(call)
    args, problem = checked_separable_args(*given)
    assert made_again(call) is NotImplemented  # which is when it is asked
    made = repeated.first((*given, "cuda"), args, problem._replace(device="cuda"), "cuda")
    assert (made is None) == (dtype is torch.float32)
