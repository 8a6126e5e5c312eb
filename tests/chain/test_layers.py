"""Chained layers and blocks against nn.BatchNorm2d networks under autograd: outputs, gradients, running statistics."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any, Optional

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.chain.support import DTYPES, hold_norm, last, relative, scatter
from xsep.chain import Handle, SeparableChain, SeparableConvBN
from xsep.models.blocks import Block, Design, MaxPool
from xsep.modules import FusedSeparableConv2d
from xsep.testing import poisoned_memory


def plain_convolution(conv: FusedSeparableConv2d, x: Tensor) -> Tensor:
    dw, pw = conv.convs
    x = F.relu(x) if conv.prologue_activation else x
    return F.conv2d(F.conv2d(x, dw.weight, None, 1, dw.padding, dw.dilation, dw.groups), pw.weight)


class Plain(nn.Module):
    """A chain or a block as PyTorch runs it: its very modules, but for the convolutions, which are two calls."""

    def __init__(self, m: Any) -> None:
        super().__init__()
        self.m = m

    def forward(self, x: Tensor) -> Tensor:
        m: Any = self.m
        if isinstance(m, SeparableChain):
            layers: list[Any] = list(m)
            for layer in layers:
                x = layer.bn(plain_convolution(layer.conv, x))
            return x
        y = x
        for conv, bn in m.pairs():
            y = bn(plain_convolution(conv, y))
        return y + x if m.skip is None else m.pool(y) + m.skipbn(m.skip(x))


def chain(*widths: int, **options: Any) -> Any:
    return SeparableChain(*(SeparableConvBN(a, b, **options) for a, b in itertools.pairwise(widths)))


def block(c_in: int, c_out: int, reps: int, pool: str = "", relu: bool = True) -> Any:
    design = Design(bn_eps=1e-3)
    m = Block(c_in, c_out, reps, design, pool=MaxPool(pool) if pool else None, start_with_relu=relu)
    m.chain = True
    return m


NETWORKS: dict[str, tuple[Callable[[], Any], tuple[int, int, int, int]]] = {
    "one": (lambda: chain(5, 7), (3, 5, 9, 8)),
    "three": (lambda: chain(5, 7, 11, 6, eps=1e-3), (3, 5, 13, 11)),
    "three-k5-linear": (lambda: chain(5, 7, 11, 6, kernel_size=5, prologue_activation=None), (3, 5, 13, 11)),
    "cumulative": (lambda: chain(5, 7, 6, momentum=None), (3, 5, 13, 11)),
    "not-affine": (lambda: chain(5, 7, 6, affine=False), (3, 5, 13, 11)),
    "no-running-statistics": (lambda: chain(5, 7, 6, track_running_stats=False), (3, 5, 13, 11)),
    "middle": (lambda: block(9, 9, 3), (3, 9, 12, 10)),
    "down-odd": (lambda: block(6, 10, 2, "torch"), (3, 6, 15, 13)),
    "down-even": (lambda: block(6, 10, 2, "torch"), (3, 6, 14, 12)),
    "down-even-same": (lambda: block(6, 10, 2, "same"), (3, 6, 14, 11)),
    "down-of-three": (lambda: block(6, 10, 3, "same"), (3, 6, 13, 12)),
    "down-without-relu": (lambda: block(6, 10, 2, "torch", relu=False), (3, 6, 15, 13)),
    "one-picture": (lambda: chain(5, 7, 6), (1, 5, 13, 11)),
    "one-pixel-maps": (lambda: chain(5, 7, 6), (6, 5, 1, 1)),
}


def step(m: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Output, every gradient and every buffer after one step."""
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    m.zero_grad()
    y = m(leaf)
    y.backward(g)
    assert leaf.grad is not None
    found = {"y": y.detach(), "dx": leaf.grad}
    found |= {f"d{k.removeprefix('m.')}": p.grad.clone() for k, p in m.named_parameters() if p.grad is not None}
    return found | {k.removeprefix("m."): b.clone() for k, b in m.named_buffers() if b is not None}


def compare(m: Any, shape: tuple[int, ...], steps: int = 2, tolerance: float = 1e-10) -> None:
    """Some training steps of a float64 network, chained and plain: all is the same."""
    plain = Plain(copy.deepcopy(m))
    for _ in range(steps):
        x = last(*shape)
        assert not m.not_chained_reasons(x if isinstance(m, SeparableChain) else x.dtype)
        g = torch.randn_like(plain(x).detach())
        plain.load_state_dict({f"m.{k}": v for k, v in m.state_dict().items()})
        expected = step(plain, x, g)
        with poisoned_memory():
            got = step(m, x, g)
        assert got.keys() == expected.keys()
        for what, truth in expected.items():
            assert relative(got[what].double(), truth.double()) <= tolerance, what


