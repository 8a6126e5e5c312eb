"""Every test of the chain draws its numbers from a seed of its own."""

from __future__ import annotations

import os
import zlib

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(zlib.crc32(request.node.name.encode()) + int(os.environ.get("XSEP_SEED", "0")))
