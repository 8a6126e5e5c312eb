"""The benchmark programs: real inputs, a gate that closes, files that are whole or not there, plain refusals."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import xsep

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

pytest.importorskip("sklearn", reason="scikit-learn brings the photographs")
pytest.importorskip("matplotlib", reason="matplotlib draws the chart")
pytest.importorskip("rich", reason="rich prints the table")

import bench_memory  # noqa: E402
import bench_sepconv  # noqa: E402
import common  # noqa: E402

THE_TEN = [
    (64, 128, 147, 1), (128, 128, 147, 1), (128, 256, 74, 1), (256, 256, 74, 1), (256, 728, 37, 1),
    (728, 728, 37, 1), (728, 728, 19, 25), (728, 1024, 19, 1), (1024, 1536, 10, 1), (1536, 2048, 10, 1),
]  # fmt: skip


@pytest.fixture(scope="module")
def photographs() -> list[Tensor]:
    return common.load_photographs(None)[1]


@pytest.fixture(scope="module")
def layers(photographs: list[Tensor]) -> list[Any]:
    return bench_sepconv.xception_layers(common.photograph_batch(photographs, 1, 299), seed=0)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, layers: list[Any]) -> Iterator[Callable[..., int]]:
    """The program, as the command line calls it, on ten layers of few channels."""

    def tiny(pictures: Tensor, seed: int) -> list[Any]:
        return [
            layer._replace(c_in=5, c_out=7, x=layer.x[:, :5], w_dw=layer.w_dw[:5], w_pw=layer.w_pw[:7, :5])
            for layer in layers
        ]

    monkeypatch.setattr(bench_sepconv, "xception_layers", tiny)
    monkeypatch.setattr(common, "measure_limits", lambda device, dtype: (1e10, 1e11))

    def program(*arguments: str) -> int:
        argv = ["--device", "cpu", "--batch", "1", "--rounds", "1", "--no-compile", "--quick", *arguments]
        return common.run("bench_sepconv", lambda: bench_sepconv.main(argv))

    yield program


def test_layers_are_the_ten_of_xception_fed_by_the_photograph(layers: list[Any], photographs: list[Tensor]) -> None:
    assert [(s.c_in, s.c_out, s.size, s.occurs) for s in layers] == THE_TEN
    for layer in layers:
        assert layer.x.shape == (1, layer.c_in, layer.size, layer.size)
        assert layer.x.isfinite().all() and layer.x.std() > 0.05
        assert (layer.x >= 0).float().mean() == 1 or layer.c_in == 1024, "all but block 14's first stand behind a ReLU"
    other = bench_sepconv.xception_layers(common.photograph_batch(photographs[1:], 1, 299), seed=0)
    assert not torch.equal(other[-1].x, layers[-1].x)
    assert torch.equal(other[-1].w_pw, layers[-1].w_pw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_gate_opens_for_what_is_right_and_closes_for_what_is_not(
    layers: list[Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = layers[8]
    assert bench_sepconv.gate(layer, dtype, ["aten", "auto"]) == {"aten": [], "auto": []}
    monkeypatch.setattr(
        bench_sepconv, "one_op", lambda backend: lambda x, a, b: bench_sepconv.two_convolutions(x, a, b * 1.2)
    )
    found = bench_sepconv.gate(layer, dtype, ["aten"])["aten"]
    # Largest error and 2-norm have a sentence each.
    assert list(dict.fromkeys(sentence.split(":")[0] for sentence in found)) == ["y", "dx", "dw_dw", "dw_pw"]


def test_program_writes_a_whole_record(
    small: Callable[..., int], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "QUIET", 0.0)
    assert small("--out", str(tmp_path), "--shapes", "1", "7", "--dtype", "float32", "bfloat16") == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sepconv.json", "sepconv.png"]
    assert (tmp_path / "sepconv.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "sepconv.json").read_text()
    record = json.loads(text)
    assert [(r["dtype"], r["mode"], r["height_width"]) for r in record["results"]] == [
        (dtype, mode, size)
        for dtype in ("float32", "bfloat16") for size in (147, 19) for mode in ("forward", "forward+backward")
    ]  # fmt: skip
    for r in record["results"]:
        assert list(r["times"]) == ["nchw", "channels_last", "xsep auto"]
        assert all(t["min"] == t["us"] <= t["median"] and t["samples"] >= 1 for t in r["times"].values())
        better = min(r["times"]["nchw"]["us"], r["times"]["channels_last"]["us"])
        assert r["ratios"]["auto"]["eager"] == pytest.approx(better / r["times"]["xsep auto"]["us"])
        assert r["floor_us"] > 0 and r["bytes"] > 0 and r["flops"] > 0
        assert r["auto_takes"].keys() == {"forward", "backward"} and set(r["auto_takes"].values()) <= {"cpu", "aten"}
    first = record["totals"][0]["times"]["nchw"]["us"]
    assert first == pytest.approx(sum(r["count"] * r["times"]["nchw"]["us"] for r in record["results"][0:3:2]))
    environment = record["environment"]
    assert environment["source_digest"] == common.source_digest() and len(environment["source_digest"]) == 64
    assert environment["torch"] == torch.__version__ and environment["threads"] == torch.get_num_threads()
    assert {"cores", "cpu_features", "torch_cpu_capability", "date"} <= environment.keys()
    assert str(BENCHMARKS.parent) not in text and str(tmp_path) not in text
    shown = capsys.readouterr().out
    assert "5→7 @147" in shown and "all layers" in shown and "china.jpg" in shown
    assert record["notes"][-1].startswith("the machine was busy")
    assert record["notes"][-1] in " ".join(shown.split())
    assert re.search(r"auto: (cpu|aten)", shown)


def test_what_auto_takes_is_said() -> None:
    row = {"mode": "forward+backward", "auto_takes": {"forward": "cuda", "backward": "aten"}}
    assert bench_sepconv.named(row, "auto") == "auto: cuda / aten" and bench_sepconv.named(row, "cuda") == "cuda"
    assert bench_sepconv.named({**row, "mode": "forward"}, "auto") == "auto: cuda"
    assert bench_sepconv.named({**row, "auto_takes": {"forward": "cpu", "backward": "cpu"}}, "auto") == "auto: cpu"
    assert bench_sepconv.named({**row, "auto_takes": {}}, "auto") == "auto", "wrong, so not timed"


def test_on_a_gpu_every_backend_is_timed_that_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    why: dict[str, list[str]] = {"cuda": [], "triton": ["Triton is not installed"]}
    monkeypatch.setattr(common, "reasons", lambda name: why[name])
    assert common.default_backends(torch.device("cuda")) == ["auto", "cuda"]
    assert common.default_backends(torch.device("cpu")) == ["auto"]


def test_what_is_wrong_gets_no_speed(
    small: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    right = bench_sepconv.one_op

    def one_op(backend: str) -> Callable[..., Tensor]:
        if backend == "auto":
            return right(backend)
        return lambda x, a, b: right("auto")(x, a, b) + 1e-3

    monkeypatch.setattr(bench_sepconv, "one_op", one_op)
    assert small("--out", str(tmp_path), "--shapes", "9", "--backend", "auto", "aten") == 1
    record = json.loads((tmp_path / "sepconv.json").read_text())
    assert len(record["failures"]) == 1 and record["failures"][0].startswith("float32 5→7 @10 aten: y: error")
    assert all("xsep auto" in r["times"] and "xsep aten" not in r["times"] for r in record["results"])
    assert "wrong, so not timed" in capsys.readouterr().out


def test_a_backend_that_cannot_run_is_named_with_its_reason(
    small: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError("backend 'cuda' cannot run this: the tensors are on cpu")

    monkeypatch.setattr(xsep, "separable_conv2d", refuse)
    assert small("--out", str(tmp_path), "--shapes", "9", "--backend", "cuda") == 1
    record = json.loads((tmp_path / "sepconv.json").read_text())
    assert "the tensors are on cpu" in record["failures"][0]


def test_a_backend_of_the_environment_that_cannot_run_is_named(
    small: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XSEP_BACKEND", "cuda")
    assert small("--out", str(tmp_path), "--shapes", "9") == 1
    record = json.loads((tmp_path / "sepconv.json").read_text())
    assert "backend 'cuda' cannot run" in record["failures"][0] and record["results"][0]["auto_takes"] == {}


@pytest.mark.parametrize(
    "arguments, why",
    [
        pytest.param(["--image", "no such picture.png"], "no such picture.png", id="missing-image"),
        pytest.param(["--image", __file__], "cannot be read", id="image-that-is-text"),
        pytest.param(["--dtype", "float31"], "float31", id="unknown-dtype"),
        pytest.param(["--batch", "0"], "--batch", id="batch-0"),
        pytest.param(["--shapes", "11"], "shapes 1 to 10", id="shape-11"),
        pytest.param(["--backend", "metal"], "metal", id="unknown-backend"),
        pytest.param(["--device", "cuda:99"], "cuda:99", id="no-such-device"),
        pytest.param(["--device", "toaster"], "toaster", id="no-such-kind-of-device"),
        pytest.param(["--out", f"{__file__}/below"], "nothing can be written into", id="out-below-a-file"),
    ],
)
def test_refusals_are_one_sentence_and_leave_nothing(
    small: Callable[..., int], tmp_path: Path, arguments: list[str], why: str, capsys: Any
) -> None:
    try:
        code: Any = small("--out", str(tmp_path), *arguments)
    except SystemExit as ended:
        code = ended.code
    captured = capsys.readouterr()
    assert code == 2
    assert why in captured.err and captured.err.count("\n") == 1
    assert captured.out == "" and list(tmp_path.iterdir()) == []


def test_an_error_while_writing_keeps_the_old_files(
    small: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for name in ("sepconv.json", "sepconv.png"):
        (tmp_path / name).write_text("old")

    def full(path: Path, record: dict[str, Any]) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(common, "write_json", full)
    assert small("--out", str(tmp_path), "--shapes", "9") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"sepconv.json": "old", "sepconv.png": "old"}


def test_without_matplotlib_the_chart_is_left_for_later(
    small: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(common, "chart_module", lambda name: None)
    assert small("--out", str(tmp_path), "--shapes", "9") == 0
    assert [p.name for p in tmp_path.iterdir()] == ["sepconv.json"]
    assert "no chart, because matplotlib is not installed" in capsys.readouterr().out


def test_without_photographs_made_up_ones_are_named_as_such(
    small: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    names, pictures = common.load_photographs(None)
    assert [p.shape for p in pictures] == [(3, 427, 640)] * 2 and not torch.equal(*pictures)
    assert torch.equal(pictures[0], common.synthetic_photograph(0)), "the same every time"
    for picture in pictures:
        assert 0 <= picture.min() < 20 and 230 < picture.max() <= 255 and 30 < picture.std() < 80
        near = (picture[:, :, 1:] - picture[:, :, :-1]).abs().mean()
        far = (picture[:, :, 200:] - picture[:, :, :-200]).abs().mean()
        assert near < far / 2, "neighbours are alike, as in photographs"
    assert small("--out", str(tmp_path), "--shapes", "9") == 0
    kept = json.loads((tmp_path / "sepconv.json").read_text())["photographs"]
    assert kept == names and kept[0].startswith("synthetic 1 (scikit-learn")


def test_help_from_another_directory(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(xsep.__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "bench_sepconv.py"), "--help"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for word in ("weights are random", "--quick", "--no-compile", "--image", "exit code 1", "minimum of interleaved"):
        assert word in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120


def test_cpu_timing_interleaves_and_takes_the_minimum() -> None:
    order: list[str] = []
    times = common.time_on_cpu({n: functools.partial(order.append, n) for n in "abc"}, rounds=4, seconds=0.0)
    assert order == ["a", "b", "c"] * 5, "one call each to warm up, then round by round"
    assert all(t["samples"] == 4 and t["us"] == t["min"] <= t["p20"] <= t["p80"] for t in times.values())
    assert common.summary([3e-6, 1e-6, 2e-6, 9e-6], "median")["us"] == pytest.approx(2.5)


def test_a_busy_machine_is_noticed() -> None:
    def taken(*medians: float) -> list[common.Times]:
        return [common.summary([1.0, median, 2 * median], "min") for median in medians]

    assert common.busy_note([]) == common.busy_note(taken(1.0, 1.02, 1.1, 9.0)) == []
    (said,) = common.busy_note(taken(1.0, 1.3, 1.5))
    assert said.startswith("the machine was busy: half of the medians are over 1.30 times their minimum")


def test_a_gradient_is_drawn_where_it_is_used(layers: list[Any]) -> None:
    layer = layers[9]
    one, same = (bench_sepconv.inputs(layer, torch.bfloat16, torch.channels_last, False)[3] for _ in range(2))
    assert torch.equal(one, same) and 0.9 < float(one.float().std()) < 1.1
    away = layer._replace(x=layer.x.to("meta"), w_dw=layer.w_dw.to("meta"), w_pw=layer.w_pw.to("meta"))
    asked: list[str] = []

    right = torch.Generator

    def generator(device: Any = "cpu") -> Any:  # there is none of meta
        asked.append(str(device))
        return right()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch, "Generator", generator)
        assert bench_sepconv.inputs(away, torch.bfloat16, torch.channels_last, False)[3].is_meta
    assert asked == ["meta"]


def test_products_are_limits_in_the_precision_of_convolutions() -> None:
    cudnn: Any = torch.backends.cudnn
    conv, matmul = cudnn.conv, torch.backends.cuda.matmul
    before = conv.fp32_precision, matmul.fp32_precision
    try:
        for wish in ("tf32", "ieee"):
            conv.fp32_precision = wish
            with common.products_like_convolutions():
                assert matmul.fp32_precision == wish
            assert matmul.fp32_precision == before[1]
    finally:
        conv.fp32_precision = before[0]


def test_photograph_batch_crops_and_tiles(photographs: list[Tensor]) -> None:
    batch = common.photograph_batch(photographs, 5, 299)
    assert batch.shape == (5, 3, 299, 299) and -1 <= batch.min() < -0.5 and 0.5 < batch.max() <= 1
    assert len({float(picture.sum()) for picture in batch}) == 5
    tiled = common.photograph_batch([photographs[0][:, :50, :400]], 2, 100)
    assert torch.equal(tiled[0, :, :50], tiled[0, :, 50:]) and not torch.equal(tiled[0], tiled[1])


def test_an_image_of_the_users_own(tmp_path: Path, small: Callable[..., int]) -> None:
    image = pytest.importorskip("PIL.Image")
    image.effect_noise((64, 40), 80).save(tmp_path / "gray.png")
    names, pictures = common.load_photographs(str(tmp_path / "gray.png"))
    assert names == ["gray.png"] and pictures[0].shape == (3, 40, 64)
    out = tmp_path / "new" / "deep"
    assert small("--image", str(tmp_path / "gray.png"), "--out", str(out), "--shapes", "10") == 0
    assert json.loads((out / "sepconv.json").read_text())["photographs"] == ["gray.png"]


def test_z_is_not_kept_for_backward(photographs: list[Tensor], backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a block's three z tensors, and of the ReLU's copy of its input, none is there between forward and backward."""
    monkeypatch.setenv("XSEP_BACKEND", backend)
    result = bench_memory.compare(4, torch.float32, torch.device("cpu"), photographs, 299)
    z = result["z_bytes"]
    assert set(result["xsep"]["takes"].values()) == {backend} and result["pytorch"]["takes"] == {}
    assert result["shape"] == [4, 728, 19, 19] and z == 4 * 728 * 361 * 4
    assert result["pytorch"]["kept"] - result["xsep"]["kept"] == 4 * z
    for way in ("pytorch", "xsep"):
        assert result[way]["peak"] > result[way]["kept"]
    if backend == "cpu":  # aten's recomputation goes through memory at every stage
        assert result["pytorch"]["peak"] - result["xsep"]["peak"] >= 3 * z
