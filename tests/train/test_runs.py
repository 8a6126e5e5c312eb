"""Whole runs on the digits: several processes, killed ones and chained ones end where the plain one does."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("lightning", reason="training needs Lightning: pip install 'xsep[train]'")

from tests.conftest import NIGHTLY
from xsep.train.checkpoints import KEY
from xsep.train.module import Training
from xsep.train.network import SmallXception

from .support import STEPS, column, command, digits

EPOCHS = 9  # 207 steps


def weights(out: Path, name: str = "weights.pt") -> dict[str, torch.Tensor]:
    return torch.load(out / name, weights_only=True)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As in the processes that are started: sums are grouped by threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


@pytest.fixture(scope="module")
def chained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 207 steps that nothing happened to."""
    out = tmp_path_factory.mktemp("chained") / "run"
    assert digits(out, "--epochs", str(EPOCHS)) == 0
    return out


@pytest.fixture(scope="module")
def accumulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An epoch in steps of 64 pictures by two batches of 32."""
    out = tmp_path_factory.mktemp("accumulated") / "run"
    assert digits(out, "--epochs", "1", "--batch", "32", "--accumulate", "2") == 0
    return out


def test_it_learns(chained: Path) -> None:
    """And leaves what it says it does; validation, best.ckpt and weights.pt are of the averaged weights."""
    assert len(column(chained, "loss")) == EPOCHS * STEPS
    assert column(chained, "val_top1")[-1] >= 0.96
    assert column(chained, "val_top5")[-1] >= 0.99
    assert (chained / "curves.png").stat().st_size > 10_000
    last = torch.load(chained / "last.ckpt", weights_only=True)
    assert last[KEY]["preset"] == "digits"
    average = {name.removeprefix("network."): t for name, t in last["state_dict"].items()}
    assert same(average, weights(chained)) and not same(last["current_model_state"], last["state_dict"])
    network = SmallXception(10)
    network.load_state_dict(weights(chained))
    from xsep.train import PRESETS
    from xsep.train.data import Pictures, open_sets
    from xsep.train.order import Draw
    from xsep.train.pictures import normalised

    val = Pictures(open_sets(PRESETS["digits"], None, None, None).val, PRESETS["digits"], 10, 8, False, 0)
    x, target = (torch.stack(column) for column in zip(*(val[Draw(0, i)] for i in range(len(val)))))
    with torch.no_grad():
        logits = network.eval()(normalised(x))
    right = float((logits.argmax(1) == target).float().mean())
    assert column(chained, "val_top1")[-1] == pytest.approx(right, abs=1e-6)
    loss = float(torch.nn.functional.cross_entropy(logits, target))
    assert column(chained, "val_loss")[-1] == pytest.approx(loss, rel=1e-4)


def test_the_rate_follows_the_recipe(chained: Path) -> None:
    expected = [0.045 * 0.94 ** (epoch // 2) for epoch in range(EPOCHS) for _ in range(STEPS)]
    assert column(chained, "lr") == pytest.approx(expected, rel=1e-12)


def test_chained_as_plain_over_200_steps(chained: Path, tmp_path: Path) -> None:
    """The same pictures and dropout in the same order: at first equal, later within the noise of the batches.

    Rounding grows from step to step, so that single losses drift apart; the means over 20 steps may differ by what
    chance makes of the means of 20 such losses, three standard errors.
    """
    plain = tmp_path / "run"
    assert digits(plain, "--epochs", str(EPOCHS), "--no-chain") == 0
    a, b = column(chained, "loss"), column(plain, "loss")
    assert len(a) == len(b) >= 200
    assert a != b  # two ways, not one run twice
    assert a[:5] == pytest.approx(b[:5], rel=1e-4)
    assert a[:20] == pytest.approx(b[:20], rel=2e-2)
    for i in range(0, 200, 20):
        x, y = a[i : i + 20], b[i : i + 20]
        noise = ((statistics.variance(x) + statistics.variance(y)) / 20) ** 0.5
        assert abs(statistics.mean(x) - statistics.mean(y)) <= 3 * noise, i
    assert statistics.mean(a[-20:]) < 0.1 * a[0]
    assert column(plain, "val_top1")[-1] == pytest.approx(column(chained, "val_top1")[-1], abs=0.02)


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this PyTorch has no gloo")
def test_two_processes_as_one(accumulated: Path, chained: Path, tmp_path: Path) -> None:
    """Two with 32 pictures each a step, as Lightning starts them, beside one process with the same 64.

    BatchNorm's statistics are those of each 32, so the process that has the 64 in two batches sees the same losses, but
    for rounding; the one that has them in one batch sees them within noise.
    """
    out = tmp_path / "run"
    made = subprocess.run(
        command(out, "--epochs", "1", "--batch", "32", "--devices", "2"),
        capture_output=True, text=True, env=environment(), timeout=300,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert "Starting with 2 processes" in made.stderr
    assert "Warning" not in made.stderr
    two, one, at_once = (column(o, "loss") for o in (out, accumulated, chained))
    assert len(two) == STEPS
    assert two == pytest.approx(one, rel=1e-5)
    assert two != pytest.approx(at_once[:STEPS], rel=1e-3)  # so that the comparison above can fail
    differences = [a - b for a, b in zip(two, at_once)]
    assert abs(statistics.mean(differences)) <= 0.05 * statistics.mean(two)
    # All 297 pictures were validated with, each once: the accuracy is a number of them.
    right = 297 * column(out, "val_top1")[0]
    assert right == pytest.approx(round(right), abs=1e-3)


def test_killed_and_resumed(chained: Path, tmp_path: Path) -> None:
    """SIGKILL in an epoch, then the rest from the last checkpoint: bit for bit the weights and the curves."""
    out = tmp_path / "run"
    process = subprocess.Popen(
        command(out, "--epochs", "1000", "--checkpoint-every", "10"), env=environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    log = out / "log" / "version_0" / "metrics.csv"
    until = time.monotonic() + 240
    while not (log.exists() and log.read_text().count("\n") > STEPS + 15):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    step = int(torch.load(out / "last.ckpt", weights_only=True)["global_step"])
    assert STEPS <= step < EPOCHS * STEPS
    assert digits(out, "--epochs", str(EPOCHS), "--resume") == 0
    assert same(weights(out), weights(chained))
    assert (out / "curves.csv").read_text() == (chained / "curves.csv").read_text()
    last, truth = (torch.load(o / "last.ckpt", weights_only=True) for o in (out, chained))
    assert same(last["current_model_state"], truth["current_model_state"])
    assert int(last["global_step"]) == EPOCHS * STEPS


def test_sigterm_leaves_a_checkpoint(
    accumulated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the first of a step's two batches: the step is finished, and the run goes on behind it, bit for bit."""
    inner = Training.training_step
    signalled: list[int] = []

    def training_step(self: Training, batch: Any, batch_idx: int) -> torch.Tensor:
        if batch_idx == 18 and not signalled:
            signalled.append(batch_idx)
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(self, batch, batch_idx)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(Training, "training_step", training_step)
    out = tmp_path / "run"
    choice = ("--epochs", "1", "--batch", "32", "--accumulate", "2")
    assert digits(out, *choice) == 143
    assert f"stopped by SIGTERM after 10 steps; go on with --resume ({out}/last.ckpt)" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before
    assert column(out, "loss") == column(accumulated, "loss")[:10] and not (out / "weights.pt").exists()
    assert digits(out, *choice, "--resume") == 0
    assert same(weights(out), weights(accumulated))
    assert (out / "curves.csv").read_text() == (accumulated / "curves.csv").read_text()


