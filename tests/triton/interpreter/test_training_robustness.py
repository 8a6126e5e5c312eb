"""The training chain's backward in Triton's interpreter: memory, layouts, empty batches, and what is no number."""

from __future__ import annotations

import zlib
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.chain import test_backward_ops as backward
from tests.chain.support import last, vector
from tests.conftest import NIGHTLY
from tests.triton.interpreter.test_training_backward import Sized, strided
from xsep.backends import triton_chain_launch as chain_launch
from xsep.backends import triton_launch as launch
from xsep.backends.chain import RawGradient
from xsep.ops.training import bn_dgrad, calls, sep_backward
from xsep.problem import RELU
from xsep.testing import poisoned_memory


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(zlib.crc32(request.node.name.encode()))


def guarded(t: Tensor) -> Tensor:
    """The same values between margins of NaN (of 255, taps): the interpreter does not see a read past the end."""
    dense = t.permute(0, 2, 3, 1) if t.dim() == 4 else t
    buffer = torch.full((t.numel() + 8192,), torch.nan if t.is_floating_point() else 255, dtype=t.dtype)
    inside = buffer[4096:-4096].view(dense.shape)
    inside.copy_(dense)
    return inside.permute(0, 3, 1, 2) if t.dim() == 4 else inside


@pytest.mark.parametrize("name", ["pool-torch", "half-shortcut"][: 2 if NIGHTLY else 1])
def test_no_read_reaches_past_a_tensor(name: str) -> None:
    case = backward.Case(torch.bfloat16, *backward.CASES[name])
    vec, half, coef = vector(11, case.dtype), last(3, 11, (case.x.shape[2] + 1) // 2, 5, dtype=case.dtype), case.coef
    half = half[:, :, :, : (case.x.shape[3] + 1) // 2]

    def everything(own: Any) -> list[Tensor]:
        x, dr, own_vec = own(case.x), own(case.r), own(vec)
        load = backward.Load(own_vec, RELU)
        a = {**case.arguments(), "x": x, "w_pw": own(case.w_pw), "operands": [own(o) for o in case.operands]}
        a["dr"] = RawGradient(own(case.du), dr, own(coef), None if case.index is None else own(case.index), case.pads)
        if case.shortcut is not None:
            a["shortcut"] = case.shortcut._replace(g=own(case.shortcut.g))
        found = (
            *sep_backward(**a, backend="triton"),
            *calls.bn_pool_add(x, own_vec, own(half), own(vec), (1, 1), "triton"),
            *calls.bn_relu_gap(x, own_vec, "triton"), *calls.statistics(x, "triton"),
            *calls.apply_backward(x, x, load, None, [own(case.x)], own(case.centres[:2]), "triton"),
            calls.apply(x, load, own(case.x), "triton"), bn_dgrad(dr, dr, own(coef), "triton"),
            *backward.pw_backward(RawGradient(dr, dr, own(coef)), own(case.w_pw), x, load, "triton"),
        )  # fmt: skip
        return [t for t in found if t is not None]

    case.centres = torch.nan_to_num(case.centres)
    for a, b in zip(everything(guarded), everything(lambda t: t)):
        assert torch.equal(a, b)


def test_offsets_of_64_bits_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = backward.Case(torch.bfloat16, *backward.CASES["pool-same"])
    vec, half = vector(11, case.dtype), case.x[:, :, ::2, ::2]
    load = case.arguments()["load"]

    def everything() -> list[Tensor]:
        f = calls.pw_fprop(half, load, case.w_pw, backend="triton")
        dw, dy = backward.pw_backward(RawGradient(f.r, f.r, case.coef), case.w_pw, half, load, "triton")
        g = torch.ones(3, 11, dtype=case.dtype)
        found = (
            *sep_backward(**case.arguments(), backend="triton"), f.r, f.partials, dw, dy,
            *calls.bn_pool_add(case.x, vec, half, vec, (0, 1), "triton"), calls.apply(case.x, load, case.x, "triton"),
            *calls.apply_backward(case.x, case.x, load, None, [case.x], case.centres[:2], "triton"),
            calls.bn_relu_gap_backward(g, case.x, vec, vec[0], g.float(), g.float(), "triton")[0],
            bn_dgrad(case.r, case.r, case.coef, "triton"),
        )  # fmt: skip
        return [t for t in found if t is not None]

    torch.manual_seed(1)
    expected = everything()
    for module in (launch, chain_launch):
        monkeypatch.setattr(module, "INT32", 0)
    for a, b in zip(everything(), expected):
        assert torch.equal(a, b)


def test_layouts_of_any_kind() -> None:
    """NCHW, sliced and expanded inputs are what their dense copies are."""
    case = backward.Case(torch.float32, *backward.CASES["half-shortcut"])
    expected = sep_backward(**case.arguments(), backend="triton")
    case.du, case.r = case.du.contiguous(), case.r.contiguous()
    case.x = torch.cat([case.x, case.x], 1)[:, :11]
    case.operands = [o.contiguous() for o in case.operands]
    assert case.shortcut is not None
    case.shortcut = case.shortcut._replace(g=case.shortcut.g.contiguous())
    for a, b in zip(sep_backward(**case.arguments(), backend="triton"), expected):
        assert a is not None and b is not None and torch.equal(a, b)


def test_an_empty_batch_has_no_gradients() -> None:
    case = backward.Case(torch.float32, *backward.CASES["shortcut"])
    case.x, case.r, case.du, case.operands = case.x[:0], case.r[:0], case.du[:0], [case.x[:0]]
    case.shortcut = None
    with poisoned_memory():
        found = sep_backward(**case.arguments(), backend="triton")
        du, sums = calls.apply_backward(
            case.x, case.x, case.arguments()["load"], None, [case.x], case.centres, "triton"
        )
        dw, dy = backward.pw_backward(
            RawGradient(case.du, case.r, case.coef), case.w_pw, case.r.new_empty((0, 11, 9, 7)),
            case.arguments()["load"], "triton",
        )  # fmt: skip
    assert found.dx is not None and found.dx.shape == case.x.shape and du.shape == case.x.shape and dy.shape[0] == 0
    for t in (found.dw_dw, found.dw_pw, found.sums, sums, dw):
        assert t is not None and t.numel() > 0 and not bool(t.any())


@pytest.mark.parametrize("what", ["du", "x", "r"])
def test_what_is_no_number_shows_where_the_plain_chain_shows_it(what: str) -> None:
    case = backward.Case(torch.float32, *backward.CASES["relu"])
    getattr(case, what)[1, 3, 4, 2] = torch.nan if what != "du" else torch.inf
    case.operands = [case.x]
    ours, plain = (sep_backward(**case.arguments(), backend=b) for b in ("triton", "aten"))
    seen = 0
    for a, b, name in zip(ours, plain, ours._fields):
        assert a is not None and b is not None
        if name == "dw_dw":
            # Infinity in dr also meets the zeros that stand for rows which are another strip's: not a number, where the
            # sum over the picture would be infinite.
            assert torch.equal(a.isfinite(), b.isfinite()), name
        else:
            assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.isinf(), b.isinf()), name
        seen += int((~a.isfinite()).sum())
    assert seen > 0


def test_a_pixel_that_no_window_meets_has_no_part_in_dw_pw() -> None:
    """A last row left over by the stride: tiles reach past the picture, and their taps meet it."""
    case = Sized(torch.bfloat16, 7, 6, (2, 8, 7), (3, 3), strided((2, 2), (1, 1), (0, 0, 0, 0)))
    a = case.arguments()
    whole = backward.sep_wgrad_pw(a["dr"], a["x"], a["load"], a["w_dw"], a["geometry"], "triton")
    case.x[:, :, 7] = torch.nan
    assert torch.equal(
        whole, backward.sep_wgrad_pw(a["dr"], case.x, a["load"], a["w_dw"], a["geometry"], "triton")
    )  # fmt: skip
