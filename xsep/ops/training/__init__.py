"""Ops that the training chain stands on; :mod:`xsep.ops.training.calls` has them as Python functions."""

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

__all__ = [
    "backward",
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
]
