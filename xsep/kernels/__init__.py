"""Triton kernels: ``@triton.jit`` functions and nothing else.

Importing this package does not import Triton; importing one of its modules does. Every tensor is NHWC in memory
(channels have stride 1); sizes and strides along which vectors run are passed divided by ``VEC``, the number of
channels every address is aligned to, and multiplied again inside, so that the compiler knows the divisibility that
Triton's own specialisation (multiples of 16 only) would not tell it for, say, 728 channels.

What a kernel may be given, and how big its tiles are, is decided in :mod:`xsep.backends.triton_plans`.
"""
