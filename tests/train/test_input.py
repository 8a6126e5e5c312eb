"""Folders and shards: what they find, what they refuse, and that both give the same pictures to the network."""

from __future__ import annotations

import io
import math
import tarfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning", reason="training needs Lightning: pip install 'xsep[train]'")

from PIL import Image

from xsep.train import PRESETS, TrainError
from xsep.train.data import Pictures, open_sets
from xsep.train.folders import Folder
from xsep.train.order import Draw
from xsep.train.pictures import as_tensor, centre_crop, decode, normalised, random_box, random_crop
from xsep.train.shards import Shards, expanded

from .support import jpeg, make_folders, make_shard

IMAGENET, JFT, DIGITS = (PRESETS[name] for name in ("imagenet", "jft", "digits"))


def test_folder(tmp_path: Path) -> None:
    """Classes by name; pictures also deeper; other files and endings in capitals as they come."""
    root = make_folders(tmp_path) / "train"
    (root / "bee" / "deep").mkdir()
    (root / "bee" / "deep" / "x.JPEG").write_bytes(jpeg(31, 32, 5))
    (root / "bee" / "notes.txt").write_text("no picture")
    folder = Folder(root)
    assert (folder.names, folder.classes, len(folder)) == (["ape", "bee"], 2, 9)
    assert [folder.labels(i) for i in range(9)] == [(0,)] * 4 + [(1,)] * 5
    assert [folder.image(i).size for i in range(9)] == [(80 + i, 90) for i in range(4)] + [
        (80 + i, 91) for i in range(4)
    ] + [(31, 32)]


def test_validation_has_the_training_classes(tmp_path: Path) -> None:
    make_folders(tmp_path)
    for file in (tmp_path / "val" / "ape").iterdir():
        file.unlink()
    (tmp_path / "val" / "ape").rmdir()
    sets = open_sets(IMAGENET, str(tmp_path), None, None)
    assert sets.classes == 2
    assert [sets.val.labels(i) for i in range(3)] == [(1,)] * 3  # bee is 1 here too


def test_shards(tmp_path: Path) -> None:
    paths = [make_shard(tmp_path / "a-0.tar", ["3", "0"]), make_shard(tmp_path / "a-1.tar", ["1 4,2", "2"], 7)]
    shards = Shards(paths)
    assert (shards.classes, len(shards)) == (5, 4)
    assert [shards.labels(i) for i in range(4)] == [(3,), (0,), (1, 4, 2), (2,)]
    for i, seed in enumerate((0, 1, 7, 8)):
        assert torch.equal(as_tensor(shards.image(i)), as_tensor(decode(jpeg(85, 80, seed), "")))


def test_shard_of_another_tool(tmp_path: Path) -> None:
    """Folders as members, members in any order, keys that end at the first dot, further members of a sample."""
    path = tmp_path / "a.tar"
    members = [
        ("d", None), ("d/1.cls", b"1"), ("d/2.json", b"{}"), ("d/2.png", jpeg(20, 21, 3, "PNG")),
        ("d/1.jpg", jpeg(22, 23, 4)), ("d/2.cls", b"0\n"), ("e/1.cls", b"2"), ("e/1.JPG", jpeg(24, 25, 5)),
    ]  # fmt: skip
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            if data is None:
                member.type = tarfile.DIRTYPE
            else:
                member.size = len(data)
            tar.addfile(member, None if data is None else io.BytesIO(data))
    shards = Shards([path])
    assert [(shards.image(i).size, shards.labels(i)) for i in range(3)] == [
        ((20, 21), (0,)), ((22, 23), (1,)), ((24, 25), (2,))
    ]  # fmt: skip


@pytest.mark.parametrize(
    "pattern, names",
    [
        ("a.tar", ["a.tar"]),
        ("a-{08..11}.tar", ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]),
        ("{x,yy}/{1..2}.tar", ["x/1.tar", "x/2.tar", "yy/1.tar", "yy/2.tar"]),
        ("a-{3..2}.tar", []),
    ],
)
def test_braces(pattern: str, names: list[str]) -> None:
    assert list(expanded(pattern)) == names


