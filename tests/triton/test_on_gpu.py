"""The triton backend on a real card, at real sizes: ``pytest -m gpu tests/triton``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import xsep
from tests import tf32
from tests.chain import test_backward_ops as backward
from tests.chain import test_forward_ops as forward
from tests.chain.support import hold
from tests.hardening import test_special_values as special_values
from xsep import testing
from xsep.backends.chain import Load, RawGradient, Shortcut
from xsep.backends.triton import TRITON
from xsep.ops.training import bn_finalize, sep_backward, sep_dgrad, sep_fprop
from xsep.problem import RELU, Affine, Geometry, Problem
from xsep.testing import NAMES, VECTORS, Case, float32_products

pytestmark = pytest.mark.gpu

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SAME = Geometry(1, 1, 1, 1, 1, 1, 1, 1)
CHAIN = ("relu", None, None)
#: Pictures, C_in, C_out, height and width: z on chip once and twice, z apart, several slices, wide and small maps.
CHAIN_LAYERS = [(8, 64, 128, 147), (8, 128, 256, 74), (6, 728, 728, 37), (80, 728, 728, 19), (16, 1536, 2048, 10)]
CASES = [
    Case(n=8, c_in=64, h=147, w=147, c_out=128, activations=CHAIN),
    Case(n=4, c_in=128, h=74, w=74, c_out=256, activations=CHAIN, vectors=("scale_p", "shift_p")),
    Case(n=4, c_in=256, h=37, w=37, c_out=728, residual=True, bias=True),
    Case(n=8, c_in=728, h=19, w=19, c_out=728, activations=CHAIN, vectors=VECTORS),
    Case(n=8, c_in=1536, h=10, w=10, c_out=2048),
    Case(n=8, c_in=96, h=57, w=57, c_out=24, stride=(2, 2), activations=(None, "silu", None)),
    Case(n=4, c_in=144, h=28, w=28, c_out=40, filter=(5, 5), padding=(2, 2, 2, 2), stride=(2, 2)),
    Case(n=4, c_in=240, h=14, w=14, c_out=80, filter=(5, 5), padding=(2, 2, 2, 2), activations=(None, "silu", None)),
    Case(n=4, c_in=96, h=56, w=56, c_out=96, filter=(7, 7), padding=(3, 3, 3, 3), activations=(None, None, "gelu")),
    Case(n=2, c_in=256, h=33, w=33, c_out=256, padding=(12, 12, 12, 12), dilation=(12, 12)),
    Case(n=2, c_in=13, h=23, w=19, c_out=17, layout="sliced"),
    Case(n=2, c_in=32, h=41, w=37, c_out=16, multiplier=2, layout="contiguous"),
    Case(n=2, c_in=40, h=31, w=31, c_out=56, filter=(9, 9), padding=(4, 4, 4, 4)),
    Case(op="depthwise", n=16, c_in=384, h=28, w=28, activations=(None, None, "silu"), bias=True),
]  # fmt: skip


@pytest.fixture(autouse=True)
def ieee() -> Iterator[None]:
    with float32_products("ieee"):
        yield


@pytest.fixture(autouse=True)
def supported() -> None:
    problem = Problem("separable", "cuda", torch.float32, True, 1, 8, 8, 8, 1, 3, 3, 8, SAME, (0, 0, 0))
    reasons = TRITON.not_supported_reasons(problem)
    if reasons:
        pytest.fail("; ".join(reasons))


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_forward_and_every_gradient(case: Case, kind: str) -> None:
    testing.check(replace(case, dtype=DTYPES[kind]), "triton", "cuda")


@pytest.mark.parametrize("case", CASES[:5], ids=lambda c: c.id)
def test_tf32_where_the_settings_allow_it(case: Case) -> None:
    """PyTorch's convolutions may leave it for some shapes: each of its ways is a measure."""
    tf32.check(case, "triton", "cuda")


@pytest.mark.parametrize("case", list(testing.generate(60, seed=31)), ids=lambda c: c.id)
def test_generated_problem(case: Case) -> None:
    testing.check(case, "triton", "cuda")


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("name", NAMES[1:])
def test_activations_pass_on_what_is_not_finite(name: str, kind: str) -> None:
    with torch.device("cuda"):
        special_values.test_activations_pass_them_on(name, DTYPES[kind], torch.channels_last, "triton")


