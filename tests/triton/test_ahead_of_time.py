"""Every kernel compiled for sm_80, sm_90 and gfx942, none of which is here: within shared memory, nothing spilled.

The jobs run in processes of their own, without TRITON_INTERPRET, two at a time. A chosen part by default; every shipped
configuration under XSEP_NIGHTLY=1.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, astuple
from pathlib import Path

import pytest

from tests.conftest import NIGHTLY
from tests.triton.ahead_of_time import DEVICES, SHARED_LIMIT, TYPES, Job, Report, launch_of
from tests.triton.chain_launches import LAUNCHES
from xsep.backends import triton_plans as plans
from xsep.backends.triton import installed_version
from xsep.problem import ELU, GELU, GELU_TANH, HARDSWISH, IDENTITY, LEAKY_RELU, RELU, RELU6, SILU

ROOT = Path(__file__).resolve().parents[2]
WORKERS = 2
SMALL_STAGES = ("sum_partials", "merge_statistics", "finalize_statistics", "round_weights")
GENERAL = ("fprop_general", "dgrad_general", "wgrad_general")
#: Of the training chain: what multiplies, and what is elementwise or a second stage.
PRODUCTS = ("chain_wgrad", "chain_wgrad_apart", "chain_wgrad_skip", "chain_dgrad", "chain_fprop")
STREAMS = ("chain_apply", "chain_apply_backward", "chain_bn_dgrad", "chain_pool", "chain_gap_backward")
SMALL = ("chain_gap", "chain_gap_sums", "chain_statistics", "chain_finalize_backward", "chain_sum_groups")


def chosen_jobs() -> Iterator[Job]:
    """Every kernel and type on every card at its commonest configuration, and each other configuration somewhere."""
    for target in DEVICES:
        cuda = target != "gfx942"
        for dtype in TYPES:
            tf32 = cuda and dtype == "fp32"
            yield Job("fprop", target, dtype)
            yield Job("backward", target, dtype)
            yield Job("separable", target, dtype, tf32=tf32)
            yield Job("pointwise", target, dtype, k=1, tf32=tf32)
        for kernel in SMALL_STAGES:
            yield Job(kernel, target, "fp32")
        for kernel in GENERAL:
            yield Job(kernel, target, "bf16", k=9)
        yield Job("fprop", target, "bf16", activation=GELU, vectors=False)
        yield Job("separable", target, "bf16", outputs=256, statistics=True)
        yield Job("separable", target, "bf16", outputs=64, residual=True)
        yield Job("separable", target, "fp32")
        yield Job("pointwise", target, "bf16", k=1, statistics=True)
        yield Job("backward", target, "bf16", stride=2)
    yield Job("fprop", "sm_90", "bf16", k=3, stride=2)
    yield Job("fprop", "sm_90", "fp16", k=5)
    yield Job("fprop", "sm_90", "bf16", k=7)
    yield Job("fprop", "sm_80", "bf16", dilation=2)
    yield Job("backward", "sm_90", "bf16", k=5)
    yield Job("backward", "sm_90", "bf16", k=7)
    yield Job("backward", "sm_80", "bf16", dilation=2, vectors=False, activation=IDENTITY)
    for only in ("dx", "dw"):
        yield Job("backward", "sm_90", "bf16", only=only)
        yield Job("sum_partials", "sm_90", "fp32", only=only.replace("dx", "vectors"))
    yield Job("dgrad_general", "sm_90", "bf16", k=9, only="dx")
    yield Job("separable", "sm_90", "bf16", k=5, outputs=256)
    yield Job("separable", "sm_90", "bf16", k=7, stride=2)
    yield Job("separable", "sm_90", "bf16", tile=astuple(plans.FUSED_SMALL))
    yield Job("pointwise", "sm_90", "fp32", k=1)
    yield Job("merge_statistics", "sm_90", "fp32", vectors=False)
    yield Job("finalize_statistics", "sm_90", "fp32", vectors=False)


def chosen_chain_jobs() -> Iterator[Job]:
    """What multiplies, on every card at what its commonest layer has; the rest somewhere."""
    for target in DEVICES:
        for kernel in (*PRODUCTS, *(STREAMS if target != "sm_80" else ()), *(SMALL if target == "sm_90" else ())):
            yield Job(kernel, target, "bf16")
        yield Job("chain_backward", target, "bf16", operands=2, shortcut="half")
    for kernel in PRODUCTS:
        yield Job(kernel, "sm_90", "fp32", tf32=True)
    for kernel in ("chain_wgrad", "chain_dgrad"):
        yield Job(kernel, "sm_80", "fp32")
        yield Job(kernel, "gfx942", "fp16")
    for kernel in ("chain_apply_backward", "chain_pool"):
        yield Job(kernel, "sm_90", "fp32")
    for kernel, target in (("chain_wgrad", "sm_80"), ("chain_dgrad", "sm_90"), ("chain_dgrad", "gfx942")):
        yield Job(kernel, target, "bf16", pooled=True)
    yield Job("chain_wgrad_apart", "sm_80", "fp32", pooled=True, tf32=True)
    yield Job("chain_backward", "sm_80", "fp32", shortcut="full")
    yield Job("chain_backward", "sm_90", "fp16", stride=2)
    yield Job("chain_apply_backward", "sm_90", "bf16", operands=2)
    yield Job("chain_wgrad", "sm_90", "bf16", channels=728, outputs=728, size=19)
    yield Job("chain_wgrad", "sm_80", "bf16", k=5)
    for kernel in ("chain_wgrad_apart", "chain_dgrad", "chain_apply_backward"):
        yield Job(kernel, "sm_90", "bf16", n=1024)  # 2.8e9 elements: offsets of 64 bits


def all_chain_jobs() -> Iterator[Job]:
    """Every configuration of the chain for every card and type."""
    yield from chosen_chain_jobs()
    for target in DEVICES:
        for dtype in TYPES:
            for tf32 in (False, True) if dtype == "fp32" and target != "gfx942" else (False,):
                for kernel in PRODUCTS:
                    for activation in (IDENTITY, RELU, SILU, GELU, ELU):
                        yield Job(kernel, target, dtype, tf32=tf32, activation=activation)
                    yield Job(kernel, target, dtype, tf32=tf32, channels=64, outputs=128)
                    yield Job(kernel, target, dtype, tf32=tf32, n=1024)
                    yield Job(kernel, target, dtype, tf32=tf32, channels=1536, outputs=2048, size=10)
                for k in (3, 5, 7):
                    for stride in (1, 2):
                        yield Job("chain_wgrad", target, dtype, k, stride, tf32=tf32)
                for kernel in ("chain_wgrad", "chain_wgrad_apart", "chain_dgrad"):
                    yield Job(kernel, target, dtype, tf32=tf32, pooled=True)
            for kernel in (*STREAMS, *SMALL):
                yield Job(kernel, target, dtype)
                yield Job(kernel, target, dtype, vectors=False)
                yield Job(kernel, target, dtype, n=1024)
            yield Job("chain_bn_dgrad", target, dtype, pooled=True)
            for k, stride in ((3, 1), (3, 2), (5, 1), (5, 2), (7, 1), (7, 2)):
                for operands, shortcut in ((0, ""), (2, "half")):
                    for activation in (RELU, SILU, GELU_TANH) if k == 3 else (RELU,):
                        yield Job("chain_backward", target, dtype, k, stride, operands=operands, shortcut=shortcut,
                                  activation=activation)  # fmt: skip


def all_jobs() -> Iterator[Job]:
    """Every shipped configuration for every card and type."""
    yield from chosen_jobs()
    yield from all_chain_jobs()
    for target in DEVICES:
        hip = target == "gfx942"
        fused = plans.FUSED_TILES_HIP if hip else plans.FUSED_TILES
        for dtype in TYPES:
            tf32 = not hip and dtype == "fp32"
            for k in (3, 5, 7):
                for stride in (1, 2):
                    for activation in (IDENTITY, RELU, *plans.COSTLY, ELU):
                        yield Job("fprop", target, dtype, k, stride, activation=activation)
                    for activation, vectors in ((IDENTITY, False), (RELU, True), (SILU, True), (GELU, True)):
                        yield Job("backward", target, dtype, k, stride, activation=activation, vectors=vectors)
                    for outputs in fused:
                        for statistics in (False, True):
                            yield Job("separable", target, dtype, k, stride, outputs=outputs, tf32=tf32,
                                      statistics=statistics and stride == 1)  # fmt: skip
            for activation in (IDENTITY, RELU, RELU6, SILU, HARDSWISH, GELU, GELU_TANH, ELU, LEAKY_RELU):
                yield Job("fprop", target, dtype, activation=activation)
                yield Job("separable", target, dtype, activation=activation, residual=True, tf32=tf32)
            yield Job("separable", target, dtype, tile=astuple(plans.FUSED_SMALL), tf32=tf32)
            for kernel in GENERAL:
                yield Job(kernel, target, dtype, k=9)


CHOSEN = (*chosen_jobs(), *chosen_chain_jobs())
JOBS = list({job.id: job for job in (all_jobs() if NIGHTLY else CHOSEN)}.values())


def compile_all(jobs: list[Job], cache: Path) -> dict[str, Report]:
    """Deals the jobs out to WORKERS processes, the costliest first."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    cost = {"backward": 3, "chain_backward": 3, "separable": 2, "fprop": 1, "chain_wgrad": 1}
    ordered = sorted(jobs, key=lambda job: -cost.get(job.kernel, 0) * job.k**2)

    def work(index: int) -> list[Report]:
        mine = ordered[index::WORKERS]
        folder = cache / str(index)
        done = subprocess.run(
            [sys.executable, "-m", "tests.triton.ahead_of_time"], cwd=ROOT, text=True, capture_output=True,
            input="".join(json.dumps(asdict(job)) + "\n" for job in mine),
            env={**environment, "TRITON_CACHE_DIR": str(folder), "TRITON_ALWAYS_COMPILE": "1"},
        )  # fmt: skip
        reports = [Report(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]
        lost = f"the compiling process ended with {done.returncode}: {done.stderr[-2000:]}"
        return reports + [Report(job.id, error=lost) for job in mine[len(reports) :]]

    with ThreadPoolExecutor(WORKERS) as pool:
        return {report.id: report for part in pool.map(work, range(WORKERS)) for report in part}


@pytest.fixture(scope="module")
def reports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Report]:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    selected = {item.callspec.params.get("job") for item in request.session.items if hasattr(item, "callspec")}
    return compile_all([job for job in JOBS if job in selected], tmp_path_factory.mktemp("triton"))


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.id)
def test_compiles_within_the_card(job: Job, reports: dict[str, Report]) -> None:
    report = reports[job.id]
    assert not report.error, report.error
    # The chain's tiles are the same on cards of capability 8.6, 8.9 and 12.0, which have 99 KB.
    limit = min(SHARED_LIMIT[job.target], 99 << 10) if job.kernel in LAUNCHES else SHARED_LIMIT[job.target]
    assert report.shared <= limit, f"{report.shared} bytes of shared memory"
    assert report.loads + report.stores > 0
    exact = job.dtype == "fp32" and not job.tf32
    if job.kernel in ("separable", "pointwise", *PRODUCTS) and (job.target == "gfx942" or not exact):
        assert report.matrix > 0, "no instruction of the matrix units"
    if all_loads_are_wide(job):
        assert report.wide_loads == report.loads, f"{report.loads - report.wide_loads} loads of less than 16 bytes"
    if job.kernel in ("chain_apply", "chain_bn_dgrad", "chain_gap_backward") or (
        job.kernel == "fprop" and lane_bytes(job) == 16
    ):
        assert report.wide_stores == report.stores, f"{report.stores - report.wide_stores} narrow stores"
    if job.kernel == "fprop" and job.target != "gfx942":
        taken_once = loads_in_text(job)
        assert report.loads <= taken_once, f"{report.loads} loads where {taken_once} bring every row of x once"
    spilled = f"{report.spilled} spilled, {report.registers} registers"
    if report.spilled and installed_version() != tiles_chosen_with():
        pytest.xfail(f"{spilled} by another Triton than the tiles were chosen with")
    assert report.spilled == 0, spilled