@pytest.mark.parametrize("name", NETWORKS)
def test_in_float64(name: str) -> None:
    make, shape = NETWORKS[name]
    compare(scatter(make().double()), shape, 3 if name == "cumulative" else 2)


@pytest.mark.parametrize("name", ["three", "middle", "down-odd", "down-even-same"])
def test_frozen_batch_norms(name: str) -> None:
    """In eval mode inside a network that trains: all of them, then every other one; their gamma still learns."""
    make, shape = NETWORKS[name]
    m = scatter(make().double())
    norms = [bn for bn in m.modules() if isinstance(bn, nn.BatchNorm2d)]
    for frozen in (norms, norms[::2]):
        m.train()
        for bn in frozen:
            bn.eval()
        compare(m, shape)


def test_frozen_parameters() -> None:
    make, shape = NETWORKS["down-odd"]
    m = scatter(make().double())
    for i, p in enumerate(m.parameters()):
        p.requires_grad_(i % 3 == 0)
    compare(m, shape)
    for p in m.parameters():
        p.requires_grad_(False)
    compare(m, shape)


def test_only_parameters_learn() -> None:
    """x has no gradient, as in a network's first layer."""
    m = scatter(chain(5, 7, 6).double())
    plain, x = Plain(copy.deepcopy(m)), last(3, 5, 9, 8)
    g = torch.randn(3, 6, 9, 8, dtype=torch.float64)
    m(x).backward(g)
    plain(x).backward(g)
    for a, b in zip(m.parameters(), plain.parameters()):
        assert a.grad is not None and b.grad is not None and relative(a.grad, b.grad) <= 1e-10


@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["three", "middle", "down-odd", "down-even-same"])
def test_in_other_types(name: str, kind: str) -> None:
    """Float32 weights under autocast for the 16-bit types, as a training run has them.

    Each by its norm, and all gradients of eight batches together, each in its own size: in one of them a single value
    that rounding carries over a ReLU's kink, or to another pixel of the pool's window, may be most of the error,
    anybody's.
    """
    make, shape = NETWORKS[name]
    dtype = DTYPES[kind]
    m = scatter(make())
    found: dict[str, list[list[Tensor]]] = {}
    for _ in range(8):
        x = last(*shape, dtype=dtype)
        wide, own, ours = Plain(copy.deepcopy(m).double()), Plain(copy.deepcopy(m)), copy.deepcopy(m)
        g = torch.randn_like(copy.deepcopy(wide)(x.double()).detach()).to(dtype)
        results = [step(wide, x.double(), g.double())]
        with torch.autocast("cpu", dtype, enabled=kind != "fp32"):
            results += [step(own, x, g), step(ours, x, g)]
        for what in results[0]:
            found.setdefault(what, []).append([r[what] for r in results])
    together: list[list[Tensor]] = []
    for what, batches in found.items():
        truth, theirs, got = (torch.stack(of_one) for of_one in zip(*batches))
        assert got.dtype == theirs.dtype, what
        if what.startswith("d"):
            size = truth.double().norm()
            together.append([t.double().flatten() / size for t in (got, truth, theirs)])
        else:
            hold_norm(what, got, truth, theirs, dtype)
    got, truth, theirs = (torch.cat(of_one) for of_one in zip(*together))
    hold_norm("gradients", got, truth, theirs, dtype)


def test_hostile_mean() -> None:
    """Raw outputs of mean 100 and deviation 0.1: no worse than twice PyTorch's float32."""
    m = chain(16, 16, 16, prologue_activation=None)
    for layer in m:
        dw, pw = layer.conv.convs
        dw.weight.data.zero_()
        dw.weight.data[:, :, 1, 1] = 1
        pw.weight.data.copy_(torch.eye(16)[:, :, None, None])
        layer.bn.bias.data.fill_(100)
        layer.bn.weight.data.fill_(0.1)
    x = (100 + 0.1 * last(4, 16, 13, 11)).float()
    g = torch.randn_like(x)
    truth = step(Plain(copy.deepcopy(m).double()), x.double(), g.double())
    theirs, ours = step(Plain(copy.deepcopy(m)), x, g), step(m, x, g)
    for what, t in truth.items():
        if not what.endswith("num_batches_tracked"):
            hold_norm(what, ours[what], t, theirs[what], torch.float32)


