"""Keras's Xception, out of any of the files Keras has ever written it to, as tensors under timm's names.

Three formats (``.h5`` of Keras 1 to 3, ``.weights.h5``, and the zip archive ``.keras`` around one) and two ages of
names: layers called ``block2_sepconv1`` and the like, or nothing but numbered kinds (``separableconvolution2d_1``),
as in the file first published. The author's implementation names all layers but the four residual ones, so those are
told apart by shape, which is enough: no two have the same.
"""

from __future__ import annotations

import io
import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

#: What a variable is called here -> the names it has had. Keras 1's running_std holds a variance all the same.
VARIABLES = {
    "kernel": ("kernel", "W"),
    "bias": ("bias", "b"),
    "depthwise_kernel": ("depthwise_kernel",),
    "pointwise_kernel": ("pointwise_kernel",),
    "gamma": ("gamma",),
    "beta": ("beta",),
    "moving_mean": ("moving_mean", "running_mean"),
    "moving_variance": ("moving_variance", "running_std"),
}
CANONICAL = {name: canonical for canonical, names in VARIABLES.items() for name in names}

#: "kernel:0", or with the layer's name before it, as Keras 1 wrote: "block1_conv1_W:0".
LEGACY = re.compile(rf"(?:(?P<layer>.+?)_)??(?P<variable>{'|'.join(CANONICAL)})(?::\d+)?")

#: The author's names; a number behind may have come from TensorFlow, when a graph held two such models.
NAMED = re.compile(r"block(?P<block>\d+)_(?P<kind>conv|sepconv)(?P<index>[123])(?P<bn>_bn)?(?:_\d+)?")

#: C_in -> C_out of the residual convolution -> its block in timm's count.
RESIDUALS = {(64, 128): 1, (128, 256): 2, (256, 728): 3, (728, 1024): 12}

#: The largest variable of Xception has 3,145,728 elements; a file that declares this many is not to be believed.
MAX_ELEMENTS = 2**28


class KerasLayer(NamedTuple):
    """One layer's variables, in Keras's axes."""

    name: str
    kind: str  # "conv", "separable", "batchnorm", "dense" or "other"
    variables: dict[str, Tensor]

    @property
    def number(self) -> int:
        """By which Keras tells automatically named layers apart: 3 of ``conv2d_3``, 0 of ``conv2d``."""
        found = re.search(r"_(\d+)$", self.name)
        return int(found[1]) if found else 0


class KerasFormatError(Exception):
    """What is wrong with the file, as the end of a sentence about it."""


