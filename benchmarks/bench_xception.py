"""Xception beside Inception V3, whole: training steps and inference, with PyTorch's layers and with xsep's."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Optional

import common
import counted_bytes
import kinds
import networks
import torch
from networks import CHAINED, INCEPTION, MODES, NETWORKS, OURS, PLAIN
from torch import Tensor

from xsep.cli import screen
from xsep.dispatch import recording_chains
from xsep.ops.training.selection import select, select_for
from xsep.tuning import findings

GATE_SIZE = 75

#: Steps a second on 60 K80s, synchronous: Chollet, arXiv 1610.02357v3, table 3.
PAPER = {"Inception V3": 31, "Xception": 28, "ratio": 28 / 31}

EAGER, COMPILED, GRAPH, COMPILED_GRAPH = "eager", "compiled", "CUDA graph", "compiled, CUDA graph"
WAYS = {"eager": EAGER, "compiled": COMPILED, "graph": GRAPH, "compiled-graph": COMPILED_GRAPH}
COMPILE_MODES = ("default", "max-autotune-no-cudagraphs")

DESCRIPTION = """\
Times whole networks at 299 px on crops of real photographs (scikit-learn's two; or --image): Xception with PyTorch's
layers, the same Xception with xsep's, Inception V3, and in training Xception as a chain, in which BatchNorm and ReLU
are part of the layers around them (chain=True); all in channels_last. A training step is forward, backward
and the update of all weights (SGD with momentum), under autocast for the 16-bit types; inference runs in the type,
once with BatchNorm as it stands and once folded into the convolutions (by PyTorch's own utility; in xsep's Xception
by fold_batchnorm()). Eager, compiled (--compile-mode), and on a GPU both as CUDA graphs.

The paper reports 28 steps/s for Xception and 31 for Inception V3, a ratio of 0.903; ours is printed beside it.

Nothing is timed before it is right: logits in both inference modes, and block by block all gradients in training,
are held against float64, and may be off by at most twice what PyTorch's layers are at the same type, plus a few ulp
(of TF32 for float32 on a GPU, where PyTorch's settings allow it). What fails gets no speed, and makes the exit code 1;
so does a way that xsep's networks cannot be run in. Exit code 2 means that something asked for cannot be done; no file
is written then. Weights are random, from a fixed seed: speed does not depend on them.

On a CPU a figure is the minimum of interleaved repetitions in this one process; on a GPU the median of interleaved
rounds of back-to-back steps, by the wall clock, so that the host's share counts. Peak memory is what one eager step
allocates above what was there before it. Where the time goes is from PyTorch's profiler, in eager mode.

Beside the time stands what a training step moves, in MB a picture, counted from the shapes of its ops: each input read
once, each output written once. That is what kernels that do as the ops say move, not what this machine has moved.

Writes xception.json and xception.png into --out."""


def rounds_on_gpu(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, common.Times]:
    """Medians of interleaved rounds, each of enough steps for a quarter of a second, synchronised around."""
    steps = {}
    for name, call in calls.items():
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        before = time.perf_counter()
        call()
        torch.cuda.synchronize()
        steps[name] = max(1, min(50, int(0.25 / (time.perf_counter() - before))))
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            torch.cuda.synchronize()
            before = time.perf_counter()
            for _ in range(steps[name]):
                call()
            torch.cuda.synchronize()
            taken[name].append((time.perf_counter() - before) / steps[name])
    return {name: common.summary(samples, "median") for name, samples in taken.items()}


class Call(NamedTuple):
    """One step to time, and the model in it."""

    step: Callable[[], Any]
    model: Any
    takes: dict[str, str]  # the backends of xsep's layers, by direction


def prepare(
    models: dict[str, Any], mode: str, dtype: torch.dtype, pictures: Tensor, ways: list[str], compile_mode: str
) -> tuple[dict[tuple[str, str], Call], list[str], list[str]]:
    """The calls to time by (network, way); notes on those of PyTorch's networks that could not be made, and failures:
    those of ours."""
    calls: dict[tuple[str, str], Call] = {}
    notes: list[str] = []
    failures: list[str] = []
    # Once for all networks: each reset has those that were compiled before compiled again when they are called next.
    torch._dynamo.reset()
    for name, model in models.items():
        compiled: Optional[tuple[Any, Callable[[], Any]]] = None  # what its graph is recorded of too
        for way in ways if networks.takes_part(name, mode) else []:
            is_compiled = way in (COMPILED, COMPILED_GRAPH)
            if is_compiled and compiled is not None:
                s, step = compiled
            else:
                s = networks.subject(model, mode, dtype, pictures)
                if is_compiled:
                    s = s._replace(model=torch.compile(s.model, dynamic=False, mode=compile_mode))
                step = networks.training_step(s) if mode == "training" else networks.inference_step(s)
            if is_compiled:
                compiled = s, step
            try:
                with common.noting_backends() as takes, recording_chains() as layers:
                    if way in (GRAPH, COMPILED_GRAPH):
                        step = networks.as_graph(step)
                    step()
            except Exception as error:  # whatever a compiler or a capture may raise, the other figures still stand
                said = str(error).strip().splitlines()
                (failures if name in (OURS, CHAINED) else notes).append(
                    f"{name}, {mode}, {way}: failed: {said[0] if said else type(error).__name__}"
                )
                continue
            if name == CHAINED:
                chosen = {select(layer, "auto", d).label for layer in layers for d in findings.DIRECTIONS}
                takes["chain"] = "; ".join(sorted(chosen or {select_for(pictures.device, dtype, "auto").label}))
            calls[name, way] = Call(step, s.model, takes)
    return calls, notes, failures


def astray(calls: dict[tuple[str, str], Call]) -> dict[tuple[str, str], str]:
    """Sentences on those ways of inference whose logits are not those of eager PyTorch layers.

    Two right answers at one type differ by rounding, as much as eager Xception with our layers from one with
    PyTorch's, which the gate has passed; a third may differ four times as much.
    """
    if (PLAIN, EAGER) not in calls or (OURS, EAGER) not in calls:
        return {}
    results = {key: call.step().clone() for key, call in calls.items() if key[0] != INCEPTION}
    base = results[PLAIN, EAGER].double()
    rounding = float((results[OURS, EAGER].double() - base).norm())
    ulps = networks.ULPS * torch.finfo(results[PLAIN, EAGER].dtype).eps * float(base.norm())
    found = {}
    for key, y in results.items():
        error = float((y.double() - base).norm())
        if not error <= 4 * rounding + ulps:
            found[key] = f"{', '.join(key)}: logits are off by {error / float(base.norm()):.3g} relative"
    return found


def measure(
    models: dict[str, Any], mode: str, kind: str, pictures: Tensor, ways: list[str], args: Any, record: dict[str, Any]
) -> None:
    """Adds one mode's and type's rows, notes, failures and shares of time to the record."""
    dtype, gpu = common.DTYPES[kind], pictures.is_cuda
    calls, notes, failures = prepare(models, mode, dtype, pictures, ways, args.compile_mode)
    record["notes"] += [f"{kind}, {note}" for note in notes]
    record["failures"] += [f"{kind}, {failure}" for failure in failures]
    if mode != "training":
        wrong = astray(calls)
        record["failures"] += [f"{kind}, {mode}, {what}" for what in wrong.values()]
        calls = {key: call for key, call in calls.items() if key not in wrong}
    flat = {" / ".join(key): call.step for key, call in calls.items()}
    times = rounds_on_gpu(flat, args.rounds) if gpu else common.time_on_cpu(flat, args.rounds, 0.0)
    for name, way in calls:
        taken = times[f"{name} / {way}"]
        seconds = 1e-6 * taken["us"]
        row = {
            "dtype": kind, "mode": mode, "network": name, "way": way, "times": taken,
            "steps_per_second": 1 / seconds, "pictures_per_second": len(pictures) / seconds,
        }  # fmt: skip
        if name in (OURS, CHAINED):
            row["takes"] = calls[name, way].takes
        if way == EAGER:
            by_kind, row["peak_bytes"] = kinds.profile_step(calls[name, way].step, calls[name, way].model, gpu)
            record["shares"].append({"dtype": kind, "mode": mode, "network": name, "seconds": by_kind})
        record["results"].append(row)


def taken(row: dict[str, Any]) -> str:
    """Which backends an xsep network's layers ran on, in words."""
    ways = [(name, way) for way, name in row["takes"].items() if row["mode"] == "training" or way != "backward"]
    same = {name for name, _ in ways}
    on = same.pop() if len(same) == 1 else "; ".join(f"{way}: {name}" for name, way in ways)
    return f"{row['dtype']}, {row['network']}, {row['mode']}: its layers ran on {on}"


def speeds(rows: list[dict[str, Any]], kind: str, mode: str, way: str) -> dict[str, float]:
    """Steps a second by network."""
    return {r["network"]: r["steps_per_second"] for r in rows if (r["dtype"], r["mode"], r["way"]) == (kind, mode, way)}


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each Xception's speed over Inception V3's, and xsep's over PyTorch's, wherever both were timed."""
    found = []
    for kind, mode, way in dict.fromkeys((r["dtype"], r["mode"], r["way"]) for r in rows):
        speed = speeds(rows, kind, mode, way)

        def ratio(a: str, b: str, speed: dict[str, float] = speed) -> Optional[float]:
            return speed[a] / speed[b] if a in speed and b in speed else None

        found.append({
            "dtype": kind, "mode": mode, "way": way, "pytorch_over_inception": ratio(PLAIN, INCEPTION),
            "xsep_over_inception": ratio(OURS, INCEPTION), "xsep_over_pytorch": ratio(OURS, PLAIN),
            "chained_over_inception": ratio(CHAINED, INCEPTION), "chained_over_pytorch": ratio(CHAINED, PLAIN),
        })  # fmt: skip
    return found


def figures(record: dict[str, Any], kind: str) -> Any:
    """One line a mode, way and network; what xsep loses against PyTorch's layers in red."""
    out = screen.table(f"{kind}, batch {record['batch']}")
    for heading in ("", "", "network"):
        out.add_column(heading, no_wrap=True)
    for heading in ("steps/s", "pictures/s", "ms", "/ Inception V3", "/ PyTorch", "peak MB"):
        out.add_column(heading, justify="right", no_wrap=True)
    before = None
    for row in (r for r in record["results"] if r["dtype"] == kind):
        group = (row["mode"], row["way"])
        speed = speeds(record["results"], kind, *group)
        own = row["steps_per_second"]
        against = f"{own / speed[INCEPTION]:.3f}" if row["network"] != INCEPTION and INCEPTION in speed else ""
        gain = ""
        if row["network"] in (OURS, CHAINED) and PLAIN in speed:
            gain = f"[{'green' if own >= speed[PLAIN] else 'red'}]{own / speed[PLAIN]:.2f}[/]"
        if before is not None and before[0] != row["mode"]:
            out.add_section()
        peak = f"{1e-6 * row['peak_bytes']:.0f}" if "peak_bytes" in row else ""
        labels = ["" if before and before[0] == row["mode"] else row["mode"], row["way"], row["network"]]
        out.add_row(*labels, f"{own:.3f}", f"{row['pictures_per_second']:.2f}", f"{1e-3 * row['times']['us']:.1f}",
                    against, gain, peak)  # fmt: skip
        before = group
    return out


def count(kind: str, batch: int, size: int) -> list[dict[str, Any]]:
    """What a training step of PyTorch's and of the chained Xception moves and keeps, MB a picture."""
    makes = {
        PLAIN: lambda: networks.written_plainly(networks.xception()),
        CHAINED: lambda: networks.xception(chain=True),
    }
    return [
        {"dtype": kind, "network": name, **counted_bytes.count(make, batch, size, common.DTYPES[kind])._asdict()}
        for name, make in makes.items()
    ]


def counted(record: dict[str, Any], kind: str) -> Any:
    """The counts, and beside them the model that the chain was designed by where it was made for this very step."""
    out = screen.table(f"{kind}: counted from the shapes of a training step's ops, MB a picture")
    for heading in ("network", "moved", "backward in one pass", "kept for the backward"):
        out.add_column(heading, justify="left" if heading == "network" else "right", no_wrap=True)
    for row in (r for r in record["counted"] if r["dtype"] == kind):
        one = f"{row['one_pass']:.0f}" if row["network"] == CHAINED else ""
        out.add_row(row["network"], f"{row['two_kernels']:.0f}", one, f"{row['saved']:.1f}")
    if kind == "bfloat16" and record["size"] == 299:
        model = counted_bytes.MODEL
        out.add_row("by the model: PyTorch's", f"{model['eager']:.0f}", "", "")
        out.add_row("by the model: chained", f"{model['two kernels']:.0f}", f"{model['one pass']:.0f}", "")
    return out


def shares(record: dict[str, Any], kind: str) -> Any:
    """Where the time goes, in percent, eager."""
    rows = [s for s in record["shares"] if s["dtype"] == kind]
    present = [k for k in kinds.KINDS if any(s["seconds"][k] > 0 for s in rows)]
    out = screen.table(f"{kind}: where the time goes, % of an eager step")
    for heading in ("", "network"):
        out.add_column(heading, no_wrap=True)
    for heading in present:
        out.add_column(heading, justify="right")
    before = None
    for row in rows:
        whole = sum(row["seconds"].values()) or 1.0
        if row["mode"] != before:
            out.add_section()
        percent = [f"{100 * row['seconds'][k] / whole:.0f}" for k in present]
        out.add_row("" if row["mode"] == before else row["mode"], row["network"], *percent)
        before = row["mode"]
    return out


def parse(argv: Optional[list[str]]) -> argparse.Namespace:
    parser = common.Parser("bench_xception", description=DESCRIPTION, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="batch 1, few repetitions, no torch.compile: within two minutes on a CPU")
    add("--device", help="cpu, cuda or cuda:N; the default is the GPU where there is one")
    add("--dtype", nargs="+", choices=list(common.DTYPES), metavar="TYPE",
        help=f"{', '.join(common.DTYPES)} (default: float32, and without --quick bfloat16 too)")  # fmt: skip
    add("--batch", type=int, help="pictures (default: 64 on a GPU, 4 on a CPU, 1 with --quick)")
    add("--size", type=int, default=299, help="height and width of the pictures (default: 299, at least 75)")
    add("--mode", nargs="+", choices=("training", "inference", "folded"), default=["training", "inference", "folded"],
        metavar="MODE", help="training, inference, folded (default: all)")  # fmt: skip
    add("--way", nargs="+", choices=list(WAYS), metavar="WAY",
        help="eager, compiled, graph, compiled-graph (default: eager; without --quick compiled too; on a GPU the\n"
        "graphs of both)")  # fmt: skip
    add("--compile-mode", choices=COMPILE_MODES, default=COMPILE_MODES[0],
        help="of torch.compile (default: default; the other one compiles far longer)")  # fmt: skip
    add("--no-compile", action="store_true", help="leave torch.compile out")
    add("--image", metavar="PATH", help="another picture instead of scikit-learn's two photographs")
    add("--threads", type=int, help="CPU threads (default: PyTorch's own choice)")
    add("--rounds", type=int, help="repetitions of each measurement (default: 10; 2 with --quick)")
    add("--parts", type=int, default=len(networks.PARTS), help="how many of the network's 14 parts are held to their "
        "gradients, the last first\n(default: all; fewer for a dry run)")  # fmt: skip
    add("--seed", type=int, default=0, help="of the weights (default: 0)")
    add("--out", type=Path, help="directory for the results (default: benchmarks/results/<cpu or card>/)")
    args = parser.parse_args(argv)
    for name, least in (("batch", 1), ("threads", 1), ("rounds", 1), ("size", 75), ("parts", 1)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            parser.error(f"argument --{name}: must be at least {least}, got {getattr(args, name)}")
    return args


def main(argv: Optional[list[str]] = None) -> int:
    args = parse(argv)
    device = common.choose_device(args.device)
    gpu = device.type == "cuda"
    args.batch = args.batch or (1 if args.quick else 64 if gpu else 4)
    args.rounds = args.rounds or (2 if args.quick else 10)
    args.dtype = args.dtype or (["float32"] if args.quick else ["float32", "bfloat16"])
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True
    out = args.out or common.default_out(device)
    names, photographs = common.load_photographs(args.image)
    common.prepare_out(out)
    console = screen.console()
    default = ["eager", "graph"] if gpu else ["eager"]
    if not (args.quick or args.no_compile):
        default += ["compiled", "compiled-graph"] if gpu else ["compiled"]
    ways = [WAYS[way] for way in args.way or default]
    if not gpu and (GRAPH in ways or COMPILED_GRAPH in ways):
        raise common.BenchmarkError("a CUDA graph needs a GPU: --way may be eager and compiled here")
    modes = [mode for mode, short in zip(MODES, ("training", "inference", "folded")) if short in args.mode]
    pictures = common.photograph_batch(photographs, args.batch, args.size).to(device)
    small = common.photograph_batch(photographs, 2, GATE_SIZE).to(device)
    record: dict[str, Any] = {
        "benchmark": "xception", "batch": args.batch, "size": args.size, "quick": args.quick, "photographs": names,
        "weights": f"random, seed {args.seed}", "device_type": device.type, "environment": common.environment(device),
        "figure": "median of rounds, wall clock" if gpu else "minimum of interleaved repetitions",
        "compile_mode": args.compile_mode, "networks": list(NETWORKS), "paper": PAPER, "failures": [], "notes": [],
        "results": [], "shares": [], "counted": [],
    }  # fmt: skip
    with screen.progress(console, 1 + len(args.dtype) * (2 + len(modes))) as (say, advance):
        say("float64")
        models = {name: model.to(device) for name, model in networks.build(args.seed).items()}
        networks.settle(models, small)
        exact = networks.truth(models[PLAIN], small, networks.PARTS[-args.parts :])
        advance()
        for kind in args.dtype:
            say(f"{kind}: correctness")
            passed = dict(models)
            for name in (OURS, CHAINED):
                wrong = networks.gate(models[name], models[PLAIN], common.DTYPES[kind], small, exact)
                record["failures"] += [f"{kind}, {name}, {what}" for what in wrong]
                if wrong:
                    del passed[name]
                advance()
            if MODES[0] in modes:
                record["counted"] += count(kind, args.batch, args.size)
            for mode in modes:
                say(f"{kind}: {mode}")
                measure(passed, mode, kind, pictures, ways, args, record)
                advance()
    if not gpu:
        record["notes"] += common.busy_note(row["times"] for row in record["results"])
    record["ratios"] = ratios(record["results"])
    report(record, args, out, console)
    return 1 if record["failures"] else 0


def report(record: dict[str, Any], args: argparse.Namespace, out: Path, console: Any) -> None:
    """Tables, the ratio, then the two files."""
    where = record["environment"]
    console.print(
        f"{where['device']}, {where['cores']} cores, {where['threads']} threads, PyTorch {where['torch']}, "
        f"batch {record['batch']} at {record['size']} px from {', '.join(record['photographs'])}; {record['figure']}\n"
    )
    for kind in args.dtype:
        console.print(figures(record, kind))
        if any(s["dtype"] == kind for s in record["shares"]):
            console.print(shares(record, kind))
        if any(r["dtype"] == kind for r in record["counted"]):
            console.print(counted(record, kind))
    for r in record["ratios"]:
        if r["mode"] == "training":
            values = [(r["pytorch_over_inception"], "PyTorch's layers"), (r["xsep_over_inception"], "xsep's"),
                      (r["chained_over_inception"], "a chain")]  # fmt: skip
            known = ", ".join(f"{value:.3f} with {what}" for value, what in values if value is not None)
            console.print(
                f"Training, {r['dtype']}, {r['way']}: Xception / Inception V3 in steps/s {known}; "
                f"the paper: 28 / 31 = {PAPER['ratio']:.3f}"
            )
    for sentence in dict.fromkeys(taken(row) for row in record["results"] if "takes" in row):
        console.print(sentence, markup=False)
    for note in record["notes"]:
        console.print(note, markup=False)
    for failure in record["failures"]:
        console.print(f"[red]wrong, so not timed:[/] {failure}")
    written = common.write_results(out, "xception", record, "xception_chart")
    console.print(f"written: {written}", soft_wrap=True)


if __name__ == "__main__":
    raise SystemExit(common.run("bench_xception", main))
