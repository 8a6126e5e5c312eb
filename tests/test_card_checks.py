"""A GPU's kernels are checked on the card before auto takes them: the check itself, who asks for it, what is kept."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Optional

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.pretended_card import CARD, forget, pretend
from xsep import card_check, dispatch
from xsep.backends.aten import ATEN
from xsep.cli.main import main as cli
from xsep.models.blocks import MaxPool
from xsep.modules import FusedSeparableConv2d
from xsep.problem import Geometry, Problem
from xsep.tuning import card_checks, findings, probes
from xsep.tuning.card_checks import Answer
from xsep.tuning.findings import Finding

RIGHT, WRONG, UNKNOWN = Answer("", 34, 9.0), Answer("y: error 1, PyTorch's 0.1, allowed 0.2"), Answer(None, why="busy")


def precision() -> list[str]:
    return [torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision]  # type: ignore


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = precision()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("XSEP_BACKEND", "XSEP_TRUST_UNVERIFIED", "XSEP_CARD_CHECK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(findings, "TABLES", tmp_path / "tables")
    forget()
    yield
    forget()
    assert precision() == before, "PyTorch's settings are left as they were"


# The check


@pytest.mark.parametrize("subject, problems", [("cpu", 34), ("cpu-chain", 1)])
def test_what_is_right_passes(subject: str, problems: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert card_check.main([subject, "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out) == {"problems": problems, "wrong": "", "why": ""}


def spoil(monkeypatch: pytest.MonkeyPatch, method: str, change: Callable[[Any], Any]) -> None:
    cpu = dispatch.backend("cpu")
    right = getattr(cpu, method)
    monkeypatch.setattr(cpu, method, lambda *args: change(right(*args)))


@pytest.mark.parametrize(
    "method, change, what",
    [("separable_forward", lambda y: y * 1.001, "y: error"),
     ("separable_backward", lambda g: (g[0] * 1.001, *g[1:]), "dx: error")],
    ids=["forward", "backward"],
)  # fmt: skip
def test_what_is_wrong_is_named(
    method: str, change: Any, what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(monkeypatch, method, change)
    assert card_check.main(["cpu", "--device", "cpu"]) == 1
    found = json.loads(capsys.readouterr().out)
    first = found["wrong"].startswith("sep-2x144x28x28-o40")  # of those that Python makes
    assert first and what in found["wrong"] and found["problems"] == 5


def test_a_wrong_chain_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from xsep.ops.training.selection import chain_backend

    cpu = chain_backend("cpu")
    right = cpu.bn_finalize
    monkeypatch.setattr(cpu, "bn_finalize", lambda *args: tuple(1.001 * t for t in right(*args)))
    assert card_check.main(["cpu-chain", "--device", "cpu"]) == 1
    assert json.loads(capsys.readouterr().out)["wrong"].startswith("a network's step, torch.float32: y: off by")


def test_the_network_keeps_away_from_what_rounding_decides() -> None:
    """From a ReLU's jump and from ties in a pool; ties of a whole window, where gamma is 0, are the same for all."""
    part, x = card_check.network("aten", torch.float32, "cpu")
    part = part.by_pytorch().double()
    nearest: list[float] = []

    def relu(u: Tensor) -> None:
        nearest.append(float(u.abs().min() / u.square().mean().sqrt()))

    def pool(m: nn.Module, args: tuple[Tensor]) -> None:
        u = args[0]
        windows = F.unfold(F.pad(u, (1, 1, 1, 1), value=-torch.inf), 3, stride=2)
        first, second = windows.view(len(u), u.shape[1], 9, -1).topk(2, 2).values.unbind(2)
        gaps = (first - second)[second.isfinite() & (first != second)]
        nearest.append(float(gaps.min() / u.square().mean().sqrt()))

    for m in part.modules():
        if isinstance(m, MaxPool):
            m.register_forward_pre_hook(pool)
        elif isinstance(m, FusedSeparableConv2d) and m.prologue_activation == "relu":
            m.register_forward_pre_hook(lambda m, args: relu(args[0]))
    with torch.no_grad():
        relu(part.blocks(part.stem(x.double())))
    assert len(nearest) == 12 and min(nearest) > 1e-5


