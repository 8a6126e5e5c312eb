"""The command line: what it refuses and how, and the paper's presets from pictures on disk to weights."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("lightning", reason="training needs Lightning: pip install 'xsep[train]'")

from xsep.models import xception
from xsep.train import TrainError, network
from xsep.train.checkpoints import KEY, Identity, resume_point
from xsep.train.main import main
from xsep.train.module import Training
from xsep.train.watch import Watch

from .support import column, complaint, digits, make_folders, make_shard

Capture = pytest.CaptureFixture[str]


def imagenet(data: Path, out: Path, *more: str) -> int:
    choice = ["--preset", "imagenet", "--data", str(data), "--out", str(out), "--accelerator", "cpu"]
    return main([*choice, "--size", "71", "--batch", "4", "--epochs", "1", "--log-every", "1", *more])


class Tiny(nn.Module):
    """Stands in for Xception where a test is not about it."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 9, stride=9)
        self.fc = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).relu().mean((2, 3)))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Callable[..., nn.Module]:
    def build(kind: str, classes: int, drop_rate: float, chain: bool) -> nn.Module:
        return Tiny(classes) if kind == "xception" else network.build(kind, classes, drop_rate, chain)

    monkeypatch.setattr("xsep.train.module.build", build)
    return build


def test_imagenet_from_folders(tmp_path: Path) -> None:
    """The network itself, an epoch of two steps; its weights load as every other Xception's."""
    out = tmp_path / "run"
    assert imagenet(make_folders(tmp_path / "pictures"), out, "--workers", "0") == 0
    assert len(column(out, "loss")) == 2 and column(out, "lr") == [0.045] * 2
    assert 0 <= column(out, "val_top1")[0] <= column(out, "val_top5")[0] == 1.0
    model = xception(pretrained=out / "weights.pt", num_classes=2).eval()
    assert model(torch.randn(1, 3, 71, 71)).isfinite().all()
    state = torch.load(out / "weights.pt", weights_only=True)
    fresh = xception(num_classes=2).state_dict()
    assert all(not torch.equal(state[name], fresh[name]) for name in state if name.endswith("weight"))


def test_jft_from_shards(tmp_path: Path, tiny: object) -> None:
    """Two processes that decode; several labels a picture; MAP@100 goes up on pictures that are learned by heart."""
    for i in range(2):
        make_shard(tmp_path / f"train-{i}.tar", ["0 1", "2", "3 4", "1"], 4 * i)
    data, out = str(tmp_path / "train-{0..1}.tar"), tmp_path / "run"
    choice = ["--preset", "jft", "--data", data, "--val", data, "--size", "71", "--batch", "4", "--accelerator", "cpu"]
    assert main([*choice, "--workers", "2", "--epochs", "25", "--log-every", "1", "--out", str(out)]) == 0
    losses, precision = column(out, "loss"), column(out, "val_map100")
    assert len(losses) == 50 and len(precision) == 25
    assert losses[-1] < 0.8 * losses[0] and 0.5 < precision[-1] <= 1.0
    assert column(out, "lr") == [0.001] * 50


def test_accumulated_with_workers_and_resumed(tmp_path: Path, tiny: object) -> None:
    """Random crops by place and time: however many processes decode, and over a resume, the same losses."""
    pictures = make_folders(tmp_path / "pictures", train=8)
    a, b = tmp_path / "a", tmp_path / "b"
    assert imagenet(pictures, a, "--epochs", "3", "--workers", "0", "--accumulate", "2") == 0
    assert imagenet(pictures, b, "--epochs", "2", "--workers", "2", "--accumulate", "2") == 0
    assert imagenet(pictures, b, "--epochs", "3", "--workers", "1", "--batch", "8", "--resume") == 0
    assert len(column(a, "loss")) == 6
    assert column(b, "loss") == pytest.approx(column(a, "loss"), rel=1e-5)
    assert column(b, "val_loss") == pytest.approx(column(a, "val_loss"), rel=1e-5)


def test_a_loss_that_is_not_finite(tmp_path: Path, capsys: Capture) -> None:
    """By a learning rate of 1e30, after one step."""
    assert "the loss is nan in step 2" in complaint(capsys, digits(tmp_path / "x", "--lr", "1e30"), 1)
    assert not (tmp_path / "x" / "last.ckpt").exists()


