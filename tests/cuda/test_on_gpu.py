"""The cuda backend on a real card, at real sizes: ``pytest -m gpu tests/cuda``; in the emulator at small ones."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Optional

import pytest
import torch
from torch import Tensor

from tests.chain.support import double, hold, image, last, vector
from tests.gpu import PLACE, needs_card, never_waiting
from tests.hardening import test_special_values as special_values
from tests.tf32 import round_to_tf32
from xsep import ChannelAffine, depthwise_conv2d, separable_conv2d
from xsep.activations import activate, scale_and_shift
from xsep.backends import chain_cuda_launch as launch
from xsep.backends.aten import ATEN
from xsep.backends.base import with_bias
from xsep.backends.chain import Backward, Load, RawGradient, Shortcut
from xsep.backends.chain_aten import ATEN_CHAIN
from xsep.backends.chain_cuda import CUDA_CHAIN
from xsep.backends.cuda import CUDA, DeviceFacts, device_facts, wgrad_on_chip, wgrad_plan
from xsep.ops.inside import inside_op
from xsep.problem import RELU, SILU, Affine, Geometry, Problem, SeparableArgs, separable_problem
from xsep.testing import NAMES, float32_products

pytestmark = pytest.mark.gpu

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SIZES = PLACE.sizes


@pytest.fixture(autouse=True)
def ieee() -> Iterator[None]:
    """PyTorch's own convolutions take TF32 by choice and by shape: no measure where it is not what is asked for."""
    with float32_products("ieee"):
        yield


@pytest.fixture(autouse=True)
def supported() -> None:
    problem = separable_problem(draw((1, 8, 8, 8, 8, 3, 1), torch.float32))
    reasons = CUDA.not_supported_reasons(problem)
    if reasons:
        pytest.fail("; ".join(reasons))


def ids(size: tuple[int, ...]) -> str:
    return "-".join(map(str, size))


