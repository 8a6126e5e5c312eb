"""One command that verifies and measures xsep on the GPU at hand, and keeps a record of it."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

HERE = Path(__file__).resolve().parent
# Nothing is installed for this: the package is the one that lies beside.
sys.path.insert(0, str(HERE.parent))

import common  # noqa: E402
import gpu_phases  # noqa: E402
import gpu_record  # noqa: E402
import torch  # noqa: E402
from gpu_phases import Check, Outcome  # noqa: E402
from gpu_plugin import backend_of  # noqa: E402

BOTH = ("cuda", "triton")

DESCRIPTION = """\
Verifies and measures xsep on a GPU, with the Python that runs this and nothing to download: builds in place, has the
card checked as `auto` would, runs the GPU tests, the table that `auto` looks problems up in, compute-sanitizer's
memcheck and racecheck on some of the tests, and the benchmarks, in the order of what they are worth. Correctness comes
first. As soon as all tests of a backend have passed, xsep/tuning/tables/<card>.json says so, and `auto` takes it on
every such card.

Each phase is written into benchmarks/results/<card>/record.json the moment it ends. A phase that has passed with the
same kernels on the same kind of card is not run again (--again does), so a second call goes on where the first one
stopped, on another machine too, and after one that was killed.

--budget seconds (540) is what all of it may take: repetitions are cut first, then what is worth least is left out, and
both are said. A phase ends before the next ones would have no time to begin, unless it needs that time itself.
--device cpu --quick runs every phase on the CPU, where the GPU tests are collected and skipped: what fails on a GPU
then, fails because of the GPU.