def test_the_first_bad_step_is_named_later() -> None:
    """As on a GPU, where the host looks now and then: at the latest before a checkpoint."""
    watch = Watch(Path("last.ckpt"), 50)
    for step, loss in enumerate((1.0, float("nan"), float("-inf"), 2.0)):
        watch._loss = torch.tensor(loss)
        watch._note(step)
    with pytest.raises(TrainError, match="the loss is not finite in step 2:"):
        watch.on_save_checkpoint(None, None, {})  # type: ignore[arg-type]


def test_no_checkpoint_behind_a_loss_that_is_not_finite(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of steps 20, 25, 30, ... the first two are kept, and the run can go on from there."""
    inner = Training.training_step

    def training_step(self: Training, batch: Any, batch_idx: int) -> Tensor:
        loss = inner(self, batch, batch_idx)
        if self.trainer.global_step == 29:
            self.step_loss = self.step_loss * float("inf")
        return loss

    monkeypatch.setattr(Training, "training_step", training_step)
    said = complaint(capsys, digits(tmp_path / "x", "--checkpoint-every", "5"), 1)
    assert "the loss is inf in step 30" in said
    assert torch.load(tmp_path / "x" / "last.ckpt", weights_only=True)["global_step"] == 25
    monkeypatch.undo()
    assert digits(tmp_path / "x", "--epochs", "2", "--resume") == 0


@pytest.mark.parametrize(
    "argv, says",
    [
        ([], "the following arguments are required: --preset"),
        (["--preset", "mnist"], "argument --preset: invalid choice: 'mnist'"),
        (["--preset", "digits", "--batch", "0"], "argument --batch: must be a number from 1, got '0'"),
        (["--preset", "digits", "--epochs", "-3"], "argument --epochs: must be a number from 1, got '-3'"),
        (["--preset", "digits", "--seed", "x"], "argument --seed: must be a number from 0, got 'x'"),
        (["--preset", "digits", "--lr", "nan"], "argument --lr: must be a positive number, got 'nan'"),
        (["--preset", "digits", "--precision", "8"], "argument --precision: invalid choice: '8'"),
    ],
    ids=lambda v: "_".join(v) or "nothing" if isinstance(v, list) else "",
)
def test_arguments(argv: list[str], says: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as end:
        main(argv)
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.startswith(f"xsep.train: {says}") and err.count("\n") == 1


def test_refusals(tmp_path: Path, capsys: Capture) -> None:
    """Before anything is trained, and before the run's folder is made."""
    pictures = make_folders(tmp_path / "pictures")
    out = tmp_path / "run"
    cases: list[tuple[Callable[[], int], str]] = [
        (lambda: imagenet(Path("/nowhere"), out), "there is no folder /nowhere"),
        (lambda: imagenet(pictures / "train", out), f"there is no folder {pictures}/train/train"),
        (lambda: imagenet(pictures, out, "--size", "70"), "at least 71 pixels, and --size is 70"),
        (lambda: digits(out, "--size", "71"), "the digits are 8x8 pixels"),
        (lambda: digits(out, "--data", "x"), "--data and --val are for the other presets"),
    ]
    for run, says in cases:
        assert says in complaint(capsys, run(), 2)
        assert not out.exists()


def test_refusals_of_a_folder(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be made" in complaint(capsys, digits(tmp_path / "file" / "run"), 2)
    out = tmp_path / "run"
    assert "there is no checkpoint" in complaint(capsys, digits(out, "--resume"), 2)
    said = complaint(capsys, digits(out, "--batch", "1501"), 2)
    assert "there are 1500 training pictures, fewer than a step's 1501" in said
    assert "--sync-bn needs GPUs" in complaint(capsys, digits(out, "--sync-bn"), 2)
    if not torch.cuda.is_available():
        code = main(["--preset", "digits", "--accelerator", "gpu", "--out", str(out)])
        assert "gpu" in complaint(capsys, code, 2)
    (out / "last.ckpt").write_text("")
    assert "holds a run already" in complaint(capsys, digits(out), 2)
    assert "is no checkpoint that can be read" in complaint(capsys, digits(out, "--resume"), 2)
    torch.save({"state_dict": {}}, out / "last.ckpt")
    assert "is no checkpoint of xsep.train" in complaint(capsys, digits(out, "--resume"), 2)


def test_a_broken_picture_ends_the_run(tmp_path: Path, capsys: Capture, tiny: object) -> None:
    """In a process that decodes: still one sentence."""
    pictures = make_folders(tmp_path / "pictures")
    (pictures / "train" / "ape" / "1.jpg").write_bytes(b"no picture")
    said = complaint(capsys, imagenet(pictures, tmp_path / "run", "--workers", "1"), 2)
    assert said == f"{pictures}/train/ape/1.jpg is no picture that can be read"


MINE = Identity("digits", "small", 10, 1500, 32, 2, 1, 0)


@pytest.mark.parametrize(
    "change, step, says",
    [
        ({"preset": "imagenet", "network": "xception"}, 0, "holds another network: xception with 10 classes"),
        ({"classes": 11}, 0, "holds another network: small with 11 classes"),
        ({"preset": "jft"}, 0, "its preset is jft, here digits"),
        ({"pictures": 7}, 0, "its number of training pictures is 7, here 1500"),
        ({"seed": 5}, 0, "its seed is 5, here 0"),
        ({"world": 3}, 0, "has 96 pictures a step, here 64"),
        ({"world": 1, "accumulate": 2}, 24, "--batch 32 --accumulate 2 on 1 devices in all"),
    ],
    ids=["network", "classes", "preset", "data", "seed", "pictures_a_step", "shared_out_otherwise"],
)
def test_checkpoints_of_other_runs(tmp_path: Path, change: dict[str, Any], step: int, says: str) -> None:
    path, shapes = tmp_path / "last.ckpt", {"w": (2, 3)}
    kept = {KEY: MINE._replace(**change)._asdict(), "state_dict": {"w": torch.zeros(2, 3)}, "global_step": step}
    torch.save(kept, path)
    with pytest.raises(TrainError) as error:
        resume_point(path, MINE, shapes)
    assert says in error.value.sentence


def test_where_a_checkpoint_goes_on(tmp_path: Path) -> None:
    """23 steps an epoch; at an epoch's end the pictures may be shared out anew."""
    path = tmp_path / "last.ckpt"
    for step, theirs, expected in (
        (0, MINE, (0, 0)), (22, MINE, (0, 22)), (23, MINE, (1, 0)), (51, MINE, (2, 5)),
        (46, MINE._replace(batch=64, world=1), (2, 0)),
    ):  # fmt: skip
        torch.save({KEY: theirs._asdict(), "state_dict": {"w": torch.zeros(2)}, "global_step": step}, path)
        assert resume_point(path, MINE, {"w": (2,)}) == expected
    with pytest.raises(TrainError, match="holds another network"):
        resume_point(path, MINE, {"w": (3,)})
    with pytest.raises(TrainError, match="holds another network"):
        resume_point(path, MINE, {"w": (2,), "v": (1,)})


def test_checkpoint_of_another_architecture(tmp_path: Path, capsys: Capture, tiny: object) -> None:
    """Through the command line, from the digits' network to another."""
    assert digits(tmp_path / "digits", "--epochs", "1") == 0
    capsys.readouterr()
    pictures = make_folders(tmp_path / "pictures")
    code = imagenet(pictures, tmp_path / "run", "--resume", str(tmp_path / "digits" / "last.ckpt"))
    said = complaint(capsys, code, 2)
    assert "last.ckpt holds another network: small with 10 classes (preset digits)" in said
    assert "this run's is xception with 2 (preset imagenet)" in said


def test_without_lightning() -> None:
    """One sentence that names what to install; help needs neither, and importing the package neither."""
    code = (
        "import sys\n"
        "for name in ('lightning', 'torchmetrics'):\n"
        "    sys.modules[name] = None\n"
        "import xsep.train\n"
        "from xsep.train.main import main, parser\n"
        "assert 'JFT' in xsep.train.presets.__doc__ and parser().format_help()\n"
        "sys.exit(main(['--preset', 'digits']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "xsep.train: training needs lightning and torchmetrics: pip install lightning torchmetrics\n"
    )
