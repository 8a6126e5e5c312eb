"""From what users pass to what the ops take: the one validation, above every backend.

Every refusal names the argument, what it is and what was expected, before anything is launched.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional, Union

import torch
from torch import Tensor

from .problem import ACTIVATIONS, DEFAULT_ALPHA, Affine, DepthwiseArgs, Geometry, SeparableArgs

Pair = Union[int, Sequence[int]]
Padding = Union[int, str, Sequence[int]]

BACKEND_NAMES = ("auto", "aten", "cpu", "triton", "cuda")
FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class ChannelAffine(NamedTuple):
    """``act(scale * v + shift)`` per channel, applied where v is loaded or stored, at no pass over memory.

    Args:
        scale: ``[C]`` or None; the type of the input, or float32 beside a 16-bit one.
        shift: ``[C]`` or None; likewise.
        activation: None, relu, relu6, silu, hardswish, gelu, gelu_tanh, elu or leaky_relu.
        alpha: elu's alpha (default 1.0) or leaky_relu's slope (default 0.01), finite; no other activation takes it.
    """

    scale: Optional[Tensor] = None
    shift: Optional[Tensor] = None
    activation: Optional[str] = None
    alpha: Optional[float] = None


def separable_args(
    x: Tensor,
    w_dw: Tensor,
    w_pw: Tensor,
    bias: Optional[Tensor],
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    prologue: Optional[ChannelAffine],
    middle: Optional[ChannelAffine],
    epilogue: Optional[ChannelAffine],
    residual: Optional[Tensor],
) -> SeparableArgs:
    """Checked and normalised arguments of ``xsep::separable_conv2d``; raises ValueError or TypeError."""
    c_in, c_mid = _check_depthwise_tensors(x, w_dw)
    _check_tensor("w_pw", w_pw, x)
    if w_pw.dim() != 4 or w_pw.shape[1] != c_mid or w_pw.shape[2] != 1 or w_pw.shape[3] != 1:
        raise ValueError(f"w_pw must be [C_out, {c_mid}, 1, 1] to follow w_dw's {c_mid} channels, got {_shape(w_pw)}")
    c_out = w_pw.shape[0]
    if c_out == 0:
        raise ValueError(f"w_pw must have at least one output channel, got {_shape(w_pw)}")
    _check_vector("bias", bias, c_out, "C_out", x)
    p = _affine("prologue", prologue, c_in, "C_in", x)
    m = _affine("middle", middle, c_mid, "C_mid", x)
    e = _affine("epilogue", epilogue, c_out, "C_out", x)
    geometry, (out_h, out_w) = _geometry(x, w_dw, stride, padding, dilation)
    if residual is not None:
        _check_tensor("residual", residual, x)
        expected = (x.shape[0], c_out, out_h, out_w)
        if residual.dim() != 4 or any(a != b for a, b in zip(residual.shape, expected)):
            raise ValueError(
                f"residual must have exactly the output's shape {list(expected)} (it is not broadcast), "
                f"got {_shape(residual)}"
            )
    return SeparableArgs(
        x, w_dw, w_pw, bias, residual, p.scale, p.shift, m.scale, m.shift, e.scale, e.shift,
        list(geometry), [p.activation, m.activation, e.activation], [p.alpha, m.alpha, e.alpha],
    )  # fmt: skip


def depthwise_args(
    x: Tensor,
    w_dw: Tensor,
    bias: Optional[Tensor],
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    prologue: Optional[ChannelAffine],
    epilogue: Optional[ChannelAffine],
) -> DepthwiseArgs:
    """Checked and normalised arguments of ``xsep::depthwise_conv2d``; raises ValueError or TypeError."""
    c_in, c_mid = _check_depthwise_tensors(x, w_dw)
    _check_vector("bias", bias, c_mid, "C_mid", x)
    p = _affine("prologue", prologue, c_in, "C_in", x)
    e = _affine("epilogue", epilogue, c_mid, "C_mid", x)
    geometry, _ = _geometry(x, w_dw, stride, padding, dilation)
    return DepthwiseArgs(
        x, w_dw, bias, p.scale, p.shift, e.scale, e.shift,
        list(geometry), [p.activation, e.activation], [p.alpha, e.alpha],
    )  # fmt: skip


def backend_name(backend: Optional[str]) -> str:
    """``backend`` with None as "auto"; raises ValueError for a name that is no backend's."""
    name = "auto" if backend is None else backend
    if name not in BACKEND_NAMES:
        raise ValueError(f"backend must be None or one of {', '.join(BACKEND_NAMES)}, got {backend!r}")
    return name