def draw(size: tuple[int, ...], dtype: torch.dtype, everything: bool = False, last: bool = True) -> SeparableArgs:
    torch.manual_seed(0)
    n, c_in, c_out, h, w, k, stride = size
    geometry = Geometry(stride, stride, k // 2, k // 2, k // 2, k // 2, 1, 1)
    layout = torch.channels_last if last else torch.contiguous_format

    def randn(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, device=PLACE.device).to(dtype)

    x, w_dw, w_pw = randn(n, c_in, h, w), randn(c_in, 1, k, k), randn(c_out, c_in, 1, 1)
    bias: Optional[Tensor] = None
    residual: Optional[Tensor] = None
    if everything:
        p, q = geometry.output_size(h, w, k, k)
        bias, residual = randn(c_out), randn(n, c_out, p, q).contiguous(memory_format=layout)
    codes = [RELU, SILU, RELU] if everything else [0, 0, 0]
    x = x.contiguous(memory_format=layout)
    none = None
    a = SeparableArgs(
        x, w_dw, w_pw, bias, residual, none, none, none, none, none, none, list(geometry), codes, [0.0] * 3
    )
    if not everything:
        return a
    channels = {"scale_p": c_in, "shift_p": c_in, "scale_m": c_in, "shift_m": c_in, "scale_e": c_out, "shift_e": c_out}
    vectors: dict[str, Any] = {name: randn(c, dtype=torch.float32) for name, c in channels.items()}
    return a._replace(**vectors)


def off(t: Tensor, truth: Tensor) -> float:
    return float((t.double() - truth).abs().max())


def assert_close(name: str, ours: Tensor, theirs: Tensor, truth: Tensor, *, tf32: float = 0.0) -> None:
    """At most twice PyTorch's own error at the same type, and an ulp of the largest result (8 in float32).

    ``tf32``: the error of PyTorch's other ways, where it may use that type and its convolution may have chosen not to.
    """
    ulp = torch.finfo(theirs.dtype).eps * float(truth.abs().max())
    allowed = 2 * max(off(theirs, truth), tf32) + ulp * (8 if theirs.dtype == torch.float32 else 1)
    error = off(ours, truth)
    assert error <= allowed, f"{name}: off by {error:.3g}, {allowed:.3g} allowed"


def by_matrix_product(a: SeparableArgs, rounded: bool) -> Tensor:
    """PyTorch's matrix product at its settings, or of operands rounded to TF32, where its convolution stood."""
    z, w = ATEN.depthwise(a.x, a.w_dw, a.prologue, a.middle, Geometry(*a.geometry)), a.w_pw.flatten(1)
    if rounded:
        z, w = round_to_tf32(z), round_to_tf32(w)
    u = scale_and_shift((z.permute(0, 2, 3, 1) @ w.t()).permute(0, 3, 1, 2), with_bias(a.epilogue, a.bias))
    return activate(u if a.residual is None else u + a.residual, a.epilogue.activation, a.epilogue.alpha)


@pytest.mark.parametrize(
    "kind, tf32",
    [*((kind, False) for kind in DTYPES), ("fp32", True)],
    ids=lambda v: v if isinstance(v, str) else ("ieee", "tf32")[v],
)
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("everything", [False, True], ids=["plain", "everything"])
@pytest.mark.parametrize("size", SIZES, ids=ids)
def test_separable_forward(size: tuple[int, ...], kind: str, everything: bool, layout: str, tf32: bool) -> None:
    a = draw(size, DTYPES[kind], everything, layout == "channels_last")
    truth = ATEN.separable_forward(double(a))
    with float32_products("tf32" if tf32 else "ieee"):
        ours, theirs = CUDA.separable_forward(a), ATEN.separable_forward(a)
        other = max(off(by_matrix_product(a, rounded), truth) for rounded in (False, True)) if tf32 else 0.0
    assert_close("y", ours, theirs, truth, tf32=other)


@needs_card("stream of its own")
@pytest.mark.parametrize("kind", ["fp16", "bf16"])
@pytest.mark.parametrize("size", SIZES, ids=ids)
def test_calls_made_again_by_cpp(size: tuple[int, ...], kind: str) -> None:
    """The same bits as the first time, forward and backward, on whatever stream is the current one."""
    a = draw(size, DTYPES[kind])
    x, w_dw, w_pw = (t.requires_grad_() for t in (a.x, a.w_dw, a.w_pw))
    options: dict[str, Any] = {"stride": a.geometry[0], "padding": a.w_dw.shape[2] // 2, "backend": "cuda"}

    def step() -> list[Tensor]:
        y = separable_conv2d(x, w_dw, w_pw, prologue=ChannelAffine(activation="relu"), **options)
        assert y.grad_fn is not None and "Convolution" in y.grad_fn.name(), "Python made it"
        return [y.detach(), *torch.autograd.grad(y, (x, w_dw, w_pw), torch.ones_like(y))]

    first, again = step(), step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        elsewhere = step()
    stream.synchronize()
    for one, two, three in zip(first, again, elsewhere):
        assert torch.equal(one, two) and torch.equal(one, three)


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("name", NAMES[1:])
def test_activations_pass_on_what_is_not_finite(name: str, kind: str) -> None:
    with torch.device(PLACE.device):
        special_values.test_activations_pass_them_on(name, DTYPES[kind], torch.channels_last, "cuda")


def test_who_runs_out_of_memory_is_told_so() -> None:
    """By PyTorch's words, and on a card by its class of error: who looks for a batch that fits asks for that."""
    x, w_dw = draw((1, 8, 8, 4, 4, 3, 1), torch.float32)[:2]
    far = 2**20  # y would be all that 47 bits of address can reach
    kind = torch.OutOfMemoryError if x.is_cuda else RuntimeError  # whose words an older PyTorch prints
    with pytest.raises(kind, match=r"out of memory|can't allocate memory"), inside_op():
        CUDA.depthwise(x, w_dw, Affine(), Affine(), Geometry(1, 1, far, far, far, far, 1, 1))


@pytest.mark.parametrize("size", SIZES, ids=ids)
def test_products_are_as_exact_as_convolutions(size: tuple[int, ...]) -> None:
    """Whatever PyTorch's matrix products may do: forward and backward in float32 have a convolution's precision."""
    a = draw(size, torch.float32)
    truth, dy = ATEN.separable_forward(double(a)), torch.randn_like(ATEN.separable_forward(a))
    wanted = [True] * 3 + [False] * 8
    exact = ATEN.separable_backward(dy.double(), double(a), None, wanted)
    with float32_products("ieee", of_matrices="tf32"):
        ours = [CUDA.separable_forward(a), *CUDA.separable_backward(dy, a, None, wanted)[:3]]
        theirs = [ATEN.separable_forward(a), *ATEN.separable_backward(dy, a, None, wanted)[:3]]
    for name, mine, peer, right in zip(("y", "dx", "dw_dw", "dw_pw"), ours, theirs, (truth, *exact)):
        assert mine is not None and peer is not None and right is not None
        assert_close(name, mine, peer, right)


@pytest.mark.parametrize("prologue", [False, True], ids=["plain", "prologue"])
@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=ids)
def test_depthwise_backward(size: tuple[int, ...], kind: str, prologue: bool) -> None:
    a = draw(size, DTYPES[kind], prologue)
    if prologue:  # away from the ReLU's kink: of millions of values, rounding carries some over it
        (n, c, h, w), vec = a.x.shape, vector(a.x.shape[1], DTYPES[kind])
        a = a._replace(x=image(n, c, h, w, vec, DTYPES[kind]).to(PLACE.device), scale_p=vec[0].to(PLACE.device),
                       shift_p=vec[1].to(PLACE.device))  # fmt: skip
    geometry, every = Geometry(*a.geometry), (True, True, prologue, prologue)
    dz = torch.randn_like(ATEN.depthwise(a.x, a.w_dw, Affine(), Affine(), geometry))
    ours = CUDA.depthwise_backward_kernel(dz, a.x, a.w_dw, a.prologue, geometry, every)
    theirs = ATEN.depthwise_backward_kernel(dz, a.x, a.w_dw, a.prologue, geometry, every)
    e = double(a)
    truth = ATEN.depthwise_backward_kernel(dz.double(), e.x, e.w_dw, e.prologue, geometry, every)
    for name, mine, peer, exact in zip(("dx", "dw_dw", "dscale_p", "dshift_p"), ours, theirs, truth):
        if mine is None or peer is None or exact is None:
            assert mine is None and not prologue, name
            continue
        assert_close(name, mine, peer, exact)
    again = CUDA.depthwise_backward_kernel(dz, a.x, a.w_dw, a.prologue, geometry, every)
    for first, second in zip(ours, again):
        assert first is None or second is None or torch.equal(first, second), "not the same bits twice"


#: Each alone, and with an addend those layers that keep the size: stride 1.
CHAINED = [(size, joined) for size in SIZES for joined in (False, True) if size[-1] == 1 or not joined]


@pytest.mark.parametrize(
    "size, joined", CHAINED, ids=lambda v: ids(v) if isinstance(v, tuple) else ("alone", "addend")[v]
)
@pytest.mark.parametrize("kind", DTYPES)
def test_chain_forward(size: tuple[int, ...], kind: str, joined: bool) -> None:
    """A layer of the training chain, fused or staged: r, the sum before the activation, statistics of every pixel."""
    a = draw(size, DTYPES[kind], False)
    geometry = Geometry(*a.geometry)
    c = a.x.shape[1]
    load = Load(torch.randn(2, c, device=PLACE.device), RELU, 0.0)
    addend = torch.randn_like(a.x) if joined else None
    ours = CUDA_CHAIN.sep_fprop(a.x, load, addend, a.w_dw, a.w_pw, geometry, True)
    source = a.x if ours.x_pre is None else ours.x_pre
    reading = load if ours.x_pre is None else load._replace(vec=None)
    theirs = ATEN_CHAIN.sep_fprop(source, reading, None, a.w_dw, a.w_pw, geometry, False)
    vec = None if reading.vec is None else reading.vec.double()
    exact = ATEN_CHAIN.sep_fprop(
        source.double(), reading._replace(vec=vec), None, a.w_dw.double(), a.w_pw.double(), geometry, False
    )
    assert_close("r", ours.r, theirs.r, exact.r)
    if joined:
        assert ours.x_pre is not None and addend is not None and load.vec is not None
        scale, shift = load.vec[:, None, :, None, None]
        rounded = (a.x.float() * scale + shift + addend.float()).to(a.x.dtype)
        truth = a.x.double() * scale.double() + shift.double() + addend.double()
        assert_close("x_pre", ours.x_pre, rounded, truth)
    assert ours.partials is not None and ours.counts is not None
    check_statistics(ours.r.double(), ours.partials, ours.counts)


def check_statistics(y: Tensor, partials: Tensor, counts: Tensor) -> None:
    k, s, q = partials.double().unbind(1)
    count = counts.double()[:, None]
    assert int(count.sum()) == y[:, 0].numel()
    mean = (count * k + s).sum(0) / count.sum()
    m2 = (q - s.square() / count + count * (k + s / count - mean).square()).sum(0)
    torch.testing.assert_close(mean, y.mean((0, 2, 3)), rtol=0, atol=1e-6 * float(y.abs().max()))
    torch.testing.assert_close(m2 / count.sum(), y.var((0, 2, 3), unbiased=False), rtol=1e-5, atol=0)


@pytest.mark.parametrize("joined", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=ids)
def test_depthwise_statistics(size: tuple[int, ...], kind: str, joined: bool) -> None:
    """Sliding windows and the general kernel: y is what it is without them, mean 100 and deviation about 0.1."""
    a, (_, c, *_) = draw(size, DTYPES[kind]), size
    residual = torch.randn_like(a.x) if joined else None
    ones = torch.ones(c, device=PLACE.device)
    vectors = *torch.randn(2, c, device=PLACE.device), 0.03 * ones, 100 * ones

    def run(statistics: bool) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = torch.ops.xsep.cuda_depthwise_fprop_chain(
            a.x, residual, a.w_dw, *vectors, a.geometry, [RELU, 0], [0.0, 0.0], statistics
        )
        return found

    (y, partials, counts, x_pre), again, plain = run(True), run(True), run(False)
    check_statistics(y.double(), partials, counts)
    assert all(torch.equal(first, second) for first, second in zip((y, partials, counts, x_pre), again))
    assert torch.equal(y, plain[0]) and torch.equal(x_pre, plain[3])
    assert plain[1].numel() == plain[2].numel() == 0 and x_pre.shape == (a.x.shape if joined else (0,))


#: Shortcut, whether it joins before the activation, pool.
JOINTS = {
    "plain": ("", False, ""),
    "full": ("full", False, ""),
    "half": ("half", True, ""),
    "pool": ("", False, "torch"),
}


def check_chain_backward(size: tuple[int, ...], kind: str, joint: str) -> None:
    """A layer's whole backward against float64, and the same bits twice."""
    (short, before, pool), (n, c_in, c_out, h, w, *_), dtype = JOINTS[joint], size, DTYPES[kind]
    a = draw(size, dtype)
    geometry, load = Geometry(*a.geometry), Load(vector(c_in, dtype), RELU)
    x = image(n, c_in, h, w, load.vec, dtype).to(PLACE.device)
    load = load._replace(vec=load.vec.to(PLACE.device) if load.vec is not None else None)
    r = last(n, c_out, *geometry.output_size(h, w, *a.w_dw.shape[2:]), dtype=dtype).to(PLACE.device)
    dr = RawGradient(torch.randn_like(r), r, torch.randn(3, c_out, device=PLACE.device))
    if pool:
        du, ones = torch.randn_like(r[:, :, ::2, ::2]), torch.ones(2, c_out, device=PLACE.device)
        _, taps, chosen = CUDA_CHAIN.bn_pool_add(r, ones, du, ones, (1, 1))
        peer = ATEN_CHAIN.bn_pool_add(r, ones, du, ones, (1, 1))
        assert torch.equal(taps, peer[1]) and torch.equal(chosen, peer[2])
        dr = RawGradient(du, r, dr.coef, taps, (1, 1))
    g = torch.randn_like(x)
    shortcut = Shortcut(g if short == "full" else g[:, :, ::2, ::2], before) if short else None
    centres = torch.randn(2, c_in, device=PLACE.device)

    def run(chain: Any, kind: torch.dtype) -> Backward:
        wide = torch.promote_types(kind, torch.float32)
        found: Backward = chain.sep_backward(
            dr._replace(du=dr.du.to(kind), r=r.to(kind), coef=dr.coef.to(wide)), a.w_pw.to(kind), a.w_dw.to(kind),
            x.to(kind), load._replace(vec=None if load.vec is None else load.vec.to(wide)), geometry,
            None if shortcut is None else shortcut._replace(g=shortcut.g.to(kind)), [x.to(kind)], centres.to(wide),
            (True, True, True),
        )  # fmt: skip
        return found

    ours, again, theirs = run(CUDA_CHAIN, dtype), run(CUDA_CHAIN, dtype), run(ATEN_CHAIN, dtype)
    assert ours.dx is not None
    total = ours.dx.double().abs().sum((0, 2, 3)).max()
    for name, mine, second, peer, exact in zip(Backward._fields, ours, again, theirs, run(ATEN_CHAIN, torch.float64)):
        assert mine is not None and second is not None and peer is not None and exact is not None
        assert torch.equal(mine, second), f"{name}: not the same bits twice"
        if name == "sums":  # a few ulp of all that was added up, where they cancel
            size_of_terms = float(exact.abs().max() + total)
            hold(name, mine, exact, peer, dtype, size_of_terms)
        else:
            assert_close(name, mine, peer, exact)


@pytest.mark.parametrize("joint", JOINTS)
@pytest.mark.parametrize("size", SIZES[1:], ids=ids)
@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("sliced", [False, True], ids=["whole", "sliced"])
def test_chain_backward(
    size: tuple[int, ...], kind: str, joint: str, sliced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All pictures at a time, as the planner has it, and in slices, as it would with more L2."""
    plan, cut = launch.backward_plan.__wrapped__, []  # and none that it has kept

    def kernel_by_kernel(problem: Problem, device: DeviceFacts, pooled: bool) -> launch.BackwardPlan:
        found = plan(problem, device, pooled)
        assert found is not None
        cut.append(len(found.slices))
        return found._replace(fused=False)

    if sliced:
        monkeypatch.setattr(launch, "slices", lambda problem, device: launch.slices_of(problem.n, 1 + problem.n // 3))
    monkeypatch.setattr(launch, "backward_plan", kernel_by_kernel)
    check_chain_backward(size, kind, joint)
    assert cut and (not sliced or all((slices > 1) == (size[0] > 1) for slices in cut))


@pytest.mark.parametrize("joint", JOINTS)
@pytest.mark.parametrize("what", ["z", "dr and z"])
@pytest.mark.parametrize("kind", ["fp16", "bf16"])
@pytest.mark.parametrize("size", PLACE.wgrad_sizes[:2], ids=ids)
def test_chain_backward_on_the_chip(
    size: tuple[int, ...], kind: str, what: str, joint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the planner would rather go through memory, or in one pass, too, if shared memory is large enough."""
    plan, used = launch.backward_plan, []

    def on_chip(problem: Problem, device: DeviceFacts, pooled: bool) -> launch.BackwardPlan:
        found = plan(problem, device, pooled)
        assert found is not None
        used.append(what if what in launch.wgrad_plans(problem, device) else "")
        return found._replace(fused=False, on_chip=used[-1])

    monkeypatch.setattr(launch, "backward_plan", on_chip)
    check_chain_backward(size, kind, joint)
    assert len(used) == 2 and (used[0] == what or not PLACE.emulated)


@pytest.mark.parametrize("joint", JOINTS)
@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_chain_backward_in_one_pass(monkeypatch: pytest.MonkeyPatch, kind: str, joint: str) -> None:
    """Where the planner would rather go kernel by kernel, too: pictures so large that L2 is too small for one."""
    c = PLACE.fused_channels
    side = math.isqrt(device_facts(torch.cuda.current_device()).l2_bytes // (2 * 3 * (c + c) * 2)) + 1
    plan, kernel, calls = launch.backward_plan, launch.fused_backward, 0

    def in_one_pass(problem: Problem, device: DeviceFacts, pooled: bool) -> launch.BackwardPlan:
        found = plan(problem, device, pooled)
        assert found is not None
        return found._replace(fused=True)

    def counted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return kernel(*arguments)

    monkeypatch.setattr(launch, "backward_plan", in_one_pass)
    monkeypatch.setattr(launch, "fused_backward", counted)
    check_chain_backward((2, c, c, side, side + 3, 3, 1), kind, joint)
    assert calls == 2


@pytest.mark.parametrize("size", PLACE.wgrad_sizes, ids=ids)
@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_pointwise_wgrad_on_the_chip(size: tuple[int, ...], kind: str) -> None:
    """Whether or not the planner expects it to pay; the same bits twice."""
    a = draw(size, DTYPES[kind])
    n, c_in, c_out, h, w, k = size[:6]
    geometry = Geometry(*a.geometry)
    p, q = geometry.output_size(h, w, k, k)
    dy = torch.randn(n, p, q, c_out, device=PLACE.device).to(a.x.dtype).permute(0, 3, 1, 2)
    prologue = Affine(torch.rand(c_in, device=PLACE.device), torch.rand(c_in, device=PLACE.device), RELU)
    if wgrad_plan(separable_problem(a), device_facts(torch.cuda.current_device())) is None:  # too little shared memory
        with pytest.raises(RuntimeError, match="the planner has no kernel"):
            wgrad_on_chip(dy, a.x, a.w_dw, prologue, geometry)
        return

    def by_pytorch(dtype: torch.dtype) -> Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        z = ATEN.depthwise(a.x.to(dtype), a.w_dw.to(dtype), prologue, Affine(), geometry)
        return dy.to(wide).permute(1, 0, 2, 3).flatten(1) @ z.to(wide).permute(1, 0, 2, 3).flatten(1).t()

    ours, again = (wgrad_on_chip(dy, a.x, a.w_dw, prologue, geometry) for _ in range(2))
    assert torch.equal(ours, again)
    assert_close("dw_pw", ours, by_pytorch(a.x.dtype), by_pytorch(torch.float64))


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("size", [SIZES[1], SIZES[3]], ids=ids)
def test_no_call_waits_for_the_card(size: tuple[int, ...], layout: str) -> None:
    a = draw(size, torch.bfloat16, everything=True, last=layout == "channels_last")
    tensors = [t.requires_grad_() for t in (a.x, a.w_dw, a.w_pw, a.bias, a.residual, *a[5:11]) if t is not None]
    stride = a.geometry[:2]

    def step() -> None:
        pad = a.w_dw.shape[2] // 2
        affines = (ChannelAffine(a.scale_p, a.shift_p, "relu"), ChannelAffine(a.scale_m, a.shift_m, "silu"),
                   ChannelAffine(a.scale_e, a.shift_e, "relu"))  # fmt: skip
        y = separable_conv2d(
            a.x, a.w_dw, a.w_pw, a.bias, stride=(stride[0], stride[1]), padding=pad, prologue=affines[0],
            middle=affines[1], epilogue=affines[2], residual=a.residual, backend="cuda",
        )  # fmt: skip
        z = depthwise_conv2d(a.x, a.w_dw, padding=pad, prologue=affines[0], backend="cuda")
        torch.autograd.grad(y.sum() + z.sum(), tensors)

    step()  # what is asked once
    with never_waiting("cuda_depthwise_fprop", "cuda_depthwise_bprop"):
        step()


@needs_card("streams")
def test_current_stream_is_used() -> None:
    a, stream = draw(SIZES[1], torch.float16), torch.cuda.Stream()
    expected = CUDA.separable_forward(a)
    with torch.cuda.stream(stream):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            y = CUDA.separable_forward(a)
    y.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)
