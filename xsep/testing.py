"""The one rule by which every kernel is held to the truth, forward and every gradient.

Against float64, an error of at most twice that of PyTorch's own convolutions at the same type, plus a few ulp. An ulp
is ``eps`` times the size of a result. That size is measured, not guessed: a sum of rounded terms is off by about
``eps`` times the root of the sum of their squares, however much of the sum cancels, and those sums of squares are what
the op itself gives, with no activation, on the squares of its inputs.

- The largest error counts. A value of a 16-bit type is rounded at most four times on its way to y (prologue, middle,
  pointwise, output), each time by half an ulp: 2 ulp of room in all. A gradient goes the way there and back: 4 ulp.
  Float32 adds up in another order than PyTorch does, which is the same for all elements of a result: 8, and 8 below.
- So does the 2-norm of the errors, as no single element betrays a weight that is wrong by two per cent. Four
  independent roundings have a root mean square of sqrt(4 / 12) ulp of a number at the lower end of its binade, and
  less elsewhere: half an ulp is the room for many elements, and the few elements of a small result may be as unlucky
  as one.
- Where an activation's derivative jumps, rounding decides on which side a value falls that is within some ulp of the
  jump, and the gradient moves by all of that element's share. The shares are computed in the same way and allowed for,
  twice, since a few may add up; there the 2-norm alone counts. No allowance reaches y, which has no jump.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Optional, Union

import torch
from torch import Tensor

from . import reference
from .backends.pointwise import tf32_allowed
from .cases import LAYOUTS, NAMES, VECTORS, Case, Inputs, generate, make_inputs
from .functional import depthwise_conv2d, separable_conv2d

__all__ = [
    "LAYOUTS", "NAMES", "VECTORS", "Case", "Inputs", "Truth", "check", "failures", "float32_products", "generate",
    "held_as", "make_inputs", "norm_violation", "poisoned_memory", "run_pytorch", "run_truth", "run_xsep", "ulps",
    "violations",
]  # fmt: skip

#: Room for the largest error; the 16-bit types have (y's, a gradient's). The truth is a float64 sum itself, so that in
#: this type two roundings in different orders are compared, over as many terms as a weight's gradient has.
ULPS = 8
DOUBLE_ULPS = 64
HALF_ULPS = (2, 4)
#: How many ulp of its size a pre-activation may be off, in the unluckiest of some ten thousand elements.
STRAY_ULPS = {torch.float16: 3, torch.bfloat16: 3}

Results = dict[str, Tensor]


@dataclass
class Truth:
    """y and every gradient in float64, the size that a rounding error in each is measured by, and what may flip."""

    results: Results
    sizes: Mapping[str, Union[Tensor, float]] = field(default_factory=dict)  # beside the results' own values
    flips: Mapping[str, Tensor] = field(default_factory=dict)  # none where nothing is near a jump


def ulps(dtype: torch.dtype, gradient: bool, elements: int) -> tuple[float, float]:
    """Room for the largest error and for the 2-norm of the errors of a result of so many elements."""
    if dtype not in (torch.float16, torch.bfloat16):
        room = DOUBLE_ULPS if dtype is torch.float64 else ULPS
        return room, room
    largest = HALF_ULPS[gradient]
    return largest, 0.5 + (largest - 0.5) * elements**-0.5


def _jumps(name: Optional[str], alpha: Optional[float]) -> list[tuple[float, float]]:
    """(where, by how much) the derivative of an activation jumps."""
    if name == "elu":
        return [(0.0, abs(1 - (1.0 if alpha is None else alpha)))]
    if name == "leaky_relu":
        return [(0.0, abs(1 - (0.01 if alpha is None else alpha)))]
    return {"relu": [(0.0, 1.0)], "relu6": [(0.0, 1.0), (6.0, 1.0)], "hardswish": [(-3.0, 0.5), (3.0, 0.5)]}.get(
        name or "", []
    )


def _reference(case: Case, inputs: Inputs, observe: reference.Observer) -> Tensor:
    positional, keywords = inputs.arguments()
    op = reference.separable_conv2d if case.op == "separable" else reference.depthwise_conv2d
    return op(*positional, **keywords, observe=observe)


def _gradients(y: Tensor, inputs: Inputs) -> Results:
    names = inputs.wanted()
    gradients = torch.autograd.grad(y, [inputs.tensors[n] for n in names], inputs.dy) if names else ()
    return {"y": y.detach(), **{f"d{n}": g for n, g in zip(names, gradients)}}


def run_truth(case: Case, inputs: Inputs) -> Truth:
    """The reference in float64, with the sizes and flips that the rule needs."""
    wide = inputs.to(torch.float64)
    names = wide.wanted()
    stages: list[tuple[Tensor, Tensor, Optional[str]]] = []
    y = _reference(case, wide, lambda *stage: stages.append(stage))
    results: Results = {"y": y.detach()}
    shares: list[Optional[Tensor]] = [None] * len(stages)
    if names:
        leaves, afters = [wide.tensors[n] for n in names], [a for _, a, _ in stages]
        inner = [a for a in afters if a.requires_grad]
        found = torch.autograd.grad(y, [*leaves, *inner], wide.dy)
        results.update({f"d{n}": g for n, g in zip(names, found)})
        arriving = iter(found[len(leaves) :])
        shares = [next(arriving) if a.requires_grad else None for a in afters]
    return Truth(results, *_sizes_and_flips(case, wide, stages, shares))


def _sizes_and_flips(
    case: Case, wide: Inputs, stages: list[tuple[Tensor, Tensor, Optional[str]]], shares: list[Optional[Tensor]]
) -> tuple[Results, Results]:
    names = wide.wanted()
    tensors = {k: t.detach().square().requires_grad_(t.requires_grad) for k, t in wide.tensors.items()}
    squares = Inputs(tensors, wide.dy.square(), {**wide.options, "activations": (None, None, None)})
    inner: list[Tensor] = []
    y = _reference(case, squares, lambda u, *_: inner.append(u))
    leaves = [tensors[n] for n in names]
    sizes = {"y": y.detach().sqrt()}
    if names:
        found = torch.autograd.grad(y, leaves, squares.dy, retain_graph=True)
        sizes.update({f"d{n}": g.sqrt() for n, g in zip(names, found)})
    moved, by = [], []
    stray = STRAY_ULPS.get(case.dtype, ULPS) * torch.finfo(case.dtype).eps
    for i, ((u, _, name), square, share) in enumerate(zip(stages, inner, shares)):
        exact = i == 0 and "scale_p" not in tensors and "shift_p" not in tensors
        if exact or share is None or not square.requires_grad:
            continue
        jump = torch.zeros_like(u)
        for where, height in _jumps(name, wide.options["alpha"]):
            near = (u - where).abs() < stray * torch.maximum(square.detach().sqrt(), u.abs())
            # Exactly on it is a window of zeros, which is that in every type.
            jump = torch.maximum(jump, (near & (u != where)) * height)
        if jump.any():
            moved.append(square)
            by.append((jump * share).square().detach())
    if not moved:
        return sizes, {}
    found = torch.autograd.grad(moved, leaves, by, allow_unused=True)
    return sizes, {f"d{n}": g.sqrt() for n, g in zip(names, found) if g is not None and g.any()}


def run_pytorch(case: Case, inputs: Inputs) -> Results:
    """y and every gradient from PyTorch's own convolutions at the case's type."""
    positional, keywords = inputs.arguments()
    w_pw = positional[2] if case.op == "separable" else None
    return _gradients(reference.two_convolutions(positional[0], positional[1], w_pw, **keywords), inputs)


def run_xsep(case: Case, inputs: Inputs, backend: Optional[str]) -> Results:
    """y and every gradient from xsep; fresh memory is NaN beforehand, so an element left unwritten shows."""
    positional, keywords = inputs.arguments()
    if case.padding_form is not None:
        keywords["padding"] = case.padding_form
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


@contextlib.contextmanager
def float32_products(precision: str, of_matrices: Optional[str] = None) -> Iterator[None]:
    """``"ieee"`` or ``"tf32"``, of convolutions and, unless they have their own, of matrices.

    Not by pytest's monkeypatch: of settings that are no attributes of their own it may delete what it set.
    """
    cudnn: Any = torch.backends.cudnn
    settings = (cudnn.conv, torch.backends.cuda.matmul)
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting, value in zip(settings, (precision, of_matrices or precision)):
            setting.fp32_precision = value
        yield
    finally:
        for setting, value in zip(settings, before):
            setting.fp32_precision = value


def held_as(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The type whose rule is for results of products that are about to be timed, or chosen by their time.

    Where PyTorch's settings say so a GPU's float32 products are of TF32 numbers, which have float16's digits. Whether
    PyTorch's library takes them for a shape too, and so what its own error is, is its choice. float16's room is about
    twice the error of a product whose operands were rounded to TF32.
    """
    narrow = dtype is torch.float32 and device.type == "cuda" and tf32_allowed()
    return torch.float16 if narrow else dtype


