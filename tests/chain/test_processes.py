"""Two processes with gloo: SyncBatchNorm in a chain, and DistributedDataParallel around one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import two_processes
from tests.chain.support import relative, scatter
from xsep.chain import SeparableChain, SeparableConvBN
from xsep.models.blocks import Block, Design, MaxPool

#: What each of the two processes gets of the batch of five.
SHARES = (slice(0, 2), slice(2, 5))


class Network(nn.Module):
    """A pooled block, a middle block and two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.down = Block(5, 8, 2, Design(), pool=MaxPool("torch"))
        self.middle = Block(8, 8, 3, Design())
        self.end = SeparableChain(SeparableConvBN(8, 9), SeparableConvBN(9, 6, momentum=None))
        self.down.chain = self.middle.chain = True

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.middle(self.down(x)))


def network() -> tuple[Any, Tensor, Tensor]:
    """The same in every process: a network, its batch, and the gradient of its output."""
    torch.manual_seed(7)
    m = scatter(Network().double())
    return m, torch.randn(5, 5, 13, 11, dtype=torch.float64), torch.randn(5, 6, 7, 6, dtype=torch.float64)


def results(m: Any, x: Tensor) -> dict[str, Tensor]:
    found = {f"d{k.removeprefix('module.')}": p.grad for k, p in m.named_parameters() if p.grad is not None}
    found |= {k.removeprefix("module."): b for k, b in m.named_buffers()}
    assert x.grad is not None
    return {**found, "dx": x.grad}


def worker(rank: int, folder: str) -> None:
    m, x, g = network()
    synchronised: Any = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(m))
    assert synchronised.down.not_chained_reasons(torch.float64) == []
    assert not synchronised.end.not_chained_reasons(x)
    share = x[SHARES[rank]].clone().requires_grad_()
    y = synchronised(share)
    y.backward(g[SHARES[rank]])
    torch.save({"y": y.detach(), **results(synchronised, share)}, f"{folder}/synchronised{rank}")

    # All pictures in one process, none in the other: it has to take part all the same.
    everything: Any = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(m))
    pictures = slice(0, 5) if rank == 0 else slice(5, 5)
    share = x[pictures].clone().requires_grad_()
    y = everything(share)
    y.backward(g[pictures])
    torch.save({"y": y.detach(), **results(everything, share)}, f"{folder}/one_empty{rank}")

    parallel = nn.parallel.DistributedDataParallel(m)
    for _ in range(2):
        share = x[SHARES[rank]].clone().requires_grad_()
        parallel.zero_grad()
        parallel(share).backward(g[SHARES[rank]])
    torch.save(results(parallel, share), f"{folder}/parallel{rank}")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("processes")
    two_processes.run(worker, folder)
    return {
        k: [torch.load(Path(folder, f"{k}{rank}")) for rank in (0, 1)]
        for k in ("synchronised", "one_empty", "parallel")
    }


@pytest.mark.parametrize("kind", ["synchronised", "one_empty"])
def test_sync_batch_norm_is_the_whole_batch(found: dict[str, list[dict[str, Tensor]]], kind: str) -> None:
    """Unequal shares; the reference is one process, not chained, with the whole batch."""
    m, x, g = network()
    m.down.chain = m.middle.chain = False
    x.requires_grad_()
    y = m.middle(m.down(x))
    for layer in m.end:
        y = layer.bn(layer.conv(y))
    y.backward(g)
    truth = {"y": y.detach(), **results(m, x)}
    ranks = found[kind]
    for what, expected in truth.items():
        a, b = (r[what] for r in ranks)
        if what in ("y", "dx"):
            got = torch.cat([a, b])
        elif what.startswith("d") and what in {f"d{k}" for k, _ in m.named_parameters()}:
            got = a + b  # each process has the gradient of its own pictures
        else:
            assert torch.equal(a, b), what
            got = a
        assert relative(got.double(), expected.double()) <= 1e-10, what


def test_distributed_data_parallel(found: dict[str, list[dict[str, Tensor]]]) -> None:
    """Gradients are the average of what two single processes would have; buffers those of the first."""
    m, x, g = network()
    alone: list[dict[str, Tensor]] = []
    for share in SHARES:
        one = copy.deepcopy(m)
        for _ in range(2):
            part = x[share].clone().requires_grad_()
            one.zero_grad()
            one(part).backward(g[share])
        alone.append({k: v.clone() for k, v in results(one, part).items()})
    parameters = {f"d{k}" for k, _ in m.named_parameters()}
    for what in parameters:
        expected = (alone[0][what] + alone[1][what]) / 2
        for rank in found["parallel"]:
            assert relative(rank[what], expected) <= 1e-10, what
    for what in set(alone[0]) - parameters - {"dx"}:
        assert relative(found["parallel"][0][what].double(), alone[0][what].double()) <= 1e-10, what
