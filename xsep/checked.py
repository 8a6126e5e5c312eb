"""Checks of one call remembered for the next: on small problems they would take longer than the convolution.

What :mod:`xsep.arguments` says of a call depends on its options and on the shapes, strides, types and devices of its
tensors, not on their values. Traced code does not come here: its shapes may be symbols.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Optional

from torch import Tensor

from .arguments import ChannelAffine, Padding, Pair, depthwise_args, separable_args
from .problem import DepthwiseArgs, Problem, SeparableArgs, depthwise_problem, separable_problem

#: Calls remembered; whoever makes more different ones than this has them checked anew.
MOST = 4096


class Checked(NamedTuple):
    """What the checks of a call came to."""

    geometry: list[int]
    activations: list[int]
    alphas: list[float]
    problem: Problem


_known: dict[Any, Checked] = {}


def checked_separable_args(
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
) -> tuple[SeparableArgs, Problem]:
    """:func:`xsep.arguments.separable_args`, and their problem."""
    key = _key(stride, padding, dilation, (x, w_dw, w_pw, bias, residual), (prologue, middle, epilogue))
    known = _known.get(key)
    if known is None:
        args = separable_args(x, w_dw, w_pw, bias, stride, padding, dilation, prologue, middle, epilogue, residual)
        return args, _remember(key, args, separable_problem(args))
    return SeparableArgs(
        x, w_dw, w_pw, bias, residual, *_vectors(prologue), *_vectors(middle), *_vectors(epilogue),
        known.geometry, known.activations, known.alphas,
    ), known.problem  # fmt: skip


def checked_depthwise_args(
    x: Tensor,
    w_dw: Tensor,
    bias: Optional[Tensor],
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    prologue: Optional[ChannelAffine],
    epilogue: Optional[ChannelAffine],
) -> tuple[DepthwiseArgs, Problem]:
    """:func:`xsep.arguments.depthwise_args`, and their problem."""
    key = _key(stride, padding, dilation, (x, w_dw, bias), (prologue, epilogue))
    known = _known.get(key)
    if known is None:
        args = depthwise_args(x, w_dw, bias, stride, padding, dilation, prologue, epilogue)
        return args, _remember(key, args, depthwise_problem(args))
    return DepthwiseArgs(
        x, w_dw, bias, *_vectors(prologue), *_vectors(epilogue), known.geometry, known.activations, known.alphas
    ), known.problem


def _vectors(affine: Optional[ChannelAffine]) -> tuple[Optional[Tensor], Optional[Tensor]]:
    return (None, None) if affine is None else (affine.scale, affine.shift)


def _key(
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    tensors: tuple[Optional[Tensor], ...],
    affines: tuple[Optional[ChannelAffine], ...],
) -> Any:
    """All that the checks look at; None where something is not even of its kind, which the checks will say.

    Options go in as text: 1, 1.0 and True are equal, but not equally right.
    """
    key: list[Any] = [f"{stride!r} {padding!r} {dilation!r}"]
    try:
        for t in tensors:
            key.append(None if t is None else (t.shape, t.stride(), t.dtype, t.device))
        for affine in affines:
            if affine is None:
                key.append(None)
            else:
                for v in (affine.scale, affine.shift):
                    key.append(None if v is None else (v.shape, v.dtype, v.device))
                key.append((type(affine), affine.activation, repr(affine.alpha)))
        whole = tuple(key)
        hash(whole)
        return whole
    except (AttributeError, TypeError, RuntimeError):  # a sparse tensor has no strides; symbols have no hash
        return None


def _remember(key: Any, args: Any, problem: Problem) -> Problem:
    if key is not None:
        if len(_known) >= MOST:
            _known.clear()
        _known[key] = Checked(args.geometry, args.activations, args.alphas, problem)
    return problem
