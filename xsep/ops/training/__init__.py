"""Ops that the training chain stands on; :mod:`xsep.ops.training.calls` has them as Python functions."""

import functools

from . import backward, batchnorm, forward
from .calls import (
    bn_backward_finalize,
    bn_dgrad,
    bn_finalize,
    bn_pool_add,
    bn_relu_gap,
    pw_backward,
    pw_fprop,
    sep_backward,
    sep_dgrad,
    sep_fprop,
    sep_wgrad_pw,
)

#: The two that have kernels in Triton, under the names by which its tests on a GPU know them.
separable_fprop_statistics = functools.partial(sep_fprop, backend="triton")
batch_norm_finalize = functools.partial(bn_finalize, backend="triton")

__all__ = [
    "backward",
    "batch_norm_finalize",
    "batchnorm",
    "bn_backward_finalize",
    "bn_dgrad",
    "bn_finalize",
    "bn_pool_add",
    "bn_relu_gap",
    "forward",
    "pw_backward",
    "pw_fprop",
    "sep_backward",
    "sep_dgrad",
    "sep_fprop",
    "sep_wgrad_pw",
    "separable_fprop_statistics",
]
