"""Published weights: each source's files against what that source computes; a refusal leaves the model alone."""

from __future__ import annotations

import copy
import os
import pickle
import struct
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from xsep.models import Xception, weights, xception
from xsep.models.weights import Loaded, WeightsError, load_weights
from xsep.models.xception import MaxPool

from .peers import keras_files, peer
from .plain_xception import outputs, randomize

__all__ = ["keras_files"]  # a fixture

State = dict[str, Tensor]
KERAS_RELATIVE = 5e-6
KERAS_SIZES = (150, 224, 299)
KERAS_FILES = ("own.h5", "own.weights.h5", "own.keras", "keras1.h5", "keras2.h5", "nameless.weights.h5")


def conventions(model: nn.Module) -> tuple[set[float], set[str]]:
    """Every BatchNorm's epsilon, every max-pool's padding."""
    eps = {m.eps for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
    return eps, {m.padding for m in model.modules() if isinstance(m, MaxPool)}


def assert_holds(model: nn.Module, state: State, but: tuple[str, ...] = ()) -> None:
    """The model's tensors are the state's, those under the prefixes in ``but`` aside."""
    own = model.state_dict()
    assert own.keys() == state.keys()
    for name, t in state.items():
        if not name.startswith(but):
            assert torch.equal(own[name], t.to(own[name].dtype)), name


@pytest.fixture(scope="module")
def source() -> Xception:
    """Where the weights come from."""
    model = xception(num_classes=5)
    randomize(model)
    return model.eval()


@pytest.fixture(scope="module")
def state(source: Xception) -> State:
    return {name: t.clone() for name, t in source.state_dict().items()}


@pytest.fixture(scope="module")
def target() -> Xception:
    """A model that the refusals must not touch; cheap tests load into it too, and only look at what they loaded."""
    return xception(num_classes=5, bn_eps=1e-2, pool_padding="same")


# PyTorch


def plain(state: State) -> Any:
    return state


def cadene(state: State) -> Any:
    return {name.replace("fc.", "last_linear."): t for name, t in state.items()}


def first_cadene(state: State) -> Any:
    """As xception-b5690688 is stored: pointwise weights in two dimensions, no counters."""
    return {
        name.replace("fc.", "last_linear."): t[:, :, 0, 0] if name.endswith("pointwise.weight") else t
        for name, t in state.items()
        if not name.endswith("num_batches_tracked")
    }


def faceforensics(state: State) -> Any:
    return {f"model.{name.replace('fc.', 'last_linear.1.')}": t for name, t in state.items()}


def deepfakebench(state: State) -> Any:
    renamed = {f"module.backbone.{name.replace('fc.', 'last_linear.')}": t for name, t in state.items()}
    extra = {"adjust_channel.0.weight": torch.randn(512, 2048, 1, 1), "adjust_channel.1.bias": torch.randn(512)}
    return {**renamed, **{f"module.backbone.{name}": t for name, t in extra.items()}}


def trainer(state: State) -> Any:
    """Among other things of a training run; the averaged weights come second."""
    return {"epoch": 3, "optimizer": {"state": {}}, "state_dict": state, "ema": {k: t + 1 for k, t in state.items()}}


def half(state: State) -> Any:
    return {name: t.half() if t.is_floating_point() else t for name, t in state.items()}


@pytest.mark.parametrize("form", [plain, cadene, first_cadene, faceforensics, deepfakebench, trainer, half])
def test_pytorch_checkpoints(state: State, tmp_path: Path, form: Callable[[State], Any]) -> None:
    path = tmp_path / "weights.pth"
    torch.save(form(state), path)
    model = xception(num_classes=5, bn_eps=1e-3, pool_padding="same")
    parameters = [id(p) for p in model.parameters()]
    loaded = load_weights(model, path)
    assert_holds(model, half(state) if form is half else state)
    assert conventions(model) == ({1e-5}, {"torch"})
    assert [id(p) for p in model.parameters()] == parameters
    assert isinstance(loaded, Loaded) and loaded.convention == ("pytorch", 1e-5, "torch")
    prefix = "module.backbone.adjust_channel."
    expected = {"deepfakebench": (f"{prefix}0.weight", f"{prefix}1.bias"), "trainer": ("ema.",)}
    assert loaded.ignored == expected.get(form.__name__, ())


def test_counters_that_were_made_floating(state: State, target: Xception, tmp_path: Path) -> None:
    """As who converts every tensor makes them: a count is read, one that became infinite is left out."""
    counts = {"bn4.num_batches_tracked": torch.tensor(300), "bn3.num_batches_tracked": torch.tensor(70_000)}
    torch.save({name: t.half() for name, t in {**state, **counts}.items()}, tmp_path / "weights.pth")
    model = copy.deepcopy(target)
    was = model.state_dict()["bn3.num_batches_tracked"].clone()
    assert load_weights(model, tmp_path / "weights.pth").ignored == ("bn3.num_batches_tracked",)
    counts["bn3.num_batches_tracked"] = was
    assert_holds(model, {**half(state), **counts})


def test_older_pytorch_format(state: State, target: Xception, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    model = copy.deepcopy(target)
    load_weights(model, path)
    assert_holds(model, state)


def test_safetensors(state: State, target: Xception, tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file(state, tmp_path / "model.safetensors")
    model = copy.deepcopy(target)
    assert load_weights(model, tmp_path / "model.safetensors").convention == weights.PYTORCH
    assert_holds(model, state)
    assert conventions(model) == ({1e-5}, {"torch"})


def test_content_decides_not_the_name(state: State, target: Xception, tmp_path: Path) -> None:
    path = tmp_path / "weights.h5"
    torch.save(state, path)
    model = copy.deepcopy(target)
    load_weights(model, str(path))
    assert_holds(model, state)


def test_same_answers(source: Xception, state: State, tmp_path: Path) -> None:
    """A folded model in another type: loading undoes the folding, and converts."""
    torch.save(state, tmp_path / "weights.pth")
    model = xception(num_classes=5, bn_eps=1e-3, pool_padding="same").double().eval().fold_batchnorm()
    load_weights(model, tmp_path / "weights.pth")
    x = torch.randn(1, 3, 74, 83)
    with torch.no_grad():
        expected = outputs(copy.deepcopy(source).double(), x.double())
        for name, y in outputs(model, x.double()).items():
            assert torch.equal(y, expected[name]), name


def test_headless_model_wants_no_classifier(state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "weights.pth")
    model = xception(num_classes=0)
    load_weights(model, tmp_path / "weights.pth")
    assert_holds(model, {name: t for name, t in state.items() if not name.startswith("fc.")})


@pytest.mark.parametrize("classes", [5, 3], ids=["same-classes", "other-classes"])
@pytest.mark.parametrize("has_one", [True, False], ids=["file-has-head", "file-has-none"])
def test_own_head_is_kept(state: State, tmp_path: Path, classes: int, has_one: bool) -> None:
    torch.save({k: t for k, t in state.items() if has_one or not k.startswith("fc.")}, tmp_path / "weights.pth")
    model = xception(num_classes=classes)
    fc = model.state_dict()["fc.weight"].clone()
    load_weights(model, tmp_path / "weights.pth", head=False)
    assert torch.equal(model.state_dict()["fc.weight"], fc)
    assert torch.equal(model.state_dict()["conv4.pointwise.weight"], state["conv4.pointwise.weight"])


# Keras


@pytest.fixture(scope="module")
def from_keras(keras_files: Path) -> Xception:
    model = xception(num_classes=7)
    loaded = load_weights(model, keras_files / "own.keras")
    assert loaded == Loaded(weights.KERAS, ())
    return model.eval()


def keras_errors(model: Xception, files: Path, size: int) -> dict[str, float]:
    """Each module's largest difference to Keras's own output, relative to the largest output."""
    expected = np.load(files / f"{size}.npz")
    x = torch.from_numpy(expected["x"]).permute(0, 3, 1, 2)
    with torch.no_grad():
        found = outputs(model, x)
    assert {*found, "x"} == set(expected.files)
    errors = {}
    for name, y in found.items():
        theirs = torch.from_numpy(expected[name])
        theirs = theirs.permute(0, 3, 1, 2) if theirs.dim() == 4 else theirs
        assert y.shape == theirs.shape
        errors[name] = float((y - theirs).abs().max() / theirs.abs().max())
    return errors


@pytest.mark.parametrize("size", KERAS_SIZES)
def test_features_are_kerass(from_keras: Xception, keras_files: Path, size: int) -> None:
    assert conventions(from_keras) == ({1e-3}, {"same"})
    errors = keras_errors(from_keras, keras_files, size)
    assert len(errors) == 16 and max(errors.values()) <= KERAS_RELATIVE, errors


def test_wrong_conventions_would_show(from_keras: Xception, keras_files: Path) -> None:
    """What the comparison above is worth: either half of the convention alone is off by far more than it allows."""
    model = copy.deepcopy(from_keras)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-5
    assert min(keras_errors(model, keras_files, 150).values()) > 100 * KERAS_RELATIVE
    model = copy.deepcopy(from_keras)
    for module in model.modules():
        if isinstance(module, MaxPool):
            module.padding = "torch"
    errors = keras_errors(model, keras_files, 150)
    assert errors.pop("block1") <= KERAS_RELATIVE and min(errors.values()) > 1000 * KERAS_RELATIVE


@pytest.mark.parametrize("file", [f for f in KERAS_FILES if f != "own.keras"])
def test_every_keras_file_holds_the_same(from_keras: Xception, keras_files: Path, target: Xception, file: str) -> None:
    model = xception(num_classes=7)
    assert load_weights(model, keras_files / file) == Loaded(weights.KERAS, ())
    assert_holds(model, from_keras.state_dict())
    assert conventions(model) == ({1e-3}, {"same"})


@pytest.mark.parametrize("file", ["nested.keras", "nested.h5"])
def test_keras_model_within_a_model(from_keras: Xception, keras_files: Path, file: str) -> None:
    """Fine-tuned as Keras's guides do: the network without its top, then a classifier of one's own."""
    model = xception(num_classes=3)
    assert load_weights(model, keras_files / file).ignored == ()
    own = model.state_dict()
    assert_holds(model, {**from_keras.state_dict(), **{k: t for k, t in own.items() if k.startswith("fc.")}})
    assert 0.05 < float(own["fc.weight"].abs().max()) < 0.06  # Glorot's uniform bound for 2048 to 3 is 0.054
    assert not bool(own["fc.bias"].any())


def test_keras_class_count(keras_files: Path, target: Xception) -> None:
    refuse(target, keras_files / "own.h5", r"7 classes .* into 5.*num_classes=7.*head=False")


def test_foreign_keras_file(keras_files: Path, target: Xception) -> None:
    refuse(target, keras_files / "foreign.keras", "holds no Xception.*34 separable")


@pytest.mark.parametrize("file", ["own.h5", "own.weights.h5", "own.keras"])
def test_truncated_keras_file(keras_files: Path, tmp_path: Path, target: Xception, file: str) -> None:
    path = tmp_path / file
    path.write_bytes((keras_files / file).read_bytes()[:2_000_001])
    refuse(target, path, "damaged or cut short")


def test_keras_without_h5py(keras_files: Path, target: Xception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    refuse(target, keras_files / "own.h5", "h5py.*not installed: pip install h5py")


def test_keras_links_are_not_followed(keras_files: Path, tmp_path: Path, target: Xception) -> None:
    """One file must not make the loader read another."""
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "links.h5", "w") as file:
        for name in h5py.File(keras_files / "keras2.h5"):
            file[name] = h5py.ExternalLink(str(keras_files / "keras2.h5"), f"/{name}")
    refuse(target, tmp_path / "links.h5", "holds no Xception")


# Peers


def test_features_are_timms(tmp_path: Path) -> None:
    theirs = peer("timm").create_model("legacy_xception", pretrained=False, num_classes=5)
    randomize(theirs)
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    model = xception(num_classes=5, bn_eps=1e-3, pool_padding="same")
    load_weights(model, tmp_path / "timm.pth")
    x = torch.randn(1, 3, 299, 299)
    with torch.no_grad():
        for ours, expected in (
            (model.eval().forward_features(x), theirs.eval().forward_features(x)),
            (model(x), theirs(x)),
        ):
            assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


# Refusals


def refuse(model: Xception, path: Path, why: str, **options: Any) -> None:
    """One sentence that names the file and the reason, and a model that stays as it was."""
    before = {name: t.clone() for name, t in model.state_dict().items()}
    was = conventions(model)
    with pytest.raises(WeightsError, match=why) as caught:
        load_weights(model, path, **options)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert_holds(model, before)
    assert conventions(model) == was


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_no_code_is_run(state: State, tmp_path: Path, target: Xception) -> None:
    torch.save({**state, "extra": Bomb(tmp_path / "ran")}, tmp_path / "weights.pth")
    refuse(target, tmp_path / "weights.pth", "run code to load.*state_dict")
    assert not (tmp_path / "ran").exists()


def test_whole_pickled_model(source: Xception, tmp_path: Path, target: Xception) -> None:
    torch.save(source, tmp_path / "model.pth")
    refuse(target, tmp_path / "model.pth", r"xsep.models.xception.Xception.*save the state_dict\(\)")


def test_unreadable_paths(tmp_path: Path, target: Xception) -> None:
    refuse(target, tmp_path / "none.pth", "No such file")
    refuse(target, tmp_path, "directory")


@pytest.mark.parametrize(
    "content, why",
    [
        pytest.param(b"", "neither", id="empty"),
        pytest.param(b"<html>404</html>", "neither", id="web-page"),
        pytest.param(b"PK\x03\x04" + bytes(300), "damaged", id="zip-of-zeros"),
        pytest.param(b"\x80\x02}q\x00", "damaged", id="cut-pickle"),
        pytest.param(struct.pack("<Q", 2**40) + b"{}", "damaged", id="safetensors-without-end"),
        pytest.param(struct.pack("<Q", 2) + b"{}", "holds no Xception", id="safetensors-of-nothing"),
    ],
)
def test_foreign_bytes(tmp_path: Path, target: Xception, content: bytes, why: str) -> None:
    (tmp_path / "weights").write_bytes(content)
    refuse(target, tmp_path / "weights", why)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("content", [{"lr": 0.1, "steps": [1, 2]}, [1, 2], b"bytes"], ids=["dict", "list", "bytes"])
def test_pickles_that_are_no_checkpoints(tmp_path: Path, target: Xception, content: Any, protocol: int) -> None:
    (tmp_path / "weights.pkl").write_bytes(pickle.dumps(content, protocol))
    refuse(target, tmp_path / "weights.pkl", "' holds Python objects that are not weights(?!.*weights_only)")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_protocol_that_pytorch_does_not_read(state: State, tmp_path: Path, target: Xception) -> None:
    torch.save({"bn1.bias": state["bn1.bias"]}, tmp_path / "weights.pth", pickle_protocol=4)
    refuse(target, tmp_path / "weights.pth", "saved with a pickle_protocol .* save it again(?!.*weights_only)")


@pytest.mark.parametrize("path", [5, b"weights.pth", None], ids=str)
def test_what_is_no_path_is_refused(target: Xception, path: Any) -> None:
    with pytest.raises(TypeError, match=f"path must be a str or an os.PathLike, got {type(path).__name__}"):
        load_weights(target, path)


def test_foreign_bytes_of_hdf5(tmp_path: Path, target: Xception) -> None:
    pytest.importorskip("h5py", reason="h5py, which would read them, is not installed")
    (tmp_path / "weights").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(300))
    refuse(target, tmp_path / "weights", "damaged")


@pytest.mark.parametrize("new", [True, False], ids=["zip", "older"])
def test_truncated_checkpoint(state: State, tmp_path: Path, target: Xception, new: bool) -> None:
    path = tmp_path / "weights.pth"
    torch.save(state, path, _use_new_zipfile_serialization=new)
    path.write_bytes(path.read_bytes()[:5_000_001])
    refuse(target, path, "damaged or cut short")


def without(state: State) -> Any:
    return {k: t for k, t in state.items() if not k.startswith(("block5.rep.4.", "conv3."))}


@pytest.mark.parametrize(
    "form, why",
    [
        pytest.param(lambda s: nn.Linear(2, 3).state_dict(), "holds no Xception", id="foreign"),
        pytest.param(lambda s: [1, 2], "holds no Xception", id="list"),
        pytest.param(without, r"4 missing \(block5.rep.4.conv1.weight, .*conv3.pointwise.weight\)", id="missing"),
        pytest.param(lambda s: {**s, "more.weight": torch.ones(3)}, r"1 unexpected \(more.weight\)", id="unexpected"),
        pytest.param(
            lambda s: {**s, "bn3.weight": torch.ones(3)}, r"bn3.weight \[3\] instead of \[1536\]", id="another-shape"
        ),
        pytest.param(
            lambda s: {**s, "bn3.weight": s["bn3.weight"].int()}, "1 of another kind of number .bn3", id="integers"
        ),
        pytest.param(
            lambda s: {**s, "conv1.weight": s["conv1.weight"][:, :1]}, "of 1 channels.*of 3.*in_chans=1", id="channels"
        ),
        pytest.param(
            lambda s: {**s, "fc.weight": torch.ones(9, 2048), "fc.bias": torch.ones(9)},
            "9 classes and the model into 5.*num_classes=9.*head=False", id="classes",
        ),
        pytest.param(
            lambda s: {k: t for k, t in s.items() if not k.startswith("fc")}, "lacks .*fc.weight, .*head", id="no-head"
        ),
        pytest.param(
            lambda s: {f"{who}.{k}": t for who in "ab" for k, t in s.items()}, "more than one.*'a.', 'b.'", id="two"
        ),
    ],
)  # fmt: skip
def test_misfits(state: State, tmp_path: Path, target: Xception, form: Callable[[State], Any], why: str) -> None:
    torch.save(form(state), tmp_path / "weights.pth")
    refuse(target, tmp_path / "weights.pth", why)


def test_other_models_are_refused(state: State, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="Linear"):
        load_weights(nn.Linear(2, 2), tmp_path / "weights.pth")  # type: ignore[arg-type]


# The hub


def test_hub_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(WeightsError, match=r"huggingface_hub.*install it, or get model.safetensors of https://"):
        weights.fetch_timm()


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = types.ModuleType("huggingface_hub")

    def hf_hub_download(repository: str, file: str) -> str:
        raise OSError("no route to host\nand more")

    hub.hf_hub_download = hf_hub_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    with pytest.raises(WeightsError, match=r"cannot be downloaded \(no route to host\): get .* its path"):
        weights.fetch_timm()


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = types.ModuleType("huggingface_hub")
    hub.hf_hub_download = "/cache/{}/{}".format  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert weights.fetch_timm() == "/cache/timm/legacy_xception.tf_in1k/model.safetensors"
