"""The training chain's own CUDA operators, on images brought into the layout they ask for.

They take no empty tensor, so what an empty batch gives is said here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from .. import extension
from ..problem import Geometry, Problem
from .chain import TILE, Load, RawGradient, Shortcut, tiles_of
from .cuda import DeviceFacts, is_aligned, nhwc, shape_of, wgrad_plan
from .pointwise import rows_of

#: Sums that the depthwise backward's kernel can leave beside those of dw_dw.
MOST_SUMS = 3
#: Tiles of the statistics that one launch takes: their pixels count as one image's height, which has 31 bits.
MOST_TILES = 2**23


def ready(t: Tensor) -> Tensor:
    """NHWC at an address that 16-byte accesses can use: the plan, and so the tiles, must not depend on it."""
    t = nhwc(t)
    return t if is_aligned(t) else t.clone(memory_format=torch.channels_last)


def _ready(t: Optional[Tensor]) -> Optional[Tensor]:
    return None if t is None else ready(t)


def _floats(t: Optional[Tensor]) -> Optional[Tensor]:
    return None if t is None else t.float().contiguous()


class BackwardPlan(NamedTuple):
    """How a layer's backward goes over the batch: all of it in one pass, or some pictures at a time."""

    slices: tuple[slice, ...]
    rows: tuple[int, ...]  # of partial sums that each slice leaves
    fused: bool = False
    on_chip: str = ""  # what stays there for dw_pw, kernel by kernel: nothing, "z", or "dr and z"


@lru_cache(maxsize=4096)
def slices(problem: Problem, device: DeviceFacts) -> tuple[slice, ...]:
    """Pictures of which a layer's staged forward, or its backward, are worked on at a time."""
    module = extension.binding()
    if module is None:
        return (slice(0, problem.n),)
    pictures = module.plan_cuda_chain_slice(
        shape_of(problem), c_out=problem.c_out, element_bytes=problem.dtype.itemsize, **device._asdict()
    )
    return slices_of(problem.n, pictures)


@lru_cache(maxsize=4096)
def backward_plan(problem: Problem, device: DeviceFacts, pooled: bool = False) -> Optional[BackwardPlan]:
    """The planner's plan of a layer's backward; None where the planner is not built.

    ``pooled``: dr comes through a pool, for which no kernel forms it beside dw_pw.
    """
    module = extension.binding()
    if module is None:
        return None
    parts = slices(problem, device)
    found, one_pass = _staged(module, problem, device, parts), _one_pass(module, problem, device)
    plans = wgrad_plans(problem._replace(n=parts[0].stop), device, pooled) if parts else {}
    paying = {what: plan for what, plan in plans.items() if plan.pays}
    saved = len(parts) * sum(plan.staged_clocks - plan.clocks for plan in paying.values())
    fused = one_pass.fused and one_pass.clocks < one_pass.staged_clocks - saved
    return found._replace(fused=fused, on_chip=[*paying][-1] if paying and not fused else "")


def wgrad_plans(problem: Problem, device: DeviceFacts, pooled: bool = False) -> dict[str, Any]:
    """The planner's plans of dw_pw by what stays on the chip, where there are such kernels; the best comes last."""
    plans = {"z": wgrad_plan(problem, device), "dr and z": None if pooled else wgrad_plan(problem, device, "chain")}
    return {what: plan for what, plan in plans.items() if plan is not None}


def _one_pass(module: Any, problem: Problem, device: DeviceFacts) -> Any:
    return module.plan_cuda_chain_backward(
        shape_of(problem), c_out=problem.c_out, element_bytes=problem.dtype.itemsize, **device._asdict()
    )


def _staged(module: Any, problem: Problem, device: DeviceFacts, parts: tuple[slice, ...]) -> BackwardPlan:
    """Kernel by kernel over these parts of the batch."""
    size = problem.dtype.itemsize
    rows = (
        module.plan_cuda_depthwise_bprop(
            shape_of(problem._replace(n=part.stop - part.start)), element_bytes=size, **device._asdict()
        ).workers
        for part in parts
    )  # fmt: skip
    return BackwardPlan(parts, tuple(rows))


