"""Metrics and losses on cases worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning", reason="training needs Lightning: pip install 'xsep[train]'")

from torchmetrics.retrieval import RetrievalMAP

from xsep.train import PRESETS
from xsep.train.metrics import MeanAveragePrecisionAtK
from xsep.train.module import Training, loss_of
from xsep.train.order import Geometry


def test_map_by_hand() -> None:
    """Ranks by score, of 4 labels looked for among the first 3."""
    scores = torch.tensor([
        [0.9, 0.8, 0.7, 0.6, 0.5],  # labels at ranks 1 and 3: (1/1 + 2/3) / 2
        [-5.0, -1.0, -2.0, -3.0, -4.0],  # scores below zero, labels at ranks 2 and 4, one found: (1/2) / 2
        [0.1, 0.2, 0.3, 0.4, 0.5],  # all five: 1, divided by k and not by 5
        [0.5, 0.4, 0.3, 0.2, 0.1],  # its label at rank 5: 0
        [0.5, 0.4, 0.3, 0.2, 0.1],  # no label: left out
    ])  # fmt: skip
    labels = torch.tensor([[1, 0, 1, 0, 0], [0, 0, 1, 0, 1], [1] * 5, [0, 0, 0, 0, 1], [0] * 5])
    expected = [5 / 6, 1 / 4, 1.0, 0.0]
    metric = MeanAveragePrecisionAtK(3)
    for score, label, value in zip(scores, labels, expected):
        assert float(metric(score[None], label[None])) == pytest.approx(value)
    metric.update(scores[4:], labels[4:])
    assert float(metric.compute()) == pytest.approx(sum(expected) / 4)


def test_map_of_few_classes() -> None:
    """Fewer classes than k: all of them."""
    metric = MeanAveragePrecisionAtK(100)
    assert float(metric(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([[0.0, 1.0, 1.0]]))) == pytest.approx(
        (1 / 2 + 2 / 3) / 2
    )


def test_map_beside_torchmetrics() -> None:
    """Equal where all labels are among the first k; where they are not, RetrievalMAP forgets those it missed."""
    torch.manual_seed(2)
    scores = torch.rand(13, 97)
    labels = (torch.rand(13, 97) < 0.1).long()
    labels[:, 0] = 1
    indexes = torch.arange(13)[:, None].expand(13, 97)
    theirs = RetrievalMAP(top_k=100)(scores, labels, indexes=indexes)
    assert float(MeanAveragePrecisionAtK(100)(scores, labels)) == pytest.approx(float(theirs), rel=1e-6)
    case = torch.tensor([[0.9, 0.8, 0.7]]), torch.tensor([[1, 0, 1]])
    assert float(RetrievalMAP(top_k=2)(*case, indexes=torch.zeros(1, 3).long())) == 1.0
    assert float(MeanAveragePrecisionAtK(2)(*case)) == 0.5


def test_losses_by_hand() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]])
    softmax = [math.log(sum(math.exp(v) for v in row)) for row in logits.tolist()]
    expected = ((softmax[0] - 2.0) + (softmax[1] - 0.0)) / 2
    assert float(loss_of(logits, torch.tensor([1, 0]), False)) == pytest.approx(expected, rel=1e-6)
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    expected = 0.0
    for row, wanted in zip(logits.tolist(), labels.tolist()):
        expected += sum(math.log1p(math.exp(-v if w else v)) for v, w in zip(row, wanted)) / 2
    assert float(loss_of(logits, labels, True)) == pytest.approx(expected, rel=1e-6)
    assert loss_of(logits.bfloat16(), torch.tensor([1, 0]), False).dtype == torch.float32


def validated(preset: str, classes: int, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float]:
    """What a validation of these logits and targets gives; the network's part is to hand on the logits."""
    module = Training(PRESETS[preset], classes, False, 0.1, Geometry(2), 1, 0)
    module.network = torch.nn.Flatten()
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    module.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign]
    for i, (logits, target) in enumerate(batches):
        pixels = ((logits + 1) * 127.5).round().to(torch.uint8)  # undone by the normalisation
        module.validation_step((pixels[:, None, :, None], target), i)
    found = {"val_loss": module.val_loss.compute(), **module.metrics.compute()}
    return {name: float(value) for name, value in found.items()}


def test_top1_and_top5_leave_blanks_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six classes, ranks 1, 1 | 5, 6, blank: the first batch alone would have top-1 and top-5 equal."""
    monkeypatch.setattr("xsep.train.module.build", lambda *args: torch.nn.Linear(1, 1))
    logits = torch.linspace(1, -1, 6).expand(5, 6)
    found = validated("digits", 6, [(logits[:2], torch.tensor([0, 0])), (logits[2:], torch.tensor([4, 5, -1]))])
    assert found["val_top1"] == 0.5 and found["val_top5"] == 0.75
    level = math.log(sum(math.exp(v) for v in logits[0].tolist()))
    assert found["val_loss"] == pytest.approx(level - (1 + 1 - 0.6 - 1) / 4, abs=0.01)


def test_map_leaves_blanks_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xsep.train.module.build", lambda *args: torch.nn.Linear(1, 1))
    logits = torch.linspace(1, -1, 4).expand(2, 4)
    found = validated("jft", 4, [(logits, torch.tensor([[0.0, 1.0, 0.0, 1.0], [0.0] * 4]))])
    assert found["val_map100"] == pytest.approx((1 / 2 + 2 / 4) / 2)


def test_curves_of_a_run_in_parts(tmp_path: Path) -> None:
    """The second part began again at step 2: its lines count from there."""
    from xsep.train import curves

    for part, rows in enumerate(
        (["0,0,3.0,", "1,0,2.5,", "2,0,9.9,", "3,1,9.9,"], ["2,0,2.0,", "2,0,,0.5", "3,1,1.5,"])
    ):
        folder = tmp_path / "log" / f"version_{part}"
        folder.mkdir(parents=True)
        (folder / "metrics.csv").write_text("\n".join(["step,epoch,loss,val_top1", *rows]) + "\n")
    (tmp_path / "log" / "version_10").mkdir()
    curves.write(tmp_path)
    assert (tmp_path / "curves.csv").read_text().split() == [
        "step,epoch,loss,val_top1", "0,0,3.0,", "1,0,2.5,", "2,0,2.0,", "2,0,,0.5", "3,1,1.5,"
    ]  # fmt: skip
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
