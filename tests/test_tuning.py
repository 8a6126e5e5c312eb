"""Findings: what is measured, kept, trusted and forgotten; damaged files, full disks and several processes at once."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import xsep
from tests.pretended_card import forget, pretend
from xsep import autotuner, dispatch, measuring, testing
from xsep.backends.aten import ATEN
from xsep.problem import Geometry, Problem
from xsep.tuning import digest, findings
from xsep.tuning.device import H200
from xsep.tuning.findings import Card, Finding

ROOT = Path(__file__).resolve().parent.parent
SHORT = measuring.Effort(1, 0.0)


def problem(device: str = "cpu", n: int = 2, activation: int = 0) -> Problem:
    geometry = Geometry(1, 1, 1, 1, 1, 1, 1, 1)
    return Problem(
        "separable", device, torch.float32, True, n, 7, 11, 13, 1, 3, 3, 5, geometry, (activation, 0, 0)
    )  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def loaded() -> None:
    """Whoever calls the gate has asked before whether the backend runs here."""
    assert dispatch.backend("cpu").not_supported_reasons(problem()) == []


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache folder and tables of its own, and nothing remembered before or after."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("XSEP_BACKEND", raising=False)
    monkeypatch.delenv("XSEP_TRUST_UNVERIFIED", raising=False)
    monkeypatch.setattr(findings, "TABLES", tmp_path / "tables")
    (tmp_path / "tables").mkdir()
    forget()
    yield
    forget()


def card() -> Card:
    return dispatch.card_of("cpu", dispatch.place("cpu"))


def entry(p: Problem, **forward: float) -> dict[str, Finding]:
    return {findings.problem_key(p): Finding(str(p), {"forward": forward, "backward": forward})}


def model() -> nn.Module:
    return nn.Sequential(
        xsep.FusedSeparableConv2d(7, 5, 3, padding=1), nn.BatchNorm2d(5),
        xsep.FusedSeparableConv2d(5, 6, 3, padding=1, prologue_activation="relu"),
    )  # fmt: skip


# Measuring


def test_autotune_of_a_model_finds_measures_and_uses(capsys: pytest.CaptureFixture[str]) -> None:
    net, x = model(), torch.randn(2, 7, 11, 13).contiguous(memory_format=torch.channels_last)
    found = xsep.autotune(net, x, effort=SHORT)
    assert [(p.c_in, p.c_out, p.n) for p in found] == [(7, 5, 2), (5, 6, 2)]
    for finding in found.values():
        for direction in ("forward", "backward"):
            assert set(finding.times[direction]) == {"aten", "aten, NCHW", "cpu"}
            assert all(us > 0 for us in finding.times[direction].values())
    for p, finding in found.items():
        for direction in ("forward", "backward"):
            taken = dispatch.choice(p, "auto", direction)
            assert taken.backend.name == finding.best(direction, ["aten", "cpu"])
            assert "xsep.autotune on this machine" in taken.why
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("[1/2]") and "times PyTorch's speed" in lines[0] and len(lines) == 2


def test_autotune_is_quiet_and_does_not_measure_twice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = xsep.autotune(problem(), effort=SHORT, quiet=True)
    forget()
    monkeypatch.setattr(autotuner, "measure", lambda *a: pytest.fail("it was measured again"))
    assert xsep.autotune(problem(), quiet=True) == first
    assert capsys.readouterr() == ("", "")


def test_tuning_says_what_was_known_and_whether_the_rest_was_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = autotuner.tune([problem()], effort=SHORT)
    assert list(first.found) == [problem()] and first.known == frozenset() and first.kept
    assert "known before" not in capsys.readouterr().err
    forget()
    second = autotuner.tune([problem(), problem(n=3)], effort=SHORT)
    assert list(second.found) == [problem(), problem(n=3)] and second.known == {problem()} and second.kept
    lines = capsys.readouterr().err.splitlines()
    assert ["known before: forward" in line for line in lines] == [True, False]

    def fail(*arguments: Any, **named: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(findings.tempfile, "mkstemp", fail)
    assert autotuner.tune([problem()], quiet=True).kept, "nothing was to be written"
    with pytest.warns(RuntimeWarning, match="cannot write"):
        assert not autotuner.tune([problem(n=4), problem()], quiet=True, effort=SHORT).kept


def test_autotune_leaves_the_model_as_it_was() -> None:
    net = model()
    net.get_submodule("1").eval()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    modes = [m.training for m in net.modules()]
    random = torch.get_rng_state()
    autotuner.problems_of(net, (torch.randn(2, 7, 11, 13, generator=torch.Generator().manual_seed(1)),))
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert [m.training for m in net.modules()] == modes and torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in net.parameters())


def test_what_cannot_be_tuned_says_so() -> None:
    with pytest.raises(TypeError, match="input is missing"):
        xsep.autotune(model())
    with pytest.raises(ValueError, match=r"runs none of xsep's ops"):
        xsep.autotune(nn.Conv2d(3, 4, 1), torch.randn(1, 3, 5, 5))
    with pytest.raises(TypeError, match="not int"):
        xsep.autotune([3])  # type: ignore[list-item]


def test_a_wrong_backend_gets_no_time_and_is_never_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = dispatch.backend("cpu")
    right = backend.separable_forward
    monkeypatch.setattr(backend, "separable_forward", lambda a: right(a) * 1.01)
    found = xsep.autotune(problem(), effort=SHORT, quiet=True)[problem()]
    assert "cpu" not in found.times["forward"] and found.refused["cpu"].startswith("wrong: y: error")
    assert dispatch.select(problem(), "auto") is ATEN


def test_a_backend_that_fails_is_left_out_with_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(a: Any) -> torch.Tensor:
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(dispatch.backend("cpu"), "separable_forward", fail)
    found = measuring.measure(problem(), SHORT)
    assert found.refused == {"cpu": "failed: no such kernel"} and set(found.times["forward"]) == {"aten", "aten, NCHW"}


@pytest.mark.parametrize("op", ["separable", "depthwise"])
def test_only_products_may_be_of_tf32(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is allowed: a depthwise convolution multiplies in float32 all the same."""
    monkeypatch.setattr(testing, "held_as", lambda dtype, device: torch.float16)
    backend = dispatch.backend("cpu")
    for name in ("separable_forward", "depthwise_forward"):
        right = getattr(backend, name)
        monkeypatch.setattr(backend, name, lambda a, right=right: right(a) * (1 + 2**-12))
    found = measuring.gate(problem()._replace(op=op, c_out=7), backend)
    assert bool(found) == (op == "depthwise")