def test_the_ways_to_name_shards(tmp_path: Path) -> None:
    """Patterns, wildcards, a folder of tar files, a folder with both halves: the same pictures."""
    for i in range(2):
        make_shard(tmp_path / "flat" / f"train-{i}.tar", [str(i)], i)
        make_shard(tmp_path / "deep" / "train" / f"{i}.tar", [str(i)], i)
    make_shard(tmp_path / "flat" / "val-0.tar", ["0"])
    make_shard(tmp_path / "deep" / "val" / "0.tar", ["0"])
    flat = tmp_path / "flat"
    for data, val in (
        (f"{flat}/train-{{0..1}}.tar", f"{flat}/val-0.tar"),
        (f"{flat}/train-*.tar", f"{flat}/val-?.tar"),
        (f"{flat}", None),
        (f"{tmp_path}/deep", None),
        (f"{tmp_path}/deep/train", f"{tmp_path}/deep/val"),
    ):
        sets = open_sets(IMAGENET, data, val, None)
        assert (len(sets.train), len(sets.val), sets.classes) == (2, 1, 2)
        assert [sets.train.labels(i) for i in range(2)] == [(0,), (1,)]


def refused(what: str, data: object, val: object = None, classes: int | None = None, preset: str = "imagenet") -> None:
    with pytest.raises(TrainError) as error:
        open_sets(PRESETS[preset], None if data is None else str(data), None if val is None else str(val), classes)
    assert what in error.value.sentence and "\n" not in error.value.sentence


def test_refusals(tmp_path: Path) -> None:
    folders = make_folders(tmp_path / "ok")
    refused("needs pictures: name their folder with --data", None)
    refused("there is no folder /nowhere", "/nowhere")
    refused("say with --val what to validate with", "a-{0..3}.tar")
    refused("there is no file /nowhere/a-0.tar", "/nowhere/a-{0..1}.tar", folders / "val")
    refused("there is no file /nowhere/*.tar", "/nowhere/*.tar", folders / "val")
    refused("--classes is 1", folders, classes=1)
    refused("--data and --val are for the other presets", folders, preset="digits")
    (tmp_path / "bare" / "train").mkdir(parents=True)
    refused("there is no picture below", tmp_path / "bare")
    (folders / "train" / "cow").mkdir()
    refused("there is no picture in", folders)
    (folders / "train" / "cow").rmdir()
    (folders / "val" / "dog").mkdir()
    refused("a class that the training pictures do not have: dog", folders)


def test_refusals_of_shards(tmp_path: Path) -> None:
    good = make_shard(tmp_path / "good.tar", ["0", "1"])
    refused("must hold class numbers from 0, got b'cat'", make_shard(tmp_path / "word.tar", ["cat"]), good)
    refused("must hold class numbers from 0, got b'-1'", make_shard(tmp_path / "minus.tar", ["-1"]), good)
    refused("must hold class numbers from 0, got b''", make_shard(tmp_path / "none.tar", [""]), good)
    refused("has class 7, and there are 2 classes", good, make_shard(tmp_path / "seven.tar", ["7"]))
    refused("there is no picture in", make_shard(tmp_path / "empty.tar", []), good)
    (tmp_path / "text.tar").write_text("no tar file at all")
    refused("is no uncompressed tar file", tmp_path / "text.tar", good)
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as tar:
        tar.add(good, "x")
    refused("is no uncompressed tar file", tmp_path / "packed.tar", good)
    data = jpeg(20, 20, 1)
    with tarfile.open(tmp_path / "bare.tar", "w") as tar:
        member = tarfile.TarInfo("a/b.jpg")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    refused("has no class: a/b.cls is missing", tmp_path / "bare.tar", good)


def test_broken_pictures(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"^here is no picture that can be read$"):
        decode(b"no picture", "here")
    with pytest.raises(TrainError, match=r"^here is no picture that can be read: "):
        decode(jpeg(80, 80, 1)[:-300], "here")
    folder = Folder(make_folders(tmp_path) / "train")
    (tmp_path / "train" / "ape" / "2.jpg").unlink()
    with pytest.raises(TrainError, match=r"2\.jpg cannot be read: No such file"):
        folder.image(2)


