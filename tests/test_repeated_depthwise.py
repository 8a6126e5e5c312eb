"""Depthwise convolutions that C++ makes without Python's checks, and those whose training step is PyTorch's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Optional

import pytest
import torch
from torch import Tensor, nn

import xsep
from xsep import ChannelAffine, extension, repeated, testing
from xsep.checked import checked_depthwise_args
from xsep.ops import depthwise

from .repeated_support import Noting, assert_gradients_come_in_batches

CALL = ("x", "w_dw", "bias", "stride", "padding", "dilation", "prologue", "epilogue")
LAYOUTS = [torch.channels_last, torch.contiguous_format]


@pytest.fixture
def module() -> Iterator[Any]:
    """``xsep._repeated`` with nothing known and one thread; it must be built, so it is never skipped."""
    found = extension.repeated()
    assert found is not None
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # what is left to PyTorch depends on it
    found.forget()
    yield found
    found.forget()
    torch.set_num_threads(threads)


def make(
    dtype: torch.dtype = torch.float32,
    layout: torch.memory_format = torch.channels_last,
    shape: tuple[int, int, int, int] = (2, 8, 7, 9),
    k: int = 3,
    multiplier: int = 1,
    gradients: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """The arguments of a call by name."""
    call: dict[str, Any] = dict.fromkeys(CALL) | {"backend": None, "stride": 1, "padding": k // 2, "dilation": 1}
    call["x"] = torch.randn(shape).to(dtype).contiguous(memory_format=layout)
    call["w_dw"] = torch.randn(shape[1] * multiplier, 1, k, k).to(dtype)
    call |= options
    for t in tensors_of(call):
        t.requires_grad_(gradients)
    return call


def tensors_of(call: dict[str, Any]) -> list[Tensor]:
    every = [call[name] for name in CALL[:3]]
    for name in ("prologue", "epilogue"):
        every += [] if call[name] is None else [call[name].scale, call[name].shift]
    return [t for t in every if t is not None]


def results(y: Tensor, call: dict[str, Any], dy: Tensor) -> list[Tensor]:
    wanted = [t for t in tensors_of(call) if t.requires_grad]
    return [y, *(torch.autograd.grad(y, wanted, dy) if wanted else ())]


def by_python(call: dict[str, Any]) -> Tensor:
    args, problem = checked_depthwise_args(*(call[name] for name in CALL))
    return depthwise(args, call["backend"] or "auto", problem)


def by_pytorch(call: dict[str, Any]) -> Tensor:
    x, bias = call["x"], call["bias"]
    apart = bias is not None and bias.requires_grad  # whose gradient is then a sum in pairs
    where = (call["stride"], call["padding"], call["dilation"], x.shape[1])
    y = nn.functional.conv2d(x, call["w_dw"], None if apart else bias, *where)
    return y + bias.view(-1, 1, 1) if apart else y


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(
        a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride() and torch.equal(a, b)
        for a, b in zip(found, expected, strict=True)
    )


def made_by(y: Tensor) -> str:
    assert y.grad_fn is not None
    return y.grad_fn.name()


def affine(c: int, activation: Optional[str], dtype: torch.dtype = torch.float32, **alpha: float) -> ChannelAffine:
    return ChannelAffine(torch.rand(c).to(dtype) + 0.5, torch.randn(c).to(dtype), activation, **alpha)


KERNELS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": make,
    "nchw": lambda: make(layout=torch.contiguous_format),
    "one pixel": lambda: make(shape=(2, 8, 1, 1)),
    "one pixel nchw": lambda: make(shape=(2, 8, 1, 1), layout=torch.contiguous_format),
    "one channel": lambda: make(shape=(2, 1, 17, 19), layout=torch.contiguous_format),
    "bias": lambda: make(bias=torch.randn(8)),
    "bfloat16": lambda: make(torch.bfloat16, bias=torch.randn(8)),  # a bias in float32 beside it
    "float16 nchw": lambda: make(torch.float16, torch.contiguous_format),
    "relu": lambda: make(prologue=ChannelAffine(activation="relu")),
    "prologue": lambda: make(prologue=affine(8, "elu", alpha=0.5), bias=torch.randn(8)),
    "wide prologue": lambda: make(torch.bfloat16, prologue=affine(8, "silu")),
    "stride": lambda: make(stride=(2, 1), padding=(0, 2, 1, 1), dilation=2),
    "same": lambda: make(stride=2, padding="same"),
    "multiplier": lambda: make(multiplier=3, bias=torch.randn(24)),
    "by name": lambda: make(backend="cpu"),
    "by name where PyTorch is faster": lambda: make(shape=(1, 3, 160, 160), backend="cpu"),
    "a large filter": lambda: make(shape=(1, 3, 160, 160), k=5, layout=torch.contiguous_format),
}


@pytest.mark.parametrize("name", KERNELS)
def test_gradients_are_those_of_the_kernels(name: str, module: Any) -> None:
    for times in range(3):
        call = KERNELS[name]()
        y = xsep.depthwise_conv2d(**call)
        assert "CppNode" in made_by(y)
        dy = torch.randn_like(y)
        if times == 2:
            dy = dy[:, :, :1, :1].expand_as(y)
        named = call | {"backend": "cpu"}
        assert same(results(y, call, dy), results(by_python(named), named, dy))
        assert module.count() == 1


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nhwc", "nchw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("inference", [False, True])
def test_without_gradients_everything_is_made(
    layout: torch.memory_format, dtype: torch.dtype, inference: bool, module: Any
) -> None:
    for times in range(2):
        call = make(
            dtype, layout, multiplier=2, gradients=False, bias=torch.randn(16), prologue=affine(8, "relu"),
            epilogue=affine(16, "leaky_relu", alpha=0.25),
        )  # fmt: skip
        with torch.inference_mode(inference):
            y = xsep.depthwise_conv2d(**call)
            assert same([y], [by_python(call)]) and y.is_inference() == inference
            if times:
                assert same([repeated.again(*(call[name] for name in (*CALL, "backend")))], [y])
    assert module.count() == 1


#: Shape, multiplier, filter, stride, layout: what PyTorch trains faster, by one thread.
LEFT = {
    "one channel": ((1, 1, 48, 50), 1, 3, 1, torch.contiguous_format),
    "one channel and a stride": ((1, 1, 48, 50), 1, 3, 2, torch.contiguous_format),
    "nchw": ((2, 3, 57, 43), 8, 3, 1, torch.contiguous_format),
    "a stride": ((1, 12, 157, 163), 1, 3, 2, torch.channels_last),
    "nhwc": ((1, 4, 160, 161), 1, 3, 1, torch.channels_last),
}


def left(name: str, **options: Any) -> dict[str, Any]:
    shape, multiplier, k, stride, layout = LEFT[name]
    return make(shape=shape, multiplier=multiplier, k=k, stride=stride, layout=layout, **options)


@pytest.mark.parametrize("frozen", ["", "x", "w_dw", "bias"])
@pytest.mark.parametrize("name", LEFT)
def test_a_training_step_is_pytorchs_where_that_is_faster(name: str, frozen: str, module: Any) -> None:
    for _ in range(3):
        call = left(name, bias=torch.randn(LEFT[name][0][1] * LEFT[name][1]))
        if frozen:
            call[frozen].requires_grad_(False)
        y, expected = xsep.depthwise_conv2d(**call), by_pytorch(call)
        assert made_by(y) == ("AddBackward0" if frozen != "bias" else made_by(expected))
        dy = torch.randn_like(y)
        assert same(results(y, call, dy), results(expected, call, dy))
    assert module.count() == 1


@pytest.mark.parametrize("how", ["plain", "bias", "around"])
@pytest.mark.parametrize("name", LEFT)
@pytest.mark.parametrize("backend", [None, "cpu"])
def test_results_there_are_right(backend: Optional[str], name: str, how: str, module: Any) -> None:
    """Beside float64; also where Python has a prologue and an epilogue to make."""
    (n, c, h, w), multiplier, k, stride, layout = LEFT[name]
    case = testing.Case(
        op="depthwise", n=n, c_in=c, multiplier=multiplier, h=h, w=w, filter=(k, k), stride=(stride, stride),
        bias=how != "plain",
        vectors=("scale_p", "shift_p", "scale_e", "shift_e") if how == "around" else (),
        activations=("relu", None, "silu") if how == "around" else (None, None, None),
        layout="contiguous" if layout is torch.contiguous_format else "channels_last", seed=int(torch.randint(999, ())),
    )  # fmt: skip
    testing.check(case, backend)
    testing.check(case, backend)  # and once it is known


@pytest.mark.parametrize("options", ["prologue", "epilogue", "padding"])
def test_what_stands_around_is_pytorchs_too(options: str, module: Any) -> None:
    around = {"prologue": ChannelAffine(activation="relu"), "epilogue": affine(24, "silu"), "padding": (0, 1, 2, 0)}
    for _ in range(2):
        call = left("nchw", **{options: around[options]})
        y = xsep.depthwise_conv2d(**call)
        assert "Eager" not in made_by(y) and "CppNode" not in made_by(y)
        named = call | {"backend": "aten"}
        again = xsep.depthwise_conv2d(**named)
        assert "Eager" in made_by(again)
        dy = torch.randn_like(y)
        for a, b in zip(results(y, call, dy), results(again, named, dy), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


@pytest.mark.parametrize("name", LEFT)
def test_explain_says_why(name: str, module: Any) -> None:
    call = left(name)
    words = xsep.explain(call["x"], call["w_dw"], stride=call["stride"], padding=1)
    assert "PyTorch's convolution is faster" in words
    named = xsep.explain(call["x"], call["w_dw"], stride=call["stride"], padding=1, backend="cpu")
    assert "runs on   cpu" in named and "PyTorch's convolution is faster" not in named


def test_more_threads_than_pictures_share_the_rows_of_nchw(module: Any) -> None:
    call = left("nchw")
    assert "Convolution" in made_by(xsep.depthwise_conv2d(**call))
    torch.set_num_threads(3)
    assert "CppNode" in made_by(xsep.depthwise_conv2d(**call))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_who_asks_for_pytorchs_convolution_has_it(dtype: torch.dtype, module: Any) -> None:
    for options in (
        {},
        {"bias": torch.randn(8).to(dtype)},
        {"multiplier": 2, "stride": (2, 1), "padding": (2, 2, 1, 1)},
    ):
        call = make(dtype, backend="aten", **options)
        y = xsep.depthwise_conv2d(**call)
        assert "CppNode" not in made_by(y) and "Eager" not in made_by(y)
        plain = call | ({"padding": (1, 2)} if "padding" in options else {})
        dy = torch.randn_like(y)
        assert same(results(y, call, dy), results(by_pytorch(plain), call, dy))
        with torch.no_grad():
            assert same([xsep.depthwise_conv2d(**call)], [by_python(call)])


def test_what_pytorch_does_wrong_or_not_alone_is_pythons(module: Any) -> None:
    calls = [
        make(torch.bfloat16, backend="aten"), make(backend="aten", padding=(0, 1, 0, 0)),
        make(backend="aten", prologue=affine(8, "relu")), make(backend="aten", epilogue=affine(8, None)),
        make(epilogue=ChannelAffine(activation="relu")),
    ]  # fmt: skip
    for call in calls:
        y = xsep.depthwise_conv2d(**call)
        assert "Eager" in made_by(y)
        dy = torch.randn_like(y)
        assert same(results(y, call, dy), results(by_python(call), call, dy))


@pytest.mark.parametrize("call", [make, lambda: left("nchw")], ids=["kernels", "left"])
def test_double_backward(call: Callable[[], dict[str, Any]], module: Any) -> None:
    ours = call() | {"bias": torch.randn(call()["w_dw"].shape[0], requires_grad=True)}

    def second(y: Tensor) -> list[Tensor]:
        first = torch.autograd.grad(y.square().sum(), tensors_of(ours), create_graph=True)
        return list(torch.autograd.grad([g.square().sum() for g in first], tensors_of(ours)))

    for a, b in zip(second(xsep.depthwise_conv2d(**ours)), second(by_pytorch(ours)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


def test_only_what_requires_a_gradient_gets_one(module: Any) -> None:
    call = make(bias=torch.randn(8), prologue=affine(8, "silu"))
    dy = torch.randn(2, 8, 7, 9)
    expected = results(by_python(call), call, dy)[1:]
    for i, t in enumerate(tensors_of(call)):
        assert same(list(torch.autograd.grad(xsep.depthwise_conv2d(**call), t, dy)), [expected[i]])
    for name in ("x", "w_dw", "bias"):
        for t in tensors_of(call):
            t.requires_grad_(False)
        call[name].requires_grad_(True)
        assert same(results(xsep.depthwise_conv2d(**call), call, dy), results(by_python(call), call, dy))


def test_a_batch_of_gradients_from_above(module: Any) -> None:
    call = make(bias=torch.randn(8))
    y = xsep.depthwise_conv2d(**call)
    assert_gradients_come_in_batches(y, tensors_of(call))


@pytest.mark.parametrize("call", [make, lambda: left("nchw")], ids=["kernels", "left"])
def test_a_mode_sees_the_op_and_its_backward(call: Callable[[], dict[str, Any]], module: Any) -> None:
    ours = call()
    xsep.depthwise_conv2d(**ours)
    with Noting() as mode:
        y = xsep.depthwise_conv2d(**ours)
        torch.autograd.grad(y.sum(), ours["x"])
    assert "xsep.depthwise_conv2d.default" in mode.seen and "xsep.depthwise_conv2d_backward.default" in mode.seen
    y = xsep.depthwise_conv2d(**make())
    with Noting() as mode:
        torch.autograd.grad(y.sum(), y.grad_fn.next_functions[0][0].variable)  # type: ignore[union-attr]
    assert "xsep.depthwise_conv2d_backward.default" in mode.seen


def test_autocast_has_its_say_before(module: Any) -> None:
    call = left("nchw")
    expected = xsep.depthwise_conv2d(**call)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            y = xsep.depthwise_conv2d(**call)
        assert y.dtype == torch.bfloat16 and module.count() == 2
        torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.1)


def test_transforms_are_pythons(module: Any) -> None:
    call = left("nchw")
    expected = xsep.depthwise_conv2d(**call)
    y, pull, *_ = torch.func.vjp(lambda x: xsep.depthwise_conv2d(**call | {"x": x}), call["x"].detach())
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    torch.testing.assert_close(pull(dy)[0], torch.autograd.grad(expected, call["x"], dy)[0])


def test_a_depthwise_call_is_no_separable_one_without_its_product(module: Any) -> None:
    call = make()
    xsep.depthwise_conv2d(**call)
    with pytest.raises((TypeError, ValueError, AttributeError), match="w_pw"):
        xsep.separable_conv2d(call["x"], call["w_dw"], None, padding=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a call has"):
        repeated.again(call["x"], call["w_dw"])


def test_wrong_options_and_tensors_are_refused_after_right_ones(module: Any) -> None:
    call = make(bias=torch.randn(8))
    xsep.depthwise_conv2d(**call)
    for option, wrong in (("stride", True), ("padding", 1.0), ("dilation", "1"), ("stride", (1, 1, 1))):
        with pytest.raises(ValueError, match=option):
            xsep.depthwise_conv2d(**{**call, option: wrong})
    for name, tensor in (("w_dw", torch.randn(7, 1, 3, 3)), ("bias", torch.randn(3))):
        with pytest.raises(ValueError, match=name):
            xsep.depthwise_conv2d(**{**call, name: tensor})
    assert module.count() == 1
