"""The bar chart of bench_sepconv."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

INK, QUIET, GRID, LOSS = "#1f2933", "#6b7785", "#e3e8ee", "#c0392b"
PYTORCH = {
    "nchw": ("PyTorch NCHW", "#c3ccd6"),
    "channels_last": ("PyTorch channels_last", "#93a1b0"),
    "compiled nchw": ("torch.compile NCHW", "#e6cf9e"),
    "compiled channels_last": ("torch.compile channels_last", "#cfa85a"),
}
XSEP = ("#1769aa", "#2a9d8f", "#7b5ea7", "#b0508e", "#4f6d2f")


def _style(name: str, names: list[str]) -> tuple[str, str]:
    """Label and colour."""
    if name in PYTORCH:
        return PYTORCH[name]
    ours = [n for n in names if n not in PYTORCH]
    label = "xsep" if len(ours) == 1 and name == "xsep auto" else name
    return label, XSEP[ours.index(name) % len(XSEP)]


def draw(record: dict[str, Any], path: Path) -> None:
    """One panel a type and mode: speed on each shape, as a multiple of PyTorch's better eager layout there."""
    panels = [(t["dtype"], t["mode"], t["times"]) for t in record["totals"]]
    figure, axes = plt.subplots(len(panels), 1, figsize=(13, 1.4 + 3.3 * len(panels)), squeeze=False)
    timed = list(dict.fromkeys(name for r in record["results"] for name in r["times"]))
    names = [*(name for name in PYTORCH if name in timed), *(name for name in timed if name not in PYTORCH)]
    for ax, (dtype, mode, total) in zip(axes[:, 0], panels):
        rows = [r for r in record["results"] if (r["dtype"], r["mode"]) == (dtype, mode)]
        groups = [(f"{r['c_in']} → {r['c_out']}\n{r['height_width']}² ×{r['count']}", r["times"]) for r in rows]
        if len(rows) > 1:
            groups.append((f"all {sum(r['count'] for r in rows)} layers\nweighted", total))
        _panel(ax, groups, names)
        ax.set_title(f"{mode}, {dtype}", loc="left", fontsize=11, fontweight="bold", color=INK, pad=8)
    handles, labels = [], []
    for ax in axes[:, 0]:
        for handle, label in zip(*ax.get_legend_handles_labels()):
            if label not in labels:
                handles.append(handle)
                labels.append(label)
    where = record["environment"]
    figure.suptitle("Xception's separable convolutions: speed relative to PyTorch's better eager layout", x=0.01,
                    ha="left", fontsize=14, fontweight="bold", color=INK)  # fmt: skip
    threads = "" if record["device_type"] == "cuda" else f"{where['threads']} threads, "
    height = figure.get_size_inches()[1]
    figure.text(
        0.01, 1 - 0.62 / height,
        f"{where['device']}, {threads}PyTorch {where['torch']}, batch {record['batch']}, "
        f"activations of a photograph at {record['size']} px; {record['figure']}; higher is faster",
        fontsize=9.5, color=QUIET, va="center",
    )  # fmt: skip
    order = sorted(range(len(labels)), key=lambda i: [_style(name, names)[0] for name in names].index(labels[i]))
    handles, labels = [handles[i] for i in order], [labels[i] for i in order]
    figure.legend(handles, labels, loc="upper left", bbox_to_anchor=(0.003, 1 - 0.70 / height), ncols=len(labels),
                  frameon=False, fontsize=9.5, labelcolor=INK, handlelength=1.2)  # fmt: skip
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.80 / height), h_pad=1.6)
    figure.savefig(path, dpi=130, facecolor="white", format="png")
    plt.close(figure)


def _panel(ax: Any, groups: list[tuple[str, dict[str, Any]]], names: list[str]) -> None:
    top = 1.0
    labelled = set()
    for position, (_, times) in enumerate(groups):
        present = [name for name in names if name in times]
        baseline = min(times[name]["us"] for name in ("nchw", "channels_last"))
        width = 0.82 / max(len(present), 3)
        for i, name in enumerate(present):
            label, colour = _style(name, names)
            speed = baseline / times[name]["us"]
            top = max(top, speed)
            x = position + (i - (len(present) - 1) / 2) * width
            ax.bar(x, speed, width * 0.92, color=colour, label=None if name in labelled else label, zorder=3)
            labelled.add(name)
            if name not in PYTORCH:
                ax.annotate(
                    f"{speed:.2f}×", (x, speed), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=8.5,
                    fontweight="bold", color=LOSS if speed < 1 else INK, zorder=6,
                    bbox={"boxstyle": "square,pad=0.08", "fc": "white", "ec": "none", "alpha": 0.8},
                )  # fmt: skip
    ax.axhline(1, color=INK, linewidth=0.9, zorder=4)
    if len(groups) > 1:
        ax.axvspan(len(groups) - 1.5, len(groups) - 0.5, color="#f3f6f9", zorder=0)
    ax.set_xlim(-0.5, len(groups) - 0.5)
    ax.set_ylim(0, top * 1.14)
    ax.set_xticks(range(len(groups)), [label for label, _ in groups], fontsize=9, color=INK)
    ax.tick_params(axis="y", labelsize=9, labelcolor=QUIET, length=0)
    ax.tick_params(axis="x", length=0, pad=5)
    ax.grid(axis="y", color=GRID, zorder=0)
    ax.set_axisbelow(True)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color(GRID)
