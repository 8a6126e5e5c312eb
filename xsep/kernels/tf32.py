"""TF32: float32 of which a product reads 10 bits of mantissa.

``tl.dot`` hands the tensor cores float32 as it is, and they drop the low 13 bits. The error of that has one sign and is
about 2.6 times what rounding leaves, which is what PyTorch's libraries and xsep's CUDA kernels do.
"""

import triton
import triton.language as tl


@triton.jit
def operand(v, PRECISION: tl.constexpr):
    """v for a product: float32 where PRECISION is "tf32" as nearest TF32 numbers, ties away from zero; else as it is.

    The three instructions that ``cvt.rna.tf32`` is, as integers, which the interpreter and other cards have too.
    """
    if PRECISION == "tf32" and v.dtype == tl.float32:
        bits = v.to(tl.int32, bitcast=True)
        # Infinity comes out as it is. NaN may have all its bits set, and the carry would make zero of it.
        bits = tl.where(v == v, (bits + 0x1000) & -0x2000, bits)
        v = bits.to(tl.float32, bitcast=True)
    return v


@triton.jit
def round_weights(
    weight,  # [elements] float32
    rounded,  # [elements] float32
    elements,
    ELEMENTS: tl.constexpr,
):
    """Once, by a launch, and not in every program that multiplies by them.

    There it would be 3 to 7 % of the fused kernel's instructions, and a pipelined kernel's weights, which are copied to
    shared memory behind the program's back, would have to pass through registers.
    """
    i = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    ok = i < elements
    tl.store(rounded + i, operand(tl.load(weight + i, mask=ok, other=0.0), "tf32"), mask=ok)
