"""``python -m xsep``: every command, its JSON, its exit codes, and one sentence for what cannot be done."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from xsep import dispatch
from xsep.cli import main as cli
from xsep.cli import screen, shapes
from xsep.tuning import findings

ROOT = Path(__file__).resolve().parent.parent
CARDS = ("NVIDIA H200", "H100", "A100", "RTX 4090", "T4")
XCEPTION = [
    (64, 128, 147), (128, 128, 147), (128, 256, 74), (256, 256, 74), (256, 728, 37), (728, 728, 37), (728, 728, 19),
    (728, 1024, 19), (1024, 1536, 10), (1536, 2048, 10),
]  # fmt: skip
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(findings, "TABLES", tmp_path / "no tables")
    for name in ("XSEP_BACKEND", "XSEP_TRUST_UNVERIFIED"):
        monkeypatch.delenv(name, raising=False)
    dispatch.forget_choices()
    findings.forget()
    yield
    dispatch.forget_choices()
    findings.forget()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str) -> tuple[int, str, str]:
        try:
            code = cli.main(list(arguments))
        except SystemExit as ended:
            code = int(ended.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def test_info_says_what_is_ready_and_why_not(run: Run) -> None:
    code, out, _ = run("info", "--json")
    found = json.loads(out)
    assert code == 0 and set(found["backends"]) == {"cuda", "triton", "cpu", "aten"}
    assert found["backends"]["aten"] == {"ready": True, "reasons": []}
    assert found["versions"]["torch"] == torch.__version__ and found["verified"] == []
    if not torch.cuda.is_available():
        assert "PyTorch sees no GPU" in found["backends"]["cuda"]["reasons"]
    assert found["backends"]["cpu"] == {"ready": True, "reasons": [], "slower": ""}
    code, out, _ = run("info")
    assert code == 0 and "no card has verified the GPU kernels yet" in out and "PyTorch sees no GPU" in out


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("layer", XCEPTION, ids=lambda s: "-".join(map(str, s)))
def test_explain_for_cards_that_are_elsewhere(run: Run, card: str, layer: tuple[int, int, int]) -> None:
    c_in, c_out, size = layer
    arguments = [
        str(c_in),
        str(c_out),
        str(size),
        str(size),
        "--batch",
        "64",
        "--dtype",
        "bfloat16",
        "--device-like",
        card,
    ]
    code, out, _ = run("explain", *arguments, "--json")
    found = json.loads(out)
    assert code == 0 and {"aten, channels_last", "aten, NCHW"} <= {way["way"] for way in found["ways"]}
    assert all(("forward_us" in way) != ("refused" in way) for way in found["ways"])
    assert found["auto_takes"]["forward"]["backend"] == "aten", "no card has verified anything here"
    if card == "T4":
        assert [way["way"] for way in found["ways"] if "refused" in way] == ["cuda", "triton"]
        assert found["model_takes"]["forward"]["backend"] == "aten"
    else:
        assert found["model_takes"]["forward"]["backend"] in ("cuda", "triton")
        assert set(found["withheld"]) == {"cuda", "triton"}
        assert found["cuda_plan"].startswith("fused" if c_out <= 256 else "staged")
        assert found["cuda_chain_backward"].startswith("kernel by kernel")  # as the planner expects of these cards


def test_explain_in_words(run: Run) -> None:
    code, out, _ = run(
        "explain", "64", "128", "147", "147", "--batch", "64", "--dtype", "bfloat16", "--device-like", "H200"
    )
    words = " ".join(out.split())
    assert code == 0 and "the floor is 122.9 us forward" in words and "memory is the limit" in words
    assert "z never leaves the chip" in words and "auto takes aten today" in words


def test_explain_of_a_tiny_problem_prints_no_floor_of_nothing(run: Run) -> None:
    code, out, _ = run("explain", "1", "1", "1", "1", "--device-like", "H200")
    assert code == 0 and "the floor is under 0.1 us forward (48 bytes, 20 FLOP; " in out and "0.0 us" not in out
    rows = [line for line in out.splitlines() if "aten, NCHW  " in line]
    assert len(rows) == 1 and rows[0].count("over 999") == 2 and "00000" not in out
    found = json.loads(run("explain", "1", "1", "1", "1", "--device-like", "H200", "--json")[1])
    assert 0 < found["floor_us"]["forward"] < 0.001


def test_explain_here(run: Run) -> None:
    code, out, _ = run("explain", "8", "16", "9", "9", "--device", "cpu")
    assert code == 0 and "runs on   cpu" in out and "because" in out
    found = json.loads(run("explain", "8", "16", "9", "9", "--device", "cpu", "--depthwise", "--json")[1])
    assert found["problem"].startswith("depthwise 1x8x9x9 -> 1x8x9x9") and found["auto_takes"]["forward"]["backend"]


def test_bench_times_and_forgets(run: Run) -> None:
    code, out, _ = run("bench", "8", "16", "9", "9", "--rounds", "1", "--seconds", "0", "--device", "cpu", "--json")
    (found,) = json.loads(out)["problems"]
    assert code == 0 and set(found["us"]["backward"]) == {"aten", "aten, NCHW", "cpu"}
    assert not findings.cache_folder().exists()
    code, out, _ = run("bench", "8", "16", "9", "9", "--rounds", "1", "--seconds", "0", "--device", "cpu")
    assert code == 0 and "PyTorch" in out and "cpu" in out


def test_autotune_of_a_shape_is_kept(run: Run) -> None:
    arguments = ["autotune", "8", "16", "9", "9", "--rounds", "1", "--seconds", "0", "--device", "cpu"]
    code, out, err = run(*arguments)
    assert code == 0 and "[1/1]" in err and "kept in" in out and "known before" not in out + err
    assert len(list(findings.cache_folder().glob("*.json"))) == 1
    found = json.loads(run(*arguments, "--json")[1])
    assert Path(found["cache"]).exists() and len(found["problems"]) == 1


def test_autotune_says_what_was_known_before(run: Run) -> None:
    arguments = ["autotune", "8", "16", "9", "9", "--rounds", "1", "--seconds", "0", "--device", "cpu"]
    assert json.loads(run(*arguments, "--json")[1])["problems"][0]["known"] is False
    assert json.loads(run(*arguments, "--json")[1])["problems"][0]["known"] is True
    code, out, err = run(*arguments)
    assert code == 0 and "known before: forward" in err and "known before and not measured now" in out
    code, out, err = run(*arguments, "--again")
    assert code == 0 and "known before" not in out + err


def test_autotune_does_not_say_kept_of_what_was_not(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **named: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    arguments = ["autotune", "8", "16", "9", "9", "--rounds", "1", "--seconds", "0", "--device", "cpu", "--again"]
    monkeypatch.setattr(findings.tempfile, "mkstemp", fail)
    with pytest.warns(RuntimeWarning, match="cannot write"):
        code, out, _ = run(*arguments)
    assert code == 2 and "\nnot kept: " in out and "kept in" not in out and "PyTorch" in out
    code, out, _ = run(*arguments, "--json")
    assert code == 2 and json.loads(out)["cache"] is None


def test_a_wrong_backend_is_exit_code_1(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = dispatch.backend("cpu")
    right = backend.separable_forward
    monkeypatch.setattr(backend, "separable_forward", lambda a: right(a) + 1)
    code, out, _ = run("bench", "8", "16", "9", "9", "--rounds", "1", "--seconds", "0", "--device", "cpu")
    assert code == 1 and "cpu left out: wrong: y: error" in out


MODEL = """
from dataclasses import dataclass

