"""An H200 that is not here, for tests of what ``auto`` would take on it."""

from __future__ import annotations

import pytest

from xsep import dispatch
from xsep.tuning import card_checks, findings
from xsep.tuning.device import H200, DeviceProperties
from xsep.tuning.findings import Card

CARD = Card(H200.name, H200.architecture)
GPU_BACKENDS = ("cuda", "triton")


def forget() -> None:
    """As in another process: nothing is known but what the files say."""
    dispatch.forget_choices()
    dispatch.card_of.cache_clear()
    findings.forget()
    card_checks.forget()


def pretend(monkeypatch: pytest.MonkeyPatch, device: DeviceProperties = H200) -> None:
    """Both GPU backends could run, on that card."""
    monkeypatch.setattr(dispatch, "running", lambda index: device)
    for name in GPU_BACKENDS:
        monkeypatch.setattr(dispatch.backend(name), "not_supported_reasons", lambda p: [])
        monkeypatch.setattr(dispatch.backend(name), "plan", lambda p: "pretended")
