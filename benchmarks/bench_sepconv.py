"""Xception's separable convolutions, one by one: xsep beside PyTorch's two convolutions."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Optional

import common
import torch
import torch.nn.functional as F
from torch import Tensor

import xsep
from xsep import reference, testing
from xsep.cli import screen
from xsep.models import xception

SIZE = 299
EAGER = ("nchw", "channels_last")
COMPILED = ("compiled nchw", "compiled channels_last")
MODES = ("forward", "forward+backward")
#: On a GPU. With CUDA graphs it would copy the inputs before each replay, which no other way does.
COMPILE_MODE = "max-autotune-no-cudagraphs"

DESCRIPTION = """\
Times the ten distinct separable convolutions of Xception at 299 px: xsep's one op, on channels_last tensors, beside
PyTorch's two conv2d in both memory layouts, eager and compiled; forward and forward+backward.

The inputs are the activations that real photographs (scikit-learn's two, cropped to a batch; or --image) produce at
that depth of an Xception. Its weights are random, from a fixed seed, because no published ones come with this
package; its BatchNorms normalise by the batch, as in training, so the activations have the size that training gives.

Nothing is timed before it is right: output and gradients are held against float64, and may be off by at most twice
what PyTorch's own convolutions are at the same type, plus a few ulp (of TF32 for float32 on a GPU, where PyTorch's
settings allow it). What fails is named, gets no speed, and makes the exit code 1. Exit code 2 means that something
asked for cannot be done; no file is written then.

On a CPU a figure is the minimum of interleaved repetitions in this one process; on a GPU the median of CUDA-event
times with L2 flushed before each (the warm ones, p20 and p80 are in the JSON). Ratios are PyTorch's time over xsep's:
above 1 xsep is faster. "limit" is the fraction reached of what this machine allows, from a copy and a matrix
product measured at the start: the larger of bytes over bandwidth and FLOPs over rate. Beside "auto" stands the backend
that it takes, forward / backward where those differ.