def read_keras(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors by timm's names, and the names of layers that have no place in Xception.

    Raises:
        KerasFormatError: the file holds no Xception, or one whose layers cannot be told apart.
        OSError, KeyError, ValueError, zipfile.BadZipFile: the file is damaged.
    """
    return to_timm(read_layers(path))


def read_layers(path: Path) -> list[KerasLayer]:
    """Every layer with variables. Links out of the file are not followed."""
    try:
        import h5py
    except ImportError:
        raise KerasFormatError("is Keras's, and h5py, which reads those, is not installed: pip install h5py") from None
    source: Any = path
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            source = io.BytesIO(archive.read("model.weights.h5"))
    found: dict[str, dict[str, Any]] = {}
    names: dict[str, str] = {}

    def visit(where: str, item: Any) -> None:
        if not isinstance(item, h5py.Dataset) or where.split("/")[0].startswith("optimizer"):
            return
        if item.external or item.is_virtual or item.size is None or item.size > MAX_ELEMENTS:
            raise KerasFormatError(f"has a variable {where!r} that is stored elsewhere, or far too large")
        folder, _, leaf = where.rpartition("/")
        if folder.endswith("/vars"):
            layer, variable = folder.removesuffix("/vars"), leaf
            names[layer] = str(item.parent.attrs.get("name", layer.rpartition("/")[2]))
        else:
            match = LEGACY.fullmatch(leaf)
            variable = CANONICAL[match["variable"]] if match else leaf
            name = (match["layer"] if match else None) or folder.rpartition("/")[2]
            layer = f"{folder}/{name}"
            names[layer] = name
        found.setdefault(layer, {})[variable] = _tensor(item)

    with h5py.File(source, "r") as file:
        file.visititems(visit)
    return [_layer(names[layer], variables) for layer, variables in found.items()]


def _tensor(dataset: Any) -> Tensor:
    array = dataset[()]
    if dataset.attrs.get("dtype") == "bfloat16":
        return torch.from_numpy(array.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")) if array.ndim else array.reshape(1))


def _layer(name: str, variables: dict[str, Tensor]) -> KerasLayer:
    """Variables that only have a number get their names from their shapes and Keras's order."""
    dims = [variables[str(i)].dim() for i in range(len(variables)) if str(i) in variables]
    by_dims = {
        (4,): ["kernel"],
        (4, 4): ["depthwise_kernel", "pointwise_kernel"],
        (1, 1, 1, 1): ["gamma", "beta", "moving_mean", "moving_variance"],
        (2, 1): ["kernel", "bias"],
    }
    if len(dims) == len(variables) and tuple(dims) in by_dims:
        variables = {word: variables[str(i)] for i, word in enumerate(by_dims[tuple(dims)])}
    present = set(variables)
    if present == {"kernel"} and variables["kernel"].dim() == 4:
        kind = "conv"
    elif present == {"depthwise_kernel", "pointwise_kernel"} and all(v.dim() == 4 for v in variables.values()):
        kind = "separable"
    elif present == {"gamma", "beta", "moving_mean", "moving_variance"}:
        kind = "batchnorm"
    elif present == {"kernel", "bias"} and variables["kernel"].dim() == 2:
        kind = "dense"
    else:
        kind = "other"
    return KerasLayer(name, kind, variables)


def to_timm(layers: list[KerasLayer]) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors in PyTorch's axes by timm's names, and the layers left over.

    Raises:
        KerasFormatError: no Xception is among the layers, or two of them have one place.
    """
    if sum(layer.kind == "separable" for layer in layers) < 34:
        raise KerasFormatError("is Keras's, but holds no Xception: fewer than 34 separable convolutions")
    named = any(NAMED.fullmatch(layer.name) for layer in layers)
    places = _by_name(layers) if named else _by_number(layers)
    # Other heads than the author's: only a single dense layer can be the classifier.
    dense = [i for i, layer in enumerate(layers) if layer.kind == "dense"]
    called = [i for i in dense if layers[i].name == "predictions"] or dense
    if len(called) == 1:
        places[called[0]] = "fc"
    taken: dict[str, KerasLayer] = {}
    left: list[str] = []
    for layer, place in zip(layers, places, strict=True):
        if place is None:
            left.append(layer.name)
        elif place in taken:
            raise KerasFormatError(f"has two layers for {place}: {taken[place].name} and {layer.name}")
        else:
            taken[place] = layer
    state: dict[str, Tensor] = {}
    for place, layer in taken.items():
        state.update(_in_pytorch(place, layer))
    return state, left


def _by_name(layers: list[KerasLayer]) -> list[Optional[str]]:
    """timm's module for each layer, None where it has none."""
    residual_bn = {c_out: f"block{block}.skipbn" for (_, c_out), block in RESIDUALS.items()}
    places: list[Optional[str]] = []
    for layer in layers:
        match = NAMED.fullmatch(layer.name)
        place: Optional[str] = None
        if match:
            place = _module(int(match["block"]), int(match["index"]), match["bn"] is not None)
        elif layer.kind == "conv":
            r, s, c_in, c_out = layer.variables["kernel"].shape
            block = RESIDUALS.get((c_in, c_out)) if (r, s) == (1, 1) else None
            place = f"block{block}.skip" if block else None
        elif layer.kind == "batchnorm":
            place = residual_bn.get(layer.variables["gamma"].numel())
        places.append(place)
    return places


def _module(block: int, index: int, bn: bool) -> str:
    """The author's block and index -> timm's module."""
    if block in (1, 14):
        return f"{'bn' if bn else 'conv'}{index + (2 if block == 14 else 0)}"
    # timm counts from the first block with a residual, and keeps a number for the ReLU before each convolution.
    first = 0 if block == 2 else 1
    return f"block{block - 1}.rep.{3 * (index - 1) + first + bn}"


def _by_number(layers: list[KerasLayer]) -> list[Optional[str]]:
    """Likewise, where names are kinds and numbers: within a kind, the numbers follow one of two known orders.

    Numbers count either how the author's code makes the layers, a residual's before those beside it, or, in files of
    Keras 3, how the finished graph runs, where the residual's BatchNorm comes after them. Block 13 tells which.
    """
    made: list[tuple[str, str]] = [("conv", "conv1"), ("conv", "conv2")]
    run = list(made)
    for block in range(2, 14):
        inner = [("separable", _module(block, j, False)) for j in range(1, 4 if 5 <= block <= 12 else 3)]
        skip = [("conv", f"block{block - 1}.skip")] if not 5 <= block <= 12 else []
        made += skip + inner
        run += inner + skip
    tail = [("separable", "conv3"), ("separable", "conv4")]
    made, run = made + tail, run + tail

    numbered = sorted(range(len(layers)), key=lambda i: layers[i].number)
    of_kind = {kind: [i for i in numbered if layers[i].kind == kind] for kind in ("conv", "separable", "batchnorm")}
    if [len(of_kind[kind]) for kind in ("conv", "separable", "batchnorm")] != [6, 34, 40]:
        raise KerasFormatError("is Keras's and names its layers by number, but has other layers than Xception")
    places: list[Optional[str]] = [None] * len(layers)
    for kind in ("conv", "separable"):
        for i, place in zip(of_kind[kind], (name for k, name in made if k == kind), strict=True):
            places[i] = place
    # Channels of block 13's three, the last but two: residual 1024, 728, 1024 as made; 728, 1024, 1024 as run.
    residual_first = layers[of_kind["batchnorm"][-5]].variables["gamma"].numel() == 1024
    for i, (_, conv) in zip(of_kind["batchnorm"], made if residual_first else run, strict=True):
        places[i] = _batchnorm_of(conv)
    return places


def _batchnorm_of(conv: str) -> str:
    """timm's name of the BatchNorm behind a convolution."""
    if conv.startswith("conv"):
        return f"bn{conv.removeprefix('conv')}"
    block, _, rest = conv.partition(".")
    return f"{block}.skipbn" if rest == "skip" else f"{block}.rep.{int(rest.removeprefix('rep.')) + 1}"


def _in_pytorch(place: str, layer: KerasLayer) -> dict[str, Tensor]:
    v = layer.variables
    if layer.kind == "conv":
        return {f"{place}.weight": v["kernel"].permute(3, 2, 0, 1)}
    if layer.kind == "separable":
        return {
            f"{place}.conv1.weight": v["depthwise_kernel"].permute(2, 3, 0, 1),
            f"{place}.pointwise.weight": v["pointwise_kernel"].permute(3, 2, 0, 1),
        }
    if layer.kind == "batchnorm":
        names = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
        return {f"{place}.{ours}": v[theirs] for ours, theirs in names.items()}
    if layer.kind == "dense":
        return {f"{place}.weight": v["kernel"].t(), f"{place}.bias": v["bias"]}
    return {f"{place}.{name}": tensor for name, tensor in v.items()}
