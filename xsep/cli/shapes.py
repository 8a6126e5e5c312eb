"""Problems and models as a command line names them."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

import torch
from torch import nn

from ..arguments import separable_args
from ..problem import ACTIVATIONS, IDENTITY, Problem, separable_problem

DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64,
}  # fmt: skip


#: What an option of a problem is where nobody gives it.
DEFAULTS: dict[str, Any] = {
    "batch": 1, "dtype": "float32", "filter": "3", "stride": 1, "dilation": 1, "padding": "same", "multiplier": 1,
    "activation": None, "layout": "channels_last", "depthwise": False,
}  # fmt: skip
SHAPE = ("C_in", "C_out", "H", "W")


class UsageError(Exception):
    """Something asked for that cannot be done, in one sentence; exit code 2."""


def add_shape(parser: argparse.ArgumentParser, optional: bool = False) -> None:
    """The options that say which problem is meant."""
    # One argument each, as argparse cannot list one of four names in its help.
    meanings = ("channels in", "channels out; not looked at with --depthwise", "height", "width")
    for name, meaning in zip(SHAPE, meanings):
        parser.add_argument(name, type=int, nargs="?" if optional else None, help=meaning)

    def add(name: str, **options: Any) -> None:
        # Absent where it is not given, so that what has no use for it can refuse it; DEFAULTS has what it is then.
        parser.add_argument(name, default=argparse.SUPPRESS, **options)

    add("--batch", type=int, metavar="N", help="pictures (default: 1)")
    add("--dtype", choices=list(DTYPES), help="(default: float32)")
    add("--filter", metavar="K", help="3, or 3x5 (default: 3)")
    add("--stride", type=int, metavar="N", help="(default: 1)")
    add("--dilation", type=int, metavar="N", help="(default: 1)")
    add("--padding", metavar="P", help='a number, "same" or "valid" (default: same)')
    add("--multiplier", type=int, metavar="N", help="depth multiplier (default: 1)")
    add("--activation", choices=ACTIVATIONS[1:], help="before the depthwise convolution (default: none)")
    add("--layout", choices=["channels_last", "contiguous"], help="(default: channels_last)")
    add("--depthwise", action="store_true", help="the depthwise convolution alone")


def shape_of(args: argparse.Namespace) -> list[int]:
    """The numbers of :data:`SHAPE` that were given."""
    return [value for name in SHAPE if (value := getattr(args, name)) is not None]


def options_given(args: argparse.Namespace) -> list[str]:
    """Those options of :func:`add_shape` that were given, its numbers aside."""
    return [f"--{name}" for name in DEFAULTS if name in args]


def _pair(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not found:
        raise UsageError(f"--filter must be a number or two as in 3x5, got {text!r}")
    return int(found[1]), int(found[2] or found[1])


def problem_of(args: argparse.Namespace, device: str) -> Problem:
    """The problem that the options of :func:`add_shape` mean, on a kind of device; nothing is allocated."""
    shape = shape_of(args)
    if len(shape) != 4:
        raise UsageError(f"a shape is four numbers, C_in C_out H W, got {len(shape)}")
    c_in, c_out, h, w = shape
    args = argparse.Namespace(**{**DEFAULTS, **vars(args)})
    r, s = _pair(args.filter)
    counts = {
        "C_in": c_in, "C_out": c_out, "H": h, "W": w, "--batch": args.batch, "--filter": min(r, s),
        "--multiplier": args.multiplier, "--stride": args.stride, "--dilation": args.dilation,
    }  # fmt: skip
    for name, value in counts.items():
        if value < 1:
            raise UsageError(f"{name} must be at least 1, got {value}")
    padding: Any = args.padding
    if padding not in ("same", "valid"):
        if not padding.isdigit():
            raise UsageError(f'--padding must be a number, "same" or "valid", got {padding!r}')
        padding = int(padding)

    def meta(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=DTYPES[args.dtype], device="meta")

    x, w_dw = meta(args.batch, c_in, h, w), meta(c_in * args.multiplier, 1, r, s)
    w_pw = meta(c_out, c_in * args.multiplier, 1, 1)
    try:
        checked = separable_args(
            x, w_dw, w_pw, None, args.stride, padding, args.dilation, None, None, None, None
        )  # fmt: skip
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from None
    first = ACTIVATIONS.index(args.activation) if args.activation else IDENTITY
    found = separable_problem(checked)._replace(device=device, channels_last=args.layout == "channels_last")
    if args.depthwise:
        return found._replace(op="depthwise", c_out=found.c_mid, activations=(first, IDENTITY))
    return found._replace(activations=(first, IDENTITY, IDENTITY))


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(f"{name} cannot be imported ({error}): pip install {name}") from None


def model_of(name: str) -> nn.Module:
    """A model without its weights: ``timm:NAME``, ``torchvision:NAME`` or ``path.py:factory``."""
    kind, colon, rest = name.rpartition(":")
    if not colon or not rest:
        raise UsageError(f"a model is timm:NAME, torchvision:NAME or path.py:factory, got {name!r}")
    try:
        if kind == "timm":
            model: Any = _package("timm").create_model(rest, pretrained=False)
        elif kind == "torchvision":
            model = _package("torchvision").models.get_model(rest, weights=None)
        else:
            model = _from_file(Path(kind), rest)
    except UsageError:
        raise
    except Exception as error:  # whatever somebody's factory may raise
        raise UsageError(f"{name} cannot be built: {type(error).__name__}: {error}".splitlines()[0]) from None
    if not isinstance(model, nn.Module):
        raise UsageError(f"{name} is no torch.nn.Module but {type(model).__name__}")
    return model


def _from_file(path: Path, factory: str) -> Any:
    if not path.is_file():
        raise UsageError(f"there is no file {str(path)!r}; a model is timm:NAME, torchvision:NAME or path.py:factory")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{str(path)!r} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, factory):
        raise UsageError(f"{path.name} has no {factory!r}")
    return getattr(module, factory)()


@contextmanager
def taken(model: str, input: Optional[str], how: str = "") -> Iterator[None]:
    """Whatever a model may raise of an input, in one sentence."""
    try:
        yield
    except Exception as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UsageError(f"{model} does not take {input or '1x3x224x224'}{how}: {said}") from None


def as_options(words: str) -> str:
    """What the swap says, with its argument as the command line names it."""
    return words.replace("fold_bn=True", "--fold-bn")


def input_of(text: Optional[str], device: torch.device) -> torch.Tensor:
    """Random pictures, channels_last, of a shape such as 1x3x224x224."""
    words = (text or "1x3x224x224").split("x")
    if len(words) != 4 or not all(word.isdigit() and int(word) for word in words):
        raise UsageError(f"--input must be N x C x H x W as in 1x3x224x224, got {text!r}")
    n, c, h, w = map(int, words)
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(n, c, h, w, generator=generator).to(device)
    return pictures.contiguous(memory_format=torch.channels_last)
