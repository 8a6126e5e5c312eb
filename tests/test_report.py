"""`make report`: the README says what the results say, and the page needs nothing but itself."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import common  # noqa: E402
import report  # noqa: E402
import report_data  # noqa: E402
import report_readme  # noqa: E402
from report_data import Card  # noqa: E402

from xsep.tuning import digest  # noqa: E402

DIGESTS = {"aten": "a" * 64, "cpu": "b" * 64, "cuda": "c" * 64, "triton": "d" * 64}


def results_in_git(root: Path, to: Path) -> Path:
    """The results as git has them: what somebody has measured and not added is not README's matter."""
    git = ["git", "-C", str(root)]
    known = subprocess.run([*git, "ls-files", "-z", "benchmarks/results"], capture_output=True)
    if known.returncode != 0 or not known.stdout:
        return root / "benchmarks" / "results"  # no checkout
    subprocess.run([*git, "checkout-index", "-z", "--stdin", f"--prefix={to}/"], input=known.stdout, check=True)
    return to / "benchmarks" / "results"


def test_readme_is_what_the_results_give(tmp_path: Path) -> None:
    """Where this fails, results, kernels or README were changed by hand: run `make report`, and add the results."""
    readme = (ROOT / "README.md").read_text()
    cards = report_data.load(results_in_git(ROOT, tmp_path))
    assert report_readme.rendered(readme, cards, digest.all_sources()) == readme


def test_measurements_that_were_not_added_do_not_matter(tmp_path: Path) -> None:
    root, results = tmp_path / "clone", tmp_path / "clone" / "benchmarks" / "results"
    for name in ("added", "own"):
        (results / name).mkdir(parents=True)
        (results / name / "sepconv.json").write_text("1")
    assert results_in_git(root, tmp_path / "none") == results
    for command in (["init", "-q"], ["add", "benchmarks/results/added"]):
        subprocess.run(["git", "-C", str(root), *command], check=True)
    (results / "added" / "sepconv.json").write_text("2")
    found = results_in_git(root, tmp_path / "index")
    assert [path.name for path in found.iterdir()] == ["added"]
    assert (found / "added" / "sepconv.json").read_text() == "1"


def test_readme_has_every_generated_part_once() -> None:
    found = re.findall(r"<!-- results:(\w+) -->", (ROOT / "README.md").read_text())
    assert sorted(found) == sorted(report_readme.blocks([], DIGESTS))


def gpu(verified: dict[str, Any], phases: dict[str, Any] | None = None) -> Card:
    record = {
        "card": "NVIDIA H200", "environment": {"capability": "9.0"}, "verified": verified, "phases": phases or {},
    }  # fmt: skip
    return Card("nvidia-h200", {"record": record})


def proof(value: str) -> dict[str, Any]:
    return {"digest": value, "date": "2026-01-02T03:04", "tests": 302}


def test_what_is_verified_in_words() -> None:
    say = report_data.verification
    cpu = Card("amd", {"sepconv": {"environment": {"device": "AMD"}}})
    assert say([cpu], DIGESTS) == ["No card has verified or measured the GPU kernels yet."]
    fresh = say([gpu({"cuda": proof("c" * 64), "triton": proof("d" * 64)})], DIGESTS)
    assert fresh == [
        f"NVIDIA H200 verified the {name} kernels on 2026-01-02 by 302 tests, digest {letter * 12}: they are the ones "
        "shipped here."
        for name, letter in (("cuda", "c"), ("triton", "d"))
    ]
    older = say([gpu({"cuda": proof("e" * 64)})], DIGESTS)
    assert "verified older cuda kernels" in older[0] and "no card has verified them" in older[0]
    assert older[1] == "NVIDIA H200 has not verified the triton kernels."
    failed = gpu({}, {"tests-cuda": {"status": "failed", "summary": "3 passed, 1 failed, 0 skipped"}})
    assert "(failed: 3 passed, 1 failed, 0 skipped)" in say([failed], DIGESTS)[0]


def sepconv(scale: float = 1.0) -> dict[str, Any]:
    def times(ours: float) -> dict[str, Any]:
        return {"nchw": {"us": 20.0}, "channels_last": {"us": 10.0}, "xsep auto": {"us": ours * scale}}

    rows = [
        {"dtype": "float32", "mode": mode, "shape": f"{c}→7 @9", "count": 2, "c_in": c, "c_out": 7, "height_width": 9,
         "floor_us": 4.0, "bytes": 1e6, "flops": 1e7 * c, "times": times(ours)}
        for mode in ("forward", "forward+backward") for c, ours in ((5, 8.0), (6, 12.5))
    ]  # fmt: skip
    where = {
        "device": "NVIDIA H200", "capability": "9.0", "torch": "2.13", "date": "2026-01-02", "cuda": "13.0",
        "cudnn": 91000,
    }  # fmt: skip
    return {
        "results": rows, "environment": where, "device_type": "cuda", "batch": 64, "size": 299, "figure": "median",
        "photographs": ["synthetic 1", "synthetic 2"], "failures": ["float32 5→7 @9 cuda: y: error 3"], "notes": [],
        "limits": {"float32": {"bytes_per_second": 4e12, "flops_per_second": 4e13}},
        "totals": [{"dtype": "float32", "mode": m, "times": times(10.25)} for m in ("forward", "forward+backward")],
    }  # fmt: skip


