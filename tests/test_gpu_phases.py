"""The phases of `make gpu-check` as processes, without a GPU: building, shards of tests, sanitizers, and their ends."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Optional

import pytest
import torch

from .gpu_check_support import BENCHMARKS, ROOT, new_check

import gpu_check  # isort: skip
import gpu_phases  # isort: skip
import gpu_plugin  # isort: skip
from gpu_phases import Check, Done, Outcome  # isort: skip


@pytest.fixture
def check(tmp_path: Path) -> Check:
    return new_check(tmp_path)


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


@pytest.mark.parametrize(
    "output, code, status, summary",
    [('{"backends": {"cuda": {"state": "right"}, "cuda-chain": {"state": "right"}}}', 0, "passed",
      "cuda: right, cuda-chain: right"),
     ('{"backends": {"cuda": {"state": "right"}, "cuda-chain": {"state": "wrong"}}}', 1, "failed",
      "cuda: right, cuda-chain: wrong"),
     ('{"backends": {"cuda": {"state": "unknown"}, "cuda-chain": {"state": "right"}}}', 0, "refused",
      "cuda: unknown, cuda-chain: right"),
     ("", 2, "refused", "the cuda backend cannot run here: `python -m xsep info` says why"),
     ("", None, "unfinished", "the check ran out of time")],
    ids=["right", "wrong", "unknown", "not-here", "late"],
)  # fmt: skip
def test_the_card_check(
    output: str, code: Optional[int], status: str, summary: str, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    check.device = "cuda"
    asked: list[tuple[str, ...]] = []

    def python(check: Check, *arguments: str, errors: bool = True) -> Done:
        asked.append(arguments)
        return Done(code, output)

    monkeypatch.setattr(gpu_phases, "python", python)
    found = gpu_phases.card_check(check)
    assert (found.status, found.summary) == (status, summary)
    assert asked == [("-m", "xsep", "check", "--backend", "cuda", "--again", "--json")]
