"""``swap-report``: what a swap finds in a model, and whether the model still says the same afterwards."""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
from torch import Tensor

from ..swap import swap_separable_convs
from ..testing import ULPS
from . import screen
from .shapes import UsageError, input_of, model_of


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, (list, tuple)):
        return [t for item in output for t in _tensors(item)]
    return []


def _distance(a: list[Tensor], b: list[Tensor]) -> float:
    return sum(float((x.double() - y.double()).square().sum()) for x, y in zip(a, b)) ** 0.5


def run(args: argparse.Namespace) -> int:
    model = model_of(args.model).eval()
    result: dict[str, Any] = {"model": args.model}
    expected: list[Tensor] = []
    exact: list[Tensor] = []
    x = None
    if not args.no_check:
        x = input_of(args.input, torch.device("cpu"))
        try:
            with torch.no_grad():
                expected = _tensors(model(x))
                exact = _tensors(copy.deepcopy(model).double()(x.double()))
        except Exception as error:  # whatever the model may raise
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UsageError(f"{args.model} does not take {args.input or '1x3x224x224'}: {said}") from None
    report = swap_separable_convs(model, fold_bn=args.fold_bn, report=False)
    result["swapped"] = [swapped._asdict() for swapped in report.swapped]
    result["left_alone"] = [missed._asdict() for missed in report.missed]
    right = True
    if x is not None:
        with torch.no_grad():
            error = _distance(_tensors(model(x)), exact)
        size = sum(float(t.square().sum()) for t in exact) ** 0.5
        allowed = 2 * _distance(expected, exact) + ULPS * torch.finfo(torch.float32).eps * size
        right = error <= allowed
        result["check"] = {"error": error, "allowed": allowed, "norm": size, "right": right}
    if args.json:
        screen.print_json(result)
        return 0 if right else 1
    print(report)
    if "check" in result:
        same = "are" if right else "are NOT"
        print(f"outputs {same} the same up to rounding: off by {error:.3g}, {allowed:.3g} allowed")
    return 0 if right else 1
