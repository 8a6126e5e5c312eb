"""The CPU kernels at every instruction set that this chip has: results, determinism, loading.

A process loads one level, so each level's cases run in a process of their own: this file, run as a module.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from xsep import extension, testing
from xsep.testing import NAMES, VECTORS, Case

ROOT = Path(__file__).parent.parent
#: What oneDNN, whose GEMMs the yardstick and AMX's path use, may use of the chip at each level.
ONEDNN = {"default": "SSE41", "avx2": "AVX2", "avx512": "DEFAULT"}
TYPES = (torch.float32, torch.bfloat16, torch.float16)


def _matrix() -> list[Case]:
    cases: list[Case] = []

    def add(**fields: Any) -> None:
        """In a type, a layout and with activations that change from case to case."""
        i = len(cases)
        fields.setdefault("dtype", TYPES[i % 3])
        fields.setdefault("layout", ("channels_last", "contiguous", "sliced")[i // 3 % 3])
        fields.setdefault("activations", (NAMES[i % 3], NAMES[i % 9], NAMES[i // 2 % 9]))
        cases.append(Case(**fields, seed=i))

    for c_in in (1, 3, 7, 13, 33, 65):
        for dtype in TYPES:
            add(c_in=c_in, c_out=67 - c_in, dtype=dtype, n=1, h=13, w=19)
    for size in ((1, 1), (3, 3), (5, 5), (7, 7), (3, 5), (5, 3), (2, 4)):
        pad = (size[1] // 2, size[1] // 2, size[0] // 2, size[0] // 2)
        for stride in ((1, 1), (2, 2), (2, 1), (3, 3)):
            add(c_in=17, c_out=19, filter=size, stride=stride, padding=pad, h=11, w=21, vectors=("scale_p", "shift_p"))
        add(c_in=18, c_out=3, filter=size, dilation=(2, 3), padding=(3, 2, 0, 4), h=13, w=17, bias=True)
    for padding in ((0, 0, 0, 0), (0, 1, 2, 3), (4, 5, 6, 7)):
        add(c_in=16, c_out=64, padding=padding, h=5, w=8)
        add(c_in=19, c_out=129, padding=padding, h=5, w=8, op="depthwise")
    for dtype in TYPES:  # one channel, which lies the same in both layouts
        for layout in ("contiguous", "channels_last"):
            add(c_in=1, dtype=dtype, layout=layout, op="depthwise", n=3, h=13, w=19, vectors=VECTORS, bias=True)
    for multiplier in (2, 3):
        for dtype in TYPES:
            add(c_in=17, multiplier=multiplier, c_out=65, dtype=dtype, vectors=VECTORS, bias=True)
            add(c_in=5, multiplier=multiplier, dtype=dtype, op="depthwise", vectors=VECTORS, stride=(2, 2))
    for name in NAMES:
        for dtype in TYPES:
            add(c_in=9, c_out=33, activations=(name,) * 3, vectors=VECTORS, residual=True, bias=True, dtype=dtype, w=9)
    # BFloat16 without a prologue: what is multiplied in pairs of rows, 32 channels a step or, the last, 17 and more.
    for size in ((3, 3), (5, 5), (2, 3), (4, 5), (1, 3)):
        for stride, c_in in (((1, 1), 33), ((2, 2), 80), ((1, 2), 64), ((1, 1), 63), ((2, 2), 17), ((1, 1), 24)):
            for op in ("separable", "depthwise"):
                add(op=op, c_in=c_in, c_out=34, filter=size, stride=stride, padding=(3, 1, 0, 2), h=9, w=21,
                    dtype=torch.bfloat16, activations=(None, "relu", "silu"), vectors=VECTORS[2:])  # fmt: skip
    for c_in in (48, 24):
        add(c_in=c_in, multiplier=2, c_out=70, dtype=torch.bfloat16, activations=(None, None, None), dilation=(2, 1))
    # Channels so few that tiles are long.
    for dtype in TYPES:
        add(n=2, c_in=6, c_out=40, h=41, w=50, dtype=dtype)
    # More panels than threads, few pixels and many: all of z first, and tile by tile.
    for dtype in TYPES:
        add(n=1, c_in=40, c_out=330, h=6, w=7, dtype=dtype, bias=True)
        add(n=1, c_in=24, c_out=130, h=40, w=45, dtype=dtype, bias=True)
        add(n=1, c_in=9, multiplier=3, c_out=200, h=20, w=9, dtype=dtype, residual=True)
    # Nothing between the convolutions or behind them but a bias: the whole backward is one operator.
    for dtype in (torch.float32, torch.bfloat16):
        for c_in, c_out, prologue in ((16, 34, None), (33, 64, "relu"), (64, 130, "silu"), (80, 20, "relu6")):
            for layout in ("channels_last", "contiguous"):
                add(c_in=c_in, c_out=c_out, dtype=dtype, layout=layout, h=9, w=13, bias=True,
                    activations=(prologue, None, None), vectors=VECTORS[:2] if prologue else ())  # fmt: skip
    # NCHW, turned round row by row: short rows together, long ones alone, filters that skip rows and that reach far.
    for dtype in TYPES:
        for vectors in ((), VECTORS[:2]):
            for activation in ("relu", None if vectors else "relu6"):
                some: dict[str, Any] = {
                    "dtype": dtype, "layout": "contiguous", "activations": (activation, None, None), "vectors": vectors
                }  # fmt: skip
                add(n=4, c_in=35, c_out=20, h=210, w=9, **some)
                add(n=2, c_in=16, c_out=33, h=120, w=70, filter=(5, 5), padding=(0, 3, 2, 1), stride=(2, 2), **some)
                add(n=3, c_in=7, multiplier=2, c_out=5, h=640, w=20, filter=(2, 3), stride=(3, 1), **some)
                add(op="depthwise", n=2, c_in=65, h=64, w=33, filter=(3, 3), dilation=(3, 2), padding=(4,) * 4, **some)
    for dtype in TYPES:
        add(n=2, c_in=48, c_out=64, h=70, w=67, dtype=dtype, layout="contiguous", activations=(None, None, None))
    # NCHW whose gradients are turned round in the backward's tiles, which end in one picture and begin in the last; of
    # few channels, as a whole. What stands behind the products is differentiated in NCHW, or in NHWC where z is made.
    for dtype in TYPES:
        for c_in, size, stride in ((33, 3, (1, 1)), (48, 5, (2, 2)), (70, 3, (2, 1)), (10, 3, (1, 1))):
            pad = (size // 2,) * 4
            for epilogue in (None, "relu", "silu"):
                add(n=3, c_in=c_in, c_out=36, h=17, w=19, filter=(size, size), padding=pad, stride=stride, dtype=dtype,
                    layout="contiguous", activations=(None, None, epilogue), residual=epilogue == "relu")  # fmt: skip
            add(op="depthwise", n=3, c_in=c_in, h=17, w=19, filter=(size, size), padding=pad, stride=stride,
                dtype=dtype, layout="contiguous", activations=("relu", None, ("relu", "silu")[c_in % 2]),
                vectors=("scale_e",))  # fmt: skip
        add(n=3, c_in=40, multiplier=2, c_out=36, h=11, w=9, dtype=dtype, layout="contiguous", bias=True)
        # So many channels that a thread's run of outputs is several tiles of planes.
        add(op="depthwise", n=2, c_in=300, h=40, w=33, dtype=dtype, layout="contiguous", vectors=("scale_e",))
        add(op="depthwise", n=1, c_in=150, multiplier=2, h=50, w=37, dtype=dtype, layout="contiguous")
    # NCHW plane by plane: each filter that has a kernel and others, several groups of rows, rows that end anywhere in a
    # vector, and columns of two and more phases of a stride.
    for dtype in TYPES:
        for h, w, size, stride in ((70, 90, 3, 1), (9, 49, 5, 1), (31, 16, 7, 1), (33, 35, 3, 2), (21, 65, 5, 2)):
            pad = (size // 2, 1, size - 1, 0)
            add(op="depthwise", n=2, c_in=(3, 6)[size % 3 == 0], h=h, w=w, filter=(size, size), stride=(stride, stride),
                padding=pad, dtype=dtype, layout="contiguous", vectors=VECTORS, bias=True)  # fmt: skip
        add(op="depthwise", c_in=20, multiplier=3, h=19, w=37, filter=(7, 7), stride=(2, 2), padding=(3,) * 4,
            dtype=dtype, layout="contiguous")  # fmt: skip
        add(op="depthwise", n=1, c_in=19, h=11, w=70, dtype=dtype, layout="contiguous", vectors=VECTORS[:2])
        add(op="depthwise", c_in=7, h=18, w=40, filter=(3, 4), stride=(2, 3), dilation=(1, 2), padding=(3, 4, 1, 0),
            dtype=dtype, layout="contiguous")  # fmt: skip
    # The fused forward of NCHW plane by plane: rows of pixels and of channels that end anywhere in a block, several
    # tasks to a picture, more channels than one sum is long, and all that can stand around the products.
    for dtype in TYPES:
        for c_in, multiplier, h, w, size, stride, c_out in (
            (1, 1, 9, 21, 3, 1, 5), (3, 1, 70, 61, 3, 2, 32), (5, 2, 33, 40, 5, 1, 13), (7, 1, 21, 150, 7, 2, 18),
            (12, 1, 37, 50, 3, 1, 24), (40, 1, 26, 49, 3, 1, 7), (20, 3, 18, 31, 3, 2, 66), (64, 1, 14, 60, 3, 1, 130),
            (100, 3, 9, 17, 3, 1, 20), (6, 1, 1, 1, 1, 1, 6),
        ):  # fmt: skip
            some = {"n": 2, "c_in": c_in, "multiplier": multiplier, "h": h, "w": w, "filter": (size, size),
                    "stride": (stride, stride), "padding": (size // 2, size // 2, size - 1, 0), "c_out": c_out,
                    "dtype": dtype, "layout": "contiguous"}  # fmt: skip
            add(activations=(None, None, None), bias=True, **some)
            add(activations=(None, "relu", "relu"), vectors=VECTORS[2:], **some)
            add(activations=("relu", "silu", "relu6"), vectors=VECTORS, residual=True, bias=True, **some)
    # Outputs a dilation apart are rows by themselves: padding that its steps do not divide, less of it than the filter
    # reaches and more, rows that tiles begin anywhere in; and a dilation more than half as long as a row.
    for dtype in TYPES:
        for size, d, w, pad in (
            (3, 2, 21, (1, 2, 2, 0)), (3, 3, 40, (0, 0, 3, 3)), (3, 13, 21, (13, 13, 1, 0)), (5, 2, 33, (7, 3, 0, 4)),
            (5, 3, 26, (11, 17, 1, 1)), (7, 2, 45, (6, 6, 6, 6)),
        ):  # fmt: skip
            some = {"filter": (3, size), "dilation": (1 + size // 4, d), "padding": pad, "dtype": dtype, "h": 9, "w": w}
            add(op="depthwise", c_in=200, **some)
            add(c_in=(70, 96)[d % 2], multiplier=1 + w % 2, c_out=20, **some)
    # Pixels a page apart, or half a page, whose rows are brought with them further apart.
    for dtype in TYPES:
        for c_in, w, size, d in ((1024, 9, 3, 1), (512, 13, 5, 1), (1024, 11, 3, 2), (2048, 8, 3, 1)):
            some = {"n": 2, "h": 6, "w": w, "filter": (size, size), "dilation": (1, d), "dtype": dtype,
                    "layout": "channels_last", "activations": (None, None, None)}  # fmt: skip
            add(op="depthwise", c_in=c_in, padding=(d, 1, 1, 2), **some)
        add(c_in=1024, c_out=7, padding=(1, 1, 2, 1), **(some | {"dilation": (1, 1)}))
    # So many pixels that the pointwise weights' gradient is added up of several groups' sums.
    for dtype in (torch.float32, torch.bfloat16):
        for c_in in (64, 57):
            add(n=3, c_in=c_in, c_out=128, h=70, w=67, dtype=dtype, activations=(None, None, None))
    # So many channels that the products of the weights' gradient read dv in blocks, of several tiles of pixels, and z
    # in padded rows; the input's gradient by panels and by tiles.
    for dtype in TYPES:
        for c_in, c_out, layout in ((150, 131, "channels_last"), (256, 70, "channels_last"), (256, 70, "contiguous")):
            add(n=1, c_in=c_in, c_out=c_out, h=17, w=15, dtype=dtype, layout=layout, activations=(None, None, None))
    # Every second column: the first one is a tap's own or lies between two, and rows end anywhere in a block.
    for size in (3, 5, 7):
        for left in (0, 1, 2, 3):
            for w in (1, 2, 7, 8, 9, 19, 33):
                if w + left + 2 < size:
                    continue
                add(op="depthwise", n=1, c_in=(33, 16, 50)[w % 3], h=(4, 9)[left % 2], w=w, filter=(3, size),
                    stride=((2, 2), (1, 2), (3, 2))[w % 3], padding=(left, 2, 1, left),
                    multiplier=1 + (left == 2))  # fmt: skip
    for dtype in TYPES:
        add(n=0, c_in=9, c_out=5, dtype=dtype, vectors=VECTORS, residual=True)
        add(n=3, c_in=130, c_out=131, h=5, w=5, dtype=dtype, wide_vectors=True, vectors=VECTORS)
    return cases


MATRIX = _matrix()


def _run_matrix(dtypes: tuple[torch.dtype, ...] = TYPES) -> dict[str, str]:
    """What is wrong with each case of these types, by its id; nothing where all is well."""
    wrong = {}
    for case in (c for c in MATRIX if c.dtype in dtypes):
        try:
            testing.check(case, "cpu")
        except Exception as error:  # reported by the test of that case
            wrong[case.id] = f"{type(error).__name__}: {error}"
    return wrong


def _run_bits() -> dict[str, str]:
    """Digests of the backward's results, which must not depend on the number of threads nor on the run."""
    import hashlib

    from xsep.backends.cpu import CPU
    from xsep.problem import RELU, SILU, Affine, Geometry

    assert extension.load_cpu().reason is None
    digests = {}
    g = torch.Generator().manual_seed(3)
    for c, multiplier, size, stride, h, dtype, activation in (
        (65, 1, 3, 1, 19, torch.float32, RELU),
        (728, 1, 3, 1, 19, torch.bfloat16, SILU),
        (13, 2, 5, 2, 31, torch.float32, SILU),
        (3, 1, 7, 1, 67, torch.float16, RELU),
    ):
        geometry = Geometry(stride, stride, *(size // 2,) * 4, 1, 1)
        x = torch.randn(2, c, h, h, generator=g).to(dtype).contiguous(memory_format=torch.channels_last)
        w = torch.randn(c * multiplier, 1, size, size, generator=g).to(dtype)
        prologue = Affine(torch.randn(c, generator=g), torch.randn(c, generator=g), activation)
        z = CPU.depthwise(x, w, prologue, Affine(), geometry)
        du = torch.randn(2, 34, *z.shape[2:], generator=g).to(dtype).contiguous(memory_format=torch.channels_last)
        for run in range(2):
            gradients = CPU.depthwise_backward_kernel(z, x, w, prologue, geometry, (True,) * 4)._asdict()
            if multiplier == 1:
                gradients["dw_pw"] = torch.ops.xsep.cpu_separable_wgrad(
                    du, x, w, prologue.scale, prologue.shift, None, None, geometry, (activation, 0), (0.0, 0.0)
                )
            for name, value in gradients.items():
                data = value.float().contiguous().numpy().tobytes()
                digests[f"{name} of {c} channels, filter {size}, run {run}"] = hashlib.sha256(data).hexdigest()
    return digests


def _run_level() -> dict[str, str]:
    return {"level": extension.load_cpu().level, "reason": extension.load_cpu().reason or ""}


def _run_loading() -> dict[str, str]:
    try:
        return _run_level()
    except ValueError as error:
        return {"error": str(error)}


MODES: dict[str, Callable[[], dict[str, str]]] = {
    "matrix": _run_matrix, "bfloat16": lambda: _run_matrix((torch.bfloat16,)), "bits": _run_bits,
    "loading": _run_loading,
}  # fmt: skip


@cache
def _in_a_process(mode: str, level: str, threads: int = 2, bfloat16: str = "") -> dict[str, str]:
    env = {**os.environ, "XSEP_CPU_ISA": level, "XSEP_CPU_BFLOAT16": bfloat16}
    env["ONEDNN_MAX_CPU_ISA"] = ONEDNN.get(level, "DEFAULT")
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_cpu_kernels", mode, str(threads)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return result


def _levels_here() -> list[str]:
    module = extension.binding()
    return [] if module is None else module.cpu_levels_here()


def _levels() -> list[Any]:
    return [
        pytest.param(
            level, marks=pytest.mark.skipif(level not in _levels_here(), reason=f"this chip or build has no {level}")
        )
        for level in extension.CPU_LEVELS
    ]


@pytest.mark.parametrize("case", MATRIX, ids=lambda c: c.id)
@pytest.mark.parametrize("level", _levels())
def test_problem_at_each_level(level: str, case: Case) -> None:
    wrong = _in_a_process("matrix", level)
    assert case.id not in wrong, wrong[case.id]


def test_case_ids_are_unique() -> None:
    """Findings come back by id: two cases of one id would hide each other."""
    assert len({case.id for case in MATRIX}) == len(MATRIX)


@pytest.mark.parametrize("how", ["none", "tiles"])
def test_bfloat16_multiplied_in_the_ways_of_other_chips(how: str) -> None:
    """As float32, where a chip has no AVX512_BF16, and by oneDNN's tiles, which are AMX's way."""
    if "avx512" not in _levels_here():
        pytest.skip("this chip has no AVX-512")
    wrong = _in_a_process("bfloat16", "avx512", bfloat16=how)  # no other type's products ask which
    assert not wrong


@pytest.mark.parametrize("level", _levels())
def test_backward_is_the_same_bit_for_bit_on_any_number_of_threads(level: str) -> None:
    one, two = (_in_a_process("bits", level, threads) for threads in (1, 2))
    assert one == two
    for name, digest in one.items():
        assert digest == one[name.replace("run 1", "run 0")], name


@pytest.mark.parametrize("level", _levels())
def test_the_level_asked_for_is_loaded(level: str) -> None:
    assert _in_a_process("loading", level) == {"level": level, "reason": ""}


def test_the_best_level_is_loaded_where_none_is_asked_for() -> None:
    assert _in_a_process("loading", "")["level"] == _levels_here()[-1]


def test_an_unknown_level_is_one_sentence() -> None:
    assert _in_a_process("loading", "sse9") == {
        "error": "XSEP_CPU_ISA must be one of default, avx2, avx512, got 'sse9'"
    }


def test_a_level_that_the_chip_lacks_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    class OldChip:
        cpu_levels_built = "default,avx2,avx512"

        @staticmethod
        def cpu_levels_here() -> list[str]:
            return ["default"]

    monkeypatch.setattr(extension, "_binding", lambda: (OldChip, None))
    monkeypatch.setenv("XSEP_CPU_ISA", "avx512")
    with pytest.raises(RuntimeError, match=r"^XSEP_CPU_ISA=avx512, but this chip only has default$"):
        extension.cpu_level()
    monkeypatch.delenv("XSEP_CPU_ISA")
    assert extension.cpu_level() == "default"


def test_without_the_extension_the_reason_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "_binding", lambda: (None, "xsep's compiled extension is missing: build it"))
    monkeypatch.delenv("XSEP_CPU_ISA", raising=False)
    extension.load_cpu.cache_clear()
    try:
        assert extension.load_cpu().reason == "xsep's compiled extension is missing: build it"
    finally:
        extension.load_cpu.cache_clear()


def planner() -> Any:
    module = extension.binding()
    assert module is not None, "the extension is not built"
    return module


def sizes(c: Case) -> tuple[Any, ...]:
    """What every plan of a case depends on."""
    return (c.n, c.c_in, c.h, c.w), c.filter, c.multiplier, (*c.stride, *c.padding, *c.dilation)


def test_the_matrix_has_problems_of_both_ways_to_multiply() -> None:
    module = planner()
    plans = [
        module.plan_cpu_separable(
            *sizes(c),
            c_out=c.c_out, threads=2, z_bytes=c.dtype.itemsize,
        )
        for c in MATRIX if c.op == "separable" and c.n and c.c_out > 128
    ]  # fmt: skip
    assert {True, False} == {p.z_first for p in plans if p.tiles > 1}


@pytest.mark.parametrize("nchw", [True, False], ids=["NCHW", "a prologue"])
def test_the_matrix_has_inputs_brought_row_by_row_and_beforehand(nchw: bool) -> None:
    module = planner()
    by_rows = [
        module.cpu_brings_rows(
            *sizes(c),
            nchw=nchw, threads=2, visits=1, element_bytes=c.dtype.itemsize,
        )
        for c in MATRIX
        if c.n and (c.layout == "contiguous" if nchw else c.layout != "contiguous" and c.activations[0])
    ]  # fmt: skip
    assert min(by_rows.count(True), by_rows.count(False)) > 10


@pytest.mark.parametrize("lanes", [8, 16])
def test_the_matrix_has_fused_forwards_plane_by_plane(lanes: int) -> None:
    module = planner()
    cases = [c for c in MATRIX if c.op == "separable" and c.n and c.layout == "contiguous"]
    by_planes = [
        module.cpu_separates_planes(
            *sizes(c), nchw=True, pairs=False, threads=2, lanes=lanes
        )
        for c in cases
    ]  # fmt: skip
    assert min(by_planes.count(True), by_planes.count(False)) > 90
    taken = [c for c, planes in zip(cases, by_planes, strict=True) if planes]
    assert any(c.c_in * c.multiplier > 256 for c in taken) and any(c.multiplier == 1 and c.c_in > 16 for c in taken)
    tasks = [module.plan_cpu_separable_planes(*sizes(c), threads=1).tasks // c.n for c in taken]
    assert 1 in tasks and max(tasks) > 3


@pytest.mark.parametrize("lanes", [8, 16])
def test_the_matrix_has_inputs_whose_pixels_are_moved_apart(lanes: int) -> None:
    module = planner()
    moved = [
        c.dtype
        for c in MATRIX
        if c.n and c.layout == "channels_last" and c.activations[0] is None
        if module.cpu_spreads_pixels(
            *sizes(c), threads=2, visits=1, lanes=lanes, element_bytes=c.dtype.itemsize,
        )
    ]  # fmt: skip
    assert set(moved) == (set(TYPES) if lanes == 8 else {torch.float32})
    assert moved.count(torch.float32) >= 4


def test_the_matrix_has_gradients_of_nchw_turned_round_in_tiles_and_as_a_whole() -> None:
    module = planner()
    in_units = [
        module.cpu_turns_in_units(
            *sizes(c)
        )
        for c in MATRIX if c.n and c.layout == "contiguous"
    ]  # fmt: skip
    assert min(in_units.count(True), in_units.count(False)) > 10


def test_the_matrix_has_planes_stored_in_several_tiles_of_a_run() -> None:
    module = planner()
    plans = [
        module.plan_cpu_depthwise(
            *sizes(c), threads=2
        )
        for c in MATRIX if c.n and c.layout == "contiguous" and c.op == "depthwise"
    ]  # fmt: skip
    assert {True, False} == {p.plane_pixels < p.run_pixels for p in plans}


def test_the_matrix_has_weight_gradients_of_one_group_of_pixels_and_of_several() -> None:
    module = planner()
    groups = {
        module.plan_cpu_wgrad(
            *sizes(c),
            c_out=c.c_out, threads=2, z_bytes=c.dtype.itemsize,
        ).pixel_groups
        for c in MATRIX if c.op == "separable" and c.n and c.multiplier == 1
    }  # fmt: skip
    assert 1 in groups and max(groups) > 2


@pytest.mark.parametrize("shape", [(2, 728, 364, 7), (1, 5, 7, 147), (2, 64, 129, 12), (3, 17, 2, 3), (1, 130, 66, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pointwise_dgrad_is_the_product_by_the_weights(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    from xsep.backends.cpu import CPU

    assert extension.load_cpu().reason is None
    n, c_out, c_mid, size = shape
    dv, w = torch.randn(n, c_out, size, size).to(dtype), (torch.randn(c_out, c_mid, 1, 1) / c_out**0.5).to(dtype)
    truth = torch.einsum("nopq,oc->ncpq", dv.double(), w.double()[..., 0, 0])
    plain = torch.einsum("nopq,oc->ncpq", dv, w[..., 0, 0])
    error, theirs = ((t.double() - truth).abs().max().item() for t in (CPU.pointwise_dgrad(dv, w), plain))
    assert error <= 2 * theirs + 2 * torch.finfo(dtype).eps * truth.abs().max().item()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_what_is_not_finite_reaches_its_window_and_nothing_else(bad: float, dtype: torch.dtype) -> None:
    import xsep

    x = torch.randn(1, 5, 7, 9).to(dtype).contiguous(memory_format=torch.channels_last)
    x[0, 2, 3, 4] = bad
    w_dw, w_pw = torch.rand(5, 1, 3, 3).to(dtype) + 0.5, torch.rand(6, 5, 1, 1).to(dtype) + 0.5
    for y in (
        xsep.depthwise_conv2d(x, w_dw, padding=1, backend="cpu")[:, 2],
        xsep.separable_conv2d(x, w_dw, w_pw, padding=1, backend="cpu").amax(1),
    ):
        expected = torch.ones(7, 9, dtype=torch.bool)
        expected[2:5, 3:6] = False
        assert torch.equal(torch.isfinite(y[0]), expected)
    assert torch.isfinite(xsep.depthwise_conv2d(x, w_dw, padding=1, backend="cpu")[:, [0, 1, 3, 4]]).all()


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    print(json.dumps(MODES[sys.argv[1]]()))
