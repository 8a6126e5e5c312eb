"""What was measured of a chained layer decides who runs it, forward and backward apart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import xsep
from tests.chain.support import put_off
from tests.pretended_card import CARD, forget, pretend
from xsep import autotuner, dispatch, measuring
from xsep.backends.chain_aten import ATEN_CHAIN
from xsep.chain import SeparableChain, SeparableConvBN
from xsep.chain import measuring as chain
from xsep.ops.training import selection
from xsep.problem import RELU, Geometry, Problem
from xsep.tuning import findings
from xsep.tuning.findings import Finding

SHORT = measuring.Effort(1, 0.0)


def problem(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Problem:
    same = Geometry(1, 1, 1, 1, 1, 1, 1, 1)
    return Problem("separable", device, dtype, True, 2, 8, 9, 7, 1, 3, 3, 12, same, (RELU, 0, 0))


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache folder of its own, no tables, and nothing remembered before or after."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(findings, "TABLES", tmp_path / "tables")
    monkeypatch.delenv("XSEP_BACKEND", raising=False)
    forget()
    yield
    forget()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_is_measured_in_both_directions(dtype: torch.dtype, capsys: pytest.CaptureFixture[str]) -> None:
    named, state = problem(dtype=dtype).as_chain_layer(), torch.get_rng_state()
    found = xsep.autotune(named, effort=SHORT)[named]
    assert torch.equal(torch.get_rng_state(), state)
    assert {direction: set(times) for direction, times in found.times.items()} == {
        direction: {"cpu", "aten"} for direction in findings.DIRECTIONS
    }
    assert found.refused == {} and found.problem.startswith("chain 2x8x9x7 -> 2x12x9x7")
    for direction in findings.DIRECTIONS:
        best = found.best(direction, ["cpu", "aten"])
        assert selection.select(problem(dtype=dtype), "auto", direction).name == best
    assert "times the plain chain's speed" in capsys.readouterr().err
    assert dispatch.choice(problem(dtype=dtype), "auto").why.startswith("the first"), "the op was not measured"


@pytest.mark.parametrize("method", ["sep_fprop", "bn_finalize", "bn_backward_finalize", "sep_backward"])
def test_what_is_wrong_gets_no_time(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    put_off(monkeypatch, selection.chain_backend("cpu"), method)
    found = chain.measure(problem(), SHORT)
    assert set(found.times["backward"]) == {"aten"} and found.refused["cpu"].startswith("wrong: ")


def test_what_fails_is_left_out_with_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> Any:
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(selection.chain_backend("cpu"), "sep_fprop", fail)
    assert chain.measure(problem(), SHORT).refused == {"cpu": "failed: no such kernel"}


def test_a_model_is_asked_for_its_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    model = SeparableChain(SeparableConvBN(8, 12), SeparableConvBN(12, 8)).train()
    x = torch.randn(2, 8, 9, 7).contiguous(memory_format=torch.channels_last)
    assert all(p.op != "chain" for p in autotuner.problems_of(model, (x,))), "on a CPU there is one kind of kernels"
    monkeypatch.setattr(dispatch, "CHAINS_TUNED", ("cpu",))
    found = autotuner.problems_of(model, (x,))
    assert [(p.c_in, p.c_out) for p in found if p.op == "chain"] == [(8, 12), (12, 8)]


def remember(**times: dict[str, float]) -> None:
    named = problem("cuda").as_chain_layer()
    findings.remember(CARD, {findings.problem_key(named): Finding(str(named), times)}, "2026-01-02")
    dispatch.forget_choices()


def test_on_a_card_each_direction_has_its_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    monkeypatch.setattr(selection, "place", lambda device: 0)
    asked = problem("cuda")
    remember(
        forward={"aten": 9.0, "cuda": 3.0, "triton": 2.0},
        backward={"aten": 9.0, "cuda": 3.0, "cuda, in slices": 1.0, "triton": 2.0},
    )
    assert selection.select(asked, "auto").name == "triton"
    backward: Any = selection.select(asked, "auto", "backward")
    assert (backward.name, backward.way) == ("cuda", "in slices")
    by_name: Any = selection.select(asked, "cuda", "backward")
    assert by_name.way == "", "by name it goes as planned"
    remember(forward={"aten": 1.0, "cuda": 3.0}, backward={"aten": 9.0, "cuda": 3.0})
    assert selection.select(asked, "auto") is ATEN_CHAIN
    assert selection.select(asked, "auto", "backward") is selection.chain_backend("cuda")
    # What cannot run here is no candidate, nor is a way of it.
    monkeypatch.setattr(dispatch.backend("cuda"), "not_supported_reasons", lambda p: ["no driver"])
    remember(forward={"cuda": 1.0, "triton": 2.0}, backward={"cuda, in slices": 1.0, "triton": 2.0})
    assert {selection.select(asked, "auto", d).name for d in findings.DIRECTIONS} == {"triton"}
