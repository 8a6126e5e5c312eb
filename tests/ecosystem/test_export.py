"""torch.export, and what AOTInductor compiles of it, for any batch."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.export import Dim

from xsep.models import xception

from .models import network, pictures

pytestmark = pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*")


def exported(model: torch.nn.Module) -> torch.export.ExportedProgram:
    return torch.export.export(model.eval(), (pictures(2),), dynamic_shapes=({0: Dim("batch", min=1, max=64)},))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_an_exported_program_runs_after_saving(layout: torch.memory_format) -> None:
    model: Any = network()
    model.to(memory_format=layout)
    file = io.BytesIO()
    torch.export.save(exported(model), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for n in (1, 3, 8):
        x = pictures(n)
        torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-6)


SIDE = Dim("height", min=71, max=400), Dim("width", min=71, max=400)


@pytest.mark.parametrize("output_stride", [32, 16])
@pytest.mark.parametrize("pool", ["torch", "same"])
def test_pictures_of_any_size(pool: str, output_stride: int) -> None:
    """TensorFlow's padding depends on whether a size is even."""
    torch.manual_seed(3)
    model = xception(num_classes=3, pool_padding=pool, output_stride=output_stride).eval()
    sizes = {2: SIDE[0], 3: SIDE[1]}
    program = torch.export.export(model, (torch.randn(1, 3, 83, 92),), dynamic_shapes=(sizes,)).module()
    for size in [(71, 72), (74, 75), (77, 73), (76, 78)]:
        x = torch.randn(1, 3, *size)
        torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)


def test_layers_of_any_size() -> None:
    model = network().eval()
    sizes = {0: Dim("batch", min=1, max=64), 2: Dim("height", min=4, max=99), 3: Dim("width", min=4, max=99)}
    program = torch.export.export(model, (pictures(2),), dynamic_shapes=(sizes,)).module()
    for size in [(4, 4), (5, 9), (18, 7), (31, 32)]:
        x = torch.randn(3, 5, *size)
        torch.testing.assert_close(program(x), model(x), rtol=1e-5, atol=1e-6)


def test_an_exported_program_keeps_the_ops_and_trains() -> None:
    model = network()
    program = exported(model)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum("xsep.separable_conv2d" in t for t in targets) == 3
    assert not any("convolution" in t or "conv2d" in t for t in targets if not t.startswith("xsep")), targets
    x = pictures(4)
    for got, expected in zip(program.run_decompositions().module()(x), model(x)):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    again: Any = program.module()
    again(x).square().sum().backward()
    model(x).square().sum().backward()
    expected_gradients = dict(model.named_parameters())
    for name, p in again.named_parameters():
        torch.testing.assert_close(p.grad, expected_gradients[name].grad, rtol=1e-4, atol=1e-4)


def test_aot_inductor_compiles_and_runs(tmp_path: Path) -> None:
    model = network()
    package = torch._inductor.aoti_compile_and_package(exported(model), package_path=str(tmp_path / "model.pt2"))
    compiled = torch._inductor.aoti_load_package(package)
    for n in (1, 2, 7):
        x = pictures(n)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-6)
