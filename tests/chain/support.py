"""What the tests of the training chain share: inputs away from the ReLU's kink, and the rule they are held to."""

from __future__ import annotations

from typing import Any, Optional

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xsep.problem import Geometry, SeparableArgs
from xsep.testing import norm_violation

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: Backend and type; the compiled kernels have no float64.
WAYS = [("aten", "fp64"), *((b, d) for b in ("aten", "cpu") for d in ("fp32", "bf16", "fp16"))]
WAY_IDS = ["-".join(way) for way in WAYS]
#: Of a layer's input and output: none of the vector widths divides them.
CHANNELS = [11, 17]
ULPS = 8


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def last(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).contiguous(memory_format=torch.channels_last).to(dtype)


def same(k: int = 3, dilation: int = 1) -> Geometry:
    pad = dilation * (k // 2)
    return Geometry(1, 1, pad, pad, pad, pad, dilation, dilation)


def vector(c: int, dtype: torch.dtype) -> Tensor:
    """[2, C] scale and shift: both signs, a scale of zero, nothing near it else."""
    scale = (0.5 + torch.rand(c)) * torch.where(torch.rand(c) < 0.4, -1, 1)
    scale[0] = 0
    return torch.stack([scale, 0.3 + torch.rand(c)]).to(wide(dtype))


def image(n: int, c: int, h: int, w: int, vec: Optional[Tensor], dtype: torch.dtype) -> Tensor:
    """x with scale * x + shift at least 0.1 from zero, so that no rounding carries a value over the ReLU's kink."""
    u = last(n, c, h, w)
    u = u + torch.where(u < 0, -0.1, 0.1)
    if vec is not None:
        scale, shift = (v.double()[:, None, None] for v in vec)
        u = torch.where(scale == 0, u, (u - shift) / torch.where(scale == 0, 1, scale))
    return u.contiguous(memory_format=torch.channels_last).to(dtype)


def put_off(monkeypatch: pytest.MonkeyPatch, chain: Any, method: str) -> None:
    """Has a backend's method give results that are off by a hundredth."""
    right = getattr(chain, method)

    def wrong(*arguments: Any) -> Any:
        found = right(*arguments)
        off = [t * 1.01 if isinstance(t, Tensor) and t.is_floating_point() else t for t in found]
        return type(found)(*off) if hasattr(found, "_fields") else tuple(off)

    monkeypatch.setattr(chain, method, wrong)


def affine(x: Tensor, vec: Optional[Tensor]) -> Tensor:
    return x if vec is None else x * vec[0].to(x)[:, None, None] + vec[1].to(x)[:, None, None]


def layer(u: Tensor, w_dw: Tensor, w_pw: Tensor, g: Geometry) -> Tensor:
    padded = F.pad(u, (g.pad_left, g.pad_right, g.pad_top, g.pad_bottom))
    return F.conv2d(F.conv2d(padded, w_dw, None, g.stride, 0, g.dilation, u.shape[1]), w_pw)


def double(a: SeparableArgs) -> SeparableArgs:
    wide: dict[str, Any] = {name: t.double() for name, t in a._asdict().items() if isinstance(t, Tensor)}
    return a._replace(**wide)


def largest(t: Tensor) -> float:
    return float(t.detach().abs().max()) if t.numel() else 0.0


def hold(what: str, got: Tensor, truth: Tensor, own: Optional[Tensor], dtype: torch.dtype, size: float = 0.0) -> None:
    """Off by at most twice what PyTorch's own is at that type, and a few ulp of the result's size."""
    assert got.shape == truth.shape, f"{what}: {list(got.shape)}, expected {list(truth.shape)}"
    error = largest(got.detach().double() - truth)
    theirs = 0.0 if own is None else largest(own.double() - truth)
    bound = 2 * theirs + ULPS * torch.finfo(dtype).eps * max(largest(truth), size)
    assert error <= bound, f"{what}: off by {error:.3g}, PyTorch's by {theirs:.3g}, {bound:.3g} allowed"


def hold_norm(what: str, got: Tensor, truth: Tensor, own: Tensor, dtype: torch.dtype) -> None:
    """The same by norms, where a value that rounding carries over a kink moves single elements by their whole size."""
    found = norm_violation(got, truth, own, dtype)
    assert not found, f"{what}: {found}"


def scatter(m: nn.Module) -> Any:
    """BatchNorms away from their start: both signs of gamma and an exact zero, running statistics not 0 and 1."""
    norms: list[Any] = [bn for bn in m.modules() if isinstance(bn, nn.BatchNorm2d)]
    for bn in norms:
        if bn.weight is not None:
            nn.init.normal_(bn.weight)
            nn.init.normal_(bn.bias)
            bn.weight.data[0] = 0
        if bn.running_mean is not None:
            bn.running_mean.normal_()
            bn.running_var.uniform_(0.5, 2)
    return m


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.detach() - b.detach()).abs().max() / b.detach().abs().max().clamp_min(1e-300))
