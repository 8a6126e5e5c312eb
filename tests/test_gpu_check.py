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
import gpu_plugin  # noqa: E402
import gpu_record  # noqa: E402
import ship_table  # noqa: E402
from gpu_phases import Check, Done, Outcome  # noqa: E402

from xsep import dispatch  # noqa: E402
from xsep.measuring import measure  # noqa: E402
from xsep.tuning import findings  # noqa: E402

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
    def judge(processes: list[Done], results: dict[str, dict[str, Any]], before: Any = ()) -> Outcome:
        return gpu_phases.judge_tests([(done, f"b{i}") for i, done in enumerate(processes)], results, set(before))

    good = {"a": result("passed"), "b": result("skipped", "TF32")}
    fine, late, none = Done(0, ""), Done(None, ""), Done(5, "")
    found = judge([fine, none], good, {"c"})
    assert found[:2] == ("passed", "2 passed, 0 failed, 1 skipped") and found.details["incomplete"] == []
    wrong = {**good, "d": result("failed", f"{ROOT}/x.py is wrong")}
    bad = judge([fine, Done(1, "")], wrong)
    assert bad.status == "failed" and bad.details["failed"] == {"d": "./x.py is wrong"}
    assert bad.details["incomplete"] == []
    found = judge([fine, late], good)
    assert found.status == "unfinished" and found.details["incomplete"] == ["b1"]
    found = judge([late, fine], wrong)
    assert found.status == "failed" and "ran out of time" in found.summary, "what failed comes first"
    assert judge([Done(1, "No module named pytest")], {}) == ("refused", "pytest is not installed", {
        "passed": [], "failed": {}, "skipped": {}, "incomplete": ["b0"], "output": "No module named pytest",
    })  # fmt: skip
    assert judge([fine, Done(2, "ImportError")], good).status == "failed"
    crashed = judge([fine, Done(-11, "crashed")], good)
    assert crashed.status == "failed" and crashed.details["incomplete"] == ["b1"], "a crash is no pass"
    assert judge([late, Done(-11, "crashed")], good).status == "failed"


def written(tmp_path: Path) -> Path:
    path = tmp_path / "test_it.py"
    path.write_text(
        "import os, pytest\n"
        "pytestmark = getattr(pytest.mark, 'gpu')\n"  # not as gpu_tests() looks for it
        "@pytest.mark.parametrize('i', range(8))\n"
        "def test_it(i):\n"
        "    if i == 5 and 'KILL' in os.environ: os._exit(9)\n"
        "    assert i != 2\n"
    )
    return path


def test_killed_tests_go_on_where_they_were(tmp_path: Path) -> None:
    """The plugin writes each result at once and leaves out what passed before."""
    written(tmp_path)

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
    assert [t[-2] for t in second] == ["2", "5", "6", "7"]
    assert "assert 2 != 2" in second["test_it.py::test_it[2]"]["why"]
    assert len(run(XSEP_CHECK_SHARE="3")) == 3


def test_processes_share_the_tests(check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path)
    monkeypatch.setattr(gpu_phases, "gpu_tests", lambda part: [str(path)])
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    phase = gpu_phases.tests("triton", ("triton",))
    found = phase(check)
    assert found[:2] == ("failed", "7 passed, 1 failed, 0 skipped") and found.details["incomplete"] == []
    assert len(list(check.scratch.glob("tests-triton-*.jsonl"))) == 3, "one process for two cores"
    for results in check.scratch.glob("tests-triton-*.jsonl"):
        assert 2 <= len(gpu_phases.read_results(results)) <= 3
    for results in check.scratch.glob("tests-triton-*.jsonl"):
        results.unlink()
    monkeypatch.setenv("KILL", "1")
    found = phase(check)
    assert found.status == "failed" and found.details["incomplete"] == [""]
    assert any(name.endswith("[2]") for name in found.details["failed"]), (
        "one that dies takes no other's results with it"
    )


