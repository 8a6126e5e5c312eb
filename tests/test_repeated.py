"""Calls that C++ makes without Python's checks give what Python's way gives, and are the ordinary ones alone."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, Optional

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

import xsep
from xsep import ChannelAffine, dispatch, extension, repeated, testing
from xsep.backends import packed_weights
from xsep.checked import checked_separable_args
from xsep.ops import separable
from xsep.testing import VECTORS, Case

from .repeated_support import Noting, assert_gradients_come_in_batches

CALL = ("x", "w_dw", "w_pw", "bias", "stride", "padding", "dilation", "prologue", "middle", "epilogue", "residual")


@pytest.fixture
def module() -> Iterator[Any]:
    """``xsep._repeated`` with nothing known; it must be built, so it is never skipped."""
    found = extension.repeated()
    assert found is not None
    found.forget()
    yield found
    found.forget()


def make(
    dtype: torch.dtype = torch.float32,
    layout: torch.memory_format = torch.channels_last,
    shape: tuple[int, int, int, int] = (2, 8, 7, 9),
    c_out: int = 12,
    multiplier: int = 1,
    gradients: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """The arguments of a call by name."""
    c = shape[1]
    call: dict[str, Any] = dict.fromkeys(CALL) | {"backend": None, "stride": 1, "padding": 1, "dilation": 1}
    call["x"] = torch.randn(shape).to(dtype).contiguous(memory_format=layout)
    call["w_dw"], call["w_pw"] = torch.randn(c * multiplier, 1, 3, 3), torch.randn(c_out, c * multiplier, 1, 1)
    call["w_dw"], call["w_pw"] = call["w_dw"].to(dtype), call["w_pw"].to(dtype)
    call |= options
    for t in tensors_of(call):
        t.requires_grad_(gradients)
    return call


def tensors_of(call: dict[str, Any]) -> list[Tensor]:
    every = [call[name] for name in CALL[:4]] + [call["residual"]]
    for name in ("prologue", "middle", "epilogue"):
        every += [] if call[name] is None else [call[name].scale, call[name].shift]
    return [t for t in every if t is not None]


def results(y: Tensor, call: dict[str, Any], dy: Tensor) -> list[Tensor]:
    wanted = [t for t in tensors_of(call) if t.requires_grad]
    return [y, *(torch.autograd.grad(y, wanted, dy) if wanted else ())]


def by_python(call: dict[str, Any]) -> Tensor:
    args, problem = checked_separable_args(*(call[name] for name in CALL))
    return separable(args, call["backend"] or "auto", problem)


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(
        a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride() and torch.equal(a, b)
        for a, b in zip(found, expected, strict=True)
    )


def affine(c: int, activation: Optional[str], dtype: torch.dtype = torch.float32, **alpha: float) -> ChannelAffine:
    return ChannelAffine(torch.rand(c).to(dtype) + 0.5, torch.randn(c).to(dtype), activation, **alpha)


LAYOUTS = [torch.channels_last, torch.contiguous_format]
DIFFERENTIABLE: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": make,
    "nchw": lambda: make(layout=torch.contiguous_format),
    "one pixel": lambda: make(shape=(2, 8, 1, 1)),
    "one pixel nchw": lambda: make(shape=(2, 8, 1, 1), layout=torch.contiguous_format),
    "one channel": lambda: make(shape=(2, 1, 7, 9), c_out=1, backend="cpu"),
    "bias": lambda: make(bias=torch.randn(12)),
    "bfloat16": lambda: make(torch.bfloat16, bias=torch.randn(12)),  # a bias in float32 beside it
    "bfloat16 nchw": lambda: make(torch.bfloat16, torch.contiguous_format),
    "relu": lambda: make(prologue=ChannelAffine(activation="relu")),
    "prologue": lambda: make(prologue=affine(8, "elu", alpha=0.5)),
    "wide prologue": lambda: make(torch.bfloat16, prologue=affine(8, "silu")),
    "stride": lambda: make(stride=(2, 1), padding=(0, 2, 1, 1), dilation=2),
    "same": lambda: make(stride=2, padding="same"),
    "by name": lambda: make(backend="cpu"),
    "weights in nhwc": lambda: make(
        layout=torch.contiguous_format, w_dw=torch.randn(8, 1, 3, 3).to(memory_format=torch.channels_last)
    ),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_are_those_of_python(name: str, module: Any) -> None:
    for times in range(3):
        call = DIFFERENTIABLE[name]()
        y = xsep.separable_conv2d(**call)
        assert y.grad_fn is not None and "CppNode" in y.grad_fn.name()
        dy = torch.randn_like(y)
        if times == 2:
            dy = dy[:, :, :1, :1].expand_as(y)
        assert same(results(y, call, dy), results(by_python(call), call, dy))
        assert module.count() == 1


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nhwc", "nchw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("inference", [False, True])
def test_without_gradients_everything_is_made(
    layout: torch.memory_format, dtype: torch.dtype, inference: bool, module: Any
) -> None:
    for times in range(2):
        call = make(
            dtype, layout, multiplier=2, gradients=False, bias=torch.randn(12), prologue=affine(8, "relu"),
            middle=affine(16, "hardswish"), epilogue=affine(12, "leaky_relu", alpha=0.25),
            residual=torch.randn(2, 12, 7, 9).to(dtype),
        )  # fmt: skip
        with torch.inference_mode(inference):
            y = xsep.separable_conv2d(**call)
            assert same([y], [by_python(call)]) and y.is_inference() == inference
            if times:
                assert same([repeated.again(*call.values())], [y])
    assert module.count() == 1


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nhwc", "nchw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("inference", [False, True])
def test_without_gradients_two_convolutions_are_made_where_they_were_chosen(
    layout: torch.memory_format, dtype: torch.dtype, inference: bool, module: Any
) -> None:
    some: list[dict[str, Any]] = [
        {},
        {"bias": torch.randn(12).to(dtype), "stride": (2, 1), "padding": (2, 2, 0, 0), "dilation": (1, 2)},
        {"multiplier": 3, "padding": "valid"},
    ]
    for options in some:
        call = make(dtype, layout, gradients=False, backend="aten", **options)
        with torch.inference_mode(inference):
            y = xsep.separable_conv2d(**call)
            again = repeated.again(*call.values())
            assert same([y, again], [by_python(call)] * 2) and again.is_inference() == inference
    assert module.count() == 3


def few_channels(**options: Any) -> dict[str, Any]:
    """A problem whose training step ``auto`` leaves to PyTorch where nothing is asked for."""
    return make(shape=(1, 3, 192, 194), layout=torch.contiguous_format, stride=2, **options)


@pytest.mark.parametrize("frozen", ["", "x", "w_dw", "w_pw"])
def test_a_training_step_is_pytorchs_where_its_convolutions_are_faster(frozen: str, module: Any) -> None:
    for _ in range(3):
        call = few_channels(bias=torch.randn(12))
        if frozen:
            call[frozen].requires_grad_(False)
        y = xsep.separable_conv2d(**call)
        assert y.grad_fn is not None and "Convolution" in y.grad_fn.name()
        z = nn.functional.conv2d(call["x"], call["w_dw"], None, 2, 1, 1, 3)
        expected = nn.functional.conv2d(z, call["w_pw"], call["bias"])
        dy = torch.randn_like(y)
        assert same(results(y, call, dy), results(expected, call, dy))
    assert module.count() == 1


def test_a_forward_is_the_kernels_where_only_a_training_step_is_left_to_pytorch(module: Any) -> None:
    call = few_channels()
    y = xsep.separable_conv2d(**call)
    assert y.grad_fn is not None and "Convolution" in y.grad_fn.name()
    with torch.no_grad():
        alone, kernels = xsep.separable_conv2d(**call), xsep.separable_conv2d(**call | {"backend": "cpu"})
        assert torch.equal(alone, kernels)
    torch.testing.assert_close(alone, y.detach())


def test_a_training_step_is_the_kernels_where_only_a_forward_is_left_to_pytorch(module: Any) -> None:
    call = make(shape=(1, 12, 384, 386), dtype=torch.bfloat16, stride=2)
    y = xsep.separable_conv2d(**call)
    assert y.grad_fn is not None and "CppNode" in y.grad_fn.name()
    named = call | {"backend": "cpu"}
    dy = torch.randn_like(y)
    assert same(results(y, call, dy), results(by_python(named), named, dy))
    with torch.no_grad():
        left, kernels = xsep.separable_conv2d(**call), xsep.separable_conv2d(**named)
        theirs = "aten" if torch.ops.xsep.cpu_has_bfloat16_dot() else "cpu"  # by which PyTorch is the faster
        assert same([left], [by_python(call | {"backend": theirs})])
        torch.testing.assert_close(left, kernels)


@pytest.mark.parametrize("activations", [("relu", None, None), (None, None, "silu"), ("silu", "relu", "elu")], ids=str)
def test_a_training_step_with_more_around_it_is_pytorchs_too(activations: Any, module: Any) -> None:
    case = Case(
        n=1, c_in=3, h=192, w=194, stride=(2, 2), c_out=12, bias=True, vectors=VECTORS, activations=activations,
        layout="contiguous",
    )  # fmt: skip
    testing.check(case)
    call = few_channels(prologue=affine(3, "relu"))
    y = xsep.separable_conv2d(**call)
    assert y.grad_fn is not None and "Convolution" in y.grad_fn.name()


def test_who_asks_for_pytorchs_convolutions_has_z_made_again(module: Any) -> None:
    call = few_channels(backend="aten")
    kept: list[tuple[int, ...]] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = xsep.separable_conv2d(**call)
    assert y.grad_fn is not None and "Convolution" not in y.grad_fn.name()
    assert not any(shape == (1, 3, 96, 97) for shape in kept)
    assert kept.count((1, 3, 192, 194)) == 1  # x, and no z


def test_convolutions_with_more_around_them_or_gradients_are_pythons(module: Any) -> None:
    calls = [
        make(backend="aten", gradients=False, **options)
        for options in (
            {"padding": (0, 1, 0, 0)}, {"prologue": affine(8, "relu")}, {"middle": ChannelAffine(activation="relu")},
            {"epilogue": affine(12, None)}, {"residual": torch.randn(2, 12, 7, 9)},
        )
    ]  # fmt: skip
    for call in [*calls, make(backend="aten")]:
        y = xsep.separable_conv2d(**call)
        assert repeated.again(*call.values()) is None and same([y], [by_python(call)])
    assert y.grad_fn is not None and "CppNode" not in y.grad_fn.name()


def test_only_what_requires_a_gradient_gets_one(module: Any) -> None:
    call = make(bias=torch.randn(12))
    for name in ("x", "w_dw", "w_pw", "bias"):
        for t in tensors_of(call):
            t.requires_grad_(False)
        call[name].requires_grad_(True)
        y = xsep.separable_conv2d(**call)
        dy = torch.randn_like(y)
        assert same(results(y, call, dy), results(by_python(call), call, dy))
    with torch.no_grad():
        assert not xsep.separable_conv2d(**call).requires_grad
    assert module.count() == 1


def test_a_gradient_for_one_of_several(module: Any) -> None:
    call = make(bias=torch.randn(12), prologue=affine(8, "relu"))
    dy = torch.randn(2, 12, 7, 9)
    expected = results(by_python(call), call, dy)[1:]
    for i, t in enumerate(tensors_of(call)):
        assert same(list(torch.autograd.grad(xsep.separable_conv2d(**call), t, dy)), [expected[i]])


def test_double_backward(module: Any) -> None:
    call = make(bias=torch.randn(12), prologue=affine(8, "silu"))

    def second(y: Tensor) -> list[Tensor]:
        first = torch.autograd.grad(y.square().sum(), tensors_of(call), create_graph=True)
        return list(torch.autograd.grad([g.square().sum() for g in first], tensors_of(call)))

    found, expected = second(xsep.separable_conv2d(**call)), second(by_python(call))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_batch_of_gradients_from_above(module: Any) -> None:
    call = make()
    y = xsep.separable_conv2d(**call)
    assert_gradients_come_in_batches(y, tensors_of(call))


def test_a_mode_sees_the_op_and_its_backward(module: Any) -> None:
    call = make()
    xsep.separable_conv2d(**call)
    with Noting() as mode:
        y = xsep.separable_conv2d(**call)
    assert "xsep.separable_conv2d.default" in mode.seen
    y = xsep.separable_conv2d(**call)
    with Noting() as mode:
        torch.autograd.grad(y.sum(), call["x"])
    assert "xsep.separable_conv2d_backward.default" in mode.seen


class Sub(Tensor):
    pass


class OtherAffine(ChannelAffine):
    pass


class Function(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def dual(call: dict[str, Any]) -> Iterator[None]:
    with forward_ad.dual_level():
        call["w_pw"] = forward_ad.make_dual(call["w_pw"], torch.ones_like(call["w_pw"]))
        yield


def changed(**to: Callable[[Any], Any]) -> Callable[[dict[str, Any]], Any]:
    """A context in which some arguments are other ones."""

    def enter(call: dict[str, Any]) -> Any:
        call.update({name: how(call[name]) for name, how in to.items()})
        return contextlib.nullcontext()

    return enter


ODD: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a subclass": changed(x=lambda t: t.detach().as_subclass(Sub)),
    "a weight's subclass": changed(w_dw=lambda t: t.detach().as_subclass(Sub)),
    "another device": changed(x=lambda t: t.to("meta")),
    "sparse": changed(x=lambda t: t.detach().to_sparse()),
    "a lazy negative": changed(x=lambda t: torch._neg_view(t.detach())),
    "no tensor": changed(x=lambda t: None),
    "three dimensions": changed(x=lambda t: t[0]),
    "an empty batch": changed(x=lambda t: t[:0]),
    "True": changed(stride=lambda s: True),
    "a number that is no int": changed(padding=lambda s: 1.0),
    "a set": changed(padding=lambda s: {1, 2}),
    "a pair with True": changed(dilation=lambda s: (1, True)),
    "a tuple as affine": changed(prologue=lambda s: (None, None, "relu")),
    "an affine's subclass": changed(prologue=lambda s: OtherAffine(activation="relu")),
    "a whole alpha": changed(prologue=lambda s: ChannelAffine(activation="elu", alpha=1)),
    "a tangent": dual,
    "autocast": lambda call: torch.autocast("cpu", torch.bfloat16),
    "a function mode": lambda call: Function(),
    "a default device": lambda call: torch.device("cpu"),
    "a dispatch mode": lambda call: Noting(),
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_odd_is_left_to_python(name: str, module: Any) -> None:
    call = make()
    xsep.separable_conv2d(**call)
    assert repeated.again(*call.values()) is not None
    with ODD[name](call):
        assert repeated.again(*call.values()) is None
        module.remember(tuple(call.values()), [1] * 8, [0] * 3, [0.0] * 3, True, module.Maker.CPU, module.Maker.CPU)
    assert module.count() == 1


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
def test_autocast_has_its_say_before(gradients: bool, module: Any) -> None:
    """What is then made again is an ordinary call of the smaller type."""
    call = make(gradients=gradients, bias=torch.randn(12), prologue=ChannelAffine(torch.rand(8), activation="relu"))
    small = {**call, **{name: call[name].bfloat16() for name in ("x", "w_dw", "w_pw", "bias")}}
    dy, expected = torch.randn(2, 12, 7, 9).bfloat16(), by_python(small)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            y = xsep.separable_conv2d(**call)
            assert torch.is_autocast_enabled("cpu")
        assert module.count() == 1 and repeated.again(*small.values()) is not NotImplemented
        assert y.dtype == torch.bfloat16 and torch.equal(y, expected)
        if gradients:
            assert y.grad_fn is not None and "Convolution" in y.grad_fn.name()
            assert same(results(y, call, dy), results(by_python(small), call, dy))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace:DeprecationWarning")
def test_transforms_and_tracing_are_left_to_python(module: Any) -> None:
    call = make(gradients=False)
    expected = xsep.separable_conv2d(**call)

    def f(x: Tensor) -> Tensor:
        odd = {**call, "x": x}
        assert repeated.again(*odd.values()) is None
        return xsep.separable_conv2d(**odd)

    torch.testing.assert_close(torch.func.vmap(f)(call["x"][None])[0], expected)
    torch.testing.assert_close(torch.func.vjp(f, call["x"])[0], expected)
    torch.testing.assert_close(torch.jit.trace(f, call["x"], check_trace=False)(call["x"]), expected)


@pytest.mark.parametrize("option", ["stride", "dilation", "padding"])
def test_wrong_options_are_refused_after_right_ones_that_are_equal(option: str, module: Any) -> None:
    call = make() | {option: 1}
    xsep.separable_conv2d(**call)
    for wrong in (True, 1.0, "1", (1, 1, 1), -1):
        with pytest.raises(ValueError, match=option):
            xsep.separable_conv2d(**{**call, option: wrong})


def test_wrong_tensors_are_refused_after_right_ones(module: Any) -> None:
    call = make()
    xsep.separable_conv2d(**call)
    for name, wrong in (("w_pw", torch.randn(12, 9, 1, 1)), ("w_dw", torch.randn(8, 1, 3)), ("bias", torch.randn(3))):
        with pytest.raises(ValueError, match=name):
            xsep.separable_conv2d(**{**call, name: wrong})
    with pytest.raises(TypeError, match="w_dw"):
        xsep.separable_conv2d(**{**call, "w_dw": call["w_dw"].double()})
    with pytest.raises(TypeError, match="middle must be a ChannelAffine"):
        xsep.separable_conv2d(**{**call, "middle": (None, None, "relu", None)})
    assert module.count() == 1


def test_what_no_kernel_here_takes_is_remembered_as_that(module: Any) -> None:
    call = make(torch.float64)
    for _ in range(2):
        y = xsep.separable_conv2d(**call)
        assert y.grad_fn is not None and "CppNode" not in y.grad_fn.name()
        assert repeated.again(*call.values()) is None and module.count() == 1


def test_gradients_that_one_kernel_does_not_make_are_pythons(module: Any) -> None:
    for call in (
        make(middle=ChannelAffine(activation="relu")),
        make(epilogue=ChannelAffine(activation="relu")),
        make(residual=torch.randn(2, 12, 7, 9)),
        make(multiplier=2),
    ):
        y = xsep.separable_conv2d(**call)
        assert y.grad_fn is not None and "CppNode" not in y.grad_fn.name()
        with torch.no_grad():
            assert same([repeated.again(*call.values())], [y])


def test_the_backend_asked_for_runs(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    call = make()
    xsep.separable_conv2d(**call)
    assert repeated.again(*{**call, "backend": "aten"}.values()) is NotImplemented
    monkeypatch.setenv("XSEP_BACKEND", "aten")
    assert repeated.again(*call.values()) is NotImplemented
    y = xsep.separable_conv2d(**call)
    assert y.grad_fn is not None and "CppNode" not in y.grad_fn.name()
    monkeypatch.setenv("XSEP_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="XSEP_BACKEND must be"):
        xsep.separable_conv2d(**call)


def test_threads_are_part_of_a_call(module: Any) -> None:
    call = make()
    xsep.separable_conv2d(**call)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert repeated.again(*call.values()) is NotImplemented
    finally:
        torch.set_num_threads(threads)


def test_new_findings_have_all_decided_anew(module: Any) -> None:
    xsep.separable_conv2d(**make())
    assert module.count() == 1
    dispatch.forget_choices()
    assert module.count() == 0


def test_known_calls_are_recorded_too(module: Any) -> None:
    call = make()
    for _ in range(2):
        xsep.separable_conv2d(**call)
    with dispatch.recording() as problems:
        for _ in range(2):
            xsep.separable_conv2d(**call)
    assert len(problems) == 1


def test_what_is_remembered_is_bounded(module: Any) -> None:
    call = make(gradients=False)
    checked = ([1] * 8, [0] * 3, [0.0] * 3, True, module.Maker.CPU, module.Maker.PYTHON)
    for i in range(4100):
        module.remember(tuple({**call, "padding": i}.values()), *checked)
        assert 1 <= module.count() <= 4096
    assert module.count() < 4096


def test_nothing_is_held_on_to(module: Any) -> None:
    call = make(bias=torch.randn(12), prologue=affine(8, "relu"))
    held = [*call.values(), *tensors_of(call)]
    xsep.separable_conv2d(**call).sum().backward()
    before = [sys.getrefcount(v) for v in held if isinstance(v, Tensor)]
    for _ in range(20):
        xsep.separable_conv2d(**call).sum().backward()
    assert [sys.getrefcount(v) for v in held if isinstance(v, Tensor)] == before


def test_a_layer_keeps_its_packed_weights(module: Any) -> None:
    layer = xsep.FusedSeparableConv2d(256, 256, 3, padding=1).eval()
    x = torch.randn(1, 256, 5, 5)
    with torch.no_grad():
        expected = layer(x)
        assert packed_weights.held(layer.conv_pw.weight) > 0 and module.count() == 1
        assert torch.equal(layer(x), expected)
        layer.conv_pw.weight.data.copy_(torch.randn(256, 256, 1, 1))
        assert not torch.equal(layer(x), expected)
    xsep.forget_packed_weights()


def test_without_the_module_python_makes_every_call(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    call = make()
    expected = xsep.separable_conv2d(**call)
    monkeypatch.setattr(extension, "repeated", lambda: None)
    monkeypatch.setattr(repeated, "again", repeated._first_of_all)
    for _ in range(2):
        y = xsep.separable_conv2d(**call)
        assert y.grad_fn is not None and "CppNode" not in y.grad_fn.name() and torch.equal(y, expected)
    assert repeated.again is repeated._never


def test_a_parametrized_weight(module: Any) -> None:
    class Double(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return 2 * w

    layer = xsep.FusedSeparableConv2d(8, 8, 3, padding=1, bias=False)
    x, original = torch.randn(2, 8, 5, 5), layer.conv_pw.weight
    expected = 2 * layer(x)
    torch.nn.utils.parametrize.register_parametrization(layer.conv_pw, "weight", Double())
    y = layer(x)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert original.grad is not None
