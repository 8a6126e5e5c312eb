"""bench_layers.py: a whole record, and no figure for a layer that is wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="matplotlib draws the chart")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_layers  # noqa: E402
import common  # noqa: E402
import layers_chart  # noqa: E402


def program(*arguments: str) -> int:
    return common.run("bench_layers", lambda: bench_layers.main(["--quick", *arguments]))


def test_every_layer_has_a_ratio_in_each_layout_and_direction(tmp_path: Path, capsys: Any) -> None:
    assert program("--out", str(tmp_path)) == 0
    record = json.loads((tmp_path / "layers.json").read_text())
    assert len(record["layers"]) == len(bench_layers.QUICK) * 4 and not record["failures"]
    for row in record["layers"]:
        assert row["ratio"] == pytest.approx(row["us"]["PyTorch"] / row["us"]["xsep"])
    assert capsys.readouterr().out.count("geometric mean") == 4
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")


def test_depthwise_convolutions_alone_have_a_record_of_their_own(tmp_path: Path, capsys: Any) -> None:
    assert program("--out", str(tmp_path), "--op", "depthwise", "--below", "1e9") == 0
    record = json.loads((tmp_path / "depthwise.json").read_text())
    assert record["op"] == "depthwise" and not (tmp_path / "layers.json").exists()
    assert {row["layer"] for row in record["layers"]} == {"16 @10, 3x3, stride 1", "8 @9, 5x5, stride 2"}
    assert len(record["layers"]) == 8 and "training 8 @9, 5x5, stride 2" in capsys.readouterr().out


def test_a_wrong_layer_gets_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_layers, "wrong", lambda layer, dtype, layout: "far off" if layer.filter == 5 else None)
    assert program("--out", str(tmp_path), "--direction", "forward", "--layout", "contiguous") == 1
    record = json.loads((tmp_path / "layers.json").read_text())
    assert [row["layer"] for row in record["layers"]] == ["16->24 @10, 3x3, stride 1"]
    assert len(record["failures"]) == 1 and "far off" in record["failures"][0]


def test_the_chart_has_a_dot_for_each_figure_and_rings_those_below_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert program("--out", str(tmp_path), "--batch", "1", "--layout", "contiguous") == 0
    record = json.loads((tmp_path / "layers.json").read_text())
    for row, ratio in zip(record["layers"], (0.8, 1.5, 2.0, 0.9), strict=True):
        row["ratio"] = ratio
    kept: list[Any] = []
    monkeypatch.setattr(layers_chart.plt, "close", kept.append)
    layers_chart.draw(record, tmp_path / "again.png")
    axes = kept[0].axes
    assert [ax.get_title(loc="left") for ax in axes] == ["forward, float32", "training, float32"]
    dots = [[tuple(at) for marks in ax.collections for at in marks.get_offsets()] for ax in axes]
    assert dots == [[(0.8, 0), (1.5, 1), (0.8, 0)], [(2.0, 0), (0.9, 1), (0.9, 1)]], "the last ones are rings"
    assert [label.get_text() for label in axes[0].get_yticklabels()] == [row["layer"] for row in record["layers"][:2]]


def test_where_every_layer_is_wrong_a_record_still_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_layers, "wrong", lambda layer, dtype, layout: "far off")
    assert program("--out", str(tmp_path)) == 1
    assert len(json.loads((tmp_path / "layers.json").read_text())["failures"]) == 4
    assert (tmp_path / "layers.png").exists()


def test_no_picture_is_one_sentence(capsys: Any) -> None:
    assert program("--batch", "0") != 0
    assert "--batch and --threads must be at least 1" in capsys.readouterr().err