def test_one_value_a_channel_is_refused_as_pytorch_does() -> None:
    x = torch.randn(1, 5, 1, 1)
    words = r"Expected more than 1 value per channel when training, got input size .*\[1, 7, 1, 1\]"
    with pytest.raises(ValueError, match=words):
        chain(5, 7)(x)
    with pytest.raises(ValueError, match=words):
        nn.BatchNorm2d(7)(torch.randn(1, 7, 1, 1))
    m = chain(5, 7)
    m[0].bn.eval()
    assert m(x).shape == (1, 7, 1, 1)


def test_two_readers_of_one_handle() -> None:
    """du and its sums are linear, so autograd adds them rightly."""

    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(SeparableConvBN(6, 6) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            h = self.layers[0](Handle.of(x))
            return self.layers[1](h).tensor() * self.layers[2](h).tensor() + h.relu().tensor()

    m = scatter(Fork().double())
    twin = copy.deepcopy(m)
    x = last(3, 6, 11, 9)
    g = torch.randn_like(x)

    class PlainFork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = twin.layers

        def forward(self, x: Tensor) -> Tensor:
            layers: Any = list(self.layers)
            u = layers[0].bn(plain_convolution(layers[0].conv, x))
            a, b = (layer.bn(plain_convolution(layer.conv, u)) for layer in layers[1:])
            return a * b + u.relu()

    got, expected = step(m, x, g), step(PlainFork(), x, g)
    for what, truth in expected.items():
        assert relative(got[what].double(), truth.double()) <= 1e-10, what


def test_from_a_convolution_to_the_global_average() -> None:
    """Enter with a raw output, leave through the pool."""
    conv, bn, m = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), chain(6, 8)
    parts = scatter(nn.ModuleList([conv, bn, m]).double())
    twin = copy.deepcopy(parts)
    x = last(2, 3, 11, 9)

    class Whole(nn.Module):
        def __init__(self, parts: Any, chained: bool) -> None:
            super().__init__()
            self.parts, self.chained = parts, chained

        def forward(self, x: Tensor) -> Tensor:
            conv, bn, m = self.parts
            if not self.chained:
                return Plain(m)(bn(conv(x)).relu()).relu().mean((2, 3))
            return m(Handle.of_raw(conv(x), bn, relu=True)).relu().relu_mean()

    g = torch.randn(2, 8, dtype=torch.float64)
    expected = step(Whole(twin, False), x, g)
    got = step(Whole(parts, True), x, g)
    for what, truth in expected.items():
        assert relative(got[what].double(), truth.double()) <= 1e-10, what


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not_reentrant"])
def test_checkpointing_moves_running_statistics_once(reentrant: bool) -> None:
    m = scatter(block(6, 10, 2, "torch").double())
    twin, x = copy.deepcopy(m), last(3, 6, 15, 13)
    g = torch.randn(3, 10, 8, 7, dtype=torch.float64)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.m = m

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.m, x, use_reentrant=reentrant)

    got, expected = step(Checkpointed(), x, g), step(twin, x, g)
    assert got.keys() == expected.keys()
    for what, truth in expected.items():
        # The reentrant kind runs forward without recording gradients first, so the plain way.
        assert relative(got[what].double(), truth.double()) <= (1e-12 if reentrant else 0), what


