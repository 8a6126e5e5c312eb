"""Checks remembered from one call to the next change nothing but the time they take."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import xsep
from xsep import ChannelAffine, checked, repeated
from xsep.arguments import depthwise_args, separable_args
from xsep.problem import depthwise_problem, separable_problem


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> dict[Any, Any]:
    known: dict[Any, Any] = {}
    monkeypatch.setattr(checked, "_known", known)
    monkeypatch.setattr(repeated, "again", repeated._never)  # those calls do not come here
    return known


def tensors(layout: torch.memory_format = torch.channels_last) -> tuple[torch.Tensor, ...]:
    x = torch.randn(2, 4, 6, 7).contiguous(memory_format=layout)
    return x, torch.randn(8, 1, 3, 3), torch.randn(5, 8, 1, 1)


def same(found: Any, expected: Any) -> bool:
    return all(a is b if isinstance(b, torch.Tensor) else a == b for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["nhwc", "nchw"])
def test_the_second_call_gets_what_the_checks_would_say(layout: torch.memory_format) -> None:
    for _ in range(3):
        x, w_dw, w_pw = tensors(layout)
        bias, residual = torch.randn(5), torch.randn(2, 5, 3, 4)
        prologue = ChannelAffine(torch.randn(4), None, "relu")
        middle = ChannelAffine(None, torch.randn(8), "elu", 0.5)
        rest = (bias, (2, 2), "same", 1, prologue, middle, None, residual)
        args, problem = checked.checked_separable_args(x, w_dw, w_pw, *rest)
        expected = separable_args(x, w_dw, w_pw, *rest)
        assert same(args, expected) and problem == separable_problem(expected)

        options = (torch.randn(8), 1, (1, 0, 2, 1), (1, 2), None, middle)
        flat, problem = checked.checked_depthwise_args(x, w_dw, *options)
        wanted = depthwise_args(x, w_dw, *options)
        assert same(flat, wanted) and problem == depthwise_problem(wanted)
    assert len(checked._known) == 2


def test_checks_run_once_for_equal_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def note(*args: Any) -> Any:
        calls.append(args)
        return separable_args(*args)

    monkeypatch.setattr(checked, "separable_args", note)
    for _ in range(3):
        xsep.separable_conv2d(*tensors(), padding=1)
    assert len(calls) == 1
    xsep.separable_conv2d(*tensors(), padding=2)
    xsep.separable_conv2d(*tensors(torch.contiguous_format), padding=1)
    xsep.separable_conv2d(*(t.double() for t in tensors()), padding=1)
    xsep.separable_conv2d(*tensors(), padding=1, epilogue=ChannelAffine(activation="elu"))
    xsep.separable_conv2d(*tensors(), padding=1, epilogue=ChannelAffine(activation="elu", alpha=0.5))
    assert len(calls) == 6


@pytest.mark.parametrize("name, good, bad", [
    ("stride", 1, True), ("stride", 1, 1.0), ("stride", (1, 1), (1.0, 1)), ("stride", (1, 1), (1, True)),
    ("dilation", 1, 1.0), ("padding", 1, 1.0), ("padding", 1, "1"), ("padding", (1, 1), (1, 1.0)),
])  # fmt: skip
def test_what_is_equal_to_a_good_option_is_not_taken_for_it(name: str, good: Any, bad: Any) -> None:
    def refusal() -> str:
        with pytest.raises((TypeError, ValueError)) as caught:
            xsep.separable_conv2d(*tensors(), **{name: bad})
        return str(caught.value)

    before = refusal()
    xsep.separable_conv2d(*tensors(), **{name: good})
    assert refusal() == before


def test_what_only_looks_like_an_affine_is_refused_after_one() -> None:
    affine = ChannelAffine(torch.randn(4), None, "relu")
    xsep.separable_conv2d(*tensors(), prologue=affine)
    with pytest.raises(TypeError, match="prologue must be a ChannelAffine or None, got SimpleNamespace"):
        xsep.separable_conv2d(*tensors(), prologue=SimpleNamespace(**affine._asdict()))  # type: ignore[arg-type]


def test_tensors_that_are_not_dense_are_refused_after_dense_ones() -> None:
    x, w_dw, w_pw = tensors(torch.contiguous_format)
    xsep.separable_conv2d(x, w_dw, w_pw)
    for other in (x.to_sparse(), x.to_mkldnn()):
        with pytest.raises(TypeError, match="dense"):
            xsep.separable_conv2d(other, w_dw, w_pw)


def test_as_many_as_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checked, "MOST", 3)
    _, w_dw, w_pw = tensors()
    for size in range(4, 14):
        xsep.separable_conv2d(torch.randn(1, 4, size, size), w_dw, w_pw)
        assert 1 <= len(checked._known) <= 3


def test_symbols_are_not_remembered() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    traced = make_fx(lambda *t: xsep.separable_conv2d(*t, padding=1), tracing_mode="symbolic")(*tensors())
    assert not checked._known
    x, w_dw, w_pw = tensors()
    more = torch.randn(3, 4, 9, 8)
    assert torch.equal(traced(x, w_dw, w_pw), xsep.separable_conv2d(x, w_dw, w_pw, padding=1))
    assert torch.equal(traced(more, w_dw, w_pw), xsep.separable_conv2d(more, w_dw, w_pw, padding=1))


def test_what_decides_the_backend_is_asked_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from xsep import dispatch

    found: list[str] = []
    choose = dispatch.choice

    def note(*args: Any) -> Any:
        found.append(choose(*args).backend.name)
        return choose(*args)

    monkeypatch.setattr(dispatch, "choice", note)
    given = tensors()
    xsep.separable_conv2d(*given)
    monkeypatch.setenv("XSEP_BACKEND", "aten")
    xsep.separable_conv2d(*given)
    monkeypatch.delenv("XSEP_BACKEND")
    xsep.separable_conv2d(*given, backend="aten")
    xsep.separable_conv2d(*given)
    assert found == ["cpu", "aten", "aten", "cpu"]