@pytest.mark.parametrize(
    "error, before, result",
    [(torch.OutOfMemoryError("out of memory"), 3,
      {"wrong": "", "why": "the card's memory ran out after 3 problems"}),
     (RuntimeError("CUDA error: illegal memory access\nat"), 3,
      {"wrong": "after case 2: CUDA error: illegal memory access", "why": ""}),
     (RuntimeError("all devices are busy"), 0, {"wrong": "", "why": "all devices are busy"})],
    ids=["memory", "kernel", "device"],
)  # fmt: skip
def test_what_is_raised(
    error: Exception, before: int, result: dict[str, str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def check(subject: str, device: str) -> Generator[tuple[str, list[str]], None, None]:
        yield from ((f"case {i}", []) for i in range(before))
        raise error

    monkeypatch.setattr(card_check, "check", check)
    assert card_check.main(["cpu", "--device", "cpu"]) == (1 if result["wrong"] else 2)
    assert json.loads(capsys.readouterr().out) == {"problems": before, **result}


def test_every_type_and_way_is_among_the_problems() -> None:
    for backend, dtypes in (("cuda", 3), ("triton", 2)):
        cases = list(card_check.cases(backend, "cuda"))
        assert len({case.dtype for case in cases}) == dtypes == len(card_check.types_of(backend, "cuda"))
        assert {case.op for case in cases} == {"separable", "depthwise"}
        assert {max(case.c_out, 256) for case in cases} >= {256, 728}, "in one kernel, and in two"


# The process


def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Stands for Python in what is started."""
    file = tmp_path / "python"
    file.write_text(f"#!{sys.executable}\nimport json, os, signal, sys, time\n{text}\n")
    file.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(file))


def test_without_a_gpu_there_is_no_answer() -> None:
    if torch.cuda.is_available():
        pytest.skip("PyTorch sees a GPU")
    found = card_checks.run("cuda", 0)
    assert (found.wrong, found.why) == (None, "PyTorch sees no GPU here")


@pytest.mark.parametrize(
    "text, expected",
    [('print("noise"); print(json.dumps({"problems": 5, "wrong": "", "why": ""}))', ("", 5, "")),
     ('print(json.dumps({"problems": 1, "wrong": "dx: error", "why": ""})); sys.exit(1)', ("dx: error", 1, "")),
     ('print(json.dumps({"problems": 0, "wrong": "", "why": "busy"})); sys.exit(2)', (None, 0, "busy")),
     ("os.kill(os.getpid(), signal.SIGSEGV)", ("their check died of SIGSEGV", 0, "")),
     ("os.kill(os.getpid(), signal.SIGKILL)", (None, 0, "the process ended with exit code -9: it said nothing")),
     ('sys.exit("no such module")', (None, 0, "the process ended with exit code 1: no such module")),
     ('print("[]")', (None, 0, "the process ended with exit code 0: it said nothing")),
     ("time.sleep(60)", ("their check did not end within 1 s", 0, ""))],
    ids=["right", "wrong", "unknown", "crash", "killed", "broken", "nonsense", "hangs"],
)  # fmt: skip
def test_what_a_process_may_say(
    text: str, expected: tuple[Any, int, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path, monkeypatch, text)
    if "sleep" in text:
        monkeypatch.setattr(card_checks, "LIMIT", 1.0)
    found = card_checks.run("cuda", 0)
    assert (found.wrong, found.problems, found.why) == expected


def test_what_it_is_started_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XSEP_BACKEND", "aten")
    said = '{"arguments": sys.argv[1:], "environment": dict(os.environ)}'
    program(tmp_path, monkeypatch, f'open({str(tmp_path / "said")!r}, "w").write(json.dumps({said}))')
    card_checks.run("triton-chain", 2)
    found = json.loads((tmp_path / "said").read_text())
    assert found["arguments"] == ["-m", "xsep.card_check", "triton-chain", "--device", "cuda:2"]
    assert found["environment"]["XSEP_CARD_CHECK"] == "0", "a check asks for none"
    assert "XSEP_BACKEND" not in found["environment"]
    assert (Path(found["environment"]["PYTHONPATH"].split(os.pathsep)[0]) / "xsep" / "card_check.py").is_file()


def test_a_program_that_is_no_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for executable in ("", str(tmp_path / "missing")):
        monkeypatch.setattr(sys, "executable", executable)
        assert card_checks.run("cuda", 0).wrong is None


# Who asks, on a pretended card


class Asked:
    """Stands for the process: answers by subject, and notes who was asked for."""

    def __init__(self, **answers: Answer) -> None:
        self.answers = {name.replace("_", "-"): answer for name, answer in answers.items()}
        self.subjects: list[str] = []

    def __call__(self, subject: str, index: int) -> Answer:
        self.subjects.append(subject)
        return self.answers[subject]


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Asked]:
    pretend(monkeypatch)

    def install(**answers: Answer) -> Asked:
        asked = Asked(**answers)
        monkeypatch.setattr(card_checks, "run", asked)
        return asked

    return install


#: Before `ask` puts something in its place.
run_here = card_checks.run


def problem(n: int = 64) -> Problem:
    geometry = Geometry(1, 1, 1, 1, 1, 1, 1, 1)
    return Problem("separable", "cuda", torch.bfloat16, True, n, 128, 74, 74, 1, 3, 3, 128, geometry, (0, 0, 0))


def test_the_first_problem_asks_and_no_other(ask: Callable[..., Asked], capsys: pytest.CaptureFixture[str]) -> None:
    asked = ask(cuda=RIGHT)
    assert dispatch.select(problem(), "auto").name == "cuda"
    assert "checking the cuda kernels on this NVIDIA H200, once" in (said := capsys.readouterr().err)
    assert "they are right on 34 problems (9 s)" in said
    assert dispatch.select(problem(), "auto", "backward").name == dispatch.select(problem(32), "auto").name == "cuda"
    forget()  # as in another process
    assert dispatch.select(problem(), "auto").name == "cuda"
    assert asked.subjects == ["cuda"] and capsys.readouterr().err == ""


def test_what_it_timed_is_kept_and_followed(
    ask: Callable[..., Asked], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said by the process, read here, kept in the file: kernels that are right, and slower than PyTorch's."""
    times = {d: {"aten": 1.0, "aten, NCHW": 1.0, "cuda": 99.0} for d in findings.DIRECTIONS}
    timed = {findings.problem_key(p): asdict(Finding(str(p), times)) for p in probes.LAYERS}
    said = json.dumps({"problems": 5, "wrong": "", "why": "", "probes": timed})
    program(tmp_path, monkeypatch, f"print({said!r})")
    asked = ask(cuda=run_here("cuda", 0))
    assert dispatch.select(problem(), "auto") is ATEN
    assert f"right on 5 problems; {len(probes.LAYERS)} layers timed (" in capsys.readouterr().err
    assert "corrected by what 128->128 @147 took on this card" in dispatch.explain(problem())
    forget()  # as in another process
    assert dispatch.select(problem(), "auto") is ATEN and asked.subjects == ["cuda"]


def test_what_is_wrong_is_not_taken(ask: Callable[..., Asked]) -> None:
    asked = ask(cuda=WRONG, triton=RIGHT)
    with pytest.warns(RuntimeWarning, match="cuda kernels are wrong on NVIDIA H200.*allowed 0.2"):
        assert dispatch.select(problem(), "auto").name == "triton"
    assert asked.subjects == ["cuda", "triton"]
    assert "not cuda   could run, but its kernels were wrong when" in dispatch.explain(problem())
    forget()
    asked = ask(triton=RIGHT)
    assert dispatch.select(problem(), "auto").name == "triton" and asked.subjects == []


def test_what_nobody_could_tell_is_asked_once_a_process(
    ask: Callable[..., Asked], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ask(cuda=UNKNOWN, triton=UNKNOWN)
    assert dispatch.select(problem(), "auto") is dispatch.select(problem(32), "auto") is ATEN
    assert asked.subjects == ["cuda", "triton"]
    assert "they could not be checked, so PyTorch's convolutions run: busy" in capsys.readouterr().err
    assert "could not be checked on this one (busy): run" in dispatch.explain(problem())
    forget()
    assert ask(cuda=RIGHT) and dispatch.select(problem(), "auto").name == "cuda"


def test_who_does_not_ask(ask: Callable[..., Asked], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ask()
    assert dispatch.select(problem(), "cuda").name == "cuda", "by name it runs"
    monkeypatch.setenv("XSEP_TRUST_UNVERIFIED", "1")
    assert dispatch.select(problem(32), "auto").name == "cuda"
    monkeypatch.delenv("XSEP_TRUST_UNVERIFIED")
    monkeypatch.setenv("XSEP_CARD_CHECK", "0")
    forget()
    assert dispatch.select(problem(), "auto") is ATEN
    monkeypatch.delenv("XSEP_CARD_CHECK")
    forget()
    table = findings.fresh(CARD)
    table.verified = ["cuda"]
    findings.TABLES.mkdir()
    (findings.TABLES / "nvidia-h200.json").write_text(findings.to_json(table))
    findings.forget()
    assert dispatch.select(problem(), "auto").name == "cuda", "verified by all tests"
    assert asked.subjects == []


def test_the_chain_is_asked_for_apart(ask: Callable[..., Asked], monkeypatch: pytest.MonkeyPatch) -> None:
    from xsep.ops.training import selection

    for name in ("cuda", "triton"):
        monkeypatch.setattr(selection.chain_backend(name), "not_supported_reasons", lambda p: [])
    monkeypatch.setattr(selection, "place", lambda device: 0)
    dispatch.forget_choices()
    asked = ask(cuda=RIGHT, cuda_chain=WRONG, triton_chain=RIGHT)
    with pytest.warns(RuntimeWarning, match="cuda-chain kernels are wrong"):
        assert selection.select(problem(), "auto").name == "triton"
    assert dispatch.select(problem(), "auto").name == "cuda", "for what is no chain"
    assert asked.subjects == ["cuda-chain", "triton-chain", "cuda"]
    dispatch.forget_choices()


def test_two_at_once_make_one_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one, as if in another process, waits for the first one's answer."""
    runs, answers = [], []

    def run(subject: str, index: int) -> Answer:
        runs.append(subject)
        time.sleep(0.5)
        return RIGHT

    monkeypatch.setattr(card_checks, "run", run)
    threads = [
        threading.Thread(target=lambda: answers.append(card_checks.ask("cuda", 0, CARD, lambda line: None)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == ["", ""] and runs == ["cuda"]


def test_a_cache_that_cannot_be_written_lasts_a_process(
    ask: Callable[..., Asked], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    asked = ask(cuda=RIGHT)
    with pytest.warns(RuntimeWarning, match="in this process only"):
        assert dispatch.select(problem(), "auto").name == "cuda"
    assert dispatch.select(problem(32), "auto").name == "cuda" and asked.subjects == ["cuda"]


def test_findings_and_answers_are_kept_side_by_side() -> None:
    finding = Finding("a layer", {"forward": {"aten": 2.0, "cuda": 1.0}, "backward": {}})
    findings.remember(CARD, {"a layer": finding}, "today")
    findings.remember(CARD, {}, "today", {"cuda": ""})
    findings.forget()
    assert findings.cached(CARD).checked == {"cuda": ""} and list(findings.cached(CARD).entries) == ["a layer"]


# The command


def run_cli(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli(["check", *arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_command_needs_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run_cli(capsys) == (2, "", "xsep check: PyTorch sees no GPU here\n")
    with pytest.raises(SystemExit, match="2"):
        card_check.main(["gpu"])


@pytest.mark.parametrize(
    "answers, arguments, code, lines",
    [((RIGHT, RIGHT), (), 0, ["cuda on NVIDIA H200: right", "cuda-chain on NVIDIA H200: right"]),
     ((RIGHT, WRONG), ("--backend", "cuda"), 1,
      ["cuda on NVIDIA H200: right", f"cuda-chain on NVIDIA H200: wrong: {WRONG.wrong}"]),
     ((UNKNOWN, UNKNOWN), ("--backend", "cuda"), 2,
      ["cuda on NVIDIA H200: unknown: busy", "cuda-chain on NVIDIA H200: unknown: busy"])],
    ids=["right", "wrong", "unknown"],
)  # fmt: skip
def test_the_command(
    answers: tuple[Answer, Answer], arguments: tuple[str, ...], code: int, lines: list[str],
    ask: Callable[..., Asked], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    why: dict[str, list[str]] = {"cuda": [], "triton": ["Triton is not installed"]}
    monkeypatch.setattr("xsep.cli.check.reasons", lambda name: why[name])
    asked = ask(cuda=answers[0], cuda_chain=answers[1])
    missing = [f"{name} on NVIDIA H200: cannot run: Triton is not installed" for name in ("triton", "triton-chain")]
    found, out, _ = run_cli(capsys, *arguments)
    assert (found, out.splitlines()) == (code, lines + (missing if not arguments else []))
    known: Optional[int] = None if answers[0] is UNKNOWN else 2
    _, out, _ = run_cli(capsys, *arguments, "--json")
    state = "right" if answers[0] is RIGHT else "unknown"
    assert json.loads(out)["backends"]["cuda"]["state"] == state
    assert known is None or len(asked.subjects) == known, "what is known is not asked again"
    run_cli(capsys, *arguments, "--again")
    assert known is None or len(asked.subjects) == 2 * known


def test_the_command_where_nothing_can_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("xsep.cli.check.reasons", lambda name: ["it is not built"])
    code, out, err = run_cli(capsys)
    assert (code, out) == (2, "") and "cuda cannot run: it is not built; triton cannot run" in err
