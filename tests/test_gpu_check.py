"""`make gpu-check` without a GPU: a dry run of every phase; going on, verification, and damaged records."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from xsep import autotuner, dispatch
from xsep.tuning import findings

from .gpu_check_support import BENCHMARKS, ROOT, new_check

import common  # isort: skip
import gpu_check  # isort: skip
import gpu_phases  # isort: skip
import gpu_record  # isort: skip
import ship_table  # isort: skip
from gpu_phases import Check, Done, Outcome  # isort: skip

QUICK = ["--device", "cpu", "--quick"]


@pytest.fixture
def check(tmp_path: Path) -> Check:
    return new_check(tmp_path)


def call(out: Path, *arguments: str) -> int:
    return common.run("gpu_check", lambda: gpu_check.main([*QUICK, "--out", str(out), *arguments]))


def phase(name: str, outcome: Outcome, least: int = 0, full: int = 0, log: Any = None) -> gpu_check.Phase:
    def run(check: Check) -> Outcome:
        if log is not None:
            log.append((name, check.thorough))
        return outcome

    return gpu_check.Phase(name, least, full, ("cuda",), run)


def test_dry_run_of_every_phase(tmp_path: Path) -> None:
    """The one command as a user types it, on the CPU: each phase's programs run, and nothing is wrong."""
    command = [sys.executable, str(BENCHMARKS / "gpu_check.py"), *QUICK, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=540, cwd=tmp_path)
    record = json.loads((tmp_path / "record.json").read_text())
    outputs = {name: entry.get("output", "") for name, entry in record["phases"].items()}
    assert done.returncode == 0, (done.stdout, done.stderr, outputs)
    assert list(record["phases"]) == [p.name for p in gpu_check.PHASES] and record["left_out"] == []
    refused = {name for name, entry in record["phases"].items() if entry["status"] == "refused"}
    networks = {"training-graph", "training-compiled", "inference-graph", "inference-compiled", "xception-float32"}
    gpu_only = {*networks, "sepconv-bfloat16", "sepconv-float16"}
    assert refused - {"memcheck", "racecheck"} == gpu_only
    assert all(e["status"] == "passed" for name, e in record["phases"].items() if name not in refused)
    assert record["verified"] == {}, "a CPU verifies no GPU kernel"
    collected = record["phases"]["tests-cuda"]["skipped"]
    assert len(collected) > 100 and set(collected.values()) == {"Skipped: needs a CUDA device"}
    for name in ("sepconv", "xception", "memory", "cuda", "triton", "chain", "table"):
        json.loads((tmp_path / f"{name}.json").read_text())
    sepconv = json.loads((tmp_path / "sepconv.json").read_text())
    forward = next(r for r in sepconv["results"] if r["mode"] == "forward")
    assert {"nchw", "channels_last", "compiled channels_last", "xsep auto"} <= set(forward["times"])
    assert {r["mode"] for r in sepconv["results"]} == {"forward", "forward+backward"}, (
        "the later phase took nothing away"
    )
    text = "".join(path.read_text() for path in tmp_path.glob("*.json"))
    assert str(ROOT) not in text and str(tmp_path) not in text and str(Path.home()) not in text


