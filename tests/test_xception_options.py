"""Xception as a backbone, the experiments of its paper, and pretrained weights: shapes, counts, gradients, numbers."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xsep.models import WeightsError, xception
from xsep.models.experiments import SpectrumConv2d
from xsep.models.xception import MaxPool
from xsep.modules import FusedSeparableConv2d

from .plain_xception import randomize

FULL = 22_855_952
#: C_in -> C_out of the 34, in order.
WIDTHS = [
    (64, 128), (128, 128), (128, 256), (256, 256), (256, 728), (728, 728), *24 * [(728, 728)],
    (728, 728), (728, 1024), (1024, 1536), (1536, 2048),
]  # fmt: skip
#: Parameters of the four residual convolutions and their BatchNorms.
SKIPPED = sum(a * b + 2 * b for a, b in ((64, 128), (128, 256), (256, 728), (728, 1024)))
DEPTHWISE = sum(9 * a for a, _ in WIDTHS)
POINTWISE = sum(a * b for a, b in WIDTHS)

OPTIONS: dict[str, tuple[dict[str, Any], int]] = {
    "middle-relu": (dict(middle_activation="relu"), FULL),
    "middle-elu": (dict(middle_activation="elu"), FULL),
    "no-residual": (dict(residual=False), FULL - SKIPPED),
    "fc": (dict(fc_layers=(4096, 4096)), FULL + (2048 + 1 + 4096 + 1) * 4096 + 2048 * 1000),
    "pointwise-first": (dict(order="pointwise_first"), FULL - DEPTHWISE + sum(9 * b for _, b in WIDTHS)),
    "regular": (dict(segments=1), FULL - DEPTHWISE - POINTWISE + 9 * POINTWISE),
    "four-segments": (dict(segments=4), FULL - DEPTHWISE + sum(9 * a * a // 4 for a, _ in WIDTHS)),
    "eight-segments-pointwise-first": (
        dict(segments=8, order="pointwise_first"), FULL - DEPTHWISE + sum(9 * b * b // 8 for _, b in WIDTHS),
    ),
    "stride-8": (dict(output_stride=8), FULL),
    "stride-16": (dict(output_stride=16), FULL),
    "vgg-like": (dict(residual=False, middle_activation="relu", global_pool="max"), FULL - SKIPPED),
}  # fmt: skip


@pytest.mark.parametrize("options, count", OPTIONS.values(), ids=OPTIONS)
def test_parameter_count(options: dict[str, Any], count: int) -> None:
    with torch.device("meta"):
        model = xception(**options)
    assert sum(p.numel() for p in model.parameters()) == count
    assert len(list(model.separable_layers())) == len(WIDTHS) == 34


@pytest.mark.parametrize("options", [o for o, _ in OPTIONS.values()], ids=OPTIONS)
def test_shape_and_gradient_flow(options: dict[str, Any]) -> None:
    if "fc_layers" in options:
        options = {**options, "fc_layers": (31, 17)}
    model = xception(num_classes=3, **options).train()
    x = torch.randn(2, 3, 73, 85, requires_grad=True)
    logits = model(x)
    assert logits.shape == (2, 3)
    F.cross_entropy(logits, torch.tensor([0, 2])).backward()
    for name, p in [("x", x), *model.named_parameters()]:
        assert p.grad is not None and bool(p.grad.isfinite().all()) and bool(p.grad.any()), name


def by_hand(layer: SpectrumConv2d, x: Tensor, middle: Any, first: str, groups: tuple[int, int]) -> Tensor:
    spatial, pointwise = layer.conv1.weight, layer.pointwise.weight if layer.pointwise is not None else None
    d = layer.dilation

    def conv(y: Tensor, groups: int) -> Tensor:
        return F.conv2d(y, spatial, None, 1, d, d, groups)

    y = F.relu(x) if layer.prologue_activation else x
    if pointwise is None:
        return conv(y, 1)
    if first == "pointwise":
        return conv(middle(F.conv2d(y, pointwise)), groups[1])
    return F.conv2d(middle(conv(y, groups[0])), pointwise)


@pytest.mark.parametrize("relu", [True, False], ids=["relu-first", "no-relu"])
@pytest.mark.parametrize("segments", [None, 1, 2, 8])
@pytest.mark.parametrize("first", ["depthwise", "pointwise"])
@pytest.mark.parametrize("middle", [None, "elu"])
def test_spectrum_by_hand(relu: bool, segments: Any, first: str, middle: Any) -> None:
    layer = SpectrumConv2d(
        16, 24, dilation=2, prologue_activation="relu" if relu else None, middle_activation=middle,
        pointwise_first=first == "pointwise", segments=segments, backend=None,
    ).double()  # fmt: skip
    act = F.elu if middle else F.relu if first == "pointwise" else lambda y: y
    x = torch.randn(2, 16, 11, 7, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(2, 24, 11, 7, dtype=torch.float64)
    groups = (segments, segments) if segments else (16, 24)
    leaves = [x, *layer.parameters()]
    results = []
    for y in (layer(x), by_hand(layer, x, act, first, groups)):
        results.append([y, *torch.autograd.grad(y, leaves, dy)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", [None, "relu", "elu"])
def test_middle_activation_reaches_all_layers(activation: Any) -> None:
    layers = [conv for conv, _ in xception(num_classes=0, middle_activation=activation).separable_layers()]
    assert all(isinstance(c, FusedSeparableConv2d) and c.middle_activation == activation for c in layers)


def test_no_residual_is_the_main_path_alone() -> None:
    """Against the network with residuals, its weights shared: what the residual added is missing, and no more."""
    plain, full = xception(num_classes=0, residual=False), xception(num_classes=0)
    randomize(full)
    plain.load_state_dict({k: t for k, t in full.state_dict().items() if ".skip" not in k})
    plain, full = plain.double().eval(), full.double().eval()
    x = torch.randn(2, 728, 9, 11, dtype=torch.float64)
    shortcut = nn.Sequential(full.get_submodule("block12.skip"), full.get_submodule("block12.skipbn"))
    with torch.no_grad():
        for name, residual in (("block7", x), ("block12", shortcut(x))):
            parts = plain.get_submodule(name)(x) + residual
            torch.testing.assert_close(full.get_submodule(name)(x), parts, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pool", ["torch", "same"])
@pytest.mark.parametrize("size", [(71, 96), (99, 83)], ids=["71x96", "99x83"])
@pytest.mark.parametrize("stride", [8, 16])
def test_dilation_computes_the_strided_network_in_between(stride: int, size: tuple[int, int], pool: str) -> None:
    """Every second (fourth) pixel of what the dilated network gives is what the strided one gives, border included."""
    strided = xception(num_classes=0, pool_padding=pool)
    randomize(strided)
    dilated = xception(num_classes=0, pool_padding=pool, output_stride=stride)
    dilated.load_state_dict(strided.state_dict())
    x = torch.randn(1, 3, *size, dtype=torch.float64)
    step = 32 // stride
    with torch.no_grad():
        sparse, dense = (m.double().eval().forward_features(x) for m in (strided, dilated))
    assert dense.shape[2] > sparse.shape[2] and dense.shape[3] > sparse.shape[3]
    torch.testing.assert_close(dense[:, :, ::step, ::step], sparse, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("stride, sizes", [(32, (37, 19, 10)), (16, (37, 19, 19)), (8, (37, 37, 37))])
def test_feature_info(stride: int, sizes: tuple[int, ...]) -> None:
    with torch.device("meta"):
        model = xception(num_classes=0, output_stride=stride, backend="aten").eval()
        maps = model.features(torch.randn(1, 3, 299, 299))
    info = model.feature_info
    assert [f.shape[1] for f in maps] == [i["num_chs"] for i in info] == [64, 128, 256, 728, 2048]
    assert [f.shape[-1] for f in maps] == [147, 74, *sizes]
    assert [i["reduction"] for i in info] == [2, 4, 8, min(16, stride), stride]
    assert all(abs(299 / i["reduction"] - f.shape[-1]) <= 2.5 for i, f in zip(info, maps))
    modules = dict(model.named_modules())
    assert all(i["module"] in modules for i in info)


def test_head_with_layers_and_maximum() -> None:
    model = xception(num_classes=5, fc_layers=(13, 11), global_pool="max").eval()
    y = torch.randn(3, 2048, 2, 3)
    state = model.state_dict()
    hidden = y.amax((2, 3))
    for i in (0, 1):
        hidden = F.relu(F.linear(hidden, state[f"fc_layers.{i}.0.weight"], state[f"fc_layers.{i}.0.bias"]))
    torch.testing.assert_close(model.forward_head(y, pre_logits=True), hidden)
    torch.testing.assert_close(model.forward_head(y), F.linear(hidden, state["fc.weight"], state["fc.bias"]))
    assert xception(num_classes=0, fc_layers=(13, 11)).eval().forward_head(y).shape == (3, 11)


@pytest.mark.parametrize("options", [dict(residual=False), dict(middle_activation="elu"), dict(order="pointwise_first"),
                                     dict(segments=2), dict(output_stride=8)], ids=lambda o: "-".join(o))  # fmt: skip
def test_folding_changes_rounding_only(options: dict[str, Any]) -> None:
    model = xception(num_classes=3, **options).double().eval()
    randomize(model)
    x = torch.randn(1, 3, 71, 79, dtype=torch.float64)
    with torch.no_grad():
        before = model(x)
        torch.testing.assert_close(model.fold_batchnorm()(x), before, rtol=1e-11, atol=1e-11)
    folded = sum(bn.folded_scale is not None for _, bn in model.separable_layers())
    assert folded == (0 if {"order", "segments"} & set(options) else 34)


@pytest.mark.parametrize(
    "options, why",
    [
        (dict(global_pool="sum"), "global_pool.*avg, max.*'sum'"),
        (dict(fc_layers=(4096, 0)), "fc_layers"),
        (dict(fc_layers=5), "fc_layers must be a sequence of widths, got 5"),
        (dict(fc_layers="ab"), "each width in fc_layers must be an int, got 'a'"),
        (dict(fc_layers=(64, 1.5)), "each width in fc_layers must be an int, got 1.5"),
        (dict(num_classes="10"), "num_classes must be an int, got '10'"),
        (dict(num_classes=True), "num_classes must be an int, got True"),
        (dict(in_chans=3.0), "in_chans must be an int, got 3.0"),
        (dict(drop_rate="0.5"), "drop_rate must be a finite real number, got '0.5'"),
        (dict(bn_eps=float("nan")), "bn_eps must be a finite real number, got nan"),
        (dict(residual="no"), "residual must be one of True, False, got 'no'"),
        (dict(segments=2.0), "segments must be an int, got 2.0"),
        (dict(output_stride=32.0), "output_stride must be an int, got 32.0"),
        (dict(middle_activation="tanh"), "middle_activation.*relu.*'tanh'"),
        (dict(order="both"), "order.*pointwise_first.*'both'"),
        (dict(segments=3), "segments.*1, 2, 4, 8.*3"),
        (dict(output_stride=4), "output_stride.*8, 16, 32.*4"),
        (dict(segments=2, backend="metal"), "backend.*metal"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_unknown_options_are_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        xception(**options)


def test_numbers_of_numpy_are_numbers() -> None:
    with torch.device("meta"):
        model = xception(
            num_classes=np.int64(3), in_chans=np.int64(1), drop_rate=np.float32(0.5), fc_layers=(np.int64(17),),
            segments=np.int64(2), output_stride=np.int64(16),
        )  # fmt: skip
    assert model.state_dict()["fc.weight"].shape == (3, 17)
    assert type(model.num_classes) is int and type(model.output_stride) is int


# Pretrained


@pytest.mark.parametrize(
    "first, why",
    [
        (10, "got 10; num_classes is to be given by its name$"),
        (np.int64(10), "num_classes is to be given by its name$"),
        (True, 'got True; what is True for timm is "timm" here, and False is None$'),
        (False, 'got False; what is True for timm is "timm" here, and False is None$'),
        (1.5, "got 1.5$"),
        (b"weights.pth", "got b'weights.pth'$"),
    ],
    ids=str,
)
def test_what_is_first_is_no_number_of_classes(first: Any, why: str) -> None:
    begin = 'pretrained, the first argument, must be None, "timm" or the path of a checkpoint, '
    with pytest.raises(ValueError, match=f"^{begin}.*{why}"):
        xception(first)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """Of 1,000 classes, as timm's."""
    model = xception()
    randomize(model)
    path = tmp_path_factory.mktemp("checkpoint") / "model.pth"
    torch.save(model.state_dict(), path)
    return path, model.state_dict()


