"""The pointwise convolution of NHWC images and its gradients, each one product of matrices over all pixels.

PyTorch has one setting for float32 convolutions on a GPU and another for matrix products, and unless somebody changes
them only the convolutions may use TF32, which is several times as fast. These are convolutions: where the two settings
differ, PyTorch's convolution makes them, else ``torch.mm``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight


def rows_of(t: Tensor) -> Tensor:
    """[N, C, H, W] -> [N * H * W, C], a view of NHWC images."""
    return t.permute(0, 2, 3, 1).reshape(-1, t.shape[1])


def images_of(rows: Tensor, like: Tensor) -> Tensor:
    """[N * H * W, C] -> [N, C, H, W], of like's N, H and W."""
    n, _, h, w = like.shape
    return rows.view(n, h, w, rows.shape[1]).permute(0, 3, 1, 2)


def tf32_allowed() -> bool:
    """Whether PyTorch's own float32 convolutions on a GPU may use TF32, which xsep's then do too.

    A setting of "none" leaves it to the wider one. ``cudnn.allow_tf32`` must not be asked where the newer settings were
    used: it raises where those of convolutions and of recurrent networks differ.
    """
    cudnn = torch.backends.cudnn
    if not hasattr(cudnn, "conv"):
        return bool(cudnn.allow_tf32)
    return _precision(cudnn.conv, cudnn, torch.backends) == "tf32"


def _products_take_tf32() -> bool:
    """The same of PyTorch's matrix products."""
    matmul = torch.backends.cuda.matmul
    if not hasattr(torch.backends.cudnn, "conv"):
        return bool(matmul.allow_tf32)
    return _precision(matmul, torch.backends) == "tf32"


def _precision(*settings: object) -> str:
    """The first of these settings that says anything."""
    wishes = (str(getattr(one, "fp32_precision", "none")) for one in settings)
    return next((wish for wish in wishes if wish != "none"), "none")


def settings_differ(t: Tensor) -> bool:
    """Whether t would be multiplied in one precision by PyTorch's convolutions and in another by ``torch.mm``."""
    return t.dtype == torch.float32 and t.is_cuda and t.numel() > 0 and tf32_allowed() != _products_take_tf32()


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """Has cuDNN make gradients by algorithms that give the same bits each time, as xsep's own kernels do."""
    cudnn = torch.backends.cudnn
    before, cudnn.deterministic = cudnn.deterministic, True
    try:
        yield
    finally:
        cudnn.deterministic = before


def product(z: Tensor, w_pw: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    """[N, C_mid, P, Q] x [C_out, C_mid, 1, 1] -> [N, C_out, P, Q]; bias: [C_out], of z's type."""
    if settings_differ(z):
        return F.conv2d(z, w_pw, bias)
    rows, weights = rows_of(z), w_pw.reshape(w_pw.shape[:2]).t()
    return images_of(torch.mm(rows, weights) if bias is None else torch.addmm(bias, rows, weights), z)


def product_into(rows: Tensor, z: Tensor, w_pw: Tensor) -> None:
    """The rows [N * P * Q, C_out] of ``product``, into a tensor that is there."""
    if settings_differ(z):
        rows.copy_(rows_of(F.conv2d(z, w_pw)))
    else:
        torch.mm(rows_of(z), w_pw.reshape(w_pw.shape[:2]).t(), out=rows)


def dgrad(dv: Tensor, w_pw: Tensor) -> Tensor:
    """Gradient of ``product`` for z: [N, C_out, P, Q] x [C_out, C_mid, 1, 1] -> [N, C_mid, P, Q]."""
    if settings_differ(dv):
        with _deterministic():
            return F.conv_transpose2d(dv, w_pw)
    return images_of(torch.mm(rows_of(dv), w_pw.reshape(w_pw.shape[:2])), dv)


def wgrad(dv: Tensor, z: Tensor) -> Tensor:
    """Gradient of ``product`` for w_pw: dv [N, C_out, P, Q], z [N, C_mid, P, Q] -> [C_out, C_mid], in float32 at least.

    A sum over all pixels, of which PyTorch may else add up parts in 16 bits.
    """
    a, b = rows_of(dv).t(), rows_of(z)
    if dv.dtype in (torch.float16, torch.bfloat16):
        # PyTorch's own has a wider result on a GPU only.
        return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else torch.mm(a.float(), b.float())
    if settings_differ(z):
        with _deterministic():
            return conv2d_weight(z, (dv.shape[1], z.shape[1], 1, 1), dv).flatten(1)
    return torch.mm(a, b)
