"""DistributedDataParallel and FSDP on two gloo processes: the gradients are those of one process with all pictures."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests import two_processes

from .models import network, pictures

WORLD = 2
STEPS = 2


def batches() -> list[Tensor]:
    torch.manual_seed(23)
    return [pictures(2 * WORLD) for _ in range(STEPS)]


def sharded(model: nn.Module) -> Any:
    """Each rank has a part of every parameter; a layer's are brought together around its forward and its backward."""
    from torch.distributed.device_mesh import init_device_mesh  # not where PyTorch has no distributed
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    for child in model.children():
        fully_shard(child, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ddp": partial(DistributedDataParallel, broadcast_buffers=False), "fsdp": sharded
}  # fmt: skip


def whole(t: Any) -> Tensor:
    """Of a sharded tensor all of it."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def work(rank: int, folder: str, way: str) -> None:
    model = WAYS[way](network().eval())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for batch in batches():
        optimizer.zero_grad()
        model(batch[2 * rank : 2 * rank + 2]).square().mean().backward()
        optimizer.step()
    module = model.module if isinstance(model, DistributedDataParallel) else model
    result = {name: (whole(p.grad), whole(p.detach())) for name, p in module.named_parameters()}
    torch.save(result, Path(folder) / f"rank{rank}.pt")


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this PyTorch has no gloo")
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_have_the_gradients_of_one(way: str, tmp_path: Path) -> None:
    two_processes.run(partial(work, way=way), tmp_path)
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
