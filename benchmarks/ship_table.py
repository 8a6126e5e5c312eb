"""Measures Xception's layers by every backend on the card at hand, for the table that the package ships of it."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Optional

import common
import micro
import torch

from xsep import card_check, dispatch
from xsep.autotuner import measured
from xsep.measuring import Effort
from xsep.problem import IDENTITY, RELU, Problem
from xsep.tuning import findings

DESCRIPTION = """\
Times every way of running each separable layer of Xception at 299 px, forward and backward apart, with the ReLU before
it, as a layer of the training chain, and without, and writes table.json, anew after each: what xsep's `auto` looks a
problem up in on such a card, once `make gpu-check` has added there which backends are verified. On a GPU the layers
come first by which the cost model is corrected for all other problems. A backend that is wrong on a layer gets no time
there, is named at the end, and makes the exit code 1; 3 means that time was over before all were measured."""

PROBING = Effort(10, 0.02)


def problems(device: str, kinds: list[str], batch: int, quick: bool) -> list[Problem]:
    """The likeliest first, in case time runs out."""
    layers = [(16, 24, 19, 1)] if quick else micro.LAYERS

    def of(kind: str, first: int) -> list[Problem]:
        dtype = common.DTYPES[kind]
        return [micro.layer_problem(device, dtype, batch, c_in, c_out, size, first) for c_in, c_out, size, _ in layers]

    found = []
    for kind in kinds:
        found += [*of(kind, RELU), *(p.as_chain_layer() for p in of(kind, RELU)), *of(kind, IDENTITY)]
    return found


def earlier(path: Optional[Path], table: findings.Findings) -> findings.Findings:
    """An earlier table of the same card, versions and sources; an empty one where there is none."""
    if path is not None and path.exists():
        found = findings.from_json(path.read_text())
        if all(getattr(found, k) == getattr(table, k) for k in ("card", "architecture", "versions", "digests")):
            return found
    return findings.Findings(table.card, table.architecture, table.versions, table.digests)


def wrong_in(found: findings.Finding) -> dict[str, str]:
    """Backends that could have run and were wrong, or raised."""
    return {name: why for name, why in found.refused.items() if why.startswith(("wrong", "failed"))}


def write(out: Path, table: findings.Findings) -> None:
    with common.whole_files(out) as temporary:
        common.write_json(temporary("table.json"), findings.to_dict(table))


def main(argv: Optional[list[str]] = None) -> int:
    parser = common.Parser("ship_table", description=DESCRIPTION, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--device", help="cpu or cuda; the default is the GPU where there is one")
    add("--dtype", nargs="+", choices=list(common.DTYPES), default=["bfloat16", "float32"], metavar="TYPE")
    add("--batch", type=int, default=64, help="pictures (default: 64)")
    add("--seconds", type=float, default=1e9, help="begin no further layer after so long")
    add("--known", type=Path, metavar="FILE", help="an earlier table.json: what it has is left out")
    add("--quick", action="store_true", help="one small layer")
    add("--out", type=Path, help="folder for table.json (default: benchmarks/results/<cpu or card>/)")
    args = parser.parse_args(argv)
    device = common.choose_device(args.device)
    torch.backends.cudnn.benchmark = True
    out = args.out or common.default_out(device)
    common.prepare_out(out)
    card = dispatch.card_of(device.type, dispatch.place(device.type))
    table = findings.fresh(card)
    table.date = str(common.environment(device)["date"])
    started, failures = time.monotonic(), []
    before = earlier(args.known, table)
    done_before = {key for key, entry in before.entries.items() if not wrong_in(entry)}
    asked = problems(device.type, args.dtype, args.batch, args.quick)
    wanted = [problem for problem in asked if findings.problem_key(problem) not in done_before]
    if device.type == "cuda" and not before.probes:
        dtypes = [common.DTYPES[kind] for kind in args.dtype]
        table.probes = card_check.time_probes(findings.VERIFIED_BY_CARDS, dtypes, PROBING, min(args.seconds / 4, 40.0))
        print(f"{len(table.probes)} layers for the cost model", flush=True)
        write(out, table)
    late = False
    for done, problem in enumerate(wanted):
        if time.monotonic() - started > args.seconds:
            print(f"time is over: {done} of {len(wanted)} measured")
            late = True
            break
        try:
            found = measured(problem, Effort(5, 0.2) if not args.quick else Effort(1, 0.0))
        except RuntimeError as error:  # of one layer; the others still stand
            failures.append(f"{problem}: {str(error).strip().splitlines()[0]}")
            continue
        failures += [f"{problem}, {name}: {why}" for name, why in wrong_in(found).items()]
        table.entries[findings.problem_key(problem)] = found
        for direction, times in found.times.items():
            told = ", ".join(f"{name} {us:.0f}" for name, us in times.items())
            print(f"{problem.op} {problem.c_in}->{problem.c_out} @{problem.h} {direction}, us: {told}", flush=True)
        write(out, table)
    for failure in failures:
        print(f"wrong, so not timed: {failure}")
    return 1 if failures else common.LATE if late else 0


if __name__ == "__main__":
    sys.exit(common.run("ship_table", main))