def test_without_a_gpu_it_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code = common.run("gpu_check", lambda: gpu_check.main(["--out", str(tmp_path)]))
    said = capsys.readouterr()
    assert code == 2 and said.err.startswith("gpu_check: PyTorch sees no GPU here") and said.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments, why",
    [(["--quick"], "go together"), (["--device", "cpu"], "go together"), ([*QUICK, "--budget", "0"], "--budget"),
     ([*QUICK, "--phase", "lunch"], "lunch")],
    ids=["quick-gpu", "cpu-in-full", "no-budget", "no-such-phase"],
)  # fmt: skip
def test_bad_arguments(arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu_check.main(arguments)
    assert ended.value.code == 2 and why in capsys.readouterr().err


# Going on


def test_what_passed_is_not_run_again_and_all_else_is(check: Check, capsys: pytest.CaptureFixture[str]) -> None:
    log: list[Any] = []
    phases = [
        phase("good", Outcome("passed", "fine"), log=log), phase("bad", Outcome("failed", "no"), log=log),
        phase("none", Outcome("refused", "not here"), log=log), phase("late", Outcome("unfinished", "time"), log=log),
    ]  # fmt: skip
    assert gpu_check.go_through(check, phases, again=False) == 1
    check.record = gpu_record.load(check.out / "record.json", "card")[0]
    assert gpu_check.go_through(check, phases, again=False) == 1
    assert [name for name, _ in log] == ["good", "bad", "none", "late", "bad", "none", "late"]
    assert "good: done before" in capsys.readouterr().out
    gpu_check.go_through(check, phases, again=True)
    assert len(log) == 11


def test_other_sources_are_another_matter(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[Any] = []
    phases = [phase("good", Outcome("passed", "fine"), log=log)]
    gpu_check.go_through(check, phases, again=False)
    monkeypatch.setattr(gpu_phases, "phase_digests", lambda backends: {b: "new" for b in backends})
    gpu_check.go_through(check, phases, again=False)
    assert len(log) == 2


def test_budget_cuts_repetitions_first_then_what_is_worth_least(
    check: Check, capsys: pytest.CaptureFixture[str]
) -> None:
    log: list[Any] = []
    check.deadline = time.monotonic() + 100
    phases = [
        phase("first", Outcome("passed", ""), 10, 50, log), phase("second", Outcome("passed", ""), 40, 90, log),
        phase("third", Outcome("passed", ""), 200, 300, log),
    ]  # fmt: skip
    assert gpu_check.go_through(check, phases, again=False) == 0
    assert log == [("first", False), ("second", False)]
    assert json.loads((check.out / "record.json").read_text())["left_out"] == ["third"]
    said = capsys.readouterr().out
    assert "left out, for want of time: third" in said and "fewer repetitions" in said


def test_each_phase_is_on_disk_when_the_next_begins(check: Check) -> None:
    def look(check: Check) -> Outcome:
        assert json.loads((check.out / "record.json").read_text())["phases"]["first"]["status"] == "passed"
        raise KeyboardInterrupt

    phases = [phase("first", Outcome("passed", "")), gpu_check.Phase("second", 0, 0, ("cuda",), look)]
    with pytest.raises(KeyboardInterrupt):
        gpu_check.go_through(check, phases, again=False)
    record = json.loads((check.out / "record.json").read_text())
    assert record["phases"]["second"]["status"] == "unfinished"
    assert sorted(p.name for p in check.out.iterdir()) == ["record.json"]


@pytest.mark.parametrize(
    "text, why",
    [("{", "cannot be read"), ("[]", "cannot be read"), ('{"format": 7}', "another format"),
     ('{"format": 1, "card": "T4", "phases": {}}', "is of 'T4'")],
    ids=["half", "list", "format", "card"],
)  # fmt: skip
def test_a_damaged_or_foreign_record_is_begun_anew(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "record.json").write_text(text)
    record, said = gpu_record.load(tmp_path / "record.json", "H200")
    assert record == {"format": 1, "card": "H200", "phases": {}, "verified": {}} and why in said


def test_a_full_disk_is_one_sentence(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, record: dict[str, Any]) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(common, "write_json", full)
    with pytest.raises(common.BenchmarkError, match="No space left on device"):
        gpu_check.go_through(check, [phase("first", Outcome("passed", ""))], again=False)
    assert list(check.out.iterdir()) == []


# Verification


def entry(status: str = "passed", digests: Any = None, passed: int = 3, **more: Any) -> dict[str, Any]:
    found = digests or gpu_phases.phase_digests(("cuda", "triton"))
    return {"status": status, "digests": found, "date": "2026-01-02", "passed": ["t"] * passed, **more}


def others(*failed: str, incomplete: tuple[str, ...] = ()) -> dict[str, Any]:
    return entry("failed", failed=dict.fromkeys(failed, "no"), incomplete=list(incomplete))


@pytest.mark.parametrize(
    "phases, expected",
    [
        pytest.param({"tests-cuda": entry(), "tests-other": entry()}, ["cuda"], id="one"),
        pytest.param({"tests-cuda": entry()}, [], id="others-not-run"),
        pytest.param({"tests-cuda": entry("failed"), "tests-other": entry()}, [], id="failed"),
        pytest.param({"tests-cuda": entry("unfinished"), "tests-other": entry()}, [], id="unfinished"),
        pytest.param({"tests-cuda": entry(passed=0), "tests-other": entry()}, [], id="all-skipped"),
        pytest.param({"tests-cuda": entry(digests={"cuda": "old"}), "tests-other": entry()}, [], id="older-sources"),
        pytest.param({"tests-cuda": entry(), "tests-triton": entry(), "tests-other": others("t.py::t[fp32-aten]")},
                     ["cuda", "triton"], id="aten-failed"),
        pytest.param({"tests-cuda": entry(), "tests-triton": entry(), "tests-other": others("t.py::t[triton-fp32]")},
                     ["cuda"], id="triton-failed"),
        pytest.param({"tests-cuda": entry(), "tests-triton": entry(), "tests-other": others("t.py::t[fp32]")},
                     [], id="what-is-of-both-failed"),
        pytest.param({"tests-cuda": entry(), "tests-other": others("t.py::t[aten]", incomplete=("",))},
                     [], id="aten-failed-and-others-not-run"),
        pytest.param({"tests-cuda": entry(), "tests-triton": entry(), "tests-other": others(incomplete=("triton",))},
                     ["cuda"], id="triton-crashed"),
        pytest.param({"tests-cuda": entry(), "tests-other": entry("unfinished")}, [], id="others-unfinished"),
        pytest.param({"tests-cuda": entry(), "tests-triton": entry(),
                      "tests-other": entry("unfinished", incomplete=["cuda"])}, ["triton"], id="cuda-unfinished"),
    ],
)  # fmt: skip
def test_a_backend_is_verified_by_all_its_tests_or_not_at_all(phases: dict[str, Any], expected: list[str]) -> None:
    record: dict[str, Any] = {"phases": phases, "verified": {}}
    gpu_check.verify(record)
    assert list(record["verified"]) == expected
    assert all(gpu_check.is_verified(record, name) for name in expected)


def test_the_last_verified_digest_is_kept_when_sources_change() -> None:
    old = {"digest": "old", "date": "2026-01-01", "tests": 9}
    record: dict[str, Any] = {"phases": {"tests-cuda": entry("failed")}, "verified": {"cuda": old}}
    gpu_check.verify(record)
    assert record["verified"] == {"cuda": old} and not gpu_check.is_verified(record, "cuda")


def test_what_the_same_sources_disprove_is_taken_back() -> None:
    record: dict[str, Any] = {"phases": {"tests-cuda": entry(), "tests-other": entry()}, "verified": {}}
    gpu_check.verify(record)
    record["phases"]["tests-cuda"] = entry("failed", failed={"t.py::t[1]": "no"}, incomplete=[])
    gpu_check.verify(record)
    assert record["verified"] == {}


def proof(backend: str) -> dict[str, Any]:
    return {"digest": gpu_phases.phase_digests((backend,))[backend], "date": "2026-01-02", "tests": 3}


@pytest.fixture
def card(check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A record of a card whose cuda backend is verified, and where its table goes."""
    monkeypatch.setattr(findings, "TABLES", tmp_path / "tables")
    monkeypatch.setattr(dispatch, "card_of", lambda device, place: findings.Card("NVIDIA H200", "sm_90"))
    monkeypatch.setattr(common, "device_name", lambda device: "NVIDIA H200")
    check.device = "cuda"
    check.record["verified"] = {"cuda": proof("cuda")}
    return tmp_path / "tables" / "nvidia-h200.json"


def measured(check: Check, **digests: str) -> None:
    table = findings.fresh(findings.Card("NVIDIA H200", "sm_90"))
    table.digests.update(digests)
    times = {"aten": 5.0, "aten, NCHW": 6.0, "cuda": 4.0, "triton": 3.0}
    table.entries["layer"] = findings.Finding("layer", {"forward": times, "backward": {"aten": 1.0, "triton": 2.0}})
    table.probes["probe"] = findings.Finding("probe", {"forward": times, "backward": {}})
    gpu_record.write_json(check.out, "table.json", findings.to_dict(table))


def test_a_shipped_table_has_what_is_verified_and_follows_it(check: Check, card: Path) -> None:
    check.record["verified"], cuda = {}, check.record["verified"]
    gpu_check.ship(check)
    assert not card.exists(), "a table of nothing helps nobody"
    check.record["verified"] = cuda
    gpu_check.ship(check)
    shipped = findings.from_json(card.read_text())
    assert (shipped.card, shipped.verified, shipped.entries) == ("NVIDIA H200", ["cuda"], {}), "before it is measured"
    measured(check)
    gpu_check.ship(check)
    times = findings.from_json(card.read_text()).entries["layer"].times
    assert times == {"forward": {"aten": 5.0, "aten, NCHW": 6.0, "cuda": 4.0}, "backward": {"aten": 1.0}}
    probe = findings.from_json(card.read_text()).probes["probe"].times
    assert probe == {"forward": times["forward"], "backward": {}}
    check.record["verified"]["triton"] = proof("triton")
    gpu_check.ship(check)
    shipped = findings.from_json(card.read_text())
    assert shipped.verified == ["cuda", "triton"] and shipped.entries["layer"].times["backward"]["triton"] == 2.0
    check.record["verified"] = {}
    gpu_check.ship(check)
    shipped = findings.from_json(card.read_text())
    assert shipped.verified == [] and shipped.entries == shipped.probes == {}
    assert [p.name for p in card.parent.iterdir()] == ["nvidia-h200.json"]


def test_times_of_older_sources_are_not_shipped(check: Check, card: Path) -> None:
    measured(check, cuda="old")
    gpu_check.ship(check)
    shipped = findings.from_json(card.read_text())
    assert shipped.verified == ["cuda"] and "cuda" not in shipped.entries["layer"].times["forward"]


def test_a_table_that_cannot_be_written_is_one_sentence(check: Check, card: Path) -> None:
    card.parent.write_text("a file where the folder should be")
    with pytest.raises(common.BenchmarkError, match=r"tables' cannot be written into"):
        gpu_check.ship(check)


def test_every_phase_on_a_gpu_ships(check: Check, card: Path) -> None:
    gpu_check.go_through(check, [phase("first", Outcome("failed", "no"))], again=False)
    assert findings.from_json(card.read_text()).verified == ["cuda"]


def test_one_wrong_layer_does_not_stop_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    layers = ship_table.problems("cpu", ["float32"], 1, True)

    def fail(problem: Any, effort: Any) -> Any:
        if problem == layers[0]:
            raise RuntimeError("out of memory\nand more")
        found = autotuner.measured(problem, effort)
        found.refused["triton"] = "wrong: y: error 1"
        return found

    monkeypatch.setattr(ship_table, "measured", fail)
    assert (
        ship_table.main(["--device", "cpu", "--quick", "--dtype", "float32", "--batch", "1", "--out", str(tmp_path)])
        == 1
    )
    table = findings.from_json((tmp_path / "table.json").read_text())
    assert list(table.entries) == [findings.problem_key(layer) for layer in layers[1:]]
    said = capsys.readouterr().out
    assert said.count("wrong, so not timed") == 3 and "out of memory" in said and "triton: wrong: y: error 1" in said


def test_a_table_goes_on_where_time_was_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def look(problem: Any, effort: Any) -> Any:
        seen.append(problem)
        found = autotuner.measured(problem, effort)
        found.refused = {"cuda": "wrong: y: error 1" if len(seen) == 1 else "the tensors are on cpu"}
        return found

    monkeypatch.setattr(ship_table, "measured", look)

    def run(out: str, *more: str) -> int:
        few = ["--device", "cpu", "--quick", "--dtype", "float32", "--batch", "1", "--out", str(tmp_path / out)]
        return ship_table.main([*few, "--known", str(tmp_path / "a" / "table.json"), *more])

    assert run("b", "--seconds", "0") == common.LATE and len(seen) == 0
    assert run("a") == 1 and [p.op for p in seen] == ["separable", "chain", "separable"]
    assert run("b") == 0 and seen[3:] == seen[:1], "what was wrong is looked at again, what was right is not"
    (tmp_path / "a" / "table.json").write_text(
        (tmp_path / "a" / "table.json").read_text().replace('"cuda": "', '"cuda": "0')
    )
    run("b")
    assert len(seen) == 7, "other sources"


def test_what_a_program_wrote_before_it_was_ended_is_kept(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    def python(check: Check, *arguments: str) -> Done:
        into = Path(arguments[-1])
        into.mkdir()
        (into / "table.json").write_text('{"format": 1, "entries": {"b": 2}, "probes": {}}')
        return Done(next(codes), "")

    codes = iter((None, common.LATE))

    monkeypatch.setattr(gpu_phases, "python", python)
    (check.out / "table.json").write_text('{"format": 1, "entries": {"a": 1, "b": 1}, "probes": {"c": 1}}')
    assert gpu_check.table(check).status == "unfinished"
    table = json.loads((check.out / "table.json").read_text())
    assert table["entries"] == {"a": 1, "b": 2} and table["probes"] == {"c": 1}
    (check.out / "table.json").write_text('{"format": 1, "digests": {"cuda": "old"}, "entries": {"a": 1}}')
    assert gpu_check.table(check).status == "unfinished"
    assert json.loads((check.out / "table.json").read_text())["entries"] == {"b": 2}, "other sources"


def test_a_gpus_table_has_the_cost_models_layers_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def timed(backends: Any, dtypes: Any, effort: Any, seconds: float) -> dict[str, findings.Finding]:
        asked.append((backends, dtypes, seconds))
        return {"probe": findings.Finding("probe", {"forward": {"aten": 1.0}, "backward": {}})}

    monkeypatch.setattr(common, "choose_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(common, "environment", lambda device: {"date": "today"})
    monkeypatch.setattr(dispatch, "card_of", lambda device, place: findings.Card("NVIDIA H200", "sm_90"))
    monkeypatch.setattr(ship_table.card_check, "time_probes", timed)
    monkeypatch.setattr(ship_table, "measured", lambda p, effort: findings.Finding(str(p), {"forward": {"aten": 1.0}}))
    few = ["--quick", "--dtype", "bfloat16", "--seconds", "60", "--known", str(tmp_path / "a" / "table.json")]
    before = torch.backends.cudnn.benchmark
    for out in ("a", "b"):
        assert ship_table.main([*few, "--out", str(tmp_path / out)]) == 0
    torch.backends.cudnn.benchmark = before
    assert asked == [(("cuda", "triton"), [torch.bfloat16], 15.0)], "a quarter of the time, and never again"
    assert "1 layers for the cost model" in capsys.readouterr().out
    table = findings.from_json((tmp_path / "a" / "table.json").read_text())
    assert list(table.probes) == ["probe"] and len(table.entries) == 3
    assert not (tmp_path / "b" / "table.json").exists(), "there was nothing to add"


def sepconv(names: list[str], mode: str = "forward", **environment: str) -> dict[str, Any]:
    row = {
        "dtype": "bfloat16", "mode": mode, "shape": "5→7 @9", "count": 2, "c_in": 5, "c_out": 7, "height_width": 9,
        "floor_us": 1.0, "times": {name: {"us": float(i + 1)} for i, name in enumerate(names)}, "ratios": {},
    }  # fmt: skip
    return {
        "benchmark": "sepconv", "batch": 1, "size": 9, "photographs": [], "limits": {}, "failures": [], "notes": [],
        "environment": {"device": "card", "torch": "2", "digests": {}, **environment}, "results": [row], "totals": [],
    }  # fmt: skip


def test_charts_are_of_the_figures_in_the_file_or_drawn_later(
    check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    record = {**sepconv(["nchw", "channels_last", "xsep auto"]), "device_type": "cuda", "figure": "median"}
    record["environment"]["threads"] = 1
    record["totals"] = [{"dtype": "bfloat16", "mode": "forward", "times": record["results"][0]["times"]}]
    gpu_record.write_json(tmp_path, "sepconv.json", record)
    gpu_record.merge_file(tmp_path / "sepconv.json", check.out)
    assert (check.out / "sepconv.png").read_bytes().startswith(b"\x89PNG")
    with monkeypatch.context() as patched:
        patched.setattr(common, "chart_module", lambda name: None)
        gpu_record.merge_file(tmp_path / "sepconv.json", check.out)
    assert not (check.out / "sepconv.png").exists()
    assert gpu_record.draw_missing(check.out) == ["out/sepconv.png"] and gpu_record.draw_missing(check.out) == []


def test_no_phase_may_eat_all_the_time(check: Check, capsys: pytest.CaptureFixture[str]) -> None:
    check.deadline = time.monotonic() + 1000
    left: list[float] = []

    def look(check: Check) -> Outcome:
        left.append(check.left())
        return Outcome("passed", "")

    rows = (("a", 50, 100), ("b", 250, 300), ("c", 150, 600))
    gpu_check.go_through(check, [gpu_check.Phase(name, least, full, (), look) for name, least, full in rows], True)
    assert left[0] == pytest.approx(600, abs=5), "the least of b and c is kept for them"
    assert left[1] == pytest.approx(850, abs=5) and left[2] == pytest.approx(1000, abs=5)
    assert check.left() > 990, "what a phase did not need is the next one's"
    assert "a 50-100, b 250-300, c 150-600" in capsys.readouterr().out
    later = [gpu_check.Phase(name, least, 0, (), look) for name, least in (("b", 40), ("c", 30))]
    assert gpu_check.may_take(250, gpu_check.Phase("a", 10, 100, (), look), later) == 210, "in the order of worth"


def test_the_tests_leave_time_for_the_table_and_the_benchmarks() -> None:
    names = [p.name for p in gpu_check.PHASES]
    assert names.index("table") < names.index("sepconv-bfloat16") < names.index("memcheck")
    i = names.index("tests-triton")
    later = gpu_check.PHASES[i + 1 :]
    must = sum(p.least for p in later[: names.index("sepconv-bfloat16") - i])
    assert gpu_check.may_take(380, gpu_check.PHASES[i], list(later)) <= 380 - must


def test_results_of_two_phases_come_together() -> None:
    eager = sepconv(["nchw", "channels_last", "xsep cuda"])
    both = gpu_record.merged(eager, sepconv(["nchw", "channels_last", "compiled nchw", "xsep auto"]))
    (row,) = both["results"]
    assert set(row["times"]) == {"nchw", "channels_last", "compiled nchw", "xsep cuda", "xsep auto"}
    assert row["ratios"]["cuda"]["compiled"] == 1.0 and row["ratios"]["auto"]["nchw"] == 0.25
    assert both["totals"][0]["times"]["compiled nchw"] == {"us": 6.0}
    added = gpu_record.merged(both, sepconv(["nchw", "xsep auto"], "forward+backward"))
    assert [r["mode"] for r in added["results"]] == ["forward", "forward+backward"]


@pytest.mark.parametrize("fact", ["device", "torch", "digests"])
def test_results_of_another_run_are_replaced(fact: str) -> None:
    new = sepconv(["nchw", "xsep auto"], **{fact: "other"})
    assert gpu_record.merged(sepconv(["nchw", "compiled nchw", "xsep auto"]), new) == new
