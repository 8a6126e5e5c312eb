"""Why the interpreter is patched: without the patches it is wrong, with them it is right."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tests.triton.interpreter import fixes


@triton.jit
def _product(a, b, c, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, SIZE)
    at = i[:, None] * SIZE + i[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at)))


@triton.jit
def _narrow(a, c, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, SIZE)
    tl.store(c + i, tl.load(a + i).to(tl.bfloat16))


@triton.jit
def _count(c, n):  # type: ignore[no-untyped-def]
    total = 0
    for i in range(n):
        total += i
    tl.store(c, total)


@triton.jit
def _twice(x):  # type: ignore[no-untyped-def]
    return x + x


@triton.jit
def _four_times(c, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, SIZE)
    tl.store(c + i, _twice(_twice(i)))


def _product_error() -> float:
    a, b = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16()
    c = torch.empty(16, 16)
    _product[(1,)](a, b, c, 16)
    return float((c.double() - a.double() @ b.double()).abs().max())


def _narrowing_differs() -> bool:
    a = torch.randn(1024)
    c = torch.empty(1024, dtype=torch.bfloat16)
    _narrow[(1,)](a, c, 1024)
    return not torch.equal(c, a.bfloat16())


def test_bfloat16_products_are_wrong_without_the_fix_and_right_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _product_error() < 1e-4
    monkeypatch.setattr(fixes.Builder, "create_dot", fixes.original_dot)
    assert _product_error() > 1.0


def test_bfloat16_rounding_is_wrong_without_the_fix_and_right_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not _narrowing_differs()
    monkeypatch.setattr(fixes.Builder, "cast_impl", fixes.original_cast)
    assert _narrowing_differs()


def test_scalars_bound_loops() -> None:
    c = torch.zeros(1, dtype=torch.int32)
    _count[(1,)](c, 5)
    assert int(c) == 10


def test_rounding_is_to_nearest_even_and_keeps_nan() -> None:
    values = torch.cat([torch.randn(4096) * 10.0 ** torch.randint(-30, 30, (4096,)), torch.tensor([0.0, float("inf")])])
    expected = values.bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(fixes.narrow(values.numpy()), expected)
    assert np.isnan(fixes.widen(fixes.narrow(np.array([np.nan], np.float32)))).all()


def test_tf32_is_exact_without_the_fix_and_cut_off_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.randn(16, 16), torch.randn(16, 16)

    def product() -> torch.Tensor:
        c = torch.empty(16, 16)
        _product[(1,)](a, b, c, 16)
        return c.double()

    cut = [torch.from_numpy(fixes.truncate(t.numpy())).double() for t in (a, b)]
    assert float((product() - cut[0] @ cut[1]).abs().max()) < 1e-4 < float((product() - a.double() @ b.double()).norm())
    monkeypatch.setattr(fixes.Builder, "create_dot", fixes.original_dot)
    assert float((product() - a.double() @ b.double()).abs().max()) < 1e-5


def test_a_launch_patches_the_language_once(monkeypatch: pytest.MonkeyPatch) -> None:
    patched: list[Any] = []
    original = fixes._original_patch_lang

    def counted(function: Any) -> Any:
        patched.append(function)
        return original(function)

    monkeypatch.setattr(fixes, "_original_patch_lang", counted)
    for launches in (1, 2):
        c = torch.zeros(8, dtype=torch.int32)
        _four_times[(1,)](c, 8)
        assert c.tolist() == [4 * i for i in range(8)] and len(patched) == launches
        assert tl.core.is_builtin(tl.arange), "it is put back"