@pytest.mark.parametrize("activation", range(9))
def test_gate_opens_for_every_activation(activation: int) -> None:
    assert measuring.gate(problem(activation=activation), dispatch.backend("cpu")) == []


# Looking up


def test_forward_and_backward_have_their_own_fastest() -> None:
    finding = Finding("", {"forward": {"aten": 3.0, "cpu": 2.0}, "backward": {"aten": 3.0, "cpu": 4.0}})
    findings.remember(card(), {findings.problem_key(problem()): finding}, "today")
    assert dispatch.select(problem(), "auto").name == "cpu"
    assert dispatch.select(problem(), "auto", "backward") is ATEN
    assert "backward  aten: measured fastest" in dispatch.explain(problem())


def test_a_finding_is_for_its_batch_size_alone() -> None:
    findings.remember(card(), entry(problem(n=2), aten=1.0, cpu=2.0), "today")
    assert dispatch.select(problem(n=2), "auto") is ATEN
    assert dispatch.select(problem(n=3), "auto").name == "cpu"


def test_a_look_up_costs_little_and_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """5 us a call after the first is the promise; a loaded machine is allowed ten times that at its best moment."""
    monkeypatch.setattr(measuring, "measure", lambda *a: pytest.fail("a look-up measured"))
    dispatch.select(problem(), "auto")
    again = problem()
    best = float("inf")
    for _ in range(20):
        before = time.perf_counter()
        for _ in range(1000):
            dispatch.select(again, "auto")
        best = min(best, time.perf_counter() - before)
    assert best / 1000 < 50e-6


def test_nothing_is_hashed_where_nothing_was_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "sources", lambda name: pytest.fail("the sources were read"))
    assert dispatch.select(problem(), "auto").name == "cpu"


# GPUs, pretended


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)


def gpu_problem() -> Problem:
    return problem("cuda")._replace(n=64, c_in=128, c_out=128, h=74, w=74, dtype=torch.bfloat16)


def ship(verified: list[str], entries: dict[str, Finding], **digests: str) -> findings.Findings:
    table = findings.fresh(Card(H200.name, H200.architecture))
    table.verified, table.entries, table.date = verified, entries, "2026-01-02"
    table.digests.update(digests)
    (findings.TABLES / "nvidia-h200.json").write_text(findings.to_json(table))
    forget()
    return table


def test_auto_takes_no_kernel_that_no_card_has_verified(h200: None) -> None:
    p = gpu_problem()
    assert dispatch.select(p, "auto") is ATEN
    text = dispatch.explain(p)
    assert "have not been verified on any sm_90 card" in text and "because   no other backend has been verified" in text
    assert dispatch.select(p, "cuda").name == "cuda", "by name it runs"


def test_a_verified_backend_is_ordered_by_the_cost_model(h200: None) -> None:
    ship(["triton"], {})
    assert dispatch.select(gpu_problem(), "auto").name == "triton"
    assert dispatch.select(gpu_problem()._replace(n=1, h=7, w=7), "auto") is ATEN
    ship(["cuda"], {})
    assert dispatch.select(gpu_problem(), "auto").name == "cuda"
    assert "the cost model has cuda" in dispatch.explain(gpu_problem())


