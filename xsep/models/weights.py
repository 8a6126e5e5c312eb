"""Published weights of Xception, whoever published them, into our model: recognised, renamed, checked, then loaded.

One architecture is published in two conventions. PyTorch's (timm, Cadene, FaceForensics++, DeepfakeBench) has a
BatchNorm epsilon of 1e-5 and max-pools padded by one on every side; Keras's has 1e-3 and TensorFlow's SAME. With the
wrong one the predicted class is mostly still right, the features are not: so the loader sets both.
"""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Union

import torch
from torch import Tensor, nn

from .blocks import MaxPool
from .keras_weights import KerasFormatError, read_keras
from .xception import Xception

#: Where timm's own checkpoint lies on the Hugging Face hub.
TIMM_REPOSITORY, TIMM_FILE = "timm/legacy_xception.tf_in1k", "model.safetensors"

#: A key that every PyTorch Xception has, whatever stands before it.
MARKER = "block1.rep.0.pointwise.weight"

#: Modules that some publishers added and their own forward leaves out, so that nothing is lost without them.
UNUSED = ("adjust_channel.",)

#: A counter that no inference reads, and that neither Keras nor PyTorch before 0.4 kept.
COUNTER = "num_batches_tracked"

LISTED = 6


class WeightsError(ValueError):
    """A file that cannot be loaded, and why, in one sentence; the model is as it was."""


class Convention(NamedTuple):
    """What a source of weights takes for granted beside its weights."""

    source: str
    bn_eps: float
    pool_padding: str


PYTORCH = Convention("pytorch", 1e-5, "torch")
KERAS = Convention("keras", 1e-3, "same")


class Loaded(NamedTuple):
    """What was loaded: the source's convention, now the model's, and what the file had beside Xception."""

    convention: Convention
    ignored: tuple[str, ...]  # keys, or names of Keras layers


def load_weights(model: Xception, path: Union[str, os.PathLike[str]], *, head: bool = True) -> Loaded:
    """Loads a checkpoint of any publisher into the model and sets its BatchNorm epsilon and max-pool padding to suit.

    Read are PyTorch files (with ``weights_only=True``: no code in them is run) and safetensors with the keys of timm,
    Cadene, FaceForensics++ or DeepfakeBench, under any prefix, and Keras's ``.h5``, ``.weights.h5`` and ``.keras``
    (these need h5py). What a file is, its content says, not its name. Weights of another floating type are converted.

    Args:
        model: what to load into, on any device and of any floating type.
        path: the file.
        head: whether the classifier is loaded too. Without it the model keeps its own, and the file may have another
            or none. A model without a classifier (``num_classes=0``) never asks for one.

    Raises:
        WeightsError: the file cannot be read, holds no Xception, or does not fit: the message says what is missing,
            unexpected or of another shape. The model is then unchanged.
        TypeError: model is not an :class:`Xception`, or path is no path.
    """
    if not isinstance(model, Xception):
        raise TypeError(f"model must be an xsep.models.Xception, got {type(model).__name__}")
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a str or an os.PathLike, got {type(path).__name__}")
    path = Path(path)
    state, convention, ignored = _read(path)
    own = model.state_dict()
    if not head or model.num_classes == 0:
        state = {name: t for name, t in state.items() if not _is_head(name)}
        wanted = [name for name in own if not _is_head(name)]
    else:
        wanted = list(own)
    _check(path, state, {name: own[name] for name in wanted})
    model.load_state_dict({**own, **state})
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eps = convention.bn_eps
        elif isinstance(module, MaxPool):
            module.padding = convention.pool_padding
    return Loaded(convention, tuple(ignored))


def fetch_timm() -> str:
    """The path of timm's checkpoint, downloaded by huggingface_hub where its cache has none yet.

    Raises:
        WeightsError: huggingface_hub is not installed, or cannot get the file; the message says what to do.
    """
    otherwise = (
        f"get {TIMM_FILE} of https://huggingface.co/{TIMM_REPOSITORY} in another way and give its path instead of"
        ' pretrained="timm"'
    )
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise WeightsError(f"huggingface_hub, which downloads, is not installed: install it, or {otherwise}") from None
    try:
        return str(hf_hub_download(TIMM_REPOSITORY, TIMM_FILE))
    except Exception as error:  # its errors stem from several HTTP libraries, by version
        raise WeightsError(f"{TIMM_REPOSITORY} cannot be downloaded ({_first_line(error)}): {otherwise}") from None


def _is_head(name: str) -> bool:
    return name.split(".")[0].startswith("fc")


def _read(path: Path) -> tuple[dict[str, Tensor], Convention, list[str]]:
    """Tensors by timm's names, the convention they were trained in, and what else the file holds."""
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise WeightsError(f"{str(path)!r} cannot be read: {error.strerror}") from None
    try:
        if start.startswith(b"\x89HDF\r\n\x1a\n") or _is_keras_archive(path, start):
            state, left = read_keras(path)
            return state, KERAS, left
        if start[8:] == b"{":
            from safetensors.torch import load_file

            content = load_file(path)
        elif start.startswith((b"PK", b"\x80")):
            content = torch.load(path, map_location="cpu", weights_only=True)
        else:
            raise WeightsError(f"{str(path)!r} is neither a PyTorch, a safetensors nor a Keras file")
    except KerasFormatError as error:
        raise WeightsError(f"{str(path)!r} {error}") from None
    except ImportError:
        raise WeightsError(
            f"{str(path)!r} is a safetensors file, and safetensors is not installed: pip install safetensors"
        ) from None
    except WeightsError:
        raise
    except Exception as error:  # what a reader raises on damaged bytes is anything
        raise WeightsError(f"{str(path)!r} {_unread(start, error)}") from None
    return _to_timm(path, content)


