"""Random problems of both ops, small enough for float64, and the tensors that go with them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, Optional, Union

import torch
from torch import Tensor

from .arguments import ChannelAffine, pair, same_padding

NAMES = (None, "relu", "relu6", "silu", "hardswish", "gelu", "gelu_tanh", "elu", "leaky_relu")
VECTORS = ("scale_p", "shift_p", "scale_m", "shift_m", "scale_e", "shift_e")
#: Memory layouts of a 4-d tensor: slices between NaN margins, dimensions in odd orders, strides of 0, and a start one
#: element into an allocation, where no vector load is aligned.
LAYOUTS = ("channels_last", "contiguous", "sliced", "permuted", "unaligned", "expanded", "broadcast")


@dataclass(frozen=True)
class Case:
    """One problem of either op, small enough for float64."""

    op: str = "separable"
    n: int = 2
    c_in: int = 7
    h: int = 9
    w: int = 11
    multiplier: int = 1
    c_out: int = 5
    filter: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)  # left, right, top, bottom
    padding_form: Optional[Union[int, str, tuple[int, int]]] = None  # another form the ops take, in place of padding
    dilation: tuple[int, int] = (1, 1)
    bias: bool = False
    residual: bool = False
    vectors: tuple[str, ...] = ()  # of VECTORS
    activations: tuple[Optional[str], Optional[str], Optional[str]] = (None, None, None)
    alpha: Optional[float] = None  # for elu and leaky_relu, wherever they stand
    dtype: torch.dtype = torch.float32
    wide_vectors: bool = False  # float32 vectors beside a 16-bit x
    layout: str = "channels_last"  # of x and residual, one of LAYOUTS
    weights_layout: str = "contiguous"  # of the filters; the vectors are strided where this is not contiguous
    dy_layout: str = "contiguous"
    wanted: Optional[tuple[str, ...]] = None  # tensors whose gradient is asked for; None is all of them
    seed: int = 0

    @property
    def id(self) -> str:
        padding = "".join(map(str, self.padding)) if self.padding_form is None else self.padding_form
        parts = [
            self.op[:3], f"{self.n}x{self.c_in}x{self.h}x{self.w}", f"o{self.c_out}", f"m{self.multiplier}",
            f"k{self.filter[0]}{self.filter[1]}", f"s{self.stride[0]}{self.stride[1]}",
            f"p{padding}", f"d{self.dilation[0]}{self.dilation[1]}",
            *(v for v in self.vectors), *(a or "none" for a in self.activations),
            *(["bias"] if self.bias else []), *(["res"] if self.residual else []),
            str(self.dtype).removeprefix("torch."), self.layout,
            *([] if self.wanted is None else [f"wants{'+'.join(self.wanted)}"]), f"seed{self.seed}",
        ]  # fmt: skip
        return "-".join(parts)

    def reproducer(self, backend: Optional[str]) -> str:
        """One line to paste into Python that checks this very case again."""
        said = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"import torch; from xsep.testing import Case, check; check(Case({', '.join(said)}), {backend!r})"

    @property
    def pads(self) -> tuple[int, int, int, int]:
        """Padding as (left, right, top, bottom), whatever form it is given in."""
        form = self.padding_form
        if form is None:
            return self.padding
        if form == "valid":
            return 0, 0, 0, 0
        if isinstance(form, str):
            top, bottom = same_padding(self.h, self.filter[0], self.stride[0], self.dilation[0])
            return *same_padding(self.w, self.filter[1], self.stride[1], self.dilation[1]), top, bottom
        vertical, horizontal = pair("padding", form, 0)
        return horizontal, horizontal, vertical, vertical

    @property
    def output_size(self) -> tuple[int, int]:
        left, right, top, bottom = self.pads
        p = (self.h + top + bottom - self.dilation[0] * (self.filter[0] - 1) - 1) // self.stride[0] + 1
        q = (self.w + left + right - self.dilation[1] * (self.filter[1] - 1) - 1) // self.stride[1] + 1
        return p, q


@dataclass
class Inputs:
    """The tensors of a case by name, and the gradient that comes from above."""

    tensors: dict[str, Tensor]
    dy: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> Inputs:
        """A copy in another type, each tensor a leaf that wants its gradient where it did."""
        tensors = {k: t.detach().to(dtype).requires_grad_(t.requires_grad) for k, t in self.tensors.items()}
        return Inputs(tensors, self.dy.to(dtype), self.options)

    def wanted(self) -> list[str]:
        return [name for name, t in self.tensors.items() if t.requires_grad]

    def arguments(self) -> tuple[list[Any], dict[str, Any]]:
        """Positional and keyword arguments of the op."""
        t, names = self.tensors, self.options["activations"]
        affines = {
            "prologue": ChannelAffine(t.get("scale_p"), t.get("shift_p"), names[0], self._alpha(names[0])),
            "middle": ChannelAffine(t.get("scale_m"), t.get("shift_m"), names[1], self._alpha(names[1])),
            "epilogue": ChannelAffine(t.get("scale_e"), t.get("shift_e"), names[2], self._alpha(names[2])),
        }
        keywords: dict[str, Any] = {k: self.options[k] for k in ("stride", "padding", "dilation")}
        if "w_pw" in t:
            return [t["x"], t["w_dw"], t["w_pw"]], {**keywords, **affines, **self._optional("bias", "residual")}
        del affines["middle"]
        return [t["x"], t["w_dw"]], {**keywords, **affines, **self._optional("bias")}

    def _alpha(self, name: Optional[str]) -> Optional[float]:
        return self.options["alpha"] if name in ("elu", "leaky_relu") else None

    def _optional(self, *names: str) -> dict[str, Tensor]:
        return {name: self.tensors[name] for name in names if name in self.tensors}


def make_inputs(case: Case, device: str = "cpu") -> Inputs:
    """Fresh random tensors for a case, the same for the same seed; padding as (left, right, top, bottom)."""
    g = torch.Generator().manual_seed(random.Random(str(case.seed)).getrandbits(62))

    def draw(*shape: int, scale: float = 1.0, dtype: torch.dtype = case.dtype) -> Tensor:
        return (torch.randn(*shape, generator=g) * scale).to(dtype).to(device)

    c_mid = case.c_in * case.multiplier
    separable = case.op == "separable"
    c_out = case.c_out if separable else c_mid
    p, q = case.output_size
    lengths = {"p": case.c_in, "m": c_mid, "e": c_out}
    vector_type = torch.float32 if case.wide_vectors else case.dtype

    def vector(length: int) -> Tensor:
        v = draw(length, dtype=vector_type)
        return v if case.weights_layout == "contiguous" else torch.stack([v, torch.full_like(v, torch.nan)], 1)[:, 0]

    tensors = {"x": laid_out(draw(case.n, case.c_in, case.h, case.w), case.layout)}
    w_dw = draw(c_mid, 1, *case.filter, scale=(case.filter[0] * case.filter[1]) ** -0.5)
    tensors["w_dw"] = laid_out(w_dw, case.weights_layout)
    if separable:
        tensors["w_pw"] = laid_out(draw(c_out, c_mid, 1, 1, scale=c_mid**-0.5), case.weights_layout)
    if case.bias:
        tensors["bias"] = vector(c_out)
    if case.residual and separable:
        tensors["residual"] = laid_out(draw(case.n, c_out, p, q), case.layout)
    for name in case.vectors:
        if separable or name[-1] != "m":
            tensors[name] = vector(lengths[name[-1]])
    for name, t in tensors.items():
        t.requires_grad_(case.wanted is None or name in case.wanted)
    options = {
        "stride": case.stride, "padding": case.pads, "dilation": case.dilation,
        "activations": case.activations if separable else (case.activations[0], None, case.activations[2]),
        "alpha": case.alpha,
    }  # fmt: skip
    return Inputs(tensors, laid_out(draw(case.n, c_out, p, q), case.dy_layout), options)


def laid_out(t: Tensor, layout: str) -> Tensor:
    """t [a, b, c, d] in one of LAYOUTS; where strides of 0 repeat values, the first ones stand for the others."""
    if layout == "contiguous":
        return t
    if layout == "channels_last":
        return t.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        wide = torch.full((t.shape[0], t.shape[1] + 2, t.shape[2], t.shape[3] + 3), float("nan")).to(t)
        wide = wide.contiguous(memory_format=torch.channels_last)
        wide[:, 1:-1, :, 2:-1] = t
        return wide[:, 1:-1, :, 2:-1].detach()
    if layout == "permuted":
        return t.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0).detach()
    if layout == "unaligned":
        flat = torch.cat([t.new_full((1,), float("nan")), t.permute(0, 2, 3, 1).reshape(-1)])
        return flat[1:].view(t.shape[0], t.shape[2], t.shape[3], t.shape[1]).permute(0, 3, 1, 2).detach()
    if layout == "expanded":
        return t[:1].expand(t.shape) if t.shape[0] else t
    if layout == "broadcast":
        return t[:, :1].expand(t.shape)
    raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")


def generate(count: int, seed: int = 0, **fixed: Any) -> Iterator[Case]:
    """``count`` random cases, the same for the same seed; ``fixed`` pins fields of :class:`Case`."""
    for i in range(count):
        yield replace(_random_case(random.Random(f"{seed}-{i}"), i), **fixed)


def _random_case(rng: random.Random, seed: int) -> Case:
    while True:
        some = rng.random
        op = "separable" if some() < 0.7 else "depthwise"
        size = rng.choice([(3, 3), (3, 3), (3, 3), (5, 5), (7, 7), (1, 1), (2, 2), (3, 5), (1, 7), (4, 3)])
        stride = rng.choice([(1, 1), (1, 1), (2, 2), (2, 1), (3, 2)])
        dilation = rng.choice([(1, 1), (1, 1), (1, 1), (2, 2), (1, 3)])
        padding = rng.choice([
            (size[1] // 2, size[1] // 2, size[0] // 2, size[0] // 2),
            (0, 0, 0, 0),
            (rng.randrange(4), rng.randrange(4), rng.randrange(4), rng.randrange(4)),
        ])  # fmt: skip
        dtype = rng.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16])
        case = Case(
            op=op,
            n=rng.choice([1, 1, 2, 3]),
            c_in=rng.choice([1, 2, 3, 5, 8, 13, 16, 17, 31, 32, 37, 64, 65]),
            h=rng.choice([1, 2, 5, 7, 8, 10, 13]),
            w=rng.choice([1, 3, 4, 6, 9, 11, 19]),
            multiplier=rng.choice([1, 1, 1, 2, 3]),
            c_out=rng.choice([1, 3, 7, 16, 24, 63, 64, 65, 67]),
            filter=size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            bias=some() < 0.4,
            residual=some() < 0.3,
            vectors=tuple(v for v in VECTORS if some() < 0.3),
            activations=(rng.choice(NAMES), rng.choice(NAMES), rng.choice(NAMES)),
            alpha=rng.choice([None, None, 0.3]),
            dtype=dtype,
            wide_vectors=some() < 0.5,
            layout=rng.choice(["channels_last", "channels_last", "contiguous", "sliced", "permuted"]),
            seed=seed,
        )
        if some() < 0.3:
            names = ("x", "w_dw", "w_pw", "bias", "residual", *case.vectors)
            case = replace(case, wanted=tuple(name for name in names if some() < 0.4))
        pixels = max(case.h * case.w, case.output_size[0] * case.output_size[1])
        if min(case.output_size) > 0 and case.n * case.c_in * case.multiplier * pixels <= 40_000:
            return case