@lru_cache(maxsize=4096)
def backward_ways(problem: Problem, device: DeviceFacts) -> dict[str, BackwardPlan]:
    """Every way of a layer's backward that there is, whatever the planner chooses: for who measures them."""
    module = extension.binding()
    if module is None:
        return {}
    p, q = problem.output_size
    # As weigh_chain_slice has it: what one kernel writes for the next stays in half of L2.
    fitting = device.l2_bytes // 2 // (p * q * (problem.c_out + problem.c_mid) * problem.dtype.itemsize)
    found = {"kernel by kernel": _staged(module, problem, device, slices_of(problem.n, problem.n))}
    for what in wgrad_plans(problem, device):
        found[f"kernel by kernel, {what} on the chip"] = found["kernel by kernel"]._replace(on_chip=what)
    if 1 <= fitting < problem.n:
        found["in slices"] = _staged(module, problem, device, slices_of(problem.n, fitting))
    if _one_pass(module, problem, device).fused:
        found["in one pass"] = found["kernel by kernel"]._replace(fused=True)
    return found


def describe_backward(problem: Problem, device: DeviceFacts) -> str:
    """How a layer's backward goes over the batch, in one line."""
    plan = backward_plan(problem, device)
    if plan is None:
        return "by single operators: the planner is not built"
    if plan.fused:
        return "one pass, nothing of it in memory between its steps"
    what = f", {plan.on_chip} on the chip" if plan.on_chip else ""
    if len(plan.slices) == 1:
        return f"kernel by kernel{what}, all pictures at a time"
    return f"kernel by kernel{what}, {len(plan.slices)} slices of up to {plan.slices[0].stop} pictures"


def slices_of(n: int, pictures: int) -> tuple[slice, ...]:
    return tuple(slice(start, min(start + pictures, n)) for start in range(0, n, pictures))


def zeros(like: Tensor, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float32, device=like.device)


def raw_gradient(dr: RawGradient) -> Tensor:
    """a * du + b * r + d, through the pool where there are taps."""
    return torch.empty_like(dr.r) if dr.r.numel() == 0 else form(dense(dr))


def dense(dr: RawGradient) -> RawGradient:
    """With its tensors as the operators ask for them."""
    du = ready(dr.du.to(dr.r.dtype))
    return dr._replace(du=du, r=ready(dr.r), coef=dr.coef.float().contiguous(), taps=_ready(dr.taps))


def form(dr: RawGradient) -> Tensor:
    """Of a dense one, or a slice of it."""
    return torch.ops.xsep.cuda_chain_raw_gradient(dr.du, dr.taps, dr.r, dr.coef, list(dr.pads))


def part_of(dr: RawGradient, pictures: slice) -> RawGradient:
    taps = None if dr.taps is None else dr.taps[pictures]
    return dr._replace(du=dr.du[pictures], r=dr.r[pictures], taps=taps)


