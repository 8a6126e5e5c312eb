"""A chained layer's ops on problems that hypothesis draws: forward with its statistics, and the whole backward.

The same cases in every run of CI; other ones, and many more, each night (XSEP_NIGHTLY=1). A failure says in one line
how to see it again: paste that line into Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Optional

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from tests.chain.support import DTYPES, WAY_IDS, WAYS, affine, hold, largest, layer, same, wide
from tests.chain.test_forward_ops import check_partials, starts, torch_pool
from tests.fuzzing import examples
from tests.gpu import PLACE
from xsep.activations import activate
from xsep.backends.chain import Backward, Load, RawGradient, Shortcut
from xsep.cases import LAYOUTS, laid_out
from xsep.ops.training import bn_pool_add, sep_backward, sep_dgrad, sep_fprop, sep_wgrad_pw
from xsep.problem import ACTIVATIONS, ELU, HARDSWISH, LEAKY_RELU, RELU6, Geometry
from xsep.testing import DOUBLE_ULPS, ULPS, poisoned_memory

#: A case of so many elements takes about ten milliseconds, its float64 truth included.
ELEMENTS = 10_000
HOW = examples(25 if PLACE.emulated else 60, 2000)
#: Where an activation's derivative jumps: values keep so far away from there that no rounding carries them over.
JUMPS, AWAY = {RELU6: (0.0, 6.0), HARDSWISH: (-3.0, 3.0)}, 0.1


SAME = same()


@dataclass(frozen=True)
class Layer:
    """One layer of a chain, and what comes with it."""

    n: int = 2
    c_in: int = 7
    h: int = 9
    w: int = 11
    c_out: int = 5
    filter: tuple[int, int] = (3, 3)
    geometry: Geometry = SAME
    code: int = 0
    alpha: float = 0.0
    vec: bool = False  # a BatchNorm before
    residual: bool = False
    shortcut: str = ""  # full or half
    activated: bool = False  # the shortcut is taken behind the activation
    operands: tuple[str, ...] = ()  # x itself or another
    pool: str = ""  # torch or same
    wanted: tuple[bool, bool, bool] = (True, True, True)
    kind: str = "fp32"
    layouts: tuple[str, str, str, str] = ("channels_last", "contiguous", "channels_last", "channels_last")
    seed: int = 0

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.kind]

    @property
    def output_size(self) -> tuple[int, int]:
        return self.geometry.output_size(self.h, self.w, *self.filter)

    def reproducer(self, backend: str) -> str:
        said = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"from tests.chain.test_fuzz import *; hold_layer(Layer({', '.join(said)}), {backend!r})"


sizes = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 11, 16, 17, 19])
whole_vectors = st.sampled_from([8, 16, 24, 32, 48, 64, 72, 96])
channels = st.one_of(st.integers(1, 20), whole_vectors, st.sampled_from([31, 33, 63, 65, 67, 129]))
sides = st.integers(0, 4)


@st.composite
def layers(draw: Any, kind: str, elements: int = ELEMENTS, most_stride: int = 3) -> Layer:
    form = draw(st.sampled_from(["a network's", "centred", "any"]))
    (r, s), geometry, widths = (3, 3), SAME, whole_vectors
    if form != "a network's":
        r, s = draw(st.one_of(st.sampled_from([(3, 3), (5, 5), (7, 7)]), st.tuples(*[st.integers(1, 7)] * 2)))
        dilation = draw(st.one_of(st.just((1, 1)), st.tuples(*[st.integers(1, 3)] * 2)))
        stride = draw(st.tuples(*[st.integers(1, most_stride)] * 2))
        pads = draw(st.tuples(*[sides] * 4))
        if form == "centred":
            stride = draw(st.sampled_from([(1, 1), (1, 1), (2, 2)]))
            up, left = dilation[0] * (r // 2), dilation[1] * (s // 2)
            pads = (left, left, up, up)
        geometry, widths = Geometry(*stride, *pads, *dilation), channels
    code = draw(st.integers(0, len(ACTIVATIONS) - 1))
    found = Layer(
        n=draw(st.sampled_from([1, 2, 3, 5, 0])),
        c_in=draw(widths),
        h=draw(sizes),
        w=draw(sizes),
        c_out=draw(widths),
        filter=(r, s),
        geometry=geometry,
        code=code,
        alpha=draw(st.sampled_from([0.3, 1.0, 0.0, -0.2])) if code in (ELU, LEAKY_RELU) else 0.0,
        vec=draw(st.booleans()),
        residual=form != "any" and geometry.stride == (1, 1) and r % 2 == s % 2 == 1 and draw(st.booleans()),
        shortcut=draw(st.sampled_from(["", "full", "half"])),
        activated=draw(st.booleans()),
        operands=draw(st.sampled_from([(), ("x",), ("other",), ("x", "other"), ("other", "x"), ("other", "other")])),
        pool=draw(st.sampled_from(["", "", "torch", "same"])),
        wanted=draw(st.one_of(st.just((True, True, True)), st.tuples(*[st.booleans()] * 3))),
        kind=kind,
        layouts=draw(st.tuples(st.sampled_from(LAYOUTS[:6]), *[st.sampled_from(LAYOUTS)] * 3)),
        seed=draw(st.integers(0, 999)),
    )
    p, q = found.output_size
    assume(p > 0 and q > 0)
    assume(found.n * max(found.c_in, found.c_out) * max(found.h * found.w, p * q) <= elements)
    return found


class Inputs:
    """Fresh random tensors for a layer, the same for the same seed."""

    def __init__(self, case: Layer) -> None:
        self.case, self.dtype = case, case.dtype
        g = torch.Generator().manual_seed(case.seed)
        of_x, of_weights, of_r, of_du = case.layouts
        n, c, h, w, c_out = case.n, case.c_in, case.h, case.w, case.c_out

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g, dtype=torch.float64)

        def image(layout: str, *shape: int) -> Tensor:
            return laid_out(draw(*shape).to(self.dtype), layout)

        self.vec: Optional[Tensor] = None
        u = 2 * draw(n, c, h, w)
        for jump in JUMPS.get(case.code, (0.0,)):
            u = torch.where((u - jump).abs() < AWAY, jump + AWAY * torch.where(u < jump, -1.0, 1.0), u)
        if case.vec:
            scale = (0.5 + torch.rand(c, generator=g, dtype=torch.float64)) * draw(c).sign()
            shift = 0.5 + torch.rand(c, generator=g, dtype=torch.float64)
            scale[: c // 7] = 0
            self.vec = torch.stack([scale, shift]).to(wide(self.dtype))
            scale, shift = (v.double()[:, None, None] for v in self.vec)
            u = torch.where(scale == 0, u, (u - shift) / torch.where(scale == 0, 1, scale))
        self.x = laid_out(u.to(self.dtype), of_x)
        taps = case.filter[0] * case.filter[1]
        self.w_dw = laid_out((draw(c, 1, *case.filter) * taps**-0.5).to(self.dtype), of_weights)
        self.w_pw = laid_out((draw(c_out, c, 1, 1) * c**-0.5).to(self.dtype), of_weights)
        self.residual = image(of_x, n, c, h, w) if case.residual else None
        p, q = case.output_size
        self.r = image(of_r, n, c_out, p, q)
        self.coef = (draw(3, c_out) * torch.tensor([[1.0], [0.1], [0.1]])).to(wide(self.dtype))
        self.pads, self.index = (0, 0), None
        if case.pool:
            self.pads = starts(case.pool, p, q)
            pooled = (n, c_out, (p + 1) // 2, (q + 1) // 2)
            self.du = image(of_du, *pooled)
            unit = torch.stack([torch.ones(c_out), torch.zeros(c_out)]).double()
            picture = draw(n, c_out, p, q).requires_grad_()
            _, index, _ = bn_pool_add(picture.detach(), unit, torch.zeros(pooled).double(), unit, self.pads, "aten")
            self.index = laid_out(index, "permuted" if of_du == "permuted" else "contiguous")
            self.dense = torch.autograd.grad(torch_pool(picture, case.pool), picture, self.du.double())[0]
        else:
            self.du = image(of_du, n, c_out, p, q)
            self.dense = self.du.double()
        self.shortcut: Optional[Shortcut] = None
        if case.shortcut:
            size = (n, c, h, w) if case.shortcut == "full" else (n, c, (h + 1) // 2, (w + 1) // 2)
            self.shortcut = Shortcut(image(of_du, *size), case.activated)
        self.operands = [self.x if which == "x" else image(of_r, n, c, h, w) for which in case.operands]
        self.centres = draw(1 + len(self.operands), c).to(wide(self.dtype)) if self.operands else None
        if self.centres is not None:
            self.centres[0] = torch.nan

    @property
    def load(self) -> Load:
        return Load(self.vec, self.case.code, self.case.alpha)

    def tensors(self) -> dict[str, Tensor]:
        found = {name: t for name, t in vars(self).items() if isinstance(t, Tensor)}
        if self.shortcut is not None:
            found["shortcut"] = self.shortcut.g
        return {**found, **{f"operand {i}": t for i, t in enumerate(self.operands)}}

    def forward(self, backend: str) -> Any:
        c = self.case
        return sep_fprop(
            self.x, self.vec, self.residual, c.code, c.alpha, self.w_dw, self.w_pw, c.geometry, backend=backend
        )  # fmt: skip

    def gradient(self) -> RawGradient:
        return RawGradient(self.du, self.r, self.coef, self.index, self.pads)

    def of_layer(self) -> dict[str, Any]:
        return dict(
            dr=self.gradient(), w_pw=self.w_pw, w_dw=self.w_dw, x=self.x, load=self.load, geometry=self.case.geometry,
            shortcut=self.shortcut, operands=self.operands, centres=self.centres,
        )  # fmt: skip

    def backward(self, backend: str, wanted: Sequence[bool] = (True, True, True)) -> Backward:
        return sep_backward(**self.of_layer(), wanted=wanted, backend=backend)


def act(u: Tensor, case: Layer) -> Tensor:
    return activate(u, case.code, case.alpha)


def plain(t: Tensor, dtype: torch.dtype) -> Tensor:
    """In a layout in which PyTorch's convolutions read every tensor right: in others some give NaN, or none at all."""
    return t.to(dtype).clone(memory_format=torch.contiguous_format)