def test_random_boxes() -> None:
    """Inside the picture, of the recipe's areas and shapes, spread over both; the middle of what no box fits."""
    generator = torch.Generator().manual_seed(0)
    width, height = 320, 240
    areas, ratios = [], []
    for _ in range(500):
        left, upper, right, lower = random_box(width, height, generator)
        assert 0 <= left < right <= width and 0 <= upper < lower <= height
        areas.append((right - left) * (lower - upper) / (width * height))
        ratios.append((right - left) / (lower - upper))
    assert 0.07 < min(areas) < 0.12 and 0.85 < max(areas) <= 1.0
    assert 0.73 < min(ratios) < 0.78 and 1.28 < max(ratios) < 1.36
    assert abs(sum(map(math.log, ratios))) / 500 < 0.03
    assert random_box(1000, 10, generator) == pytest.approx((500 - 20 / 3, 0, 500 + 20 / 3, 10))


def test_crops_keep_their_place() -> None:
    """A picture whose colours are its coordinates says where each pixel came from."""
    wide = torch.linspace(0, 255, 256).round().to(torch.uint8)
    x = torch.stack([wide.expand(256, 256), wide[:, None].expand(256, 256), torch.zeros(256, 256)], 2).to(torch.uint8)
    image = Image.fromarray(x.numpy())
    middle = centre_crop(image, 71).int()
    assert middle.shape == (71, 71, 3)
    ends = (middle[35, 0, 0], middle[35, -1, 0], middle[0, 35, 1], middle[-1, 35, 1])
    margin = 128 * (1 - 0.8975)
    assert [int(e) for e in ends] == pytest.approx([margin, 255 - margin] * 2, abs=3)
    mirrored = 0
    for seed in range(40):
        box = random_box(256, 256, torch.Generator().manual_seed(seed))
        crop = random_crop(image, 71, torch.Generator().manual_seed(seed)).int()
        left, right = int(crop[35, 0, 0]), int(crop[35, -1, 0])
        mirrored += left > right
        expected = sorted((box[0], box[2]))
        assert sorted((left, right)) == pytest.approx(expected, abs=4)
    assert 10 < mirrored < 30


@pytest.mark.parametrize("training", [True, False], ids=["training", "validation"])
def test_folders_and_shards_give_the_same(tmp_path: Path, training: bool) -> None:
    """And again the same for the same draw, another for another epoch, where training is random."""
    (tmp_path / "c").mkdir()
    for i in range(3):
        (tmp_path / "c" / f"{i}.jpg").write_bytes(jpeg(85, 80, i))
    shards = Shards([make_shard(tmp_path / "a.tar", ["0"] * 3)])
    a, b = (Pictures(s, IMAGENET, 4, 75, training, 6) for s in (Folder(tmp_path), shards))
    for i in range(3):
        x, target = a[Draw(2, i)]
        assert (x.shape, x.dtype, int(target)) == ((75, 75, 3), torch.uint8, 0)
        assert torch.equal(x, b[Draw(2, i)][0]) and torch.equal(x, a[Draw(2, i)][0])
        assert torch.equal(x, a[Draw(3, i)][0]) == (not training)
    blank, target = a[Draw(0, -1)]
    assert not blank.any() and int(target) == -1


def test_targets(tmp_path: Path) -> None:
    shards = Shards([make_shard(tmp_path / "a.tar", ["0 3", "2"])])
    many = Pictures(shards, JFT, 5, 71, False, 0)
    assert [many[Draw(0, i)][1].tolist() for i in (0, 1, -1)] == [[1, 0, 0, 1, 0], [0, 0, 1, 0, 0], [0] * 5]
    one = Pictures(shards, IMAGENET, 5, 71, False, 0)
    assert int(one[Draw(0, 1)][1]) == 2
    with pytest.raises(TrainError, match="has 2 labels, and the preset imagenet takes one"):
        one[Draw(0, 0)]


def test_digits() -> None:
    sets = open_sets(DIGITS, None, None, None)
    assert (len(sets.train), len(sets.val), sets.classes) == (1500, 297, 10)
    seen = {as_tensor(s.image(i)).numpy().tobytes() for s in (sets.train, sets.val) for i in range(len(s))}
    assert len(seen) > 1790  # the halves do not overlap
    assert {s.labels(i)[0] for s in (sets.train, sets.val) for i in range(len(s))} == set(range(10))


def test_normalised() -> None:
    x = torch.randint(0, 256, (2, 5, 7, 3), dtype=torch.uint8)
    y = normalised(x)
    assert y.shape == (2, 3, 5, 7) and y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y[1, 2, 3, 4], x[1, 3, 4, 2].float() / 127.5 - 1)
    assert normalised(torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 2, 1)).flatten().tolist() == [-1.0, 1.0]