def wgrad_of_raw(dr: RawGradient, x: Tensor, load: Load, w_dw: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """(dr, dw_pw [C_out, C_in]) of a dense one without taps, or a slice of it; only where there is such a plan."""
    formed, dw_pw = torch.ops.xsep.cuda_chain_wgrad(
        dr.du, dr.r, dr.coef, x, w_dw.contiguous(), _floats(load.vec), list(geometry), load.activation, load.alpha
    )
    return formed, dw_pw


class TileStatistics:
    """Statistics of a raw output, taken of what is there so far while L2 still has it."""

    def __init__(self, rows: Tensor) -> None:
        """``rows`` [pixels, C], to be written from the first to the last."""
        tiles = tiles_of(rows.shape[0])
        self.rows, self.done = rows, 0
        self.partials = torch.empty((tiles, 3, rows.shape[1]), dtype=torch.float32, device=rows.device)
        self.counts = torch.empty((tiles,), dtype=torch.int32, device=rows.device)

    def add(self, written: int) -> None:
        """Those of the whole tiles among the rows written, and of the short one at the end."""
        last = written // TILE if written < self.rows.shape[0] else self.counts.shape[0]
        for first in range(self.done, last, MOST_TILES):
            stop = min(first + MOST_TILES, last)
            part = self.rows[first * TILE : stop * TILE]
            image = part.view(1, part.shape[0], 1, part.shape[1]).permute(0, 3, 1, 2)
            torch.ops.xsep.cuda_chain_statistics(image, self.partials[first:stop], self.counts[first:stop])
        self.done = last


def tile_statistics(r: Tensor) -> tuple[Tensor, Tensor]:
    rows = rows_of(ready(r))
    found = TileStatistics(rows)
    found.add(rows.shape[0])
    return found.partials, found.counts


def are_movable(*running: Optional[Tensor]) -> bool:
    """Whether the kernel can move these running statistics where they lie."""
    return all(t is None or (t.dtype == torch.float32 and t.is_contiguous()) for t in running)


def bn_finalize(
    partials: Tensor, counts: Tensor, gamma: Optional[Tensor], beta: Optional[Tensor], running_mean: Optional[Tensor],
    running_var: Optional[Tensor], batches: Optional[Tensor], momentum: Optional[float], eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    vec, centres, invstd, count = torch.ops.xsep.cuda_chain_bn_finalize(
        partials.contiguous(), counts.int().contiguous(), _floats(gamma), _floats(beta), running_mean, running_var,
        batches, momentum is None, 0.0 if momentum is None else momentum, eps,
    )  # fmt: skip
    return vec, centres, invstd, count


def bn_backward_finalize(
    sums: Tensor, mean: Tensor, invstd: Tensor, gamma: Optional[Tensor], count: Tensor, batch: bool
) -> tuple[Tensor, Tensor, Tensor]:
    coef, dgamma, dbeta = torch.ops.xsep.cuda_chain_bn_backward_finalize(
        sums.contiguous(), mean.contiguous(), invstd.contiguous(), _floats(gamma), count.double(), batch
    )
    return coef, dgamma, dbeta


def apply_load(x: Tensor, load: Load, residual: Optional[Tensor]) -> Tensor:
    if x.numel() == 0:
        return torch.empty_like(x)
    return torch.ops.xsep.cuda_chain_apply(
        ready(x), _ready(residual), _floats(load.vec), load.activation, load.alpha
    )  # fmt: skip


def two(x: Tensor, operands: Sequence[Tensor]) -> tuple[Optional[Tensor], Optional[Tensor]]:
    """Up to two operands; ``x`` itself where one is that, so that the kernels see it and read it once."""
    found = [*(x if o.data_ptr() == x.data_ptr() else ready(o) for o in operands), None, None]
    return found[0], found[1]


def fused_backward(
    dr: RawGradient, w_pw: Tensor, w_dw: Tensor, x: Tensor, load: Load, geometry: Geometry,
    shortcut: Optional[Shortcut], operands: Sequence[Tensor], centres: Optional[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dw_dw, dw_pw [C_out, C_in], sums) in one pass; ``dr`` and ``x`` are dense."""
    w_pw = w_pw.contiguous()
    dx, dw_dw, dw_pw, sums = torch.ops.xsep.cuda_chain_fused_backward(
        dr.du, dr.taps, dr.r, dr.coef, list(dr.pads), w_pw if is_aligned(w_pw) else w_pw.clone(), w_dw.contiguous(), x,
        _floats(load.vec), None if shortcut is None else ready(shortcut.g), *two(x, operands), _floats(centres),
        shortcut is not None and shortcut.activated, list(geometry), load.activation, load.alpha,
    )  # fmt: skip
    return dx, dw_dw, dw_pw, sums


class InputGradient:
    """The last kernel of a layer's backward, slice by slice: dx and, in the end, dw_dw and the sums."""

    def __init__(
        self, x: Tensor, w_dw: Tensor, load: Load, geometry: Geometry, shortcut: Optional[Shortcut],
        operands: Sequence[Tensor], centres: Optional[Tensor], plan: BackwardPlan,
    ) -> None:  # fmt: skip
        """``x`` is dense."""
        self.x, self.w_dw, self.load, self.geometry = x, w_dw.contiguous(), load, geometry
        self.shortcut = None if shortcut is None else ready(shortcut.g)
        self.before_mask = shortcut is not None and shortcut.activated
        self.operands, self.centres, self.vec = two(x, operands), _floats(centres), _floats(load.vec)
        self.sums = 1 + len(operands)
        self.dx = torch.empty_like(x)
        entries = w_dw.shape[2] * w_dw.shape[3] + MOST_SUMS
        partials = torch.empty((sum(plan.rows), entries, x.shape[1]), dtype=torch.float32, device=x.device)
        self.partials, self.rows = partials, iter(partials.split(plan.rows))

    def add(self, dz: Tensor, pictures: slice) -> None:
        """The next slice."""
        short, *others = (None if t is None else t[pictures] for t in (self.shortcut, *self.operands))
        torch.ops.xsep.cuda_chain_depthwise_bprop(
            dz, self.x[pictures], self.w_dw, self.vec, short, *others, self.centres, self.before_mask,
            list(self.geometry), self.load.activation, self.load.alpha, self.dx[pictures], next(self.rows),
        )  # fmt: skip

    def total(self) -> tuple[Tensor, Tensor]:
        """(dw_dw, sums)"""
        dw_dw, sums = torch.ops.xsep.cuda_chain_sum_partials(self.partials, self.w_dw, self.sums)
        return dw_dw, sums


def load_gradient(
    g: Tensor, x: Tensor, load: Load, residual: Optional[Tensor], operands: Sequence[Tensor],
    centres: Optional[Tensor], shortcut: Optional[Shortcut] = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(gradient of u, sums [1 + K, C]) of g, the gradient of act(u)."""
    if x.numel() == 0:
        return torch.empty_like(x), zeros(x, 1 + len(operands), x.shape[1])
    g, x = ready(g.to(x.dtype)), ready(x)
    du, sums = torch.ops.xsep.cuda_chain_input_gradient(
        g, x, _ready(residual), None if shortcut is None else ready(shortcut.g), *two(x, operands), _floats(centres),
        _floats(load.vec), shortcut is not None and shortcut.activated, load.activation, load.alpha,
    )  # fmt: skip
    return (du if du.numel() > 0 else g), sums


def bn_pool_add(
    r: Tensor, vec: Tensor, s: Tensor, vec_s: Tensor, pads: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    if s.numel() == 0:
        return torch.empty_like(s), torch.empty_like(s, dtype=torch.uint8), torch.empty_like(s)
    t, taps, chosen = torch.ops.xsep.cuda_chain_bn_pool_add(
        ready(r), vec.contiguous(), ready(s), vec_s.contiguous(), list(pads)
    )
    return t, taps, chosen


def bn_relu_gap(r: Tensor, vec: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if r.numel() == 0:
        n, c = r.shape[:2]
        sums = torch.empty((2, n, c), dtype=torch.float32, device=r.device)
        return torch.empty((n, c), dtype=r.dtype, device=r.device), sums[0], sums[1]
    pooled, positive, total = torch.ops.xsep.cuda_chain_bn_relu_gap(ready(r), vec.contiguous())
    return pooled, positive, total


def bn_relu_gap_backward(
    g: Tensor, r: Tensor, vec: Tensor, mean: Tensor, positive: Tensor, total: Tensor
) -> tuple[Tensor, Tensor]:
    if r.numel() == 0:
        return torch.empty_like(r), zeros(r, 2, r.shape[1])
    du, sums = torch.ops.xsep.cuda_chain_bn_relu_gap_backward(
        g.to(r.dtype).contiguous(), ready(r), vec.contiguous(), mean.contiguous(), positive.contiguous(),
        total.contiguous(),
    )  # fmt: skip
    return du, sums