def _unread(start: bytes, error: Exception) -> str:
    """What a reader's error says of a file that starts so, without PyTorch's advice: ``weights_only`` stays True."""
    text = str(error)
    foreign = re.search(r"GLOBAL ([\w.]+)", text) if isinstance(error, pickle.UnpicklingError) else None
    if foreign:
        return (
            f"is a pickle of {foreign[1]} objects, which would run code to load: where the file is trusted, save the"
            " state_dict() of what is in it, and load that"
        )
    # PyTorch reads pickles of protocols 2 and 3, and then misses the number that begins its own files; of later ones
    # it does not know the instructions.
    if start.startswith(b"\x80") and ("magic number" in text or ("Unsupported operand" in text and start[1] > 2)):
        return (
            "holds Python objects that are not weights as torch.save writes them: save a state_dict() with torch.save,"
            " and load that"
        )
    if "Unsupported operand 149" in text:  # the first of protocols 4 and 5
        return (
            "was saved with a pickle_protocol that PyTorch does not read without running code: save it again with"
            " torch.save's own"
        )
    return f"is damaged or cut short: {_first_line(text.rpartition('WeightsUnpickler error:')[2] or error)}"


def _is_keras_archive(path: Path, start: bytes) -> bool:
    if not start.startswith(b"PK") or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return "model.weights.h5" in archive.namelist()


def _first_line(error: Union[Exception, str]) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _state_dicts(content: Any, name: str = "") -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """The state dicts in a checkpoint, which may also hold an optimizer's state, an epoch and so on."""
    if not isinstance(content, Mapping):
        return
    if any(isinstance(key, str) and key.endswith(MARKER) for key in content):
        yield name, content
        return
    for key, value in content.items():
        yield from _state_dicts(value, f"{name}{key}.")


def _to_timm(path: Path, content: Any) -> tuple[dict[str, Tensor], Convention, list[str]]:
    """As :func:`_read`, of a PyTorch checkpoint."""
    found = list(_state_dicts(content))
    if not found:
        raise WeightsError(f"{str(path)!r} holds no Xception: no key in it ends in {MARKER!r}")
    name, raw = found[0]
    prefixes = [key.removesuffix(MARKER) for key in raw if key.endswith(MARKER)]
    if len(prefixes) > 1:
        raise WeightsError(f"{str(path)!r} holds more than one Xception: under {', '.join(map(repr, prefixes))}")
    state: dict[str, Tensor] = {}
    ignored = [other for other, _ in found[1:]]
    for key, value in raw.items():
        ours = key.removeprefix(prefixes[0])
        if not key.startswith(prefixes[0]) or ours.startswith(UNUSED) or not isinstance(value, Tensor):
            ignored.append(name + key)
            continue
        if ours.endswith(COUNTER) and value.is_floating_point():  # all of a model was made 16-bit, counters included
            value = value.double()
            if not bool((value.abs() <= 2**53).all()):  # 16 bits did not hold it
                ignored.append(name + key)
                continue
            value = value.long()
        ours = re.sub(r"^last_linear\.(1\.)?", "fc.", ours)
        state[ours] = value[:, :, None, None] if ours.endswith("pointwise.weight") and value.dim() == 2 else value
    return state, PYTORCH, ignored


def _check(path: Path, state: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """Raises WeightsError where state does not fill the model's tensors one by one."""
    missing = [name for name in own if name not in state and not name.endswith(COUNTER)]
    unexpected = [name for name in state if name not in own]
    odd = [name for name in own if name in state and state[name].shape != own[name].shape]
    whole = [name for name in own if name in state and own[name].is_floating_point() != state[name].is_floating_point()]
    file = repr(str(path))
    if odd and all(_is_head(name) for name in odd) and not missing and not unexpected:
        theirs, ours = (t["fc.bias"].numel() for t in (state, own))
        raise WeightsError(
            f"{file} classifies into {theirs} classes and the model into {ours}: build the model with"
            f" num_classes={theirs}, or call load_weights with head=False to keep the model's own"
        )
    if odd == ["conv1.weight"] and not missing and not unexpected:
        theirs, ours = (t["conv1.weight"].shape[1] for t in (state, own))
        raise WeightsError(
            f"{file} takes pictures of {theirs} channels and the model of {ours}: build it with in_chans={theirs}"
        )
    if missing and all(_is_head(name) for name in missing) and not unexpected and not odd:
        raise WeightsError(
            f"{file} lacks the model's {', '.join(missing)}: call load_weights with head=False to keep the model's own"
        )
    wrong = {
        "missing": missing,
        "unexpected": unexpected,
        "of another shape": [f"{n} {list(state[n].shape)} instead of {list(own[n].shape)}" for n in odd],
        "of another kind of number": whole,
    }
    parts = [f"{len(names)} {what} ({_some(names)})" for what, names in wrong.items() if names]
    if parts:
        raise WeightsError(f"{file} does not fit the model: {'; '.join(parts)}")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
