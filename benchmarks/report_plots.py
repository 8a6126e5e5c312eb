"""The report's plots, as SVG text that takes its ink from the page, so that they can be read in the dark too."""

from __future__ import annotations

import io
import re
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from report_data import BASELINES, INCEPTION, PLAIN, backend_shown, ratio, rows_of, runs, speeds

#: Replaced by the page's own text colour; a shade of it for grids.
INK, FAINT = "#010203", "#040506"
LABELS = {
    "nchw": "PyTorch NCHW", "channels_last": "PyTorch channels_last", "compiled nchw": "compiled NCHW",
    "compiled channels_last": "compiled channels_last",
}  # fmt: skip
WINS = {"nchw": "#4b8fc9", "channels_last": "#1769aa", "compiled nchw": "#8f7cc0", "compiled channels_last": "#6a51a3"}
LOSS = {"nchw": "#e08a80", "channels_last": "#c0392b", "compiled nchw": "#e08a80", "compiled channels_last": "#c0392b"}
NETWORKS = {PLAIN: "#93a1b0", INCEPTION: "#cfa85a"}
OURS = ("#4b8fc9", "#1769aa", "#2a9d8f")
MARKERS = {"float32": "o", "bfloat16": "s", "float16": "^"}


def _svg(figure: Any, label: str) -> str:
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "xsep"}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    plt.close(figure)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', f'role="img" aria-label="{label}"', svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    faint = "color-mix(in srgb, currentColor 22%, transparent)"
    return svg.replace(INK, "currentColor").replace(FAINT, faint)


def _bare(ax: Any, title: str) -> None:
    ax.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    ax.tick_params(colors=INK, length=0, labelsize=8.5)
    ax.grid(axis="y", color=FAINT, linewidth=0.8)
    ax.set_axisbelow(True)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color(FAINT)


def speedups(sepconv: dict[str, Any], dtype: str, mode: str) -> str:
    """Bars a shape: each of PyTorch's ways over xsep; red where PyTorch is faster."""
    rows = rows_of(sepconv, dtype, mode)
    backend = backend_shown(rows) or "auto"
    names = [name for name in BASELINES if any(name in r["times"] for r in rows)]
    figure, ax = plt.subplots(figsize=(9.2, 3.1))
    width = 0.84 / max(len(names), 2)
    top = 1.0
    for i, name in enumerate(names):
        for position, row in enumerate(rows):
            value = ratio(row["times"], backend, name)
            if value is None:
                continue
            top = max(top, value)
            x = position + (i - (len(names) - 1) / 2) * width
            ax.bar(x, value, 0.92 * width, color=WINS[name] if value >= 1 else LOSS[name], zorder=3)
            ax.annotate(f"{value:.2f}", (x, value), xytext=(0, 2), textcoords="offset points", ha="center",
                        fontsize=7, color=INK)  # fmt: skip
        ax.bar(0, 0, color=WINS[name], label=LABELS[name])
    ax.bar(0, 0, color=LOSS["channels_last"], label="red: PyTorch is faster")
    ax.axhline(1, color=INK, linewidth=1, zorder=4)
    ax.set_xticks(range(len(rows)), [f"{r['c_in']}→{r['c_out']}\n{r['height_width']}² ×{r['count']}" for r in rows])
    ax.set_ylim(0, 1.12 * top)
    _bare(ax, f"{dtype}, {mode}: PyTorch's time over xsep's ({backend}); above 1 xsep is faster")
    ax.legend(fontsize=8, frameon=False, labelcolor=INK, ncols=len(names) + 1, loc="upper center",
              bbox_to_anchor=(0.5, -0.2))  # fmt: skip
    figure.tight_layout()
    return _svg(figure, f"Speed-up on each shape, {dtype}, {mode}")


