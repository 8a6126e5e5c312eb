"""Runs this folder's tests in a process of their own, where Triton is imported with TRITON_INTERPRET=1.

Under XSEP_EMULATED_TRITON, an architecture, they run in this very process and compile the kernels for it instead
(``tests.triton.emulated``): test_compiled.py has some of them run so.

Triton decides when its kernels are decorated whether to interpret or to compile them, and PyTorch may have imported it
long before. So the first test of the folder starts one pytest for all that were selected; every test then reports
what became of it there.
"""

from __future__ import annotations

import faulthandler
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Optional

import pytest

ROOT = Path(__file__).resolve().parents[3]
RECORD = "XSEP_INTERPRETER_RECORD"
INSIDE = RECORD in os.environ
COMPILED = "XSEP_EMULATED_TRITON" in os.environ
LIMIT = 3600

_outcomes: Optional[dict[str, tuple[str, str]]] = None

if INSIDE:
    os.environ["TRITON_INTERPRET"] = "1"
    assert "triton" not in sys.modules, "Triton was imported before it could be told to interpret"
    from tests.triton.interpreter import fixes

    fixes.install()
elif COMPILED:
    from tests.triton import emulated

    emulated.install()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Inside: writes down what became of each test. Its call counts, and whatever stopped it before or after."""
    if INSIDE and (report.when == "call" or report.outcome != "passed"):
        with open(os.environ[RECORD], "a") as record:
            text = report.longreprtext if report.failed else str(getattr(report, "longrepr", "") or "")
            record.write(json.dumps([report.nodeid, report.outcome, text]) + "\n")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if COMPILED:
        terminalreporter.write_line(f"{emulated.launched} launches of kernels as compiled")


def _run_inside(nodeids: list[str]) -> dict[str, tuple[str, str]]:
    with tempfile.TemporaryDirectory() as folder:
        record, selection = Path(folder, "record"), Path(folder, "selection")
        record.touch()
        selection.write_text("\n".join(nodeids))
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
        # Who waits for all of them is no test that hangs: each is watched inside, and all of them by LIMIT.
        faulthandler.cancel_dump_traceback_later()
        done = subprocess.run(
            [*command, f"@{selection}"],
            cwd=ROOT, env={**os.environ, RECORD: str(record)}, capture_output=True, text=True, timeout=LIMIT,
        )  # fmt: skip
        outcomes: dict[str, tuple[str, str]] = {}
        for line in record.read_text().splitlines():
            nodeid, outcome, text = json.loads(line)
            if outcomes.get(nodeid, ("passed", ""))[0] != "failed":
                outcomes[nodeid] = (outcome, text)
    lost = f"the interpreter's process did not report this test; it ended with {done.returncode}:\n"
    output = (done.stdout + done.stderr)[-4000:]
    return {nodeid: outcomes.get(nodeid, ("failed", lost + output)) for nodeid in nodeids}


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Optional[bool]:
    """Outside: the test's body is replaced by what it came to inside."""
    if INSIDE or COMPILED:
        return None
    global _outcomes
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    here = Path(__file__).parent
    if _outcomes is None or pyfuncitem.nodeid not in _outcomes:
        mine = [
            i.nodeid for i in pyfuncitem.session.items if here in i.path.parents and not i.get_closest_marker("skip")
        ]
        _outcomes = _run_inside(mine)
    outcome, text = _outcomes[pyfuncitem.nodeid]
    if outcome == "skipped":
        pytest.skip(text)
    if outcome == "failed":
        pytest.fail(text, pytrace=False)
    return True
