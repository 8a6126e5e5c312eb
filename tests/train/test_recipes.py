"""The recipes' numbers are the paper's, and what becomes of them in optimiser, learning rate and average."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from xsep.train import PRESETS

pytest.importorskip("lightning", reason="training needs Lightning: pip install 'xsep[train]'")

from xsep.train.network import SmallXception, build
from xsep.train.optimisation import Polyak, optimizer, rate_factor
from xsep.train.presets import Decay


def test_the_papers_numbers() -> None:
    imagenet, jft = PRESETS["imagenet"], PRESETS["jft"]
    assert (imagenet.optimizer, imagenet.momentum, imagenet.lr) == ("sgd", 0.9, 0.045)
    assert imagenet.decay == Decay(0.94, epochs=2)
    assert (jft.optimizer, jft.momentum, jft.lr) == ("rmsprop", 0.9, 0.001)
    assert jft.decay == Decay(0.9, samples=3_000_000)
    assert [p.weight_decay for p in (imagenet, jft)] == [1e-5, 1e-5]
    assert [p.dropout for p in (imagenet, jft)] == [0.5, 0.0]
    assert [p.size for p in (imagenet, jft)] == [299, 299]
    assert [p.multilabel for p in (imagenet, jft)] == [False, True]


def test_imagenet_rate_by_epochs() -> None:
    """10 steps an epoch: the rate changes behind the second, the fourth, ... epoch, and nowhere else."""
    decay = PRESETS["imagenet"].decay
    found = [0.045 * rate_factor(decay, step, 10, 32) for step in range(61)]
    expected = [0.045] * 20 + [0.0423] * 20 + [0.039762] * 20 + [0.03737628]
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("devices, first", [(1, 46875), (8, 5860)], ids=["one_device", "eight_devices"])
def test_jft_rate_by_pictures_of_all_devices(devices: int, first: int) -> None:
    """64 a device: the first step that has 3 million pictures behind it is 3e6 / 64 / devices, rounded up."""
    decay, pictures = PRESETS["jft"].decay, 64 * devices
    assert rate_factor(decay, first - 1, 10**9, pictures) == 1.0
    assert rate_factor(decay, first, 10**9, pictures) == 0.9
    assert rate_factor(decay, 10 * first, 10**9, pictures) == pytest.approx(0.9**10)


class Two(nn.Module):
    """A filter and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(1, 1)
        nn.init.constant_(self.fc.weight, 2.0)
        nn.init.constant_(self.fc.bias, 3.0)


def stepped(name: str, gradients: list[float]) -> tuple[float, float]:
    """Weight and bias behind steps with these gradients of both."""
    network = Two().double()
    made = optimizer(PRESETS[name], network, PRESETS[name].lr)
    for g in gradients:
        network.fc.weight.grad = torch.full((1, 1), g, dtype=torch.float64)
        network.fc.bias.grad = torch.full((1,), g, dtype=torch.float64)
        made.step()
    return float(network.fc.weight.detach()), float(network.fc.bias.detach())


def test_sgd_by_hand() -> None:
    """Momentum 0.9 and rate 0.045; 1e-5 of the weight, and nothing of the bias, joins its gradient."""
    w, b, mw, mb = 2.0, 3.0, 0.0, 0.0
    for g in (0.5, -1.0, 0.25):
        mw, mb = 0.9 * mw + g + 1e-5 * w, 0.9 * mb + g
        w, b = w - 0.045 * mw, b - 0.045 * mb
    assert stepped("imagenet", [0.5, -1.0, 0.25]) == pytest.approx((w, b), rel=1e-13)


def test_rmsprop_by_hand() -> None:
    w, b = 2.0, 3.0
    squares, moments = [0.0, 0.0], [0.0, 0.0]
    for g in (0.5, -1.0, 0.25):
        steps = []
        for i, d in enumerate((g + 1e-5 * w, g)):
            squares[i] = 0.9 * squares[i] + 0.1 * d * d
            moments[i] = 0.9 * moments[i] + d / (squares[i] ** 0.5 + 1e-8)
            steps.append(0.001 * moments[i])
        w, b = w - steps[0], b - steps[1]
    assert stepped("jft", [0.5, -1.0, 0.25]) == pytest.approx((w, b), rel=1e-13)


def test_only_filters_and_classifier_decay() -> None:
    network = SmallXception(10)
    decayed, free = optimizer(PRESETS["imagenet"], network, 0.1).param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (1e-5, 0.0)
    named = {id(p): name for name, p in network.named_parameters()}
    assert all(named[id(p)].endswith("weight") and "bn" not in named[id(p)] for p in decayed["params"])
    assert len(decayed["params"]) + len(free["params"]) == len(named)
    assert (
        sum(p.numel() for p in free["params"])
        == 2 * sum(m.num_features for m in network.modules() if isinstance(m, nn.BatchNorm2d)) + 10
    )


def test_polyaks_average_by_hand() -> None:
    """The first step is taken over; then the decay is (1 + n) / (10 + n), until it reaches its limit."""
    from torch.optim.swa_utils import AveragedModel

    network: Any = nn.BatchNorm1d(1)
    average: Any = AveragedModel(network, use_buffers=True, **Polyak(0.4)._kwargs)
    expected = 0.0
    for n, value in enumerate((1.0, 2.0, 0.5, -1.0, 3.0, 0.25, 7.0)):
        nn.init.constant_(network.weight, value)
        network.running_mean.fill_(-value)
        network.num_batches_tracked += 1
        average.update_parameters(network)
        decay = 0.0 if n == 0 else min(0.4, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * value
        assert float(average.module.weight.detach()) == pytest.approx(expected, rel=1e-6)
        assert float(average.module.running_mean) == pytest.approx(-expected, rel=1e-6)
    assert int(average.module.num_batches_tracked) == 7


def test_the_small_network_is_the_same_chained() -> None:
    """Loss, every gradient and the running statistics, at an odd size."""
    torch.manual_seed(1)
    plain = SmallXception(7).double()
    for p in plain.parameters():
        nn.init.normal_(p, 0.1, 0.3)
    chained = copy.deepcopy(plain)
    chained.chain = True
    x = torch.randn(5, 1, 11, 9, dtype=torch.float64)
    for network in (plain, chained):
        network(x).square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), chained.parameters()):
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-8, atol=1e-8 * float(a.grad.abs().max()), msg=name)
    for (name, a), b in zip(plain.named_buffers(), chained.buffers()):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-12, msg=name)
    torch.testing.assert_close(chained.eval()(x), plain.eval()(x))


def test_presets_build_their_networks() -> None:
    small = build("small", 10, 0.5, True)
    assert isinstance(small, SmallXception) and sum(p.numel() for p in small.parameters()) == 27_274
    xception = build("xception", 1000, 0.5, True)
    assert sum(p.numel() for p in xception.parameters()) == 22_855_952
    assert (xception.drop_rate, xception.chain) == (0.5, True)
