"""bench_cpu.py: a whole record, and no figure for a layer that is wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from xsep import dispatch, repeated

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_cpu  # noqa: E402
import common  # noqa: E402

pytestmark = pytest.mark.skipif(
    dispatch.backend("cpu").not_supported_reasons(
        bench_cpu.separable_problem(bench_cpu.arguments(1, 8, 8, 8, torch.float32))
    )
    != [],
    reason="the cpu backend is not built",
)


def program(*arguments: str) -> int:
    return common.run("bench_cpu", lambda: bench_cpu.main(["--quick", *arguments]))


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_cpu, "PEAK_SECONDS", 0.01)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_stage_has_a_time_and_its_share(dtype: str, tmp_path: Path, capsys: Any) -> None:
    assert program("--dtype", dtype, "--out", str(tmp_path)) == 0
    record = json.loads((tmp_path / f"cpu-{dtype}.json").read_text())
    assert [row["layer"] for row in record["layers"]] == ["16->24 @19", "24->32 @10"]
    assert all(value > 0 for value in record["limits"].values())
    for row in record["layers"]:
        assert list(row["stages"]) == list(bench_cpu.STAGES)
        for stage in row["stages"].values():
            assert stage["share"] == pytest.approx(stage["floor_us"] / stage["us"])
    assert record["environment"]["source_digest"] == common.source_digest()
    assert "GFLOP/s" in capsys.readouterr().out


def test_a_wrong_layer_gets_no_figure(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = dispatch.backend("cpu")
    right = type(cpu).separable_forward
    monkeypatch.setattr(type(cpu), "separable_forward", lambda self, a: right(self, a) * 1.01)
    monkeypatch.setattr(repeated, "again", repeated._never)  # C++ would not pass by it
    assert program("--out", str(tmp_path)) == 1
    record = json.loads((tmp_path / "cpu-float32.json").read_text())
    assert record["layers"] == [] and len(record["failures"]) == 2
    assert capsys.readouterr().out.count("WRONG") == 2


@pytest.mark.parametrize("name", ["batch", "threads", "rounds"])
def test_counts_are_at_least_one(name: str, tmp_path: Path, capsys: Any) -> None:
    assert program(f"--{name}", "0", "--out", str(tmp_path)) == 2
    assert f"--{name} must be at least 1, got 0" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