Exit code 0: nothing wrong was found. 1: something is wrong, or a phase failed. 2: it cannot be run here."""

#: What the programs can do without, and what is lost.
OPTIONAL = {
    "rich": "tables are plain text", "matplotlib": "charts are drawn later, by `make report`",
    "sklearn": "pictures made up like photographs are the input", "pytest": "no test can run, so nothing is verified",
    "numpy": "nothing: no program here needs it",
    "triton": "the triton backend cannot run", "ninja": "compiling is slow",
    "pybind11": "PyTorch's own copy of its headers is used",
}  # fmt: skip


@dataclass(frozen=True)
class Phase:
    """``least`` seconds are needed for it to be worth beginning; with ``full`` it has all its repetitions: estimates,
    made without a card."""

    name: str
    least: int
    full: int
    backends: tuple[str, ...]  # whose sources it depends on
    run: Callable[[Check], Outcome]


def environment(check: Check) -> Outcome:
    """What everything after it depends on."""
    missing = {name: lost for name, lost in OPTIONAL.items() if importlib.util.find_spec(name) is None}
    if "ninja" in missing and shutil.which("ninja"):
        del missing["ninja"]
    details: dict[str, Any] = {**common.environment(torch.device(check.device)), "missing": missing}
    tool = shutil.which("nvidia-smi")
    if check.gpu and tool:
        fields = "driver_version,power.limit,clocks.max.sm,clocks.max.memory,ecc.mode.current"
        told = subprocess.run([tool, f"--query-gpu={fields}", "--format=csv,noheader"], capture_output=True, text=True)
        details["nvidia_smi"] = dict(zip(fields.split(","), told.stdout.strip().split(", ")))
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if Path(nvcc).exists():
        told = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
        found = re.search(r"release ([\d.]+)", told.stdout)
        details["nvcc"] = found[1] if found else "unknown"
    check.record["environment"] = details
    lacks = f", without {', '.join(missing)}" if missing else ""
    return Outcome("passed", f"{details['device']}, PyTorch {details['torch']}, Python {details['python']}{lacks}")


def ready(check: Check) -> list[str]:
    """The GPU backends that can run here, as a process of its own finds after the build; it is asked once."""
    if check.backends is None:
        done = gpu_phases.python(check, "-m", "xsep", "info", "--json", errors=False)
        try:
            found = json.loads(done.output)["backends"]
        except ValueError:
            return []
        check.backends = [name for name in BOTH if found.get(name, {}).get("ready")]
    return check.backends


def table(check: Check) -> Outcome:
    """Measures Xception's layers; ship() makes the package's own table of the card of it."""
    more: tuple[str, ...] = ("--device", check.device)
    if not check.gpu:
        more = (*more, "--quick", "--batch", "1", "--dtype", "float32")
    else:
        more = (*more, "--seconds", str(int(max(min(0.6 * check.left(), 150), 10))))
    if check.record["phases"].get("table", {}).get("status") != "passed":  # else it is asked for --again
        more = (*more, "--known", str(check.out / "table.json"))
    return gpu_phases.program("ship_table", results=("table",))(check, more)


def ship(check: Check) -> None:
    """Writes the package's table of this card anew: which backends are verified, and times of those and of PyTorch.

    What is not verified, or was measured with other sources, has no time there; where nothing is verified, nothing has.
    """
    from xsep import dispatch
    from xsep.tuning import findings

    made = findings.fresh(dispatch.card_of(check.device, dispatch.place(check.device)))
    made.date, made.verified = gpu_record.now(), [name for name in BOTH if is_verified(check.record, name)]
    target = findings.TABLES / f"{common.default_out(torch.device(check.device)).name}.json"
    if not made.verified and not target.exists():
        return
    with contextlib.suppress(OSError, ValueError):  # not measured yet: what is verified is worth a table of its own
        measured = findings.from_json((check.out / "table.json").read_text())
        measured.verified = made.verified
        if made.verified and measured.card == made.card:
            made.entries = {key: measured.vouched(entry) for key, entry in measured.entries.items()}
            made.probes = {key: measured.vouched(probe) for key, probe in measured.probes.items()}
    try:
        target.parent.mkdir(exist_ok=True)
        findings.write_whole(target, findings.to_json(made))
    except OSError as error:
        raise common.BenchmarkError(f"{str(target.parent)!r} cannot be written into: {error.strerror}") from None


def is_verified(record: dict[str, Any], backend: str) -> bool:
    """Whether every GPU test of a backend, and those of both, passed with the sources at hand."""
    digests = gpu_phases.phase_digests((backend,))
    return record.get("verified", {}).get(backend, {}).get("digest") == digests[backend]


def verify(record: dict[str, Any]) -> None:
    """Enters what the test phases prove, and takes back what they disprove; what they prove no longer, since sources
    have changed, is kept as the last digest that was verified.

    A backend stands on the tests below its name and on those among the others whose name has it among the parameters,
    or no backend at all.
    """
    phases = record["phases"]
    now = gpu_phases.phase_digests(BOTH)
    for backend in BOTH:
        own, other = (phases.get(name, {}) for name in (f"tests-{backend}", "tests-other"))
        if any(entry.get("digests", {}).get(backend) != now[backend] for entry in (own, other)):
            continue
        wrong = [*own.get("failed", {}), *(t for t in other.get("failed", {}) if backend_of(t) in ("", backend))]
        ran = len(own.get("passed", []))
        if wrong and is_verified(record, backend):
            del record["verified"][backend]
        every = other["status"] == "passed" or not {"", backend} & set(other.get("incomplete", [""]))
        if own["status"] == "passed" and ran and every and not wrong:
            record["verified"][backend] = {"digest": now[backend], "date": own["date"], "tests": ran}


def sepconv(kind: str) -> Callable[[Check], Outcome]:
    """One type a phase: what is killed for want of time takes no other type with it."""

    def phase(check: Check) -> Outcome:
        if check.gpu:
            more = ("--backend", "auto", *ready(check), "--rounds", "40" if check.thorough else "12")
        elif kind != "float32":
            return Outcome("refused", "on a CPU one type is enough to see that it runs")
        else:
            more = ("--quick", "--shapes", "10", "--rounds", "1")
        arguments = ("--device", check.device, "--no-compile", "--dtype", kind, *more)
        return gpu_phases.program("bench_sepconv", results=("sepconv",))(check, arguments)

    return phase


def compiled_sepconv(check: Check) -> Outcome:
    """max-autotune takes minutes for all shapes: the middle flow's, and as many more as there is time for."""
    if check.gpu:
        shapes = ("7", "2", "4", "6") if check.thorough else ("7",)
        more = ("--dtype", "bfloat16", "--backend", "auto", "--shapes", *shapes, "--rounds", "12")
    else:
        more = ("--quick", "--shapes", "10", "--rounds", "1", "--mode", "forward")
    return gpu_phases.program("bench_sepconv", results=("sepconv",))(check, ("--device", check.device, *more))


def memory(check: Check) -> Outcome:
    more = ("--dtype", "float32", "bfloat16") if check.gpu else ("--batch", "1")
    return gpu_phases.program("bench_memory", results=("memory",))(check, ("--device", check.device, *more))


