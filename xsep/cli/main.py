"""The commands and their options."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn, Optional

from ..tuning import findings
from . import check, explain, info, swapping, tune
from .shapes import UsageError, add_shape

DESCRIPTION = """\
xsep: depthwise separable convolution, fast, in PyTorch.

Exit codes: 0; 1 where something was found wrong; 2 where what is asked for cannot be done, with one sentence."""

Command = Callable[[argparse.Namespace], int]


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def _times(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=5, help="repetitions of each way, at least (default: 5)")
    parser.add_argument("--seconds", type=float, default=0.5, help="and until so long has passed (default: 0.5)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="the default is the GPU where there is one")


def parser() -> Parser:
    made = Parser("xsep", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    def command(name: str, help: str, run: Command) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help, description=help)
        added.add_argument("--json", action="store_true", help="print JSON, and nothing else")
        added.set_defaults(run=run)
        return added

    command("info", "versions, card, which backends are ready and why others are not, what is verified", info.run)

    one = command("explain", "how each backend would run a problem, and why auto takes the one it takes", explain.run)
    add_shape(one)
    where = one.add_mutually_exclusive_group()
    where.add_argument("--device", choices=["cpu", "cuda"], help="the default is the GPU where there is one")
    where.add_argument("--device-like", metavar="CARD", help='one that is not here: H200, H100, A100, "RTX 4090", T4')

    one = command("check", "holds the GPU kernels to float64 on the card that is here; auto then takes them", check.run)
    one.add_argument("--backend", nargs="+", choices=findings.VERIFIED_BY_CARDS, metavar="NAME",
        help="cuda, triton (default: those that can run here)")  # fmt: skip
    one.add_argument("--again", action="store_true", help="what is known already, too")

    one = command("bench", "times of every way of running a problem here, behind a correctness gate", tune.run_bench)
    add_shape(one)
    _times(one)

    one = command("autotune", "times of every way of running a problem, or each that a model runs, kept for auto",
        tune.run_autotune)  # fmt: skip
    add_shape(one, optional=True)
    _times(one)
    one.add_argument("--model", metavar="MODEL", help="timm:NAME, torchvision:NAME or path.py:factory, swapped first")
    one.add_argument("--input", metavar="NxCxHxW", help="what the model is called with (default: 1x3x224x224)")
    one.add_argument("--fold-bn", action="store_true", help="let the model's batch norms run with its convolutions")
    one.add_argument("--again", action="store_true", help="measure what is known already, too")

    one = command("swap-report", "what swap_separable_convs finds in a model, and a check of its outputs", swapping.run)
    one.add_argument("model", metavar="MODEL", help="timm:NAME, torchvision:NAME or path.py:factory")
    one.add_argument("--input", metavar="NxCxHxW", help="what it is called with (default: 1x3x224x224)")
    one.add_argument("--fold-bn", action="store_true", help="let batch norms run with the convolutions")
    one.add_argument("--no-check", action="store_true", help="do not run the model")
    return made


def main(argv: Optional[list[str]] = None) -> int:
    try:
        try:
            return _run(parser().parse_args(argv))
        finally:
            print(end="", flush=True)  # while it can still be noticed that nobody reads it
    except BrokenPipeError:
        # Else Python would try to write the rest at its end, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(args: argparse.Namespace) -> int:
    for name in ("rounds", "seconds"):
        value = getattr(args, name, None)
        if value is not None and not value >= (1 if name == "rounds" else 0):
            print(f"xsep {args.command}: --{name} is too small: {value}", file=sys.stderr)
            return 2
    try:
        return int(args.run(args))
    except UsageError as error:
        print(f"xsep {args.command}: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, ValueError, MemoryError) as error:
        # Such as XSEP_BACKEND naming nothing, or a device without the memory.
        words = str(error).strip().splitlines() or [type(error).__name__]
        print(f"xsep {args.command}: {words[0]}", file=sys.stderr)
        return 2
