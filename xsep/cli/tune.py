"""``bench`` and ``autotune``: times of a problem here, thrown away or kept."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from .. import dispatch
from ..autotuner import autotune
from ..measuring import Effort, measure
from ..problem import Problem
from ..swap import swap_separable_convs
from ..tuning import findings
from ..tuning.findings import DIRECTIONS, Finding
from . import screen
from .shapes import UsageError, input_of, model_of, problem_of


def device_of(args: argparse.Namespace) -> torch.device:
    wish = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if wish == "cuda" and not torch.cuda.is_available():
        raise UsageError("PyTorch sees no GPU here")
    return torch.device(wish)


def failures(finding: Finding) -> list[str]:
    """Backends that gave a wrong result or none, which is another thing than not being able to run."""
    return [f"{name}: {why}" for name, why in finding.refused.items() if why.startswith(("wrong", "failed"))]


def show(found: dict[Problem, Finding]) -> None:
    console = screen.console()
    for problem, finding in found.items():
        table = screen.table(str(problem))
        table.add_column("way", no_wrap=True)
        for direction in DIRECTIONS:
            table.add_column(f"{direction} us", justify="right")
            table.add_column("PyTorch's time over it", justify="right")
        ways = list(dict.fromkeys(name for times in finding.times.values() for name in times))
        for way in ways:
            cells = []
            for direction in DIRECTIONS:
                times = finding.times.get(direction, {})
                known = way in times
                ratio = times["aten"] / times[way] if known else 0.0
                colour = "green" if ratio >= 1 else "red"
                cells += [f"{times[way]:.1f}", f"[{colour}]{ratio:.2f}[/]"] if known else ["", ""]
            table.add_row(way, *cells)
        console.print(table)
        for name, why in finding.refused.items():
            console.print(f"{name} left out: {why}", markup=False, highlight=False)


def as_json(found: dict[Problem, Finding]) -> list[dict[str, Any]]:
    return [{"problem": str(p), "us": f.times, "left_out": f.refused} for p, f in found.items()]


def finish(args: argparse.Namespace, found: dict[Problem, Finding], **more: Any) -> int:
    if args.json:
        screen.print_json({"problems": as_json(found), **more})
    else:
        show(found)
    wrong = [sentence for finding in found.values() for sentence in failures(finding)]
    return 1 if wrong else 0


def run_bench(args: argparse.Namespace) -> int:
    problem = problem_of(args, device_of(args).type)
    torch.backends.cudnn.benchmark = True
    found = {problem: measure(problem, Effort(args.rounds, args.seconds))}
    return finish(args, found)


def run_autotune(args: argparse.Namespace) -> int:
    device = device_of(args)
    torch.backends.cudnn.benchmark = True
    effort = Effort(args.rounds, args.seconds)
    options: dict[str, Any] = {"quiet": args.json, "again": args.again, "effort": effort}
    if args.model:
        if args.shape:
            raise UsageError("give a shape or --model, not both")
        model: Any = model_of(args.model)
        model = model.to(device=device, memory_format=torch.channels_last)
        swap_separable_convs(model, report=False)
        try:
            found = autotune(model, input_of(args.input, device), **options)
        except ValueError as error:
            raise UsageError(str(error)) from None
    else:
        found = autotune(problem_of(args, device.type), **options)
    card = dispatch.card_of(device.type, dispatch.place(device.type))
    path = str(findings.cache_path(card))
    code = finish(args, found, cache=path)
    if not args.json:
        print(f"kept in {path}")
    return code