def test_backends_share_no_process(check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "test_it.py"
    path.write_text(
        "import os, pytest\n"
        "pytestmark = getattr(pytest.mark, 'gpu')\n"
        "@pytest.mark.parametrize('backend', ['aten', 'cuda', 'triton'])\n"
        "def test_one(backend):\n"
        "    if backend == 'triton': os._exit(9)\n"
        "def test_both(): pass\n"
    )
    monkeypatch.setattr(gpu_phases, "gpu_tests", lambda part: [str(path)])
    found = gpu_phases.tests("other", ("cuda", "triton"))(check)
    assert found.status == "failed" and found.details["incomplete"] == ["triton"]
    assert {name.partition("::")[2] for name in found.details["passed"]} == {
        "test_one[aten]",
        "test_one[cuda]",
        "test_both",
    }


NAMES = [f"tests/{f}.py::test_{f}[{i}-{kind}]" for f in "abc" for i in range(5) for kind in gpu_plugin.KINDS]


def test_shards_have_each_test_once_and_the_large_ones_together() -> None:
    large = [f"x.py::test_{name}_of_more_than_two_to_the_31_elements" for name in ("forward", "backward")]
    shards = [gpu_plugin.shard([*NAMES, *large], i, 4) for i in range(4)]
    assert set(large) <= shards[0]
    assert sorted(name for part in shards for name in part) == sorted([*NAMES, *large])
    for part in shards:
        assert 11 <= len(part - set(large)) <= 12
        assert len({name.partition("[")[0] for name in part}) >= 3, "neighbours are in different ones"
    assert gpu_plugin.shard(NAMES[::-1], 1, 4) == gpu_plugin.shard(NAMES, 1, 4), "whatever the order of collecting"


def test_a_share_is_of_every_function_and_every_type() -> None:
    names = [*NAMES, "tests/d.py::test_d"]
    four, ten = gpu_plugin.share(names, 4), gpu_plugin.share(names, 10)
    assert sorted(name.partition("[")[0][-6:] for name in four) == ["test_a", "test_b", "test_c", "test_d"]
    assert len(set(ten)) == 10
    for f in "abc":
        kinds = {gpu_plugin.parameters(name)[1] for name in ten if f"test_{f}[" in name}
        assert kinds == set(gpu_plugin.KINDS)
    assert sorted(gpu_plugin.share(names, 100)) == sorted(names)


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
        ("echo '========= ERROR SUMMARY: 0 errors'; exit 0", "passed", "0 errors, 7 tests"),
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
    path = written(tmp_path)
    path.write_text(path.read_text().replace("assert i != 2", "assert i < 7 or pytest.skip()"))
    monkeypatch.setattr(gpu_phases, "gpu_tests", lambda part: [str(path)])
    found = gpu_phases.sanitizer("memcheck")(check)
    assert found.status == status and summary in found.summary
    calls = (folder / "calls").read_text().splitlines()
    assert len(calls) == 2 and "kernel_substring" in calls[0] and "kernel_substring" not in calls[1]
    assert all("--report-api-errors no" in call for call in calls)


CLEAN = "========= COMPUTE-SANITIZER\n"
SUMMARY = "========= ERROR SUMMARY: 0 errors"
INVALID = "========= Invalid __global__ write of size 4 bytes\n=========     at xsep::fprop"
RACE = "========= Error: Race reported between Write access and Read access"


@pytest.mark.parametrize(
    "done, ran, status, summary",
    [
        pytest.param(Done(0, CLEAN + SUMMARY), "passed", "passed", "0 errors, 1 tests", id="clean"),
        pytest.param(Done(0, CLEAN + SUMMARY), "skipped", "refused", "no test ran", id="all-skipped"),
        pytest.param(Done(0, CLEAN), "passed", "refused", "no summary", id="no-summary"),
        pytest.param(Done(1, CLEAN + SUMMARY), "failed", "failed", "1 tests failed under it", id="test-failed"),
        pytest.param(Done(-11, CLEAN + SUMMARY), "passed", "failed", "exit code -11", id="crash"),
        pytest.param(Done(None, CLEAN), "passed", "unfinished", "out of time after 1", id="late"),
        pytest.param(Done(None, CLEAN + INVALID), "passed", "failed", "no summary", id="late-with-an-error"),
        pytest.param(Done(None, CLEAN + RACE), "passed", "failed", "no summary", id="late-with-a-race"),
        pytest.param(
            Done(0, CLEAN + "========= Error: Device not supported\n" + SUMMARY), "passed", "refused",
            "Device not supported", id="clean-of-nothing",
        ),
    ],
)  # fmt: skip
def test_a_sanitizer_is_judged_by_what_it_found_then_by_whether_it_worked(
    done: Done, ran: str, status: str, summary: str
) -> None:
    found = gpu_phases.judge_sanitizer("memcheck", done, {"t": result(ran)})
    assert found.status == status and summary in found.summary
    if status == "failed" and "========= Invalid" in done.output:
        assert found.details["output"].startswith("========= Invalid") and "xsep::fprop" in found.details["output"]


def test_build_is_for_the_card_at_hand_only(check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def run(check: Check, command: list[str], variables: dict[str, str], cwd: Path) -> Done:
        seen.append((command, variables, cwd))
        return Done(0, "nvcc has gone")

    monkeypatch.setattr(gpu_phases, "run", run)
    monkeypatch.setattr(gpu_phases, "ROOT", tmp_path)
    check.device = "cuda"
    (tmp_path / "xsep").mkdir()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    without = gpu_phases.build(check)
    assert without[:2] == ("failed", "the build made no _C_cuda.so") and without.details["output"] == "nvcc has gone"
    for name in ("_C_cuda.so", "_repeated.so"):
        (tmp_path / "xsep" / name).touch()
    for capability, architecture in (((9, 0), "9.0a"), ((8, 9), "8.9")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda c=capability: c)
        assert gpu_phases.build(check)[:2] == ("passed", "built _C_cuda.so, _repeated.so")
        command, variables, _ = seen[-1]
        assert command == [sys.executable, "setup.py", "build_ext", "--inplace"]
        assert variables["TORCH_CUDA_ARCH_LIST"] == architecture
        assert variables["XSEP_BUILD_CPU"] == "0" and variables["XSEP_BUILD_CUDA"] == "1"


def test_which_backends_are_ready_is_asked_once_and_read_past_warnings(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    told = (
        'import sys; sys.stderr.write(\'{a warning\'); print(\'{"backends": {"triton": {"ready": true}, "cuda": {}}}\')'
    )
    run_all = gpu_phases.run_all

    def run(check: Check, commands: Any, *more: Any) -> list[Done]:
        asked.extend(command for command, _ in commands)
        return run_all(check, [([sys.executable, "-c", told], {})], *more)

    monkeypatch.setattr(gpu_phases, "run_all", run)
    assert gpu_check.ready(check) == ["triton"] and gpu_check.ready(check) == ["triton"]
    assert [command[1:] for command in asked] == [["-m", "xsep", "info", "--json"]]


def test_an_old_setuptools_builds_beside_pyproject(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    import setuptools

    assert gpu_phases.build_folder(check) == ROOT
    monkeypatch.setattr(setuptools, "__version__", "70.2.0")
    folder = gpu_phases.build_folder(check)
    assert sorted(p.name for p in folder.iterdir()) == ["csrc", "setup.py", "xsep"]
    assert (folder / "setup.py").resolve() == ROOT / "setup.py"


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
    check.record["verified"]["triton"] = proof("triton")
    gpu_check.ship(check)
    shipped = findings.from_json(card.read_text())
    assert shipped.verified == ["cuda", "triton"] and shipped.entries["layer"].times["backward"]["triton"] == 2.0
    check.record["verified"] = {}
    gpu_check.ship(check)
    shipped = findings.from_json(card.read_text())
    assert shipped.verified == [] and shipped.entries == {}
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
        found = measure(problem, effort)
        found.refused["triton"] = "wrong: y: error 1"
        return found

    monkeypatch.setattr(ship_table, "measure", fail)
    assert (
        ship_table.main(["--device", "cpu", "--quick", "--dtype", "float32", "--batch", "1", "--out", str(tmp_path)])
        == 1
    )
    table = findings.from_json((tmp_path / "table.json").read_text())
    assert list(table.entries) == [findings.problem_key(layers[1])]
    said = capsys.readouterr().out
    assert said.count("wrong, so not timed") == 2 and "out of memory" in said and "triton: wrong: y: error 1" in said


def test_a_table_goes_on_where_time_was_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def look(problem: Any, effort: Any) -> Any:
        seen.append(problem)
        found = measure(problem, effort)
        found.refused = {"cuda": "wrong: y: error 1" if len(seen) == 1 else "the tensors are on cpu"}
        return found

    monkeypatch.setattr(ship_table, "measure", look)

    def run(out: str, *more: str) -> int:
        few = ["--device", "cpu", "--quick", "--dtype", "float32", "--batch", "1", "--out", str(tmp_path / out)]
        return ship_table.main([*few, "--known", str(tmp_path / "a" / "table.json"), *more])

    assert run("b", "--seconds", "0") == common.LATE and len(seen) == 0
    assert run("a") == 1 and len(seen) == 2
    assert run("b") == 0 and seen[2:] == seen[:1], "what was wrong is looked at again, what was right is not"
    (tmp_path / "a" / "table.json").write_text(
        (tmp_path / "a" / "table.json").read_text().replace('"cuda": "', '"cuda": "0')
    )
    run("b")
    assert len(seen) == 5, "other sources"


def test_what_a_program_wrote_before_it_was_ended_is_kept(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    def python(check: Check, *arguments: str) -> Done:
        into = Path(arguments[-1])
        into.mkdir()
        (into / "table.json").write_text('{"format": 1, "entries": {"b": 2}}')
        return Done(next(codes), "")

    codes = iter((None, common.LATE))

    monkeypatch.setattr(gpu_phases, "python", python)
    (check.out / "table.json").write_text('{"format": 1, "entries": {"a": 1, "b": 1}}')
    assert gpu_check.table(check).status == "unfinished"
    assert json.loads((check.out / "table.json").read_text())["entries"] == {"a": 1, "b": 2}
    (check.out / "table.json").write_text('{"format": 1, "digests": {"cuda": "old"}, "entries": {"a": 1}}')
    assert gpu_check.table(check).status == "unfinished"
    assert json.loads((check.out / "table.json").read_text())["entries"] == {"b": 2}, "other sources"


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