def test_a_verified_backend_whose_sources_changed_is_not_taken(h200: None) -> None:
    ship(["triton", "cuda"], entry(gpu_problem(), aten=9.0, triton=1.0, cuda=2.0), triton="older")
    assert dispatch.select(gpu_problem(), "auto").name == "cuda", "the table's time of the older kernels counts no more"
    ship(["triton", "cuda"], {}, triton="older", cuda="older")
    assert dispatch.select(gpu_problem(), "auto") is ATEN


def test_a_shipped_time_of_what_was_not_verified_counts_for_nothing(h200: None) -> None:
    ship(["triton"], entry(gpu_problem(), aten=9.0, triton=2.0, cuda=1.0))
    assert dispatch.select(gpu_problem(), "auto").name == "triton"
    ship([], entry(gpu_problem(), aten=9.0, triton=2.0, cuda=1.0))
    assert dispatch.select(gpu_problem(), "auto") is ATEN


def test_a_table_speaks_for_its_card_only(h200: None, monkeypatch: pytest.MonkeyPatch) -> None:
    ship(["triton"], entry(gpu_problem(), aten=9.0, triton=1.0))
    assert dispatch.select(gpu_problem(), "auto").name == "triton"
    other = H200.__class__(**{**H200.__dict__, "name": "NVIDIA H100"})
    monkeypatch.setattr(dispatch, "running", lambda index: other)
    forget()
    assert "the cost model" in dispatch.choice(gpu_problem(), "auto").why


def test_a_table_where_pytorch_is_faster_keeps_pytorch(h200: None) -> None:
    ship(["triton", "cuda"], entry(gpu_problem(), aten=1.0, triton=1.1, cuda=1.2))
    assert dispatch.select(gpu_problem(), "auto") is ATEN


def test_the_user_may_trust_unverified_kernels(h200: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XSEP_TRUST_UNVERIFIED", "1")
    assert dispatch.select(gpu_problem(), "auto").name in ("cuda", "triton")


def test_older_cards_get_pytorch(monkeypatch: pytest.MonkeyPatch, h200: None) -> None:
    from xsep.tuning.device import T4

    monkeypatch.setenv("XSEP_TRUST_UNVERIFIED", "1")
    monkeypatch.setattr(dispatch, "running", lambda index: T4)
    assert dispatch.select(gpu_problem(), "auto") is ATEN


# Files


def test_another_process_uses_what_was_kept() -> None:
    p = problem()
    findings.remember(card(), entry(p, aten=1.0, cpu=2.0), "today")
    code = (
        "import torch, xsep\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        "x = torch.randn(2, 7, 11, 13).contiguous(memory_format=torch.channels_last)\n"
        "print(xsep.explain(x, torch.randn(7, 1, 3, 3), torch.randn(5, 7, 1, 1), padding=1))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert "runs on   aten" in out and "xsep.autotune on this machine: aten 1.0 us, cpu 2.0 us" in out


def test_writers_at_the_same_time_lose_nothing() -> None:
    code = (
        "import sys\n"
        "from xsep.tuning import findings\n"
        "from xsep.tuning.findings import Card, Finding\n"
        "for i in range(8):\n"
        "    name = f'{sys.argv[1]}-{i}'\n"
        "    findings.remember(Card('c', 'a'), {name: Finding(name, {'forward': {'aten': 1.0}})}, 'today')\n"
    )
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda i: subprocess.run([sys.executable, "-c", code, str(i)], check=True, cwd=ROOT), range(3)))
    kept = findings.cached(Card("c", "a"))
    assert sorted(kept.entries) == sorted(f"{writer}-{i}" for writer in range(3) for i in range(8))
    assert [p.suffix for p in findings.cache_folder().iterdir()].count(".tmp") == 0


def time_of(us: str) -> bytes:
    """A file that is right but for its times."""
    made = findings.fresh(Card("", ""))
    made.entries = entry(problem(), aten=1234.5)
    assert findings.from_json(findings.to_json(made)) == made
    return findings.to_json(made).replace("1234.5", us).encode()