def tiles_chosen_with() -> tuple[int, int]:
    """The version of Triton, major and minor, that every change is tested with."""
    found = re.search(r"^triton==(\d+)\.(\d+)", (ROOT / "requirements" / "triton.txt").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]), int(found[2])


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("kernel", ["fprop", "backward", "separable", "pointwise", *SMALL_STAGES, *GENERAL, *LAUNCHES])
def test_no_batch_and_no_map_is_compiled_anew(kernel: str) -> None:
    """Of a number that it may specialise Triton compiles a kernel for 1, for multiples of 16, and for the others."""
    k = 1 if kernel == "pointwise" else 9 if kernel in GENERAL else 3
    found = set()
    for n, size in ((1, 16), (1, 17), (15, 16), (16, 15), (16, 31), (17, 33), (64, 147)):
        made = launch_of(Job(kernel, "sm_90", "bf16", k=k, n=n, size=size, channels=13, outputs=17))
        specialised = [p.name for p in made.function().params if not p.do_not_specialize]
        numbers = [(name, made.args[name]) for name in specialised if isinstance(made.args.get(name), int)]
        found.add(tuple((name, value == 1, value % 16 == 0) for name, value in numbers))
    assert len(found) == 1, found


def test_all_taps_of_any_filter_are_on_the_first_axis() -> None:
    """The other axes of a grid end at 65,535."""
    made = launch_of(Job("wgrad_general", "sm_90", "bf16", k=301, size=16, n=1, channels=65))
    assert made.grid == (2 * 64 * 301 * 301,)


