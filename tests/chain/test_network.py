"""Xception trained as a chain: the same network, whatever is put into it, hooked onto it or asked of it."""

from __future__ import annotations

import copy
from typing import Any, Optional

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.chain.support import relative, scatter
from tests.conftest import NIGHTLY
from xsep.models import Xception, xception
from xsep.models.blocks import Block, Design, FoldableBatchNorm2d, MaxPool

SIZE = (73, 90)


def narrow(**options: Any) -> Any:
    """Xception with every joint it has, in few channels."""
    m: Any = xception(num_classes=5, chain=True, **options)
    design = Design(pool_padding=options.get("pool_padding", "torch"), **{
        k: v for k, v in options.items() if k in ("residual", "order", "middle_activation")
    })  # fmt: skip
    m.conv1, m.bn1 = nn.Conv2d(3, 4, 3, stride=2, bias=False), nn.BatchNorm2d(4)
    m.conv2, m.bn2 = nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)
    widths = {1: (6, 8), 2: (8, 10), 3: (10, 12), 12: (12, 14), **{i: (12, 12) for i in range(4, 12)}}
    for i, (c_in, c_out) in widths.items():
        old = getattr(m, f"block{i}")
        pool = old.pool if isinstance(old.pool, MaxPool) else None
        dilation = old.pairs()[0][0].dilation
        new = Block(
            c_in, c_out, len(old.pairs()), design, pool=pool, start_with_relu=i > 1, grow_first=i != 12,
            dilation=dilation if isinstance(dilation, int) else dilation[0],
        )  # fmt: skip
        setattr(m, f"block{i}", new)
    for i, (c_in, c_out) in ((3, (14, 16)), (4, (16, 18))):
        setattr(m, f"conv{i}", design.convolution(c_in, c_out, relu=False))
        setattr(m, f"bn{i}", FoldableBatchNorm2d(c_out, 1e-5))
    m.fc, m.num_features = nn.Linear(18, 5), 18
    m.chain = True
    return scatter(m.double())


@pytest.fixture(scope="module")
def network() -> Any:
    torch.manual_seed(3)
    return narrow()


def pictures(n: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, 3, *SIZE, dtype=dtype)


def step(m: Any, x: Tensor, g: Optional[Tensor] = None) -> dict[str, Tensor]:
    """Output, gradients and buffers after one step of training."""
    leaf = x.clone().requires_grad_()
    m.train()
    m.zero_grad()
    y = m(leaf)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape) if g is None else g)
    assert leaf.grad is not None
    found = {"y": y.detach(), "dx": leaf.grad}
    found |= {f"d{k}": p.grad.clone() for k, p in m.named_parameters() if p.grad is not None}
    return found | {k: b.clone() for k, b in m.named_buffers()}


def twins(m: Any) -> tuple[Any, Any]:
    """Two copies: one that is chained, one that is not."""
    chained, plain = copy.deepcopy(m), copy.deepcopy(m)
    chained.chain, plain.chain = True, False
    return chained, plain


def agree(chained: Any, plain: Any, x: Tensor, tolerance: float = 1e-9) -> None:
    got, expected = step(chained, x), step(plain, x)
    assert got.keys() == expected.keys()
    for what, truth in expected.items():
        assert relative(got[what].double(), truth.double()) <= tolerance, what


@pytest.mark.parametrize("pool", ["torch", "same"])
def test_one_step_is_that_of_the_plain_network(pool: str) -> None:
    chained, plain = twins(narrow(pool_padding=pool))
    x = pictures()
    assert chained.train().not_chained_reasons(x) == []
    assert list(chained.state_dict()) == list(plain.state_dict())
    agree(chained, plain, x)


def test_one_step_at_full_width() -> None:
    chained, plain = twins(scatter(xception(num_classes=5).double()))
    agree(chained, plain, torch.randn(2, 3, 71, 71, dtype=torch.float64))


def test_eval_and_no_grad_are_untouched(network: Any) -> None:
    chained, plain = twins(network)
    x = pictures()
    assert torch.equal(chained.eval()(x), plain.eval()(x))
    with torch.no_grad():
        assert torch.equal(chained.train()(x), plain.train()(x))
        assert torch.equal(chained.eval().fold_batchnorm()(x), plain.eval().fold_batchnorm()(x))