def whole(name: str, value: Any, smallest: int) -> int:
    """An int of at least ``smallest``; numpy's become Python's."""
    items = _ints([value])
    if items is None:
        raise ValueError(f"{name} must be an int, got {value!r}")
    if items[0] < smallest:
        raise ValueError(f"{name} must be at least {smallest}, got {value!r}")
    return items[0]


def finite(name: str, value: Any) -> float:
    """A finite real number as a float."""
    number = math.nan
    # Text has no __float__, though float() reads it; numpy's bool has one, and is called bool as Python's or bool_.
    # torch.compile cannot ask a symbol for it.
    kind = type(value)
    if kind is float or kind is int or (hasattr(value, "__float__") and kind.__name__ not in ("bool", "bool_")):
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):  # of several values, complex, or above all floats
            number = math.nan
    if not -math.inf < number < math.inf:
        raise ValueError(f"{name} must be a finite real number, got {value!r}")
    return number


def pair(name: str, value: Pair, smallest: int) -> tuple[int, int]:
    """(vertical, horizontal) of an int or a pair of ints, each at least ``smallest``; numpy's become Python's."""
    if type(value) is int and value >= smallest:
        return value, value
    items = _ints(value if isinstance(value, Sequence) else [value, value])
    if items is None or len(items) != 2:
        raise ValueError(f"{name} must be an int or a pair of ints, got {value!r}")
    if items[0] < smallest or items[1] < smallest:
        raise ValueError(f"{name} must be at least {smallest}, got {value!r}")
    return items[0], items[1]


def sides(padding: Sequence[Any]) -> Sequence[int]:
    """Four explicit paddings (left, right, top, bottom), each an int and at least 0."""
    items = _ints(padding)
    if items is None:
        raise ValueError(f"padding (left, right, top, bottom) must be ints, got {padding!r}")
    if min(items) < 0:
        raise ValueError(f"padding (left, right, top, bottom) must be at least 0, got {padding!r}")
    return items


def _ints(items: Sequence[Any]) -> Optional[Sequence[int]]:
    """The items as ints, or None where one is not whole or is a bool; symbols stay symbols."""
    if all(isinstance(i, (int, torch.SymInt)) and not isinstance(i, bool) for i in items):
        return items
    if any(isinstance(i, bool) for i in items):
        return None
    try:
        found: list[Any] = [i if isinstance(i, torch.SymInt) else operator.index(i) for i in items]
    except TypeError:
        return None
    return found


def _shape(t: Tensor) -> str:
    return str(list(t.shape))


def _check_tensor(name: str, t: Tensor, x: Tensor) -> None:
    """A tensor of x's type on x's device."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.dtype != x.dtype:
        raise TypeError(f"{name} must have x's type {x.dtype}, got {t.dtype}")
    if t.device != x.device:
        raise ValueError(f"{name} must be on x's device {x.device}, got {t.device}")


def _check_depthwise_tensors(x: Tensor, w_dw: Tensor) -> tuple[int, int]:
    """(C_in, C_mid) of a well-formed pair."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATING:
        raise TypeError(f"x must be float32, float16, bfloat16 or float64, got {x.dtype}")
    if x.layout != torch.strided:
        raise TypeError(f"x must be a dense (strided) tensor, got layout {x.layout}")
    if x.dim() != 4:
        hint = "; give a single picture a batch dimension with x[None]" if x.dim() == 3 else ""
        raise ValueError(f"x must be [N, C_in, H, W], got {_shape(x)}{hint}")
    _check_tensor("w_dw", w_dw, x)
    if w_dw.dim() != 4 or w_dw.shape[1] != 1:
        raise ValueError(f"w_dw must be [C_in * depth_multiplier, 1, R, S], got {_shape(w_dw)}")
    if w_dw.shape[2] == 0 or w_dw.shape[3] == 0:
        raise ValueError(f"w_dw must have a filter of at least 1x1, got {_shape(w_dw)}")
    c_in, c_mid = x.shape[1], w_dw.shape[0]
    if c_in == 0:
        raise ValueError(f"x must have at least one channel, got {_shape(x)}")
    if c_mid == 0 or c_mid % c_in != 0:
        raise ValueError(
            f"w_dw's first dimension must be a positive multiple of x's {c_in} channels "
            f"(C_in * depth_multiplier), got w_dw {_shape(w_dw)} for x {_shape(x)}"
        )
    return c_in, c_mid


