"""What was measured and verified on which card: tables shipped with the package, and a cache of the user's own.

Both are JSON files of one format. A table speaks for the card it names and for backends whose sources have the digest
it was made with; a cache file for exactly one card, PyTorch, Triton, xsep and digest of every backend, by its name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch

from ..problem import Problem
from . import digest

FORMAT = 2
TABLES = Path(__file__).resolve().parent / "tables"
DIRECTIONS = ("forward", "backward")
#: Backends that no machine without a card can hold to their tests.
VERIFIED_BY_CARDS = ("cuda", "triton")

#: Files that could not be written and were complained of: once is enough.
_complained: set[Path] = set()


class Card(NamedTuple):
    """Where something runs: a GPU by name, or a CPU by name and threads."""

    name: str
    architecture: str  # sm_90, gfx942, or a CPU's level


@dataclass
class Finding:
    """Median microseconds of one problem by way of running it, of those ways that were right.

    ``times`` has a backend's name, or ``aten, NCHW`` and the like for the memory layout that the problem has not.
    """

    problem: str
    times: dict[str, dict[str, float]]  # by direction, then by way
    refused: dict[str, str] = field(default_factory=dict)  # why each other backend was not measured

    def best(self, direction: str, eligible: list[str]) -> Optional[str]:
        """The fastest of the backends named, None where none of them was measured."""
        known = {name: us for name, us in self.times.get(direction, {}).items() if name in eligible}
        return min(known, key=known.__getitem__) if known else None


@dataclass
class Findings:
    """One file: what was measured on a card, and which backends passed their tests or the card check there."""

    card: str
    architecture: str
    versions: dict[str, str]
    digests: dict[str, str]
    date: str = ""
    verified: list[str] = field(default_factory=list)  # by all GPU tests
    checked: dict[str, str] = field(default_factory=dict)  # by xsep.card_check: what was wrong, "" for nothing
    entries: dict[str, Finding] = field(default_factory=dict)
    probes: dict[str, Finding] = field(default_factory=dict)  # xsep.tuning.probes, each backend as right as it then was
    format: int = FORMAT

    def trusted(self, backend: str) -> bool:
        """Whether what is said here of a backend, or of one of its ways, is about the sources at hand."""
        name = backend.split(",")[0]
        return name in digest.PARTS and self.digests.get(name) == digest.sources(name)

    def vouches_for(self, backend: str) -> bool:
        """Whether its times may be followed: it is trusted, and where only a card can verify it, it has been."""
        name = backend.split(",")[0]
        return self.trusted(backend) and (name not in VERIFIED_BY_CARDS or name in self.verified)

    def vouched(self, found: Finding) -> Finding:
        """A finding of this file with those of its times that may be followed."""
        times = {d: {n: us for n, us in t.items() if self.vouches_for(n)} for d, t in found.times.items()}
        return Finding(found.problem, times, found.refused)


def problem_key(problem: Problem) -> str:
    """A problem as the files name it."""
    codes = ",".join(map(str, problem.activations))
    return f"{problem}, activations {codes}"


def to_dict(findings: Findings) -> dict[str, Any]:
    """As JSON holds it."""
    return asdict(findings)


def to_json(findings: Findings) -> str:
    return json.dumps(to_dict(findings), indent=1, sort_keys=True) + "\n"


def _time(us: Any) -> float:
    """Microseconds as something may have taken them; raises what a wrong type raises, and ValueError."""
    if not 0 < float(us) < math.inf:
        raise ValueError(f"{us} microseconds are no time")
    return float(us)


def entries_from(raw: dict[str, Any]) -> dict[str, Finding]:
    """Findings by name from what JSON holds of them; raises what a wrong type raises."""
    found = {}
    for key, entry in raw.items():
        times = {d: {str(n): _time(us) for n, us in entry["times"].get(d, {}).items()} for d in DIRECTIONS}
        found[str(key)] = Finding(str(entry["problem"]), times, dict(entry["refused"]))
    return found


def from_json(text: str) -> Findings:
    """Raises ValueError for what is no such file, whatever else it may be."""
    try:
        raw = json.loads(text)
        if raw["format"] != FORMAT:
            raise ValueError(f"format {raw['format']} is not {FORMAT}")
        return Findings(
            str(raw["card"]), str(raw["architecture"]), dict(raw["versions"]), dict(raw["digests"]), str(raw["date"]),
            [str(name) for name in raw["verified"]], {str(k): str(v) for k, v in raw["checked"].items()},
            entries_from(raw["entries"]), entries_from(raw.get("probes", {})),
        )  # fmt: skip
    except (KeyError, TypeError, AttributeError, OverflowError, RecursionError, json.JSONDecodeError) as error:
        raise ValueError(f"it is no record of xsep's ({type(error).__name__}: {error})") from None


def versions() -> dict[str, str]:
    from ..backends.triton import installed_version

    triton = installed_version()
    return {
        "torch": torch.__version__,
        "triton": ".".join(map(str, triton)) if triton else "none",
        "xsep": digest.package_version(),
    }


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base and os.path.isabs(base) else Path.home() / ".cache") / "xsep"


def fresh(card: Card) -> Findings:
    return Findings(card.name, card.architecture, versions(), digest.all_sources())


def cache_path(card: Card) -> Path:
    """The one file that may speak for this card, these versions and these sources."""
    key = fresh(card)
    text = json.dumps([key.card, key.architecture, key.versions, key.digests], sort_keys=True)
    return cache_folder() / f"autotune-{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"


def _read(path: Path, warn: bool = True) -> Optional[Findings]:
    """The file's findings; None where there is no file, and, with a warning, where it cannot be used."""
    try:
        return from_json(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        # UnicodeDecodeError is a ValueError.
        if warn:
            warnings.warn(f"xsep ignores {path}: {error}", RuntimeWarning, stacklevel=2)
        return None


@cache
def cached(card: Card) -> Findings:
    """What the cache knows of this card, read once a process; nothing is hashed where there is no cache at all."""
    with contextlib.suppress(OSError):
        if any(cache_folder().glob("autotune-*.json")):
            path = cache_path(card)
            found = _read(path)
            if found is not None:
                return found
    return Findings(card.name, card.architecture, {}, {})


@cache
def tables() -> tuple[Findings, ...]:
    """The shipped tables that can be read."""
    found = (_read(path) for path in sorted(TABLES.glob("*.json")))
    return tuple(f for f in found if f is not None)


def verified_on(backend: str, architecture: str) -> Optional[Findings]:
    """The record of a card of that architecture on which these very sources of a backend passed their tests."""
    for table in tables():
        if table.architecture == architecture and backend in table.verified and table.trusted(backend):
            return table
    return None


def lookup(problem: Problem, card: Card) -> Optional[tuple[Finding, str]]:
    """What was measured for a problem on this card, and by whom; the user's own findings before the shipped ones."""
    own = cached(card)
    if own.entries:
        found = own.entries.get(problem_key(problem))
        if found is not None:
            return found, "xsep.autotune on this machine"
    for table in tables():
        if table.card != card.name:
            continue
        found = table.entries.get(problem_key(problem))
        if found is None:
            continue
        known = table.vouched(found)
        if any("aten" in t for t in known.times.values()):
            return known, f"the shipped table for {table.card}, {table.date}"
    return None


def timed(probe: Problem, card: Card) -> Optional[Finding]:
    """What a probe took on this card, by its own check or by the shipped table of such cards."""
    key = problem_key(probe)
    found = cached(card).probes.get(key)
    for table in tables() if found is None else ():
        if table.card == card.name and key in table.probes:
            return table.vouched(table.probes[key])
    return found


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Waits for every other process that is at the same file."""
    import fcntl

    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write_whole(path: Path, text: str) -> None:
    """The file with this text, or, on an error, the file as it was."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as stream:
            stream.write(text)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def learn(card: Card) -> None:
    """Adds what other processes' card checks have found by now to this one's knowledge."""
    found = _read(cache_path(card), warn=False)
    if found is not None:
        known = cached(card)
        known.checked.update(found.checked)
        known.probes = _with(known.probes, found.probes)


def _with(probes: Mapping[str, Finding], more: Mapping[str, Finding]) -> dict[str, Finding]:
    """Probes with more ways of running them, which come from checks of other backends."""
    found = dict(probes)
    for key, new in more.items():
        old = found.get(key, Finding(new.problem, {}))
        times = {d: {**old.times.get(d, {}), **new.times.get(d, {})} for d in DIRECTIONS}
        found[key] = Finding(new.problem, times, {**old.refused, **new.refused})
    return found


def remember(
    card: Card,
    entries: dict[str, Finding],
    date: str,
    checked: Optional[dict[str, str]] = None,
    probes: Optional[Mapping[str, Finding]] = None,
) -> Optional[Path]:
    """Adds findings to this process's knowledge and to the cache file, merged with what others wrote meanwhile.

    Returns:
        The file; None, with one warning, where it cannot be written: the findings then last as long as the process.
    """
    known = cached(card)
    known.entries.update(entries)
    known.checked.update(checked or {})
    known.probes = _with(known.probes, probes or {})
    path = cache_path(card)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path):
            on_disk = _read(path, warn=False)
            merged = fresh(card)
            merged.date = date
            merged.entries = {**(on_disk.entries if on_disk else {}), **known.entries}
            merged.checked = {**(on_disk.checked if on_disk else {}), **known.checked}
            merged.probes = _with(on_disk.probes if on_disk else {}, known.probes)
            write_whole(path, to_json(merged))
    except OSError as error:
        if path not in _complained:
            _complained.add(path)
            why = error.strerror or error
            warnings.warn(
                f"xsep cannot write {path} ({why}): what was found out is used in this process only",
                RuntimeWarning,
                stacklevel=2,
            )
        return None
    return path


def forget() -> None:
    """Lets the next look-up read the files anew."""
    cached.cache_clear()
    tables.cache_clear()
    _complained.clear()
