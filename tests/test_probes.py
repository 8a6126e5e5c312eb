"""The layers a card is timed on, and what the cost model makes of their times."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Optional

import pytest
import torch

from tests.pretended_card import CARD, forget, pretend
from tests.pretended_card import GPU_BACKENDS as BOTH
from xsep import card_check, dispatch, measuring, plans
from xsep.backends.aten import ATEN
from xsep.measuring import Effort
from xsep.problem import IDENTITY, Problem
from xsep.tuning import findings, probes
from xsep.tuning.device import A100, H200, PUBLISHED, RTX_4090, T4, DeviceProperties
from xsep.tuning.findings import Card, Finding


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("XSEP_BACKEND", "XSEP_TRUST_UNVERIFIED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(findings, "TABLES", tmp_path / "tables")
    forget()
    yield
    forget()


def took(layer: Problem, device: DeviceProperties, backends: tuple[str, ...] = BOTH, **slower: float) -> Finding:
    """A layer as a card would take that is so many times slower than the model has it; PyTorch's layouts as aten and
    nchw."""
    times: dict[str, dict[str, float]] = {}
    for direction in findings.DIRECTIONS:
        times[direction] = {}
        for p in plans.predictions(layer, device, True):
            if p.backend == "aten":
                name, short = ("aten", "aten") if p.chosen_way else (p.way, "nchw")
            elif p.chosen_way and p.backend in backends:
                name = short = p.backend
            else:
                continue
            times[direction][name] = slower.get(short, 1.0) * p.on_card(direction)
    return Finding(str(layer), times)


def remember(
    dtype: torch.dtype = torch.bfloat16, backends: tuple[str, ...] = BOTH, layers: Optional[list[Problem]] = None,
    **slower: float,
) -> None:  # fmt: skip
    timed = probes.of_type(dtype) if layers is None else layers
    known = {findings.problem_key(layer): took(layer, H200, backends, **slower) for layer in timed}
    findings.remember(CARD, {}, "today", {}, known)


def fit(problem: Problem, direction: str = "forward", tf32: bool = True) -> Optional[plans.Fit]:
    return probes.fit(problem, CARD, H200, direction, tf32)


LAYER = probes.LAYERS[1]  # 128 -> 128 @147
LARGE = LAYER._replace(n=64, h=150, w=150)  # of no table


# Which layer corrects, and by how much


def test_nothing_is_corrected_where_nothing_was_timed() -> None:
    assert fit(LARGE) is None


@pytest.mark.parametrize("direction", findings.DIRECTIONS)
def test_a_factor_is_what_was_taken_over_what_the_model_has(direction: str) -> None:
    remember(cuda=3.0, triton=0.5, aten=2.0, nchw=1.5)
    found = fit(LARGE, direction)
    assert found is not None and found.layer == "128->128 @147"
    expected = {"cuda": 3.0, "triton": 0.5, "aten, channels_last": 2.0, "aten, NCHW": 1.5}
    assert found.factors == pytest.approx(expected)


@pytest.mark.parametrize("layer", probes.LAYERS, ids=str)
def test_each_layer_stands_for_itself_and_its_like(layer: Problem) -> None:
    remember()
    larger = layer._replace(h=layer.h + 2, w=layer.w + 2)
    for problem in (layer, layer._replace(n=12), larger, larger._replace(channels_last=False)):
        found = fit(problem)
        assert found is not None and found.layer == f"{layer.c_in}->{layer.c_out} @{layer.h}"


def test_depthwise_is_corrected_by_depthwise() -> None:
    remember(layers=[layer for layer in probes.LAYERS if layer.op == "separable"])
    assert fit(LARGE) is not None
    assert fit(LARGE._replace(op="depthwise", activations=(0, 0))) is None


def test_a_layer_that_lacks_a_time_makes_room_for_the_next() -> None:
    remember(cuda=3.0)
    for broken in (math.nan, 0.0, -1.0, math.inf):
        bad = took(LAYER, H200)
        bad.times["forward"]["aten"] = broken
        findings.remember(CARD, {}, "today", {}, {findings.problem_key(LAYER): bad})
        found = fit(LARGE)
        assert found is not None and found.layer == "256->256 @74" and found.factors["cuda"] == pytest.approx(3.0)
    findings.remember(CARD, {}, "today", {}, {findings.problem_key(LAYER): took(LAYER, H200)})
    assert (found := fit(LARGE)) is not None and found.layer == "128->128 @147"


def test_what_was_not_timed_has_no_advantage() -> None:
    remember(backends=("cuda",), cuda=2.0, aten=1.5)
    found = fit(LARGE)
    assert found is not None and "triton" not in found.factors
    triton = next(p for p in plans.predictions(LARGE, H200, True) if p.backend == "triton")
    assert found.factor(triton) == pytest.approx(2.0)


def test_types() -> None:
    """float16 has bfloat16's where it has none of its own; float32 was timed with TF32 and speaks for nothing else."""
    remember(cuda=3.0)
    half, single = LARGE._replace(dtype=torch.float16), LARGE._replace(dtype=torch.float32)
    assert (found := fit(half)) is not None and found.factors["cuda"] == pytest.approx(3.0)
    assert fit(single) is None
    remember(torch.float16, cuda=4.0)
    remember(torch.float32, cuda=5.0)
    assert (found := fit(half)) is not None and found.factors["cuda"] == pytest.approx(4.0)
    assert (found := fit(single)) is not None and found.factors["cuda"] == pytest.approx(5.0)
    assert fit(single, tf32=False) is None