import torch
from torch import nn

def net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 5, 1), nn.Conv2d(5, 5, 3, groups=5)
    )

def norms():
    return nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 5, 1)
    )

def plain():
    return nn.Conv2d(3, 8, 3)

@dataclass
class Output:
    logits: torch.Tensor

class Around(nn.Module):
    def __init__(self, of):
        super().__init__()
        self.net, self.of = net(), of

    def forward(self, x):
        return self.of(self.net(x))

class InPlace(Around):
    def forward(self, x):
        return super().forward(x.mul_(2))

class Two(Around):
    def forward(self, x, y):
        return super().forward(x) + y

def data():
    return Around(Output)

def silent():
    return Around(lambda y: None)

def random():
    return Around(lambda y: y + torch.randn((), dtype=y.dtype))

def infinite():
    return Around(lambda y: y / 0)

def overflowing():
    return Around(lambda y: y * 1e30 * 1e30)

def in_place():
    return InPlace(lambda y: y)

def two():
    return Two(lambda y: y)

def broken():
    raise OSError("no weights here")

def number():
    return 3
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "some_model.py").write_text(MODEL)
    return str(tmp_path / "some_model.py")


def test_swap_report_of_a_file(run: Run, file: str) -> None:
    code, out, _ = run("swap-report", f"{file}:net", "--input", "2x3x16x16")
    assert code == 0 and "1 separable convolution swapped" in out and "outputs are the same up to rounding" in out
    assert "the 2-norm of their distance to the unswapped model's in float64 is " in out
    found = json.loads(run("swap-report", f"{file}:net", "--input", "2x3x16x16", "--json")[1])
    assert found["check"]["right"] and found["swapped"][0]["conv_dw"] == "1" and found["left_alone"][0]["name"] == "3"


