"""What the phases of gpu_check do. Each runs programs of this project as processes of their own, so that one which
hangs or takes the card down ends alone."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Optional

import common
import gpu_plugin
import gpu_record

ROOT = common.HERE.parent
#: How many GPU tests each compute-sanitizer tool repeats, spread evenly over all.
SANITIZED_TESTS = 24


class Outcome(NamedTuple):
    status: str  # of gpu_record.STATUSES
    summary: str  # one sentence
    details: dict[str, Any] = {}  # noqa: RUF012


@dataclass
class Check:
    """One call of gpu_check: what the phases need to know."""

    device: str  # "cuda" or "cpu"
    quick: bool
    out: Path
    deadline: float  # time.monotonic()
    scratch: Path
    record: dict[str, Any]
    thorough: bool = True  # there is time for full repetitions
    phase_deadline: float = math.inf  # likewise, of the phase that runs: none may eat all the time

    @property
    def gpu(self) -> bool:
        return self.device == "cuda"

    def left(self) -> float:
        return min(self.deadline, self.phase_deadline) - time.monotonic()


class Done(NamedTuple):
    code: Optional[int]  # None where it ran out of time
    output: str


def clean(text: str) -> str:
    """Without the names of this machine's folders."""
    for path, name in (
        (str(ROOT), "."),
        (tempfile.gettempdir(), "<tmp>"),
        (sys.prefix, "<python>"),
        (str(Path.home()), "~"),
    ):
        text = text.replace(path, name)
    return re.sub(r"(/[\w.+-]+)+/(site|dist)-packages", "<packages>", text)


def last_words(text: str, lines: int = 12) -> str:
    return clean("\n".join(text.strip().splitlines()[-lines:]))[-2000:]


def run(check: Check, command: list[str], variables: Optional[dict[str, str]] = None, cwd: Path = ROOT) -> Done:
    """A process of its own group, ended with all it started when the time is over or this program is interrupted."""
    environment: dict[str, str] = {**os.environ, **(variables or {})}
    paths = [str(ROOT), str(common.HERE), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command, cwd=cwd, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        code: Optional[int] = None
        try:
            code = process.wait(timeout=max(check.left(), 1.0))
        except subprocess.TimeoutExpired:
            pass
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        return Done(code, output.read())


def python(check: Check, *arguments: str, variables: Optional[dict[str, str]] = None) -> Done:
    return run(check, [sys.executable, *arguments], variables)


# Building


def build(check: Check) -> Outcome:
    """In place, with this very Python; on a GPU for its architecture only, and without the CPU's kernels."""
    variables = {"XSEP_BUILD_CPU": "0", "MAX_JOBS": os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))}
    if check.gpu:
        import torch

        major, minor = torch.cuda.get_device_capability()
        variables["TORCH_CUDA_ARCH_LIST"] = "9.0a" if (major, minor) == (9, 0) else f"{major}.{minor}"
    else:
        variables["XSEP_BUILD_CUDA"] = "0"
    arguments = ["setup.py", "build_ext", "--inplace" if check.gpu else f"--build-lib={check.scratch / 'built'}"]
    started = time.monotonic()
    done = run(check, [sys.executable, *arguments], variables, build_folder(check))
    details: dict[str, Any] = {"seconds_of_compiling": round(time.monotonic() - started, 1), "settings": variables}
    if done.code is None:
        return Outcome("unfinished", "the build ran out of time", details)
    if done.code:
        return Outcome("failed", "the build failed", {**details, "output": last_words(done.output, 30)})
    libraries = ROOT / "xsep" if check.gpu else check.scratch / "built" / "xsep"
    details["built"] = sorted(p.name for p in libraries.glob("_C*.so"))
    return Outcome("passed", f"built {', '.join(details['built']) or 'nothing'}", details)


