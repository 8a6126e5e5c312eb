"""What the phases of gpu_check do. Each runs programs of this project as processes of their own, so that one which
hangs or takes the card down ends alone."""

from __future__ import annotations

import contextlib
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
from typing import IO, Any, NamedTuple, Optional

import common
import gpu_plugin
import gpu_record

ROOT = common.HERE.parent
#: How many GPU tests each compute-sanitizer tool repeats.
SANITIZED_TESTS = 24
#: How many processes share the tests of a part, where there are twice as many cores: Triton compiles most of the time,
#: on one core a process. The card is shared by all of them.
SHARDS = {"cuda": 4, "triton": 8, "other": 8}
PYTEST = ("-m", "pytest", "-m", "gpu", "-q", "--tb=short", "-p", "no:cacheprovider", "-p", "gpu_plugin")


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
    backends: Optional[list[str]] = None  # the GPU backends that can run here, once somebody has asked

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


def run_all(
    check: Check, commands: list[tuple[list[str], dict[str, str]]], cwd: Path = ROOT, errors: bool = True
) -> list[Done]:
    """Processes at once, by command and variables, each of its own group and ended with all it started when the time is
    over or this program is interrupted. What they say on stderr is among their output, or left out."""
    with contextlib.ExitStack() as stack:
        begun: list[tuple[subprocess.Popen[str], IO[str]]] = []
        try:
            for command, variables in commands:
                output = stack.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
                environment: dict[str, str] = {**os.environ, **variables}
                paths = [str(ROOT), str(common.HERE), environment.get("PYTHONPATH", "")]
                environment["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
                process = subprocess.Popen(
                    command, cwd=cwd, env=environment, stdout=output, start_new_session=True,
                    stderr=subprocess.STDOUT if errors else subprocess.DEVNULL, text=True,
                )  # fmt: skip
                begun.append((process, output))
            end = time.monotonic() + max(check.left(), 1.0)
            for process, _ in begun:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=max(end - time.monotonic(), 0.0))
        finally:
            late = [process for process, _ in begun if process.poll() is None]
            for process in late:
                os.killpg(process.pid, signal.SIGKILL)
            for process in late:
                process.wait()
        done = []
        for process, output in begun:
            output.seek(0)
            done.append(Done(None if process in late else process.returncode, output.read()))
        return done


def run(
    check: Check, command: list[str], variables: Optional[dict[str, str]] = None, cwd: Path = ROOT, errors: bool = True
) -> Done:
    return run_all(check, [(command, variables or {})], cwd, errors)[0]


def python(check: Check, *arguments: str, errors: bool = True) -> Done:
    return run(check, [sys.executable, *arguments], errors=errors)


# Building


def build(check: Check) -> Outcome:
    """In place, with this very Python; on a GPU for its architecture only, and without the CPU's kernels."""
    variables = {"XSEP_BUILD_CPU": "0", "MAX_JOBS": os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))}
    if check.gpu:
        import torch

        major, minor = torch.cuda.get_device_capability()
        variables["TORCH_CUDA_ARCH_LIST"] = "9.0a" if (major, minor) == (9, 0) else f"{major}.{minor}"
        variables["XSEP_BUILD_CUDA"] = "1"  # else what is missing for it is passed over in silence
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
    details["built"] = sorted(p.name for pattern in ("_C*.so", "_repeated*.so") for p in libraries.glob(pattern))
    if check.gpu and "_C_cuda.so" not in details["built"]:
        return Outcome("failed", "the build made no _C_cuda.so", {**details, "output": last_words(done.output, 30)})
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


# The card check


