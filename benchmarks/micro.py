"""What the microbenchmarks of the GPU backends share: Xception's layers, random inputs, and a dry run without a GPU."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor

from xsep import dispatch, testing
from xsep.backends.aten import ATEN
from xsep.backends.base import Backend
from xsep.problem import IDENTITY, Affine, Geometry, Problem, SeparableArgs, separable_problem

#: C_in, C_out, height and width, how often in the network (Chollet 2017, arXiv:1610.02357, figure 5).
LAYERS = [
    (64, 128, 147, 1), (128, 128, 147, 1), (128, 256, 74, 1), (256, 256, 74, 1), (256, 728, 37, 1), (728, 728, 37, 1),
    (728, 728, 19, 25), (728, 1024, 19, 1), (1024, 1536, 10, 1), (1536, 2048, 10, 1),
]  # fmt: skip
SAME = Geometry(1, 1, 1, 1, 1, 1, 1, 1)
PLAIN = Affine()
#: Of a separable backward's gradients, that of the pointwise weights alone.
DW_PW = tuple(name == "w_pw" for name in SeparableArgs._fields[:11])

#: Ways of making y, by name.
Ways = dict[str, Callable[[], Tensor]]


def parser(name: str, description: str) -> common.Parser:
    made = common.Parser(name, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("--dtype", choices=list(common.DTYPES), default="bfloat16")
    add("--batch", type=int, help="pictures (default: 64; 1 with --quick)")
    add("--rounds", type=int, help="timings of each call (default: 30; 2 with --quick)")
    add("--device", default="cuda", choices=["cuda", "cpu"],
        help="cpu: a dry run of this program, with the CPU's backend in the place of the GPU's")  # fmt: skip
    add("--quick", action="store_true", help="two small layers, few repetitions")
    add("--out", type=Path, help="folder for the JSON (default: benchmarks/results/<cpu or card>/)")
    return made


def upstream(a: SeparableArgs) -> Tensor:
    """The same dy [N, C_out, P, Q] for the same layer in every type."""
    n, _, h, w = a.x.shape
    source = torch.Generator(a.x.device).manual_seed(0)
    drawn = torch.randn(n, h, w, a.w_pw.shape[0], generator=source, device=a.x.device)
    return drawn.bfloat16().to(a.x.dtype).permute(0, 3, 1, 2)


def results(backend: Backend, a: SeparableArgs, dz: Tensor) -> dict[str, dict[str, Tensor]]:
    """What a backend makes of a layer's inputs, by kernel; what is a forward's is called y, as the rule has it."""
    found: dict[str, Any] = {
        "depthwise": {"y": backend.depthwise(a.x, a.w_dw, PLAIN, PLAIN, SAME)},
        "separable": {"y": backend.separable_forward(a)},
        "pointwise wgrad": {"dw_pw": backend.separable_backward(upstream(a), a, None, DW_PW)[2]},
    }
    for name, wanted in {"dgrad": (True, False), "wgrad": (False, True), "dgrad+wgrad": (True, True)}.items():
        made = backend.depthwise_backward_kernel(dz, a.x, a.w_dw, PLAIN, SAME, (*wanted, False, False))
        gradients = zip(("dx", "dw_dw"), made, wanted)
        found[name] = {what: t for what, t, is_wanted in gradients if is_wanted and t is not None}
    return found


def layer_problem(device: str, dtype: torch.dtype, batch: int, c_in: int, c_out: int, size: int, first: int) -> Problem:
    """One of the layers, channels_last, with an activation before it."""
    return Problem(
        "separable", device, dtype, True, batch, c_in, size, size, 1, 3, 3, c_out, SAME, (first, IDENTITY, IDENTITY)
    )  # fmt: skip


class Choices:
    """Of one run: device, type, layers, repetitions, folder."""

    def __init__(self, options: argparse.Namespace) -> None:
        if options.device == "cuda" and not torch.cuda.is_available():
            raise common.BenchmarkError("it needs a GPU, and PyTorch sees none here (--device cpu is a dry run)")
        self.device, self.gpu = torch.device(options.device), options.device == "cuda"
        self.kind, self.dtype = options.dtype, common.DTYPES[options.dtype]
        self.batch = options.batch or (1 if options.quick else 64)
        self.rounds = options.rounds or (2 if options.quick else 30)
        self.layers = [(16, 24, 19, 1), (24, 32, 10, 25)] if options.quick else LAYERS
        self.out = options.out or common.default_out(self.device)

    def time(self, calls: dict[str, Callable[[], Any]]) -> dict[str, common.Times]:
        return common.time_on_gpu(calls, self.rounds) if self.gpu else common.time_on_cpu(calls, self.rounds, 0.0)


class Session(Choices):
    """One run of a backend's kernels."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        super().__init__(options)
        self.name = name
        self.backend: Backend = dispatch.backend(name if self.gpu else "cpu")
        reasons = self.backend.not_supported_reasons(separable_problem(self.arguments(8, 8, 8)))
        if reasons:
            raise common.BenchmarkError("; ".join(reasons))
        common.prepare_out(self.out)

    def arguments(self, c_in: int, c_out: int, size: int) -> SeparableArgs:
        """Random inputs of one layer on the device, channels_last."""

        def draw(*shape: int, scale: float) -> Any:
            drawn = (torch.randn(*shape, device=self.device) * scale).to(self.dtype)
            return drawn.contiguous(memory_format=torch.channels_last)

        x = draw(self.batch, c_in, size, size, scale=1.0)
        w_dw, w_pw = draw(c_in, 1, 3, 3, scale=1 / 3), draw(c_out, c_in, 1, 1, scale=c_in**-0.5)
        no = None
        return SeparableArgs(
            x, w_dw, w_pw, no, no, no, no, no, no, no, no, list(SAME), [IDENTITY] * 3, [0.0] * 3
        )  # fmt: skip

    def gate(self, a: SeparableArgs, dz: Tensor, ways: Ways) -> list[str]:
        """What is wrong with what is timed, on the very tensors: sentences, none where all is well.

        ``ways`` of making y are each held to the rule, and the depthwise kernels, with either gradient and with both.
        """
        tensors: dict[str, Any] = {name: t.double() for name, t in a._asdict().items() if isinstance(t, Tensor)}
        wide = a._replace(**tensors)
        exact, own = (results(ATEN, *inputs) for inputs in ((wide, dz.double()), (a, dz)))
        with testing.poisoned_memory():
            ours = results(self.backend, a, dz)
            ours |= {name: {"y": way()} for name, way in ways.items()}
        found = []
        for name, got in ours.items():
            like = name if name in exact else "separable"
            kind = testing.held_as(self.dtype, self.device) if like == "separable" else self.dtype
            wrong = testing.violations(got, testing.Truth(exact[like]), own[like], kind)
            found += [f"{name}: {sentence}" for sentence in wrong]
        return found

    def run(
        self,
        measure: Callable[[SeparableArgs, Tensor], dict[str, Any]],
        line: Callable[[str, dict[str, Any]], str],
        ways: Callable[[SeparableArgs], Ways],
    ) -> int:
        """Every layer behind its gate; prints a line each, writes name.json, and gives the exit code."""
        layers: list[dict[str, Any]] = []
        failures: list[str] = []
        for c_in, c_out, size, count in self.layers:
            name = f"{c_in}->{c_out} @{size} x{count}"
            a = self.arguments(c_in, c_out, size)
            dz = torch.randn_like(a.x)
            try:
                wrong = self.gate(a, dz, ways(a))
            except RuntimeError as error:
                wrong = [str(error).strip().splitlines()[0]]
            if wrong:
                failures.append(f"{name}: {'; '.join(wrong)}")
                print(f"{name:>18s} WRONG: {'; '.join(wrong)}", flush=True)
                continue
            found = measure(a, dz)
            layers.append({"layer": name, "occurs": count, **found})
            print(line(name, found), flush=True)
        record = {
            "benchmark": self.name, "environment": common.environment(self.device), "dtype": self.kind,
            "batch": self.batch, "backend": self.backend.name, "failures": failures, "layers": layers,
        }  # fmt: skip
        with common.whole_files(self.out) as temporary:
            common.write_json(temporary(f"{self.name}.json"), record)
        return 1 if failures else 0


def head(session: Session) -> str:
    stand_in = "" if session.gpu else f", a dry run with the {session.backend.name} backend"
    return f"{common.device_name(session.device)}, {session.kind}, batch {session.batch}{stand_in}"