def _check_vector(name: str, v: Optional[Tensor], channels: int, letter: str, x: Tensor) -> None:
    if v is None:
        return
    if not isinstance(v, Tensor):
        raise TypeError(f"{name} must be a tensor or None, got {type(v).__name__}")
    if v.dim() != 1 or v.shape[0] != channels:
        raise ValueError(f"{name} must be [{letter}] = [{channels}], got {_shape(v)}")
    beside = v.dtype == torch.float32 and x.dtype in (torch.float16, torch.bfloat16)
    if v.dtype != x.dtype and not beside:
        raise TypeError(f"{name} must have x's type {x.dtype}, or float32 beside a 16-bit x, got {v.dtype}")
    if v.device != x.device:
        raise ValueError(f"{name} must be on x's device {x.device}, got {v.device}")


def _affine(name: str, affine: Optional[ChannelAffine], channels: int, letter: str, x: Tensor) -> Affine:
    if affine is None:
        return Affine()
    if not isinstance(affine, ChannelAffine):
        raise TypeError(f"{name} must be a ChannelAffine or None, got {type(affine).__name__}")
    _check_vector(f"{name}.scale", affine.scale, channels, letter, x)
    _check_vector(f"{name}.shift", affine.shift, channels, letter, x)
    kind = "identity" if affine.activation is None else affine.activation
    if kind not in ACTIVATIONS:
        raise ValueError(
            f"{name}.activation must be None or one of {', '.join(ACTIVATIONS[1:])}, got {affine.activation!r}"
        )
    code = ACTIVATIONS.index(kind)
    if affine.alpha is not None and code not in DEFAULT_ALPHA:
        raise ValueError(f"{name}.alpha belongs to elu and leaky_relu, but {name}.activation is {affine.activation!r}")
    alpha = DEFAULT_ALPHA.get(code, 0.0) if affine.alpha is None else finite(f"{name}.alpha", affine.alpha)
    return Affine(affine.scale, affine.shift, code, alpha)


def _geometry(
    x: Tensor, w_dw: Tensor, stride: Pair, padding: Padding, dilation: Pair
) -> tuple[Geometry, tuple[int, int]]:
    """The geometry and its output size (P, Q)."""
    h, w = x.shape[2], x.shape[3]
    r, s = w_dw.shape[2], w_dw.shape[3]
    stride_h, stride_w = pair("stride", stride, 1)
    dilation_h, dilation_w = pair("dilation", dilation, 1)
    if isinstance(padding, str):
        if padding == "valid":
            left = right = top = bottom = 0
        elif padding == "same":
            top, bottom = same_padding(h, r, stride_h, dilation_h)
            left, right = same_padding(w, s, stride_w, dilation_w)
        else:
            raise ValueError(f'padding must be "same", "valid", an int, a pair or four ints, got {padding!r}')
    elif isinstance(padding, Sequence) and len(padding) == 4:
        left, right, top, bottom = sides(padding)
    else:
        top, left = pair("padding", padding, 0)
        bottom, right = top, left
    g = Geometry(stride_h, stride_w, left, right, top, bottom, dilation_h, dilation_w)
    out_h, out_w = g.output_size(h, w, r, s)
    if out_h <= 0 or out_w <= 0:
        raise ValueError(
            f"the output would be {out_h}x{out_w}: x {_shape(x)} padded by (left, right, top, bottom) = "
            f"({left}, {right}, {top}, {bottom}) is smaller than the filter {r}x{s} "
            f"at dilation {dilation_h}x{dilation_w}"
        )
    return g, (out_h, out_w)


def _untraced(size: Any) -> Any:
    """The number itself: in jit.trace sizes are tensors, which the geometry, a list of ints, cannot hold."""
    return int(size) if isinstance(size, Tensor) else size


def same_padding(size: int, filter_size: int, stride: int, dilation: int) -> tuple[int, int]:
    """(before, after) so that the output is ceil(size / stride) long; TensorFlow's rule, the odd one goes after."""
    least = (_untraced(filter_size) - 1) * dilation + 1 - stride
    total = least + -_untraced(size) % stride
    if least < 0:  # the size may be a symbol, of which nothing should be asked
        total = torch.sym_max(total, 0)
    return total // 2, total - total // 2