def micro(backend: str) -> Callable[[Check], Outcome]:
    def phase(check: Check) -> Outcome:
        if check.gpu and backend not in ready(check):
            return Outcome("refused", f"the {backend} backend cannot run here: `python -m xsep info` says why")
        more = ("--rounds", "30" if check.thorough else "8") if check.gpu else ("--quick", "--dtype", "float32")
        return gpu_phases.program(f"bench_{backend}", results=(backend,))(check, ("--device", check.device, *more))

    return phase


def chain(check: Check) -> Outcome:
    more = ("--rounds", "30" if check.thorough else "8") if check.gpu else ("--quick", "--dtype", "float32")
    return gpu_phases.program("bench_chain", results=("chain",))(check, ("--device", check.device, *more))


def xception(
    kind: str, *ways: str, modes: tuple[str, ...] = ("training", "inference", "folded")
) -> Callable[[Check], Outcome]:
    def phase(check: Check) -> Outcome:
        if check.gpu:
            more = ("--dtype", kind, "--rounds", "10" if check.thorough else "4", "--mode", *modes)
        elif "eager" not in ways or kind == "float32":
            return Outcome("refused", "CUDA graphs need a GPU, and on a CPU one network, eager, is enough to see")
        else:
            more = ("--quick", "--size", "75", "--mode", "inference", "--rounds", "1", "--parts", "1")
        arguments = ("--device", check.device, "--way", *ways, *more)
        return gpu_phases.program("bench_xception", results=("xception",))(check, arguments)

    return phase


COMPILED, INFERENCE = ("compiled", "compiled-graph"), ("inference", "folded")
PHASES = (
    Phase("environment", 0, 0, (), environment),
    Phase("build", 20, 120, ("cuda",), gpu_phases.build),
    Phase("card-check", 15, 40, BOTH[:1], gpu_phases.card_check),
    Phase("tests-cuda", 15, 90, BOTH[:1], gpu_phases.tests("cuda", BOTH[:1])),
    Phase("tests-triton", 15, 150, BOTH[1:], gpu_phases.tests("triton", BOTH[1:])),
    Phase("tests-other", 15, 60, BOTH, gpu_phases.tests("other", BOTH)),
    Phase("table", 20, 90, BOTH, table),
    Phase("sepconv-bfloat16", 20, 50, BOTH, sepconv("bfloat16")),
    Phase("training-graph", 20, 40, BOTH, xception("bfloat16", "graph", modes=("training",))),
    Phase("memcheck", 20, 60, ("cuda",), gpu_phases.sanitizer("memcheck")),
    Phase("racecheck", 20, 60, ("cuda",), gpu_phases.sanitizer("racecheck")),
    Phase("sepconv-float32", 20, 60, BOTH, sepconv("float32")),
    Phase("bench-cuda", 15, 30, ("cuda",), micro("cuda")),
    Phase("bench-triton", 15, 40, ("triton",), micro("triton")),
    Phase("bench-chain", 20, 60, BOTH, chain),
    Phase("memory", 10, 15, BOTH, memory),
    Phase("xception", 25, 60, BOTH, xception("bfloat16", "eager")),
    Phase("training-compiled", 60, 200, BOTH, xception("bfloat16", *COMPILED, modes=("training",))),
    Phase("inference-graph", 20, 40, BOTH, xception("bfloat16", "graph", modes=INFERENCE)),
    Phase("sepconv-float16", 20, 50, BOTH, sepconv("float16")),
    Phase("xception-float32", 30, 90, BOTH, xception("float32", "eager", "graph")),
    Phase("sepconv-compiled", 40, 240, BOTH, compiled_sepconv),
    Phase("inference-compiled", 60, 200, BOTH, xception("bfloat16", *COMPILED, modes=INFERENCE)),
)
#: Run by every call: they cost little, and what is built is not part of the record.
ALWAYS = ("environment", "build")


def is_done(record: dict[str, Any], phase: Phase) -> bool:
    before = record["phases"].get(phase.name, {})
    return before.get("status") == "passed" and before.get("digests") == gpu_phases.phase_digests(phase.backends)


def may_take(left: float, phase: Phase, later: list[Phase]) -> float:
    """Seconds until a phase is ended: those that are left, less what later ones need to begin, in the order of their
    worth and as long as twice this one's own estimate remains."""
    for other in later:
        if left - other.least < 2 * phase.full:
            break
        left -= other.least
    return left