def test_more_than_two_to_the_31_elements() -> None:
    """The last picture of a batch of 2.3e9 elements is what it is alone, forward and backward."""
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GB of GPU memory")
    n, c, size = 2200, 64, 128
    x = torch.empty((n, size, size, c), device="cuda", dtype=torch.bfloat16).normal_().permute(0, 3, 1, 2)
    assert x.numel() > 2**31
    w_dw = torch.randn(c, 1, 3, 3, device="cuda", dtype=torch.bfloat16)
    w_pw = torch.randn(c, c, 1, 1, device="cuda", dtype=torch.bfloat16)
    relu = Affine(None, None, RELU, 0.0)
    for pictures in (slice(0, 1), slice(n - 1, n)):
        alone = TRITON.depthwise(x[pictures], w_dw, relu, Affine(), SAME)
        assert torch.equal(TRITON.depthwise(x, w_dw, relu, Affine(), SAME)[pictures], alone)
        dx = TRITON.depthwise_backward_kernel(x, x, w_dw, relu, SAME, (True, False, False, False)).dx
        one = TRITON.depthwise_backward_kernel(
            x[pictures], x[pictures], w_dw, relu, SAME, (True, False, False, False)
        ).dx  # fmt: skip
        assert dx is not None and one is not None and torch.equal(dx[pictures], one)
        del dx
        r = sep_fprop(x, None, None, RELU, 0.0, w_dw, w_pw, SAME, backend="triton")[0]
        r_alone = sep_fprop(x[pictures], None, None, RELU, 0.0, w_dw, w_pw, SAME, backend="triton")[0]
        assert torch.equal(r[pictures], r_alone)


@pytest.mark.parametrize("c_out", [128, 728], ids=["fused", "staged"])
def test_cuda_graph_of_forward_and_backward(c_out: int) -> None:
    case = Case(n=8, c_in=128, h=37, w=37, c_out=c_out, activations=CHAIN, dtype=torch.bfloat16)
    inputs = testing.make_inputs(case, "cuda")
    x, w_dw, w_pw = (inputs.tensors[k] for k in ("x", "w_dw", "w_pw"))

    def step() -> list[torch.Tensor]:
        y = xsep.separable_conv2d(
            x, w_dw, w_pw, padding=1, prologue=xsep.ChannelAffine(activation="relu"), backend="triton"
        )
        return [y, *torch.autograd.grad(y, (x, w_dw, w_pw), inputs.dy)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = [t.clone() for t in step()]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = step()
        for t in captured:
            t.detach().fill_(float("nan"))
        graph.replay()
    torch.cuda.synchronize()
    for ours, theirs in zip(captured, expected):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("size", [(8, 128, 147), (8, 728, 19)], ids=str)
def test_statistics_at_real_sizes(size: tuple[int, int, int]) -> None:
    n, c, h = size
    x = (100 + 0.1 * torch.randn(n, h, h, c, device="cuda")).bfloat16().permute(0, 3, 1, 2)
    w_dw = torch.zeros(c, 1, 3, 3, device="cuda", dtype=torch.bfloat16)
    w_dw[:, :, 1, 1] = 1
    w_pw = torch.eye(c, device="cuda", dtype=torch.bfloat16)[:, :, None, None]
    r, partials, counts, _ = sep_fprop(x, None, None, 0, 0.0, w_dw, w_pw, SAME, backend="triton")
    assert torch.equal(r, x) and partials is not None and counts is not None
    ones, zeros = torch.ones(c, device="cuda"), torch.zeros(c, device="cuda")
    _, (_, mean), invstd, count = bn_finalize(partials, counts, ones, zeros, eps=1e-12, backend="triton")
    assert int(count) == n * h * h
    torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=1e-7, atol=0)
    exact = x.double().var((0, 2, 3), unbiased=False)
    torch.testing.assert_close(invstd.double().square().reciprocal(), exact, rtol=1e-5, atol=0)


