"""Gradients beyond their values: second order, what is saved, what repeats, what is not asked for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import xsep
from xsep import ChannelAffine, dispatch, separable_conv2d, testing
from xsep.backends.aten import ATEN
from xsep.backends.cpu import CpuBackend
from xsep.backends.pointwise import images_of, rows_of
from xsep.testing import NAMES, VECTORS, Case

SMALL = Case(
    n=1, c_in=2, h=4, w=3, multiplier=2, c_out=3, bias=True, residual=True, vectors=VECTORS, dtype=torch.float64
)


def function_of(case: Case, backend: str = "aten") -> tuple[Any, tuple[Tensor, ...]]:
    """The op as a function of its tensors alone, and the tensors."""
    inputs = testing.make_inputs(case)
    names = list(inputs.tensors)

    def f(*tensors: Tensor) -> Tensor:
        positional, keywords = testing.Inputs(dict(zip(names, tensors)), inputs.dy, inputs.options).arguments()
        op = xsep.separable_conv2d if case.op == "separable" else xsep.depthwise_conv2d
        return op(*positional, **keywords, backend=backend)

    return f, tuple(inputs.tensors.values())


@pytest.mark.parametrize("op", ["separable", "depthwise"])
@pytest.mark.parametrize("name", NAMES, ids=str)
def test_gradcheck_and_gradgradcheck(name: str, op: str) -> None:
    from dataclasses import replace

    f, tensors = function_of(replace(SMALL, op=op, activations=(name, name, name)))
    assert torch.autograd.gradcheck(f, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, tensors, fast_mode=True)


def test_gradgradcheck_in_full_for_xceptions_layer() -> None:
    f, tensors = function_of(
        Case(n=1, c_in=2, h=3, w=3, c_out=2, activations=("relu", None, None), dtype=torch.float64)
    )
    assert torch.autograd.gradcheck(f, tensors)
    assert torch.autograd.gradgradcheck(f, tensors)


@pytest.mark.parametrize("name", NAMES, ids=str)
def test_double_backward_in_float32(name: str, backend: str) -> None:
    """A gradient penalty, as in WGAN-GP, through each backend's own backward."""
    case = Case(activations=(name, None, name), alpha=0.7 if name in ("elu", "leaky_relu") else None)
    f, tensors = function_of(case, backend)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    results = []
    for g, leaves in ((f, tensors), (function_of(case, "aten")[0], wide)):
        dx = torch.autograd.grad(g(*leaves).square().sum(), leaves[0], create_graph=True)[0]
        results.append(torch.autograd.grad(dx.square().sum(), leaves))
    for got, expected in zip(*results):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", NAMES, ids=str)
def test_z_is_never_saved(name: str, backend: str) -> None:
    case = Case(n=2, c_in=6, multiplier=3, h=8, w=8, c_out=4, activations=("relu", "relu", name), residual=True)
    f, tensors = function_of(case, backend)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        y = f(*tensors)
    assert saved, "nothing was saved, so this test saw nothing"
    z_shape = (2, 18, 8, 8)
    assert all(t.shape != z_shape for t in saved)
    known = {t.data_ptr() for t in tensors} | {y.data_ptr()}
    assert {t.data_ptr() for t in saved} <= known, "only the op's own inputs and its output may be kept"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_backward_repeats_bit_for_bit(dtype: torch.dtype, stride: int, backend: str) -> None:
    if backend == "aten":
        pytest.skip("PyTorch's own CPU convolutions promise nothing here")
    case = Case(
        n=3, c_in=37, h=21, w=19, c_out=70, stride=(stride, stride), vectors=VECTORS, dtype=dtype,
        activations=("relu", "silu", "relu"), wide_vectors=True,
    )  # fmt: skip
    inputs = testing.make_inputs(case)
    first = testing.run_xsep(case, inputs, backend)
    for _ in range(3):
        again = testing.run_xsep(case, inputs, backend)
        assert all(torch.equal(first[k], again[k]) for k in first)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("wanted", range(11), ids=["x", "w_dw", "w_pw", "bias", "residual", *VECTORS])
