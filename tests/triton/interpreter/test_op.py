"""Both ops on the triton backend, in Triton's interpreter, against float64: forward and every gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import xsep
from tests.conftest import NIGHTLY
from tests.hardening import test_special_values as special_values
from xsep import reference, testing
from xsep.backends import triton_plans as plans
from xsep.backends.triton import TRITON
from xsep.problem import DepthwiseArgs, Geometry, SeparableArgs, depthwise_problem, separable_problem
from xsep.testing import NAMES, VECTORS, Case

ALL = ("relu", "silu", "gelu")
FAST = [
    Case(op=op, filter=size, stride=stride, dilation=dilation, padding=padding, dtype=dtype, layout=layout,
         activations=("relu", None, "relu"), vectors=("scale_p", "shift_p"))
    for op in ("depthwise", "separable")
    for size, stride, dilation, padding, dtype, layout in [
        ((3, 3), (1, 1), (1, 1), (1, 1, 1, 1), torch.float32, "sliced"),
        ((3, 3), (2, 2), (1, 1), (0, 1, 0, 1), torch.bfloat16, "sliced"),
        ((3, 3), (2, 1), (1, 1), (2, 0, 1, 3), torch.float32, "contiguous"),
        ((3, 3), (1, 1), (2, 2), (2, 2, 2, 2), torch.float16, "channels_last"),
        ((3, 3), (2, 2), (2, 2), (2, 2, 2, 2), torch.float32, "channels_last"),
        ((5, 5), (1, 1), (1, 1), (2, 2, 2, 2), torch.bfloat16, "channels_last"),
        ((5, 5), (2, 2), (1, 1), (2, 2, 2, 2), torch.float32, "sliced"),
        ((7, 7), (1, 1), (1, 1), (3, 3, 3, 3), torch.float32, "channels_last"),
        ((2, 4), (1, 2), (1, 3), (1, 4, 2, 0), torch.float32, "permuted"),
    ]
]  # fmt: skip
GENERAL = [
    Case(n=1, h=6, w=5, filter=(9, 3), padding=(1, 1, 4, 4), activations=("relu", None, None), layout="sliced"),
    Case(n=1, c_in=24, h=6, w=5, filter=(9, 3), padding=(1, 1, 4, 4), dtype=torch.bfloat16, vectors=("scale_p",)),
    Case(filter=(3, 3), stride=(3, 3), vectors=("scale_p", "shift_p"), activations=("silu", "relu", None)),
    Case(op="depthwise", h=4, filter=(1, 11), padding=(5, 5, 0, 0), dtype=torch.bfloat16),
    Case(op="depthwise", multiplier=3, vectors=VECTORS, activations=("relu", None, "gelu"), layout="sliced"),
    Case(multiplier=2, stride=(2, 2), vectors=VECTORS, activations=("relu", "relu", "relu"), bias=True),
]
SHAPES = [
    Case(n=1, c_in=1, h=1, w=1, c_out=1),
    Case(n=2, c_in=64, h=7, w=5, c_out=24, dtype=torch.bfloat16, activations=("relu", None, None)),
    Case(n=5, c_in=65, h=5, w=5, c_out=67, residual=True, vectors=("scale_e", "shift_e"), bias=True),
    Case(n=3, c_in=8, h=19, w=3, c_out=130, dtype=torch.float16, residual=True, layout="contiguous"),
    Case(n=1, c_in=40, h=3, w=67, c_out=300, activations=("relu", "relu6", "relu")),
    Case(n=1, c_in=8, h=5, w=6, c_out=8, dtype=torch.bfloat16, vectors=("scale_p", "shift_m", "scale_e")),
]


@pytest.mark.parametrize("case", FAST + GENERAL + SHAPES, ids=lambda c: c.id)
def test_each_kernel(case: Case) -> None:
    testing.check(case, "triton")


@pytest.mark.parametrize("case", list(testing.generate(400 if NIGHTLY else 24, seed=20170409)), ids=lambda c: c.id)
def test_generated_problem(case: Case) -> None:
    testing.check(case, "triton")


@pytest.mark.parametrize("wanted", ["x", "w_dw", "w_pw", "scale_p", "shift_m"])
@pytest.mark.parametrize(
    "case",
    [
        Case(n=1, h=5, w=6, vectors=("scale_p", "shift_p", "shift_m"), activations=("relu", None, None)),
        Case(n=1, h=5, w=6, filter=(9, 1), padding=(0, 0, 4, 4), multiplier=2, vectors=("scale_p", "shift_m")),
    ],
    ids=["tiled", "general"],
)
def test_one_gradient_alone(case: Case, wanted: str) -> None:
    """What is not asked for has no memory to be written into."""
    testing.check(replace(case, wanted=(wanted,)), "triton")


@pytest.mark.parametrize("name", NAMES, ids=str)
def test_each_activation_everywhere(name: str) -> None:
    case = Case(n=1, h=5, w=5, activations=(name, name, name), vectors=VECTORS, bias=True, residual=True, alpha=0.3)
    testing.check(case, "triton")


@pytest.mark.parametrize("name", NAMES[1:])
def test_activations_pass_on_what_is_not_finite(name: str) -> None:
    special_values.test_activations_pass_them_on(name, torch.bfloat16, torch.channels_last, "triton")


@pytest.mark.parametrize("staged", [False, True], ids=["fused", "staged"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_both_plans(staged: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from xsep.backends import triton as backend

    plan = backend.separable_plan

    def chosen(*args: object) -> object:
        return replace(plan(*args), fused=not staged, slice_n=2)

    monkeypatch.setattr(backend, "separable_plan", chosen)
    rich = Case(
        n=3, c_in=19, h=5, w=6, c_out=13, residual=True, bias=True, vectors=VECTORS, activations=ALL, dtype=dtype
    )
    testing.check(rich, "triton")
    testing.check(Case(n=3, c_in=35, h=4, w=4, c_out=37, dtype=dtype), "triton")


def pairs(some: list[Any], others: list[Any]) -> list[Any]:
    """Each of one kind with every second of the other, which leaves none out; all with all each night."""
    return [(a, b) for i, a in enumerate(some) for j, b in enumerate(others) if NIGHTLY or (i + j) % 2 == 0]


def shape_of(tile: plans.SeparableTile) -> str:
    return f"{tile.rows}x{tile.cols}x{tile.side}"


FUSED_CASES = [
    Case(n=2, c_in=24, h=9, w=11, c_out=70, dtype=torch.bfloat16, activations=("relu", None, "relu"),
         vectors=("scale_p", "shift_p", "scale_e", "shift_e"), bias=True, residual=True),
    Case(n=3, c_in=13, h=8, w=7, c_out=9, stride=(2, 2), padding=(0, 1, 0, 1), activations=("relu", None, None)),
    Case(n=2, c_in=9, h=8, w=13, c_out=9, dilation=(2, 3), padding=(3, 3, 2, 2), vectors=("scale_p", "shift_p")),
    Case(n=1, c_in=5, h=9, w=9, c_out=9, filter=(2, 4), stride=(1, 2), dilation=(1, 3), padding=(1, 4, 2, 0)),
    Case(n=1, c_in=5, h=9, w=9, c_out=9, filter=(1, 1), stride=(2, 2), padding=(0, 0, 0, 0), multiplier=2),
]  # fmt: skip
FUSED_TILES = [
    *plans.FUSED_SIDE.values(), plans.FUSED_TILES[64], plans.FUSED_SMALL,
    plans.SeparableTile(1, 8, 32, 16, 4, 1, side=4),
]  # fmt: skip


@pytest.mark.parametrize(
    "case, tile", pairs(FUSED_CASES, FUSED_TILES), ids=lambda v: v.id if isinstance(v, Case) else shape_of(v)
)
def test_each_fused_tile(case: Case, tile: plans.SeparableTile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large problems' tiles on small ones, and lanes of several columns where no plan has them."""
    from xsep.backends import triton as backend

    plan = plans.SeparablePlan(True, 1, tile)
    monkeypatch.setattr(backend, "separable_plan", lambda *args: plan)
    testing.check(case, "triton")


