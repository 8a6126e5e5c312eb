"""A run's loss and accuracy as one CSV file and one picture, however often it was stopped and resumed."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

Row = dict[str, float]


def _read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        return [{name: float(value) for name, value in row.items() if name and value} for row in rows]


def merged(log: Path) -> list[Row]:
    """The lines of all parts of a run, by step; where a later part went over steps again, its lines count.

    Args:
        log: the folder with Lightning's ``version_0``, ``version_1``, ... in it.
    """
    parts = sorted(log.glob("version_*/metrics.csv"), key=lambda path: int(path.parent.name.split("_")[1]))
    found: list[Row] = []
    for part in parts:
        rows = _read(part)
        if rows:
            first = min(row["step"] for row in rows)
            found = [row for row in found if row["step"] < first] + rows
    return found


def write(out: Path) -> None:
    """Writes ``curves.csv``, and ``curves.png`` where matplotlib is there, of the run in a folder; or nothing."""
    rows = merged(out / "log")
    if not rows:
        return
    names = ["step", "epoch", *sorted({name for row in rows for name in row} - {"step", "epoch"})]
    with (out / "curves.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows({**row, "step": int(row["step"]), "epoch": int(row["epoch"])} for row in rows)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw(left, rows, [name for name in names if name.endswith("loss")], "loss")
    _draw(right, rows, [name for name in names if name.startswith("val_") and name != "val_loss"], "")
    figure.savefig(out / "curves.png", dpi=120)


def _draw(axes: Any, rows: list[Row], names: list[str], title: str) -> None:
    for name in names:
        points = [(row["step"], row[name]) for row in rows if name in row]
        axes.plot(*zip(*points), marker="." if len(points) < 50 else None, label=name)
    axes.set(xlabel="step", ylabel=title)
    axes.grid(alpha=0.3)
    if names:
        axes.legend()
