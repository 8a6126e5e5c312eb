"""Activations and their derivatives on float32 tensors, by code (see ``xsep.problem.ACTIVATIONS``)."""

import triton
import triton.language as tl

IDENTITY = tl.constexpr(0)
RELU = tl.constexpr(1)
RELU6 = tl.constexpr(2)
SILU = tl.constexpr(3)
HARDSWISH = tl.constexpr(4)
GELU = tl.constexpr(5)
GELU_TANH = tl.constexpr(6)
ELU = tl.constexpr(7)
LEAKY_RELU = tl.constexpr(8)


@triton.jit
def sigmoid(u):
    return 1.0 / (1.0 + tl.exp(-u))


@triton.jit
def activate(u, alpha, CODE: tl.constexpr):
    """act(u). relu and relu6 let NaN through, as PyTorch's do."""
    if CODE == RELU:
        u = tl.maximum(u, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif CODE == RELU6:
        u = tl.minimum(tl.maximum(u, 0.0, propagate_nan=tl.PropagateNan.ALL), 6.0, propagate_nan=tl.PropagateNan.ALL)
    elif CODE == SILU:
        u = u * sigmoid(u)
    elif CODE == HARDSWISH:
        gate = u + 3.0
        u = u * tl.where(gate < 0.0, 0.0, tl.where(gate > 6.0, 6.0, gate)) * (1.0 / 6.0)
    elif CODE == GELU:
        u = 0.5 * u * (1.0 + tl.erf(u * 0.7071067811865476))
    elif CODE == GELU_TANH:
        # (1 + tanh(v)) / 2 is sigmoid(2 v), which keeps its digits where tanh is near -1.
        u = u * sigmoid(1.5957691216057308 * (u + 0.044715 * u * u * u))
    elif CODE == ELU:
        # Not minimum(u, 0), which would turn NaN into 0.
        u = tl.where(u > 0.0, u, alpha * (tl.exp(tl.where(u > 0.0, 0.0, u)) - 1.0))
    elif CODE == LEAKY_RELU:
        u = tl.where(u > 0.0, u, alpha * u)
    return u


@triton.jit
def activation_gradient(d, u, alpha, CODE: tl.constexpr):
    """d * act'(u), with PyTorch's conventions at the kinks."""
    if CODE == RELU:
        d = tl.where(u > 0.0, d, 0.0)
    elif CODE == RELU6:
        d = tl.where((u > 0.0) & (u < 6.0), d, 0.0)
    elif CODE == SILU:
        s = sigmoid(u)
        d = d * (s * (1.0 + u * (1.0 - s)))
    elif CODE == HARDSWISH:
        d = tl.where(u > -3.0, tl.where(u < 3.0, d * (u * (1.0 / 3.0) + 0.5), d), 0.0)
    elif CODE == GELU:
        cdf = 0.5 * (1.0 + tl.erf(u * 0.7071067811865476))
        d = d * (cdf + u * tl.exp(-0.5 * u * u) * 0.3989422804014327)
    elif CODE == GELU_TANH:
        s = sigmoid(1.5957691216057308 * (u + 0.044715 * u * u * u))
        d = d * (s + u * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * u * u))
    elif CODE == ELU:
        d = tl.where(u > 0.0, d, d * alpha * tl.exp(tl.where(u > 0.0, 0.0, u)))
    elif CODE == LEAKY_RELU:
        d = tl.where(u > 0.0, d, d * alpha)
    return d


@triton.jit
def vector(pointer, offsets, mask):
    """[1, channels] float32 of a vector that may be None, as a tuple of one tensor or of none."""
    loaded = ()
    if pointer is not None:
        loaded = (tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)[None, :],)
    return loaded


@triton.jit
def scaled(u, scale, shift, loaded_scale, loaded_shift):
    """scale * u + shift, where :func:`vector` has loaded them.

    With the pointers too: Triton tells the calls of a function apart by what their tuples hold, not by which of the
    tuples holds it.
    """
    if scale is not None:
        u = u * loaded_scale[0]
    if shift is not None:
        u = u + loaded_shift[0]
    return u


@triton.jit
def affine(u, scale, shift, offsets, mask):
    """scale * u + shift per channel; scale and shift [C] may be None. u: [rows, channels], offsets: [channels]."""
    return scaled(u, scale, shift, vector(scale, offsets, mask), vector(shift, offsets, mask))
