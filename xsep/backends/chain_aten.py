"""The chain's kernels in plain PyTorch: every device, every type, every shape. What the others are held against.

Images are widened to float32 where they are read and rounded where they are stored, as a kernel does it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from ..activations import activate, gradient_from_input, per_channel
from ..problem import IDENTITY, Affine, Geometry, Problem
from .aten import ATEN
from .chain import TILE, Backward, ChainBackend, Forward, Load, RawGradient, Shortcut, tiles_of, wide
from .pointwise import images_of, rows_of, wgrad

#: Elements of a block that a CPU works on at a time, so that it stays in its cache.
BLOCK = 2**18
PLAIN = Affine()


def row_blocks(rows: int, columns: int, device: torch.device, multiple: int = 1) -> Iterator[slice]:
    """Slices over rows: all of them, but on a CPU as many as its cache holds, a multiple of some number."""
    step = rows
    if device.type == "cpu":
        step = max(BLOCK // max(columns * multiple, 1), 1) * multiple
    for start in range(0, rows, max(step, 1)):
        yield slice(start, min(start + step, rows))


def loaded(x: Tensor, load: Load, residual: Optional[Tensor]) -> Tensor:
    """scale * x + shift + residual in the wide type, before the activation."""
    u = x.to(wide(x.dtype))
    if load.vec is not None:
        u = torch.addcmul(per_channel(load.vec[1]), u, per_channel(load.vec[0]))
    return u if residual is None else u + residual


def activated(u: Tensor, load: Load, dtype: torch.dtype) -> Tensor:
    return activate(u, load.activation, load.alpha).to(dtype)


def tile_statistics(r: Tensor) -> tuple[Tensor, Tensor]:
    """(partials [T, 3, C], counts [T]) of tiles of TILE pixels in NHWC order; the last may be short."""
    rows, dtype = rows_of(r), wide(r.dtype)
    m, c = rows.shape
    partials = torch.empty((tiles_of(m), 3, c), dtype=dtype, device=r.device)
    counts = torch.full((tiles_of(m),), TILE, dtype=torch.int32, device=r.device)
    whole = m // TILE * TILE
    parts = list(row_blocks(whole, c, r.device, TILE))
    if whole < m:
        parts.append(slice(whole, m))
        counts[-1:].fill_(m - whole)  # a number given to one element would be copied to the card first
    for part in parts:
        pixels = min(TILE, part.stop - part.start)
        tiles = rows[part].to(dtype).view(-1, pixels, c)
        out = partials[part.start // TILE :][: tiles.shape[0]]
        mean = tiles.mean(1)
        deviations = tiles - mean[:, None]
        out[:, 0], out[:, 1], out[:, 2] = mean, deviations.sum(1), deviations.square_().sum(1)
    return partials, counts


def average_weight(batches: Optional[Tensor], momentum: Optional[float]) -> Union[Tensor, float]:
    """How far a running statistic goes towards a batch's: all batches alike where there is no momentum."""
    if momentum is not None:
        return momentum
    assert batches is not None
    return batches.double().reciprocal()


def gradient_sums(g: Tensor, operands: Sequence[Tensor], centres: Optional[Tensor]) -> Tensor:
    """[1 + K, C]: sums of g, and of g * (operand - centre): centred before they are added up, so nothing cancels."""
    dtype = wide(g.dtype)
    g_rows, others = rows_of(g), [rows_of(o) for o in operands]
    m, c = g_rows.shape
    sums = torch.zeros((1 + len(others), c), dtype=dtype, device=g.device)
    for part in row_blocks(m, c, g.device):
        block = g_rows[part].to(dtype)
        sums[0] += block.sum(0)
        for k, o in enumerate(others, 1):
            assert centres is not None
            sums[k] += (o[part].to(dtype) - centres[k]).mul_(block).sum(0)
    return sums


