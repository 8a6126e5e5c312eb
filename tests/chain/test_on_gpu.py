"""The chain on a real card: ``pytest -m gpu tests/chain``. Whole networks; each kernel has its own test elsewhere.

In the emulator they are narrow, on small pictures.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.chain.support import hold_norm, scatter
from tests.gpu import PLACE, float32_products, needs_card
from xsep.models.blocks import Block, Design, MaxPool

pytestmark = pytest.mark.gpu


class Part(nn.Module):
    """A block that halves the size, two that keep it, and a head: every kernel of the chain at Xception's widths."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        design, (narrow, middle, wide) = Design(backend=backend), PLACE.channels
        #: PyTorch's own convolutions promise no bits; the stem, which is one of them, is asked for them by the fixture.
        self.same_bits = backend != "aten"
        self.stem = nn.Conv2d(3, narrow, 3, bias=False)
        self.blocks = nn.Sequential(
            Block(narrow, middle, 2, design, pool=MaxPool("torch"), start_with_relu=False),
            Block(middle, wide, 2, design, pool=MaxPool("same")),
            Block(wide, wide, 3, design), Block(wide, wide, 3, design),
        )  # fmt: skip
        self.fc = nn.Linear(wide, 10)

    def chained(self, chain: bool) -> Part:
        for block in self.blocks:
            block.chain = chain  # type: ignore[assignment]
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).relu().mean((2, 3)))


def placed(m: Part) -> Part:
    return scatter(m).to(PLACE.device).to(memory_format=torch.channels_last).train()


@pytest.fixture(params=PLACE.backends)
def network(request: pytest.FixtureRequest) -> Iterator[Part]:
    cudnn: Any = torch.backends.cudnn
    torch.manual_seed(5)
    before, cudnn.deterministic = cudnn.deterministic, True  # of the stem, whose gradient may else be of atomic adds
    try:
        with float32_products("ieee"):
            yield placed(Part(request.param))
    finally:
        cudnn.deterministic = before


def pictures() -> Tensor:
    n, h, w = PLACE.pictures
    return torch.randn(n, 3, h, w, device=PLACE.device).contiguous(memory_format=torch.channels_last)


def step(m: Any, x: Tensor) -> dict[str, Tensor]:
    m.zero_grad(set_to_none=True)
    y = m(x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view(y.shape))
    found = {"y": y.detach()} | {name: p.grad.clone() for name, p in m.named_parameters() if p.grad is not None}
    return found | {name: b.clone().float() for name, b in m.named_buffers() if b.is_floating_point()}


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_one_step_is_that_of_the_plain_network(network: Part, kind: torch.dtype) -> None:
    m, x = network.to(kind), pictures().to(kind)
    double = copy.deepcopy(m).double().chained(False)
    for block in double.blocks:
        for conv, _ in block.pairs():  # type: ignore[operator]
            conv.backend = "aten"
    plain, chained = copy.deepcopy(m).chained(False), copy.deepcopy(m).chained(True)
    for block in plain.blocks:
        for conv, _ in block.pairs():  # type: ignore[operator]
            conv.backend = "aten"
    truth, own, ours = step(double, x.double()), step(plain, x), step(chained, x)
    assert ours.keys() == truth.keys()
    for what, exact in truth.items():
        hold_norm(what, ours[what], exact, own[what], kind)
    if m.same_bits:
        again = step(copy.deepcopy(m).chained(True), x)
        assert all(torch.equal(again[what], ours[what]) for what in ours), "not the same bits twice"


def hold_same(network: Part, name: str, found: Tensor, expected: Tensor) -> None:
    """The same bits where they are promised; else what rounding carries over a ReLU may differ, through 11 layers."""
    if network.same_bits:
        assert torch.equal(found, expected), name
    else:
        difference = float((found.double() - expected.double()).norm())
        assert difference <= 2e-2 * float(expected.double().norm()), name


@needs_card("graphs")
def test_a_graph_of_the_step(network: Part) -> None:
    m, x = network.chained(True), pictures()
    start = copy.deepcopy(m.state_dict())
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            m.zero_grad(set_to_none=True)
            m(x).square().sum().backward()
    torch.cuda.current_stream().wait_stream(side)
    m.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        m(x).square().sum().backward()
    m.load_state_dict(start)
    x.copy_(pictures())
    graph.replay()
    torch.cuda.synchronize()
    found = {name: p.grad.clone() for name, p in m.named_parameters() if p.grad is not None}
    statistics = {name: b.clone() for name, b in m.named_buffers()}
    m.load_state_dict(start)
    m.zero_grad(set_to_none=True)
    m(x).square().sum().backward()
    for name, p in m.named_parameters():
        assert p.grad is not None, name
        hold_same(m, name, found[name], p.grad)
    for name, b in m.named_buffers():
        hold_same(m, name, statistics[name], b)


def test_compiled_under_autocast(network: Part) -> None:
    """One graph of the step. Without code generation, which takes minutes: bench_xception does it."""
    x, losses = pictures(), []
    m: Any = network.chained(True)
    torch._dynamo.reset()
    compiled: Any = torch.compile(copy.deepcopy(m), fullgraph=True, backend="aot_eager")
    for either in (m, compiled):
        with torch.autocast(PLACE.device, torch.bfloat16):
            loss = nn.functional.cross_entropy(either(x).float(), torch.arange(len(x), device=PLACE.device))
        loss.backward()
        losses.append(loss.item())
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in either.parameters())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