@pytest.mark.parametrize("card", [H200, A100, RTX_4090], ids=lambda card: card.name)
def test_the_layers_have_every_way(card: DeviceProperties) -> None:
    """Both ops, all filters and strides that have kernels of their own, fused and staged plans of each backend."""
    found = {p.way for layer in probes.LAYERS for p in plans.predictions(layer, card, True) if p.chosen_way}
    assert {"cuda, fused", "cuda, staged", "cuda", "triton"} <= found
    assert {layer.op for layer in probes.LAYERS} == {"separable", "depthwise"}
    assert {layer.r for layer in probes.LAYERS} == {3, 5, 7}
    assert {layer.geometry.stride_h for layer in probes.LAYERS} == {1, 2}
    assert len({findings.problem_key(layer) for layer in probes.LAYERS}) == len(probes.LAYERS)
    assert all(p.on_card("forward") < math.inf for p in plans.predictions(LAYER, card, True))


# What auto makes of it


@pytest.mark.parametrize("card", PUBLISHED, ids=lambda card: card.name)
def test_a_fit_of_one_changes_nothing(card: DeviceProperties) -> None:
    even = plans.Fit("a layer", {"cuda": 1.0, "triton": 1.0, "aten, channels_last": 1.0, "aten, NCHW": 1.0})
    for layer in (*probes.LAYERS, LARGE, LAYER._replace(n=1, h=7, w=7)):
        for direction in findings.DIRECTIONS:
            plain, fitted = (plans.choose(layer, card, BOTH, direction, True, f) for f in (None, even))
            assert fitted[0] == plain[0]
            assert card is T4 or "corrected by what a layer took on this card" in fitted[1]


def test_slow_kernels_are_left_and_the_reason_says_so() -> None:
    name, _ = plans.choose(LARGE, H200, BOTH)
    assert name == "cuda"
    remember(cuda=9.0)
    name, why = plans.choose(LARGE, H200, BOTH, fit=fit(LARGE))
    assert name == "triton" and "corrected by what 128->128 @147 took on this card, has triton, fused at" in why
    remember(cuda=9.0, triton=9.0)
    name, why = plans.choose(LARGE, H200, BOTH, fit=fit(LARGE))
    assert name == "aten" and "not 1.1 times as fast" in why


def test_each_memory_layout_of_pytorch_has_its_own() -> None:
    remember(aten=0.1)
    assert plans.choose(LARGE, H200, BOTH, fit=fit(LARGE))[0] == "aten"
    nchw = LARGE._replace(channels_last=False)
    assert plans.choose(nchw, H200, BOTH, fit=fit(nchw))[0] != "aten"
    remember(nchw=0.1)
    assert plans.choose(nchw, H200, BOTH, fit=fit(nchw))[0] == "aten"


def test_the_host_is_not_corrected() -> None:
    """A card twice as fast enqueues nothing faster."""
    small = LAYER._replace(n=1, h=7, w=7)
    found = {p.way: p for p in plans.predictions(small, H200, True)}
    assert found["cuda, fused"].time("forward", 0.01) == plans.HOST_US["cuda"] == found["cuda, fused"].forward
    assert found["cuda, fused"].time("forward", 1e3) == pytest.approx(1e3 * found["cuda, fused"].on_card("forward"))


def test_auto_follows_what_a_check_has_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    findings.remember(CARD, {}, "today", {"cuda": ""})
    assert dispatch.select(LARGE, "auto").name == "cuda"
    remember(backends=("cuda",), cuda=9.0)
    forget()  # another process
    assert dispatch.select(LARGE, "auto") is ATEN
    assert "corrected by what 128->128 @147 took" in dispatch.explain(LARGE)
    measured = Finding(str(LARGE), {"forward": {"aten": 2.0, "cuda": 1.0}, "backward": {}})
    findings.remember(CARD, {findings.problem_key(LARGE): measured}, "today")
    forget()
    assert dispatch.select(LARGE, "auto").name == "cuda", "what was measured comes first"


# What is kept


def test_each_checks_times_join_the_others() -> None:
    remember(backends=("cuda",), layers=[LAYER], cuda=2.0)
    forget()
    remember(backends=("triton",), layers=[LAYER, probes.LAYERS[0]], triton=3.0)
    for _ in range(2):
        found = findings.timed(LAYER, CARD)
        assert found is not None and set(found.times["forward"]) == {"aten", "aten, NCHW", "cuda", "triton"}
        assert len(findings.cached(CARD).probes) == 2
        forget()


