"""A pytest plugin for gpu_check: every result is written the moment it is there, what passed before is left out, and of
many tests an even share can be taken. Loaded with ``-p gpu_plugin``; told what to do by the environment."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # gpu_check takes the names below from here, and must run where pytest is missing
    import pytest

#: A file that gets one JSON line a test; a file with the names of tests to leave out, one a line; how many to take.
RESULTS, PASSED, SHARE = "XSEP_CHECK_RESULTS", "XSEP_CHECK_PASSED", "XSEP_CHECK_SHARE"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    listed = os.environ.get(PASSED, "")
    done = set(Path(listed).read_text().splitlines()) if listed else set()
    left = [item for item in items if item.nodeid not in done]
    share = int(os.environ.get(SHARE, "0") or 0)
    if share and len(left) > share:
        left = [left[i * len(left) // share] for i in range(share)]
    chosen = set(left)
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = left
    _write({"collected": len(left)})


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
