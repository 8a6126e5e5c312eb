"""`make gpu-check` without a GPU: a dry run of every phase; kills, refusals and damaged records."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import common  # noqa: E402
import gpu_check  # noqa: E402
import gpu_phases  # noqa: E402
import gpu_record  # noqa: E402
from gpu_phases import Check, Done, Outcome  # noqa: E402

QUICK = ["--device", "cpu", "--quick"]


@pytest.fixture
def check(tmp_path: Path) -> Check:
    scratch, out = tmp_path / "scratch", tmp_path / "out"
    scratch.mkdir()
    out.mkdir()
    record = {"format": 1, "card": "card", "phases": {}, "verified": {}}
    return Check("cpu", True, out, time.monotonic() + 60, scratch, record)


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
    gpu_only = {"xception-graph", "xception-compiled", "xception-float32", "sepconv-bfloat16", "sepconv-float16"}
    assert refused - {"memcheck", "racecheck"} == gpu_only
    assert all(e["status"] == "passed" for name, e in record["phases"].items() if name not in refused)
    assert record["verified"] == {}, "a CPU verifies no GPU kernel"
    collected = record["phases"]["tests-cuda"]["skipped"]
    assert len(collected) > 100 and set(collected.values()) == {"Skipped: needs a CUDA device"}
    for name in ("sepconv", "xception", "memory", "cuda", "triton", "table"):
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


# Processes


def test_what_hangs_is_ended_with_all_it_started(check: Check, tmp_path: Path) -> None:
    check.deadline = time.monotonic() + 1.5
    code = f"import os, subprocess, sys, time; p = subprocess.Popen(['sleep', '60']); open({str(tmp_path / 'pid')!r}, "
    code += "'w').write(str(p.pid)); print('begun', flush=True); time.sleep(60)"
    done = gpu_phases.python(check, "-c", code)
    assert done.code is None and "begun" in done.output
    pid = int((tmp_path / "pid").read_text())
    for _ in range(50):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("the child of the child still runs")


def result(outcome: str, why: str = "") -> dict[str, Any]:
    return {"outcome": outcome, "why": why}


def test_tests_are_judged_by_their_results() -> None:
    judge = gpu_phases.judge_tests
    good = {"a": result("passed"), "b": result("skipped", "TF32")}
    assert judge(Done(0, ""), good, {"c"})[:2] == ("passed", "2 passed, 0 failed, 1 skipped")
    bad = judge(Done(1, ""), {**good, "d": result("failed", f"{ROOT}/x.py is wrong")}, set())
    assert bad.status == "failed" and bad.details["failed"] == {"d": "./x.py is wrong"}
    assert judge(Done(None, ""), good, set()).status == "unfinished"
    assert judge(Done(1, "No module named pytest"), {}, set()) == ("refused", "pytest is not installed", {
        "passed": [], "failed": {}, "skipped": {}, "output": "No module named pytest",
    })  # fmt: skip
    assert judge(Done(2, "ImportError"), {}, set()).status == "failed"
    assert judge(Done(-11, "crashed"), good, set()).status == "failed", "a crash is no pass"


def test_killed_tests_go_on_where_they_were(tmp_path: Path) -> None:
    """The plugin writes each result at once, leaves out what passed before, and takes an even share."""
    (tmp_path / "test_it.py").write_text(
        "import os, pytest\n"
        "@pytest.mark.parametrize('i', range(8))\n"
        "def test_it(i):\n"
        "    if i == 5 and 'KILL' in os.environ: os._exit(9)\n"
        "    assert i != 2\n"
    )

    def run(**variables: str) -> dict[str, dict[str, Any]]:
        results = tmp_path / "results.jsonl"
        results.unlink(missing_ok=True)
        paths = os.pathsep.join([str(BENCHMARKS), str(ROOT)])
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "gpu_plugin", "-p", "no:cacheprovider", "test_it.py"],
            cwd=tmp_path, capture_output=True,
            env={**os.environ, "PYTHONPATH": paths, "XSEP_CHECK_RESULTS": str(results), **variables},
        )  # fmt: skip
        with open(results, "a") as stream:
            stream.write('{"test": "half a li')
        return gpu_phases.read_results(results)

    first = run(KILL="1")
    assert [r["outcome"] for r in first.values()] == ["passed", "passed", "failed", "passed", "passed"]
    passed = tmp_path / "passed.txt"
    passed.write_text("\n".join(t for t, r in first.items() if r["outcome"] == "passed"))
    second = run(XSEP_CHECK_PASSED=str(passed))
    assert [t[-2] for t in second] == ["2", "5", "6", "7"] and "assert 2 != 2" in second["test_it.py::test_it[2]"][
        "why"
    ]
    assert [t[-2] for t in run(XSEP_CHECK_SHARE="3")] == ["0", "2", "5"]


FAKE_SANITIZER = """#!/bin/sh
case "$*" in *--help*) echo "  --kernel-name arg"; exit 0;; esac
echo "$*" >> "$(dirname "$0")/calls"
case "$*" in *kernel_substring*) echo "========= Error: no such option"; exit 1;; esac
while [ "$1" != "{python}" ]; do shift; done
"$@" || true
{end}
"""


@pytest.mark.parametrize(
    "end, status, summary",
    [
        ("echo '========= ERROR SUMMARY: 0 errors'; exit 0", "passed", "0 errors"),
        ("echo '========= ERROR SUMMARY: 3 errors'; exit 99", "failed", "3 errors"),
        ("echo '========= Error: Device not supported'; exit 1", "refused", "Device not supported"),
    ],
    ids=["clean", "errors", "refused"],
)  # fmt: skip
def test_compute_sanitizer(
    check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, status: str, summary: str
) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    fake = folder / "compute-sanitizer"
    fake.write_text(FAKE_SANITIZER.replace("{python}", sys.executable).replace("{end}", end))
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    found = gpu_phases.sanitizer("memcheck")(check)
    assert found.status == status and summary in found.summary
    calls = (folder / "calls").read_text().splitlines()
    assert len(calls) == 2 and "kernel_substring" in calls[0] and "kernel_substring" not in calls[1]


def test_build_is_for_the_card_at_hand_only(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def run(check: Check, command: list[str], variables: dict[str, str], cwd: Path) -> Done:
        seen.append((command, variables, cwd))
        return Done(0, "")

    monkeypatch.setattr(gpu_phases, "run", run)
    check.device = "cuda"
    for capability, architecture in (((9, 0), "9.0a"), ((8, 9), "8.9")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda c=capability: c)
        assert gpu_phases.build(check).status == "passed"
        command, variables, _ = seen[-1]
        assert command == [sys.executable, "setup.py", "build_ext", "--inplace"]
        assert variables["TORCH_CUDA_ARCH_LIST"] == architecture and variables["XSEP_BUILD_CPU"] == "0"


def test_an_old_setuptools_builds_beside_pyproject(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    import setuptools

    assert gpu_phases.build_folder(check) == ROOT
    monkeypatch.setattr(setuptools, "__version__", "70.2.0")
    folder = gpu_phases.build_folder(check)
    assert sorted(p.name for p in folder.iterdir()) == ["csrc", "setup.py", "xsep"]
    assert (folder / "setup.py").resolve() == ROOT / "setup.py"


# Verification


def entry(status: str = "passed", digests: Any = None, passed: int = 3) -> dict[str, Any]:
    found = digests or gpu_phases.phase_digests(("cuda", "triton"))
    return {"status": status, "digests": found, "date": "2026-01-02", "passed": ["t"] * passed}


@pytest.mark.parametrize(
    "phases, expected",
    [
        pytest.param({"tests-cuda": entry(), "tests-other": entry()}, ["cuda"], id="one"),
        pytest.param({"tests-cuda": entry()}, [], id="others-not-run"),
        pytest.param({"tests-cuda": entry("failed"), "tests-other": entry()}, [], id="failed"),
        pytest.param({"tests-cuda": entry("unfinished"), "tests-other": entry()}, [], id="unfinished"),
        pytest.param({"tests-cuda": entry(passed=0), "tests-other": entry()}, [], id="all-skipped"),
        pytest.param({"tests-cuda": entry(digests={"cuda": "old"}), "tests-other": entry()}, [], id="older-sources"),
    ],
)
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


def test_no_phase_may_eat_all_the_time(check: Check) -> None:
    check.deadline = time.monotonic() + 1000
    left: list[float] = []

    def look(check: Check) -> Outcome:
        left.append(check.left())
        return Outcome("passed", "")

    gpu_check.go_through(check, [gpu_check.Phase(n, 0, full, (), look) for n, full in (("a", 10), ("b", 600))], True)
    assert left[0] == pytest.approx(500, abs=5) and left[1] == pytest.approx(900, abs=5)
    assert check.left() > 900, "what a phase did not need is the next one's"


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