DAMAGE = {
    "empty": b"", "half": b'{"format": 1, "card": "x"', "binary": bytes(range(256)), "list": b"[1, 2]",
    "number": b"3", "another program's": b'{"name": "left-pad"}', "another format": b'{"format": 99}',
    "entries of no sense": b'{"format": 2, "card": "", "architecture": "", "versions": {}, "digests": {}, "date": "",'
    b' "verified": [], "entries": {"k": 3}}',
    "nested": b"[" * 100_000, **{f"a time of {us[:5]}": time_of(us) for us in ("NaN", "-1", "1" + 400 * "0")},
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_one_warning_and_the_next_write_makes_a_good_one(damage: str) -> None:
    path = findings.cache_path(card())
    path.parent.mkdir(parents=True)
    path.write_bytes(DAMAGE[damage])
    with pytest.warns(RuntimeWarning, match="xsep ignores") as seen:
        assert dispatch.select(problem(), "auto").name == "cpu"
        dispatch.select(problem(n=5), "auto")
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        findings.remember(card(), entry(problem(), aten=1.0, cpu=2.0), "today")
        forget()
        assert dispatch.select(problem(), "auto") is ATEN


def test_a_damaged_table_is_one_warning(h200: None) -> None:
    (findings.TABLES / "broken.json").write_text("{")
    with pytest.warns(RuntimeWarning, match=r"broken\.json") as seen:
        dispatch.select(gpu_problem(), "auto")
        dispatch.select(gpu_problem()._replace(n=3), "auto")
    assert len(seen) == 1


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), PermissionError(13, "Permission denied")])
def test_what_cannot_be_written_is_one_warning_and_used_in_this_process(
    error: OSError, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **named: Any) -> Any:
        raise error

    monkeypatch.setattr(findings.tempfile, "mkstemp", fail)
    with pytest.warns(RuntimeWarning, match=f"cannot write .*{error.strerror}.*this process only") as seen:
        assert findings.remember(card(), entry(problem(), aten=1.0, cpu=2.0), "today") is None
        findings.remember(card(), entry(problem(n=3), aten=1.0, cpu=2.0), "today")
    assert len(seen) == 1
    assert dispatch.select(problem(), "auto") is ATEN and dispatch.select(problem(n=3), "auto") is ATEN


def test_a_write_that_breaks_off_leaves_the_old_file(monkeypatch: pytest.MonkeyPatch) -> None:
    path = findings.remember(card(), entry(problem(), aten=1.0, cpu=2.0), "today")
    assert path is not None
    before = path.read_text()

    def fail(source: Any, target: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.warns(RuntimeWarning, match="cannot write"):
        findings.remember(card(), entry(problem(n=3), aten=1.0, cpu=2.0), "today")
    assert path.read_text() == before
    assert sorted(p.suffix for p in path.parent.iterdir()) == [".json", ".lock"]


def test_the_file_is_for_these_versions_and_sources_only(monkeypatch: pytest.MonkeyPatch) -> None:
    before = findings.cache_path(card())
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert findings.cache_path(card()) != before
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(before.parent.parent))
    real = digest.sources
    monkeypatch.setattr(digest, "sources", lambda name: "changed" if name == "cpu" else real(name))
    assert findings.cache_path(card()).name != before.name


def test_a_relative_cache_home_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the XDG base directory specification has it."""
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert findings.cache_folder() == Path.home() / ".cache" / "xsep"


def test_findings_survive_the_file() -> None:
    made = findings.fresh(card())
    made.entries = entry(problem(), aten=1.5, cpu=2.5)
    assert findings.from_json(findings.to_json(made)) == made
    assert json.loads(findings.to_json(made))["digests"] == digest.all_sources()


def test_digests_tell_sources_apart(tmp_path: Path) -> None:
    assert len(set(digest.all_sources().values())) == 4
    (tmp_path / "a.cu").write_text("x")
    first = digest.of_folder(tmp_path)
    (tmp_path / "a.cu").write_text("y")
    second = digest.of_folder(tmp_path)
    (tmp_path / "note.txt").write_text("y")
    assert first != second == digest.of_folder(tmp_path)


def test_shipped_tables_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(findings, "TABLES", ROOT / "xsep" / "tuning" / "tables")
    forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for table in findings.tables():
            assert table.entries and table.architecture.startswith(("sm_", "gfx"))


@pytest.mark.parametrize("name", ["cpu", "triton", "cuda"])
def test_a_backends_digest_has_all_that_it_is_made_of(name: str) -> None:
    """What its modules import of the backends' and kernels' own, and what that imports; PyTorch's own way aside."""
    patterns = (*digest._SHARED, *digest.PARTS[name][0])
    covered = {file for pattern in patterns for file in digest.PACKAGE.glob(pattern)}
    reached: set[Path] = set()
    left = [digest.PACKAGE / "backends" / f"{name}.py"]
    while left:
        file = left.pop()
        reached.add(file)
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.ImportFrom) or node.level == 0:
                continue
            folder = file.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            found = [folder.with_suffix(".py"), *(folder / f"{imported.name}.py" for imported in node.names)]
            left += [
                f for f in found
                if f.is_file() and f not in reached and f.parent.name in ("backends", "kernels") and f.stem != "aten"
            ]  # fmt: skip
    assert reached <= covered, sorted(f.name for f in reached - covered)
    assert all(any(digest.PACKAGE.glob(pattern)) for pattern in patterns), "of a file that is no more"