def test_a_finished_run_gives_its_weights_again(chained: Path) -> None:
    """As behind a kill between the last checkpoint and the weights."""
    before = weights(chained)
    (chained / "weights.pt").unlink()
    assert digits(chained, "--epochs", str(EPOCHS), "--resume") == 0
    assert same(weights(chained), before)


def test_mixed_precision(chained: Path, tmp_path: Path) -> None:
    """Near the run in float32 while bfloat16's rounding has not grown."""
    out = tmp_path / "run"
    assert digits(out, "--epochs", "1", "--precision", "bf16-mixed") == 0
    mixed, full = column(out, "loss")[:8], column(chained, "loss")[:8]
    assert mixed != pytest.approx(full, rel=1e-5)
    assert mixed == pytest.approx(full, rel=0.02)


@pytest.mark.skipif(not NIGHTLY, reason="half a minute; XSEP_NIGHTLY=1")
def test_two_processes_are_stopped_and_resumed(tmp_path: Path) -> None:
    """SIGTERM to one of two processes ends both; resumed, they end where two that went through do."""
    choice = ("--epochs", "3", "--batch", "32", "--devices", "2")
    whole, out = tmp_path / "whole", tmp_path / "run"
    subprocess.run(command(whole, *choice), check=True, env=environment(), capture_output=True, timeout=300)
    process = subprocess.Popen(command(out, *choice), env=environment(), stderr=subprocess.PIPE, text=True)
    log = out / "log" / "version_0" / "metrics.csv"
    until = time.monotonic() + 240
    while not (log.exists() and log.read_text().count("\n") > 5):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    process.terminate()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    assert err.count("stopped by SIGTERM") == 1
    subprocess.run(command(out, *choice, "--resume"), check=True, env=environment(), capture_output=True, timeout=300)
    assert same(weights(out), weights(whole))
    assert (out / "curves.csv").read_text() == (whole / "curves.csv").read_text()