def test_a_float32_residual_under_autocast_stays_one() -> None:
    m, x = block(9, 9, 3), last(2, 9, 8, 7, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = m(x), Plain(m)(x)
    assert y.dtype == expected.dtype == torch.float32


def test_accumulated_gradients() -> None:
    m = scatter(block(6, 10, 2, "torch").double())
    plain = Plain(copy.deepcopy(m))
    for _ in range(3):
        x = last(2, 6, 9, 9)
        g = torch.randn(2, 10, 5, 5, dtype=torch.float64)
        m(x).backward(g)
        plain(x).backward(g)
    for a, b in zip(m.parameters(), plain.parameters()):
        assert a.grad is not None and b.grad is not None and relative(a.grad, b.grad) <= 1e-10


def test_second_derivatives_are_refused() -> None:
    m, x = chain(5, 7, 6), last(2, 5, 6, 6, dtype=torch.float32).requires_grad_()
    (dx,) = torch.autograd.grad(m(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_a_changed_raw_output_is_noticed() -> None:
    """What a chain hands out may not be changed in place: backward would read it."""
    m, x = chain(5, 7), last(2, 5, 6, 6, dtype=torch.float32).requires_grad_()
    h = m(Handle.of(x))
    y = h.tensor()
    h.operands[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_layouts_are_those_of_the_plain_network() -> None:
    for m, shape in ((chain(5, 7), (2, 5, 6, 6)), (block(5, 8, 2, "torch"), (2, 5, 7, 7))):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(shape).contiguous(memory_format=layout)
            expected = Plain(m)(x)
            assert m(x).stride() == expected.stride()
            permuted = torch.randn(shape[3], shape[1], shape[2], shape[0]).permute(3, 1, 2, 0)
            assert relative(m(permuted), Plain(m)(permuted)) <= 1e-5


def observe(module: nn.Module) -> list[Optional[str]]:
    seen: list[Optional[str]] = []
    module.register_forward_hook(lambda m, args, y: seen.append(type(m).__name__))
    return seen


def test_a_layer_that_is_watched_runs_by_itself() -> None:
    m = scatter(chain(5, 7, 11, 6).double())
    x = last(2, 5, 9, 9)
    seen = [observe(m[1].bn), observe(m[2])]
    assert m.not_chained_reasons(x) == ["1: its BatchNorm has hooks", "2: has hooks"]
    expected = Plain(copy.deepcopy(m))(x)
    for found in seen:
        found.clear()
    assert relative(m(x), expected) <= 1e-10
    assert seen == [["BatchNorm2d"], ["SeparableConvBN"]]


def test_what_is_not_chained_says_why() -> None:
    def reasons(change: Callable[[Any], None]) -> list[str]:
        m = chain(5, 7)
        change(m[0])
        return m.not_chained_reasons(torch.randn(2, 5, 6, 6))

    def middle(layer: Any) -> None:
        layer.conv.middle_activation = "relu"

    def bias(layer: Any) -> None:
        layer.conv.conv_pw.bias = nn.Parameter(torch.zeros(7))

    def norm(layer: Any) -> None:
        layer.bn = nn.InstanceNorm2d(7)

    def own(layer: Any) -> None:
        layer.conv.forward = lambda x: x

    def half(layer: Any) -> None:
        layer.half()

    def weight_norm(layer: Any) -> None:
        nn.utils.parametrizations.weight_norm(layer.conv.conv_pw)

    def cuda(layer: Any) -> None:
        layer.conv.backend = "cuda"

    assert reasons(lambda layer: None) == []
    for change, words in (
        (middle, "a relu between"), (bias, "has a bias"), (norm, "is a InstanceNorm2d"), (own, "a forward of its own"),
        (half, "torch.float16 weight for a torch.float32 image"), (weight_norm, "parametrised"),
        (cuda, "its kernels run on NVIDIA GPUs"),
    ):  # fmt: skip
        found = reasons(change)
        assert found and all(reason.startswith("0: ") for reason in found) and words in found[0], words
    with torch.no_grad():
        assert reasons(lambda layer: None) == ["no gradients are recorded"]


@pytest.mark.parametrize("transform", ["vmap", "functional_grad", "forward_mode"])
def test_transforms_run_the_plain_way(transform: str) -> None:
    m = scatter(chain(5, 7).double())
    for bn in m.modules():
        if isinstance(bn, nn.BatchNorm2d):
            bn.eval()
    x = last(2, 5, 6, 6)
    plain = Plain(copy.deepcopy(m))
    if transform == "vmap":
        assert relative(torch.func.vmap(m)(x[None]), plain(x)[None]) <= 1e-10
    elif transform == "functional_grad":
        got, expected = (torch.func.grad(lambda x, f=f: f(x).square().sum())(x) for f in (m, plain))
        assert relative(got, expected) <= 1e-10
    else:
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.randn_like(x))
            with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
                m(dual)


@pytest.mark.parametrize("kind", ["fp64", "fp32"])
@pytest.mark.parametrize("name", ["three", "middle", "down-odd"])
def test_empty_batch(name: str, kind: str) -> None:
    """No gradient is anything but zero, and running statistics stay as they are, but for the batch being counted."""
    make, (_, *shape) = NETWORKS[name]
    m = scatter(make().to(DTYPES[kind]))
    plain, x = Plain(copy.deepcopy(m)), torch.zeros(0, *shape, dtype=DTYPES[kind])
    g = torch.zeros_like(copy.deepcopy(plain)(x).detach())
    got, expected = step(m, x, g), step(plain, x, g)
    assert got.keys() == expected.keys()
    for what, truth in expected.items():
        assert torch.equal(got[what], truth), what


def test_a_layer_may_name_its_backend() -> None:
    m = SeparableChain(SeparableConvBN(5, 7, backend="aten"), SeparableConvBN(7, 6), SeparableConvBN(6, 6))
    h = m[1](m[0](Handle.of(torch.randn(2, 5, 6, 6))))
    assert h.backend == "aten"
    last_layer: Any = m[2]
    last_layer.conv.backend = "cuda"
    found = m.not_chained_reasons(torch.randn(2, 5, 6, 6))
    assert found and found[0].startswith("2: ") and "its kernels run on NVIDIA GPUs" in found[0]


def test_kernel_size_must_be_odd() -> None:
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        SeparableConvBN(5, 7, 4)
