"""ONNX export gives standard nodes, two Conv a layer, and ONNX Runtime computes the same from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

import pytest
import torch
from torch import Tensor, nn

import xsep

from .models import SHAPE, network, pictures

onnx = pytest.importorskip("onnx", reason="onnx is not installed (requirements/dev.txt)")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (requirements/dev.txt)")
pytest.importorskip("onnxscript", reason="onnxscript is not installed (requirements/dev.txt)")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def layer(**options: Any) -> nn.Module:
    return xsep.FusedSeparableConv2d(SHAPE[0], 8, 3, **{"padding": 1, **options})


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2 * SHAPE[0], 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return xsep.depthwise_conv2d(x, self.weight, padding=1, dilation=2)


MODELS: dict[str, tuple[Any, Optional[list[str]], int]] = {
    "plain": (layer, ["Conv", "Conv"], 2),
    "no_bias": (lambda: layer(bias=False), ["Conv", "Conv"], 2),
    "multiplier_and_dilation": (lambda: layer(depth_multiplier=3, dilation=2), ["Conv", "Conv"], 2),
    "relu": (lambda: layer(prologue_activation="relu"), ["Relu", "Conv", "Conv"], 2),
    "silu_between": (lambda: layer(middle_activation="silu"), None, 2),
    "same_at_stride_2": (lambda: layer(stride=2, padding="same"), None, 2),
    "depthwise": (Depthwise, ["Conv"], 1),
    "network": (network, None, 6),
}


def exported(model: nn.Module, file: Path, sizes: dict[int, torch.export.Dim]) -> None:
    program = torch.onnx.export(model, (pictures(2),), dynamo=True, verbose=False, dynamic_shapes=(sizes,))
    assert program is not None
    program.save(file)


def hold_runtime(file: Path, model: nn.Module, batches: list[Tensor]) -> None:
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    for x in batches:
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), model(x).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_onnx_runtime_computes_the_same(name: str, tmp_path: Path) -> None:
    make, nodes, convolutions = MODELS[name]
    model = make().eval()
    file = tmp_path / "model.onnx"
    exported(model, file, {0: torch.export.Dim("batch", max=64)})
    onnx.checker.check_model(str(file), full_check=True)
    kinds = [node.op_type for node in onnx.load(str(file)).graph.node]
    assert nodes is None or kinds == nodes
    assert kinds.count("Conv") == convolutions
    hold_runtime(file, model, [pictures(n) for n in (1, 5)])


def test_pictures_of_any_size(tmp_path: Path) -> None:
    """Also where TensorFlow's padding at a stride depends on whether a size is even."""
    model = network().eval()
    file = tmp_path / "model.onnx"
    exported(model, file, {2: torch.export.Dim("height", min=4, max=99), 3: torch.export.Dim("width", min=4, max=99)})
    hold_runtime(file, model, [torch.randn(2, SHAPE[0], *size) for size in [(5, 9), (18, 7), (31, 32)]])
