"""The training chain's CUDA operators, as the emulator runs their kernels on CPU tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from xsep.problem import Geometry

from . import emulated
from .emulated import ChannelAffine, ChannelVector, Epilogue, Guarded, Library, _ints, pointer

Maybe = Optional[Tensor]


def _pointers(names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_void_p) for name in names.split()]


class ImageShape(ctypes.Structure):
    _fields_ = _ints("n h w c")


class ImagePlan(ctypes.Structure):
    _fields_ = _ints("vec vectors slices lanes workers")


_START = [("shape", ImageShape), ("plan", ImagePlan), ("type", ctypes.c_int)]


class RawGradient(ctypes.Structure):
    _fields_ = [*_START, *_pointers("du taps r coef dr"), *_ints("pooled_h pooled_w pad_top pad_left")]


class BackwardPlan(ctypes.Structure):
    """ChainBackwardPlan, its layout written out."""

    _fields_ = [
        ("fused", ctypes.c_bool),
        *_ints("tile_rows halo_pixels tiles_down tiles_across tiles workers blocks_in blocks_out shares pitch_in"),
        *_ints("pitch_out dr_bytes dr x z dz w_pw taps affines coef shared_bytes"),
    ]


class FusedBackward(ctypes.Structure):
    _fields_ = [
        ("plan", BackwardPlan), ("gradient", RawGradient), ("depthwise", emulated.DepthwiseBprop),
        *_pointers("w_pw dw_pw_partials dw_pw"),
    ]  # fmt: skip


class Statistics(ctypes.Structure):
    _fields_ = [*_START, *_pointers("r partials counts")]


class Apply(ctypes.Structure):
    _fields_ = [*_START, *_pointers("x residual y"), ("load", ChannelAffine)]


class InputGradient(ctypes.Structure):
    _fields_ = [*_START, *_pointers("e x residual dx partials sums"), ("load", ChannelAffine), ("epilogue", Epilogue)]


class PoolAdd(ctypes.Structure):
    _fields_ = [*_START, *_pointers("r vec s vec_s t taps chosen"), *_ints("pooled_h pooled_w pad_top pad_left")]


class Average(ctypes.Structure):
    _fields_ = [*_START, *_pointers("r vec pooled positive total")]


class AverageBackward(ctypes.Structure):
    _fields_ = [*_START, *_pointers("g r vec mean positive total du sums")]


class Finalize(ctypes.Structure):
    _fields_ = [
        *_ints("channels tiles groups"),
        *_pointers("partials counts merged gamma beta running_mean running_var batches"),
        ("momentum", ctypes.c_double), ("eps", ctypes.c_double), *_pointers("vec mean invstd count"),
    ]  # fmt: skip


class BackwardFinalize(ctypes.Structure):
    _fields_ = [*_ints("channels batch"), *_pointers("sums mean invstd gamma count coef dgamma dbeta")]


def load_of(vec: Maybe, activation: int, alpha: float) -> ChannelAffine:
    """vec must live as long as what is returned."""
    if vec is None:
        return ChannelAffine(ChannelVector(None, 0), ChannelVector(None, 0), activation, alpha)
    assert vec.dtype == torch.float32 and vec.is_contiguous()
    return ChannelAffine(ChannelVector(vec[0].data_ptr(), 1), ChannelVector(vec[1].data_ptr(), 1), activation, alpha)


def check_nhwc(*images: Maybe) -> None:
    for t in images:
        assert t is None or t.is_contiguous(memory_format=torch.channels_last)


class EmulatedChain:
    """Stands in for ``torch.ops.xsep``. Inputs lie between margins of NaN, and so do the results."""

    def __init__(self, seed: int = 0, multiprocessors: int = 1, aligned: bool = True) -> None:
        self.library = Library(emulated.build("chain"), seed)
        self.depthwise = Library(emulated.build("depthwise"), seed)
        self.fused = Library(emulated.build("fused_backward"), seed)
        self.device = emulated.Device(multiprocessors, 227 * 1024, 0)
        self.aligned = aligned
        self.kept: list[Guarded] = []
        self.fused_backwards = 0

    def image(self, t: Maybe) -> Optional[int]:
        check_nhwc(t)
        return None if t is None else self.keep(t.permute(0, 2, 3, 1))

    def keep(self, t: Maybe) -> Optional[int]:
        if t is None:
            return None
        self.kept.append(Guarded.of(t))
        return self.kept[-1].tensor.data_ptr()

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Guarded:
        return Guarded(shape, dtype)

    def start(self, x: Tensor, ctas: int, pixels: Optional[int] = None) -> tuple[Any, ...]:
        n, c, h, w = x.shape
        plan = ImagePlan()
        self.library.lib.emulate_plan_images(
            ctypes.c_int64(n * h * w if pixels is None else pixels), c, x.dtype.itemsize, int(self.aligned), ctas,
            ctypes.byref(self.device), ctypes.byref(plan),
        )  # fmt: skip
        return ImageShape(n, h, w, c), plan, emulated.TYPES[x.dtype]

    def conv_shape(self, x: Tensor, w_dw: Tensor, geometry: list[int]) -> emulated.ConvShape:
        (n, c, h, w), g = x.shape, Geometry(*geometry)
        return emulated.ConvShape(
            n, h, w, c, *g.output_size(h, w, *w_dw.shape[2:]), c, *w_dw.shape[2:], g.stride_h, g.stride_w, g.pad_top,
            g.pad_left, g.dilation_h, g.dilation_w,
        )  # fmt: skip

    def call(self, name: str, params: ctypes.Structure) -> None:
        library = self.fused if name == "fused_backward" else self.library
        library.call(f"emulate_{name}", params)
        for guarded in self.kept:
            guarded.check()
        self.kept.clear()

    def cuda_chain_raw_gradient(self, du: Tensor, taps: Maybe, r: Tensor, coef: Tensor, pads: list[int]) -> Tensor:
        n, c, h, w = r.shape
        dr = self.new(n, h, w, c, dtype=r.dtype)
        self.call("raw_gradient", RawGradient(
            *self.start(r, 12), self.image(du), self.image(taps), self.image(r), self.keep(coef), pointer(dr.tensor),
            *du.shape[2:], *pads,
        ))  # fmt: skip
        return dr.check().permute(0, 3, 1, 2)

    def cuda_chain_statistics(self, r: Tensor, partials: Tensor, counts: Tensor) -> None:
        n, c, h, w = r.shape
        tiles = -(-n * h * w // 128)
        assert partials.shape == (tiles, 3, c) and counts.shape == (tiles,)
        found, numbers = self.new(tiles, 3, c), self.new(tiles, dtype=torch.int32)
        self.call("tile_statistics", Statistics(
            *self.start(r, 12), self.image(r), pointer(found.tensor), pointer(numbers.tensor)
        ))  # fmt: skip
        partials.copy_(found.check())
        counts.copy_(numbers.check())

    def cuda_chain_apply(self, x: Tensor, residual: Maybe, vec: Maybe, activation: int, alpha: float) -> Tensor:
        n, c, h, w = x.shape
        y = self.new(n, h, w, c, dtype=x.dtype)
        self.call("apply_load", Apply(
            *self.start(x, 12), self.image(x), self.image(residual), pointer(y.tensor), load_of(vec, activation, alpha),
        ))  # fmt: skip
        return y.check().permute(0, 3, 1, 2)

    def epilogue(
        self,
        x: Tensor,
        x_place: Optional[int],
        shortcut: Maybe,
        operands: Sequence[Maybe],
        centres: Maybe,
        before: bool,
    ) -> Epilogue:
        there = [o for o in operands if o is not None]
        assert not there or (centres is not None and centres.shape == (1 + len(there), x.shape[1]))
        step = 1 if shortcut is None or shortcut.shape == x.shape else 2
        # x itself is told by its address.
        places = [x_place if o is not None and o.data_ptr() == x.data_ptr() else self.image(o) for o in operands]
        return Epilogue(
            self.image(shortcut),
            step,
            int(before),
            1 + len(there),
            (ctypes.c_void_p * 2)(*places),
            self.keep(centres if there else None),
        )

    def cuda_chain_input_gradient(
        self, e: Tensor, x: Tensor, residual: Maybe, shortcut: Maybe, operand_1: Maybe, operand_2: Maybe,
        centres: Maybe, vec: Maybe, before_mask: bool, activation: int, alpha: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        n, c, h, w = x.shape
        start, x_place = self.start(x, 4), self.image(x)
        epilogue = self.epilogue(x, x_place, shortcut, (operand_1, operand_2), centres, before_mask)
        changed = activation != 0 or shortcut is not None
        dx = self.new(n, h, w, c, dtype=x.dtype)
        partials, sums = self.new(start[1].workers, epilogue.sums, c), self.new(epilogue.sums, c)
        self.call("input_gradient", InputGradient(
            *start, self.image(e), x_place, self.image(residual), pointer(dx.tensor) if changed else None,
            pointer(partials.tensor), pointer(sums.tensor), load_of(vec, activation, alpha), epilogue,
        ))  # fmt: skip
        assert not partials.check().isnan().any() or e.isnan().any()
        return dx.check().permute(0, 3, 1, 2) if changed else x.new_empty(0), sums.check()

    def cuda_chain_depthwise_bprop(
        self, dz: Tensor, x: Tensor, w_dw: Tensor, vec: Maybe, shortcut: Maybe, operand_1: Maybe, operand_2: Maybe,
        centres: Maybe, before_mask: bool, geometry: list[int], activation: int, alpha: float, dx: Tensor,
        partials: Tensor,
    ) -> None:  # fmt: skip
        """By the depthwise library; dx and partials are written, each in the place it has in a larger tensor."""
        check_nhwc(dx)
        n, c, h, w = x.shape
        shape = self.conv_shape(x, w_dw, geometry)
        assert dz.shape[2:] == (shape.p, shape.q) and w_dw.is_contiguous() and partials.is_contiguous()
        plan = emulated.DepthwisePlan()
        self.depthwise.lib.emulate_plan_depthwise_bprop(
            ctypes.byref(shape), x.dtype.itemsize, int(self.aligned), ctypes.byref(self.device), ctypes.byref(plan)
        )
        assert partials.shape == (plan.workers, w_dw.shape[2] * w_dw.shape[3] + 3, c)
        x_place, out, rows = self.image(x), self.new(n, h, w, c, dtype=x.dtype), self.new(*partials.shape)
        epilogue = self.epilogue(x, x_place, shortcut, (operand_1, operand_2), centres, before_mask)
        self.depthwise.call("emulate_depthwise_bprop_partials", emulated.DepthwiseBprop(
            shape, plan, emulated.TYPES[x.dtype], self.image(dz), x_place, self.keep(w_dw), pointer(out.tensor), None,
            None, None, None, pointer(rows.tensor), load_of(vec, activation, alpha), epilogue,
        ))  # fmt: skip
        dx.copy_(out.check().permute(0, 3, 1, 2))
        partials.copy_(rows.check())
        self.kept.clear()

    def cuda_chain_sum_partials(self, partials: Tensor, w_dw: Tensor, sums: int) -> tuple[Tensor, Tensor]:
        c, _, r, s = w_dw.shape
        assert partials.is_contiguous() and partials.shape[1:] == (r * s + 3, c)
        dw_dw, totals = self.new(*w_dw.shape), self.new(sums, c)
        vectors = [totals.tensor[k].data_ptr() if k < sums else None for k in range(3)]
        shape = emulated.ConvShape(0, 0, 0, c, 0, 0, c, r, s)
        self.depthwise.call("emulate_sum_bprop_partials", emulated.SumPartials(
            shape, 0, partials.shape[0], self.keep(partials), pointer(dw_dw.tensor), (ctypes.c_void_p * 3)(*vectors)
        ))  # fmt: skip
        self.kept.clear()
        return dw_dw.check(), totals.check()

    def backward_plan(self, shape: emulated.ConvShape, c_out: int) -> BackwardPlan:
        plan = BackwardPlan()
        self.fused.lib.emulate_plan_chain_backward(
            ctypes.byref(shape), c_out, 2, int(self.aligned), ctypes.byref(self.device), ctypes.byref(plan)
        )
        return plan

    def cuda_chain_fused_backward(
        self, du: Tensor, taps: Maybe, r: Tensor, coef: Tensor, pads: list[int], w_pw: Tensor, w_dw: Tensor, x: Tensor,
        vec: Maybe, shortcut: Maybe, operand_1: Maybe, operand_2: Maybe, centres: Maybe, before_mask: bool,
        geometry: list[int], activation: int, alpha: float,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        (n, c, h, w), c_out = x.shape, r.shape[1]
        shape, kind = self.conv_shape(x, w_dw, geometry), emulated.TYPES[x.dtype]
        assert r.shape == (n, c_out, shape.p, shape.q) and w_pw.is_contiguous() and w_dw.is_contiguous()
        plan = self.backward_plan(shape, c_out)
        assert plan.fused
        self.fused_backwards += 1
        gradient = RawGradient(
            ImageShape(n, h, w, c_out), ImagePlan(), kind, self.image(du), self.image(taps), self.image(r),
            self.keep(coef), None, *du.shape[2:], *pads,
        )  # fmt: skip
        dx, dw_pw = self.new(n, h, w, c, dtype=x.dtype), self.new(c_out, c)
        partials, rows = self.new(plan.workers, 12, c), self.new(plan.workers * plan.shares, c_out, c)
        x_place = self.image(x)
        epilogue = self.epilogue(x, x_place, shortcut, (operand_1, operand_2), centres, before_mask)
        self.call("fused_backward", FusedBackward(
            plan, gradient, emulated.DepthwiseBprop(
                shape, emulated.DepthwisePlan(), kind, None, x_place, self.keep(w_dw), pointer(dx.tensor), None, None,
                None, None, pointer(partials.tensor), load_of(vec, activation, alpha), epilogue,
            ), self.keep(w_pw), pointer(rows.tensor), pointer(dw_pw.tensor),
        ))  # fmt: skip
        rows.check()
        sums = self.cuda_chain_sum_partials(partials.check(), w_dw, epilogue.sums)
        return dx.check().permute(0, 3, 1, 2), sums[0], dw_pw.check(), sums[1]

    def cuda_chain_bn_pool_add(
        self, r: Tensor, vec: Tensor, s: Tensor, vec_s: Tensor, pads: list[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        n, c, p, q = s.shape
        t, chosen = (self.new(n, p, q, c, dtype=r.dtype) for _ in range(2))
        taps = self.new(n, p, q, c, dtype=torch.uint8)
        self.call("pool_add", PoolAdd(
            *self.start(r, 12, n * p * q), self.image(r), self.keep(vec), self.image(s), self.keep(vec_s),
            *(pointer(g.tensor) for g in (t, taps, chosen)), p, q, *pads,
        ))  # fmt: skip
        first, second, third = (g.check().permute(0, 3, 1, 2) for g in (t, taps, chosen))
        return first, second, third

    def cuda_chain_bn_finalize(
        self, partials: Tensor, counts: Tensor, gamma: Maybe, beta: Maybe, running_mean: Maybe, running_var: Maybe,
        batches: Maybe, momentum: float, eps: float,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        tiles, _, c = partials.shape
        groups = self.library.lib.emulate_merge_groups(ctypes.c_int64(tiles))
        merged, count = self.new(groups, 3, c, dtype=torch.float64), self.new(dtype=torch.float64)
        vec, mean, invstd = self.new(2, c), self.new(c), self.new(c)
        running = [None if t is None else Guarded.of(t) for t in (running_mean, running_var)]
        self.call("bn_finalize", Finalize(
            c, tiles, groups, self.keep(partials), self.keep(counts), pointer(merged.tensor), self.keep(gamma),
            self.keep(beta), *(None if g is None else pointer(g.tensor) for g in running), self.keep(batches), momentum,
            eps, *(pointer(g.tensor) for g in (vec, mean, invstd, count)),
        ))  # fmt: skip
        for t, g in zip((running_mean, running_var), running):
            if t is not None and g is not None:
                t.copy_(g.check())
        assert not merged.check().isnan().any()
        return vec.check(), mean.check(), invstd.check(), count.check()

    def cuda_chain_bn_backward_finalize(
        self, sums: Tensor, mean: Tensor, invstd: Tensor, gamma: Maybe, count: Tensor, batch: bool
    ) -> tuple[Tensor, ...]:
        c = mean.shape[0]
        coef, dgamma, dbeta = self.new(3, c), self.new(c), self.new(c)
        self.call("bn_backward_finalize", BackwardFinalize(
            c, int(batch), *(self.keep(t) for t in (sums, mean, invstd, gamma, count)),
            *(pointer(g.tensor) for g in (coef, dgamma, dbeta)),
        ))  # fmt: skip
        return coef.check(), dgamma.check(), dbeta.check()

    def cuda_chain_bn_relu_gap(self, r: Tensor, vec: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n, c = r.shape[:2]
        pooled, positive, total = self.new(n, c, dtype=r.dtype), self.new(n, c), self.new(n, c)
        self.call("relu_average", Average(
            *self.start(r, 12), self.image(r), self.keep(vec),
            *(pointer(g.tensor) for g in (pooled, positive, total)),
        ))  # fmt: skip
        return pooled.check(), positive.check(), total.check()

    def cuda_chain_bn_relu_gap_backward(
        self, g: Tensor, r: Tensor, vec: Tensor, mean: Tensor, positive: Tensor, total: Tensor
    ) -> tuple[Tensor, Tensor]:
        n, c, h, w = r.shape
        du, sums = self.new(n, h, w, c, dtype=r.dtype), self.new(2, c)
        self.call("relu_average_backward", AverageBackward(
            *self.start(r, 12), self.keep(g), self.image(r), *(self.keep(t) for t in (vec, mean, positive, total)),
            pointer(du.tensor), pointer(sums.tensor),
        ))  # fmt: skip
        return du.check().permute(0, 3, 1, 2), sums.check()