def chain_layer(n: int, c: int, c_out: int, size: int, dtype: torch.dtype, pooled: bool = False) -> dict[str, Any]:
    """Arguments of a layer's backward at a size of Xception's, drawn on the card."""

    def drawn(*shape: int) -> torch.Tensor:
        t = torch.randn(shape[0], *shape[2:], shape[1], device="cuda").to(dtype)
        return t.permute(0, 3, 1, 2)

    half = (size + 1) // 2
    x, r = drawn(n, c, size, size), drawn(n, c_out, size, size)
    du = drawn(n, c_out, half, half) if pooled else drawn(n, c_out, size, size)
    # u of an open ReLU or a shut one, and nothing between: no rounding may decide.
    x = torch.where(x < 0, x - 0.5, x + 0.5)
    vec = torch.stack([0.5 + torch.rand(c, device="cuda"), torch.zeros(c, device="cuda")])
    taps = torch.randint(0, 9, (n, half, half, c_out), device="cuda", dtype=torch.uint8).permute(0, 3, 1, 2)
    coef = torch.randn(3, c_out, device="cuda") * torch.tensor([[1.0], [0.1], [0.1]], device="cuda")
    return dict(
        dr=RawGradient(du, r, coef, taps if pooled else None, (1, 1) if pooled else (0, 0)),
        w_pw=torch.randn(c_out, c, 1, 1, device="cuda").to(dtype) / c**0.5,
        w_dw=torch.randn(c, 1, 3, 3, device="cuda").to(dtype) / 3, x=x, load=Load(vec, RELU), geometry=SAME,
        shortcut=Shortcut(drawn(n, c, half, half), False), operands=[x], centres=torch.zeros(2, c, device="cuda"),
    )  # fmt: skip


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("layer", CHAIN_LAYERS, ids=str)
@pytest.mark.parametrize("pooled", [False, True], ids=["plain", "pooled"])
def test_chain_backward_at_real_sizes(layer: tuple[int, int, int, int], kind: str, pooled: bool) -> None:
    """Against the plain chain in float64 on the same inputs, held to twice its error at the type; and run twice."""
    dtype = DTYPES[kind]
    arguments = chain_layer(*layer, dtype, pooled)
    found, again, own = (sep_backward(**arguments, backend=b) for b in ("triton", "triton", "aten"))
    truth = sep_backward(**{k: in_float64(v) for k, v in arguments.items()}, backend="aten")
    assert truth.dx is not None
    terms = (truth.dx * arguments["x"].double()).abs().sum((0, 2, 3))
    for what, got, same, expected, theirs in zip(found._fields, found, again, truth, own):
        assert got is not None and same is not None and expected is not None and torch.equal(got, same), what
        size = float(terms.max()) if what == "sums" else 0.0
        hold(what, got, expected, theirs, dtype if what == "dx" else torch.float32, size)


def in_float64(v: Any) -> Any:
    if isinstance(v, torch.Tensor):
        return v.double() if v.is_floating_point() else v
    if isinstance(v, (Load, RawGradient, Shortcut)):
        return type(v)(*(in_float64(field) for field in v))
    return [in_float64(o) for o in v] if isinstance(v, list) else v


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("name", backward.CASES)
def test_chain_layer(name: str, kind: str) -> None:
    """What tests/chain holds every backend to, on this one."""
    with torch.device("cuda"):
        backward.test_layer("triton", kind, name)


@pytest.mark.parametrize("kind", DTYPES)
def test_chain_ends(kind: str) -> None:
    """Pools, averages, the skip convolution and the ways in and out."""
    with torch.device("cuda"):
        for code in (0, RELU):
            forward.test_pw_fprop_of_every_second_pixel("triton", kind, code)
            forward.test_apply("triton", kind, code)
            for joined in (False, True):
                backward.test_apply_backward("triton", kind, code, joined)
        for padding in ("torch", "same"):
            for size in forward.SIZES:
                forward.test_pool_and_add("triton", kind, padding, size)
            backward.test_ties_in_the_pool_go_where_pytorch_sends_them("triton", padding, (9, 10))
        forward.test_global_average("triton", kind)
        backward.test_global_average_backward("triton", kind)
        backward.test_pw_backward("triton", kind)
        for batch in (True, False):
            backward.test_batch_norm_backward("triton", kind, batch)


def test_chain_masks_of_forward_and_backward_are_one() -> None:
    """On a card the multiply and the add of a load are one instruction or two; it must be the same in every kernel."""
    with torch.device("cuda"):
        backward.test_the_masks_of_forward_and_backward_are_one("triton")


def test_chain_backward_of_more_than_two_to_the_31_elements() -> None:
    """The gradient of the last picture of 2.3e9 elements is what it is alone."""
    if torch.cuda.get_device_properties(0).total_memory < 60 * 2**30:
        pytest.skip("needs 60 GB of GPU memory")
    n, c, size = 2200, 64, 128
    x = torch.empty((n, size, size, c), device="cuda", dtype=torch.bfloat16).normal_().permute(0, 3, 1, 2)
    coef = torch.randn(3, c, device="cuda")
    w_dw, w_pw = (torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in ((c, 1, 3, 3), (c, c, 1, 1)))

    def dx_of(part: torch.Tensor) -> torch.Tensor:
        dr = RawGradient(part, part, coef)
        return sep_dgrad(dr, w_pw, w_dw, part, Load(None, RELU), SAME, backend="triton")[0]

    everything = dx_of(x)
    for pictures in (slice(0, 1), slice(n - 1, n)):
        assert torch.equal(everything[pictures], dx_of(x[pictures]))