def xception() -> dict[str, Any]:
    networks = ["Xception, PyTorch", "Xception, xsep", "Inception V3"]
    rows = [
        {"dtype": "bfloat16", "mode": "training", "network": n, "way": "eager", "steps_per_second": s}
        for n, s in zip(networks, (9.0, 11.0, 10.0))
    ]
    return {
        **{k: sepconv()[k] for k in ("environment", "device_type", "batch", "size", "figure", "photographs")},
        "networks": networks, "paper": {"Inception V3": 31, "Xception": 28, "ratio": 28 / 31}, "results": rows,
        "ratios": [],
    }  # fmt: skip


def memory() -> dict[str, Any]:
    sizes = {"pytorch": {"kept": 75e6, "peak": 100e6}, "xsep": {"kept": 42e6, "peak": 71e6}}
    return {"environment": sepconv()["environment"], "results": {"float32": {"batch": 8, **sizes}}}


def card() -> Card:
    made = gpu({"cuda": proof("c" * 64)}, {
        "tests-cuda": {"status": "passed", "summary": "302 <passed>", "seconds": 3.0, "date": "2026-01-02T03:04:05"},
        "memcheck": {"status": "failed", "summary": "3 errors", "seconds": 3.0, "date": "2026-01-02T03:04:05"},
    })  # fmt: skip
    layers = [{"layer": "64->128 @147 x1", "fprop": {"share_of_copy": 0.81}, "fused": {"share_of_matmul": 0.4}}]
    made.files.update(sepconv=sepconv(), xception=xception(), memory=memory(), triton={"layers": layers})
    return made


def test_tables_mark_what_is_lost_and_name_the_setting() -> None:
    table = report_readme.sepconv([card()])
    assert "| 5→7 @9 | 2 | 1.25 | 1.25 |" in table and "| 6→7 @9 | 2 | 0.80 ▾ | 0.80 ▾ |" in table
    assert "| **all 4 layers** |  | 0.98 ▾ | 0.98 ▾ |" in table
    assert "| geometric mean |  | 1.00 | 1.00 |" in table  # of 10 / 8 and 10 / 12.5
    assert "| the same at the limits |  | 2.50 | 2.50 |" in table  # of 10 / 4 twice
    assert "PyTorch 2.13, batch 64 at 299 px, median, pictures made up (no photographs there), 2026-01-02" in table
    assert "Wrong, so not timed: float32 5→7 @9 cuda: y: error 3." in table
    networks = report_readme.xception([card()])
    assert "| training, bfloat16, eager | 9.00 | 11.00 | 10.00 | 1.22 | 0.90 | 1.10 |" in networks
    assert "28 / 31 = 0.90" in networks
    assert "| NVIDIA H200 | float32, batch 8 | 75.0 | 42.0 | 100.0 | 71.0 |" in report_readme.memory([card()])


def test_rendering_changes_only_what_stands_between_the_markers() -> None:
    readme = "before\n<!-- results:memory -->\nold | text\n<!-- /results -->\nafter\n"
    after = report_readme.rendered(readme, [card()], DIGESTS)
    assert after.startswith("before\n<!-- results:memory -->\n|") and after.endswith("\n<!-- /results -->\nafter\n")
    assert "old" not in after and report_readme.rendered(after, [card()], DIGESTS) == after
    with pytest.raises(KeyError):
        report_readme.rendered(readme.replace("memory", "lunch"), [card()], DIGESTS)


def test_a_changed_result_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, readme = tmp_path / "results", tmp_path / "README.md"
    (results / "nvidia-h200").mkdir(parents=True)
    readme.write_text("<!-- results:sepconv -->\n\n<!-- /results -->\n")
    path = results / "nvidia-h200" / "sepconv.json"
    path.write_text(json.dumps(sepconv()))
    arguments = ["--results", str(results), "--readme", str(readme), "--out", str(tmp_path / "page.html")]
    assert report.main([*arguments, "--check"]) == 1
    assert not (tmp_path / "page.html").exists()
    pytest.importorskip("matplotlib")
    assert report.main(arguments) == 0 and report.main([*arguments, "--check"]) == 0
    path.write_text(json.dumps(sepconv(1.1)))
    assert report.main([*arguments, "--check"]) == 1
    path.write_text("{")
    assert common.run("report", lambda: report.main(arguments)) == 2
    said = capsys.readouterr().err
    assert said.startswith("report: nvidia-h200/sepconv.json cannot be read") and said.count("\n") == 1


def test_page_is_whole_and_hides_no_loss() -> None:
    pytest.importorskip("matplotlib")
    import report_html

    page = report_html.page([card()], DIGESTS)
    assert not re.search(r'(?:src|href)="(?!#)|@import|url\((?!#)', page), "nothing from elsewhere"
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page
    assert page.count("<svg") == 5 and "currentColor" in page and "#010203" not in page
    assert (
        'class="loss">0.80</td>' in page and 'class="win">1.25</td>' in page and "loses on 2 of 4 measurements" in page
    )
    assert "28/31 of Inception V3" in page and "302 &lt;passed&gt;" in page and '<td class="loss">failed</td>' in page
    assert "Wrong, so not timed" in page and "81%" in page and "50%" in page
    assert page == report_html.page([card()], DIGESTS), "the same results give the same page"


def test_page_with_nothing_measured_and_with_parts_missing() -> None:
    pytest.importorskip("matplotlib")
    import report_html

    assert "Nothing has been measured yet" in report_html.page([], DIGESTS)
    for name in card().files:
        alone = Card("x", {name: copy.deepcopy(card().files[name])})
        assert "<h2>" in report_html.page([alone], DIGESTS)


def test_cards_come_before_cpus() -> None:
    for found in (report_data.load(), report_data.load(ROOT / "nowhere")):
        assert [c.is_gpu for c in found] == sorted((c.is_gpu for c in found), reverse=True)