Writes sepconv.json and sepconv.png into --out."""


class Layer(NamedTuple):
    """One distinct separable convolution and what it is fed."""

    c_in: int
    c_out: int
    size: int
    occurs: int  # how many of Xception's 34 layers have this shape
    x: Tensor  # [N, C_in, size, size] float32, after the ReLU before the layer
    w_dw: Tensor  # [C_in, 1, 3, 3]
    w_pw: Tensor  # [C_out, C_in, 1, 1]

    @property
    def name(self) -> str:
        return f"{self.c_in}→{self.c_out} @{self.size}"


def xception_layers(pictures: Tensor, seed: int) -> list[Layer]:
    """The ten shapes in the order they run, from [N, 3, 299, 299]; a shape that recurs is taken at its first place."""
    torch.manual_seed(seed)
    model = xception(num_classes=0, backend="aten").to(pictures.device).train()
    found: dict[tuple[int, int, int], Layer] = {}

    def keep(module: Any, args: tuple[Tensor]) -> None:
        x = args[0]
        key = (module.in_channels, module.out_channels, x.shape[-1])
        if key in found:
            found[key] = found[key]._replace(occurs=found[key].occurs + 1)
            return
        conv_dw, conv_pw = module.convs
        x = F.relu(x) if module.prologue_activation == "relu" else x.clone()
        found[key] = Layer(*key, 1, x, conv_dw.weight.detach(), conv_pw.weight.detach())

    for conv, _ in model.separable_layers():
        conv.register_forward_pre_hook(keep)
    with torch.no_grad():
        model(pictures)
    return list(found.values())


def two_convolutions(x: Tensor, w_dw: Tensor, w_pw: Tensor) -> Tensor:
    """What a PyTorch user writes."""
    return F.conv2d(F.conv2d(x, w_dw, None, 1, 1, 1, w_dw.shape[0]), w_pw)


def one_op(backend: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda x, w_dw, w_pw: xsep.separable_conv2d(x, w_dw, w_pw, padding=1, backend=backend)


def truth(x: Tensor, w_dw: Tensor, w_pw: Tensor) -> Tensor:
    return reference.separable_conv2d(x, w_dw, w_pw, padding=(1, 1, 1, 1))


def inputs(layer: Layer, dtype: torch.dtype, layout: torch.memory_format, grad: bool) -> list[Tensor]:
    """x, w_dw, w_pw and dy, in one type and layout."""
    device = layer.x.device  # dy has hundreds of millions of values: seconds on the host
    g = torch.Generator(device).manual_seed(layer.c_in * layer.size)
    dy = torch.randn(layer.x.shape[0], layer.c_out, layer.size, layer.size, generator=g, device=device)
    tensors = [t.to(dtype).contiguous(memory_format=layout) for t in (layer.x, layer.w_dw, layer.w_pw, dy)]
    return [*(t.detach().requires_grad_(grad) for t in tensors[:3]), tensors[3]]


def step(op: Callable[..., Tensor], tensors: list[Tensor]) -> Callable[[], Any]:
    """The call to time: forward alone, or with the gradients of x and both weights where they are wanted."""
    x, w_dw, w_pw, dy = tensors
    if x.requires_grad:
        return lambda: torch.autograd.grad(op(x, w_dw, w_pw), (x, w_dw, w_pw), dy)

    def forward() -> Tensor:
        with torch.no_grad():
            return op(x, w_dw, w_pw)

    return forward


def gate(layer: Layer, dtype: torch.dtype, backends: list[str]) -> dict[str, list[str]]:
    """For each backend, sentences on what is wrong; empty lists where nothing is."""

    def results(op: Callable[..., Tensor], tensors: list[Tensor]) -> dict[str, Tensor]:
        y = op(*tensors[:3])
        return {"y": y.detach(), **dict(zip(("dx", "dw_dw", "dw_pw"), torch.autograd.grad(y, tensors[:3], tensors[3])))}

    tensors = inputs(layer, dtype, torch.channels_last, True)
    wide = results(truth, [t.detach().double().requires_grad_(i < 3) for i, t in enumerate(tensors)])
    exact = testing.Truth(wide)
    pytorch = results(two_convolutions, tensors)
    kind = testing.held_as(dtype, layer.x.device)
    found = {}
    for backend in backends:
        try:
            with testing.poisoned_memory():
                found[backend] = testing.violations(results(one_op(backend), tensors), exact, pytorch, kind)
        except RuntimeError as error:
            found[backend] = [str(error).splitlines()[0]]
    return found


def floor(layer: Layer, dtype: torch.dtype, mode: str, limits: tuple[float, float]) -> dict[str, float]:
    """The work that cannot be avoided, z never leaving the chip, and the microseconds it takes at the limits."""
    element = torch.empty((), dtype=dtype).element_size()
    x, w, y = layer.x.numel(), layer.w_dw.numel() + layer.w_pw.numel(), layer.x.numel() // layer.c_in * layer.c_out
    phases = [((x + w + y) * element, 2 * layer.x.numel() * (9 + layer.c_out))]
    if mode != "forward":
        phases.append(((2 * x + 2 * w + y) * element, 2 * phases[0][1]))
    seconds = sum(max(moved / limits[0], flops / limits[1]) for moved, flops in phases)
    return {"bytes": sum(p[0] for p in phases), "flops": sum(p[1] for p in phases), "floor_us": 1e6 * seconds}


def measure(
    layer: Layer, dtype: torch.dtype, mode: str, backends: list[str], compile_mode: Optional[str], args: Any
) -> tuple[dict[str, common.Times], list[str]]:
    """Times by name (PyTorch's ways, then backends), and notes on what could not be compiled."""
    grad = mode != "forward"
    by_layout = {
        "nchw": inputs(layer, dtype, torch.contiguous_format, grad),
        "channels_last": inputs(layer, dtype, torch.channels_last, grad),
    }
    calls = {name: step(two_convolutions, tensors) for name, tensors in by_layout.items()}
    notes = []
    if compile_mode is not None:
        torch._dynamo.reset()
        for name, tensors in by_layout.items():
            compiled = step(torch.compile(two_convolutions, dynamic=False, mode=compile_mode), tensors)
            try:
                compiled()
                calls[f"compiled {name}"] = compiled
            except Exception as error:  # whatever a compiler may raise, the other figures still stand
                notes.append(f"{layer.name} {mode}: torch.compile failed: {str(error).strip().splitlines()[0]}")
    for backend in backends:
        calls[f"xsep {backend}"] = step(one_op(backend), by_layout["channels_last"])
    if layer.x.is_cuda:
        return common.time_on_gpu(calls, args.rounds), notes
    return common.time_on_cpu(calls, args.rounds, args.seconds), notes


def ratios(times: dict[str, common.Times], backend: str) -> dict[str, Optional[float]]:
    """PyTorch's time over xsep's: against the better eager layout, each layout, and the better compiled one."""
    ours = times[f"xsep {backend}"]["us"]

    def against(*names: str) -> Optional[float]:
        known = [times[name]["us"] for name in names if name in times]
        return min(known) / ours if known else None

    return {
        "eager": against(*EAGER), "nchw": against("nchw"), "channels_last": against("channels_last"),
        "compiled": against(*COMPILED),
    }  # fmt: skip


def total(rows: list[dict[str, Any]]) -> dict[str, common.Times]:
    """Times of all 34 layers: each shape's weighted by how often it occurs, for what was timed on every shape."""
    names = [n for n in rows[0]["times"] if all(n in row["times"] for row in rows)]
    return {n: {"us": sum(row["count"] * row["times"][n]["us"] for row in rows)} for n in names}


def named(row: dict[str, Any], backend: str) -> str:
    """The backend's name; of auto, what it took as well."""
    if backend != "auto" or not row.get("auto_takes"):
        return backend
    ways = row["auto_takes"] if row["mode"] != "forward" else {"forward": row["auto_takes"]["forward"]}
    return f"auto: {' / '.join(dict.fromkeys(ways.values()))}"


def table(rows: list[dict[str, Any]], title: str, backends: list[str]) -> Any:
    """One line a shape and backend; losses in red."""
    out = screen.table(title)
    for heading in ("shape", "×", "backend"):
        out.add_column(heading, no_wrap=True)
    for heading in ("NCHW ms", "ch.last ms", "compiled ms", "xsep ms", "vs better", "vs NCHW", "vs ch.last",
                    "vs compiled", "limit"):  # fmt: skip
        out.add_column(heading, justify="right", no_wrap=True)

    def ms(times: dict[str, common.Times], *names: str) -> str:
        known = [times[name]["us"] for name in names if name in times]
        return f"{1e-3 * min(known):.3f}" if known else ""

    def ratio(value: Optional[float]) -> str:
        return "" if value is None else f"[{'green' if value >= 1 else 'red'}]{value:.2f}[/]"

    def line(first: list[str], times: dict[str, common.Times], backend: str, limit: str) -> None:
        fixed = [*first, ms(times, "nchw"), ms(times, "channels_last"), ms(times, *COMPILED)]
        if f"xsep {backend}" not in times:
            out.add_row(*fixed, "[red]wrong[/]")
            return
        r = ratios(times, backend)
        values = [ratio(r[k]) for k in ("eager", "nchw", "channels_last", "compiled")]
        out.add_row(*fixed, ms(times, f"xsep {backend}"), *values, limit)

    for row in rows:
        for backend in backends:
            us = row["times"].get(f"xsep {backend}", {"us": float("inf")})["us"]
            first, limit = [row["shape"], str(row["count"]), named(row, backend)], f"{row['floor_us'] / us:.0%}"
            line(first, row["times"], backend, limit)
    out.add_section()
    if len(rows) > 1:
        for backend in backends:
            line(["all layers", str(sum(row["count"] for row in rows)), backend], total(rows), backend, "")
    return out


def parse(argv: Optional[list[str]]) -> argparse.Namespace:
    parser = common.Parser("bench_sepconv", description=DESCRIPTION, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="batch 2, few repetitions, eager, torch.compile on one shape: a minute")
    add("--device", help="cpu, cuda or cuda:N; the default is the GPU where there is one")
    add("--dtype", nargs="+", choices=list(common.DTYPES), metavar="TYPE",
        help=f"{', '.join(common.DTYPES)}\n(default: float32, and without --quick bfloat16 too)")  # fmt: skip
    add("--batch", type=int, help="pictures (default: 64 on a GPU, 8 on a CPU, 2 with --quick)")
    add("--backend", nargs="+", choices=["auto", "aten", "cpu", "triton", "cuda"], metavar="NAME",
        help="auto, aten, cpu, triton, cuda (default: auto; on a GPU also cuda and\ntriton, where they can run)"
    )  # fmt: skip
    add("--mode", nargs="+", choices=MODES, default=list(MODES), metavar="MODE",
        help=f"{' and '.join(MODES)} (default: both)")  # fmt: skip
    add("--no-compile", action="store_true", help="leave torch.compile out")
    add("--image", metavar="PATH", help="another picture instead of scikit-learn's two photographs")
    add("--threads", type=int, help="CPU threads (default: PyTorch's own choice)")
    add("--rounds", type=int, help="repetitions of each measurement, at least (default: 10 on a CPU, 5 with --quick;"
        "\n100 on a GPU, 20 with --quick)")  # fmt: skip
    add("--shapes", type=int, nargs="+", metavar="I", help="only these of the ten, counted from 1")
    add("--seed", type=int, default=0, help="of the weights (default: 0)")
    add("--out", type=Path, help="directory for the results (default: benchmarks/results/<cpu or card>/)")
    args = parser.parse_args(argv)
    for name in ("batch", "threads", "rounds"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"argument --{name}: must be at least 1, got {getattr(args, name)}")
    if args.shapes is not None and not all(1 <= i <= 10 for i in args.shapes):
        parser.error(f"argument --shapes: there are shapes 1 to 10, got {' '.join(map(str, args.shapes))}")
    return args


def main(argv: Optional[list[str]] = None) -> int:
    args = parse(argv)
    device = common.choose_device(args.device)
    gpu = device.type == "cuda"
    args.batch = args.batch or (2 if args.quick else 64 if gpu else 8)
    args.rounds = args.rounds or (20 if gpu else 5) if args.quick else args.rounds or (100 if gpu else 10)
    args.seconds = 0.3 if args.quick else 2.0
    args.dtype = args.dtype or (["float32"] if args.quick else ["float32", "bfloat16"])
    args.backend = args.backend or common.default_backends(device)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True
    out = args.out or common.default_out(device)
    names, photographs = common.load_photographs(args.image)
    common.prepare_out(out)
    console = screen.console()

    layers = xception_layers(common.photograph_batch(photographs, args.batch, SIZE).to(device), args.seed)
    chosen = [layers[i - 1] for i in args.shapes] if args.shapes else layers
    # With --quick, the middle flow's shape stands for all in torch.compile: 25 of the 34 layers have it.
    most = max(chosen, key=lambda layer: layer.occurs)
    compiled_on = set() if args.no_compile else {most.name} if args.quick else {layer.name for layer in chosen}
    record: dict[str, Any] = {
        "benchmark": "sepconv", "batch": args.batch, "size": SIZE, "quick": args.quick, "photographs": names,
        "weights": f"random, seed {args.seed}", "device_type": device.type, "environment": common.environment(device),
        "figure": "median of CUDA events, L2 flushed" if gpu else "minimum of interleaved repetitions",
        "limits": {}, "failures": [], "notes": [], "results": [], "totals": [],
    }  # fmt: skip
    with screen.progress(console, (1 + len(args.mode)) * len(args.dtype) * len(chosen)) as (say, advance):
        for kind in args.dtype:
            dtype = common.DTYPES[kind]
            limits = common.measure_limits(device, dtype)
            record["limits"][kind] = {"bytes_per_second": limits[0], "flops_per_second": limits[1]}
            for layer in chosen:
                say(f"{kind} {layer.name}: correctness")
                # Where auto is not timed, no card need be checked for its sake.
                noting: Any = common.noting_backends() if "auto" in args.backend else contextlib.nullcontext({})
                with noting as auto_takes:
                    found = gate(layer, dtype, args.backend)
                passed = [backend for backend in args.backend if not found[backend]]
                record["failures"] += [f"{kind} {layer.name} {b}: {'; '.join(v)}" for b, v in found.items() if v]
                advance()
                for mode in args.mode:
                    say(f"{kind} {layer.name}: {mode}")
                    compile_mode = (COMPILE_MODE if gpu else "default") if layer.name in compiled_on else None
                    times, notes = measure(layer, dtype, mode, passed, compile_mode, args)
                    record["notes"] += notes
                    record["results"].append({
                        "dtype": kind, "mode": mode, "shape": layer.name, "count": layer.occurs,
                        "c_in": layer.c_in, "c_out": layer.c_out, "height_width": layer.size,
                        **floor(layer, dtype, mode, limits), "times": times, "auto_takes": auto_takes,
                        "ratios": {backend: ratios(times, backend) for backend in passed},
                    })  # fmt: skip
                    advance()
    if not gpu:
        record["notes"] += common.busy_note(t for row in record["results"] for t in row["times"].values())
    report(record, args, out, console)
    return 1 if record["failures"] else 0


def report(record: dict[str, Any], args: argparse.Namespace, out: Path, console: Any) -> None:
    """Tables, then the two files."""
    where = record["environment"]
    console.print(
        f"{where['device']}, {where['cores']} cores, {where['threads']} threads, PyTorch {where['torch']}, "
        f"batch {record['batch']} at {SIZE} px from {', '.join(record['photographs'])}; {record['figure']}\n"
    )
    for kind in args.dtype:
        for mode in args.mode:
            rows = [r for r in record["results"] if (r["dtype"], r["mode"]) == (kind, mode)]
            record["totals"].append({"dtype": kind, "mode": mode, "times": total(rows)})
            console.print(table(rows, f"{kind}, {mode}", args.backend))
    for note in record["notes"]:
        console.print(note, markup=False)
    for failure in record["failures"]:
        console.print(f"[red]wrong, so not timed:[/] {failure}")
    written = common.write_results(out, "sepconv", record, "chart")
    console.print(f"written: {written}", soft_wrap=True)


if __name__ == "__main__":
    raise SystemExit(common.run("bench_sepconv", main))
