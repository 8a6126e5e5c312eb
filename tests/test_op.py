"""Both ops against the float64 reference over generated problems: forward and every gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import xsep
from tests.conftest import NIGHTLY
from xsep import testing
from xsep.ops.inside import inside_op
from xsep.testing import NAMES, VECTORS, Case

CASES = list(testing.generate(3000 if NIGHTLY else 400, seed=20161007))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_generated_problem(case: Case, backend: str) -> None:
    testing.check(case, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("place", [0, 1, 2], ids=["prologue", "middle", "epilogue"])
@pytest.mark.parametrize("name", NAMES, ids=str)
def test_each_activation_in_each_place(name: str, place: int, dtype: torch.dtype, backend: str) -> None:
    activations = tuple(name if i == place else None for i in range(3))
    testing.check(Case(activations=activations, vectors=VECTORS, bias=True, residual=True, dtype=dtype), backend)  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "sliced", "permuted"])
@pytest.mark.parametrize("c_in, c_out", [(1, 1), (3, 5), (64, 128), (65, 129), (130, 67)])
def test_channel_counts_and_layouts(c_in: int, c_out: int, layout: str, backend: str) -> None:
    testing.check(Case(c_in=c_in, c_out=c_out, layout=layout, activations=("relu", None, None)), backend)


@pytest.mark.parametrize(
    "case",
    [
        Case(n=1, c_in=64, h=37, w=41, c_out=128, activations=("relu", None, None)),
        Case(n=1, c_in=67, h=19, w=19, c_out=131, filter=(5, 5), padding=(2, 2, 2, 2)),
        Case(n=2, c_in=33, h=23, w=21, c_out=70, filter=(7, 7), padding=(3, 3, 3, 3), stride=(2, 2)),
        Case(n=1, c_in=32, h=40, w=30, c_out=16, padding=(12, 12, 12, 12), dilation=(12, 12)),
        Case(n=5, c_in=728, h=5, w=5, c_out=64, residual=True, vectors=("scale_e", "shift_e")),
        Case(op="depthwise", n=3, c_in=96, h=29, w=31, stride=(2, 2), padding=(0, 1, 0, 1)),
    ],
    ids=lambda c: c.id,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_larger_maps(case: Case, dtype: torch.dtype, backend: str) -> None:
    testing.check(replace(case, dtype=dtype), backend)


@pytest.mark.parametrize(
    "case",
    [
        # PyTorch's own bfloat16 convolution is wrong here, by as much as the result is large.
        Case(op="depthwise", n=1, c_in=2, h=5, w=1, multiplier=2, stride=(1, 3), dtype=torch.bfloat16),
        Case(c_in=16, h=5, w=2, multiplier=3, stride=(1, 2), filter=(5, 5), padding=(2, 1, 2, 2), dtype=torch.bfloat16),
        Case(
            op="depthwise", c_in=64, h=16, w=1, multiplier=2, filter=(5, 2), stride=(1, 2), padding_form=(0, 1),
            dtype=torch.bfloat16, layout="contiguous", weights_layout="sliced",
        ),
        Case(
            n=1, c_in=5, h=3, w=2, multiplier=3, c_out=2, stride=(1, 2), dtype=torch.bfloat16, layout="permuted",
            weights_layout="unaligned",
        ),
        # And in float32 too where there is one channel; the second's weights' gradient was memory that nobody wrote.
        Case(c_in=1, h=4, w=4, c_out=3, stride=(1, 2), padding=(0, 0, 0, 0), weights_layout="sliced"),
        Case(
            op="depthwise", c_in=1, h=5, w=1, filter=(1, 1), stride=(1, 2), padding=(0, 0, 0, 0), layout="contiguous",
            weights_layout="sliced", dtype=torch.bfloat16,
        ),
        # gelu's gradient nearly vanishes: written out in float16 it would be off by more than it is large.
        Case(
            n=1, c_in=8, h=2, w=2, c_out=8, filter=(7, 5), stride=(2, 2), padding=(3, 4, 2, 3), dilation=(1, 2),
            seed=878, bias=True, vectors=("scale_m", "shift_m", "scale_e"), activations=(None, "gelu", "gelu_tanh"),
            dtype=torch.float16,
        ),
    ],
    ids=lambda c: c.id,
)  # fmt: skip
def test_what_fuzzing_found(case: Case, backend: str) -> None:
    testing.check(case, backend)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_a_stride_far_past_the_picture_needs_no_memory(layout: torch.memory_format, backend: str) -> None:
    """Forward only: PyTorch's own gradient dies of such a stride."""
    x = torch.randn(1, 8, 9, 11).contiguous(memory_format=layout)
    w_dw, w_pw = torch.randn(8, 1, 3, 3), torch.randn(8, 8, 1, 1)
    for far, near in ((2**28, 11), ((2, 2**28), (2, 13))):
        y = xsep.separable_conv2d(x, w_dw, w_pw, stride=far, padding=1, backend=backend)
        truth = F.conv2d(F.conv2d(x.double(), w_dw.double(), None, near, 1, 1, 8), w_pw.double())
        torch.testing.assert_close(y.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("multiplier", [1, 2])
@pytest.mark.parametrize("middle", [None, "relu"], ids=str)
@pytest.mark.parametrize("last", [None, "relu", "gelu"], ids=str)
def test_sums_over_many_pixels(last: str, middle: str, multiplier: int, backend: str) -> None:
    """Sums that add up one pixel after another are several times PyTorch's error off, each in a few of these."""
    case = Case(
        n=3, c_in=4, h=24, w=24, c_out=64, multiplier=multiplier, activations=(None, middle, last),
        vectors=("scale_m", "scale_e"),
    )  # fmt: skip
    for seed in range(12):
        testing.check(replace(case, seed=seed), backend)


@pytest.mark.parametrize("c_in, c_out", [(3, 5), (8, 8), (40, 70)])
def test_sums_of_one_sign_over_many_pixels(c_in: int, c_out: int, backend: str) -> None:
    """Every term of a weight's gradient is positive, so that each partial sum rounds in its own last digit."""
    x = torch.rand(2, c_in, 149, 147).contiguous(memory_format=torch.channels_last)
    w_dw, w_pw, dy = torch.rand(c_in, 1, 3, 3), torch.rand(c_out, c_in, 1, 1), torch.rand(2, c_out, 149, 147)

    def gradients(op: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, w_dw, w_pw)]
        return torch.autograd.grad(op(*leaves), leaves, dy.to(dtype))

    def own(x: Tensor, w_dw: Tensor, w_pw: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, w_dw, None, 1, 1, 1, c_in), w_pw)

    def ours(x: Tensor, w_dw: Tensor, w_pw: Tensor) -> Tensor:
        return xsep.separable_conv2d(x, w_dw, w_pw, padding=1, backend=backend)

    truth = gradients(own, torch.float64)
    for name, t, theirs, got in zip(
        ("dx", "dw_dw", "dw_pw"), truth, gradients(own, torch.float32), gradients(ours, torch.float32)
    ):
        error, allowed = float((got - t).abs().max()), 2 * float((theirs - t).abs().max())
        ulp = torch.finfo(torch.float32).eps * float(t.abs().max())
        assert error <= allowed + ulp, f"{name}: off by {error / ulp:.2f} ulp, {allowed / ulp:.2f} + 1 allowed"