def build_folder(check: Check) -> Path:
    """Where setup.py runs: here, or, for a setuptools too old for pyproject.toml's licence field, a folder of links to
    everything but that file."""
    import setuptools

    if int(setuptools.__version__.split(".")[0]) >= 77:
        return ROOT
    folder = check.scratch / "build"
    folder.mkdir(exist_ok=True)
    for name in ("setup.py", "csrc", "xsep"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    return folder


# Tests


def gpu_tests(part: str) -> list[str]:
    """Files with tests that are marked for a GPU: those below tests/<part>, or all others where part is "other"."""
    marked = [p for p in sorted((ROOT / "tests").rglob("test_*.py")) if re.search(r"\bmark\.gpu\b", p.read_text())]
    named = {p: p.relative_to(ROOT / "tests").parts[0] for p in marked}
    chosen = [p for p, first in named.items() if first == part or (part == "other" and first not in ("cuda", "triton"))]
    return [str(p.relative_to(ROOT)) for p in chosen]


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """The last word on each test; half a line, where the process was killed, is left out."""
    found = {}
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                result = json.loads(line)
            except ValueError:
                continue
            if "test" in result:
                found[result["test"]] = result
    return found


def tests(part: str, backends: tuple[str, ...]) -> Callable[[Check], Outcome]:
    def phase(check: Check) -> Outcome:
        files = gpu_tests(part)
        if not files:
            return Outcome("passed", "there are no such tests")
        before = check.record["phases"].get(f"tests-{part}", {})
        passed = set(before.get("passed", [])) if before.get("digests") == phase_digests(backends) else set()
        results, done_file = check.scratch / f"tests-{part}.jsonl", check.scratch / f"passed-{part}.txt"
        done_file.write_text("\n".join(sorted(passed)))
        variables = {gpu_plugin.RESULTS: str(results), gpu_plugin.PASSED: str(done_file)}
        command = [
            "-m",
            "pytest",
            "-m",
            "gpu",
            "-q",
            "--tb=short",
            "-p",
            "no:cacheprovider",
            "-p",
            "gpu_plugin",
            *files,
        ]
        done = python(check, *command, variables=variables)
        return judge_tests(done, read_results(results), passed)

    return phase


def judge_tests(done: Done, results: dict[str, dict[str, Any]], before: set[str]) -> Outcome:
    """What the tests of one process, and those that passed in an earlier one, come to."""
    by = {o: sorted(t for t, r in results.items() if r["outcome"] == o) for o in ("passed", "failed", "skipped")}
    details: dict[str, Any] = {
        "passed": sorted(before | set(by["passed"])), "failed": {t: clean(results[t]["why"]) for t in by["failed"]},
        "skipped": {t: clean(results[t]["why"]) for t in by["skipped"]},
    }  # fmt: skip
    counts = f"{len(details['passed'])} passed, {len(by['failed'])} failed, {len(by['skipped'])} skipped"
    if done.code is None:
        return Outcome("unfinished", f"ran out of time: {counts} by then", details)
    if done.code not in (0, 1, 5) or (done.code == 1 and not by["failed"]):
        missing = "No module named pytest" in done.output
        details["output"] = last_words(done.output, 30)
        return Outcome("refused" if missing else "failed", "pytest is not installed" if missing else counts, details)
    return Outcome("failed" if by["failed"] else "passed", counts, details)


def sanitizer(tool: str) -> Callable[[Check], Outcome]:
    """compute-sanitizer over a share of the CUDA tests, watching the project's kernels only where it can."""

    def phase(check: Check) -> Outcome:
        found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
        if found is None:
            return Outcome("refused", "compute-sanitizer is not installed")
        options = run(check, [found, "--help"]).output
        only = ["--kernel-name", "kernel_substring=xsep"] if "--kernel-name" in options else []
        results = check.scratch / f"{tool}.jsonl"
        share = SANITIZED_TESTS if check.thorough else SANITIZED_TESTS // 3
        variables = {gpu_plugin.RESULTS: str(results), gpu_plugin.SHARE: str(share)}
        if tool == "memcheck":
            # Else PyTorch's allocator keeps all tensors in a few blocks, and a step past one lands in the next.
            variables["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        pytest = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "-p", "gpu_plugin"]
        done = Done(0, "")
        for wish in [only, []] if only else [[]]:
            results.unlink(missing_ok=True)
            command = [found, "--tool", tool, "--error-exitcode", "99", "--print-limit", "20", *wish, *pytest]
            done = run(check, [*command, *gpu_tests("cuda")], variables)
            if read_results(results) or done.code is None:
                break
        return judge_sanitizer(tool, done, read_results(results))

    return phase


def judge_sanitizer(tool: str, done: Done, results: dict[str, dict[str, Any]]) -> Outcome:
    found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", done.output)
    ran = sum(r["outcome"] == "passed" for r in results.values())
    details: dict[str, Any] = {"tests": ran, "said": [clean(s) for s in found]}
    if done.code is None:
        return Outcome("unfinished", f"ran out of time after {ran} tests", details)
    refusals = [
        line for line in done.output.splitlines() if re.search(r"========= (Error|Internal|Unable|Target)", line)
    ]
    if not results or not found:
        details["output"] = last_words(done.output)
        why = clean(refusals[0].lstrip("= ")) if refusals else "it gave no summary"
        return Outcome("refused", f"{tool} could not do its work: {why}", details)
    if done.code == 0:
        return Outcome("passed", f"{tool}: {found[-1]}, {ran} tests", details)
    details["output"] = clean("\n".join(line for line in done.output.splitlines() if line.startswith("=========")))[
        :6000
    ]
    return Outcome("failed", f"{tool}: {found[-1]}", details)


# Measuring


def program(name: str, *arguments: str, results: tuple[str, ...] = ()) -> Callable[[Check, tuple[str, ...]], Outcome]:
    """A benchmark of this folder, told where to write; its JSON is merged into the card's."""

    def phase(check: Check, more: tuple[str, ...]) -> Outcome:
        into = check.scratch / f"{name}-{len(list(check.scratch.iterdir()))}"
        done = python(check, str(common.HERE / f"{name}.py"), *arguments, *more, "--out", str(into))
        if done.code is None:
            return Outcome("unfinished", "ran out of time")
        written = [result for result in results if (into / f"{result}.json").exists()]
        for result in written:
            gpu_record.merge_file(into / f"{result}.json", check.out)
        if done.code == 0:
            return Outcome("passed", f"{name} wrote {', '.join(written)}")
        what = "found something wrong" if done.code == 1 and written else "could not run"
        return Outcome("failed", f"{name} {what}", {"output": last_words(done.output)})

    return phase


def phase_digests(backends: tuple[str, ...]) -> dict[str, str]:
    from xsep.tuning import digest

    return {name: digest.sources(name) for name in backends}
