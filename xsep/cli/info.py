"""``info``: what is here, what is ready, and why the rest is not."""

from __future__ import annotations

import argparse
import importlib.util
import platform
from typing import Any

import torch

from .. import dispatch, extension
from ..backends.triton import installed_version
from ..problem import Geometry, Problem
from ..tuning import digest, findings
from . import screen

#: What is not needed, and what it is for.
OPTIONAL = {
    "rich": "tables in colour", "matplotlib": "charts of the benchmarks", "sklearn": "photographs for the benchmarks",
    "triton": "the triton backend",
}  # fmt: skip
SAME = Geometry(1, 1, 1, 1, 1, 1, 1, 1)


def reasons(name: str) -> list[str]:
    """Why a backend runs nothing here; empty where it is ready."""
    gpu = torch.cuda.is_available()
    device = "cuda" if name in ("cuda", "triton") and gpu else "cpu"
    if name in ("cuda", "triton") and not gpu:
        why = ["PyTorch sees no GPU"]
        if name == "cuda":
            built = extension.load_cuda().reason
            return [*why, built] if built else why
        return why if installed_version() is not None else [*why, "Triton is not installed"]
    problem = Problem("separable", device, torch.float32, True, 1, 8, 8, 8, 1, 3, 3, 8, SAME, (0, 0, 0))
    return dispatch.backend(name).not_supported_reasons(problem)


def verified() -> list[dict[str, Any]]:
    """Which cards verified the GPU backends by the shipped tables, and whether that holds for the sources here."""
    return [
        {
            "card": table.card, "architecture": table.architecture, "date": table.date, "backend": name,
            "digest": table.digests.get(name, ""), "up_to_date": table.trusted(name),
        }
        for table in findings.tables() for name in table.verified
    ]  # fmt: skip


def gather() -> dict[str, Any]:
    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    card = dispatch.card_of(device, dispatch.place(device))
    found: dict[str, Any] = {
        "versions": {**findings.versions(), "python": platform.python_version(), "cuda": torch.version.cuda or "none"},
        "device": {"kind": device, "name": card.name, "architecture": card.architecture},
        "backends": {},
        "digests": digest.all_sources(),
        "verified": verified(),
        "checked": findings.cached(card).checked,
        "cache": {"folder": str(findings.cache_folder()), "problems": len(findings.cached(card).entries)},
        "missing": {name: what for name, what in OPTIONAL.items() if importlib.util.find_spec(name) is None},
    }
    for name in dispatch.NAMES:
        why = reasons(name)
        found["backends"][name] = {"ready": not why, "reasons": why}
        if name == "cpu" and not why:
            found["backends"][name]["slower"] = extension.why_not_repeated()
        if name in ("cuda", "triton") and not why:
            found["backends"][name]["auto"] = dispatch.why_not_eligible(name, card)
    return found


def words(found: list[dict[str, Any]]) -> str:
    """One sentence on the cards that verified the kernels."""
    if not found:
        return "no card has verified the GPU kernels yet"
    return "; ".join(
        f"{v['backend']} on {v['card']}, {v['date'][:10]}, digest {v['digest'][:12]}"
        + ("" if v["up_to_date"] else ", but the kernels here are newer")
        for v in found
    )


def run(args: argparse.Namespace) -> int:
    found = gather()
    if args.json:
        screen.print_json(found)
        return 0
    console = screen.console()
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    console.print(versions, markup=False)
    device = found["device"]
    console.print(f"{device['kind']}: {device['name']}, {device['architecture']}", markup=False)
    table = screen.table()
    for heading in ("backend", "", "why"):
        table.add_column(heading, overflow="fold")
    for name, state in found["backends"].items():
        why = "; ".join(state["reasons"]) or state.get("slower", "")
        why = why or (f"auto passes it over: {state['auto']}" if state.get("auto") else "")
        table.add_row(name, "[green]ready[/]" if state["ready"] else "[red]not here[/]", why)
    console.print(table)
    console.print(f"verified: {words(found['verified'])}", markup=False)
    for name, wrong in found["checked"].items():
        console.print(f"checked on this card: {name}: {wrong or 'right'}", markup=False)
    cache = found["cache"]
    console.print(f"autotuned: {cache['problems']} problems for this card, in {cache['folder']}", markup=False)
    for name, what in found["missing"].items():
        console.print(f"not installed: {name} ({what})", markup=False)
    return 0