def test_features_and_custom_heads(network: Any) -> None:
    """All five maps, each read twice; then other heads, in the model and outside of it."""

    class AllMaps(nn.Module):
        def __init__(self, m: Any) -> None:
            super().__init__()
            self.m = m

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([f.square().mean((2, 3)) for f in self.m.features(x)], 1)

    class OwnHead(Xception):
        def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
            return x.square().mean((2, 3))[:, :5]

    chained, plain = twins(network)
    x = pictures()
    agree(AllMaps(chained), AllMaps(plain), x)
    strides = [[f.stride() for f in m.features(x)] for m in (chained, plain)]
    assert strides[0] == strides[1]
    chained, plain = twins(network)
    for m in (chained, plain):
        m.fc = nn.Sequential(nn.Linear(18, 3), nn.Tanh()).double()
        m.global_pool = "max"
        nn.init.constant_(m.fc[0].weight, 0.01)
        nn.init.zeros_(m.fc[0].bias)
    agree(chained, plain, x)
    chained, plain = twins(network)
    for m in (chained, plain):
        m.__class__ = OwnHead
    agree(chained, plain, x)
    assert chained(x).shape == (2, 5)


def test_hooks(network: Any) -> None:
    """On a block they run, with ordinary tensors; inside one they make that block run by itself."""
    chained, plain = twins(network)
    seen: dict[str, list[Any]] = {"chained": [], "plain": []}

    def double(kind: str, y: Tensor) -> Tensor:
        seen[kind].append(y.detach())
        return 2 * y

    for kind, m in (("chained", chained), ("plain", plain)):
        m.block5.register_forward_hook(lambda m, args, y, kind=kind: double(kind, y))
        m.block2.register_full_backward_hook(lambda m, dx, dy, kind=kind: seen[kind].append(dx[0]))
        m.block7.rep["4"].register_forward_pre_hook(lambda m, args, kind=kind: seen[kind].append(args[0].detach()))
        m.bn4.register_forward_hook(lambda m, args, y, kind=kind: seen[kind].append(y.detach()))
    x = pictures()
    assert chained.train().not_chained_reasons(x) == [
        "block2: has hooks", "block5: has hooks", "block7: its convolution has hooks", "conv4: its BatchNorm has hooks"
    ]  # fmt: skip
    agree(chained, plain, x)
    assert len(seen["chained"]) == len(seen["plain"]) == 4
    for a, b in zip(seen["chained"], seen["plain"]):
        assert a.shape == b.shape and relative(a, b) <= 1e-9


def test_frozen_parts(network: Any) -> None:
    """Some BatchNorms in eval mode, some without learning gamma, and a frozen stem."""
    chained, plain = twins(network)
    for m in (chained, plain):
        m.train()
        for i, (_, bn) in enumerate(m.separable_layers()):
            bn.train(i % 3 != 0)
            bn.weight.requires_grad_(i % 4 != 0)
        for p in [*m.conv1.parameters(), *m.bn1.parameters(), *m.conv2.parameters(), *m.bn2.parameters()]:
            p.requires_grad_(False)
        m.bn2.eval()
        m.train = lambda mode=True, m=m: m  # what step() would undo
    agree(chained, plain, pictures())


def test_checkpointed_blocks_and_accumulation(network: Any) -> None:
    """Two batches, every block rerun in the backward; the running statistics move as if none were."""
    chained, plain = twins(network)
    for i in range(1, 13):
        block = getattr(chained, f"block{i}")
        inner = block.forward
        block.forward = lambda x, inner=inner: checkpoint(inner, x, use_reentrant=False)
    for m in (chained, plain):
        m.train()
        torch.manual_seed(0)
        for _ in range(2):
            m(pictures()).square().sum().backward()
    for (name, a), b in zip(chained.named_parameters(), plain.parameters()):
        assert a.grad is not None and b.grad is not None and relative(a.grad, b.grad) <= 1e-9, name
    for (name, a), b in zip(chained.named_buffers(), plain.buffers()):
        assert relative(a.double(), b.double()) <= 1e-9, name