def run_phase(check: Check, phase: Phase, later: list[Phase]) -> dict[str, Any]:
    """Runs one phase and enters it into the record; the entry."""
    digests = gpu_phases.phase_digests(phase.backends)
    started = time.monotonic()
    check.phase_deadline = started + may_take(check.left(), phase, later)
    try:
        outcome = phase.run(check)
    except KeyboardInterrupt:
        outcome = Outcome("unfinished", "interrupted")
    check.phase_deadline = math.inf
    entry = {
        "status": outcome.status, "summary": outcome.summary, "date": gpu_record.now(), "digests": digests,
        "seconds": round(time.monotonic() - started, 1), "thorough": check.thorough, **outcome.details,
    }  # fmt: skip
    check.record["phases"][phase.name] = entry
    verify(check.record)
    if check.gpu:
        ship(check)
    gpu_record.write_json(check.out, "record.json", check.record)
    if outcome.summary == "interrupted":
        raise KeyboardInterrupt
    return entry


def parse(argv: Optional[list[str]]) -> argparse.Namespace:
    parser = common.Parser("gpu_check", description=DESCRIPTION, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--budget", type=float, default=540, help="seconds that all of it may take (default: 540)")
    add("--device", choices=["cuda", "cpu"], default="cuda", help="cpu, with --quick: a dry run")
    add("--quick", action="store_true", help="the dry run's small problems; only with --device cpu")
    add("--again", action="store_true", help="run what has passed before, too")
    names = [phase.name for phase in PHASES]
    add("--phase", nargs="+", choices=names, metavar="NAME", help=f"only these of: {', '.join(names)}")
    add("--out", type=Path, help="folder for the record (default: benchmarks/results/<card>/; build/gpu-check-dry-run\n"
        "for a dry run)")  # fmt: skip
    args = parser.parse_args(argv)
    if (args.device == "cpu") != args.quick:
        parser.error("--device cpu and --quick go together: a GPU is checked in full, a CPU only as a dry run")
    if not args.budget > 0:
        parser.error(f"argument --budget: must be more than 0, got {args.budget}")
    return args


def main(argv: Optional[list[str]] = None) -> int:
    args = parse(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise common.BenchmarkError("PyTorch sees no GPU here; --device cpu --quick is a dry run")
    device = torch.device(args.device)
    out = args.out or (HERE.parent / "build" / "gpu-check-dry-run" if args.quick else common.default_out(device))
    out = out.resolve()
    common.prepare_out(out)
    record, note = gpu_record.load(out / "record.json", common.device_name(device))
    if note:
        print(note)
    with tempfile.TemporaryDirectory(prefix="xsep-check-") as scratch:
        check = Check(args.device, args.quick, out, time.monotonic() + args.budget, Path(scratch), record)
        return go_through(check, [p for p in PHASES if not args.phase or p.name in args.phase], args.again)


def go_through(check: Check, phases: list[Phase], again: bool) -> int:
    left_out, todo = [], []
    for phase in phases:
        if not again and phase.name not in ALWAYS and is_done(check.record, phase):
            print(f"{phase.name}: done before, {check.record['phases'][phase.name]['date']}", flush=True)
        else:
            todo.append(phase)
    plan = ", ".join(f"{p.name} {p.least}-{p.full}" for p in todo)
    print(f"plan for {check.left():.0f} s, each with the seconds it needs to begin and in full: {plan}", flush=True)
    for i, phase in enumerate(todo):
        if check.left() < phase.least:
            left_out.append(phase.name)
            continue
        later = todo[i + 1 :]
        check.thorough = check.left() >= phase.full + sum(p.least for p in later)
        entry = run_phase(check, phase, later)
        cut = "" if check.thorough else "; fewer repetitions, for want of time"
        print(f"{phase.name}: {entry['status']}, {entry['summary']} ({entry['seconds']:.0f} s{cut})", flush=True)
    check.record["left_out"] = left_out
    check.record["date"] = gpu_record.now()
    gpu_record.write_json(check.out, "record.json", check.record)
    if left_out:
        print(f"left out, for want of time: {', '.join(left_out)}; a further call goes on there")
    for backend, proof in check.record["verified"].items():
        fresh = is_verified(check.record, backend)
        print(f"{backend}: verified {proof['date']} by {proof['tests']} tests{'' if fresh else ', with older sources'}")
    print(f"written: {check.out / 'record.json'}")
    wrong = [p.name for p in phases if check.record["phases"].get(p.name, {}).get("status") == "failed"]
    if wrong:
        print(f"failed: {', '.join(wrong)}; record.json has the details")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(common.run("gpu_check", main))
