"""dw_pw with z on the chip, and in the training chain dr too: in the emulator, against float64."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Optional

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from tests.chain.support import DTYPES, affine, hold, image, last, vector
from tests.fuzzing import examples
from xsep import card_check, extension
from xsep.activations import activate
from xsep.backends import chain_cuda_launch as launch
from xsep.backends.chain import Load, RawGradient
from xsep.backends.cuda import CUDA, DeviceFacts, wgrad_on_chip, wgrad_plan
from xsep.problem import IDENTITY, RELU, SILU, Affine, Geometry, Problem, SeparableArgs

from . import emulated
from .emulated_ops import EmulatedOps, library  # noqa: F401  (for the line that reproduces)

pytestmark = [
    pytest.mark.skipif(emulated.missing_tools() is not None, reason=str(emulated.missing_tools())),
    pytest.mark.skipif(extension.binding() is None, reason="xsep's compiled extension is not built"),
]

each_kind = pytest.mark.parametrize("kind", ["fp16", "bf16"])
HOPPER = 227 * 1024


@dataclass(frozen=True)
class Layer:
    n: int = 2
    c_in: int = 16
    c_out: int = 24
    h: int = 9
    w: int = 13
    k: int = 3
    stride: int = 1
    pads: tuple[int, int, int, int] = (1, 1, 1, 1)  # left, right, top, bottom
    code: int = IDENTITY
    vec: bool = False
    ctas: int = 3
    kilobytes: int = 227
    kind: str = "bf16"
    seed: int = 0

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.stride, self.stride, *self.pads, 1, 1)

    @property
    def facts(self) -> DeviceFacts:
        return DeviceFacts(self.ctas, self.kilobytes * 1024)

    @property
    def problem(self) -> Problem:
        return Problem(
            "separable", "cuda", DTYPES[self.kind], True, self.n, self.c_in, self.h, self.w, 1, self.k, self.k,
            self.c_out, self.geometry, (self.code, 0, 0),
        )  # fmt: skip

    def reproducer(self) -> str:
        said = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"from tests.cuda.test_emulated_wgrad import *; check(library(), Layer({', '.join(said)}))"


@dataclass
class Tensors:
    dy: Tensor
    x: Tensor
    w_dw: Tensor
    vec: Optional[Tensor]


def draw(layer: Layer) -> Tensors:
    torch.manual_seed(layer.seed)
    dtype, (p, q) = DTYPES[layer.kind], layer.problem.output_size
    vec = vector(layer.c_in, dtype) if layer.vec else None
    x = image(layer.n, layer.c_in, layer.h, layer.w, vec, dtype)
    w_dw = (torch.randn(layer.c_in, 1, layer.k, layer.k) / layer.k).to(dtype)
    return Tensors(last(layer.n, layer.c_out, p, q, dtype=dtype), x, w_dw, vec)


def run(operators: EmulatedOps, layer: Layer, t: Tensors, seed: int = 0) -> Tensor:
    operators.start(layer.facts, seed)
    scale, shift = (None, None) if t.vec is None else (t.vec[0], t.vec[1])
    return wgrad_on_chip(t.dy, t.x, t.w_dw, Affine(scale, shift, layer.code), layer.geometry)


def by_pytorch(layer: Layer, t: Tensors, rounded: bool) -> Tensor:
    """In float64; or with what the convolutions read and z rounded to the layer's type, once each, as little as can be.

    PyTorch's own are rounded more often, but on few pixels luck decides which of two such errors is the larger.
    """
    dtype = DTYPES[layer.kind] if rounded else torch.float64
    u = activate(affine(t.x.double(), t.vec), layer.code, 0.0).to(dtype).double()
    z = F.conv2d(F.pad(u, layer.pads), t.w_dw.double(), None, layer.stride, 0, 1, layer.c_in).to(dtype)
    return torch.einsum("nopq,nipq->oi", t.dy.double(), z.double())


def hold_dw_pw(layer: Layer, t: Tensors, found: Tensor) -> None:
    hold("dw_pw", found, by_pytorch(layer, t, False), by_pytorch(layer, t, True), torch.float32)


def check(operators: EmulatedOps, layer: Layer) -> None:
    t = draw(layer)
    hold_dw_pw(layer, t, run(operators, layer, t))


def plan_of(layer: Layer, of: str = "separable") -> Any:
    return wgrad_plan(layer.problem, layer.facts, of)


def check_chain(operators: EmulatedOps, layer: Layer) -> None:
    """dr is formed on the chip: the bits of the kernel that does nothing else, and dw_pw by it."""
    t = draw(layer)
    c_out, dtype = t.dy.shape[1], t.x.dtype
    r, coef = last(*t.dy.shape, dtype=dtype), torch.randn(3, c_out)
    raw, load = RawGradient(t.dy, r, coef), Load(t.vec, layer.code, 0.0)
    operators.start(layer.facts, layer.seed % 7)
    dr, dw_pw = launch.wgrad_of_raw(raw, t.x, load, t.w_dw, layer.geometry)
    assert torch.equal(dr, launch.form(raw))
    t.dy = dr
    hold_dw_pw(layer, t, dw_pw)


LAYERS = {
    "one-pixel": Layer(1, 8, 8, 1, 1),
    "part-of-a-chunk": Layer(2, 72, 40),
    "one-chunk": Layer(2, 64, 128, 9, 17, code=RELU),
    "parts": Layer(2, 136, 200, 12, 11, stride=2, code=RELU, vec=True),
    "k5": Layer(3, 128, 64, 7, 7, k=5, pads=(2, 2, 2, 2), code=SILU, vec=True),
    "k5-stride-2": Layer(2, 24, 264, 13, 9, k=5, stride=2, pads=(2, 2, 2, 2), code=RELU),
    "many-parts": Layer(2, 400, 16, 13, 9, pads=(0, 0, 0, 0), code=RELU, vec=True, ctas=7),
    "walk": Layer(1, 128, 256, 20, 20, code=RELU, ctas=2),
    "one-cta": Layer(2, 64, 64, 19, 37, pads=(0, 2, 2, 1), ctas=1, kilobytes=120),
    "little-memory": Layer(1, 128, 128, 13, 19, vec=True, ctas=2, kilobytes=99),
    "across-pictures": Layer(5, 128, 64, 5, 6, code=RELU, ctas=2),
    "parts-in-a-chain": Layer(2, 136, 256, 11, 13, code=RELU, vec=True, ctas=4),
    "few-buffers": Layer(3, 64, 256, 11, 40, ctas=2, kilobytes=150),
}


@each_kind
@pytest.mark.parametrize("name", LAYERS)
def test_against_float64(operators: EmulatedOps, name: str, kind: str) -> None:
    check(operators, Layer(**{**vars(LAYERS[name]), "kind": kind}))


#: Of those, layers of a filter and stride that have such a kernel, on cards with room for r too.
IN_CHAIN = [
    name for name, layer in LAYERS.items() if layer.k == 3 and layer.stride == 1 and layer.kilobytes == 227
]  # fmt: skip


@each_kind
@pytest.mark.parametrize("name", IN_CHAIN)
def test_with_dr_formed_there(operators: EmulatedOps, name: str, kind: str) -> None:
    check_chain(operators, Layer(**{**vars(LAYERS[name]), "kind": kind}))


def test_these_layers_have_walks_of_every_kind() -> None:
    plans = [plan_of(layer) for layer in LAYERS.values()]
    walks = [plan.walk for plan in plans]
    assert {walk.halos for walk in walks} == {2, 3, 4}
    assert {walk.chunks for walk in walks} >= {1, 2} and max(plan.parts for plan in plans) >= 2
    assert {plan.shares for plan in plans} >= {1, 2, 4, 8} and {plan.output_blocks for plan in plans} >= {1, 2, 4, 5}
    assert max(walk.tiles / walk.workers for walk in walks) >= 5, "the buffers of dy turn over"
    chained = [plan_of(LAYERS[name], "chain") for name in IN_CHAIN]
    assert {plan.walk.halos for plan in chained} >= {2, 3, 4} and max(plan.parts for plan in chained) >= 2
    assert any(walk.tile_rows > layer.problem.output_size[0] for walk, layer in zip(walks, LAYERS.values()))


drawn_pads = st.tuples(*[st.integers(0, 3)] * 4)


@st.composite
def layers(draw_one: Any) -> Layer:
    k = draw_one(st.sampled_from([3, 3, 3, 5]))
    eighths = st.integers(1, 20)
    found = Layer(
        n=draw_one(st.integers(1, 4)),
        c_in=8 * draw_one(eighths),
        c_out=8 * draw_one(st.one_of(eighths, eighths, st.integers(1, 64))),
        h=draw_one(st.integers(1, 20)),
        w=draw_one(st.integers(1, 30)),
        k=k,
        stride=draw_one(st.sampled_from([1, 1, 2])),
        pads=draw_one(st.one_of(st.just((k // 2,) * 4), drawn_pads)),
        code=draw_one(st.sampled_from([IDENTITY, RELU, RELU, SILU])),
        vec=draw_one(st.booleans()),
        ctas=draw_one(st.integers(1, 9)),
        kilobytes=draw_one(st.sampled_from([99, 163, 227, 227])),
        kind=draw_one(st.sampled_from(["fp16", "bf16"])),
        seed=draw_one(st.integers(0, 2**32 - 1)),
    )
    assume(min(found.problem.output_size) > 0)
    assume(found.n * found.h * found.w * (found.c_in + found.c_out) < 200_000)
    return found


def test_any_layer_is_right(operators: EmulatedOps) -> None:
    ran, in_chain = [], []

    @examples(40, 1500)
    @given(layers())
    def hold_layer(layer: Layer) -> None:
        plan = plan_of(layer)
        ran.append(plan is not None)
        if plan is None:
            return
        chained = plan_of(layer, "chain") is not None
        in_chain.append(chained)
        try:
            check(operators, layer)
            if chained:
                check_chain(operators, layer)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{layer.reproducer()}") from None

    hold_layer()
    assert sum(ran) > len(ran) / 2 and sum(in_chain) > len(ran) / 5


@each_kind
def test_same_bits_for_any_order_of_threads(operators: EmulatedOps, kind: str) -> None:
    layer = Layer(**{**vars(LAYERS["walk"]), "kind": kind})
    t = draw(layer)
    first = run(operators, layer, t)
    assert all(torch.equal(first, run(operators, layer, t, seed)) for seed in (1, 2, 3))


def reach_past_the_picture(layer: Layer) -> None:
    """Some of its tiles, below and at the right."""
    walk, (p, q) = plan_of(layer).walk, layer.problem.output_size
    assert walk.group_rows == p and p % walk.tile_rows != 0 and q % walk.tile_columns != 0
    assert walk.chunks == 3 and walk.workers == 1, "a chunk's buffer of z is another chunk's next"


@each_kind
@pytest.mark.parametrize("edge", ["below", "right"])
def test_windows_outside_the_picture_count_for_nothing(operators: EmulatedOps, kind: str, edge: str) -> None:
    """They would overflow, to infinity times no gradient."""
    layer = Layer(1, 192, 64, 11, 23, ctas=1, kilobytes=99, kind=kind)
    reach_past_the_picture(layer)
    t = draw(layer)
    large = 4 * torch.finfo(t.x.dtype).max ** 0.5
    t.x.zero_()
    t.w_dw.zero_()
    if edge == "below":
        t.x[:, :, -1], t.w_dw[:, :, 0, 1] = large, large
    else:
        t.x[..., -1], t.w_dw[:, :, 1, 0] = large, large
    assert not run(operators, layer, t).any()


@each_kind
@pytest.mark.parametrize("value", [float("inf"), float("nan")], ids=str)
def test_what_is_not_finite_stays_in_its_channel(operators: EmulatedOps, kind: str, value: float) -> None:
    """Rows of a tile's z that have no pixel keep nothing of the tile, and the chunk, before."""
    layer = Layer(1, 192, 64, 11, 23, ctas=1, kilobytes=99, kind=kind)
    reach_past_the_picture(layer)
    t = draw(layer)
    t.x[:, 67, 2:10, 2:20] = value
    truth, found = by_pytorch(layer, t, False), run(operators, layer, t)
    others = torch.arange(192) != 67
    assert not found[:, 67].isfinite().any() and not truth[:, 67].isfinite().any()
    hold("the others", found[:, others], truth[:, others], None, t.x.dtype)


