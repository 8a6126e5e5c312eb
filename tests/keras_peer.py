"""Run as a script, so that Keras chooses its PyTorch backend at import: saves Keras's own models, and what they give.

``python -m tests.keras_peer DIRECTORY``
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any, Optional

os.environ["KERAS_BACKEND"] = "torch"

import h5py
import keras
import numpy as np
import torch
from keras.src.applications import inception_v3 as inception_source
from keras.src.applications import xception as xception_source

CLASSES = 7
SIZES = (150, 224, 299)
KERAS1_KINDS = {"conv2d": "convolution2d", "separable_conv2d": "separableconvolution2d",
                "batch_normalization": "batchnormalization", "dense": "dense"}  # fmt: skip
KERAS1_VARIABLES = {"kernel": "W", "bias": "b", "moving_mean": "running_mean", "moving_variance": "running_std"}


class Recorder:
    """Stands where a source file has ``layers``, and keeps every layer in the order of its making."""

    def __init__(self) -> None:
        self.made: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        def make(*args: Any, **kwargs: Any) -> Any:
            layer = getattr(keras.layers, name)(*args, **kwargs)
            self.made.append(layer)
            return layer

        return make if name[0].isupper() else getattr(keras.layers, name)


def randomize(model: Any, seed: int) -> None:
    """Weights that keep activations near 1, and statistics away from their initial 0 and 1."""
    rng = np.random.default_rng(seed)
    for layer in model.layers:
        for variable in layer.weights:
            shape = tuple(variable.shape)
            if variable.name in ("kernel", "pointwise_kernel", "depthwise_kernel"):
                fan_in = 9 if variable.name == "depthwise_kernel" else np.prod(shape[:-1])
                variable.assign(rng.standard_normal(shape) / np.sqrt(fan_in))
            elif variable.name == "gamma":
                variable.assign(rng.uniform(0.5, 1.2, shape))
            elif variable.name == "moving_variance":
                variable.assign(rng.uniform(0.5, 2.0, shape))
            else:
                variable.assign(rng.uniform(-0.3, 0.3, shape))


def make(source: Any, build: Any, seed: int) -> tuple[Any, list[Any]]:
    """A model of keras.applications with random weights, and its layers in the order of their making."""
    recorder = source.layers = Recorder()
    try:
        model = build(weights=None, input_tensor=keras.Input((None, None, 3)), classes=CLASSES,
                      classifier_activation=None)  # fmt: skip
    finally:
        source.layers = keras.layers
    randomize(model, seed)
    return model, [layer for layer in recorder.made if layer.weights]


def kind_of(layer: Any) -> str:
    return {"Conv2D": "conv2d", "SeparableConv2D": "separable_conv2d", "BatchNormalization": "batch_normalization",
            "Dense": "dense"}[type(layer).__name__]  # fmt: skip


def write_keras1(path: Path, made: list[Any]) -> None:
    """Nothing but kinds and numbers, counted as the layers are made: the naming of the file first published."""
    counts: dict[str, int] = {}
    with h5py.File(path, "w") as file:
        for layer in made:
            kind = KERAS1_KINDS[kind_of(layer)]
            counts[kind] = counts.get(kind, 0) + 1
            name = f"{kind}_{counts[kind]}"
            group = file.create_group(name)
            group.attrs["weight_names"] = [f"{name}_{KERAS1_VARIABLES.get(v.name, v.name)}:0" for v in layer.weights]
            for weight, value in zip(group.attrs["weight_names"], layer.get_weights(), strict=True):
                group[weight] = value


def write_keras2(path: Path, model: Any) -> None:
    """The author's names, the variables with a device-like suffix, one graph's names made unique by TensorFlow."""
    with h5py.File(path, "w") as file:
        for layer in model.layers:
            group = file.create_group(layer.name)
            for v, value in zip(layer.weights, layer.get_weights(), strict=True):
                group[f"{layer.name}_1/{v.name}:0" if "sepconv" in layer.name else f"{layer.name}/{v.name}:0"] = value


def write_nameless(path: Path, source: Path) -> None:
    """A .weights.h5 as TensorFlow 2.13 wrote it: layers counted by kind, no names beside the variables."""
    shutil.copy(source, path)
    with h5py.File(path, "a") as file:
        for group in file["layers"].values():
            del group["vars"].attrs["name"]
        file.move("layers", "_layer_checkpoint_dependencies")


def picture(size: int) -> np.ndarray:
    return np.random.default_rng(size).uniform(-1, 1, (1, size, size, 3)).astype("float32")


def values(probe: Any, x: np.ndarray) -> list[np.ndarray]:
    with torch.no_grad():
        return [keras.ops.convert_to_numpy(y) for y in probe([x], training=False)]


def save(path: Path, arrays: dict[str, Any], x: Optional[np.ndarray] = None) -> None:
    if x is not None:
        arrays["x"] = x
    np.savez(path, **arrays)


def xception(out: Path) -> None:
    model, made = make(xception_source, xception_source.Xception, seed=1)
    model.save(out / "own.h5")
    model.save(out / "own.keras")
    model.save_weights(out / "own.weights.h5")
    write_keras1(out / "keras1.h5", made)
    write_keras2(out / "keras2.h5", model)
    write_nameless(out / "nameless.weights.h5", out / "own.weights.h5")

    sums = [layer.output for layer in model.layers if isinstance(layer, keras.layers.Add)]
    features = {
        "block1": model.get_layer("block1_conv2_act").output,
        **{f"block{k}": y for k, y in enumerate(sums, 2)},
        "block14_sepconv1": model.get_layer("block14_sepconv1_act").output,
        "block14_sepconv2": model.get_layer("block14_sepconv2_act").output,
        "logits": model.output,
    }
    probe = keras.Model(model.input, list(features.values()))
    for size in SIZES:
        x = picture(size)
        save(out / f"{size}.npz", dict(zip(features, values(probe, x), strict=True)), x)

    bottom = keras.Model(model.input, model.get_layer("block14_sepconv2_act").output, name="xception")
    tuned = keras.Sequential([bottom, keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(3, name="mine")])
    tuned.save(out / "nested.keras")
    tuned.save(out / "nested.h5")
    keras.Sequential([keras.Input((8,)), keras.layers.Dense(2)]).save(out / "foreign.keras")


def inception(out: Path) -> None:
    model, made = make(inception_source, inception_source.InceptionV3, seed=2)
    kernels = [layer.get_weights() for layer in made]
    save(out / "inception.npz", {f"{i}.{j}": w for i, ws in enumerate(kernels) for j, w in enumerate(ws)})
    names = [f"mixed{i}" for i in range(11)]
    probe = keras.Model(model.input, [*(model.get_layer(name).output for name in names), model.output])
    x = picture(155)
    save(out / "inception_features.npz", dict(zip([*names, "logits"], values(probe, x), strict=True)), x)


if __name__ == "__main__":
    xception(Path(sys.argv[1]))
    inception(Path(sys.argv[1]))