def test_one_gradient_alone(wanted: int, stride: int, backend: str) -> None:
    """What is not asked for is not computed, and its absence changes nothing."""
    case = Case(
        c_in=21,
        c_out=6,
        stride=(stride, stride),
        bias=True,
        residual=True,
        vectors=VECTORS,
        activations=("relu", "silu", "relu"),
    )
    f, tensors = function_of(case, backend)
    names = list(testing.make_inputs(case).tensors)
    name = ["x", "w_dw", "w_pw", "bias", "residual", *VECTORS][wanted]
    everything = torch.autograd.grad(f(*tensors).square().sum(), tensors)
    leaves = [t.detach().requires_grad_(n == name) for n, t in zip(names, tensors)]
    (alone,) = torch.autograd.grad(f(*leaves).square().sum(), [leaves[names.index(name)]])
    torch.testing.assert_close(alone, everything[names.index(name)])


@pytest.mark.parametrize("form", ["expanded", "repeated", "contiguous", "channels_last", "sliced"])
def test_gradients_arrive_in_any_layout(form: str, backend: str) -> None:
    f, tensors = function_of(Case(c_in=16, c_out=8), backend)
    y = f(*tensors)
    dy = torch.randn(y.shape)
    if form == "expanded":
        dy = torch.randn(()).expand(y.shape)
    elif form == "repeated":
        dy = torch.randn(y.shape[:2])[:, :, None, None].expand(y.shape)  # what a global average pool sends down
    elif form == "channels_last":
        dy = dy.contiguous(memory_format=torch.channels_last)
    elif form == "sliced":
        dy = torch.randn(*y.shape[:3], 2 * y.shape[3])[..., ::2]
    results = torch.autograd.grad(y, tensors, dy)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    truth = torch.autograd.grad(function_of(Case(c_in=16, c_out=8), "aten")[0](*wide), wide, dy.double())
    for got, expected in zip(results, truth):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_residual_may_be_the_input_itself(backend: str) -> None:
    x = torch.randn(2, 8, 6, 7, requires_grad=True)
    w_dw, w_pw = torch.randn(8, 1, 3, 3), torch.randn(8, 8, 1, 1)
    y = xsep.separable_conv2d(x, w_dw, w_pw, padding=1, residual=x, backend=backend)
    (dx,) = torch.autograd.grad(y.sum(), x)
    expected = torch.autograd.grad((torch.conv2d(torch.conv2d(x, w_dw, padding=1, groups=8), w_pw) + x).sum(), x)[0]
    torch.testing.assert_close(dx, expected, rtol=1e-4, atol=1e-4)


class Staged(CpuBackend):
    """y as a GPU's backends have it from a product of matrices: rows, seen as images."""

    def separable_forward(self, a: Any) -> Tensor:
        y = super().separable_forward(a)
        return images_of(rows_of(y).clone(), y)