def test_pretrained_path(checkpoint: tuple[Path, dict[str, Tensor]]) -> None:
    path, state = checkpoint
    model = xception(pretrained=path, bn_eps=1e-3, pool_padding="same")
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert {m.eps for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-5}
    assert {m.padding for m in model.modules() if isinstance(m, MaxPool)} == {"torch"}


def test_pretrained_of_other_classes(checkpoint: tuple[Path, dict[str, Tensor]]) -> None:
    with pytest.raises(WeightsError, match=r"1000 classes.*into 5.*num_classes=1000.*head=False"):
        xception(pretrained=checkpoint[0], num_classes=5)


def test_pretrained_of_another_architecture(checkpoint: tuple[Path, dict[str, Tensor]]) -> None:
    with pytest.raises(WeightsError, match=r"24 unexpected \(block1.skip.weight.* and 18 more\)"):
        xception(pretrained=checkpoint[0], residual=False)


@pytest.mark.parametrize("classes", [1000, 5, 0])
def test_pretrained_by_timm(
    checkpoint: tuple[Path, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch, classes: int
) -> None:
    """The hub answered by the file: a classifier of other classes is left fresh."""
    hub = types.ModuleType("huggingface_hub")
    hub.hf_hub_download = lambda repository, file: str(checkpoint[0])  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    model = xception(pretrained="timm", num_classes=classes)
    for name, t in model.state_dict().items():
        if name.startswith("fc.") and classes != 1000:
            assert t.shape[0] == classes
        else:
            assert torch.equal(t, checkpoint[1][name])


def test_pretrained_without_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(WeightsError, match=r"huggingface_hub.*install"):
        xception(pretrained="timm")