@each_kind
def test_the_backward_has_it_where_it_pays(operators: EmulatedOps, kind: str) -> None:
    """One operator makes dx, dw_dw and dw_pw; of a small picture z goes through memory."""
    for size, pays in (((26, 26), True), ((5, 5), False)):
        layer = Layer(3, 128, 128, *size, code=RELU, ctas=1, kind=kind)
        assert plan_of(layer).pays == pays
        t = draw(layer)
        w_pw = torch.randn(128, 128, 1, 1).to(t.x.dtype)
        no = None
        a = SeparableArgs(
            t.x, t.w_dw, w_pw, no, no, no, no, no, no, no, no, list(layer.geometry), [RELU, 0, 0], [0.0] * 3
        )  # fmt: skip
        operators.start(layer.facts)
        found = CUDA.separable_backward(t.dy, a, None, [True] * 3 + [False] * 8)
        assert operators.called["separable_bprop"] == 1
        dw_pw = found[2]
        assert dw_pw is not None and torch.equal(dw_pw.flatten(1).float(), run(operators, layer, t)) == pays
        hold_dw_pw(layer, t, dw_pw.flatten(1))


def test_no_other_layer(operators: EmulatedOps) -> None:
    layer = Layer(c_in=13)
    assert plan_of(layer) is None
    with pytest.raises(RuntimeError, match="no kernel for the pointwise weights' gradient of bfloat16 x"):
        run(operators, layer, draw(layer))


@each_kind
@pytest.mark.parametrize("chained", [False, True], ids=["alone", "chained"])
def test_the_check_of_a_card_sees_what_is_wrong(
    operators: EmulatedOps, monkeypatch: pytest.MonkeyPatch, chained: bool, kind: str
) -> None:
    kernel = "chain_wgrad" if chained else "separable_wgrad"
    for kilobytes, expected in ((99, 0 if chained else 2), (227, 6 if chained else 8)):
        operators.start(DeviceFacts(2, kilobytes * 1024))
        for name, wrong in card_check.large_failures("cpu", chained):
            assert not wrong, name
        assert operators.called[kernel] == expected
    op = torch.ops.xsep.cuda_chain_wgrad if chained else torch.ops.xsep.cuda_separable_wgrad

    def spoiled(*arguments: Any) -> Any:
        found = op(*arguments)
        return (found[0], 1.01 * found[1]) if chained else 1.01 * found

    monkeypatch.setattr(torch.ops.xsep, "cuda_chain_wgrad" if chained else "cuda_separable_wgrad", spoiled)
    case = replace(card_check.LARGE[0], dtype=DTYPES[kind])
    assert card_check.wgrad_failures(case, "cpu", chained)