@pytest.mark.parametrize("size", [(1, 1), (4, 5)], ids=["one_pixel", "map"])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["NHWC", "NCHW"])
@pytest.mark.parametrize("gradients", [True, False], ids=["gradients", "no_grad"])
def test_y_may_be_changed_in_place(
    size: tuple[int, int], layout: torch.memory_format, gradients: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However it came to its strides: y is nobody's view. As in ``x += block(y)`` and ``nn.ReLU(inplace=True)``."""
    staged = Staged()
    monkeypatch.setattr(dispatch, "backend", lambda name: staged if name == "cpu" else ATEN)
    dispatch.forget_choices()
    x = torch.randn(2, 6, *size).contiguous(memory_format=layout)
    w_dw, w_pw = torch.randn(6, 1, 3, 3, requires_grad=True), torch.randn(5, 6, 1, 1, requires_grad=True)

    def first(y: Callable[..., Tensor], **options: Any) -> Tensor:
        with torch.set_grad_enabled(gradients):
            return y(x, w_dw, w_pw, padding=1, **options)

    epilogue = ChannelAffine(activation="silu")  # C++ leaves the gradient of such calls to Python
    ys = [first(separable_conv2d, epilogue=epilogue, backend=name) for name in ("cpu", "aten")]
    scale = torch.ones(5, 1, 1, requires_grad=True)
    for y in ys:
        y.mul_(scale).relu_()
    wanted = [scale, *([w_dw, w_pw] if gradients else [])]
    found, expected = (torch.autograd.grad(y.sum(), wanted) for y in ys)
    for one, two in zip(found, expected):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    dispatch.forget_choices()


def test_in_place_change_of_a_saved_tensor_is_noticed(backend: str) -> None:
    f, tensors = function_of(Case(), backend)
    y = f(*tensors)
    with torch.no_grad():
        tensors[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_functorch_transforms(backend: str) -> None:
    x, w_dw, w_pw = torch.randn(3, 2, 4, 5, 6), torch.randn(4, 1, 3, 3), torch.randn(5, 4, 1, 1)

    def loss(x: Tensor, w_dw: Tensor, w_pw: Tensor) -> Tensor:
        return xsep.separable_conv2d(x, w_dw, w_pw, padding=1, backend=backend).square().sum()

    batched = torch.func.vmap(lambda v: xsep.separable_conv2d(v, w_dw, w_pw, padding=1, backend=backend))(x)
    single = torch.stack([xsep.separable_conv2d(v, w_dw, w_pw, padding=1, backend=backend) for v in x])
    torch.testing.assert_close(batched, single)

    leaves = [t.clone().requires_grad_() for t in (x[0], w_dw, w_pw)]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for got, want in zip(torch.func.grad(loss, argnums=(0, 1, 2))(x[0], w_dw, w_pw), expected):
        torch.testing.assert_close(got, want)

    per_sample = torch.func.vmap(torch.func.grad(loss, argnums=1), in_dims=(0, None, None))(x, w_dw, w_pw)
    for i in range(3):
        torch.testing.assert_close(per_sample[i], torch.func.grad(loss, argnums=1)(x[i], w_dw, w_pw))


def test_vmap_over_weights(backend: str) -> None:
    x, w_dw, w_pw = torch.randn(2, 4, 5, 6), torch.randn(3, 4, 1, 3, 3), torch.randn(5, 4, 1, 1)

    def f(w: Tensor) -> Tensor:
        return xsep.separable_conv2d(x, w, w_pw, backend=backend)

    torch.testing.assert_close(torch.func.vmap(f)(w_dw), torch.stack([f(w) for w in w_dw]))


def test_forward_mode_is_refused_in_words() -> None:
    import torch.autograd.forward_ad as fwd

    with fwd.dual_level():
        x = fwd.make_dual(torch.randn(1, 2, 4, 4), torch.randn(1, 2, 4, 4))
        with pytest.raises((NotImplementedError, RuntimeError), match=r"(?i)forward"):
            xsep.separable_conv2d(x, torch.randn(2, 1, 3, 3), torch.randn(2, 2, 1, 1))


@pytest.mark.parametrize("transform", ["hessian", "jacfwd", "jvp"])
def test_forward_mode_of_functorch_is_refused_in_words(transform: str) -> None:
    x, w_dw, w_pw = torch.randn(1, 2, 4, 4), torch.randn(2, 1, 3, 3), torch.randn(2, 2, 1, 1)

    def f(x: Tensor) -> Tensor:
        return xsep.separable_conv2d(x, w_dw, w_pw, padding=1).square().sum()

    with pytest.raises(NotImplementedError, match="separable_conv2d has no forward-mode derivative; use reverse mode"):
        torch.func.jvp(f, (x,), (x,)) if transform == "jvp" else getattr(torch.func, transform)(f)(x)
    found = torch.func.jacrev(torch.func.jacrev(f))(x)  # a hessian by reverse mode alone
    expected = torch.autograd.functional.hessian(f, x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_inference_mode_and_no_grad(backend: str) -> None:
    f, tensors = function_of(Case(), backend)
    expected = f(*tensors)
    assert expected.requires_grad
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            y = f(*tensors)
        assert not y.requires_grad
        torch.testing.assert_close(y, expected.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", [False, True], ids=["not_reentrant", "reentrant"])
def test_checkpoint_and_retain_graph(reentrant: bool, backend: str) -> None:
    from torch.utils.checkpoint import checkpoint

    f, tensors = function_of(Case(activations=("relu", None, "relu")), backend)
    expected = torch.autograd.grad(f(*tensors).sum(), tensors)
    checkpoint(f, *tensors, use_reentrant=reentrant).sum().backward()  # the reentrant one refuses autograd.grad
    for leaf, want in zip(tensors, expected):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, want, rtol=0, atol=0)
    y = f(*tensors).sum()
    once = torch.autograd.grad(y, tensors, retain_graph=True)
    for got, want in zip(torch.autograd.grad(y, tensors), once):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_affine_survives_deepcopy() -> None:
    affine = xsep.ChannelAffine(torch.ones(3), None, "relu")
    again = copy.deepcopy(affine)
    assert isinstance(again, xsep.ChannelAffine) and again.activation == "relu"