def unpooled(dr: RawGradient) -> Tensor:
    """du at r's resolution, in the wide type, of one that has the pool's."""
    assert dr.taps is not None
    (h, w), (p, q), (top, left) = dr.r.shape[2:], dr.du.shape[2:], dr.pads
    n, c = dr.r.shape[:2]
    dtype = wide(dr.r.dtype)
    # Windows may hang over on every side; what lands there belongs to nobody.
    padded = torch.zeros((n, 2 * p + 1, 2 * q + 1, c), dtype=dtype, device=dr.du.device).permute(0, 3, 1, 2)
    du = dr.du.to(dtype)
    for k in range(9):
        view = padded[:, :, k // 3 : k // 3 + 2 * p - 1 : 2, k % 3 : k % 3 + 2 * q - 1 : 2]
        view += torch.where(dr.taps == k, du, 0)
    return padded[:, :, top : top + h, left : left + w]


def raw_gradient(dr: RawGradient, du: Tensor) -> Tensor:
    """a * du + b * r + d, rounded to r's type; ``du`` at r's resolution."""
    dtype = wide(dr.r.dtype)
    n, c, h, w = dr.r.shape
    a, b, d = dr.coef.unbind(0)
    out = torch.empty((n * h * w, c), dtype=dr.r.dtype, device=dr.r.device)
    du, r = rows_of(du), rows_of(dr.r)
    for part in row_blocks(n * h * w, c, dr.r.device):
        out[part] = torch.addcmul(d, r[part].to(dtype), b).addcmul_(du[part].to(dtype), a)
    return images_of(out, dr.r)


def input_gradient(
    e: Tensor, u: Tensor, load: Load, shortcut: Optional[Shortcut], dtype: torch.dtype, masked: bool = False
) -> Tensor:
    """act'(u) * e with the shortcut's gradient where it belongs; ``masked``: e has act'(u) in it already."""
    if shortcut is not None:
        e = e.to(wide(dtype))
        if shortcut.activated:
            e = _spread(e, shortcut.g)
    if not masked:
        e = gradient_from_input(e, u, load.activation, load.alpha)
    if shortcut is not None and not shortcut.activated:
        e = _spread(e, shortcut.g)
    return e.to(dtype)


def _spread(e: Tensor, g: Tensor) -> Tensor:
    if g.shape == e.shape:
        return e + g
    e = e.clone()
    e[:, :, ::2, ::2] += g
    return e


class AtenChain(ChainBackend):
    name = "aten"

    def not_supported_reasons(self, problem: Problem) -> list[str]:
        return []

    def formed(self, dr: RawGradient) -> Tensor:
        """dr itself, as a tensor."""
        return raw_gradient(dr, dr.du if dr.taps is None else unpooled(dr))

    def loaded_and_activated(self, x: Tensor, load: Load) -> tuple[Tensor, Tensor]:
        """(u, act(u)): both in x's type but for a wide u, whose sign must be that of the forward's."""
        u = loaded(x, load, None)
        return u, activated(u, load, x.dtype)

    def depthwise(self, x: Tensor, load: Load, w_dw: Tensor, geometry: Geometry) -> Tensor:
        return ATEN.depthwise(self.loaded_and_activated(x, load)[1], w_dw, PLAIN, PLAIN, geometry)

    def sep_fprop(
        self, x: Tensor, load: Load, residual: Optional[Tensor], w_dw: Tensor, w_pw: Tensor, geometry: Geometry,
        statistics: bool,
    ) -> Forward:  # fmt: skip
        x_pre = None
        if residual is not None:
            # Backward reads the sum as it was stored, so the activation is of the rounded sum.
            x = x_pre = self.apply(x, load._replace(activation=IDENTITY), residual)
            load = load._replace(vec=None)
        r = self.layer(x, load, w_dw, w_pw, geometry)
        partials, counts = self.statistics(r) if statistics else (None, None)
        return Forward(r, partials, counts, x_pre)

    def layer(self, x: Tensor, load: Load, w_dw: Tensor, w_pw: Tensor, geometry: Geometry) -> Tensor:
        return self.pointwise(self.depthwise(x, load, w_dw, geometry), w_pw)

    def pw_fprop(self, x: Tensor, load: Load, w: Tensor, statistics: bool) -> Forward:
        r = self.pointwise(self.loaded_and_activated(x, load)[1], w)
        return Forward(r, *(self.statistics(r) if statistics else (None, None)))

    def statistics(self, r: Tensor) -> tuple[Tensor, Tensor]:
        return tile_statistics(r)

    def bn_finalize(
        self, partials: Tensor, counts: Tensor, gamma: Optional[Tensor], beta: Optional[Tensor],
        running_mean: Optional[Tensor], running_var: Optional[Tensor], batches: Optional[Tensor],
        momentum: Optional[float], eps: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        dtype = partials.dtype
        shift, s, q = partials.double().unbind(1)
        n = counts.double()[:, None]
        safe = n.clamp(min=1)  # a rank may have had no picture
        count = n.sum()
        mean = (n * shift + s).sum(0) / count
        deviations = (q - s.square() / safe + n * (shift + s / safe - mean).square()).sum(0)
        if batches is not None:
            batches.add_(1)
        if running_mean is not None and running_var is not None:
            weight = average_weight(batches, momentum)
            unbiased = deviations / (count - 1).clamp(min=1)
            for running, now in ((running_mean, mean), (running_var, unbiased)):
                old = running.double()
                running.copy_(old + weight * (now - old))
        invstd = (deviations / count + eps).rsqrt()
        scale = invstd.to(dtype) if gamma is None else (gamma.double() * invstd).to(dtype)
        shift = -mean * scale.double()
        vec = torch.stack([scale, (shift if beta is None else shift + beta.double()).to(dtype)])
        return vec, mean.to(dtype).repeat(2, 1), invstd.to(dtype), count

    def bn_backward_finalize(
        self, sums: Tensor, mean: Tensor, invstd: Tensor, gamma: Optional[Tensor], count: Tensor, batch: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = sums.dtype
        s1, s2 = sums.double().unbind(0)
        i = invstd.double()
        a = i if gamma is None else gamma.double() * i
        zero = torch.zeros_like(a)
        c0, c1 = (s1 / count, i.square() * s2 / count) if batch else (zero, zero)
        coef = torch.stack([a, -a * c1, a * (c1 * mean.double() - c0)])
        return coef.to(dtype), (i * s2).to(dtype), s1.to(dtype, copy=True)  # no view of what was given

    def pointwise(self, z: Tensor, w: Tensor) -> Tensor:
        return ATEN.pointwise(z, w)

    def pointwise_dgrad(self, dr: Tensor, w: Tensor) -> Tensor:
        return ATEN.pointwise_dgrad(dr, w)

    def pointwise_wgrad(self, dr: Tensor, z: Tensor) -> Tensor:
        if dr.dtype == torch.float32 and not dr.is_cuda:
            # A product of matrices adds one pixel after the other there: over maps of 147 x 147 up to 40 times as far
            # off as PyTorch's convolution.
            return conv2d_weight(z, (dr.shape[1], z.shape[1], 1, 1), dr)
        return wgrad(dr, z)[:, :, None, None]

    def weight_gradient(self, dr: Tensor, x: Tensor, load: Load, w_dw: Tensor, geometry: Geometry) -> Tensor:
        """dw_pw, z made again."""
        return self.pointwise_wgrad(dr, self.depthwise(x, load, w_dw, geometry))

    def depthwise_backward(
        self, dz: Tensor, x: Tensor, w_dw: Tensor, load: Load, geometry: Geometry, shortcut: Optional[Shortcut],
        operands: Sequence[Tensor], centres: Optional[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """(dx, dw_dw, sums) of z = dw(load(x))."""
        u, act = self.loaded_and_activated(x, load)
        dtype = wide(act.dtype)
        e = ATEN.depthwise_backward_kernel(dz, act, w_dw, PLAIN, geometry, (True, False, False, False)).dx
        dw = ATEN.depthwise_backward_kernel(
            dz.to(dtype), act.to(dtype), w_dw.to(dtype), PLAIN, geometry, (False, True, False, False)
        ).dw_dw  # fmt: skip
        assert e is not None and dw is not None
        dx = input_gradient(e, u, load, shortcut, act.dtype)
        return dx, dw, gradient_sums(dx, operands, centres)

    def sep_wgrad_pw(self, dr: RawGradient, x: Tensor, load: Load, w_dw: Tensor, geometry: Geometry) -> Tensor:
        return self.weight_gradient(self.formed(dr), x, load, w_dw, geometry)

    def sep_dgrad(
        self, dr: RawGradient, w_pw: Tensor, w_dw: Tensor, x: Tensor, load: Load, geometry: Geometry,
        shortcut: Optional[Shortcut], operands: Sequence[Tensor], centres: Optional[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        wanted = (True, True, False)
        b = self.sep_backward(dr, w_pw, w_dw, x, load, geometry, shortcut, operands, centres, wanted)
        assert b.dx is not None and b.dw_dw is not None and b.sums is not None
        return b.dx, b.dw_dw, b.sums

    def sep_backward(
        self, dr: RawGradient, w_pw: Tensor, w_dw: Tensor, x: Tensor, load: Load, geometry: Geometry,
        shortcut: Optional[Shortcut], operands: Sequence[Tensor], centres: Optional[Tensor], wanted: Sequence[bool],
    ) -> Backward:  # fmt: skip
        formed = self.formed(dr)
        dw_pw = self.weight_gradient(formed, x, load, w_dw, geometry) if wanted[2] else None
        if not (wanted[0] or wanted[1]):
            return Backward(None, None, dw_pw, None)
        dz = self.pointwise_dgrad(formed, w_pw)
        del formed
        dx, dw_dw, sums = self.depthwise_backward(dz, x, w_dw, load, geometry, shortcut, operands, centres)
        return Backward(dx, dw_dw, dw_pw, sums)

    def pw_backward(self, dr: RawGradient, w: Tensor, x: Tensor, load: Load) -> tuple[Tensor, Tensor]:
        formed = self.formed(dr)
        dw = self.pointwise_wgrad(formed, self.loaded_and_activated(x, load)[1])
        return dw, self.pointwise_dgrad(formed, w)

    def bn_pool_add(
        self, r: Tensor, vec: Tensor, s: Tensor, vec_s: Tensor, pads: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        w = r.shape[3]
        p, q = s.shape[2:]
        top, left = pads
        u = loaded(r, Load(vec), None)
        # ceil_mode gives the window that hangs over the far end; where it gives one too many, the last is cut off.
        best, places = F.max_pool2d(u, 3, 2, pads, ceil_mode=True, return_indices=True)
        best, places = best[:, :, :p, :q], places[:, :, :p, :q]
        y = torch.arange(p, device=r.device)[:, None] * 2 - top
        x = torch.arange(q, device=r.device) * 2 - left
        index = (places // w - y) * 3 + (places % w - x)
        chosen = r.flatten(2).gather(2, places.flatten(2)).view(best.shape)
        return (best + loaded(s, Load(vec_s), None)).to(r.dtype), index.to(torch.uint8), chosen

    def bn_relu_gap(self, r: Tensor, vec: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dtype = wide(r.dtype)
        mask = loaded(r, Load(vec), None) > 0
        positive, total = mask.sum((2, 3)).to(dtype), (r * mask).sum((2, 3), dtype=dtype)
        pooled = torch.addcmul(vec[1] * positive, total, vec[0]) / (r.shape[2] * r.shape[3])
        return pooled.to(r.dtype), positive, total

    def bn_relu_gap_backward(
        self, g: Tensor, r: Tensor, vec: Tensor, mean: Tensor, positive: Tensor, total: Tensor
    ) -> tuple[Tensor, Tensor]:
        share = g.to(vec.dtype) / (r.shape[2] * r.shape[3])
        du = (share[:, :, None, None] * (loaded(r, Load(vec), None) > 0)).to(r.dtype)
        # As a reader of du would see it, rounded.
        share = share.to(r.dtype).to(vec.dtype)
        return du, torch.stack([(share * positive).sum(0), (share * (total - mean * positive)).sum(0)])

    def apply(self, x: Tensor, load: Load, residual: Optional[Tensor]) -> Tensor:
        return activated(loaded(x, load, residual), load, x.dtype)

    def apply_backward(
        self, g: Tensor, x: Tensor, load: Load, residual: Optional[Tensor], operands: Sequence[Tensor],
        centres: Optional[Tensor],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        if load.activation != IDENTITY:
            g = gradient_from_input(g.to(wide(g.dtype)), loaded(x, load, residual), load.activation, load.alpha)
        g = g.to(x.dtype)
        return g, gradient_sums(g, operands, centres)

    def bn_dgrad(self, dr: RawGradient) -> Tensor:
        return self.formed(dr)


ATEN_CHAIN = AtenChain()
