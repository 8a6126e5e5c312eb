"""The ``cuda`` backend: CUDA C++ kernels for NVIDIA GPUs of compute capability 8.0 and up.

The kernels work on NHWC; a contiguous NCHW input is converted once, and the result converted back. Where one CTA can
hold all of C_out the separable forward is one kernel and z never leaves the chip; elsewhere it is staged: our depthwise
kernel, then PyTorch's GEMM. ``xsep/_C_cuda.so`` is loaded on first need.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple, Optional, Union

import torch
from torch import Tensor

from .. import extension
from ..activations import activate, scale_and_shift
from ..problem import IDENTITY, Affine, DepthwiseArgs, Geometry, Problem, SeparableArgs, separable_problem
from .base import Backend, DepthwiseGradients, Gradients, only_bias_follows, where_only_bias_follows, with_bias
from .pointwise import product, settings_differ, tf32_allowed

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOWEST_CAPABILITY = (8, 0)
#: A grid is at most so high, and the kernels for everything give 32 channels to each of its rows.
MOST_CHANNELS = 65535 * 32

_OTHER_ARCHITECTURE = (
    "xsep's CUDA library was built for {built}, and this device is {here}: set TORCH_CUDA_ARCH_LIST and build again"
)
#: What CUDA answers, from cudaError_t, where a library cannot run on the device it finds.
_PROBE_ANSWERS = {
    35: "the NVIDIA driver is too old for the CUDA version that xsep's CUDA library was built with: update the driver",
    98: _OTHER_ARCHITECTURE,
    100: "CUDA finds no device",
    209: _OTHER_ARCHITECTURE,
    222: "the NVIDIA driver is too old for the PTX in xsep's CUDA library: update it, or build for this device's "
    "architecture ({here})",
}


class DeviceFacts(NamedTuple):
    """What a plan depends on."""

    multiprocessors: int
    shared_bytes: int  # a CTA can have, with opt-in
    l2_bytes: int = 0


@cache
def device_facts(index: int) -> DeviceFacts:
    """Facts about a CUDA device; needs the library loaded."""
    return DeviceFacts(*torch.ops.xsep.cuda_device_facts(index))


@cache
def _device_reasons(index: int) -> list[str]:
    """Why the loaded library cannot run on a device."""
    capability = torch.cuda.get_device_capability(index)
    here = f"sm_{capability[0]}{capability[1]}"
    if capability < LOWEST_CAPABILITY:
        return [f"its kernels need compute capability 8.0, and this device has {capability[0]}.{capability[1]}"]
    with torch.cuda.device(index):
        answer = torch.ops.xsep.cuda_probe()
    if answer == 0:
        return []
    built = ", ".join(f"sm_{a // 10}" for a in torch.ops.xsep.cuda_architectures())
    sentence = _PROBE_ANSWERS.get(answer, f"CUDA refuses to run its code (cudaError {answer})")
    return [sentence.format(built=built, here=here)]


def shape_of(problem: Problem) -> tuple[int, ...]:
    """The planner's ConvShape: N, H, W, C_in, P, Q, C_mid, R, S, strides, padding top and left, dilations."""
    p, g = problem, problem.geometry
    return (
        p.n, p.h, p.w, p.c_in, *p.output_size, p.c_mid, p.r, p.s, g.stride_h, g.stride_w, g.pad_top, g.pad_left,
        g.dilation_h, g.dilation_w,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def fused_plan(problem: Problem, device: DeviceFacts, aligned: bool = True) -> Any:
    """The planner's plan of a separable problem in one kernel; None where it takes more than one."""
    module = extension.binding()
    if module is None or problem.multiplier != 1:
        return None
    plan = module.plan_cuda_separable_fprop(
        shape_of(problem), c_out=problem.c_out, element_bytes=problem.dtype.itemsize, aligned=aligned,
        multiprocessors=device.multiprocessors, shared_bytes=device.shared_bytes,
    )  # fmt: skip
    return plan if plan.fused else None


def is_fused(problem: Problem, device: DeviceFacts, aligned: bool = True) -> bool:
    """Whether the planner runs a separable problem in one kernel."""
    return fused_plan(problem, device, aligned) is not None


@lru_cache(maxsize=4096)
def wgrad_plan(problem: Problem, device: DeviceFacts, of: str = "separable") -> Any:
    """The planner's plan of the pointwise weights' gradient with z on the chip; None where there is no such kernel.

    ``of`` a "chain", dr is formed on the chip too.
    """
    module = extension.binding()
    if module is None or problem.multiplier != 1:
        return None
    plan = getattr(module, f"plan_cuda_{of}_wgrad")(
        shape_of(problem), c_out=problem.c_out, element_bytes=problem.dtype.itemsize, **device._asdict()
    )
    return plan if plan.on_chip else None


def describe(problem: Problem, device: DeviceFacts) -> str:
    """The plan for a problem on a device, in one line; the planner's words, whether or not there is such a device."""
    module = extension.binding()
    if module is None:
        return "staged: the planner is not built"
    p = problem
    facts = {"element_bytes": p.dtype.itemsize, "multiprocessors": device.multiprocessors,
             "shared_bytes": device.shared_bytes}  # fmt: skip
    layout = "" if p.channels_last else ", x and y converted to and from NHWC"
    plan = fused_plan(p, device) if p.op == "separable" else None
    if plan is not None:
        weights = "kept in" if plan.keeps_w_pw else "passed through"
        return (
            f"fused, {plan.workers} CTAs of {32 * plan.warps} threads walk over {plan.tiles} tiles of {plan.tile_rows} "
            f"x {plan.tile_columns} pixels and all {p.c_out} channels, {plan.chunk_bytes} bytes of channels a step, "
            f"{plan.halos} buffers for x, w_pw {weights} shared memory, of which {plan.shared_bytes} bytes are "
            f"taken{layout}"
        )
    plan = module.plan_cuda_depthwise_fprop(shape_of(p), **facts)
    if plan.sliding_window:
        depthwise = (
            f"sliding windows, {plan.workers * plan.slices} CTAs of {plan.vectors * plan.vec} channels and "
            f"{plan.strips_down * plan.strip_rows} x {plan.strips_across * 4} pixels"
        )
    else:
        depthwise = "the general kernel"
    if p.op == "depthwise":
        return f"depthwise, {depthwise}{layout}"
    return f"staged, depthwise by {depthwise}, then a GEMM{layout}"


def nhwc(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def vectors_of(affine: Affine) -> tuple[Optional[Tensor], Optional[Tensor]]:
    scale, shift = affine.scale, affine.shift
    return None if scale is None else scale.contiguous(), None if shift is None else shift.contiguous()


def is_aligned(*tensors: Optional[Tensor]) -> bool:
    return all(t is None or t.data_ptr() % 16 == 0 for t in tensors)


def _laid_out(a: SeparableArgs) -> SeparableArgs:
    """a with images and weights as the operators ask for them."""
    residual = None if a.residual is None else nhwc(a.residual)
    return a._replace(x=nhwc(a.x), w_dw=a.w_dw.contiguous(), w_pw=a.w_pw.contiguous(), residual=residual)


def _is_product_behind_kernel(a: SeparableArgs) -> bool:
    """Whether what follows w_pw is at most one shift of x's type, which PyTorch's product takes along."""
    if a.scale_e is not None or a.residual is not None or a.activations[2] != IDENTITY:
        return False
    shift = a.bias if a.shift_e is None else a.shift_e
    return shift is None or (shift.dtype == a.x.dtype and (a.bias is None or a.shift_e is None))


def wgrad_on_chip(dy: Tensor, x: Tensor, w_dw: Tensor, prologue: Affine, geometry: Geometry) -> Tensor:
    """dw_pw [C_out, C_in] in float32, of NHWC images at 16-byte addresses; only where there is a ``wgrad_plan``."""
    found: Tensor = torch.ops.xsep.cuda_separable_wgrad(
        dy, x, w_dw.contiguous(), *vectors_of(prologue), list(geometry), prologue.activation, prologue.alpha
    )
    return found


class CudaBackend(Backend):
    name = "cuda"

    def not_supported_reasons(self, problem: Problem) -> list[str]:
        reasons = []
        if problem.device != "cuda":
            reasons.append(f"its kernels run on NVIDIA GPUs, and the tensors are on {problem.device}")
        elif torch.version.hip is not None:
            reasons.append("its kernels run on NVIDIA GPUs, and this PyTorch is built for AMD's")
        if problem.dtype not in DTYPES:
            reasons.append(f"its kernels take float32, bfloat16 and float16, not {problem.dtype}".replace("torch.", ""))
        most = max(problem.c_mid, problem.c_out)
        if most > MOST_CHANNELS:
            reasons.append(f"its kernels take up to {MOST_CHANNELS} channels, not {most}")
        missing = extension.load_cuda().reason
        if missing:
            reasons.append(f"{missing}, on a machine with nvcc")
        elif not reasons:
            reasons.extend(_device_reasons(torch.cuda.current_device()))
        return reasons

    def plan(self, problem: Problem) -> str:
        return describe(problem, device_facts(torch.cuda.current_device()))

    def depthwise(self, x: Tensor, w_dw: Tensor, prologue: Affine, epilogue: Affine, geometry: Geometry) -> Tensor:
        n, _, h, w = x.shape
        if x.numel() == 0 or w_dw.numel() == 0:
            p, q = geometry.output_size(h, w, *w_dw.shape[2:])
            return torch.empty((n, w_dw.shape[0], p, q), dtype=x.dtype, device=x.device)
        return torch.ops.xsep.cuda_depthwise_fprop(
            nhwc(x), w_dw.contiguous(), *vectors_of(prologue), *vectors_of(epilogue), list(geometry),
            [prologue.activation, epilogue.activation], [prologue.alpha, epilogue.alpha],
        )  # fmt: skip

    def depthwise_backward_kernel(
        self, dz: Tensor, x: Tensor, w_dw: Tensor, prologue: Affine, geometry: Geometry, wanted: Sequence[bool]
    ) -> DepthwiseGradients:
        w_x, w_w, w_scale, w_shift = wanted
        if x.numel() == 0 or dz.numel() == 0:
            zeros = x.new_zeros(x.shape[1], dtype=torch.float32)
            return DepthwiseGradients(
                torch.zeros_like(x) if w_x else None, torch.zeros_like(w_dw) if w_w else None,
                zeros if w_scale else None, zeros.clone() if w_shift else None,
            )  # fmt: skip
        dx, dw_dw, dscale, dshift = torch.ops.xsep.cuda_depthwise_bprop(
            nhwc(dz), nhwc(x), w_dw.contiguous(), *vectors_of(prologue), None, list(geometry), prologue.activation,
            prologue.alpha, [int(f) for f in wanted],
        )  # fmt: skip
        return DepthwiseGradients(
            dx if w_x else None,
            dw_dw if w_w else None,
            dscale if w_scale else None,
            dshift if w_shift else None,
        )

    def is_one_call(self, a: Union[SeparableArgs, DepthwiseArgs]) -> bool:
        """In one kernel, or in two around a product of PyTorch's."""
        if isinstance(a, DepthwiseArgs):
            return a.x.numel() > 0 and a.w_dw.numel() > 0
        if a.x.numel() == 0 or a.w_pw.numel() == 0:
            return False
        if _is_product_behind_kernel(a) and not settings_differ(a.x):
            return True  # whatever the plan
        a = _laid_out(a)
        problem = separable_problem(a)._replace(device="cuda")
        return is_fused(problem, device_facts(a.x.get_device()), is_aligned(a.x, a.w_pw, a.residual))

    def is_one_backward(self, a: Union[SeparableArgs, DepthwiseArgs]) -> bool:
        if not only_bias_follows(a) or a.x.numel() == 0 or a.w_dw.numel() == 0:
            return False
        return isinstance(a, DepthwiseArgs) or (a.w_pw.numel() > 0 and not settings_differ(a.x))

    def separable_forward(self, a: SeparableArgs) -> Tensor:
        a = _laid_out(a)
        if not self.is_one_call(a):
            return self._staged(a)
        return torch.ops.xsep.cuda_separable_fprop(
            a.x, a.w_dw, a.w_pw, None if a.bias is None else a.bias.contiguous(), a.residual, *vectors_of(a.prologue),
            *vectors_of(a.middle), *vectors_of(a.epilogue), a.geometry, a.activations, a.alphas, tf32_allowed(),
        )  # fmt: skip

    def separable_backward(
        self, dy: Tensor, a: SeparableArgs, y: Optional[Tensor], wanted: Sequence[bool]
    ) -> Gradients:
        if wanted[4] or not self.is_one_backward(a):
            return super().separable_backward(dy, a, y, wanted)
        kernel = torch.ops.xsep.cuda_separable_bprop(
            nhwc(dy), nhwc(a.x), a.w_dw.contiguous(), a.w_pw.contiguous(), *vectors_of(a.prologue), a.geometry,
            a.activations[0], a.alphas[0], [int(wanted[i]) for i in (0, 1, 2, 5, 6)],
        )  # fmt: skip
        return where_only_bias_follows(kernel, dy, wanted)

    def _staged(self, a: SeparableArgs) -> Tensor:
        """Depthwise kernel, GEMM, and what of the epilogue the GEMM cannot take."""
        z = self.depthwise(a.x, a.w_dw, a.prologue, a.middle, Geometry(*a.geometry))
        epilogue = with_bias(a.epilogue, a.bias)
        if epilogue.scale is None and epilogue.shift is not None and epilogue.shift.dtype == z.dtype:
            v, epilogue = product(z, a.w_pw, epilogue.shift), epilogue._replace(shift=None)
        else:
            v = product(z, a.w_pw)
        u = scale_and_shift(v, epilogue)
        u = u if a.residual is None else u + a.residual
        return u if epilogue.activation == IDENTITY else activate(u, epilogue.activation, epilogue.alpha)


CUDA = CudaBackend()