def raw_output(i: Inputs, x_pre: Optional[Tensor], dtype: torch.dtype) -> Tensor:
    u = affine(i.x.to(wide(dtype)), i.vec) if x_pre is None else x_pre
    return layer(act(plain(u, dtype), i.case), plain(i.w_dw, dtype), plain(i.w_pw, dtype), i.case.geometry)


def raw_output_size(i: Inputs, x_pre: Optional[Tensor]) -> float:
    """The root of the sum of the squares of the terms that an element is the sum of: what its rounding scales with."""
    a = act(affine(i.x.double(), i.vec) if x_pre is None else x_pre.double(), i.case)
    return largest(layer(a.square(), i.w_dw.double().square(), i.w_pw.double().square(), i.case.geometry).sqrt())


def room(size: float, dtype: torch.dtype) -> float:
    """The truth is a float64 sum itself: in that type two roundings in different orders are compared."""
    return size * DOUBLE_ULPS / ULPS if dtype == torch.float64 else size


def by_autograd(i: Inputs, dtype: torch.dtype, squared: bool = False) -> dict[str, Tensor]:
    """In float64 the truth; in the layer's own type what PyTorch makes of it; of squares, the size of the roundings."""
    case, two = i.case, (lambda t: t.square()) if squared else (lambda t: t)
    u = plain(affine(i.x.to(wide(dtype)), i.vec), dtype).requires_grad_()
    w_dw, w_pw = (two(plain(w, dtype)).requires_grad_() for w in (i.w_dw, i.w_pw))
    a = two(act(u, case).detach()).requires_grad_() if squared else act(u, case)
    r = layer(a, w_dw, w_pw, case.geometry)
    coef = two(i.coef.to(wide(dtype)))[:, :, None, None]
    dr = coef[0] * two(i.dense.to(wide(dtype))) + coef[1] * two(i.r.to(wide(dtype))) + coef[2]
    of_input = a if squared else u
    ends, gradients = [r], [dr.to(dtype)]
    if i.shortcut is not None:
        end = a if i.shortcut.activated else of_input
        ends.append(end if case.shortcut == "full" else end[:, :, ::2, ::2])
        gradients.append(two(i.shortcut.g.to(dtype)))
    dx, dw_dw, dw_pw = torch.autograd.grad(ends, [of_input, w_dw, w_pw], gradients)
    rows = [dx.double()]
    for o, c in zip(i.operands, i.centres.double()[1:] if i.centres is not None else ()):
        rows.append(dx.double() * two(o.double() - c[:, None, None]))
    return {"dx": dx, "dw_dw": dw_dw, "dw_pw": dw_pw, "sums": torch.stack([t.sum((0, 2, 3)) for t in rows])}


