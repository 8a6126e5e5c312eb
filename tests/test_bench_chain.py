"""The chain's microbenchmark: nothing wrong is timed, and what the network's layers take together."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench_chain  # noqa: E402
import common  # noqa: E402
import report_html  # noqa: E402

from tests.chain.support import put_off  # noqa: E402
from xsep.chain import measuring  # noqa: E402
from xsep.ops.training.selection import chain_backend  # noqa: E402
from xsep.problem import Problem  # noqa: E402

QUICK = ["--device", "cpu", "--quick", "--dtype", "float32"]


def test_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_chain.main([*QUICK, "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "chain.json").read_text())
    ways = {bench_chain.PYTORCH, bench_chain.LAYER, "chain, cpu"}
    assert record["failures"] == [] and [layer["occurs"] for layer in record["layers"]] == [1, 25]
    for direction in ("forward", "backward"):
        assert all(set(layer[direction]) == ways for layer in record["layers"])
        totals = record["totals_ms"][direction]
        one, many = (layer[direction][bench_chain.LAYER]["us"] for layer in record["layers"])
        assert totals[bench_chain.LAYER] == pytest.approx(1e-3 * (one + 25 * many))
        assert totals["chain, the fastest of each layer"] == totals["chain, cpu"]
    printed = capsys.readouterr().out
    assert "all layers, backward: chain, cpu" in printed
    table = report_html.chain_table(record)
    assert "24-&gt;32 @10 x25, backward" in table and table.count("<tr>") == 1 + 4


@pytest.mark.parametrize("method", ["bn_finalize", "sep_fprop", "sep_backward", "bn_backward_finalize"])
def test_what_is_wrong_gets_no_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    put_off(monkeypatch, chain_backend("cpu"), method)
    assert bench_chain.main([*QUICK, "--out", str(tmp_path)]) == 1
    record = json.loads((tmp_path / "chain.json").read_text())
    direction = "forward" if method in ("bn_finalize", "sep_fprop") else "backward"
    for layer in record["layers"]:
        assert "chain, cpu" not in layer[direction] and bench_chain.PYTORCH in layer[direction]
    assert record["failures"] and all(f"chain, cpu, {direction}: " in failure for failure in record["failures"])
    assert f"WRONG: chain, cpu, {direction}: " in capsys.readouterr().out


def test_a_layer_that_cannot_run_costs_no_other_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = measuring.draw

    def scarce(problem: Problem) -> Any:
        if problem.c_in == 16:
            raise torch.OutOfMemoryError("no memory\nand more")
        return draw(problem)

    monkeypatch.setattr(measuring, "draw", scarce)
    assert bench_chain.main([*QUICK, "--out", str(tmp_path)]) == 1
    record = json.loads((tmp_path / "chain.json").read_text())
    assert record["failures"] == ["16->24 @19 x1: no memory"]
    assert [layer["layer"] for layer in record["layers"]] == ["24->32 @10 x25"]


def test_without_a_gpu_it_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert common.run("bench_chain", lambda: bench_chain.main(["--out", str(tmp_path)])) == 2
    said = capsys.readouterr().err
    assert said.startswith("bench_chain: it needs a GPU") and said.count("\n") == 1
