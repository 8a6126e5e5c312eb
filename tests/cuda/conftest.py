"""The CUDA operators on the emulator, for whichever test asks for them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from . import emulated, emulated_ops
from .emulated_ops import EmulatedOps


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch) -> Iterator[EmulatedOps]:
    if emulated.missing_tools() is not None:
        pytest.skip(str(emulated.missing_tools()))
    with emulated_ops.guarded(monkeypatch, emulated_ops.library()) as found:
        yield found


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if emulated.LOADED:  # not where other processes run the tests
        terminalreporter.write_line(f"{emulated.translated_launches()} launches of kernels as compiled")