def test_out_of_memory_is_pytorchs_error_inside_an_op() -> None:
    with pytest.raises(torch.OutOfMemoryError, match=r"CUDA out of memory\. Tried"), inside_op():
        raise RuntimeError("CUDA out of memory. Tried to allocate")
    with pytest.raises(ValueError, match="out of memory"), inside_op():
        raise ValueError("not out of memory")


def test_float64_runs_on_the_plain_backend() -> None:
    testing.check(Case(dtype=torch.float64, activations=("gelu", "silu", "elu"), vectors=VECTORS, bias=True))


def test_padding_is_zero_after_the_prologue(backend: str) -> None:
    """With x = 0, shift 1 and one tap per pixel, a border that padded before the prologue would read 1, not 0."""
    import xsep

    x, w_dw, w_pw = torch.zeros(1, 2, 3, 3), torch.ones(2, 1, 3, 3), torch.eye(2)[:, :, None, None]
    y = xsep.separable_conv2d(
        x, w_dw, w_pw, padding=1, prologue=xsep.ChannelAffine(shift=torch.ones(2)), backend=backend
    )
    assert y[0, 0].tolist() == [[4.0, 6.0, 4.0], [6.0, 9.0, 6.0], [4.0, 6.0, 4.0]]


@pytest.mark.parametrize("op", ["separable", "depthwise"])
def test_empty_batch(op: str, backend: str) -> None:
    inputs = testing.make_inputs(Case(op=op, n=0, bias=True, vectors=VECTORS, activations=("relu", "relu", "relu")))
    results = testing.run_xsep(Case(op=op, n=0), inputs, backend)
    assert results["y"].shape == inputs.dy.shape
    for name, gradient in results.items():
        assert gradient.shape == inputs.dy.shape if name == "y" else gradient.shape == inputs.tensors[name[1:]].shape
        assert not gradient.any(), name


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_pixel_spreads_as_in_pytorch(value: float, backend: str) -> None:
    from xsep import reference

    inputs = testing.make_inputs(Case(c_in=16, c_out=8, h=8, w=8))
    with torch.no_grad():
        inputs.tensors["x"][0, 3, 2, 5] = value
        positional, keywords = inputs.arguments()
        import xsep

        y = xsep.separable_conv2d(*positional, **keywords, backend=backend)
        expected = reference.separable_conv2d(*[t.double() for t in positional], padding=keywords["padding"])
    assert torch.equal(y.isfinite(), expected.isfinite())
    assert not expected.isfinite().all() and expected.isfinite().any()


@pytest.mark.parametrize("x_last", [True, False], ids=["x_nhwc", "x_nchw"])
@pytest.mark.parametrize("w_last", [True, False], ids=["w_nhwc", "w_nchw"])
@pytest.mark.parametrize("shape", [(2, 8, 6, 7), (1, 8, 1, 1), (2, 1, 6, 7)], ids=str)
def test_strides_are_those_of_two_convolutions(
    shape: tuple[int, ...], x_last: bool, w_last: bool, backend: str
) -> None:
    import xsep

    def form(t: torch.Tensor, last: bool) -> torch.Tensor:
        return t.contiguous(memory_format=torch.channels_last) if last else t

    x = form(torch.randn(shape), x_last)
    w_dw = form(torch.randn(shape[1], 1, 3, 3), w_last)
    w_pw = form(torch.randn(8, shape[1], 1, 1), w_last)
    expected = torch.conv2d(torch.conv2d(x, w_dw, padding=1, groups=shape[1]), w_pw)
    y = xsep.separable_conv2d(x, w_dw, w_pw, padding=1, backend=backend)
    significant = [d for d in range(4) if y.shape[d] > 1]
    assert [y.stride(d) for d in significant] == [expected.stride(d) for d in significant]
