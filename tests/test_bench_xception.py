"""bench_xception: networks that agree, a gate that closes, time that is told apart by kind, files and refusals."""

from __future__ import annotations

import copy
import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

pytest.importorskip("sklearn", reason="scikit-learn brings the photographs")
pytest.importorskip("matplotlib", reason="matplotlib draws the chart")
pytest.importorskip("rich", reason="rich prints the table")

import bench_xception  # noqa: E402
import common  # noqa: E402
import counted_bytes  # noqa: E402
import kinds  # noqa: E402
import networks  # noqa: E402
import xception_chart  # noqa: E402
from networks import CHAINED, INCEPTION, MODES, NETWORKS, OURS, PLAIN  # noqa: E402

CLASSES = 10


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Pictures this small are slower on two threads than on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return common.photograph_batch(common.load_photographs(None)[1], 2, bench_xception.GATE_SIZE)


@pytest.fixture(scope="module")
def models(pictures: Tensor) -> dict[str, nn.Module]:
    built = networks.build(0, CLASSES)
    networks.settle(built, pictures)
    return built


@pytest.fixture(scope="module")
def exact(models: dict[str, nn.Module], pictures: Tensor) -> networks.Truth:
    return networks.truth(models[PLAIN], pictures)


def off(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", NETWORKS)
def test_folding_changes_rounding_only(models: dict[str, nn.Module], pictures: Tensor, name: str) -> None:
    before = networks.logits(models[name], MODES[1], torch.float64, pictures)
    folded = networks.subject(models[name], MODES[2], torch.float64, pictures)
    assert off(networks.inference_step(folded)(), before) <= 1e-10
    assert before.std() > 1e-3
    left = [n for n, m in folded.model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    # Our own way keeps the modules, which are then skipped; PyTorch's way leaves none.
    assert bool(left) == (name in (OURS, CHAINED))
    assert any(isinstance(m, nn.BatchNorm2d) for m in models[name].modules()), "a copy is folded, not the model"


def test_both_xceptions_are_one(models: dict[str, nn.Module], pictures: Tensor) -> None:
    ours, plain = (networks.logits(models[n], MODES[1], torch.float64, pictures) for n in (OURS, PLAIN))
    assert off(ours, plain) <= 1e-12
    shapes = [[tuple(p.shape) for p in models[n].parameters()] for n in (OURS, PLAIN)]
    assert shapes[0] == shapes[1]
    assert not any(type(m).__module__ == "xsep.modules" for m in models[PLAIN].modules())
    assert sum(type(m).__module__ == "xsep.modules" for m in models[OURS].modules()) == 34


@pytest.mark.parametrize("name", [OURS, CHAINED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_gate_opens(
    models: dict[str, nn.Module], pictures: Tensor, exact: networks.Truth, dtype: torch.dtype, name: str
) -> None:
    assert networks.gate(models[name], models[PLAIN], dtype, pictures, exact) == []


def test_gate_runs_the_chain(
    models: dict[str, nn.Module], pictures: Tensor, exact: networks.Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it holds to the truth is the chain itself: a fault in that closes it, for every block."""
    from xsep.backends.chain_cpu import CpuChain

    right = CpuChain.bn_backward_finalize

    def wrong(self: Any, *arguments: Any) -> Any:
        coef, dgamma, dbeta = right(self, *arguments)
        return coef * 1.01, dgamma, dbeta

    monkeypatch.setattr(CpuChain, "bn_backward_finalize", wrong)
    assert networks.gate(models[OURS], models[PLAIN], torch.float32, pictures, exact) == []
    found = networks.gate(models[CHAINED], models[PLAIN], torch.float32, pictures, exact)
    assert [sentence.split(" are off")[0] for sentence in found] == [
        f"training: gradients of block{i}" for i in range(1, 13)
    ]


def test_counted_bytes() -> None:
    """Of one op, by hand; of a chained layer; and of the whole network at its full size beside the model."""
    with counted_bytes.Bytes() as counter:
        torch.relu(torch.ones(10)).view(2, 5).detach()
    assert counter.moved == 10 * 4 + 2 * 10 * 4  # ones are written; relu reads and writes
    plain, chained = bench_xception.count("bfloat16", 64, 299)
    model = counted_bytes.MODEL
    assert plain["two_kernels"] == plain["one_pass"] == pytest.approx(model["eager"], rel=0.05)
    # The model leaves out what is not the chain's own: the first convolutions, casts of weights, vectors.
    assert model["two kernels"] <= chained["two_kernels"] <= 1.1 * model["two kernels"]
    assert model["one pass"] <= chained["one_pass"] <= 1.12 * model["one pass"]
    assert plain["saved"] == pytest.approx(128, rel=0.02) and chained["saved"] <= 60


def test_gate_closes_on_wrong_logits(models: dict[str, nn.Module], pictures: Tensor, exact: networks.Truth) -> None:
    wrong: Any = copy.deepcopy(models[OURS])
    with torch.no_grad():
        wrong.block7.rep["4"].pointwise.weight[0].mul_(1.01)
    found = networks.gate(wrong, models[PLAIN], torch.float32, pictures, exact)
    assert [sentence.split(" are off")[0] for sentence in found] == [
        "inference: logits", "inference, BatchNorm folded: logits", "training: gradients of block7"
    ]  # fmt: skip


def test_gate_closes_on_wrong_gradients(models: dict[str, nn.Module], pictures: Tensor, exact: networks.Truth) -> None:
    wrong: Any = copy.deepcopy(models[OURS])
    wrong.block7.register_full_backward_hook(lambda module, inward, outward: (1.001 * inward[0],))
    found = networks.gate(wrong, models[PLAIN], torch.float32, pictures, exact)
    assert len(found) == 1 and found[0].startswith("training: gradients of block7 are off by 0.000")


def test_a_way_that_goes_astray_is_named() -> None:
    right = torch.randn(2, CLASSES)
    answers = {
        (PLAIN, "eager"): right, (OURS, "eager"): right * (1 + 1e-6), (OURS, "compiled"): right * (1 + 2e-6),
        (PLAIN, "compiled"): right * 1.001, (OURS, "CUDA graph"): right * torch.nan, (INCEPTION, "compiled"): -right,
    }  # fmt: skip
    calls = {key: bench_xception.Call(functools.partial(torch.clone, y), None, {}) for key, y in answers.items()}
    assert list(bench_xception.astray(calls)) == [(PLAIN, "compiled"), (OURS, "CUDA graph")]


def test_a_way_that_our_network_cannot_go_is_a_failure(
    models: dict[str, nn.Module], pictures: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And PyTorch's a note."""

    def fail(step: Any) -> Any:
        raise RuntimeError("the capture failed\nand more")

    monkeypatch.setattr(networks, "as_graph", fail)
    few = {name: models[name] for name in (PLAIN, OURS)}
    record: dict[str, Any] = {"failures": [], "notes": [], "results": [], "shares": []}
    args = SimpleNamespace(rounds=1, compile_mode="default")
    bench_xception.measure(few, MODES[1], "float32", pictures, ["CUDA graph"], args, record)
    assert record["notes"] == [f"float32, {PLAIN}, inference, CUDA graph: failed: the capture failed"]
    assert record["failures"] == [f"float32, {OURS}, inference, CUDA graph: failed: the capture failed"]
    assert record["results"] == []


def test_a_network_is_compiled_once(
    models: dict[str, nn.Module], pictures: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not again for its graph, nor when it is timed after the others were compiled."""
    graphs, compile = 0, torch.compile

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    def compiled(model: Any, *, dynamic: bool, mode: str) -> Any:
        return compile(model, dynamic=dynamic, backend=count)

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(networks, "as_graph", lambda step: step)
    ways = [bench_xception.COMPILED, bench_xception.COMPILED_GRAPH]
    xceptions = {name: models[name] for name in (PLAIN, OURS, CHAINED)}
    calls, notes, failures = bench_xception.prepare(
        xceptions, MODES[0], torch.float32, pictures, ways, "default"
    )  # fmt: skip
    made = graphs
    assert set(calls) == {(name, way) for name in xceptions for way in ways} and not notes and not failures
    for call in calls.values():
        call.step()
    assert graphs == made >= len(xceptions)
    assert all(calls[name, ways[0]].model is calls[name, ways[1]].model for name in xceptions)


def event(name: str, shapes: Any = ()) -> Any:
    return SimpleNamespace(name=name, input_shapes=shapes)


@pytest.mark.parametrize(
    "seen, kind",
    [
        (event("aten::conv2d", [[2, 8, 9, 9], [8, 1, 3, 3]]), kinds.DEPTHWISE),
        (event("aten::conv2d", [[2, 8, 9, 9], [4, 8, 1, 1]]), kinds.POINTWISE),
        (event("aten::conv2d", [[2, 1, 9, 9], [1, 1, 3, 3]]), kinds.REGULAR),
        (event("aten::convolution_backward", [[2, 4, 9, 9], [2, 8, 9, 9], [4, 8, 1, 7]]), kinds.REGULAR),
        (event("xsep::separable_conv2d"), kinds.SEPARABLE),
        (event("Eager"), kinds.SEPARABLE),
        (event("EagerBackward"), kinds.SEPARABLE),
        (event("torch::autograd::CppNode<xsep::eager::(anonymous namespace)::Convolution>"), kinds.SEPARABLE),
        (event("torch::autograd::CppNode<other::Convolution>"), None),
        (event("aten::native_batch_norm_backward"), kinds.NORM),
        (event("aten::max_pool2d_with_indices_backward"), kinds.POOL),
        (event("Optimizer.step#SGD.step"), kinds.UPDATE),
        (event("aten::empty"), None),
    ],
    ids=lambda v: v.name if isinstance(v, SimpleNamespace) else str(v),
)
def test_kind_of(seen: Any, kind: Any) -> None:
    assert kinds.kind_of(seen) == kind


def test_profile_tells_the_kinds_of_the_networks_apart(models: dict[str, nn.Module], pictures: Tensor) -> None:
    for name, convolutions in (
        (PLAIN, {kinds.DEPTHWISE, kinds.POINTWISE, kinds.REGULAR}),
        (OURS, {kinds.SEPARABLE, kinds.POINTWISE, kinds.REGULAR}),
        (INCEPTION, {kinds.POINTWISE, kinds.REGULAR}),
    ):
        s = networks.subject(models[name], "training", torch.float32, pictures, CLASSES)
        step = networks.training_step(s)
        step()
        seconds, peak = kinds.profile_step(step, s.model, gpu=False)
        assert list(seconds) == list(kinds.KINDS) and sum(seconds.values()) > 1e-3
        present = {k for k in (kinds.SEPARABLE, kinds.DEPTHWISE, kinds.POINTWISE, kinds.REGULAR) if seconds[k] > 0}
        assert present == convolutions
        assert (
            seconds[kinds.NORM] > 0 and seconds[kinds.UPDATE] > 0 and seconds[kinds.REST] < 0.5 * sum(seconds.values())
        )
        gradients = 4 * sum(p.numel() for p in s.model.parameters())
        assert gradients < peak < 20 * gradients


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
def test_training_step_learns(models: dict[str, nn.Module], pictures: Tensor, dtype: torch.dtype) -> None:
    s = networks.subject(models[OURS], "training", dtype, pictures, CLASSES)
    before = [p.detach().clone() for p in s.model.parameters()]
    loss = networks.training_step(s)()
    assert bool(loss.isfinite()) and loss.dtype == torch.float32
    after = list(s.model.parameters())
    assert all(p.dtype == torch.float32 and p.grad is not None and bool(p.grad.isfinite().all()) for p in after)
    expected = [b - 1e-5 * (p.grad + 1e-5 * b) for b, p in zip(before, after) if p.grad is not None]
    assert all(torch.allclose(p, e, rtol=1e-6, atol=1e-9) for p, e in zip(after, expected))


def program(monkeypatch: pytest.MonkeyPatch, models: dict[str, nn.Module], *arguments: str) -> int:
    """As from the command line, on the small pictures and networks of ten classes."""
    monkeypatch.setattr(networks, "build", lambda seed: copy.deepcopy(models))
    argv = ["--quick", "--device", "cpu", "--size", "75", "--batch", "2", "--rounds", "1", *arguments]
    return common.run("bench_xception", lambda: bench_xception.main(argv))


def test_a_chart_needs_no_shares_of_time(tmp_path: Path) -> None:
    """None are measured of CUDA graphs, and where the driver lets nobody profile they are all zero; merged files have
    them of some types only."""
    rows = [
        {"dtype": kind, "mode": mode, "network": name, "way": "CUDA graph", "pictures_per_second": 1000.0}
        for kind in ("float32", "bfloat16") for mode in MODES[:2] for name in (PLAIN, OURS)
    ]  # fmt: skip
    record = {
        "results": rows, "networks": list(NETWORKS), "device_type": "cuda", "batch": 64, "size": 299, "figure": "",
        "environment": {"device": "a card", "torch": "2.11"},
    }  # fmt: skip
    share = {"dtype": "bfloat16", "mode": MODES[0], "network": OURS, "seconds": dict.fromkeys(kinds.KINDS, 0.5)}
    idle = {**share, "seconds": dict.fromkeys(kinds.KINDS, 0.0)}
    for shares in ([], [idle], [idle, share]):
        xception_chart.draw({**record, "shares": shares}, tmp_path / "chart.png")
        assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_a_chart_that_cannot_be_drawn_costs_no_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(record: dict[str, Any], path: Path) -> None:
        raise IndexError("of a chart")

    monkeypatch.setattr(common, "chart_module", lambda name: SimpleNamespace(draw=draw))
    with pytest.raises(IndexError, match="of a chart"):
        common.write_results(tmp_path, "xception", {"results": [1]}, "xception_chart")
    assert {p.name: json.loads(p.read_text()) for p in tmp_path.iterdir()} == {"xception.json": {"results": [1]}}


def test_program(
    models: dict[str, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(common, "QUIET", 0.0)
    assert program(monkeypatch, models, "--out", str(tmp_path), "--mode", "training", "folded") == 0
    record = json.loads((tmp_path / "xception.json").read_text())
    rows = {(r["mode"], r["network"]): r for r in record["results"]}
    assert set(rows) == {(m, name) for m in (MODES[0], MODES[2]) for name in NETWORKS if networks.takes_part(name, m)}
    for r in rows.values():
        assert r["pictures_per_second"] == pytest.approx(2 * r["steps_per_second"]) and r["peak_bytes"] > 0
    training = next(r for r in record["ratios"] if r["mode"] == "training")
    speed = {name: rows["training", name]["steps_per_second"] for name in NETWORKS}
    assert training["xsep_over_inception"] == pytest.approx(speed[OURS] / speed[INCEPTION])
    assert training["pytorch_over_inception"] == pytest.approx(speed[PLAIN] / speed[INCEPTION])
    assert training["chained_over_pytorch"] == pytest.approx(speed[CHAINED] / speed[PLAIN])
    assert [r["network"] for r in record["counted"]] == [PLAIN, CHAINED]
    assert len(record["shares"]) == 7 and record["failures"] == []
    assert (tmp_path / "xception.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["xception.json", "xception.png"]
    printed = " ".join(capsys.readouterr().out.split())
    ours, chained = (f"{speed[name] / speed[INCEPTION]:.3f}" for name in (OURS, CHAINED))
    assert f"{ours} with xsep's, {chained} with a chain; the paper: 28 / 31 = 0.903" in printed
    assert "counted from the shapes" in printed
    assert record["notes"][-1].startswith("the machine was busy") and record["notes"][-1] in printed
    assert rows["training", OURS]["takes"] == {"forward": "cpu", "backward": "cpu"}
    assert rows["training", CHAINED]["takes"]["chain"] == "cpu" and "takes" not in rows["training", PLAIN]
    assert "float32, Xception, xsep, training: its layers ran on cpu" in printed


def test_what_ran_in_words() -> None:
    row = {"dtype": "bfloat16", "network": OURS, "mode": "training", "takes": {"forward": "cuda", "backward": "aten"}}
    said = "bfloat16, Xception, xsep, training: its layers ran on "
    assert bench_xception.taken(row) == f"{said}forward: cuda; backward: aten"
    assert bench_xception.taken({**row, "mode": "inference"}).endswith("inference: its layers ran on cuda")
    row["takes"] = {"forward": "aten", "backward": "aten", "chain": "cuda"}
    assert bench_xception.taken(row) == f"{said}forward: aten; backward: aten; chain: cuda"


def test_what_is_wrong_gets_no_speed(
    models: dict[str, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong: Any = {**models, OURS: copy.deepcopy(models[OURS])}
    with torch.no_grad():
        wrong[OURS].conv3.pointwise.weight.add_(0.01)
    assert program(monkeypatch, wrong, "--out", str(tmp_path), "--mode", "inference") == 1
    record = json.loads((tmp_path / "xception.json").read_text())
    assert {r["network"] for r in record["results"]} == {PLAIN, INCEPTION}
    assert len(record["failures"]) == 3 and all(OURS in failure for failure in record["failures"])
    assert "wrong, so not timed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, why",
    [
        (["--size", "74"], "--size: must be at least 75, got 74"),
        (["--batch", "0"], "--batch: must be at least 1"),
        (["--dtype", "int8"], "int8"),
        (["--mode", "dreaming"], "dreaming"),
        (["--image", "/nowhere.jpg"], "'/nowhere.jpg' cannot be read"),
        (["--out", "/proc/nowhere"], "nothing can be written into '/proc/nowhere'"),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used"),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else "",
)
def test_refusals(arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: Any = common.run("bench_xception", lambda: bench_xception.main(arguments))
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr().err
    assert code == 2 and why in said and said.startswith("bench_xception: ") and said.count("\n") == 1
