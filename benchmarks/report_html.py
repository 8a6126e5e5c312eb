"""The report as one HTML page that needs nothing else: results in, text out."""

from __future__ import annotations

from collections import Counter
from html import escape
from typing import Any, Optional

import report_plots as plots
from report_data import BASELINES, Card, panels, ratio, rows_of, setting, verification

STYLE = """
:root { color-scheme: light dark; --ink: #1f2933; --quiet: #5b6775; --paper: #ffffff; --line: #dde3ea; --loss: #b3261e;
  --win: #1b7340; --soft: #f4f7fa; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e9ef; --quiet: #a0acba; --paper: #14181d; --line: #333c46;
  --loss: #ff8a80; --win: #7bd88f; --soft: #1c2229; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.25rem; margin: 2.2rem 0 .3rem; border-top: 1px solid
  var(--line); padding-top: 1rem; } h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
p, li { margin: .3rem 0; } .quiet { color: var(--quiet); font-size: .9rem; }
.wide { overflow-x: auto; } .wide svg { min-width: 34rem; width: 100%; height: auto; color: var(--ink); }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; } thead th { background: var(--soft); }
tr.total td { font-weight: 600; } .loss { color: var(--loss); font-weight: 600; } .win { color: var(--win); }
td.words { text-align: left; white-space: normal; min-width: 16rem; }
"""
HEADINGS = ("NCHW", "channels_last", "compiled NCHW", "compiled channels_last")


def figure(value: Optional[float]) -> str:
    if value is None:
        return "<td></td>"
    return f'<td class="{"win" if value >= 1 else "loss"}">{value:.2f}</td>'


def wide(inner: str) -> str:
    return f'<div class="wide">{inner}</div>'


def shapes_table(sepconv: dict[str, Any], dtype: str, mode: str) -> str:
    """A line a shape and backend: time, share of the floor, and PyTorch's ways over it."""
    rows = rows_of(sepconv, dtype, mode)
    backends = list(dict.fromkeys(n.removeprefix("xsep ") for r in rows for n in r["times"] if n.startswith("xsep ")))
    known = [(name, h) for name, h in zip(BASELINES, HEADINGS) if any(name in r["times"] for r in rows)]
    head = "".join(f"<th>vs {h}</th>" for _, h in known)
    lines = []

    def line(first: str, times: dict[str, Any], backend: str, floor_us: Optional[float], kind: str = "") -> str:
        ours = times.get(f"xsep {backend}")
        if ours is None:
            cells = f"<td>{escape(first)}</td><td>{escape(backend)}</td>"
            cells += f'<td class="loss" colspan="{2 + len(known)}">not timed</td>'
            return f"<tr>{cells}</tr>"
        share = f"{floor_us / ours['us']:.0%}" if floor_us else ""
        ratios = "".join(figure(ratio(times, backend, name)) for name, _ in known)
        return (
            f'<tr class="{kind}"><td>{escape(first)}</td><td>{escape(backend)}</td><td>{1e-3 * ours["us"]:.3f}</td>'
            f"<td>{share}</td>{ratios}</tr>"
        )

    for r in rows:
        lines += [line(f"{r['shape']} ×{r['count']}", r["times"], b, r["floor_us"]) for b in backends]
    total = next((t["times"] for t in sepconv["totals"] if (t["dtype"], t["mode"]) == (dtype, mode)), None)
    if total and len(rows) > 1:
        lines += [line("all layers", total, b, None, "total") for b in backends]
    return wide(
        f"<table><thead><tr><th>shape</th><th>backend</th><th>ms</th><th>of the floor</th>{head}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table>"
    )


def phases_table(record: dict[str, Any]) -> str:
    lines = []
    for name, entry in record.get("phases", {}).items():
        bad = ' class="loss"' if entry["status"] == "failed" else ""
        lines.append(
            f"<tr><td>{escape(name)}</td><td{bad}>{escape(entry['status'])}</td><td>{entry['seconds']:.0f}</td>"
            f"<td>{escape(entry['date'][:16])}</td><td class=words>{escape(entry['summary'])}</td></tr>"
        )
    head = "<tr><th>phase</th><th>came out</th><th>s</th><th>when</th><th></th></tr>"
    return wide(f"<table><thead>{head}</thead><tbody>{''.join(lines)}</tbody></table>")


def micro_table(record: dict[str, Any]) -> str:
    """Shares of a copy's or a matrix product's speed, from bench_cuda or bench_triton."""
    layers = record.get("layers", [])
    shares = [
        (name, key) for name, value in (layers[0].items() if layers else ()) if isinstance(value, dict)
        for key in ("share_of_copy", "share_of_matmul") if key in value
    ]  # fmt: skip
    head = "".join(
        f"<th>{escape(name.replace('_', ' '))}, % of a {key.rpartition('_')[2]}</th>" for name, key in shares
    )
    body = "".join(
        f"<tr><td>{escape(layer['layer'])}</td>" + "".join(f"<td>{layer[n][k]:.0%}</td>" for n, k in shares) + "</tr>"
        for layer in layers
    )
    return wide(f"<table><thead><tr><th>layer</th>{head}</tr></thead><tbody>{body}</tbody></table>")


