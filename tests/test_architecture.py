"""The folder tree is the architecture: dependencies run one way, and what must be light stays light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "xsep"

#: From the bottom up. A module may import what stands in an earlier row, or in its own.
LAYERS = (
    ("reference", "problem", "extension", "kernels"),
    ("activations",),
    ("backends",),
    ("plans", "tuning", "dispatch"),
    ("ops", "arguments"),
    ("checked", "repeated"),
    ("functional",),
    ("modules", "cases", "testing", "measuring"),
    ("chain",),
    ("swap", "models", "autotuner", "card_check"),
    ("__init__",),
    ("cli", "train", "__main__"),
)
LEVEL = {name: i for i, row in enumerate(LAYERS) for name in row}
FILES = sorted(p for p in PACKAGE.rglob("*.py"))


def part(path: Path) -> str:
    """The layer's name of a file: its folder below xsep, or its own name."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported_parts(path: Path) -> set[str]:
    found = set()
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            if node.level < depth:
                continue  # within its own folder
            names = [node.module.split(".")[0]] if node.module else [a.name for a in node.names]
            found.update(names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("xsep."):
            found.add((node.module or "").split(".")[1])
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    here = part(path)
    assert here in LEVEL, f"{here} has no place in the layers: give it one"
    for other in imported_parts(path):
        assert other in LEVEL, f"{path.name} imports {other}, which has no place in the layers"
        assert LEVEL[other] <= LEVEL[here], f"{here} must not import {other}: it stands above"


def test_reference_imports_torch_alone() -> None:
    modules: set[str] = set()
    for node in ast.walk(ast.parse((PACKAGE / "reference.py").read_text())):
        if isinstance(node, ast.Import):
            modules.update(a.name.split(".")[0] for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            modules.add("." * node.level + (node.module or "").split(".")[0])
    assert modules == {"torch", "collections", "typing", "__future__"}


@pytest.mark.parametrize("path", sorted((ROOT / "csrc" / "common").glob("*")), ids=lambda p: p.name)
def test_common_sources_are_free_of_torch(path: Path) -> None:
    assert not re.search(r'#include\s*[<"](torch|ATen|c10|pybind11)', path.read_text())


def test_importing_xsep_is_light() -> None:
    """No GPU backend, no Triton, no plotting library, no compiled library before something needs it."""
    code = "import sys, torch\nbefore = set(sys.modules)\nimport xsep\nprint(*sorted(set(sys.modules) - before))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    loaded = out.split()
    assert "xsep.ops.definitions" in loaded
    heavy = {
        "triton",
        "matplotlib",
        "rich",
        "lightning",
        "xsep.backends.triton",
        "xsep.backends.cuda",
        "xsep._C",
        "xsep._repeated",
    }
    assert not heavy & set(loaded)


def test_everything_runs_with_nothing_compiled() -> None:
    """A checkout with no extension built: slower, never broken, and it says what is missing."""
    code = (
        "import sys\n"
        "sys.modules['xsep._C'] = None  # as if it had not been built\n"
        "import torch, xsep\n"
        "x, a, b = torch.randn(1, 4, 5, 5), torch.randn(4, 1, 3, 3), torch.randn(2, 4, 1, 1)\n"
        "y = xsep.separable_conv2d(x, a, b)\n"
        "assert torch.allclose(y, torch.conv2d(torch.conv2d(x, a, groups=4), b), atol=1e-5)\n"
        "print(xsep.explain(x, a, b))\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert "runs on   aten" in out
    assert re.search(r"not cpu .*build it with", out)
