"""What is to be computed: the op's arguments in one fixed order, and the facts about them that choose a kernel.

Names follow the field: ``N C H W`` input, ``P Q`` output height and width, ``R S`` filter height and width,
``C_in -> C_mid = C_in * depth_multiplier -> C_out``.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor

#: Activation codes, the same in Python, C++ and Triton. ``None`` in the public interface is ``"identity"`` here.
ACTIVATIONS = ("identity", "relu", "relu6", "silu", "hardswish", "gelu", "gelu_tanh", "elu", "leaky_relu")
IDENTITY, RELU, RELU6, SILU, HARDSWISH, GELU, GELU_TANH, ELU, LEAKY_RELU = range(len(ACTIVATIONS))

#: What ``alpha`` is where the caller leaves it out: elu's scale and the leaky slope, as in ``torch.nn.functional``.
DEFAULT_ALPHA = {ELU: 1.0, LEAKY_RELU: 0.01}


class Geometry(NamedTuple):
    """The spatial side of a convolution, in the order of the ops' ``int[8] geometry`` argument."""

    stride_h: int
    stride_w: int
    pad_left: int
    pad_right: int
    pad_top: int
    pad_bottom: int
    dilation_h: int
    dilation_w: int

    @property
    def stride(self) -> tuple[int, int]:
        return self.stride_h, self.stride_w

    @property
    def dilation(self) -> tuple[int, int]:
        return self.dilation_h, self.dilation_w

    def output_size(self, h: int, w: int, r: int, s: int) -> tuple[int, int]:
        """(P, Q) for an input of h by w and a filter of r by s; not positive where the filter does not fit."""
        p = (h + self.pad_top + self.pad_bottom - self.dilation_h * (r - 1) - 1) // self.stride_h + 1
        q = (w + self.pad_left + self.pad_right - self.dilation_w * (s - 1) - 1) // self.stride_w + 1
        return p, q


class Affine(NamedTuple):
    """``act(scale * v + shift)`` per channel; scale and shift may be None, activation is a code of ACTIVATIONS."""

    scale: Optional[Tensor] = None  # [C]
    shift: Optional[Tensor] = None  # [C]
    activation: int = IDENTITY
    alpha: float = 0.0

    def is_identity(self) -> bool:
        return self.scale is None and self.shift is None and self.activation == IDENTITY


class SeparableArgs(NamedTuple):
    """Arguments of ``xsep::separable_conv2d`` but for ``backend``, in the schema's order."""

    x: Tensor  # [N, C_in, H, W]
    w_dw: Tensor  # [C_mid, 1, R, S]
    w_pw: Tensor  # [C_out, C_mid, 1, 1]
    bias: Optional[Tensor]  # [C_out]
    residual: Optional[Tensor]  # [N, C_out, P, Q]
    scale_p: Optional[Tensor]  # [C_in]
    shift_p: Optional[Tensor]  # [C_in]
    scale_m: Optional[Tensor]  # [C_mid]
    shift_m: Optional[Tensor]  # [C_mid]
    scale_e: Optional[Tensor]  # [C_out]
    shift_e: Optional[Tensor]  # [C_out]
    geometry: list[int]  # a Geometry
    activations: list[int]  # codes of prologue, middle, epilogue
    alphas: list[float]  # likewise

    @property
    def prologue(self) -> Affine:
        return Affine(self.scale_p, self.shift_p, self.activations[0], self.alphas[0])

    @property
    def middle(self) -> Affine:
        return Affine(self.scale_m, self.shift_m, self.activations[1], self.alphas[1])

    @property
    def epilogue(self) -> Affine:
        return Affine(self.scale_e, self.shift_e, self.activations[2], self.alphas[2])


class DepthwiseArgs(NamedTuple):
    """Arguments of ``xsep::depthwise_conv2d`` but for ``backend``, in the schema's order."""

    x: Tensor  # [N, C_in, H, W]
    w_dw: Tensor  # [C_mid, 1, R, S]
    bias: Optional[Tensor]  # [C_mid]
    scale_p: Optional[Tensor]  # [C_in]
    shift_p: Optional[Tensor]  # [C_in]
    scale_e: Optional[Tensor]  # [C_mid]
    shift_e: Optional[Tensor]  # [C_mid]
    geometry: list[int]  # a Geometry
    activations: list[int]  # codes of prologue, epilogue
    alphas: list[float]  # likewise

    @property
    def prologue(self) -> Affine:
        return Affine(self.scale_p, self.shift_p, self.activations[0], self.alphas[0])

    @property
    def epilogue(self) -> Affine:
        return Affine(self.scale_e, self.shift_e, self.activations[1], self.alphas[1])


