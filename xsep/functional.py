"""The functions users call. Checks and conveniences here; what runs is decided in :mod:`xsep.dispatch`."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from . import dispatch, repeated
from .arguments import ChannelAffine, Padding, Pair, backend_name, depthwise_args, separable_args
from .backends.aten import ATEN
from .checked import checked_depthwise_args, checked_separable_args
from .ops import depthwise, separable
from .problem import depthwise_problem, separable_problem


def separable_conv2d(
    x: Tensor,
    w_dw: Tensor,
    w_pw: Tensor,
    bias: Optional[Tensor] = None,
    *,
    stride: Pair = 1,
    padding: Padding = 0,
    dilation: Pair = 1,
    prologue: Optional[ChannelAffine] = None,
    middle: Optional[ChannelAffine] = None,
    epilogue: Optional[ChannelAffine] = None,
    residual: Optional[Tensor] = None,
    backend: Optional[str] = None,
) -> Tensor:
    """Depthwise convolution, then pointwise, as one differentiable op that never stores what lies between.

    ``y = act_e(scale_e * (pw(z) + bias) + shift_e + residual)`` with ``z = act_m(scale_m * dw(x~) + shift_m)`` and
    ``x~ = act_p(scale_p * x + shift_p)``, zero where padded. Xception's layer (arXiv 1610.02357) is the case with
    ``prologue=ChannelAffine(activation="relu")`` and no middle.

    Args:
        x: ``[N, C_in, H, W]``, float32, float16, bfloat16 or float64, any strides; channels_last is the fast layout.
        w_dw: ``[C_in * depth_multiplier, 1, R, S]``; channel j of z reads channel ``j // depth_multiplier`` of x.
        w_pw: ``[C_out, C_in * depth_multiplier, 1, 1]``.
        bias: ``[C_out]`` or None.
        stride: int or (vertical, horizontal), of the depthwise filter.
        padding: int, (vertical, horizontal), ``"valid"``, ``"same"`` (TensorFlow's rule, any stride) or
            (left, right, top, bottom). Pads with zeros after the prologue.
        dilation: int or (vertical, horizontal).
        prologue, middle, epilogue: per-channel scale, shift and activation for x, z and y.
        residual: added before the epilogue's activation; exactly y's shape and type.
        backend: None for the best that can run, or ``"aten"``, ``"cpu"``, ``"triton"``, ``"cuda"``. The environment
            variable XSEP_BACKEND stands in where this is None.

    Returns:
        y ``[N, C_out, P, Q]`` of x's type, with the strides that PyTorch's two convolutions would give.

    Raises:
        ValueError: shapes, devices or options that do not fit; the message names the argument.
        TypeError: types that do not fit.
        RuntimeError: the backend asked for by name cannot run this; the message says why.

    Float32 uses TF32 only where ``torch.backends.cudnn.allow_tf32`` lets PyTorch's convolutions use it. Under autocast
    the convolution's tensors are cast as ``conv2d`` casts its own; the affines' vectors keep their type.
    """
    call = (x, w_dw, w_pw, bias, stride, padding, dilation, prologue, middle, epilogue, residual, backend)
    y = None if torch.compiler.is_dynamo_compiling() else repeated.again(*call)
    if y is not None and y is not NotImplemented:
        return y
    everything = (x, w_dw, w_pw, bias, residual, *_tensors(prologue), *_tensors(middle), *_tensors(epilogue))
    if has_torch_function(everything):
        return handle_torch_function(
            separable_conv2d, everything, x, w_dw, w_pw, bias, stride=stride, padding=padding, dilation=dilation,
            prologue=prologue, middle=middle, epilogue=epilogue, residual=residual, backend=backend,
        )  # fmt: skip
    name = backend_name(backend)
    traced, autocast = _traced(), torch._C._is_any_autocast_enabled()
    if traced or autocast:
        x, w_dw, w_pw, bias, residual = _autocast(x, w_dw, w_pw, bias, residual)
    if autocast and not traced:
        with torch._C._DisableAutocast():  # it has had its say
            return separable_conv2d(
                x, w_dw, w_pw, bias, stride=stride, padding=padding, dilation=dilation, prologue=prologue,
                middle=middle, epilogue=epilogue, residual=residual, backend=backend,
            )  # fmt: skip
    if not traced:
        args, problem = checked_separable_args(
            x, w_dw, w_pw, bias, stride, padding, dilation, prologue, middle, epilogue, residual
        )
        if y is NotImplemented:
            y = repeated.first(call, args, problem, name)
        return separable(args, name, problem) if y is None else y
    args = separable_args(x, w_dw, w_pw, bias, stride, padding, dilation, prologue, middle, epilogue, residual)
    return ATEN.separable_forward(args) if torch.onnx.is_in_onnx_export() else separable.traced(args, name)


def depthwise_conv2d(
    x: Tensor,
    w_dw: Tensor,
    bias: Optional[Tensor] = None,
    *,
    stride: Pair = 1,
    padding: Padding = 0,
    dilation: Pair = 1,
    prologue: Optional[ChannelAffine] = None,
    epilogue: Optional[ChannelAffine] = None,
    backend: Optional[str] = None,
) -> Tensor:
    """Depthwise convolution: ``y = act_e(scale_e * (dw(x~) + bias) + shift_e)``, ``x~ = act_p(scale_p * x + shift_p)``.

    Args:
        x: ``[N, C_in, H, W]``, float32, float16, bfloat16 or float64.
        w_dw: ``[C_in * depth_multiplier, 1, R, S]``.
        bias: ``[C_in * depth_multiplier]`` or None.
        stride, padding, dilation, prologue, epilogue, backend: as in :func:`separable_conv2d`.

    Returns:
        y ``[N, C_in * depth_multiplier, P, Q]`` of x's type, with the strides that PyTorch's convolution would give.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`separable_conv2d`.
    """
    call = (x, w_dw, bias, stride, padding, dilation, prologue, epilogue, backend)
    y = None if torch.compiler.is_dynamo_compiling() else repeated.again(*call)
    if y is not None and y is not NotImplemented:
        return y
    everything = (x, w_dw, bias, *_tensors(prologue), *_tensors(epilogue))
    if has_torch_function(everything):
        return handle_torch_function(
            depthwise_conv2d, everything, x, w_dw, bias, stride=stride, padding=padding, dilation=dilation,
            prologue=prologue, epilogue=epilogue, backend=backend,
        )  # fmt: skip
    name = backend_name(backend)
    traced, autocast = _traced(), torch._C._is_any_autocast_enabled()
    if traced or autocast:
        x, w_dw, bias = _autocast(x, w_dw, bias)
    if autocast and not traced:
        with torch._C._DisableAutocast():
            return depthwise_conv2d(
                x, w_dw, bias, stride=stride, padding=padding, dilation=dilation, prologue=prologue,
                epilogue=epilogue, backend=backend,
            )  # fmt: skip
    if not traced:
        args, problem = checked_depthwise_args(x, w_dw, bias, stride, padding, dilation, prologue, epilogue)
        if y is NotImplemented:
            y = repeated.first(call, args, problem, name)
        return depthwise(args, name, problem) if y is None else y
    args = depthwise_args(x, w_dw, bias, stride, padding, dilation, prologue, epilogue)
    return ATEN.depthwise_forward(args) if torch.onnx.is_in_onnx_export() else depthwise.traced(args, name)


def explain(
    x: Tensor,
    w_dw: Tensor,
    w_pw: Optional[Tensor] = None,
    bias: Optional[Tensor] = None,
    *,
    stride: Pair = 1,
    padding: Padding = 0,
    dilation: Pair = 1,
    prologue: Optional[ChannelAffine] = None,
    middle: Optional[ChannelAffine] = None,
    epilogue: Optional[ChannelAffine] = None,
    residual: Optional[Tensor] = None,
    backend: Optional[str] = None,
) -> str:
    """What would run :func:`separable_conv2d` (or, with no ``w_pw``, :func:`depthwise_conv2d`) on these arguments.

    Returns:
        Some lines for people: the problem, the backend and its plan, the bytes and FLOPs that no way of running it can
        go below, and why each other backend is passed over. Nothing is computed.

    Raises:
        ValueError, TypeError: as the op itself would.
    """
    name = backend_name(backend)
    if w_pw is None:
        if middle is not None or residual is not None:
            raise ValueError("middle and residual belong to a separable convolution: w_pw is missing")
        problem = depthwise_problem(depthwise_args(x, w_dw, bias, stride, padding, dilation, prologue, epilogue))
    else:
        problem = separable_problem(
            separable_args(x, w_dw, w_pw, bias, stride, padding, dilation, prologue, middle, epilogue, residual)
        )
    return dispatch.explain(problem, name)


def _tensors(affine: Optional[ChannelAffine]) -> tuple[Any, ...]:
    return (affine.scale, affine.shift) if isinstance(affine, ChannelAffine) else ()


def _traced() -> bool:
    """Whether the call is being written down, by torch.compile, export or jit.trace, for others to run."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def autocasts(kind: str) -> bool:
    """Whether autocast is on for a kind of device; there are some that it does not know."""
    # torch.amp.is_autocast_available would know them all, but up to PyTorch 2.11 it breaks torch.compile's graph.
    return kind != "meta" and torch.is_autocast_enabled(kind)


def _autocast(x: Tensor, *others: Optional[Tensor]) -> Any:
    """All of them in autocast's type where it is on, as conv2d does; float64 and integers stay what they are."""
    if not isinstance(x, Tensor) or not autocasts(x.device.type):
        return (x, *others)
    kind = torch.get_autocast_dtype(x.device.type)

    def cast(t: Any) -> Any:
        if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64:
            return t.to(kind)
        return t

    return tuple(cast(t) for t in (x, *others))