@pytest.mark.parametrize(
    "options, what",
    [
        (dict(residual=False), "block4: it has no residual"),
        (dict(order="pointwise_first"), "block1: its convolution is a SpectrumConv2d"),
        (dict(middle_activation="relu"), "block1: its convolution has a relu between its convolutions"),
        (dict(output_stride=16), "block12: it does not end in a 3x3 max-pool of stride 2"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_variants_run_as_before_where_they_are_not_chained(options: dict[str, Any], what: str) -> None:
    chained, plain = twins(narrow(**options))
    x = pictures()
    assert what in chained.train().not_chained_reasons(x)
    agree(chained, plain, x)


def test_reasons_and_the_switch(network: Any) -> None:
    m, x = copy.deepcopy(network), pictures()
    m.chain = None
    assert m.train().not_chained_reasons(x) == ["it was not asked for: chain is None"]
    m.chain = True
    assert m.eval().not_chained_reasons(x) == ["the network is in eval mode"]
    assert m.train().not_chained_reasons(x.float())[0] == (
        "block1: its convolution has a torch.float64 weight for a torch.float32 image"
    )
    with pytest.raises(ValueError, match="chain must be None, False or True, got 'yes'"):
        xception(chain="yes")  # type: ignore[arg-type]


def saved_megabytes(m: Any, x: Tensor) -> float:
    """What autograd keeps for the backward beside the parameters, each memory once."""
    known = {t.untyped_storage().data_ptr() for t in m.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in known:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
    ):
        m(x)
    return 1e-6 * sum(t.untyped_storage().nbytes() for t in kept.values())


def raw_megabytes(size: int) -> float:
    """What a chain has to keep of a picture in bfloat16, counted from the network's table of shapes."""

    def down(n: int) -> int:
        return (n + 1) // 2

    a = (size - 1) // 2  # after conv1
    b = a - 2
    c, d, e, f = down(b), down(down(b)), down(down(down(b))), down(down(down(down(b))))
    values = 3 * size**2 + 2 * 32 * a**2 + 64 * b**2  # the picture, conv1 before and behind its BatchNorm, conv2
    for big, small, mid, out in ((b, c, 128, 128), (c, d, 256, 256), (d, e, 728, 728), (e, f, 728, 1024)):
        # Two raw outputs; pooled: the sum, the chosen raw values, the skip's raw output, and a byte for the tap.
        values += (mid + out) * big**2 + int(3.5 * out * small**2)
    values += 8 * 3 * 728 * e**2 + 8 * 728 * e**2  # the middle blocks' raw outputs and the sums between them
    return 2e-6 * (values + (1536 + 2048) * f**2)


def test_what_is_kept_for_the_backward() -> None:
    """Raw outputs, sums, pool indices and vectors: half of what the plain network keeps."""
    m = xception(num_classes=5, chain=True)
    x = torch.randn(1, 3, 139, 139).contiguous(memory_format=torch.channels_last)
    chained = saved_megabytes(m, x)
    m.chain = False
    plain = saved_megabytes(m, x)
    assert chained <= raw_megabytes(139) + 1.0  # vectors, five of 40,000 channels in float32
    assert chained <= 0.55 * plain
    assert raw_megabytes(299) <= 60


@pytest.mark.skipif(not NIGHTLY, reason="the full size; XSEP_NIGHTLY=1")
def test_what_is_kept_at_full_size() -> None:
    m = xception(num_classes=5, chain=True)
    x = torch.randn(2, 3, 299, 299).contiguous(memory_format=torch.channels_last)
    assert saved_megabytes(m, x) / 2 <= 60


class Small(nn.Module):
    """Every joint of Xception's separable part in few channels."""

    def __init__(self, chain: bool, backend: Optional[str] = None) -> None:
        super().__init__()
        design = Design(backend=backend)
        self.stem = nn.Conv2d(3, 8, 3, bias=False)
        self.blocks = nn.Sequential(
            Block(8, 12, 2, design, pool=MaxPool("torch"), start_with_relu=False), Block(12, 12, 3, design)
        )
        self.fc = nn.Linear(12, 4)
        for block in self.blocks:
            block.chain = chain  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).relu().mean((2, 3)))


def small_twins(backend: Optional[str] = None) -> tuple[Small, Small]:
    chained, plain = Small(True, backend), Small(False, backend)
    plain.load_state_dict(chained.state_dict())
    return chained, plain


def test_autocast_with_a_gradient_scaler() -> None:
    """Float16 with a scale so large that some steps are skipped; both networks skip the same, and learn."""
    losses: dict[str, list[float]] = {}
    for name, m in zip(("chained", "plain"), small_twins()):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=3)
        optimizer = torch.optim.SGD(m.parameters(), 0.1, 0.9)
        x, target = torch.randn(16, 3, 15, 15, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 4
        losses[name] = []
        skipped = 0
        for _ in range(30):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = F.cross_entropy(m(x).float(), target)
            scaler.scale(loss).backward()
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            skipped += scaler.get_scale() < before
            losses[name].append(loss.item())
        assert skipped >= 1 and losses[name][-1] < 0.5 * losses[name][0]
    assert losses["chained"][0] == pytest.approx(losses["plain"][0], rel=1e-2)


@pytest.mark.parametrize("dynamic, backend", [(False, None), (True, None), (False, "cpu")],
                         ids=["static", "dynamic_batch", "named_backend"])  # fmt: skip
def test_compiled(dynamic: bool, backend: Optional[str]) -> None:
    """One graph with the chain's ops in it, forward and backward; running statistics move in it."""
    dtype, most = (torch.float64, 1e-10) if backend is None else (torch.float32, 1e-3)  # compiled kernels: no float64
    chained, plain = (m.to(dtype) for m in small_twins(backend))
    graphs: list[str] = []

    def compiler(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        graphs.append(graph.print_readable(print_output=False))
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    compiled: Any = torch.compile(chained, backend=compiler, fullgraph=True, dynamic=dynamic or None)
    for n in (4, 6, 7) if dynamic else (3, 3):
        x = torch.randn(n, 3, 15, 15, dtype=dtype)
        with torch._dynamo.config.patch(error_on_recompile=True):
            got = {k.replace("_orig_mod.", ""): v for k, v in step(compiled, x).items()}
        expected = step(plain, x)
        assert got.keys() == expected.keys()
        for what, truth in expected.items():
            assert relative(got[what].double(), truth.double()) <= most, what
    assert "chain_sep_fprop" in graphs[-1] and "chain_bn_pool_add" in graphs[-1]


@pytest.mark.skipif(not NIGHTLY, reason="a minute; XSEP_NIGHTLY=1")
def test_the_whole_network_compiled(network: Any) -> None:
    chained, plain = twins(network)
    torch._dynamo.reset()
    compiled: Any = torch.compile(chained, backend="aot_eager", fullgraph=True)
    x = pictures()
    compiled(x).square().sum().backward()
    plain(x).square().sum().backward()
    for (name, a), b in zip(chained.named_parameters(), plain.parameters()):
        assert a.grad is not None and b.grad is not None and relative(a.grad, b.grad) <= 1e-9, name


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_twenty_steps_learn_as_the_plain_network_does(kind: torch.dtype) -> None:
    losses: dict[str, list[float]] = {}
    for name, m in zip(("chained", "plain"), small_twins()):
        optimizer = torch.optim.SGD(m.parameters(), 0.05, 0.9)
        x, target = torch.randn(16, 3, 15, 15, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 4
        losses[name] = []
        for _ in range(20):
            optimizer.zero_grad()
            with torch.autocast("cpu", kind, enabled=kind != torch.float32):
                loss = F.cross_entropy(m(x).float(), target)
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
    assert losses["plain"][-1] < 0.5 * losses["plain"][0]
    rel = 1e-3 if kind == torch.float32 else 0.1
    assert losses["chained"] == pytest.approx(losses["plain"], rel=rel, abs=rel)


def test_shapes_without_data() -> None:
    """On the meta device, where summaries of networks are made."""
    m = Small(True).to("meta")
    y = m(torch.zeros(2, 3, 15, 15, device="meta"))
    y.sum().backward()
    assert y.shape == (2, 4) and all(p.grad is not None and p.grad.shape == p.shape for p in m.parameters())
