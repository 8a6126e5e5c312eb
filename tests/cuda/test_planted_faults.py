"""The tests catch what they are there to catch: faults planted into a copy of the kernels fail the same checks."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from xsep.problem import RELU
from xsep.testing import float32_products

from . import emulated, emulated_ops, test_emulated_fused_backward
from . import test_backend_python as backend
from . import test_emulated_chain as chain
from . import test_emulated_wgrad as wgrad
from .emulated_ops import SMALL, EmulatedOps
from .test_emulated_separable import WALKS, check, check_not_finite, draw
from .test_emulated_statistics import check_far_from_zero

pytestmark = pytest.mark.skipif(emulated.missing_tools() is not None, reason=str(emulated.missing_tools()))


class Fault(NamedTuple):
    """There while ``planted_fault`` says so: one build serves all that are listed with it."""

    name: str
    right: str  # occurs once in the file
    wrong: str
    file: str


STATISTICS = "depthwise/statistics.cuh"
FAULTS_OF_STATISTICS = [
    Fault("missing-barrier", "    __syncthreads();\n", "    if (!FAULT) __syncthreads();\n", STATISTICS),
    Fault(
        "pixels-beside-the-picture",
        "i < columns ? y[v]",
        "FAULT || i < columns ? y[v]",
        STATISTICS,
    ),
    Fault(
        "sums-of-unrounded-values",
        "? y[v] - centre[v]",
        "? (FAULT ? strip[i][v] : y[v]) - centre[v]",
        STATISTICS,
    ),
]


def copied(folder: Path) -> Path:
    """A copy of csrc/cuda, beside what it includes."""
    shutil.copytree(emulated.CUDA_SOURCES.parent / "common", folder / "common")
    return Path(shutil.copytree(emulated.CUDA_SOURCES, folder / "cuda"))


FORWARD, HALO, DIAGONAL, TILE = (f"separable/{name}.cuh" for name in ("fprop", "halo", "diagonal", "tile"))
FAULTS_OF_THE_FORWARD = [
    Fault(
        "missing-barrier",
        "    __syncthreads();\n    if (copied.exists(plan)) Halo",
        "    if (!FAULT) __syncthreads();\n    if (copied.exists(plan)) Halo",
        FORWARD,
    ),
    Fault(
        "missing-cp-async-wait",
        "    wait_for_copies(halos - 2);\n",
        "    if (!FAULT) wait_for_copies(halos - 2);\n",
        FORWARD,
    ),
    Fault("one-past-the-halo", "i < pixels; i += step", "i < pixels + FAULT; i += step", HALO),
    Fault(
        "maps-one-step-late",
        "copied.advance(plan);\n    if (copied.chunk == 0",
        "copied.advance(plan);\n    if (copied.chunk == FAULT",
        FORWARD,
    ),
    Fault(
        "sums-of-the-tile-before",
        "map(fragment, [](float) { return 0.0f; });",
        "map(fragment, [](float v) { return FAULT ? v : 0.0f; });",
        FORWARD,
    ),
    Fault(
        "weights-of-the-chunk-before",
        "plan.keeps_w_pw ? multiplied.chunk : even",
        "plan.keeps_w_pw ? multiplied.chunk : even ^ FAULT",
        FORWARD,
    ),
    Fault("a-row-of-taps-too-high", "+ i - out * STRIDE;", "+ i - out * STRIDE - FAULT;", DIAGONAL),
    Fault(
        "one-block-twice",
        "2 * pair + lane() / 8 % 2",
        "2 * pair + (FAULT ? 0 : lane() / 8 % 2)",
        DIAGONAL,
    ),
    Fault("an-eight-left-out", "(warp + 1) * tile.share,", "(warp + 1) * tile.share - FAULT,", DIAGONAL),
    Fault("z-of-another-row", "row * p_.plan.strips)", "row * (p_.plan.strips + FAULT))", DIAGONAL),
    Fault("no-block-beside-the-odd-one", "if (count % 2 != 0)", "if (!FAULT && count % 2 != 0)", TILE),
    Fault("padding-with-a-prologue", "if (exists != 0) rounded", "if (FAULT || exists != 0) rounded", HALO),
    Fault("beside-the-diagonal", "lane() / 8 == lane() % 4", "FAULT || lane() / 8 == lane() % 4", DIAGONAL),
    Fault(
        "zeros-times-infinity", "__any_sync(0xffffffffu, is_nan", "!FAULT && __any_sync(0xffffffffu, is_nan", DIAGONAL
    ),
]


class Switch(NamedTuple):
    """A fault, and what must catch it."""

    name: str
    file: str  # below csrc/cuda
    right: str  # occurs once in it
    wrong: str
    check: Callable[[EmulatedOps, pytest.MonkeyPatch], None]


def one_pass(operators: EmulatedOps, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = test_emulated_fused_backward.LAYERS["pool-same"]
    case = layer.case("bf16")
    test_emulated_fused_backward.check(case, test_emulated_fused_backward.run(operators, case, layer.ctas))


def forward(fused: bool) -> Callable[[EmulatedOps, pytest.MonkeyPatch], None]:
    return lambda operators, _: backend.test_forward(operators, fused, True, torch.channels_last)


def backward(operators: EmulatedOps, monkeypatch: pytest.MonkeyPatch) -> None:
    backend.test_backward(operators, 1, torch.channels_last)


def of_pointwise_weights(
    name: str, check: Callable[[EmulatedOps, wgrad.Layer], None] = wgrad.check
) -> Callable[[EmulatedOps, pytest.MonkeyPatch], None]:
    return lambda operators, _: check(operators, wgrad.LAYERS[name])


def raw_gradient(operators: EmulatedOps, monkeypatch: pytest.MonkeyPatch) -> None:
    chain.test_raw_gradient("bf16", 24, "same")


def raw_gradient_of_large_pictures(operators: EmulatedOps, _: pytest.MonkeyPatch) -> None:
    operators.on(SMALL)
    chain.test_raw_gradient("bf16", 24, "same", chain.WALKED["large"])


def input_gradient(operators: EmulatedOps, monkeypatch: pytest.MonkeyPatch) -> None:
    operators.on(SMALL._replace(multiprocessors=2))
    chain.test_input_gradient("bf16", 24, RELU, "half-activated", "oo", False)


SWITCHES = [
    Switch(
        "missing-barrier",
        "chain/fused_backward.cuh",
        "form_dz<T>(p.plan, memory);\n    __syncthreads();",
        "form_dz<T>(p.plan, memory);\n    if (!FAULT) __syncthreads();",
        one_pass,
    ),
    Switch(
        "dz-off-by-one",
        "chain/fused_backward.cuh",
        "memory.dz.get() + ((i + k) * kHaloColumns + j)",
        "memory.dz.get() + ((i + k) * kHaloColumns + j + FAULT)",
        one_pass,
    ),
    Switch(
        "sums-before-rounding",
        "gradient_epilogue.cuh",
        "  rounded.widen(d);\n",
        "  if (!FAULT) rounded.widen(d);\n",
        one_pass,
    ),
    Switch(
        "dr-not-zero-outside",
        "chain/fused_backward.cuh",
        "    float dr[8] = {};\n",
        "    float dr[8] = {};\n    for (float& v : dr) v = FAULT * 0.25f;\n",
        one_pass,
    ),
    Switch(
        "missing-rows-of-the-reduction",
        "depthwise/row_sums.cuh",
        "int row = share;",
        "int row = share + FAULT * kSumShares;",
        one_pass,
    ),
    Switch(
        "missing-share-of-the-reduction",
        "depthwise/row_sums.cuh",
        "for (int i = 1; i < kSumShares; ++i)",
        "for (int i = 1 + FAULT; i < kSumShares; ++i)",
        one_pass,
    ),
    Switch(
        "z-beside-the-picture",
        "chain/fused_backward.cuh",
        "p.depthwise.shape.w}.clear_others(z);",
        "FAULT ? 1 << 20 : p.depthwise.shape.w}.clear_others(z);",
        lambda operators, _: test_emulated_fused_backward.test_windows_outside_the_picture_count_for_nothing(
            operators, "bf16", "right"
        ),
    ),
    Switch(
        "missing-barrier-before-a-copy",
        "separable/wgrad.cuh",
        "    __syncthreads();\n    copy(halo);",
        "    if (!FAULT) __syncthreads();\n    copy(halo);",
        of_pointwise_weights("walk"),
    ),
    Switch(
        "missing-wait-for-copies",
        "separable/wgrad.cuh",
        "    wait_for_copies(halos - 2);\n",
        "    if (!FAULT) wait_for_copies(halos - 2);\n",
        of_pointwise_weights("walk"),
    ),
    Switch(
        "dy-of-another-tile",
        "separable/wgrad.cuh",
        "fed_buffer + 1 == plan.operand_buffers",
        "fed_buffer + 1 + FAULT == plan.operand_buffers",
        of_pointwise_weights("walk"),
    ),
    Switch(
        "pixels-of-another-share",
        "separable/wgrad.cuh",
        "const int first = block.share() * kStep;",
        "const int first = (FAULT ? 0 : block.share()) * kStep;",
        of_pointwise_weights("one-chunk"),
    ),
    Switch(
        "channels-of-the-first-part",
        "separable/wgrad.cuh",
        "first_chunk = static_cast<int>(blockIdx.y)",
        "first_chunk = (FAULT ? 0 : static_cast<int>(blockIdx.y))",
        of_pointwise_weights("parts"),
    ),
    Switch(
        "z-of-columns-past-the-picture",
        DIAGONAL,
        "if (EDGES) {",
        "if (EDGES && !FAULT) {",
        lambda operators, _: wgrad.test_windows_outside_the_picture_count_for_nothing(operators, "bf16", "right"),
    ),
    Switch(
        "du-in-the-place-of-dr",
        "chain/wgrad.cuh",
        "rounded.store(piece);",
        "if (!FAULT) rounded.store(piece);",
        of_pointwise_weights("walk", wgrad.check_chain),
    ),
    Switch(
        "dr-of-the-tile-before",
        "separable/wgrad.cuh",
        "upstream.arrived(multiplied, memory.operand[dy]);",
        "upstream.arrived(multiplied, memory.operand[FAULT ? 0 : dy]);",
        of_pointwise_weights("walk", wgrad.check_chain),
    ),
    Switch(
        "infinity-of-another-chunk",
        "separable/wgrad.cuh",
        "if (tile.rows < plan.tile_rows || tile.columns < plan.tile_columns) {",
        "if (!FAULT && (tile.rows < plan.tile_rows || tile.columns < plan.tile_columns)) {",
        lambda operators, _: wgrad.test_what_is_not_finite_stays_in_its_channel(operators, "bf16", float("inf")),
    ),
    Switch(
        "a-tile-ahead-twice",
        "chain/finalize.cu",
        "counts[i] = tile <= last ? p.counts[at] : 0;",
        "counts[i] = tile <= last || FAULT ? p.counts[at] : 0;",
        lambda *_: chain.test_finalize_of_many_tiles(9),
    ),
    Switch(
        "a-group-of-tiles-too-few",
        "chain/finalize.cu",
        "int group = share;",
        "int group = share + FAULT;",
        lambda *_: chain.test_finalize_of_many_tiles(70),
    ),
    Switch(
        "a-share-of-dw_pw-twice",
        "chain/fused_multiply.cuh",
        "int row = block.share; row < plan.tile_rows; row += plan.shares",
        "int row = FAULT ? 0 : block.share; row < plan.tile_rows; row += plan.shares",
        one_pass,
    ),
    Switch(
        "scale-and-shift-swapped",
        "depthwise/operator.h",
        's.r * s.s);\n  p.prologue = channel_affine(scale_p, shift_p, activations[0]',
        's.r * s.s);\n  p.prologue = channel_affine(FAULT ? shift_p : scale_p, '
        "FAULT ? scale_p : shift_p, activations[0]",
        forward(fused=False),
    ),
    Switch(
        "activation-of-the-prologue",
        "depthwise/operator.h",
        'activations[1], alphas[1], x, {"scale_e", "shift_e"}, s.c_mid',
        'activations[!FAULT], alphas[1], x, {"scale_e", "shift_e"}, s.c_mid',
        forward(fused=False),
    ),
    Switch(
        "middle-without-its-shift",
        "torch_library_separable.cu",
        "channel_affine(scale_m, shift_m, activations[1]",
        "channel_affine(scale_m, FAULT ? std::nullopt : shift_m, activations[1]",
        forward(fused=True),
    ),
    Switch(
        "tf32-that-nobody-allowed",
        "torch_library_separable.cu",
        "p.allow_tf32 = allow_tf32 ? 1 : 0;\n  if (residual",
        "p.allow_tf32 = allow_tf32 || FAULT ? 1 : 0;\n  if (residual",
        forward(fused=True),
    ),
    Switch(
        "dshift-where-dscale-belongs",
        "depthwise/operator.h",
        "p.dscale = wanted[2] ? static_cast<float*>(dscale.mutable_data_ptr())",
        "p.dscale = wanted[2] ? static_cast<float*>((FAULT ? dshift : dscale).mutable_data_ptr())",
        backward,
    ),
    Switch(
        "room-for-too-few-partials",
        "depthwise/operator.h",
        "{p.plan.workers, bprop_partial_rows(s), s.c_mid}",
        "{p.plan.workers, bprop_partial_rows(s) - FAULT, s.c_mid}",
        backward,
    ),
    Switch(
        "residual-of-another-layer",
        "torch_library.cu",
        'p.residual = nhwc(residual, x, "residual"',
        'p.residual = nhwc(FAULT ? x : residual, x, "residual"',
        lambda operators, monkeypatch: backend.test_chain_forward(operators, monkeypatch, "sliced", True, True),
    ),
    Switch(
        "scale-for-shift",
        "chain/tensor.h",
        "data == nullptr ? nullptr : data + channels;",
        "data == nullptr ? nullptr : data + (FAULT ? 0 : channels);",
        lambda *_: chain.test_apply(RELU, True),
    ),
    Switch(
        "pads-swapped",
        "chain/tensor.h",
        "p.pad_top = windows.pad_top, p.pad_left = windows.pad_left;",
        "p.pad_top = windows.pad_top, p.pad_left = windows.pad_left;\n"
        "    if (FAULT) p.pad_top = windows.pad_left, p.pad_left = windows.pad_top;",
        raw_gradient,
    ),
    Switch(
        "the-picture-before",
        "walk.cuh",
        "row -= height_, ++picture;",
        "row -= height_, picture += !FAULT;",
        raw_gradient_of_large_pictures,
    ),
    Switch(
        "no-stream",
        "torch_library_chain.cu",
        "raw_gradient(p, device.stream());",
        "raw_gradient(p, FAULT ? nullptr : device.stream());",
        raw_gradient,
    ),
    Switch(
        "another-device",
        "device_scope.h",
        "if (previous_ == index_) return;",
        "if (FAULT || previous_ == index_) return;",
        raw_gradient,
    ),
    Switch(
        "device-not-given-back",
        "device_scope.h",
        "if (previous_ != index_) cudaSetDevice(previous_);",
        "if (!FAULT && previous_ != index_) cudaSetDevice(previous_);",
        raw_gradient,
    ),
    Switch(
        "shortcut-behind-the-mask",
        "chain/tensor.h",
        "epilogue.before_mask = before_mask ? 1 : 0;",
        "epilogue.before_mask = before_mask && !FAULT ? 1 : 0;",
        input_gradient,
    ),
    Switch(
        "one-operand-twice",
        "chain/tensor.h",
        "epilogue.operands[1] = optional_image(tensors.operand_2",
        "epilogue.operands[1] = optional_image(FAULT ? tensors.operand_1 : tensors.operand_2",
        input_gradient,
    ),
    Switch(
        "sums-on-top-of-each-other",
        "torch_library_chain.cu",
        "p.vectors[k] = writable(totals) + k * s.c_in;",
        "p.vectors[k] = writable(totals) + (FAULT ? 0 : k * s.c_in);",
        lambda operators, monkeypatch: chain.test_depthwise_backward_ends_with_the_epilogue(
            monkeypatch, operators, "bf16", 24, "k3-half"
        ),
    ),
    Switch(
        "sums-on-top-of-each-other-in-one-pass",
        "torch_library_chain_fused.cu",
        "sum.vectors[k] = writable(totals) + k * s.c_in;",
        "sum.vectors[k] = writable(totals) + (FAULT ? 0 : k * s.c_in);",
        one_pass,
    ),
    Switch(
        "running-statistics-swapped",
        "torch_library_chain.cu",
        "p.running_mean = optional_floats(running_mean,",
        "p.running_mean = optional_floats(FAULT ? running_var : running_mean,",
        lambda *_: chain.test_finalize_is_batch_norm(13, 0.1),
    ),
    Switch(
        "fixed-statistics-with-a-gradient",
        "torch_library_chain.cu",
        "p.batch = batch ? 1 : 0;",
        "p.batch = batch || FAULT ? 1 : 0;",
        lambda *_: chain.test_finalize_is_batch_norm(13, 0.1),
    ),
    Switch(
        "total-for-positive",
        "torch_library_chain.cu",
        'p.positive = floats(positive, r, "positive", numel);',
        'p.positive = floats(FAULT ? total : positive, r, "positive", numel);',
        lambda *_: chain.test_global_average("bf16", 24),
    ),
]  # fmt: skip


def with_switches(folder: Path, faults: Sequence[Fault | Switch]) -> Path:
    """A copy of csrc/cuda with all of the faults, each there while ``emulator::planted_fault`` gives its number."""
    sources = copied(folder)
    for number, fault in enumerate(faults, 1):
        file = sources / fault.file
        text = file.read_text()
        assert text.count(fault.right) == 1, f"the line to spoil has moved: {fault.name}"
        file.write_text(
            text.replace(fault.right, fault.wrong.replace("FAULT", f"(emulator::planted_fault() == {number})"))
        )
    return sources


@pytest.fixture(scope="module")
def statistics_library(tmp_path_factory: pytest.TempPathFactory) -> emulated.Library:
    sources = with_switches(tmp_path_factory.mktemp("statistics"), FAULTS_OF_STATISTICS)
    return emulated.Library(emulated.build("depthwise", sources))


@pytest.mark.parametrize("planted", [False, True], ids=["right", "wrong"])
@pytest.mark.parametrize("number", range(len(FAULTS_OF_STATISTICS)), ids=[f.name for f in FAULTS_OF_STATISTICS])
def test_fault_in_the_statistics_is_caught(statistics_library: emulated.Library, number: int, planted: bool) -> None:
    statistics_library.lib.emulate_fault(number + 1 if planted else 0)
    with pytest.raises(AssertionError) if planted else contextlib.nullcontext():
        check_far_from_zero(statistics_library, "many-tiles", "bf16")


@pytest.fixture(scope="module")
def forward_library(tmp_path_factory: pytest.TempPathFactory) -> emulated.Library:
    sources = with_switches(tmp_path_factory.mktemp("forward"), FAULTS_OF_THE_FORWARD)
    return emulated.Library(emulated.build("separable", sources))


@pytest.mark.parametrize("planted", [False, True], ids=["right", "wrong"])
@pytest.mark.parametrize("number", range(len(FAULTS_OF_THE_FORWARD)), ids=[f.name for f in FAULTS_OF_THE_FORWARD])
def test_fault_of_the_fused_forward_is_caught(forward_library: emulated.Library, number: int, planted: bool) -> None:
    """In CTAs that go through several chunks of several tiles, so that the pipeline turns over."""
    forward_library.lib.emulate_fault(number + 1 if planted else 0)
    expected: Any = (
        pytest.raises((AssertionError, RuntimeError), match=r"error|past the end|cp\.async|shared|equal")
        if planted
        else contextlib.nullcontext()
    )
    with expected:
        for case in WALKS[:3]:  # w_pw loaded again, and kept, and an odd number of blocks in the first tile
            check(forward_library, case, "bf16", draw(case, "bf16"))
        check_not_finite(forward_library, WALKS[1], "bf16", float("inf"))
        check(forward_library, WALKS[1], "bf16", draw(WALKS[1], "bf16", activation=1, everything=True))


@pytest.fixture(scope="module")
def switched(tmp_path_factory: pytest.TempPathFactory) -> EmulatedOps:
    sources = with_switches(tmp_path_factory.mktemp("switched"), SWITCHES)
    return EmulatedOps(emulated.build("ops", sources, "xsep_switched"), "xsep_switched")


@pytest.mark.parametrize("planted", [False, True], ids=["right", "wrong"])
@pytest.mark.parametrize("number", range(len(SWITCHES)), ids=[s.name for s in SWITCHES])
def test_fault_that_is_switched_on_is_caught(
    monkeypatch: pytest.MonkeyPatch, switched: EmulatedOps, number: int, planted: bool
) -> None:
    torch.manual_seed(0)
    switched.lib.emulate_fault(number + 1 if planted else 0)
    expected: Any = pytest.raises((AssertionError, RuntimeError)) if planted else contextlib.nullcontext()
    with expected, float32_products("ieee"), emulated_ops.guarded(monkeypatch, switched) as found:
        SWITCHES[number].check(found, monkeypatch)
