"""Compiles launches for cards that are not here, and reads what the compilers report.

Not for a process in which TRITON_INTERPRET is set. ``python -m tests.triton.ahead_of_time`` reads jobs as JSON lines on
its standard input and answers each with one line; the tests start it so, a few at a time.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from dataclasses import asdict, dataclass, replace
from typing import Any, Optional

import torch
from torch import Tensor

from tests.triton.chain_launches import LAUNCHES, ChainLaunches
from xsep.backends import triton_launch as launch
from xsep.backends.triton_plans import (
    CUDA_RATES,
    HIP_RATES,
    DepthwiseTile,
    Device,
    SeparableTile,
    backward_tile,
    chain_tile,
    fprop_tile,
    pointwise_tile,
    separable_plan,
    share_of,
)
from xsep.problem import Affine, Geometry, Problem

#: Targets, and the shared memory a block may have on each (CUDA programming guide, table of technical specifications;
#: 64 KB of local data share on CDNA3).
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "gfx942": 64 << 10}
DEVICES = {
    "sm_80": Device("cuda", 108, 32, 40 << 20, *CUDA_RATES[8, 0]),
    "sm_90": Device("cuda", 132, 32, 60 << 20, *CUDA_RATES[9, 0]),
    "gfx942": Device("hip", 304, 64, 4 << 20, *HIP_RATES),
}
TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
POINTEES = {
    torch.float64: "fp64", torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8",
    **{kind: name for name, kind in TYPES.items()},
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One kernel at one configuration for one card. ``tile`` overrides the planner's choice."""

    kernel: str  # fprop, backward, separable, pointwise, one of LAUNCHES, or a general or second stage by its name
    target: str
    dtype: str
    k: int = 3
    stride: int = 1
    dilation: int = 1
    channels: int = 128
    outputs: int = 128
    size: int = 147
    n: int = 64
    activation: int = 1
    vectors: bool = True
    residual: bool = False
    statistics: bool = False
    tf32: bool = False
    tile: Optional[tuple[int, ...]] = None
    pooled: bool = False
    operands: int = 1
    shortcut: str = ""  # "full", "half"
    only: str = ""  # "dx", "dw", "vectors": the one gradient that a backward is asked for

    @property
    def id(self) -> str:
        flags = "".join(name for name in ("residual", "statistics", "tf32", "pooled") if getattr(self, name))
        tile = "" if self.tile is None else "-tile" + "x".join(map(str, self.tile))
        plain = "" if self.vectors else "plain"
        shape = f"k{self.k}s{self.stride}d{self.dilation}-c{self.channels}o{self.outputs}a{self.activation}{plain}"
        ends = f"{self.shortcut}{'' if self.operands == 1 else self.operands}{'' if self.n == 64 else f'n{self.n}'}"
        return f"{self.kernel}-{self.target}-{self.dtype}-{shape}{flags}{ends}{self.only}{tile}"


@dataclass(frozen=True)
class Report:
    """What came of a job; bytes and counts."""

    id: str
    shared: int = 0
    spilled: int = 0
    registers: int = 0
    wide_loads: int = 0  # 16-byte global loads
    loads: int = 0
    wide_stores: int = 0
    stores: int = 0
    matrix: int = 0  # instructions of the matrix units
    error: str = ""


def _image(n: int, c: int, h: int, w: int, dtype: torch.dtype) -> Tensor:
    return torch.empty((n, h, w, c), dtype=dtype, device="meta").permute(0, 3, 1, 2)