def all_loads_are_wide(job: Job) -> bool:
    """Whether no load of the job may be of less than 16 bytes: a tap of the pool is one byte."""
    if job.kernel in STREAMS:
        return not job.pooled
    if job.kernel == "chain_wgrad":
        return job.k == 3 and not job.pooled and job.dtype != "fp32"
    return job.kernel in ("fprop", "backward", "chain_backward") and lane_bytes(job) == 16


def lane_bytes(job: Job) -> int:
    """What a lane of a depthwise kernel loads at once."""
    constants = launch_of(job).constants
    return int(constants["COLS"] * constants["CHANNELS"] // 128 * TYPES[job.dtype].itemsize)


def loads_in_text(job: Job) -> int:
    """Loads in the program text of the forward when a step brings each row of x once: x, taps, and four vectors."""
    found = launch_of(job).constants
    step = min(found["TAP_ROWS"], job.k) * ((found["SIDE"] - 1) * found["TAP_COLS"] + job.k)
    # Before the loop, in it, and where it is unrolled in what is left of it.
    copies = 2 if found["UNROLL"] == 1 else found["UNROLL"] + 2
    vectors = 4 * max(found["COLS"] * found["CHANNELS"] // 128 * 4 // 16, 1)
    return int(copies * step + job.k**2 + (vectors if job.vectors else 0))