def card_check(check: Check) -> Outcome:
    """What ``auto`` asks of a card that nobody has verified the cuda backend on; of a CPU, its own backend."""
    if check.gpu:
        words = ("xsep", "check", "--backend", "cuda", "--again", "--json")
    else:
        words = ("xsep.card_check", "cpu", "--device", "cpu")
    done = python(check, "-m", *words, errors=False)
    if done.code is None:
        return Outcome("unfinished", "the check ran out of time")
    try:
        found = json.loads(done.output)
        answers = found["backends"] if check.gpu else {"cpu": {"state": "wrong" if found["wrong"] else "right"}}
    except (KeyError, TypeError, ValueError):
        return Outcome("refused", "the cuda backend cannot run here: `python -m xsep info` says why")
    summary = ", ".join(f"{name}: {answer['state']}" for name, answer in answers.items())
    states = {answer["state"] for answer in answers.values()}
    status = "failed" if "wrong" in states else "passed" if states == {"right"} else "refused"
    return Outcome(status, summary, {} if status == "passed" else {"output": clean(done.output)})


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
        done_file = check.scratch / f"passed-{part}.txt"
        done_file.write_text("\n".join(sorted(passed)))
        # A kernel that breaks the card's context has all later tests of its process fail: no other backend's.
        apart = ["/", *(f"/{name}" for name in gpu_plugin.BACKENDS)] if part == "other" else [""]
        cores = os.cpu_count() or 1
        count = max(min(SHARDS[part], cores // 2) // len(apart), 1)
        shards = [f"{i}/{count}{backend}" for backend in apart for i in range(count)]
        results = [check.scratch / f"tests-{part}-{i}.jsonl" for i in range(len(shards))]
        commands = [
            ([sys.executable, *PYTEST, *files], {
                gpu_plugin.RESULTS: str(path), gpu_plugin.PASSED: str(done_file), gpu_plugin.SHARD: shard,
                "OMP_NUM_THREADS": str(max(cores // len(shards), 1)),
            }) for path, shard in zip(results, shards)
        ]  # fmt: skip
        done = run_all(check, commands)
        found = {k: v for path in results for k, v in read_results(path).items()}
        return judge_tests([(d, (shard + "//").split("/")[2]) for d, shard in zip(done, shards)], found, passed)

    return phase


def judge_tests(processes: list[tuple[Done, str]], results: dict[str, dict[str, Any]], before: set[str]) -> Outcome:
    """What the tests of these processes, and those that passed in earlier ones, come to; what failed comes first.

    With each process stands the backend whose tests it had, "" where it had others; ``incomplete`` are those of which
    not every test had its turn.
    """
    by = {o: sorted(t for t, r in results.items() if r["outcome"] == o) for o in ("passed", "failed", "skipped")}
    fine = (None, 0, 1, 5) if by["failed"] else (None, 0, 5)  # 1 is what failed tests make it
    broken = [done for done, _ in processes if done.code not in fine]
    late = any(done.code is None for done, _ in processes)
    details: dict[str, Any] = {
        "passed": sorted(before | set(by["passed"])), "failed": {t: clean(results[t]["why"]) for t in by["failed"]},
        "skipped": {t: clean(results[t]["why"]) for t in by["skipped"]},
        "incomplete": sorted({backend for done, backend in processes if done in broken or done.code is None}),
    }  # fmt: skip
    counts = f"{len(details['passed'])} passed, {len(by['failed'])} failed, {len(by['skipped'])} skipped"
    if late:
        counts = f"ran out of time: {counts} by then"
    if broken:
        details["output"] = last_words(broken[0].output, 30)
        if "No module named pytest" in broken[0].output:
            return Outcome("refused", "pytest is not installed", details)
    if by["failed"] or broken:
        return Outcome("failed", counts, details)
    return Outcome("unfinished" if late else "passed", counts, details)


#: What compute-sanitizer says of a kernel, and what it says where it could not watch any.
FOUND = re.compile(r"========= (Invalid|Misaligned|Barrier error|Error: (Race|Potential))")
REFUSED = re.compile(
    r"========= (Error: (?!Race|Potential|process didn't)|Internal|Unable|Target application terminated)"
)


def sanitizer(tool: str) -> Callable[[Check], Outcome]:
    """compute-sanitizer over a share of the CUDA tests, watching the project's kernels only where it can."""

    def phase(check: Check) -> Outcome:
        found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
        if found is None:
            return Outcome("refused", "compute-sanitizer is not installed")
        known = run(check, [found, "--help"]).output
        only = ["--kernel-name", "kernel_substring=xsep"] if "--kernel-name" in known else []
        options = ["--tool", tool, "--error-exitcode", "99", "--print-limit", "20"]
        results = check.scratch / f"{tool}.jsonl"
        share = SANITIZED_TESTS if check.thorough else SANITIZED_TESTS // 3
        variables = {gpu_plugin.RESULTS: str(results), gpu_plugin.SHARE: str(share)}
        if tool == "memcheck":
            # Else PyTorch's allocator keeps all tensors in a few blocks, and a step past one lands in the next.
            variables["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
            # PyTorch asks for what a driver may not have, and goes another way then: that is no error of a kernel.
            options += ["--report-api-errors", "no"]
        done = Done(0, "")
        for wish in [only, []] if only else [[]]:
            results.unlink(missing_ok=True)
            command = [found, *options, *wish, sys.executable, *PYTEST, *gpu_tests("cuda")]
            done = run(check, command, variables)
            if read_results(results) or done.code is None:
                break
        return judge_sanitizer(tool, done, read_results(results))

    return phase


def judge_sanitizer(tool: str, done: Done, results: dict[str, dict[str, Any]]) -> Outcome:
    """What was found comes first, then whether the tool worked at all: a clean summary of no kernels says nothing."""
    lines = [line for line in done.output.splitlines() if line.startswith("=========")]
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", done.output)
    refusals = [clean(line.lstrip("= ")) for line in lines if REFUSED.match(line)]
    ran = sum(r["outcome"] == "passed" for r in results.values())
    failed = sorted(t for t, r in results.items() if r["outcome"] == "failed")
    details: dict[str, Any] = {"tests": ran, "said": [clean(s) for s in summaries], "failed": failed}
    told = summaries[-1] if summaries else "no summary"
    if done.code == 99 or any(FOUND.match(line) for line in lines):
        first = next((i for i, line in enumerate(lines) if FOUND.match(line)), 0)
        details["output"] = clean("\n".join(lines[first:]))[:6000]
        return Outcome("failed", f"{tool}: {told}, {ran} tests", details)
    if refusals:
        details["output"] = last_words(done.output)
        return Outcome("refused", f"{tool} could not do its work: {refusals[0]}", details)
    if failed:
        details["output"] = last_words(done.output, 30)
        return Outcome("failed", f"{tool}: {len(failed)} tests failed under it; {told}", details)
    if done.code is None:
        return Outcome("unfinished", f"ran out of time after {ran} tests", details)
    if not ran or not summaries:
        details["output"] = last_words(done.output)
        why = "it gave no summary" if ran else "no test ran"
        return Outcome("refused", f"{tool} could not do its work: {why}", details)
    if done.code == 0:
        return Outcome("passed", f"{tool}: {told}, {ran} tests", details)
    details["output"] = last_words(done.output, 30)
    return Outcome("failed", f"{tool} ended with exit code {done.code}: {told}, {ran} tests", details)


# Measuring


def program(name: str, *arguments: str, results: tuple[str, ...] = ()) -> Callable[[Check, tuple[str, ...]], Outcome]:
    """A benchmark of this folder, told where to write; its JSON is merged into the card's."""

    def phase(check: Check, more: tuple[str, ...]) -> Outcome:
        into = check.scratch / f"{name}-{len(list(check.scratch.iterdir()))}"
        done = python(check, str(common.HERE / f"{name}.py"), *arguments, *more, "--out", str(into))
        written = [result for result in results if (into / f"{result}.json").exists()]
        for result in written:
            gpu_record.merge_file(into / f"{result}.json", check.out)
        if done.code in (None, common.LATE):
            return Outcome("unfinished", f"ran out of time; {name} wrote {', '.join(written) or 'nothing'}")
        if done.code == 0:
            return Outcome("passed", f"{name} wrote {', '.join(written)}")
        what = "found something wrong" if done.code == 1 and written else "could not run"
        return Outcome("failed", f"{name} {what}", {"output": last_words(done.output)})

    return phase


def phase_digests(backends: tuple[str, ...]) -> dict[str, str]:
    from xsep.tuning import digest

    return {name: digest.sources(name) for name in backends}
