"""``bench`` and ``autotune``: times of a problem here, thrown away or kept."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from typing import Any, Optional

import torch

from .. import dispatch
from ..autotuner import problems_of, tune
from ..measuring import Effort, measure
from ..problem import Problem
from ..swap import SwapReport, swap_separable_convs
from ..tuning import findings
from ..tuning.findings import DIRECTIONS, Finding
from . import screen
from .shapes import UsageError, as_options, input_of, model_of, options_given, problem_of, shape_of, taken


def device_of(args: argparse.Namespace) -> torch.device:
    wish = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if wish == "cuda" and not torch.cuda.is_available():
        raise UsageError("PyTorch sees no GPU here")
    return torch.device(wish)


def failures(finding: Finding) -> list[str]:
    """Backends that gave a wrong result or none, which is another thing than not being able to run."""
    return [f"{name}: {why}" for name, why in finding.refused.items() if why.startswith(("wrong", "failed"))]


def show(found: dict[Problem, Finding], known: Collection[Problem] = ()) -> None:
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
                timed = way in times
                ratio = times["aten"] / times[way] if timed else 0.0
                colour = "green" if ratio >= 1 else "red"
                cells += [f"{times[way]:.1f}", f"[{colour}]{ratio:.2f}[/]"] if timed else ["", ""]
            table.add_row(way, *cells)
        console.print(table)
        if problem in known:
            console.print("known before and not measured now: --again measures it anew", markup=False, highlight=False)
        for name, why in finding.refused.items():
            console.print(f"{name} left out: {why}", markup=False, highlight=False)


def as_json(found: dict[Problem, Finding], known: Optional[Collection[Problem]] = None) -> list[dict[str, Any]]:
    """``known`` are those that were not measured now; None where that cannot be."""
    return [
        {"problem": str(p), "us": f.times, "left_out": f.refused, **({} if known is None else {"known": p in known})}
        for p, f in found.items()
    ]


def finish(
    args: argparse.Namespace, found: dict[Problem, Finding], known: Optional[Collection[Problem]] = None, **more: Any
) -> int:
    if args.json:
        screen.print_json({"problems": as_json(found, known), **more})
    else:
        show(found, known or ())
    wrong = [sentence for finding in found.values() for sentence in failures(finding)]
    return 1 if wrong else 0


def run_bench(args: argparse.Namespace) -> int:
    problem = problem_of(args, device_of(args).type)
    torch.backends.cudnn.benchmark = True
    found = {problem: measure(problem, Effort(args.rounds, args.seconds))}
    return finish(args, found)


def why_none(report: SwapReport) -> str:
    """Why a model that a swap has been over runs none of xsep's ops."""
    if report.swapped:
        return "what was swapped does not run as one in these calls"
    if not report.missed:
        return "there is no separable convolution in it"
    first = report.missed[0]
    return f"of its depthwise convolutions ({len(report.missed)}) none was swapped; {first.name}: {first.reason}"


def problems_to_tune(args: argparse.Namespace, device: torch.device) -> list[Problem]:
    """The problem of a shape, or those that a model runs."""
    if not args.model:
        for option, given in (("--input", args.input is not None), ("--fold-bn", args.fold_bn)):
            if given:
                raise UsageError(f"{option} is for --model")
        return [problem_of(args, device.type)]
    if shape_of(args):
        raise UsageError("give a shape or --model, not both")
    useless = options_given(args)
    if useless:
        verb = "is" if len(useless) == 1 else "are"
        raise UsageError(f"{', '.join(useless)} {verb} for a shape: with --model the model and --input decide")
    model: Any = model_of(args.model)
    model = model.to(device=device, memory_format=torch.channels_last)
    report = swap_separable_convs(model, fold_bn=args.fold_bn, report=False)
    x = input_of(args.input, device)
    with taken(args.model, args.input):
        problems = problems_of(model, (x,))
    if not problems:
        raise UsageError(f"{args.model} runs none of xsep's ops: {as_options(why_none(report))}")
    return problems


def run_autotune(args: argparse.Namespace) -> int:
    device = device_of(args)
    torch.backends.cudnn.benchmark = True
    tuned = tune(problems_to_tune(args, device), args.json, args.again, Effort(args.rounds, args.seconds))
    path = str(findings.cache_path(dispatch.card_of(device.type, dispatch.place(device.type))))
    code = finish(args, tuned.found, tuned.known, cache=path if tuned.kept else None)
    if not args.json:
        print(f"kept in {path}" if tuned.kept else f"not kept: {path} cannot be written")
    return code or (0 if tuned.kept else 2)
