"""Inception V3: its names and numbers, and feature-by-feature equality with Keras's and torchvision's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xsep.models.inception_v3 import InceptionV3, inception_v3

from .peers import keras_files, peer

__all__ = ["keras_files"]  # a fixture

RELATIVE = 5e-6

#: The convolutions of each kind of module, in torchvision's names.
BRANCHES = {
    "5": "branch1x1 branch5x5_1 branch5x5_2 branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3 branch_pool",
    "6a": "branch3x3 branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3",
    "6": "branch1x1 branch7x7_1 branch7x7_2 branch7x7_3 branch7x7dbl_1 branch7x7dbl_2 branch7x7dbl_3 branch7x7dbl_4 "
    "branch7x7dbl_5 branch_pool",
    "7a": "branch3x3_1 branch3x3_2 branch7x7x3_1 branch7x7x3_2 branch7x7x3_3 branch7x7x3_4",
    "7": "branch1x1 branch3x3_1 branch3x3_2a branch3x3_2b branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3a "
    "branch3x3dbl_3b branch_pool",
}
MIXED = ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")


def convolutions() -> list[str]:
    """All 94, in the order in which the network is usually written down."""
    names = ["Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3"]
    for module in MIXED:
        names += [f"Mixed_{module}.{branch}" for branch in BRANCHES.get(module, BRANCHES[module[0]]).split()]
    return names


def features(model: InceptionV3, x: Tensor) -> dict[str, Tensor]:
    """What each of the eleven modules gives, and the logits."""
    found: dict[str, Tensor] = {}
    for i, name in enumerate(MIXED):
        module = model.get_submodule(f"Mixed_{name}")
        module.register_forward_hook(lambda m, args, y, i=i: found.update({f"mixed{i}": y}))
    with torch.no_grad():
        found["logits"] = model(x)
    return found


def test_names_and_numbers() -> None:
    model = inception_v3()
    leaves = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    keys = {f"{name}.{leaf}" for name in convolutions() for leaf in ("conv.weight", *(f"bn.{leaf}" for leaf in leaves))}
    assert set(model.state_dict()) == {*keys, "fc.weight", "fc.bias"}
    assert len(convolutions()) == 94
    assert sum(p.numel() for p in model.parameters()) == 23_834_568
    assert {m.eps for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-3}


def test_sizes_and_work_at_299() -> None:
    """5.7 GMAC a picture: the usual figure for this network."""
    model, macs = inception_v3().eval(), 0

    def count(module: nn.Module, args: Any, y: Tensor) -> None:
        nonlocal macs
        assert isinstance(module, nn.Conv2d)
        macs += y[0].numel() * module.weight[0].numel()

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    shapes = {name: tuple(y.shape[1:]) for name, y in features(model, torch.randn(1, 3, 299, 299)).items()}
    expected = [(256, 35, 35), *2 * [(288, 35, 35)], *5 * [(768, 17, 17)], (1280, 8, 8), *2 * [(2048, 8, 8)]]
    assert shapes == {**{f"mixed{i}": shape for i, shape in enumerate(expected)}, "logits": (1000,)}
    assert round(1e-9 * macs, 1) == 5.7


def test_features_are_kerass(keras_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keras's own, weights taken over in the order in which its layers are made; its BatchNorms have no scale."""
    weights, expected = np.load(keras_files / "inception.npz"), np.load(keras_files / "inception_features.npz")
    model = inception_v3(num_classes=7).eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for i, name in enumerate(convolutions()):
        state[f"{name}.conv.weight"] = torch.from_numpy(weights[f"{2 * i}.0"]).permute(3, 2, 0, 1)
        state[f"{name}.bn.weight"] = torch.ones_like(state[f"{name}.bn.weight"])
        for j, leaf in enumerate(("bias", "running_mean", "running_var")):
            state[f"{name}.bn.{leaf}"] = torch.from_numpy(weights[f"{2 * i + 1}.{j}"])
    state["fc.weight"], state["fc.bias"] = (torch.from_numpy(weights[f"188.{j}"].T) for j in (0, 1))
    model.load_state_dict(state)

    x = torch.from_numpy(expected["x"]).permute(0, 3, 1, 2)
    theirs = {k: torch.from_numpy(expected[k]) for k in expected.files if k != "x"}
    theirs = {k: y.permute(0, 3, 1, 2) if y.dim() == 4 else y for k, y in theirs.items()}
    as_published = features(model, x)["mixed0"]
    pool = F.avg_pool2d
    monkeypatch.setattr(F, "avg_pool2d", lambda y, k, s, p: pool(y, k, s, p, count_include_pad=False))
    found = features(model, x)
    assert found.keys() == theirs.keys() and len(found) == 12
    for name, y in theirs.items():
        assert (found[name] - y).abs().max() <= RELATIVE * y.abs().max(), name
    # torchvision's average pools, and so ours, count the padding, which Keras's do not: the border shows it.
    assert (as_published - theirs["mixed0"]).abs().max() > 1e-2 * theirs["mixed0"].abs().max()
    inner = (slice(None), slice(None), slice(1, -1), slice(1, -1))
    assert (as_published - theirs["mixed0"])[inner].abs().max() <= RELATIVE * theirs["mixed0"].abs().max()


def test_logits_are_torchvisions() -> None:
    torchvision = peer("torchvision")
    theirs = torchvision.models.inception_v3(weights=None, aux_logits=False, init_weights=False).eval()
    ours = inception_v3().eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 299, 299)
    with torch.no_grad():
        expected = theirs(x)
        assert (ours(x) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_every_parameter_learns() -> None:
    model = inception_v3(num_classes=3).train()
    F.cross_entropy(model(torch.randn(2, 3, 107, 111)), torch.tensor([0, 2])).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and bool(p.grad.isfinite().all()) and bool(p.grad.any()), name


@pytest.mark.parametrize(
    "x, why",
    [
        pytest.param(torch.zeros(1, 3, 74, 299), "74x299", id="74-high"),
        pytest.param(torch.zeros(1, 1, 75, 75), r"\[N, 3, H, W\]", id="channels"),
        pytest.param(torch.zeros(3, 75, 75), r"\[3, 75, 75\]", id="unbatched"),
    ],
)
def test_unfit_pictures_are_refused(x: Tensor, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        inception_v3(num_classes=2)(x)


def test_smallest_picture() -> None:
    model = inception_v3(num_classes=0).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 75, 75)).shape == (1, 2048)


@pytest.mark.parametrize(
    "options, why",
    [(dict(num_classes=-1), "num_classes"), (dict(in_chans=0), "in_chans"), (dict(drop_rate=1.0), "drop_rate")],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_unknown_options_are_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        inception_v3(**options)
