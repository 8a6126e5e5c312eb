"""The pointwise products: right both ways, and in the precision that PyTorch's settings give its convolutions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from xsep import extension, testing
from xsep.backends import pointwise
from xsep.backends.aten import ATEN
from xsep.backends.base import Backend
from xsep.backends.cpu import CpuBackend
from xsep.problem import SeparableArgs

WAYS = pytest.mark.parametrize("differ", [False, True], ids=["mm", "conv2d"])


class Plain(CpuBackend):
    """The backward as base.py has it, with all its products."""

    pointwise = Backend.pointwise
    pointwise_dgrad = Backend.pointwise_dgrad
    pointwise_wgrad = Backend.pointwise_wgrad
    separable_wgrad = Backend.separable_wgrad
    separable_backward = Backend.separable_backward


class Products(TorchDispatchMode):
    """How often matrices were multiplied, and how often they were convolved."""

    def __init__(self) -> None:
        super().__init__()
        self.matrices = self.convolutions = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op.name()
        self.matrices += name.startswith(("aten::mm", "aten::addmm", "aten::bmm"))
        self.convolutions += name.startswith("aten::convolution")
        return op(*args, **(kwargs or {}))


def on_a_gpu(dtype: torch.dtype = torch.float32, elements: int = 1) -> Any:
    return SimpleNamespace(dtype=dtype, is_cuda=True, numel=lambda: elements)


def set_to(monkeypatch: pytest.MonkeyPatch, conv: str, matmul: str, cudnn: str = "none", whole: str = "none") -> None:
    settings = SimpleNamespace(
        cudnn=SimpleNamespace(conv=SimpleNamespace(fp32_precision=conv), fp32_precision=cudnn),
        cuda=SimpleNamespace(matmul=SimpleNamespace(fp32_precision=matmul)), fp32_precision=whole,
    )  # fmt: skip
    monkeypatch.setattr(pointwise.torch, "backends", settings)


@pytest.mark.parametrize(
    "conv, matmul, cudnn, whole, differ",
    [
        ("tf32", "none", "none", "none", True),  # what PyTorch starts with
        ("tf32", "ieee", "none", "none", True),
        ("none", "tf32", "none", "none", True),
        ("none", "tf32", "ieee", "tf32", True),
        ("tf32", "tf32", "none", "none", False),
        ("ieee", "ieee", "tf32", "tf32", False),
        ("none", "none", "none", "tf32", False),
        ("none", "none", "none", "none", False),
        ("none", "none", "tf32", "ieee", True),
    ],
)
def test_settings(
    monkeypatch: pytest.MonkeyPatch, conv: str, matmul: str, cudnn: str, whole: str, differ: bool
) -> None:
    on_a_cpu = torch.zeros(1)
    set_to(monkeypatch, conv, matmul, cudnn, whole)
    assert pointwise.settings_differ(on_a_gpu()) == differ
    assert not pointwise.settings_differ(on_a_gpu(torch.bfloat16))
    assert not pointwise.settings_differ(on_a_gpu(elements=0))
    assert not pointwise.settings_differ(on_a_cpu)


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("matmul", [False, True])
def test_older_settings(monkeypatch: pytest.MonkeyPatch, conv: bool, matmul: bool) -> None:
    settings = SimpleNamespace(
        cudnn=SimpleNamespace(allow_tf32=conv), cuda=SimpleNamespace(matmul=SimpleNamespace(allow_tf32=matmul))
    )
    monkeypatch.setattr(pointwise.torch, "backends", settings)
    assert pointwise.tf32_allowed() == conv
    assert pointwise.settings_differ(on_a_gpu()) == (conv != matmul)


def test_pytorch_starts_with_settings_that_differ() -> None:
    """If that changes, the convolution is no longer what runs unless somebody wishes."""
    assert pointwise.tf32_allowed() and pointwise.settings_differ(on_a_gpu())


@WAYS
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["NHWC", "NCHW"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_products(
    monkeypatch: pytest.MonkeyPatch, differ: bool, layout: torch.memory_format, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(pointwise, "settings_differ", lambda _: differ)
    z, dv = (torch.randn(3, c, 5, 7).to(dtype).contiguous(memory_format=layout) for c in (11, 6))
    w, bias = torch.randn(6, 11, 1, 1).to(dtype), torch.randn(6).to(dtype)
    rows = torch.empty(3 * 5 * 7, 6, dtype=dtype)

    with Products() as made:
        found = {
            "y": pointwise.product(z, w), "biased": pointwise.product(z, w, bias), "dz": pointwise.dgrad(dv, w),
            "dw": pointwise.wgrad(dv, z)[:, :, None, None],
        }  # fmt: skip
        pointwise.product_into(rows, z, w)
    found["rows"] = pointwise.images_of(rows, z)
    wide = found["dw"][..., 0, 0]
    assert wide.dtype == torch.promote_types(dtype, torch.float32)
    by_convolutions = 4 if dtype == torch.bfloat16 else 5  # whose sums over pixels would be rounded
    assert (made.matrices, made.convolutions) == ((5 - by_convolutions, by_convolutions) if differ else (5, 0))

    def all_of(z: Tensor, dv: Tensor, w: Tensor, bias: Tensor) -> dict[str, Tensor]:
        y = torch.einsum("nchw,oc->nohw", z, w[..., 0, 0])
        return {
            "y": y, "biased": y + bias.view(-1, 1, 1), "dz": torch.einsum("nohw,oc->nchw", dv, w[..., 0, 0]),
            "dw": torch.einsum("nohw,nchw->oc", dv, z)[:, :, None, None], "rows": y,
        }  # fmt: skip

    exact = all_of(z.double(), dv.double(), w.double(), bias.double())
    plain = {
        "y": ATEN.pointwise(z, w), "biased": torch.nn.functional.conv2d(z, w, bias), "dz": ATEN.pointwise_dgrad(dv, w),
        "dw": ATEN.pointwise_wgrad(dv, z, w), "rows": ATEN.pointwise(z, w),
    }  # fmt: skip
    truth = testing.Truth(exact, {name: float(t.abs().max()) for name, t in exact.items()})
    assert not testing.violations(found, truth, plain, dtype)
    # Not rounded on the way: as close as a float32 of some hundred terms is.
    off = (wide.double() - exact["dw"][..., 0, 0]).abs().max()
    assert float(off) <= 64 * torch.finfo(wide.dtype).eps * float(exact["dw"].abs().max())


@WAYS
def test_a_backward_follows_them_in_all_its_products(monkeypatch: pytest.MonkeyPatch, differ: bool) -> None:
    monkeypatch.setattr(pointwise, "settings_differ", lambda _: differ)
    assert extension.load_cpu().reason is None
    x, w_dw, w_pw, dy = (torch.randn(s) for s in ((2, 5, 6, 7), (5, 1, 3, 3), (4, 5, 1, 1), (2, 4, 6, 7)))
    no = None
    a = SeparableArgs(x, w_dw, w_pw, no, no, no, no, no, no, no, no, [1] * 8, [0, 0, 0], [0.0] * 3)
    with Products() as made:
        Plain().separable_backward(dy, a, None, [True, True, True, *[False] * 8])
    assert (made.matrices, made.convolutions) == ((0, 2) if differ else (2, 0))


def test_gradients_that_cudnn_makes_are_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may else choose algorithms that add up in whatever order threads arrive."""
    seen = []
    monkeypatch.setattr(pointwise, "settings_differ", lambda _: True)

    def watched(make: Any) -> Any:
        def call(*arguments: Any) -> Tensor:
            seen.append(torch.backends.cudnn.deterministic)
            return make(*arguments)

        return call

    monkeypatch.setattr(pointwise, "conv2d_weight", watched(pointwise.conv2d_weight))
    monkeypatch.setattr(pointwise.F, "conv_transpose2d", watched(pointwise.F.conv_transpose2d))
    z, dv, w = torch.randn(2, 3, 4, 5), torch.randn(2, 6, 4, 5), torch.randn(6, 3, 1, 1)
    pointwise.wgrad(dv, z)
    pointwise.dgrad(dv, w)
    assert seen == [True, True] and not torch.backends.cudnn.deterministic