def hold_layer(case: Layer, backend: str) -> None:
    try:
        hold_forward(case, backend)
        hold_backward(case, backend)
    except AssertionError as error:
        raise AssertionError(f"{error}\nagain: {case.reproducer(backend)}") from error


def hold_forward(case: Layer, backend: str) -> None:
    i, dtype = Inputs(case), case.dtype
    before = {name: t.clone() for name, t in i.tensors().items()}
    with poisoned_memory():
        f, again = i.forward(backend), i.forward(backend)
    if i.residual is not None:
        own = (affine(i.x, i.vec) + i.residual).to(dtype)
        hold("x_pre", f.x_pre, affine(i.x.double(), i.vec) + i.residual.double(), own, dtype)
    truth, size = raw_output(i, f.x_pre, torch.float64), raw_output_size(i, f.x_pre)
    hold("r", f.r, truth, raw_output(i, f.x_pre, dtype), dtype, room(size, dtype))
    if case.n:
        check_partials(f.partials, f.counts, f.r)
    for name, t, second in zip(f._fields, f, again):
        assert t is None or torch.equal(t, second), f"{name} does not repeat"
    unchanged(i, before)
    in_nhwc(r=f.r, x_pre=f.x_pre)


def hold_backward(case: Layer, backend: str) -> None:
    i, dtype = Inputs(case), case.dtype
    before = {name: t.clone() for name, t in i.tensors().items()}
    with poisoned_memory():
        found, again = i.backward(backend), i.backward(backend)
        some = i.backward(backend, case.wanted)
        apart = dict(zip(("dx", "dw_dw", "sums"), sep_dgrad(**i.of_layer(), backend=backend)))
        apart["dw_pw"] = sep_wgrad_pw(i.gradient(), i.x, i.load, i.w_dw, case.geometry, backend)
    truth, own = by_autograd(i, torch.float64), by_autograd(i, dtype)
    squares = by_autograd(i, torch.float64, squared=True)
    wanted = dict(zip(("dx", "dw_dw", "dw_pw", "sums"), (*case.wanted, case.wanted[0])))
    for what, t in found._asdict().items():
        assert t.dtype == (dtype if what == "dx" else wide(dtype)), f"{what} is {t.dtype}"
        hold(what, t, truth[what], own[what], dtype, room(largest(squares[what].sqrt()), dtype))
        assert torch.equal(t, getattr(again, what)), f"{what} does not repeat"
        assert torch.equal(t, apart[what]), f"{what} is another by an op of its own"
        part = getattr(some, what)
        assert (part is not None) == wanted[what] and (part is None or torch.equal(t, part)), f"{what} where wanted"
    unchanged(i, before)
    in_nhwc(dx=found.dx)


def unchanged(i: Inputs, before: dict[str, Tensor]) -> None:
    for name, t in i.tensors().items():
        assert bool(((t == before[name]) | t.isnan() & before[name].isnan()).all()), f"{name} was changed"


def in_nhwc(**images: Optional[Tensor]) -> None:
    for name, t in images.items():
        assert t is None or t.is_contiguous(memory_format=torch.channels_last), f"{name} has strides {t.stride()}"


@pytest.mark.parametrize("backend, kind", WAYS, ids=WAY_IDS)
def test_any_layer(backend: str, kind: str) -> None:
    # In float64 both sides are sums of their own order: shorter ones, so that these differ by less.
    @HOW
    @given(layers(kind, ELEMENTS // 4 if kind == "fp64" else ELEMENTS))
    def any_layer(case: Layer) -> None:
        hold_layer(case, backend)

    any_layer()