def violations(results: Results, truth: Truth, pytorch: Results, dtype: torch.dtype) -> list[str]:
    """Sentences about every result that is further from the truth than the rule allows; empty where all is well."""
    found = []
    for name, expected in truth.results.items():
        got = results[name]
        if got.shape != expected.shape:
            found.append(f"{name} has shape {list(got.shape)}, expected {list(expected.shape)}")
            continue
        if not expected.numel():
            continue
        size = torch.maximum(expected.abs(), torch.as_tensor(truth.sizes.get(name, 0.0)).to(expected))
        ours, theirs = got.double() - expected, pytorch[name].double() - expected
        if not theirs.abs().max() <= size.max():
            # PyTorch's bfloat16 weight gradient can read unwritten memory (see backends/aten.py): no yardstick then.
            theirs = torch.zeros_like(theirs)
        largest, by_norm = (u * torch.finfo(dtype).eps for u in ulps(dtype, name != "y", expected.numel()))
        flips = truth.flips.get(name)
        allowed = float(2 * theirs.abs().max() + largest * size.max())
        if flips is None and not float(ours.abs().max()) <= allowed:
            found.append(
                f"{name}: error {float(ours.abs().max()):.3g}, PyTorch's {float(theirs.abs().max()):.3g}, "
                f"allowed {allowed:.3g}"
            )
        allowed = float(2 * theirs.norm() + by_norm * size.norm()) + (0.0 if flips is None else 2 * float(flips.norm()))
        if not float(ours.norm()) <= allowed:
            found.append(
                f"{name}: 2-norm of the error {float(ours.norm()):.3g}, PyTorch's {float(theirs.norm()):.3g}, "
                f"allowed {allowed:.3g}"
            )
    return found


