"""A layer's backward in one CUDA kernel, run by the emulator, against autograd in float64.

Called through the backend, so that the plan's choice of it and its handling of layouts are tested with it.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

import pytest
import torch
from torch import Tensor

from tests.chain.support import DTYPES, hold, same
from tests.chain.test_backward_ops import Case
from xsep import extension
from xsep.backends import chain_cuda
from xsep.backends import chain_cuda_launch as launch
from xsep.backends.chain import Backward
from xsep.backends.chain_cuda_launch import backward_plan
from xsep.backends.cuda import DeviceFacts, shape_of
from xsep.problem import IDENTITY, RELU, SILU, Problem

from . import emulated
from .emulated_ops import EmulatedOps
from .test_emulated_chain import check_sums
from .test_plan import problem

pytestmark = [
    pytest.mark.skipif(emulated.missing_tools() is not None, reason=str(emulated.missing_tools())),
    pytest.mark.skipif(extension.binding() is None, reason="xsep's compiled extension is not built"),
]

each_kind = pytest.mark.parametrize("kind", ["fp16", "bf16"])
EVERYTHING = (True, True, True)
ROOM = 227 * 1024


class Layer(NamedTuple):
    """What ``Case`` takes, and on how many CTAs."""

    code: int
    short: str
    operands: int
    pool: str
    vec: bool
    size: tuple[int, int]
    channels: tuple[int, int]
    ctas: int = 3

    def case(self, kind: str) -> Case:
        torch.manual_seed(zlib.crc32(repr(self).encode()))
        return Case(DTYPES[kind], self.code, same(), *self[1:7])


#: Tiles are up to 16 rows high and 16 columns wide, and cut anew at every picture: 3 of them.
LAYERS = {
    "one-pixel": Layer(RELU, "", 0, "", False, (1, 1), (8, 8)),
    "operand": Layer(RELU, "", 1, "", True, (9, 17), (24, 72)),
    "no-activation": Layer(IDENTITY, "half", 2, "", True, (5, 33), (72, 24), 2),
    "nothing-applied": Layer(IDENTITY, "full", 0, "", False, (19, 7), (120, 8)),
    "costly-activation": Layer(SILU, "full", 1, "", True, (7, 18), (8, 120)),
    "shortcut-activated": Layer(RELU, "full-activated", 1, "", True, (6, 17), (32, 64), 1),
    "half-activated": Layer(RELU, "half-activated", 2, "", True, (17, 9), (40, 32), 132),
    "pool": Layer(RELU, "", 1, "torch", True, (10, 17), (16, 40)),
    "pool-same": Layer(RELU, "half", 2, "same", True, (9, 18), (64, 24), 2),
    "widest": Layer(RELU, "half", 1, "same", True, (9, 16), (128, 128), 2),
}  # fmt: skip


def run(
    operators: EmulatedOps, case: Case, ctas: int, seed: int = 0, room: int = ROOM,
    wanted: Sequence[bool] = EVERYTHING, fused: bool = True,
) -> Backward:  # fmt: skip
    """By the backend, in one pass or kernel by kernel, whichever it would take."""

    def plan(problem: Problem, device: DeviceFacts, pooled: bool) -> launch.BackwardPlan:
        found = backward_plan(problem, device, pooled)
        assert found is not None
        return found._replace(fused=fused)

    operators.start(DeviceFacts(ctas, room), seed)
    backend: Any = chain_cuda.CUDA_CHAIN
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "backward_plan", plan)
        found: Backward = backend.sep_backward(**case.arguments(), wanted=wanted)
    assert operators.called["chain_fused_backward"] == int(fused)
    return found


def check(case: Case, found: Backward) -> None:
    truth, own = case.by_autograd(torch.float64), case.by_autograd(case.dtype)
    for what, expected in truth.items():
        got: Optional[Tensor] = getattr(found, what)
        assert got is not None
        hold(what, got, expected, own[what], case.dtype, case.sums_size if what == "sums" else 0.0)
    assert found.dx is not None and found.sums is not None
    check_sums(found.sums, found.dx, case.operands, case.centres)


@each_kind
@pytest.mark.parametrize("name", LAYERS)
def test_against_float64(operators: EmulatedOps, name: str, kind: str) -> None:
    layer = LAYERS[name]
    case = layer.case(kind)
    check(case, run(operators, case, layer.ctas))


def plan_of(rows: int, columns: int, c_in: int, c_out: int, room: int) -> Any:
    shape = (3, rows, columns, c_in, rows, columns, c_in, 3, 3, 1, 1, 1, 1, 1, 1)
    module = extension.binding()
    assert module is not None
    return module.plan_cuda_chain_backward(
        shape, c_out=c_out, element_bytes=2, multiprocessors=2, shared_bytes=room, l2_bytes=0
    )


@each_kind
def test_tiles_of_one_pixel_row_and_column(operators: EmulatedOps, kind: str) -> None:
    """On a card whose shared memory holds no tile of more than 4 rows."""
    room = plan_of(1, 1, 24, 16, ROOM).shared_bytes
    plan = plan_of(5, 17, 24, 16, room)
    assert (plan.tile_rows, plan.tiles_down, plan.tiles_across, plan.tiles, plan.workers) == (4, 2, 2, 12, 2)
    case = Layer(RELU, "full", 2, "torch", True, (5, 17), (24, 16)).case(kind)
    check(case, run(operators, case, 2, room=room))


def test_same_bits_for_any_order_of_threads_and_whatever_is_wanted(operators: EmulatedOps) -> None:
    layer = LAYERS["pool-same"]
    case = layer.case("bf16")
    first = run(operators, case, layer.ctas)
    for seed, wanted in ((1, (True, True, True)), (2, (False, True, False)), (3, (False, False, True))):
        found = run(operators, case, layer.ctas, seed, wanted=wanted)
        asked = (wanted[0] or wanted[1],) * 2 + (wanted[2], wanted[0] or wanted[1])
        for mine, theirs, there in zip(found, first, asked, strict=True):
            assert (mine is not None) == there
            assert mine is None or (theirs is not None and torch.equal(mine, theirs))


@each_kind
@pytest.mark.parametrize("edge", ["below", "right"])
def test_windows_outside_the_picture_count_for_nothing(operators: EmulatedOps, kind: str, edge: str) -> None:
    """z is zero in the picture; windows of the tile beyond it would overflow, to infinity times no gradient."""
    layer = LAYERS["nothing-applied"]._replace(short="", size=(17, 9))
    case = layer.case(kind)
    large = 4 * torch.finfo(case.dtype).max ** 0.5
    case.x.zero_()
    case.w_dw.zero_()
    if edge == "below":
        case.x[:, :, -1], case.w_dw[:, :, 0, 1] = large, large
    else:
        case.x[..., -1], case.w_dw[:, :, 1, 0] = large, large
    found = run(operators, case, layer.ctas)
    assert found.dw_pw is not None and not found.dw_pw.any()


@each_kind
def test_no_worse_than_kernel_by_kernel(operators: EmulatedOps, kind: str) -> None:
    """Everything is rounded where the staged way rounds it, but for act(x), which that one keeps in registers."""
    case = Layer(RELU, "", 1, "", True, (9, 11), (32, 32)).case(kind)
    fused = run(operators, case, 132)
    staged = run(operators, case, 132, fused=False)
    for what, exact in case.by_autograd(torch.float64).items():
        mine, theirs = getattr(fused, what), getattr(staged, what)
        hold(what, mine, exact, theirs, case.dtype, case.sums_size if what == "sums" else 0.0)


@pytest.mark.parametrize(
    "change",
    [{"dtype": torch.float32}, {"c_in": 60}, {"c_out": 136}, {"r": 5, "s": 5}, {"multiplier": 2}],
    ids=["float32", "c_in-60", "c_out-136", "k5", "multiplier"],
)
def test_other_layers_stay_staged(change: dict[str, Any]) -> None:
    module, facts = extension.binding(), DeviceFacts(132, ROOM, 40 << 20)._asdict()
    assert module is not None
    for p, fused in ((problem(64, 128, 147), True), (problem(64, 128, 147)._replace(**change), False)):
        plan = module.plan_cuda_chain_backward(
            shape_of(p), c_out=p.c_out, element_bytes=p.dtype.itemsize, **facts
        )  # fmt: skip
        assert plan.fused == fused