def chain_table(record: dict[str, Any]) -> str:
    """Each layer of the training chain by every way, from bench_chain: microseconds, and how often the floor."""
    layers, lines = record.get("layers", []), []
    ways = list(dict.fromkeys(way for layer in layers for d in ("forward", "backward") for way in layer[d]))
    for layer in layers:
        for direction in ("forward", "backward"):
            floor, times = layer["floor_us"][direction], layer[direction]
            cells = "".join(
                f"<td>{times[way]['us']:.0f} ({times[way]['us'] / floor:.2f})</td>" if way in times else "<td></td>"
                for way in ways
            )
            lines.append(f"<tr><td>{escape(layer['layer'])}, {direction}</td><td>{floor:.0f}</td>{cells}</tr>")
    head = "".join(f"<th>{escape(way)}, us (of the floor)</th>" for way in ways)
    return wide(
        f"<table><thead><tr><th>layer</th><th>floor, us</th>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    )


def losses(sepconv: dict[str, Any]) -> str:
    """How often xsep loses, said before anything else."""
    backend = "auto"
    found, count = [], 0
    for row in sepconv["results"]:
        value = ratio(row["times"], backend, "nchw", "channels_last")
        count += value is not None
        if value is not None and value < 1:
            found.append(f"{row['shape']} {row['dtype']} {row['mode']} {value:.2f}")
    if not found:
        return f"<p>Against the better of PyTorch's eager layouts, xsep loses on none of {count} measurements.</p>"
    return (
        f'<details><summary>Against the better of PyTorch\'s eager layouts, <span class="loss">xsep loses on '
        f"{len(found)} of {count} measurements</span></summary><ul class=quiet>"
        + "".join(f"<li>{escape(item)}</li>" for item in found)
        + "</ul></details>"
    )


def card_section(card: Card, alone: bool = True) -> str:
    """``alone``: whether no other card has its name."""
    name = card.name if alone else f"{card.name}, {card.folder}"
    parts = [f"<h2>{escape(name)}</h2>"]
    sepconv, xception, memory, record = (card.get(n) for n in ("sepconv", "xception", "memory", "record"))
    if record:
        parts += ["<h3>What gpu-check found</h3>", phases_table(record)]
        if record.get("left_out"):
            parts.append(f'<p class="quiet">Left out, for want of time: {escape(", ".join(record["left_out"]))}</p>')
    if sepconv:
        parts += ["<h3>Xception's separable convolutions</h3>", f'<p class="quiet">{escape(setting(sepconv))}</p>',
                  losses(sepconv)]  # fmt: skip
        parts += [f'<p class="loss">Wrong, so not timed: {escape(f)}</p>' for f in sepconv["failures"]]
        parts.append(wide(plots.roofline(sepconv)))
        for dtype, mode in panels(sepconv):
            parts += [wide(plots.speedups(sepconv, dtype, mode)), shapes_table(sepconv, dtype, mode)]
    if xception:
        parts += ["<h3>Whole networks</h3>", f'<p class="quiet">{escape(setting(xception))}</p>',
                  wide(plots.networks(xception))]  # fmt: skip
    if memory:
        parts += ["<h3>Memory</h3>", f'<p class="quiet">{escape(setting(memory))}</p>', wide(plots.memory(memory))]
    for name in ("cuda", "triton"):
        if card.get(name):
            parts += [f"<h3>The {name} kernels one by one</h3>", micro_table(card.get(name))]
    if card.get("chain"):
        parts += ["<h3>The training chain, layer by layer</h3>", chain_table(card.get("chain"))]
    return "\n".join(parts)


def page(cards: list[Card], digests: dict[str, str]) -> str:
    """The whole page."""
    said = "".join(f"<li>{escape(s)}</li>" for s in verification(cards, digests))
    kernels = ", ".join(f"{name} {digests[name][:12]}" for name in sorted(digests))
    named = Counter(card.name for card in cards)
    sections = (
        "\n".join(card_section(card, named[card.name] == 1) for card in cards)
        or "<p>Nothing has been measured yet.</p>"
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>xsep: measured</title>'
        f"<style>{STYLE}</style></head><body>\n<h1>xsep, measured</h1>\n"
        "<p>Depthwise separable convolution against PyTorch's two convolutions. A ratio is PyTorch's time over xsep's: "
        'above 1 xsep is faster, <span class="loss">below 1 PyTorch is</span>. Nothing was timed before its results '
        "were right. The floor is the larger of the bytes that must be moved over the speed of a copy and of the FLOPs "
        "over the speed of a matrix product, both measured on the same machine.</p>\n"
        f'<ul>{said}</ul>\n<p class="quiet">Digests of the kernels shipped here: {escape(kernels)}</p>\n{sections}\n'
        "</body></html>\n"
    )