def failures(
    case: Case, backend: Optional[str] = None, device: str = "cpu", kind: Optional[torch.dtype] = None
) -> list[str]:
    """What of one case, forward and every gradient, is against the rule of its type, or of ``kind``."""
    inputs = make_inputs(case, device)
    ours, truth, pytorch = run_xsep(case, inputs, backend), run_truth(case, inputs), run_pytorch(case, inputs)
    return violations(ours, truth, pytorch, kind or case.dtype)


def check(case: Case, backend: Optional[str] = None, device: str = "cpu") -> None:
    """Holds one case to the rule, forward and every gradient; raises AssertionError with all that is wrong."""
    found = failures(case, backend, device)
    assert not found, f"{case.id}: " + "; ".join(found)


def norm_violation(got: Tensor, truth: Tensor, pytorch: Tensor, dtype: torch.dtype) -> str:
    """A sentence on a whole network's result whose error's 2-norm is more than twice PyTorch's and a few ulp, else "".

    By norms alone, since a value that rounding carries over a ReLU's jump moves single elements by their whole size.
    """
    truth = truth.detach().double()
    error, theirs = (float((t.detach().double() - truth).norm()) for t in (got, pytorch))
    bound = 2 * theirs + ULPS * torch.finfo(dtype).eps * float(truth.norm())
    return "" if error <= bound else f"off by {error:.3g}, PyTorch's by {theirs:.3g}, {bound:.3g} allowed"