def test_what_another_process_found_is_learnt() -> None:
    known = findings.cached(CARD)
    text = findings.to_json(known)
    remember(layers=[LAYER])
    findings.remember(CARD, {}, "today", {"cuda": ""})
    file = findings.cache_path(CARD).read_text()
    assert findings.from_json(file) != findings.from_json(text)
    forget()
    fresh = findings.cached(CARD)
    fresh.checked, fresh.probes = {}, {}
    findings.learn(CARD)
    assert fresh.checked == {"cuda": ""} and list(fresh.probes) == [findings.problem_key(LAYER)]


def test_a_record_from_before_there_were_probes_is_read() -> None:
    raw = findings.to_dict(findings.fresh(CARD))
    del raw["probes"]
    assert findings.from_json(json.dumps(raw)).probes == {}


def test_a_shipped_table_speaks_for_its_card_and_what_is_verified() -> None:
    table = findings.fresh(CARD)
    table.verified, table.probes = ["cuda"], {findings.problem_key(LAYER): took(LAYER, H200, cuda=2.0)}
    findings.TABLES.mkdir()
    (findings.TABLES / "nvidia-h200.json").write_text(findings.to_json(table))
    forget()
    found = fit(LARGE)
    assert found is not None and found.factors["cuda"] == pytest.approx(2.0) and "triton" not in found.factors
    assert probes.fit(LARGE, Card("NVIDIA H100", "sm_90"), H200, "forward", True) is None
    remember(layers=[LAYER], cuda=3.0)
    assert (found := fit(LARGE)) is not None and found.factors["cuda"] == pytest.approx(3.0), "this very card's first"


# Timing them


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[Problem]:
    """Layers for the CPU, as small as can be."""
    layers = [
        layer._replace(device="cpu", n=1, c_in=4, c_out=4 if layer.op == "depthwise" else 6, h=9, w=9)
        for layer in (probes.LAYERS[0], probes.LAYERS[3])
    ]
    monkeypatch.setattr(probes, "LAYERS", tuple(layers))
    return layers


def time_them(seconds: float = 60.0) -> dict[str, Finding]:
    return card_check.time_probes(["cpu", "triton"], [torch.float32, torch.bfloat16], Effort(1, 0.0), seconds)


def test_times_of_those_that_can_run_a_layer(small: list[Problem]) -> None:
    torch.backends.cudnn.benchmark = False
    found = time_them()
    assert torch.backends.cudnn.benchmark is False
    dtypes = (torch.float32, torch.bfloat16)
    assert list(found) == [findings.problem_key(p._replace(dtype=t)) for t in dtypes for p in small]
    for finding in found.values():
        for direction in findings.DIRECTIONS:
            times = finding.times[direction]
            assert set(times) == {"aten", "aten, NCHW", "cpu"} and min(times.values()) > 0
    assert findings.entries_from(json.loads(json.dumps({k: asdict(v) for k, v in found.items()}))) == found


def test_time_and_memory_may_run_out(small: list[Problem], monkeypatch: pytest.MonkeyPatch) -> None:
    assert time_them(-1.0) == {}
    right = measuring.time_ways

    def full(problem: Problem, *others: Any) -> Any:
        if problem.op == "separable":
            raise torch.OutOfMemoryError("out of memory")
        return right(problem, *others)

    monkeypatch.setattr(card_check, "time_ways", full)
    assert [finding.problem.split()[0] for finding in time_them().values()] == ["depthwise", "depthwise"]


@pytest.mark.parametrize(
    "subject, wrong, raised, expected",
    [("cuda", [], None, {"problems": 1, "wrong": "", "why": "", "probes": {"a": asdict(Finding("a", {}))}}),
     ("cuda", ["y: error"], None, {"problems": 1, "wrong": "a case: y: error", "why": ""}),
     ("cuda-chain", [], None, {"problems": 1, "wrong": "", "why": ""}),
     ("cuda", [], RuntimeError("CUDA error: misaligned address\nat"),
      {"problems": 1, "wrong": "after layers that were timed: CUDA error: misaligned address", "why": ""})],
    ids=["right", "wrong", "chain", "fault"],
)  # fmt: skip
def test_what_is_right_is_timed(
    subject: str, wrong: list[str], raised: Optional[Exception], expected: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def timed(backends: list[str], *others: Any) -> dict[str, Finding]:
        assert backends == ["cuda"]
        if raised is not None:
            raise raised
        return {"a": Finding("a", {})}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(card_check, "check", lambda *args: (case for case in [("a case", wrong)]))
    monkeypatch.setattr(card_check, "time_probes", timed)
    assert card_check.main([subject]) == (1 if expected["wrong"] else 0)
    assert json.loads(capsys.readouterr().out) == expected


def test_layers_have_no_activation() -> None:
    """Which would be passes of their own for PyTorch: the factor is to be of the convolutions."""
    assert all(code == IDENTITY for layer in probes.LAYERS for code in layer.activations)
