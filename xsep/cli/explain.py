"""``explain``: how each backend would run a problem, on this machine or on a card that is not here."""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch

from .. import dispatch, plans
from ..backends import cuda as cuda_backend
from ..backends.chain_cuda_launch import describe_backward
from ..problem import Problem
from ..tuning import probes
from ..tuning.device import DeviceProperties, published, running
from ..tuning.findings import DIRECTIONS, Card
from . import screen
from .shapes import UsageError, problem_of


def on_card(problem: Problem, device: DeviceProperties) -> dict[str, Any]:
    """Predictions for every way of running the problem on a card, present or not, and what ``auto`` would take."""
    tf32 = plans.tf32_allowed(problem.dtype)
    predictions = plans.predictions(problem, device, tf32)
    floors = {d: plans.floor(problem, device, d, tf32) for d in DIRECTIONS}
    moved, flops = dispatch.work(problem)
    copy = moved / (device.bandwidth * plans.COPY_SHARE) * 1e6
    able = tuple(dict.fromkeys(p.backend for p in predictions if not p.refused and p.backend != "aten"))
    card = Card(device.name, device.architecture)
    withheld = {name: why for name in able if (why := dispatch.why_not_eligible(name, card))}
    eligible = tuple(name for name in able if name not in withheld)
    result: dict[str, Any] = {
        "problem": str(problem), "device": device.name, "architecture": device.architecture, "floor_us": floors,
        "floor": {
            "bytes": moved, "flops": flops, "limit": "memory" if copy >= 0.999 * floors["forward"] else "compute",
        },
        "ways": [], "model_takes": {}, "auto_takes": {}, "withheld": withheld,
    }  # fmt: skip
    for p in predictions:
        way: dict[str, Any] = {"way": p.way, "backend": p.backend, "as_planned": p.chosen_way, "note": p.note}
        if p.refused:
            way["refused"] = p.refused
        else:
            way.update({f"{d}_us": p.time(d) for d in DIRECTIONS})
        result["ways"].append(way)
    for direction in DIRECTIONS:
        fit = probes.fit(problem, card, device, direction, tf32)
        for key, candidates in (("model_takes", able), ("auto_takes", eligible)):
            name, why = plans.choose(problem, device, candidates, direction, tf32, fit)
            if key == "auto_takes" and withheld and not eligible:
                why = "no other backend has been verified on such a card"
            result[key][direction] = {"backend": name, "why": why}
    if "cuda" in able:
        result["cuda_plan"] = cuda_backend.describe(problem, plans.cuda_facts(device))
        if problem.op == "separable" and problem.multiplier == 1:
            result["cuda_chain_backward"] = describe_backward(problem, plans.cuda_facts(device))
    return result


def here(problem: Problem) -> dict[str, Any]:
    """What runs a problem on this machine's CPU, and why nothing else does."""
    result: dict[str, Any] = {"problem": str(problem), "device": problem.device, "auto_takes": {}, "refused": {}}
    for direction in DIRECTIONS:
        taken = dispatch.choice(problem, "auto", direction)
        result["auto_takes"][direction] = {"backend": taken.backend.name, "why": taken.why}
    for name in dispatch.NAMES:
        reasons = dispatch.backend(name).not_supported_reasons(problem)
        if reasons:
            result["refused"][name] = reasons
    moved, flops = dispatch.work(problem)
    result["floor"] = {"bytes": moved, "flops": flops}
    return result


def floor_words(us: float) -> str:
    return f"{us:.1f} us" if us >= 0.05 else "under 0.1 us"


def ratio_words(us: float, floor: float) -> str:
    """A time over the floor; of a problem so small that this is a thousand and more, no number says anything."""
    if not math.isfinite(us):
        return ""
    return f"{us / floor:.2f}" if us < 1000 * floor else "over 999"


def show(result: dict[str, Any]) -> None:
    console = screen.console()
    console.print(result["problem"], markup=False, highlight=False)
    floor, floors = result["floor"], result["floor_us"]
    moved = f"{floor['bytes'] / 1e6:.1f} MB" if floor["bytes"] >= 5e4 else f"{floor['bytes']} bytes"
    flops = f"{floor['flops'] / 1e9:.2f} GFLOP" if floor["flops"] >= 5e6 else f"{floor['flops']} FLOP"
    console.print(
        f"{result['device']}, {result['architecture']}: the floor is {floor_words(floors['forward'])} forward "
        f"({moved}, {flops}; {floor['limit']} is the limit) and {floor_words(floors['backward'])} backward",
        markup=False, highlight=False,
    )  # fmt: skip
    table = screen.table()
    table.add_column("way", no_wrap=True)
    for heading in ("forward us", "x floor", "backward us", "x floor"):
        table.add_column(heading, justify="right", no_wrap=True)
    notes = []
    for way in result["ways"]:
        if "refused" in way:
            notes.append(f"{way['way']}: cannot run: {way['refused']}")
            continue
        cells = []
        for direction in DIRECTIONS:
            us = way[f"{direction}_us"]
            cells += [f"{us:.1f}", ratio_words(us, floors[direction])]
        table.add_row(way["way"], *cells)
        notes.append(f"{way['way']}: {'' if way['as_planned'] else 'not how it is run here: '}{way['note']}")
    console.print(table)
    for note in notes:  # a column of the table would be too narrow for them in most terminals
        console.print(f"  {note}", markup=False, highlight=False)
    for direction in DIRECTIONS:
        model, auto = result["model_takes"][direction], result["auto_takes"][direction]
        console.print(f"{direction}: {model['backend']}: {model['why']}", markup=False, highlight=False)
        if auto["backend"] != model["backend"]:
            console.print(f"  auto takes {auto['backend']} today: {auto['why']}", markup=False, highlight=False)
    for name, why in result["withheld"].items():
        console.print(f"{name} is withheld from auto: {why}", markup=False, highlight=False)


def run(args: argparse.Namespace) -> int:
    if args.device_like:
        try:
            device = published(args.device_like)
        except ValueError as error:
            raise UsageError(str(error)) from None
    elif torch.cuda.is_available() and args.device != "cpu":
        device = running(torch.cuda.current_device())
    elif args.device == "cuda":
        raise UsageError("PyTorch sees no GPU here; --device-like H200 explains for one that is elsewhere")
    else:
        problem = problem_of(args, "cpu")
        if args.json:
            screen.print_json(here(problem))
        else:
            print(dispatch.explain(problem))
        return 0
    problem = problem_of(args, "cuda")
    if min(problem.output_size) < 1:
        raise UsageError(f"the filter does not fit: the output would be {problem.output_size}")
    # First, since the first question about a card may have its kernels checked, which decides what auto takes.
    here_too = "" if args.device_like else dispatch.explain(problem)
    result = on_card(problem, device)
    if args.json:
        screen.print_json(result)
        return 0
    show(result)
    if here_too:
        print(here_too)
    return 0
