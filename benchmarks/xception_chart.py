"""The charts of bench_xception: how fast each network is, and where its time goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from chart import GRID, INK, LOSS, QUIET
from kinds import KINDS

NETWORK_COLOURS = ("#93a1b0", "#1769aa", "#cfa85a", "#2a9d8f")
KIND_COLOURS = ("#1769aa", "#5b9bd0", "#a9cbe8", "#2a9d8f", "#cfa85a", "#b9a3d6", "#e0b7c6", "#93a1b0", "#4f6d2f",
                "#e3e8ee")  # fmt: skip


def draw(record: dict[str, Any], path: Path) -> None:
    """A row a type: pictures a second in each mode, then the share of an eager step by kind of layer, where known."""
    dtypes = list(dict.fromkeys(r["dtype"] for r in record["results"]))
    modes = list(dict.fromkeys(r["mode"] for r in record["results"]))
    shares = [s for s in record["shares"] if any(s["seconds"].values())]  # none of graphs, nor of an idle profiler
    widths = [1.0] * len(modes) + ([1.45] if shares else [])
    figure, axes = plt.subplots(
        len(dtypes), len(widths), figsize=(max(3.6 * sum(widths) + 1.0, 12.0), 1.5 + 3.6 * len(dtypes)), squeeze=False,
        width_ratios=widths,
    )  # fmt: skip
    for row, kind in zip(axes, dtypes):
        for ax, mode in zip(row, modes):
            _speeds(ax, record, kind, mode)
        if shares:
            _shares(row[-1], [s for s in shares if s["dtype"] == kind])
    where = record["environment"]
    threads = "" if record["device_type"] == "cuda" else f"{where['threads']} threads, "
    height = figure.get_size_inches()[1]
    figure.suptitle("Xception and Inception V3, whole", x=0.01, ha="left", fontsize=14, fontweight="bold", color=INK)
    figure.text(
        0.01, 1 - 0.62 / height,
        f"{where['device']}, {threads}PyTorch {where['torch']}, batch {record['batch']} at {record['size']} px, "
        f"channels_last; {record['figure']}; numbers on xsep's bars: speed over PyTorch's layers",
        fontsize=9.5, color=QUIET, va="center",
    )  # fmt: skip
    handles = [plt.Rectangle((0, 0), 1, 1, color=c) for c in NETWORK_COLOURS]
    figure.legend(handles, record["networks"], loc="upper left", bbox_to_anchor=(0.003, 1 - 0.72 / height), ncols=4,
                  frameon=False, fontsize=9.5, labelcolor=INK, handlelength=1.2)  # fmt: skip
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.95 / height), w_pad=2.0, h_pad=1.8)
    figure.savefig(path, dpi=130, facecolor="white", format="png")
    plt.close(figure)


def _speeds(ax: Any, record: dict[str, Any], kind: str, mode: str) -> None:
    rows = [r for r in record["results"] if (r["dtype"], r["mode"]) == (kind, mode)]
    ways = list(dict.fromkeys(r["way"] for r in rows))
    top = 0.0
    for position, way in enumerate(ways):
        speed = {r["network"]: r["pictures_per_second"] for r in rows if r["way"] == way}
        for i, (name, colour) in enumerate(zip(record["networks"], NETWORK_COLOURS)):
            if name not in speed:
                continue
            x = position + (i - 1.5) * 0.21
            ax.bar(x, speed[name], 0.19, color=colour, zorder=3)
            top = max(top, speed[name])
            if i == 1 and record["networks"][0] in speed:
                gain = speed[name] / speed[record["networks"][0]]
                ax.annotate(f"{gain:.2f}×", (x, speed[name]), xytext=(0, 3), textcoords="offset points", ha="center",
                            fontsize=8.5, fontweight="bold", color=LOSS if gain < 1 else INK)  # fmt: skip
    ax.set_xticks(range(len(ways)), ways, fontsize=9, color=INK)
    ax.set_ylim(0, 1.15 * top or 1)
    ax.set_title(
        f"{mode.replace('BatchNorm ', '')}, {kind}: pictures/s",
        loc="left",
        fontsize=10,
        fontweight="bold",
        color=INK,
        pad=8,
    )
    _bare(ax, "y")


def _shares(ax: Any, rows: list[dict[str, Any]]) -> None:
    if not rows:
        ax.set_axis_off()
        return
    present = [k for k in KINDS if any(s["seconds"][k] > 0 for s in rows)]
    labels = [f"{s['network']}\n{s['mode'].replace('BatchNorm ', '')}" for s in rows]
    left = [0.0] * len(rows)
    for kind in present:
        widths = [100 * s["seconds"][kind] / (sum(s["seconds"].values()) or 1.0) for s in rows]
        ax.barh(range(len(rows)), widths, 0.72, left=left, color=KIND_COLOURS[KINDS.index(kind)], label=kind, zorder=3)
        left = [a + b for a, b in zip(left, widths)]
    ax.set_yticks(range(len(rows)), labels, fontsize=6.5, color=INK)
    ax.invert_yaxis()
    ax.set_xlim(0, 100)
    ax.set_title("eager: % of the time", loc="left", fontsize=10, fontweight="bold", color=INK, pad=8)
    ax.legend(loc="upper left", bbox_to_anchor=(-0.45, -0.08), ncols=4, fontsize=7, frameon=False, labelcolor=INK,
              handlelength=1.0, columnspacing=1.0)  # fmt: skip
    _bare(ax, "x")


def _bare(ax: Any, axis: str) -> None:
    ax.tick_params(axis="both", length=0, labelsize=ax.yaxis.get_ticklabels()[0].get_fontsize() if axis == "x" else 9)
    ax.grid(axis=axis, color=GRID, zorder=0)
    ax.set_axisbelow(True)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color(GRID)
