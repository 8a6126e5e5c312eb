"""A pytest plugin for gpu_check: every result is written the moment it is there, and of many tests one process takes
those it is told to. Loaded with ``-p gpu_plugin``; told what to do by the environment."""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # gpu_check takes the names below from here, and must run where pytest is missing
    import pytest

#: A file that gets one JSON line a test; a file with the names of tests to leave out, one a line; how many to take;
#: which shard of the tests to take, as in "2/8": shards are counted from 0; "2/8/cuda" is of that backend's tests
#: alone, "2/8/" of those that have none.
RESULTS, PASSED, SHARE = "XSEP_CHECK_RESULTS", "XSEP_CHECK_PASSED", "XSEP_CHECK_SHARE"
SHARD = "XSEP_CHECK_SHARD"

#: Tests that take tens of GB: all in one shard, so that no two run at once.
LARGE = re.compile(r"two_to_the_31")
KINDS = ("fp32", "fp16", "bf16")
BACKENDS = ("aten", "cuda", "triton")


def parameters(name: str) -> list[str]:
    """``tests/test_it.py::test_it[1-fp32-cuda]`` -> 1, fp32, cuda."""
    _, _, bracket = name.partition("[")
    return bracket.rstrip("]").split("-") if bracket else []


def backend_of(name: str) -> str:
    """The backend that a test's name has among its parameters; "" where it has none."""
    return next((p for p in parameters(name) if p in BACKENDS), "")


def shard(names: list[str], index: int, count: int) -> set[str]:
    """One of ``count`` parts that have no test in common and together have all: shuffled, since neighbours take alike
    long."""
    large = [name for name in names if LARGE.search(name)]
    rest = sorted(set(names) - set(large))
    random.Random(0).shuffle(rest)
    return set(rest[index::count]) | (set(large) if index == 0 else set())


def share(names: list[str], count: int) -> list[str]:
    """So many tests: every function before any has a second one, and of a function every type before any twice."""
    drawn = sorted(names)
    random.Random(0).shuffle(drawn)
    functions: dict[str, dict[str, list[str]]] = {}
    for name in drawn:
        kind = next((p for p in parameters(name) if p in KINDS), "")
        functions.setdefault(name.partition("[")[0], {}).setdefault(kind, []).append(name)
    left = {function: list(kinds.values()) for function, kinds in functions.items()}
    taken: list[str] = []
    while left and len(taken) < count:
        for function, kinds in list(left.items())[: count - len(taken)]:
            of_kind = kinds.pop(0)
            taken.append(of_kind.pop())
            kinds += [of_kind] if of_kind else []
            if not kinds:
                del left[function]
    return taken


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    listed = os.environ.get(PASSED, "")
    done = set(Path(listed).read_text().splitlines()) if listed else set()
    names = [item.nodeid for item in items if item.nodeid not in done]
    index, count, *only = os.environ.get(SHARD, "0/1").split("/")
    chosen = shard([n for n in names if not only or backend_of(n) == only[0]], int(index), int(count))
    if os.environ.get(SHARE, ""):
        chosen = set(share(sorted(chosen), int(os.environ[SHARE])))
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in chosen])
    items[:] = [item for item in items if item.nodeid in chosen]
    _write({"collected": len(items)})


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        why = ""
        if report.outcome == "failed":
            crash = getattr(report.longrepr, "reprcrash", None)
            why = str(crash.message if crash is not None else report.longrepr)
        elif report.outcome == "skipped" and isinstance(report.longrepr, tuple):
            why = str(report.longrepr[2])
        _write({"test": report.nodeid, "outcome": report.outcome, "why": why[:500], "seconds": report.duration})


def _write(line: dict[str, object]) -> None:
    path = os.environ.get(RESULTS, "")
    if path:
        with open(path, "a") as stream:
            stream.write(json.dumps(line) + "\n")
