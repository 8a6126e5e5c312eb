"""DistributedDataParallel on two gloo processes: the gradients are those of one process with all the pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests import two_processes

from .models import network, pictures

WORLD = 2
STEPS = 2


def batches() -> list[torch.Tensor]:
    torch.manual_seed(23)
    return [pictures(2 * WORLD) for _ in range(STEPS)]


def work(rank: int, folder: str) -> None:
    model = DistributedDataParallel(network().eval(), broadcast_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for batch in batches():
        optimizer.zero_grad()
        model(batch[2 * rank : 2 * rank + 2]).square().mean().backward()
        optimizer.step()
    result = {name: (p.grad, p.detach()) for name, p in model.module.named_parameters()}
    torch.save(result, Path(folder) / f"rank{rank}.pt")


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this PyTorch has no gloo")
def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    two_processes.run(work, tmp_path)
    model = network().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for batch in batches():
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(WORLD)]
    for name, p in model.named_parameters():
        for gradient, weight in (r[name] for r in ranks):
            torch.testing.assert_close(gradient, p.grad, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(weight, p.detach(), rtol=1e-5, atol=1e-6)
        assert torch.equal(ranks[0][name][0], ranks[1][name][0])
