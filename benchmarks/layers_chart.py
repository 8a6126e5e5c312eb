"""The chart of bench_layers: every layer a line, how far to the right of 1 it is faster than PyTorch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from chart import GRID, INK, LOSS, QUIET
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter, ScalarFormatter

LAYOUTS = {"channels_last": ("NHWC", "#1769aa"), "contiguous": ("NCHW", "#cfa85a")}
TICKS = (0.25, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50, 100)


def draw(record: dict[str, Any], path: Path) -> None:
    """One panel a type and direction, one dot a layout, batch and number of threads; what is slower is ringed."""
    rows = record["layers"]
    layers = list(dict.fromkeys(r["layer"] for r in rows))
    panels: list[tuple[str, ...]] = list(dict.fromkeys((r["direction"], r["dtype"]) for r in rows))
    panels = panels or [("no layer was right",)]
    height = 2.2 + 0.175 * max(len(layers), 3)
    figure, axes = plt.subplots(1, len(panels), figsize=(max(3.4 + 2.9 * len(panels), 10.5), height), sharey=True,
                                squeeze=False)  # fmt: skip
    for ax, panel in zip(axes[0], panels):
        _panel(ax, [r for r in rows if (r["direction"], r["dtype"]) == panel], layers)
        ax.set_title(", ".join(panel), loc="left", fontsize=11, fontweight="bold", color=INK, pad=8)
    axes[0][0].set_yticks(range(len(layers)), layers, fontsize=8, color=INK)
    axes[0][0].set_ylim(len(layers) - 0.4, -0.6)
    where, op = record["environment"], record.get("op", "separable")  # older records are of that one
    figure.suptitle(f"{op.capitalize()} convolutions of networks on a CPU: PyTorch's time over xsep's", x=0.01,
                    ha="left", fontsize=14, fontweight="bold", color=INK)  # fmt: skip
    sizes = [f"{name} {' '.join(map(str, dict.fromkeys(r[name] for r in rows)))}" for name in ("batch", "threads")]
    figure.text(0.01, 1 - 0.62 / height, f"{where['device']}, PyTorch {where['torch']}, {', '.join(sizes)}; "
                f"{record['figure']}; farther right is faster", fontsize=9.5, color=QUIET, va="center")  # fmt: skip
    handles = [Line2D([], [], marker="o", linestyle="", color=colour) for _, colour in LAYOUTS.values()]
    handles.append(Line2D([], [], marker="o", linestyle="", mfc="none", mec=LOSS, markersize=8))
    figure.legend(handles, [*(label for label, _ in LAYOUTS.values()), "slower than PyTorch"], loc="upper left",
                  bbox_to_anchor=(0.003, 1 - 0.72 / height), ncols=3, frameon=False, fontsize=9.5, labelcolor=INK,
                  handletextpad=0.2)  # fmt: skip
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.95 / height), w_pad=1.2)
    figure.savefig(path, dpi=110, facecolor="white", format="png")
    plt.close(figure)


def ticks_within(first: float, last: float) -> list[float]:
    """Those of TICKS whose labels do not touch, the ones next to 1 before others."""
    kept: list[float] = []
    for tick in sorted(TICKS, key=lambda tick: abs(math.log(tick))):
        apart = all(abs(math.log(tick / other)) > 0.11 * math.log(last / first) for other in kept)
        if first <= tick <= last and apart:
            kept.append(tick)
    return sorted(kept)


def _panel(ax: Any, rows: list[dict[str, Any]], layers: list[str]) -> None:
    at = {layer: i for i, layer in enumerate(layers)}
    for layout, (_, colour) in LAYOUTS.items():
        mine = [r for r in rows if r["layout"] == layout]
        ax.scatter([r["ratio"] for r in mine], [at[r["layer"]] for r in mine], s=16, color=colour, alpha=0.85, zorder=3)
    slower = [r for r in rows if r["ratio"] < 1]
    ax.scatter([r["ratio"] for r in slower], [at[r["layer"]] for r in slower], s=60, facecolors="none", edgecolors=LOSS,
               linewidths=1.1, zorder=4)  # fmt: skip
    ax.axvline(1, color=INK, linewidth=0.9, zorder=2)
    ratios = [1.0, *(r["ratio"] for r in rows)]
    ax.set_xscale("log")
    ax.set_xlim(min(0.9, 0.93 * min(ratios)), max(2.0, 1.07 * max(ratios)))
    ax.set_xticks(ticks_within(*ax.get_xlim()))
    ax.xaxis.set_major_formatter(ScalarFormatter())
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.tick_params(axis="x", which="both", labelsize=9, labelcolor=QUIET, length=0, labeltop=True)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="both", color=GRID, zorder=0)
    ax.set_axisbelow(True)
    for side in ("top", "right", "left", "bottom"):
        ax.spines[side].set_visible(False)
