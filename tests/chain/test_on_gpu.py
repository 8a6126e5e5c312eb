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

from tests.gpu import PLACE, needs_card, never_waiting
from xsep import card_check
from xsep.card_check import Part, step
from xsep.testing import float32_products

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    cudnn: Any = torch.backends.cudnn
    before, cudnn.deterministic = cudnn.deterministic, True  # of the stem, whose gradient may else be of atomic adds
    try:
        with float32_products("ieee"):
            yield
    finally:
        cudnn.deterministic = before


@pytest.fixture(params=PLACE.backends)
def network(request: pytest.FixtureRequest) -> Part:
    return card_check.network(request.param, torch.float32, PLACE.device, PLACE.channels)[0]


def pictures() -> Tensor:
    n, h, w = PLACE.pictures
    return torch.randn(n, 3, h, w, device=PLACE.device).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", PLACE.backends)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_one_step_is_that_of_the_plain_network(backend: str, kind: torch.dtype) -> None:
    # The emulator's are so few values that float32 gets on with all sizes there.
    size = card_check.FLOAT32_PICTURES if kind is torch.float32 and not PLACE.emulated else PLACE.pictures
    m, x = card_check.network(backend, kind, PLACE.device, PLACE.channels, size)
    assert not card_check.network_failures(m, x)
    if promises_bits(m):
        first, again = (step(copy.deepcopy(m).chained(True), x) for _ in range(2))
        assert all(torch.equal(again[what], first[what]) for what in first), "not the same bits twice"


def promises_bits(m: Part) -> bool:
    """PyTorch's own convolutions promise none; the stem, which is one of them, is asked for them by the fixture."""
    return bool(m.blocks[0].pairs()[0][0].backend != "aten")  # type: ignore[operator]


def hold_same(network: Part, name: str, found: Tensor, expected: Tensor) -> None:
    """The same bits where they are promised; else what rounding carries over a ReLU may differ, through 11 layers."""
    if promises_bits(network):
        assert torch.equal(found, expected), name
    else:
        difference = float((found.double() - expected.double()).norm())
        assert difference <= 2e-2 * float(expected.double().norm()), name


def test_a_step_does_not_wait_for_the_card(network: Part) -> None:
    m, x = network.chained(True), pictures()
    m(x).square().sum().backward()  # what is asked once
    with never_waiting("cuda_chain_bn_finalize", "cuda_chain_depthwise_bprop", "cuda_chain_bn_pool_add"):
        m(x).square().sum().backward()


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
