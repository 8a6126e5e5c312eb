"""``swap-report``: what a swap finds in a model, and whether the model still says the same afterwards."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..swap import swap_separable_convs
from ..testing import ULPS
from . import screen
from .shapes import as_options, input_of, model_of, taken

EPS = torch.finfo(torch.float32).eps


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = list(output.values())
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        output = [getattr(output, field.name) for field in dataclasses.fields(output)]
    if isinstance(output, (list, tuple)):
        return [t for item in output for t in _tensors(item)]
    return []


def _outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return _tensors(model(x.clone()))  # the first module may work in place


def _distance(a: list[Tensor], b: list[Tensor]) -> float:
    if [t.shape for t in a] != [t.shape for t in b]:
        return float("inf")
    return sum(float((x.double() - y.double()).square().sum()) for x, y in zip(a, b)) ** 0.5


@dataclasses.dataclass
class Before:
    """What the model as it was says to an input."""

    outputs: list[Tensor]
    exact: list[Tensor]  # in float64
    again: list[Tensor]  # and once more: where rounding differs from run to run, it does not show in float64

    @property
    def norm(self) -> float:
        return sum(float(t.double().square().sum()) for t in self.exact) ** 0.5

    def why_not_compared(self) -> str:
        """Why nothing can be said of the outputs; "" where something can."""
        if not self.outputs or not self.exact:
            return "no tensors were found in the output"
        own = _distance(self.exact, self.again)
        if own > EPS * self.norm:
            return f"the model is random: two runs of it before the swap are {own:.3g} apart"
        if not math.isfinite(self.norm + _distance(self.outputs, self.exact)):
            return "the model's own are not all finite, or of another shape in float64"
        return ""

    def compare(self, after: list[Tensor]) -> dict[str, Any]:
        error = _distance(after, self.exact)
        allowed = 2 * _distance(self.outputs, self.exact) + ULPS * EPS * self.norm
        return {"error": error, "allowed": allowed, "norm": self.norm, "right": error <= allowed}


def _before(args: argparse.Namespace, model: nn.Module, x: Tensor) -> Before:
    with taken(args.model, args.input):
        outputs = _outputs(model, x)
    with taken(args.model, args.input, " in float64, which its outputs are compared with"):
        exact = copy.deepcopy(model).double()
        return Before(outputs, _outputs(exact, x.double()), _outputs(exact, x.double()))


def run(args: argparse.Namespace) -> int:
    model = model_of(args.model).eval()
    x = None if args.no_check else input_of(args.input, torch.device("cpu"))
    before = None if x is None else _before(args, model, x)
    report = swap_separable_convs(model, fold_bn=args.fold_bn, report=False)
    result: dict[str, Any] = {
        "model": args.model, "swapped": [swapped._asdict() for swapped in report.swapped],
        "left_alone": [{**missed._asdict(), "reason": as_options(missed.reason)} for missed in report.missed],
    }  # fmt: skip
    code, said = 0, ""
    if x is not None and before is not None:
        code, said, result["check"] = _check(model, x, before, bool(report.swapped))
    if args.json:
        screen.print_json(result)
        return code
    print(as_options(str(report)))
    if said:
        print(said)
    return code


def _check(model: nn.Module, x: Tensor, before: Before, changed: bool) -> tuple[int, str, dict[str, Any]]:
    """Exit code, the same in words, and as JSON has it."""
    if not changed:
        why = "nothing was changed"
        return 0, f"{why}: there are no outputs to compare", {"right": None, "why": why}
    why = before.why_not_compared()
    if why:
        return 2, f"outputs were NOT compared: {why}", {"right": None, "why": why}
    found = before.compare(_outputs(model, x))
    same = "are" if found["right"] else "are NOT"
    said = (
        f"outputs {same} the same up to rounding: the 2-norm of their distance to the unswapped model's in float64 is "
        f"{found['error']:.3g}, {found['allowed']:.3g} is allowed"
    )
    return 0 if found["right"] else 1, said, found
