"""Random problems, and the one rule by which every kernel is held to the truth.

The rule: against float64, an error of at most twice that of PyTorch's own convolutions at the same type, plus a few
ulp of the largest value; forward and every gradient.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Optional

import torch
from torch import Tensor

from . import reference
from .arguments import ChannelAffine
from .functional import depthwise_conv2d, separable_conv2d

#: Where each activation's derivative jumps. Inputs are drawn so that float32 rounding cannot cross such a point.
KINKS = {"relu": (0.0,), "relu6": (0.0, 6.0), "leaky_relu": (0.0,), "elu": (0.0,), "hardswish": (-3.0, 3.0)}
NAMES = (None, "relu", "relu6", "silu", "hardswish", "gelu", "gelu_tanh", "elu", "leaky_relu")
VECTORS = ("scale_p", "shift_p", "scale_m", "shift_m", "scale_e", "shift_e")
ULPS = 8


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
    dilation: tuple[int, int] = (1, 1)
    bias: bool = False
    residual: bool = False
    vectors: tuple[str, ...] = ()  # of VECTORS
    activations: tuple[Optional[str], Optional[str], Optional[str]] = (None, None, None)
    alpha: Optional[float] = None  # for elu and leaky_relu, wherever they stand
    dtype: torch.dtype = torch.float32
    wide_vectors: bool = False  # float32 vectors beside a 16-bit x
    layout: str = "channels_last"  # or contiguous, sliced, permuted
    seed: int = 0

    @property
    def id(self) -> str:
        parts = [
            self.op[:3], f"{self.n}x{self.c_in}x{self.h}x{self.w}", f"o{self.c_out}", f"m{self.multiplier}",
            f"k{self.filter[0]}{self.filter[1]}", f"s{self.stride[0]}{self.stride[1]}",
            "p" + "".join(map(str, self.padding)), f"d{self.dilation[0]}{self.dilation[1]}",
            *(v for v in self.vectors), *(a or "none" for a in self.activations),
            *(["bias"] if self.bias else []), *(["res"] if self.residual else []),
            str(self.dtype).removeprefix("torch."), self.layout, f"seed{self.seed}",
        ]  # fmt: skip
        return "-".join(parts)

    @property
    def output_size(self) -> tuple[int, int]:
        left, right, top, bottom = self.padding
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
        """A copy in another type, each tensor a leaf that requires its gradient."""
        tensors = {k: t.detach().to(dtype).requires_grad_() for k, t in self.tensors.items()}
        return Inputs(tensors, self.dy.to(dtype), self.options)

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
    """Fresh random tensors for a case, none of them near a kink where one type could fall left and another right."""
    for attempt in range(200):
        inputs = _draw(case, random.Random(f"{case.seed}-{attempt}").getrandbits(62), device)
        if case.dtype not in (torch.float32, torch.float64) or not _near_a_kink(case, inputs):
            return inputs
    raise RuntimeError(f"no input away from the kinks was found for {case.id}: make the case smaller")


def _draw(case: Case, seed: int, device: str) -> Inputs:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0, dtype: torch.dtype = case.dtype) -> Tensor:
        return (torch.randn(*shape, generator=g) * scale).to(dtype).to(device)

    c_mid = case.c_in * case.multiplier
    separable = case.op == "separable"
    c_out = case.c_out if separable else c_mid
    p, q = case.output_size
    lengths = {"p": case.c_in, "m": c_mid, "e": c_out}
    vector_type = torch.float32 if case.wide_vectors else case.dtype
    tensors = {"x": _strided(draw(case.n, case.c_in, case.h, case.w), case.layout)}
    tensors["w_dw"] = draw(c_mid, 1, *case.filter, scale=(case.filter[0] * case.filter[1]) ** -0.5)
    if separable:
        tensors["w_pw"] = draw(c_out, c_mid, 1, 1, scale=c_mid**-0.5)
    if case.bias:
        tensors["bias"] = draw(c_out, dtype=vector_type)
    if case.residual and separable:
        tensors["residual"] = _strided(draw(case.n, c_out, p, q), case.layout)
    for name in case.vectors:
        if separable or name[-1] != "m":
            tensors[name] = draw(lengths[name[-1]], dtype=vector_type)
    for t in tensors.values():
        t.requires_grad_()
    options = {
        "stride": case.stride, "padding": case.padding, "dilation": case.dilation,
        "activations": case.activations, "alpha": case.alpha,
    }  # fmt: skip
    return Inputs(tensors, draw(case.n, c_out, p, q), options)


def _strided(t: Tensor, layout: str) -> Tensor:
    if layout == "channels_last":
        return t.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        wide = torch.full((t.shape[0], t.shape[1] + 2, t.shape[2], t.shape[3] + 3), float("nan")).to(t)
        wide = wide.contiguous(memory_format=torch.channels_last)
        wide[:, 1:-1, :, 2:-1] = t
        return wide[:, 1:-1, :, 2:-1].detach()
    if layout == "permuted":
        return t.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0).detach()
    return t


def _near_a_kink(case: Case, inputs: Inputs) -> bool:
    near = False

    def observe(u: Tensor, name: Optional[str]) -> None:
        nonlocal near
        for kink in KINKS.get(name or "", ()):
            # An exact zero (a window full of padding) is the same in every type: nothing can cross there.
            if u.numel() and bool((((u - kink).abs() < 2e-6 * (1 + u.abs().max())) & (u != 0)).any()):
                near = True

    with torch.no_grad():
        positional, keywords = inputs.to(torch.float64).arguments()
        op = reference.separable_conv2d if case.op == "separable" else reference.depthwise_conv2d
        op(*positional, **keywords, observe=observe)
    return near


Results = dict[str, Tensor]


@dataclass
class Truth:
    """y and every gradient in float64, and the size that a rounding error in each is measured by."""

    results: Results
    sizes: dict[str, float]


def _gradients(y: Tensor, inputs: Inputs) -> Results:
    names = list(inputs.tensors)
    gradients = torch.autograd.grad(y, [inputs.tensors[n] for n in names], inputs.dy)
    return {"y": y.detach(), **{f"d{n}": g for n, g in zip(names, gradients)}}


def run_truth(case: Case, inputs: Inputs) -> Truth:
    """The reference in float64. A result's size is its largest element; a per-channel gradient's is the largest sum of
    the absolute values of its terms, as the sum itself may cancel to nothing while each rounded term does not."""
    wide = inputs.to(torch.float64)
    c_out = wide.dy.shape[1]
    spread = {"p": wide.tensors["x"].shape, "m": (case.n, case.c_in * case.multiplier, *case.output_size)}
    vectors = [n for n in wide.tensors if n in VECTORS or n == "bias"]
    for name in vectors:
        shape = spread.get(name[-1] if name != "bias" else "", (case.n, c_out, *case.output_size))
        leaf = wide.tensors[name].detach()[:, None, None].expand(shape).clone()
        wide.tensors[name] = leaf.requires_grad_()
    positional, keywords = wide.arguments()
    op = reference.separable_conv2d if case.op == "separable" else reference.depthwise_conv2d
    results = _gradients(op(*positional, **keywords), wide)
    sizes = {}
    for name in vectors:
        terms = results[f"d{name}"]
        results[f"d{name}"] = terms.sum((0, 2, 3))
        sizes[f"d{name}"] = float(terms.abs().sum((0, 2, 3)).max())
    for name, result in results.items():
        sizes.setdefault(name, float(result.abs().max()) if result.numel() else 0.0)
    return Truth(results, sizes)


def run_pytorch(case: Case, inputs: Inputs) -> Results:
    """y and every gradient from PyTorch's own convolutions at the case's type."""
    positional, keywords = inputs.arguments()
    w_pw = positional[2] if case.op == "separable" else None
    return _gradients(reference.two_convolutions(positional[0], positional[1], w_pw, **keywords), inputs)


def run_xsep(case: Case, inputs: Inputs, backend: Optional[str]) -> Results:
    """y and every gradient from xsep; fresh memory is NaN beforehand, so an element left unwritten shows."""
    positional, keywords = inputs.arguments()
    op = separable_conv2d if case.op == "separable" else depthwise_conv2d
    with poisoned_memory():
        return _gradients(op(*positional, **keywords, backend=backend), inputs)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fills what ATen's ``empty`` returns with NaN, from C++ too."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


def violations(results: Results, truth: Truth, pytorch: Results, dtype: torch.dtype) -> list[str]:
    """Sentences about every result that is further from the truth than the rule allows; empty where all is well.

    The largest element's error counts, but for 16-bit gradients the error's 2-norm: there, which side of a kink a
    rounded value falls on moves single elements of anybody's gradient by their whole size.
    """
    found = []
    for name, expected in truth.results.items():
        got = results[name]
        if got.shape != expected.shape:
            found.append(f"{name} has shape {list(got.shape)}, expected {list(expected.shape)}")
            continue
        if not expected.numel():
            continue
        by_norm = name != "y" and dtype in (torch.float16, torch.bfloat16)
        ours = _distance(got, expected, by_norm)
        theirs = _distance(pytorch[name], expected, by_norm)
        size = max(float(expected.norm()) if by_norm else 0.0, truth.sizes[name])
        # PyTorch's bfloat16 weight gradient can read unwritten memory (see backends/aten.py): no yardstick then.
        theirs = theirs if theirs <= size else 0.0
        bound = 2 * theirs + ULPS * torch.finfo(dtype).eps * size
        if not ours <= bound:
            found.append(f"{name}: error {ours:.3g}, PyTorch's {theirs:.3g}, allowed {bound:.3g}")
    return found


def _distance(a: Tensor, b: Tensor, by_norm: bool) -> float:
    difference = a.double() - b
    return float(difference.norm() if by_norm else difference.abs().max())


def check(case: Case, backend: Optional[str] = None, device: str = "cpu") -> None:
    """Holds one case to the rule, forward and every gradient; raises AssertionError with all that is wrong."""
    inputs = make_inputs(case, device)
    found = violations(run_xsep(case, inputs, backend), run_truth(case, inputs), run_pytorch(case, inputs), case.dtype)
    assert not found, f"{case.id}: " + "; ".join(found)


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
        pixels = max(case.h * case.w, case.output_size[0] * case.output_size[1])
        if min(case.output_size) > 0 and case.n * case.c_in * case.multiplier * pixels <= 40_000:
            return case
