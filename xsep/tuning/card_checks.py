"""Whether a GPU backend is right on the card at hand: asked of a process of its own, once, and kept in the cache.

What that process does is :mod:`xsep.card_check`; where all is right it times a few layers, too. A kernel that takes the
device's context down takes that process with it and no other. A subject is a backend, ``cuda`` or ``triton``, or its
training chain, ``cuda-chain``: most people never need the latter, and what is wrong there is no reason to do without
the rest.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Optional

from . import findings
from .findings import Card, Finding

CHAIN = "-chain"
#: Seconds after which a check counts as hanging. Triton compiles for a minute or two.
LIMIT = 900.0
#: Signals by which a process ends that did something wrong itself; SIGKILL and the like come from outside.
FATAL = (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT)

#: What could not be asked in this process, and why: a card that is full today need not be so tomorrow, so no file keeps
#: it.
_unanswered: dict[tuple[str, Card], str] = {}
_one_at_a_time = threading.Lock()


class Answer(NamedTuple):
    """``wrong`` is "" where nothing was; None, with the reason in ``why``, where nobody could tell."""

    wrong: Optional[str]
    problems: int = 0
    seconds: float = 0.0
    why: str = ""
    probes: Mapping[str, Finding] = MappingProxyType({})  # what it timed


def backend_of(subject: str) -> str:
    return subject.removesuffix(CHAIN)


def enabled() -> bool:
    """Whether ``auto`` may have a card checked: not where XSEP_CARD_CHECK=0."""
    return os.environ.get("XSEP_CARD_CHECK", "1") not in ("", "0")


def known(subject: str, card: Card) -> Optional[str]:
    """What was found wrong with a subject on the card, "" for nothing; None where no check has answered yet."""
    return findings.cached(card).checked.get(subject)


def why_unanswered(subject: str, card: Card) -> str:
    """Why a check in this process came to no answer; "" where there was none."""
    return _unanswered.get((subject, card), "")


def is_right(subject: str, index: int, card: Card) -> bool:
    """Whether the subject's kernels are right on the card ``cuda:index``: as is known, else by checking them now.

    Prints two lines on stderr around a check, and warns where something is wrong.
    """
    with _one_at_a_time:
        found = known(subject, card)
        if found is not None or (subject, card) in _unanswered:
            return found == ""
        return ask(subject, index, card, say=lambda line: print(f"xsep: {line}", file=sys.stderr, flush=True)) == ""


def ask(subject: str, index: int, card: Card, say: Callable[[str], Any], again: bool = False) -> Optional[str]:
    """Has a subject checked and keeps the answer; another process that is at it on this machine is waited for.

    Returns:
        As :func:`known`; None where nobody could tell, of which :func:`why_unanswered` has the reason.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            folder = findings.cache_folder()
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(findings.locked(folder / f"check-{subject}"))
        if not again:
            findings.learn(card)
            other = known(subject, card)
            if other is not None:
                return other
        say(
            f"checking the {subject} kernels on this {card.name}, once"
            + ("; Triton compiles them, which may take minutes" if backend_of(subject) == "triton" else "")
            + " (XSEP_CARD_CHECK=0 leaves it out)"
        )
        answer = run(subject, index)
        if answer.wrong is None:
            _unanswered[subject, card] = answer.why
            say(f"they could not be checked, so PyTorch's convolutions run: {answer.why}")
            return None
        _unanswered.pop((subject, card), None)
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        findings.remember(card, {}, date, {subject: answer.wrong}, answer.probes)
    if answer.wrong:
        warnings.warn(
            f"xsep's {subject} kernels are wrong on {card.name}, and auto leaves them alone: {answer.wrong}",
            RuntimeWarning,
            stacklevel=2,
        )
    else:
        timed = f"; {len(answer.probes)} layers timed" if answer.probes else ""
        say(f"they are right on {answer.problems} problems{timed} ({answer.seconds:.0f} s)")
    return answer.wrong


def run(subject: str, index: int) -> Answer:
    """One process of xsep.card_check, and what it found."""
    if not sys.executable:
        return Answer(None, why="this program is no Python that could be started again")
    variables = {k: v for k, v in os.environ.items() if k not in ("XSEP_BACKEND", "XSEP_TRUST_UNVERIFIED")}
    paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    variables.update({"XSEP_CARD_CHECK": "0", "PYTHONPATH": os.pathsep.join(p for p in paths if p)})
    command = [sys.executable, "-m", "xsep.card_check", subject, "--device", f"cuda:{index}"]
    started = time.monotonic()
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            errors="replace", env=variables,
        )  # fmt: skip
    except OSError as error:
        return Answer(None, why=f"no process could be started ({error.strerror})")
    try:
        out, complaints = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return Answer(f"their check did not end within {LIMIT:.0f} s")
    finally:
        process.kill()
        process.wait()
    try:
        result = json.loads(out.splitlines()[-1])
        wrong, problems, why = str(result["wrong"]), int(result["problems"]), str(result["why"])
        probes = findings.entries_from(result.get("probes", {}))
    except (IndexError, KeyError, TypeError, ValueError):
        if -process.returncode in FATAL:
            return Answer(f"their check died of {signal.Signals(-process.returncode).name}")
        last = complaints.strip().splitlines()[-1:] or ["it said nothing"]
        return Answer(None, why=f"the process ended with exit code {process.returncode}: {last[0][:300]}")
    return Answer(None if why else wrong, problems, time.monotonic() - started, why, probes)


def forget() -> None:
    """Lets what could not be asked be asked again."""
    _unanswered.clear()