def roofline(sepconv: dict[str, Any]) -> str:
    """FLOP/s reached over FLOP a byte that must be moved, below what this machine's copy and matrix product allow."""
    figure, ax = plt.subplots(figsize=(9.2, 4.0))
    colours = dict(zip(sepconv["limits"], ("#1769aa", "#2a9d8f", "#b0508e")))
    points = [(r["flops"] / r["bytes"]) for r in sepconv["results"]]
    knees = [limit["flops_per_second"] / limit["bytes_per_second"] for limit in sepconv["limits"].values()]
    low, high = min(0.6 * min(points), 0.3 * min(knees)), 1.7 * max(points)
    for dtype, limit in sepconv["limits"].items():
        rate, peak = limit["bytes_per_second"], limit["flops_per_second"]
        knee = peak / rate
        xs = [low, min(max(knee, low), high), high]
        ax.plot(xs, [min(x * rate, peak) / 1e12 for x in xs], color=colours[dtype], linewidth=1.6,
                label=f"{dtype}: {rate / 1e9:.0f} GB/s, {peak / 1e12:.2f} TFLOP/s")  # fmt: skip
    shown = []
    for r in sepconv["results"]:
        backend = backend_shown([r])
        if backend is None:
            continue
        hollow = r["mode"] != "forward"
        reached = r["flops"] / r["times"][f"xsep {backend}"]["us"] / 1e6
        ax.plot(r["flops"] / r["bytes"], reached, MARKERS.get(r["dtype"], "o"), color=colours[r["dtype"]], markersize=6,
                markerfacecolor="none" if hollow else colours[r["dtype"]], zorder=4)  # fmt: skip
        if (r["dtype"], hollow) not in shown:
            shown.append((r["dtype"], hollow))
    for dtype, hollow in shown:
        colour = colours[dtype]
        ax.plot([], [], MARKERS.get(dtype, "o"), color=colour, markerfacecolor="none" if hollow else colour,
                label=f"{dtype}, {'forward+backward' if hollow else 'forward'}")  # fmt: skip
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlim(low, high)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("FLOP a byte that must be moved", color=INK, fontsize=9)
    _bare(ax, "Roofline: TFLOP/s reached")
    ax.tick_params(which="minor", colors=INK, length=0, labelsize=7)
    ax.legend(fontsize=8, frameon=False, labelcolor=INK, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.tight_layout()
    return _svg(figure, "Roofline")


def networks(xception: dict[str, Any]) -> str:
    """Steps a second in training, and the line that the paper's 28/31 of Inception V3 would be."""
    groups = [(dtype, way) for dtype, mode, way in runs(xception) if mode == "training"]
    if not groups:
        return ""
    figure, ax = plt.subplots(figsize=(9.2, 3.2))
    top, names = 0.0, xception["networks"]
    width = 0.82 / len(names)
    for position, (dtype, way) in enumerate(groups):
        speed = speeds(xception, dtype, "training", way)
        for i, name in enumerate(names):
            if name in speed:
                x = position + width * (i - (len(names) - 1) / 2)
                colour = NETWORKS.get(name, OURS[i % len(OURS)])
                ax.bar(x, speed[name], 0.94 * width, color=colour, zorder=3, label=name if position == 0 else None)
                ax.annotate(f"{speed[name]:.2f}", (x, speed[name]), xytext=(0, 2), textcoords="offset points",
                            ha="center", fontsize=8, color=INK)  # fmt: skip
                top = max(top, speed[name])
        if INCEPTION in speed:
            bar = speed[INCEPTION] * xception["paper"]["ratio"]
            ax.plot([position - 0.45, position + 0.45], [bar, bar], color="#c0392b", linewidth=1.8, zorder=5,
                    label="28/31 of Inception V3, as in the paper" if position == 0 else None)  # fmt: skip
    ax.set_xticks(range(len(groups)), [f"{dtype}, {way}" for dtype, way in groups])
    ax.set_ylim(0, 1.14 * top)
    _bare(ax, f"Training steps a second, batch {xception['batch']}")
    ax.legend(fontsize=8, frameon=False, labelcolor=INK, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.1))
    figure.tight_layout()
    return _svg(figure, "Training steps a second")


def memory(record: dict[str, Any]) -> str:
    """MB kept for backward and at the peak of a training step of one block."""
    figure, ax = plt.subplots(figsize=(9.2, 2.8))
    labels: list[str] = []
    for dtype, result in record["results"].items():
        for what, words in (("kept", "kept for backward"), ("peak", "peak")):
            position = len(labels)
            for i, (who, colour) in enumerate((("pytorch", NETWORKS[PLAIN]), ("xsep", OURS[1]))):
                value = 1e-6 * result[who][what]
                x = position + 0.3 * (i - 0.5)
                ax.bar(x, value, 0.28, color=colour, zorder=3,
                       label={"pytorch": "PyTorch", "xsep": "xsep"}[who] if position == 0 else None)  # fmt: skip
                ax.annotate(f"{value:.0f}", (x, value), xytext=(0, 2), textcoords="offset points", ha="center",
                            fontsize=8, color=INK)  # fmt: skip
            labels.append(f"{dtype}\n{words}")
    ax.set_xticks(range(len(labels)), labels)
    _bare(ax, "A training step of one middle-flow block: MB")
    ax.legend(fontsize=8, frameon=False, labelcolor=INK, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.tight_layout()
    return _svg(figure, "Memory of a training step")
