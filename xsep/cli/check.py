"""``check``: whether the GPU kernels are right on the card that is here, kept for ``auto``."""

from __future__ import annotations

import argparse
import sys
import warnings
from typing import Any

import torch

from .. import dispatch
from ..tuning import card_checks, findings
from . import screen
from .info import reasons
from .shapes import UsageError


def run(args: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        raise UsageError("PyTorch sees no GPU here")
    able = {name: reasons(name) for name in args.backend or findings.VERIFIED_BY_CARDS}
    if all(able.values()):
        raise UsageError("; ".join(f"{name} cannot run: {'; '.join(why)}" for name, why in able.items()))
    index = dispatch.place("cuda")
    card = dispatch.card_of("cuda", index)
    results: dict[str, dict[str, Any]] = {}
    for name in (backend + part for backend in able for part in ("", card_checks.CHAIN)):
        why = able[card_checks.backend_of(name)]
        if why:
            results[name] = {"state": "cannot run", "why": "; ".join(why)}
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # what is wrong is said below
            wrong = card_checks.ask(name, index, card, lambda line: print(line, file=sys.stderr), args.again)
        if wrong is None:
            results[name] = {"state": "unknown", "why": card_checks.why_unanswered(name, card)}
        else:
            results[name] = {"state": "wrong" if wrong else "right", "why": wrong}
    if args.json:
        screen.print_json({"card": card.name, "architecture": card.architecture, "backends": results})
    else:
        for name, result in results.items():
            why = f": {result['why']}" if result["why"] else ""
            print(f"{name} on {card.name}: {result['state']}{why}")
    states = {result["state"] for result in results.values()}
    return 1 if "wrong" in states else 0 if "right" in states else 2