#: How many leading fields of the two argument tuples are tensors, so how many gradients a backward gives.
SEPARABLE_TENSORS = 11
DEPTHWISE_TENSORS = 7


class Problem(NamedTuple):
    """Everything a backend or planner may choose by; hashable, and made without touching data."""

    op: str  # "separable" or "depthwise"; "chain" names a layer of the training chain in what was measured
    device: str  # torch.device.type
    dtype: torch.dtype
    channels_last: bool  # the layout of y, and of x but for slices
    n: int
    c_in: int
    h: int
    w: int
    multiplier: int
    r: int
    s: int
    c_out: int  # C_mid for a depthwise problem
    geometry: Geometry
    activations: tuple[int, ...]

    @property
    def memory_format(self) -> torch.memory_format:
        """Of y and of the gradients of images."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    @property
    def c_mid(self) -> int:
        return self.c_in * self.multiplier

    @property
    def output_size(self) -> tuple[int, int]:
        return self.geometry.output_size(self.h, self.w, self.r, self.s)

    def as_chain_layer(self) -> Problem:
        """As measurements name a layer of the training chain, which is not the op that computes the same."""
        return self._replace(op="chain")

    def __str__(self) -> str:
        g = self.geometry
        kind = str(self.dtype).removeprefix("torch.")
        layout = "channels_last" if self.channels_last else "contiguous"
        p, q = self.output_size
        return (
            f"{self.op} {self.n}x{self.c_in}x{self.h}x{self.w} -> {self.n}x{self.c_out}x{p}x{q}, "
            f"filter {self.r}x{self.s}, stride {g.stride_h}x{g.stride_w}, "
            f"padding {g.pad_left},{g.pad_right},{g.pad_top},{g.pad_bottom}, "
            f"dilation {g.dilation_h}x{g.dilation_w}, multiplier {self.multiplier}, {kind}, {layout}, {self.device}"
        )


def is_channels_last(t: Tensor) -> bool:
    """Whether ATen would call a 4-d tensor channels_last by its strides: slices too, ambiguous shapes not.

    The rule of ``c10::is_channels_last_strides_2d``, without looking at the batch size, so that a dynamic batch
    stays dynamic when traced.
    """
    if t.stride(1) == 0:
        return False
    smallest = 0
    for d in (1, 3, 2):
        size, stride = t.shape[d], t.stride(d)
        if size == 0 or stride < smallest:
            return False
        smallest = stride * size if size > 1 else stride
    return smallest != t.stride(1) and bool(t.stride(0) >= smallest)


def output_format(x: Tensor, *weights: Tensor) -> torch.memory_format:
    """The layout PyTorch's convolutions would choose: channels_last as soon as the input or a weight is."""
    if is_channels_last(x) or any(is_channels_last(w) for w in weights):
        return torch.channels_last
    return torch.contiguous_format


def separable_problem(a: SeparableArgs) -> Problem:
    n, c_in, h, w = a.x.shape
    c_mid, _, r, s = a.w_dw.shape
    channels_last = output_format(a.x, a.w_dw, a.w_pw) is torch.channels_last
    return Problem(
        "separable", a.x.device.type, a.x.dtype, channels_last, n, c_in, h, w, c_mid // c_in, r, s,
        a.w_pw.shape[0], Geometry(*a.geometry), tuple(a.activations),
    )  # fmt: skip


def depthwise_problem(a: DepthwiseArgs) -> Problem:
    n, c_in, h, w = a.x.shape
    c_mid, _, r, s = a.w_dw.shape
    channels_last = output_format(a.x, a.w_dw) is torch.channels_last
    return Problem(
        "depthwise", a.x.device.type, a.x.dtype, channels_last, n, c_in, h, w, c_mid // c_in, r, s,
        c_mid, Geometry(*a.geometry), tuple(a.activations),
    )  # fmt: skip
