"""The microbenchmarks' gate: what is timed is what is held to the truth, on the same tensors."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench_cuda  # noqa: E402
import bench_triton  # noqa: E402
import micro  # noqa: E402

from xsep import dispatch, testing  # noqa: E402

QUICK = ["--device", "cpu", "--quick", "--dtype", "float32"]


def session(tmp_path: Path) -> micro.Session:
    return micro.Session("triton", micro.parser("micro", "").parse_args([*QUICK, "--out", str(tmp_path)]))


def test_each_way_has_its_own_gate(tmp_path: Path) -> None:
    made = session(tmp_path)
    a = made.arguments(16, 24, 9)
    dz = torch.randn_like(a.x)
    right = made.backend.separable_forward
    assert made.gate(a, dz, {"fused": lambda: right(a), "staged": lambda: right(a)}) == []
    found = made.gate(a, dz, {"fused": lambda: right(a), "staged": lambda: right(a) * 1.1})
    assert found and all(sentence.startswith("staged: y:") for sentence in found)


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)], ids=["dgrad", "wgrad", "dgrad+wgrad"])
def test_the_gate_closes_for_each_depthwise_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: tuple[bool, bool], request: pytest.FixtureRequest
) -> None:
    made = session(tmp_path)
    kernel = made.backend.depthwise_backward_kernel

    def wrong(dz: Tensor, x: Tensor, w_dw: Tensor, prologue: Any, geometry: Any, asked: Any) -> Any:
        return kernel(dz * 1.1 if tuple(asked[:2]) == wanted else dz, x, w_dw, prologue, geometry, asked)

    monkeypatch.setattr(made.backend, "depthwise_backward_kernel", wrong)
    a = made.arguments(16, 24, 9)
    found = made.gate(a, torch.randn_like(a.x), {})
    assert found and all(sentence.startswith(f"{request.node.callspec.id}: d") for sentence in found)


def test_only_products_may_be_of_tf32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is allowed: the depthwise kernels multiply in float32 all the same."""
    monkeypatch.setattr(testing, "held_as", lambda dtype, device: torch.float16)
    made = session(tmp_path)
    kernel, product = made.backend.depthwise_backward_kernel, made.backend.separable_forward
    monkeypatch.setattr(made.backend, "depthwise_backward_kernel", lambda dz, *rest: kernel(dz * (1 + 2**-12), *rest))
    monkeypatch.setattr(made.backend, "separable_forward", lambda a: product(a) * (1 + 2**-12))
    a = made.arguments(16, 24, 9)
    kernels = {sentence.partition(":")[0] for sentence in made.gate(a, torch.randn_like(a.x), {})}
    assert kernels == {"dgrad", "wgrad", "dgrad+wgrad"}


@pytest.mark.parametrize("bench", [bench_cuda, bench_triton], ids=["cuda", "triton"])
def test_what_is_wrong_or_cannot_run_gets_no_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bench: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    backend = dispatch.backend("cpu")
    right = backend.separable_forward

    def forward(a: Any) -> Tensor:
        if a.x.shape[1] == 16:
            raise RuntimeError("no such plan\nand more")
        return right(a)

    monkeypatch.setattr(backend, "separable_forward", forward)
    assert bench.main([*QUICK, "--out", str(tmp_path)]) == 1
    (written,) = tmp_path.iterdir()
    record = json.loads(written.read_text())
    assert record["failures"] == ["16->24 @19 x1: no such plan"]
    assert [layer["layer"] for layer in record["layers"]] == ["24->32 @10 x25"]
    assert "WRONG: no such plan" in capsys.readouterr().out