STRIP_CASES = [
    Case(op="depthwise", n=2, c_in=13, h=9, w=11, activations=("relu", None, "relu"), vectors=("scale_p", "shift_p")),
    Case(op="depthwise", n=2, c_in=9, h=10, w=9, stride=(2, 2), padding=(1, 1, 0, 1), activations=("silu", None, None)),
    Case(op="depthwise", n=1, c_in=9, h=11, w=9, dilation=(2, 3), padding=(3, 3, 2, 2), dtype=torch.bfloat16),
    Case(op="depthwise", n=1, c_in=5, h=8, w=9, filter=(5, 5), padding=(2, 2, 2, 2)),
]
#: Rows, columns a lane, rows that are unrolled.
STRIPS = [(1, 3, 2), (2, 2, 2), (3, 1, 1), (5, 4, 1), (99, 2, 2)]


@pytest.mark.parametrize(
    "case, strip", pairs(STRIP_CASES, STRIPS), ids=lambda v: v.id if isinstance(v, Case) else "-".join(map(str, v))
)
def test_each_strip(case: Case, strip: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips of one row, of several with a rest, and longer than the picture; any number of columns a lane."""
    from xsep.backends import triton as backend

    rows, side, unroll = strip
    tile = plans.DepthwiseTile(rows, 4, 16, 4, side, unroll)
    for choice in ("fprop_tile", "backward_tile"):
        monkeypatch.setattr(backend, choice, lambda *args: tile)
    testing.check(case, "triton")


def args_of(case: Case) -> tuple[testing.Inputs, SeparableArgs]:
    inputs = testing.make_inputs(case)
    t = inputs.tensors
    left, right, top, bottom = case.padding
    geometry = list(Geometry(*case.stride, left, right, top, bottom, *case.dilation))
    vectors: Any = {v: t.get(v) for v in VECTORS}
    return inputs, SeparableArgs(
        t["x"], t["w_dw"], t["w_pw"], t.get("bias"), t.get("residual"),
        geometry=geometry, activations=[0, 0, 0], alphas=[0.0] * 3, **vectors,
    )  # fmt: skip


def margined(t: torch.Tensor) -> torch.Tensor:
    """t as a view into a buffer of NaN, so that a read past its end shows."""
    buffer = torch.full((t.numel() + 128,), float("nan")).to(t)
    view = buffer[64 : 64 + t.numel()].view(t.shape)
    return view.copy_(t).detach()


def test_nothing_is_read_past_the_weights_and_vectors() -> None:
    case = Case(c_in=11, c_out=13, vectors=VECTORS, bias=True)
    inputs, args = args_of(case)
    named: Any = {name: margined(t) for name, t in inputs.tensors.items() if name not in ("x", "residual")}
    with torch.no_grad():
        y = TRITON.separable_forward(args._replace(**named))
        grads = TRITON.depthwise_backward_kernel(
            torch.randn(case.n, case.c_in, *case.output_size), args.x, named["w_dw"],
            args._replace(**named).prologue, Geometry(*args.geometry), (True,) * 4,
        )  # fmt: skip
    for t in (y, *grads):
        assert t is not None and bool(t.isfinite().all())


def test_backward_is_the_same_bit_for_bit() -> None:
    case = Case(n=2, c_in=24, h=13, w=9, activations=("relu", None, "silu"), vectors=VECTORS, bias=True)
    inputs = testing.make_inputs(case)
    first, second = (testing.run_xsep(case, inputs, "triton") for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("op", ["separable", "depthwise"])
def test_empty_batch(op: str) -> None:
    inputs = testing.make_inputs(Case(op=op, n=0, bias=True, vectors=VECTORS, activations=("relu", "relu", "relu")))
    results = testing.run_xsep(Case(op=op, n=0), inputs, "triton")
    assert results["y"].shape == inputs.dy.shape
    assert all(not gradient.any() for gradient in results.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_pixel_spreads_as_in_pytorch(value: float) -> None:
    x, w_dw, w_pw = torch.randn(1, 16, 8, 8), torch.randn(16, 1, 3, 3), torch.randn(8, 16, 1, 1)
    x[0, 3, 2, 5] = value
    y = xsep.separable_conv2d(x, w_dw, w_pw, padding=1, backend="triton")
    expected = reference.separable_conv2d(x.double(), w_dw.double(), w_pw.double(), padding=(1, 1, 1, 1))
    assert torch.equal(y.isfinite(), expected.isfinite())
    assert not expected.isfinite().all() and expected.isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    _, args = args_of(Case(n=1, c_in=3, h=4, w=4, c_out=2, bias=True, dtype=dtype, vectors=("scale_p", "shift_p")))
    torch.library.opcheck(torch.ops.xsep.separable_conv2d.default, (*args, "triton"))
    flat = DepthwiseArgs(args.x, args.w_dw, None, None, None, None, None, args.geometry, [1, 0], [0.0, 0.0])
    torch.library.opcheck(torch.ops.xsep.depthwise_conv2d.default, (*flat, "triton"))


def test_fullgraph_with_a_dynamic_batch() -> None:
    """Traced once, run at several batch sizes, forward and backward: every lookup by N happens inside the op."""
    graphs = 0

    def counting(module: torch.fx.GraphModule, _: object) -> object:
        nonlocal graphs
        graphs += 1
        return module.forward

    def f(x: torch.Tensor, w_dw: torch.Tensor, w_pw: torch.Tensor) -> torch.Tensor:
        return xsep.separable_conv2d(
            x, w_dw, w_pw, padding=1, prologue=xsep.ChannelAffine(activation="relu"), backend="triton"
        )

    compiled = torch.compile(f, backend=counting, fullgraph=True, dynamic=True)
    w_dw, w_pw = torch.randn(6, 1, 3, 3, requires_grad=True), torch.randn(4, 6, 1, 1, requires_grad=True)
    for n in (2, 3, 5, 7):
        x = torch.randn(n, 6, 7, 5).contiguous(memory_format=torch.channels_last)
        y, expected = compiled(x, w_dw, w_pw), f(x, w_dw, w_pw)
        torch.testing.assert_close(y, expected, rtol=0, atol=0)
        got = torch.autograd.grad(y.sum(), (w_dw, w_pw))
        torch.testing.assert_close(got, torch.autograd.grad(expected.sum(), (w_dw, w_pw)), rtol=0, atol=0)
    assert graphs == 1


def test_the_plan_says_when_an_nchw_input_is_copied() -> None:
    _, args = args_of(Case())
    assert "copied" not in TRITON.plan(separable_problem(args))
    assert "copied" in TRITON.plan(separable_problem(args._replace(x=args.x.contiguous())))
    flat = DepthwiseArgs(args.x, args.w_dw, None, None, None, None, None, args.geometry, [0, 0], [0.0, 0.0])
    assert "channels a program" in TRITON.plan(depthwise_problem(flat))
