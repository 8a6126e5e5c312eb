"""A function run in two processes that are joined by gloo, with an end whatever happens."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

#: Seconds after which the processes are ended and the test fails.
DEADLINE = 180


def run(work: Callable[[int, str], None], folder: Path) -> None:
    """Calls ``work(rank, folder)`` in two processes of one thread each; an error there is raised here.

    Raises:
        TimeoutError: they had not ended by the deadline.
    """
    context = mp.spawn(_joined, args=(work, str(folder)), nprocs=2, join=False)
    assert context is not None
    end = time.monotonic() + DEADLINE
    while not context.join(timeout=max(0.1, end - time.monotonic())):
        if time.monotonic() > end:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"two processes had not ended after {DEADLINE} s")


def _joined(rank: int, work: Callable[..., Any], folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    try:
        # It returns before the group is destroyed: a DistributedDataParallel that outlives it destroys gloo's threads
        # while it holds the interpreter's lock, for which one of them may be waiting (PyTorch 2.13; seen in one run of
        # three).
        work(rank, folder)
    finally:
        dist.destroy_process_group()
