"""The swap on models people have: timm's, torchvision's, segmentation_models_pytorch's, where they can be imported."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from xsep.swap import swap_separable_convs, unswap

from .conftest import NIGHTLY
from .peers import peer
from .swap_patterns import fused_calls, results


def with_torchvision(name: str) -> Any:
    """A peer that needs torchvision, or a skip with the reason.

    Beside a CPU-only PyTorch, torchvision's compiled part does not load, and its import ends at the first operator that
    part would have declared. No model here calls one, so a declaration alone lets the models be imported.
    """
    for _ in range(20):
        try:
            __import__("torchvision")
        except RuntimeError as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if missing is None:
                break
            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define(f"{missing[1]}(Tensor x) -> Tensor")
            LIBRARIES.append(library)
            for module in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
                del sys.modules[module]
        except ImportError:
            break
        else:
            break
    return peer(name)


#: A declaration lasts as long as its library object.
LIBRARIES: list[Any] = []


def timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: with_torchvision("timm").create_model(name, **options)


def torchvision(name: str) -> Callable[[], nn.Module]:
    return lambda: getattr(with_torchvision("torchvision").models, name)()


def deeplab() -> nn.Module:
    smp = with_torchvision("segmentation_models_pytorch")
    return smp.DeepLabV3Plus("resnet18", encoder_weights=None)


slow = pytest.mark.skipif(not NIGHTLY, reason="large: in make test-nightly")
MODELS = [
    # model, pairs without fold_bn, pairs with, side of the picture
    pytest.param(timm("legacy_xception"), 34, 34, 96, id="timm-legacy_xception"),
    pytest.param(timm("xception65p"), 63, 63, 96, id="timm-xception65p", marks=slow),
    # Sixteen more of its convolutions pad in a forward of their own (Conv2dSame), and are left alone.
    pytest.param(timm("nasnetalarge"), 204, 204, 96, id="timm-nasnetalarge", marks=slow),
    pytest.param(timm("mobilenetv1_100"), 0, 13, 64, id="timm-mobilenetv1"),
    pytest.param(timm("mobilenetv2_100"), 0, 17, 64, id="timm-mobilenetv2"),
    # The other eight of its blocks have a squeeze-excite between.
    pytest.param(timm("mobilenetv3_large_100"), 0, 7, 64, id="timm-mobilenetv3"),
    pytest.param(torchvision("mobilenet_v2"), 0, 17, 64, id="torchvision-mobilenet_v2"),
    pytest.param(deeplab, 5, 5, 64, id="smp-deeplabv3plus"),
]


def trained_looking(model: nn.Module) -> nn.Module:
    """Batch norms with statistics and weights that matter; in eval mode."""
    torch.manual_seed(0)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            with torch.no_grad():
                norm.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
                norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
                norm.weight.normal_(1, 0.2)
                norm.bias.normal_(0, 0.1)
    return model.eval()


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("make, kept, folded, side", MODELS)
def test_same_outputs_and_keys(make: Callable[[], nn.Module], kept: int, folded: int, side: int) -> None:
    model = trained_looking(make())
    x = torch.randn(1, 3, side, side)
    keys, classes = list(model.state_dict()), [type(m) for m in model.modules()]
    with torch.no_grad():
        expected = model(x)
        for fold_bn, pairs in ((False, kept), (True, folded)):
            report = swap_separable_convs(model, fold_bn, report=False)
            assert len(report) == pairs, str(report)
            assert all(m.reason for m in report.missed)
            assert fused_calls(model, x) == pairs
            assert relative_error(model(x), expected) <= 1e-5
            assert list(model.state_dict()) == keys
    unswap(model)
    assert [type(m) for m in model.modules()] == classes


@pytest.mark.parametrize(
    "make, side",
    [
        pytest.param(timm("legacy_xception", num_classes=7), 71, id="timm-legacy_xception", marks=slow),
        pytest.param(timm("mobilenetv2_100", num_classes=7), 33, id="timm-mobilenetv2"),
    ],
)
def test_same_gradients(make: Callable[[], nn.Module], side: int) -> None:
    """In float64, where no activation is so near its kink that rounding decides on which side it is."""
    truth = trained_looking(make()).double()
    model = copy.deepcopy(truth)
    assert len(swap_separable_convs(model, True, report=False)) > 0
    x = torch.randn(1, 3, side, side, dtype=torch.float64)
    expected = results(truth, x)
    got = results(model, x, expected["dy"])
    for name, theirs in expected.items():
        assert relative_error(got[name], theirs) <= 1e-9, name


def test_features_only_taps_get_the_true_values() -> None:
    truth = trained_looking(timm("mobilenetv2_100", features_only=True)())
    model = copy.deepcopy(truth)
    assert len(swap_separable_convs(model, True, report=False)) == 17
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for ours, theirs in zip(model(x), truth(x), strict=True):
            assert relative_error(ours, theirs) <= 1e-5


def test_hooked_feature_taps_get_the_true_values() -> None:
    """timm's other way of taking features: hooks inside the blocks, here before the pointwise convolution."""
    make = timm("mobilenetv2_100", features_only=True, feature_location="expansion")
    truth = trained_looking(make())
    model = copy.deepcopy(truth)
    report = swap_separable_convs(model, True, report=False)
    assert 0 < len(report) < 17
    assert any("hooks" in m.reason for m in report.missed)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for ours, theirs in zip(model(x), truth(x), strict=True):
            assert relative_error(ours, theirs) <= 1e-5