@pytest.mark.parametrize("name", ["net", "data", "in_place"])
def test_swap_report_notices_a_changed_output(run: Run, file: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from xsep.cli import swapping

    swap = swapping.swap_separable_convs

    def spoil(model: Any, **options: Any) -> Any:
        report = swap(model, **options)
        with torch.no_grad():
            next(model.parameters()).mul_(1.1)
        return report

    assert run("swap-report", f"{file}:{name}", "--input", "2x3x16x16")[0] == 0
    monkeypatch.setattr(swapping, "swap_separable_convs", spoil)
    code, out, _ = run("swap-report", f"{file}:{name}", "--input", "2x3x16x16")
    assert code == 1 and "outputs are NOT the same" in out


def test_swap_report_notices_an_output_of_another_shape(run: Run, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from xsep.cli import swapping

    swap = swapping.swap_separable_convs

    def spoil(model: Any, **options: Any) -> Any:
        report = swap(model, **options)
        model.of = lambda y: y[:1]
        return report

    monkeypatch.setattr(swapping, "swap_separable_convs", spoil)
    code, out, _ = run("swap-report", f"{file}:in_place", "--input", "2x3x16x16")
    assert code == 1 and "outputs are NOT the same" in out


@pytest.mark.parametrize(
    "name, expected, why",
    [
        ("plain", 0, "nothing was changed"),
        ("silent", 2, "no tensors were found in the output"),
        ("random", 2, "the model is random: two runs of it before the swap are "),
        ("infinite", 2, "the model's own are not all finite"),
        ("overflowing", 2, "the model's own are not all finite"),  # in float32, and in float64 they are
    ],
)
def test_swap_report_claims_nothing_of_what_it_did_not_compare(
    run: Run, file: str, name: str, expected: int, why: str
) -> None:
    code, out, _ = run("swap-report", f"{file}:{name}", "--input", "2x3x16x16")
    assert code == expected and why in out and "the same" not in out and "allowed" not in out
    code, out, _ = run("swap-report", f"{file}:{name}", "--input", "2x3x16x16", "--json")
    check = json.loads(out)["check"]
    assert code == expected and check["right"] is None and check["why"].startswith(why)


def test_what_the_swap_says_is_in_the_command_lines_words(run: Run, file: str) -> None:
    out = run("swap-report", f"{file}:norms", "--input", "2x3x16x16")[1]
    assert "--fold-bn folds it in eval mode" in out and "fold_bn" not in out
    assert "fold_bn" not in run("swap-report", f"{file}:norms", "--no-check", "--json")[1]
    code, out, err = run("autotune", "--model", f"{file}:norms", "--input", "2x3x16x16", "--device", "cpu")
    assert code == 2 and out == "" and err.count("\n") == 1 and "fold_bn" not in err and "swap_separable" not in err
    assert "runs none of xsep's ops" in err and "--fold-bn folds it in eval mode" in err
    err = run("autotune", "--model", f"{file}:plain", "--input", "2x3x16x16", "--device", "cpu")[2]
    assert "there is no separable convolution in it" in err


def test_autotune_of_a_model(run: Run, file: str) -> None:
    code, out, _ = run(
        "autotune", "--model", f"{file}:net", "--input", "2x3x16x16", "--rounds", "1", "--seconds", "0", "--device",
        "cpu", "--json",
    )  # fmt: skip
    assert code == 0 and "separable 2x8x16x16 -> 2x5x16x16" in json.loads(out)["problems"][0]["problem"]


def test_autotune_of_a_model_with_batch_norms_between(run: Run, file: str) -> None:
    code, out, _ = run(
        "autotune", "--model", f"{file}:norms", "--fold-bn", "--input", "2x3x16x16", "--rounds", "1", "--seconds", "0",
        "--device", "cpu", "--json",
    )  # fmt: skip
    problems = [found["problem"].split(",")[0] for found in json.loads(out)["problems"]]
    assert code == 0 and sorted(problems) == [
        "depthwise 2x8x16x16 -> 2x8x16x16",  # in training mode, where the norm stands between
        "separable 2x8x16x16 -> 2x5x16x16",
    ]


def test_autotune_of_a_model_of_two_inputs(run: Run, file: str) -> None:
    code, out, err = run("autotune", "--model", f"{file}:two", "--input", "2x3x16x16", "--device", "cpu")
    assert code == 2 and "does not take 2x3x16x16: TypeError: " in err and err.count("\n") == 1 and out == ""


def test_help_of_autotune_stands_alone(run: Run) -> None:
    code, out, _ = run("autotune", "--help")
    words = " ".join(out.split())
    assert code == 0 and "[C_in] [C_out] [H] [W] times of every way of running a problem, or each that a model" in words
    assert "the same" not in words and " C_in C_out H W how each backend" in " ".join(run("explain", "-h")[1].split())


SHAPE = ("8", "16", "9", "9")
REFUSALS = {
    "no-command": ((), "required"),
    "unknown-command": (("fly",), "invalid choice"),
    "three-numbers": (("explain", "8", "16", "9"), "the following arguments are required"),
    "word": (("explain", "8", "x", "9", "9"), "invalid int value"),
    "zero": (("explain", "0", "16", "9", "9"), "C_in must be at least 1, got 0"),
    "batch-0": (("explain", *SHAPE, "--batch", "0"), "--batch must be at least 1"),
    "filter": (("explain", *SHAPE, "--filter", "3by3"), "as in 3x5"),
    "padding": (("explain", *SHAPE, "--padding", "some"), "--padding must be a number"),
    "filter-too-large": (("explain", *SHAPE, "--filter", "11", "--padding", "0"), "output"),
    "card": (("explain", *SHAPE, "--device-like", "Voodoo 2"), "there are NVIDIA H200, NVIDIA H100 HBM3, NVIDIA A100"),
    "no-gpu-here": (("bench", *SHAPE, "--device", "cuda"), "PyTorch sees no GPU"),
    "rounds": (("bench", *SHAPE, "--rounds", "0"), "--rounds is too small"),
    "no-shape": (("autotune",), "a shape is four numbers"),
    "shape-and-model": (("autotune", *SHAPE, "--model", "timm:x"), "not both"),
    "options-and-model": (
        ("autotune", "--model", "timm:x", "--batch", "8", "--dtype", "float16", "--layout", "contiguous"),
        "--batch, --dtype, --layout are for a shape",
    ),
    "default-and-model": (("autotune", "--model", "timm:x", "--filter", "3"), "--filter is for a shape"),
    "flag-and-model": (("autotune", "--model", "timm:x", "--depthwise"), "--depthwise is for a shape"),
    "input-and-shape": (("autotune", *SHAPE, "--input", "1x3x9x9"), "--input is for --model"),
    "fold-bn-and-shape": (("autotune", *SHAPE, "--fold-bn"), "--fold-bn is for --model"),
    "device-and-device-like": (
        ("explain", *SHAPE, "--device-like", "H200", "--device", "cpu"),
        "--device: not allowed with",
    ),
    "no-such-file": (("swap-report", "nowhere.py:net"), "there is no file 'nowhere.py'"),
    "no-colon": (("swap-report", "resnet"), "a model is timm:NAME"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_done_is_one_sentence_and_exit_code_2(run: Run, case: str) -> None:
    arguments, why = REFUSALS[case]
    if case == "no-gpu-here" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code, out, err = run(*arguments)
    assert code == 2 and why in err and err.count("\n") == 1 and out == ""


@pytest.mark.parametrize(
    "name, why",
    [
        ("broken", "OSError: no weights here"),
        ("number", "is no torch.nn.Module but int"),
        ("nothing", "has no 'nothing'"),
    ],
)
def test_a_factory_that_gives_no_model(run: Run, file: str, name: str, why: str) -> None:
    code, out, err = run("swap-report", f"{file}:{name}")
    assert code == 2 and why in err and err.count("\n") == 1 and out == ""


def test_an_input_the_model_does_not_take(run: Run, file: str) -> None:
    code, _, err = run("swap-report", f"{file}:net", "--input", "2x4x16x16")
    assert code == 2 and "does not take 2x4x16x16" in err and err.count("\n") == 1
    assert "as in 1x3x224x224" in run("swap-report", f"{file}:net", "--input", "3x16x16")[2]


@pytest.mark.parametrize("package", ["timm", "torchvision"])
def test_a_package_that_is_missing_says_what_to_type(run: Run, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    code, _, err = run("swap-report", f"{package}:mobilenet_v2")
    assert code == 2 and f"pip install {package}" in err and err.count("\n") == 1


def test_models_by_name_come_without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    asked: list[Any] = []

    def create(name: str, **options: Any) -> torch.nn.Module:
        asked.append((name, options))
        return torch.nn.Identity()

    monkeypatch.setitem(sys.modules, "timm", types.SimpleNamespace(create_model=create))
    vision = types.SimpleNamespace(models=types.SimpleNamespace(get_model=create))
    monkeypatch.setitem(sys.modules, "torchvision", vision)
    shapes.model_of("timm:xception")
    shapes.model_of("torchvision:mobilenet_v2")
    assert asked == [("xception", {"pretrained": False}), ("mobilenet_v2", {"weights": None})]


def test_without_rich_tables_are_plain(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "RICH", False)
    code, out, _ = run("explain", *SHAPE, "--device-like", "T4")
    assert code == 0 and "\naten, NCHW  " in out and "cuda: cannot run: " in out and "━" not in out
    table = screen.PlainTable("title")
    table.add_column("name")
    table.add_column("ms", justify="right")
    table.add_row("int[] a", "[red]1[/]")
    table.add_section()
    table.add_row("b")
    assert str(table).splitlines() == ["title", "name     ms", "-----------", "int[] a   1", "-----------", "b"]


def test_json_has_no_infinite_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    screen.print_json({"a": [float("inf"), 1.0], "b": (float("nan"),)})
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.0], "b": [None]}


def test_as_a_program_from_anywhere(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "xsep", "explain", *SHAPE, "--device-like", "A100", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and json.loads(done.stdout)["device"] == "NVIDIA A100"


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("arguments", [("info", "--json"), ("info",), ("explain", *SHAPE, "--device", "cpu")])
def test_a_reader_that_leaves_early_hears_nothing_of_it(arguments: tuple[str, ...], buffered: bool) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    environment = {**os.environ, "PYTHONUNBUFFERED": "" if buffered else "1"}
    command = [sys.executable, "-m", "xsep", *arguments]
    try:
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
    finally:
        os.close(writing)
    assert done.returncode == 1 and done.stderr == ""