def launch_of(job: Job) -> launch.Launch:
    """The launch as the backend would make it, of meta tensors."""
    device, dtype = DEVICES[job.target], TYPES[job.dtype]
    if job.kernel in LAUNCHES:
        return LAUNCHES[job.kernel](ChainLaunches(job, device, dtype))
    n, c, h, k = job.n, job.channels, job.size, job.k
    pad = job.dilation * (k // 2)
    geometry = Geometry(job.stride, job.stride, pad, pad, pad, pad, job.dilation, job.dilation)
    p, q = geometry.output_size(h, h, k, k)
    problem = Problem("depthwise", "cuda", dtype, True, n, c, h, h, 1, k, k, c, geometry, (job.activation,) * 2)

    def vector(size: int) -> Optional[Tensor]:
        return torch.empty(size, device="meta") if job.vectors else None

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    x, z = _image(n, c, h, h, dtype), _image(n, c, p, q, dtype)
    weight = torch.empty((k * k, c), dtype=dtype, device="meta")
    act = Affine(vector(c), vector(c), job.activation, 0.5)
    if job.kernel == "fprop":
        tile = DepthwiseTile(*job.tile) if job.tile else fprop_tile(problem, device)
        assert tile is not None
        return launch.depthwise_fprop(x, weight, z, (k, k), act, act, geometry, tile)
    if job.kernel == "backward":
        tile = DepthwiseTile(*job.tile) if job.tile else backward_tile(problem, device)
        assert tile is not None
        split = launch.backward_split(x, geometry, tile)
        share = share_of(split.tiles, split.channel_blocks, device)
        dx, want_dw = (x if job.only != "dw" else None), job.only != "dx"
        want_affine = job.vectors and not job.only
        partials = floats(split.programs(share), k * k + 2, c) if want_dw or want_affine else None
        return launch.depthwise_backward(
            x, z, weight, dx, partials, (k, k), act, geometry, want_dw, want_affine, tile, split, share
        )
    if job.kernel == "fprop_general":
        return launch.fprop_general(x, weight, z, (k, k), act, act, geometry)
    if job.kernel == "dgrad_general":
        return launch.dgrad_general(x, z, weight, x, None if job.only else floats(9, 2, c), (k, k), act, geometry)
    if job.kernel == "wgrad_general":
        return launch.wgrad_general(x, z, floats(64, k * k + 2, c), (k, k), act, geometry)
    if job.kernel == "round_weights":
        return launch.round_weights(floats(job.outputs, c), floats(job.outputs, c))
    if job.kernel == "sum_partials":
        dw, sums = (weight if job.only != "vectors" else None), (floats(2, c) if job.only != "dw" else None)
        return launch.sum_partials(floats(64, k * k + 2, c), dw, sums)
    if job.kernel == "merge_statistics":
        counts = torch.empty(4096, dtype=torch.int32, device="meta")
        batches = torch.empty((), dtype=torch.int64, device="meta") if job.vectors else None
        return launch.merge_statistics(floats(4096, 3, c), counts, floats(32, 3, c).double(), batches)
    if job.kernel == "finalize_statistics":
        names = ("gamma", "beta", "running_mean", "running_var", "vec", "centres_out", "invstd_out")
        vectors: dict[str, Optional[Tensor]] = {name: floats(2, c) for name in names}
        vectors["batches"] = None if job.vectors else torch.empty((), dtype=torch.int64, device="meta")
        vectors["count_out"] = floats().double()
        return launch.finalize_statistics(floats(32, 3, c).double(), vectors, 0.1, 1e-5)
    assert job.kernel in ("separable", "pointwise")
    problem = problem._replace(op="separable", c_out=job.outputs)
    # Where there are statistics it is a layer of the chain, the first of a block.
    chosen = separable_plan(problem, device, job.tf32).tile
    if job.statistics:
        chosen = chain_tile(problem, device, job.tf32, addend=job.kernel == "separable")
    if job.kernel == "pointwise":
        chosen = pointwise_tile(dtype, device, job.tf32)
    y, o = _image(n, job.outputs, p, q, dtype), vector(job.outputs)
    sep = SeparableTile(*job.tile) if job.tile else chosen
    tensors = launch.SeparableTensors(
        x, torch.empty((job.outputs, c), dtype=dtype, device="meta"), y,
        weight if job.kernel == "separable" else None, o, y if job.residual else None,
    )  # fmt: skip
    if job.statistics:
        tiles = launch.pixel_tiles(y, geometry, sep)
        tensors = replace(
            tensors, partials=floats(tiles, 3, job.outputs),
            counts=torch.empty(tiles, dtype=torch.int32, device="meta"),
        )  # fmt: skip
        if job.kernel == "separable":
            tensors = replace(tensors, addend=x, x_pre=x)
        tensors = replace(tensors, bias=None)
        # The training chain: BatchNorm and ReLU of the layer before on load, nothing but statistics on store.
        return launch.separable_fprop(tensors, (k, k), act, Affine(), Affine(), geometry, sep, job.tf32)
    after = Affine(o, o, job.activation, 0.5)
    middle = act if job.kernel == "separable" else Affine()
    return launch.separable_fprop(tensors, (k, k), act, middle, after, geometry, sep, job.tf32)


def source_of(made: launch.Launch) -> Any:
    """What Triton's just-in-time compiler would compile for the launch; meta tensors are aligned to 16 bytes."""
    from triton.compiler import ASTSource

    function = made.function()
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(function.arg_names):
        value = made.args.get(name) if name in made.args else made.constants[name]
        if name in made.constants or value is None:
            signature[name], constants[(index,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = "*" + POINTEES[value.dtype]
            if value.data_ptr() % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
    return ASTSource(function, signature, constants, attributes)


def compile_job(job: Job) -> Report:
    import triton
    from triton.backends.compiler import GPUTarget

    made = launch_of(job)
    hip = job.target == "gfx942"
    target = GPUTarget("hip", "gfx942", 64) if hip else GPUTarget("cuda", int(job.target[3:]), 32)
    triton.knobs.nvidia.dump_ptxas_log = True
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(source_of(made), target=target, options=made.options)
    shared = compiled.metadata.shared
    if hip:
        text = compiled.asm["amdgcn"]
        figures = {key: int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in ("vgpr_spill_count", "vgpr_count")}  # type: ignore[index]
        return Report(
            job.id, shared, figures["vgpr_spill_count"], figures["vgpr_count"],
            len(re.findall(r"(?:global|buffer)_load_dwordx4", text)), len(re.findall(r"(?:global|buffer)_load", text)),
            len(re.findall(r"(?:global|buffer)_store_dwordx4", text)),
            len(re.findall(r"(?:global|buffer)_store", text)), len(re.findall(r"v_mfma", text)),
        )  # fmt: skip
    text, report = compiled.asm["ptx"], log.getvalue()
    spilled = sum(int(v) for v in re.findall(r"(\d+) bytes spill (?:stores|loads)", report))
    registers = re.search(r"Used (\d+) registers", report)
    assert registers is not None, f"no ptxas report for {job.id}: {report}"
    return Report(
        job.id, shared, spilled, int(registers[1]), len(re.findall(r"ld\.global\S*\.v4\.b32", text)),
        len(re.findall(r"ld\.global", text)), len(re.findall(r"st\.global\S*\.v4\.b32", text)),
        len(re.findall(r"st\.global", text)), len(re.findall(r"wgmma\.mma_async|mma\.sync", text)),
    )  # fmt: skip


def serve() -> None:
    for line in sys.stdin:
        fields = json.loads(line)
        fields["tile"] = tuple(fields["tile"]) if fields["tile"] else None
        job = Job(**fields)
        try:
            report = compile_job(job)
        except Exception as error:
            report = Report(job.id, error=f"{type(error).__name__}: {error}"[:2000])
        print(json.dumps(asdict(report)), flush=True)


if __name__ == "__main__":
    serve()
