"""Many Python threads on one layer, any number of OpenMP threads, forked children."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

import xsep

ROOT = Path(__file__).parent.parent.parent
THREADS = 16


@pytest.fixture
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def results(layer: xsep.FusedSeparableConv2d, x: Tensor, dy: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], dy)]


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_share_a_layer(dtype: torch.dtype, training: bool, backend: str) -> None:
    """Each with a picture of its own, all starting at once on a layer that nobody has called before."""
    torch.manual_seed(5)
    layer = xsep.FusedSeparableConv2d(24, 40, 3, padding=1, prologue_activation="relu", backend=backend, dtype=dtype)
    layer.train(training)
    xs = [torch.randn(1 + i % 3, 24, 9 + i % 4, 11).to(dtype) for i in range(THREADS)]
    dys = [torch.randn(x.shape[0], 40, *x.shape[2:]).to(dtype) for x in xs]
    start = threading.Barrier(THREADS)

    def once(i: int) -> list[Tensor]:
        if training:
            return results(layer, xs[i], dys[i])
        with torch.inference_mode():
            return [layer(xs[i])]

    def work(i: int) -> list[Tensor]:
        start.wait()
        return [t for _ in range(5 if training else 15) for t in once(i)]

    with ThreadPoolExecutor(THREADS) as pool:
        together = list(pool.map(work, range(THREADS)))
    for i, found in enumerate(together):
        alone = once(i)
        for j, t in enumerate(found):
            expected = alone[j % len(alone)].double()
            error = float((t.double() - expected).abs().max())
            assert error <= 4 * torch.finfo(dtype).eps * float(expected.abs().max()), f"thread {i}, result {j}"


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_results_repeat_bit_for_bit(stride: int, dtype: torch.dtype) -> None:
    """On any number of threads, each time the same; from one number to another only as far as no matrix product of
    PyTorch's is in it, as that adds up in another order on three threads than on one."""
    torch.manual_seed(6)
    layer = xsep.FusedSeparableConv2d(
        37, 70, 3, stride, 1, middle_activation="silu", prologue_activation="relu", backend="cpu", dtype=dtype
    )
    x = torch.randn(3, 37, 21, 19).to(dtype)
    dy = torch.randn(layer(x).shape).to(dtype)
    dz = torch.randn(3, 37, *dy.shape[2:]).to(dtype)
    firsts = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        first = results(layer, x, dy)
        for _ in range(2):
            for name, a, b in zip(("y", "dx", "dw_dw", "dw_pw", "dbias"), results(layer, x, dy), first):
                assert torch.equal(a, b), f"{name} on {threads} threads"
        leaves = [x.detach().requires_grad_(), layer.conv_dw.weight]
        z = xsep.depthwise_conv2d(
            *leaves, stride=stride, padding=1, prologue=xsep.ChannelAffine(activation="relu"), backend="cpu"
        )
        firsts.append([z.detach(), *torch.autograd.grad(z, leaves, dz)])
        for name, a, b in zip(("z", "dx", "dw_dw"), firsts[0], firsts[-1]):
            assert torch.equal(a, b), f"{name} of the depthwise op on {threads} threads"


FORK = """
import os, sys, torch, xsep
torch.set_num_threads(2)
torch.manual_seed(0)
layer = xsep.FusedSeparableConv2d(24, 40, 3, padding=1, backend=sys.argv[1])
x = torch.randn(4, 24, 31, 33)
def run():
    v = x.clone().requires_grad_()
    y = layer(v)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [v, *layer.parameters()])]
before = run()
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    close = all(torch.allclose(a, b, rtol=1e-4, atol=1e-3) for a, b in zip(run(), before))
    os._exit(0 if close else 3)
_, status = os.waitpid(child, 0)
again = all(torch.allclose(a, b, rtol=1e-4, atol=1e-3) for a, b in zip(run(), before))
sys.exit(os.waitstatus_to_exitcode(status) or (0 if again else 4))
"""


def test_a_forked_child_computes(backend: str) -> None:
    """After the parent's threads are up. The child sets one thread first: without that conv2d itself hangs there."""
    done = subprocess.run([sys.executable, "-c", FORK, backend], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


class Pictures(torch.utils.data.Dataset[Tensor]):
    """Pictures that went through a layer in the worker that loads them."""

    def __init__(self, layer: xsep.FusedSeparableConv2d) -> None:
        self.layer = layer

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> Tensor:
        g = torch.Generator().manual_seed(i)
        with torch.no_grad():
            y: Tensor = self.layer(torch.randn(1, 24, 9, 10, generator=g))[0]
        return y


def test_workers_of_a_data_loader_compute(backend: str) -> None:
    layer = xsep.FusedSeparableConv2d(24, 10, 3, backend=backend)
    pictures = Pictures(layer)
    expected = torch.stack([pictures[i] for i in range(6)])  # the parent's threads are up now
    loader = torch.utils.data.DataLoader(
        pictures, batch_size=3, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    torch.testing.assert_close(torch.cat(list(loader)), expected, rtol=1e-5, atol=1e-5)
