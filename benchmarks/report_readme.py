"""The README's tables as a pure function of the results: what stands between ``<!-- results:NAME -->`` and
``<!-- /results -->`` is written by `make report` and by nobody else."""

from __future__ import annotations

import re
from typing import Any, Optional

from report_data import (
    INCEPTION,
    PLAIN,
    Card,
    backend_shown,
    mean_ratios,
    panels,
    ratio,
    rows_of,
    runs,
    setting,
    speeds,
    verification,
)

BLOCK = re.compile(r"(<!-- results:(\w+) -->\n).*?(\n<!-- /results -->)", re.DOTALL)
EAGER = ("nchw", "channels_last")


def figure(value: Optional[float]) -> str:
    """A ratio; what xsep loses is marked."""
    if value is None:
        return ""
    return f"{value:.2f}" if value >= 1 else f"{value:.2f} ▾"


def table(headings: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def link(card: Card, name: str) -> str:
    return f"[`{name}.json`](benchmarks/results/{card.folder}/{name}.json)"


def where(card: Card, record: dict[str, Any]) -> str:
    """The setting, after the card's name."""
    words = setting(record)
    return words.removeprefix(card.name) if words.startswith(card.name) else f": {words}"


def sepconv(cards: list[Card]) -> str:
    """For every card a table: the better of PyTorch's two layouts, eager, over xsep."""
    parts = []
    for card in cards:
        record = card.get("sepconv")
        backend = backend_shown(record["results"]) if record else None
        if not record or backend is None:
            continue
        kinds = panels(record)
        shapes = list(dict.fromkeys((r["shape"], r["count"]) for r in record["results"]))
        rows = []
        for shape, count in shapes:
            row = [shape, str(count)]
            for dtype, mode in kinds:
                times: dict[str, Any] = next(
                    (r["times"] for r in rows_of(record, dtype, mode) if r["shape"] == shape), {}
                )
                row.append(figure(ratio(times, backend, *EAGER)))
            rows.append(row)
        totals = {(t["dtype"], t["mode"]): t["times"] for t in record["totals"]}
        layers = sum(count for _, count in shapes)
        rows.append([f"**all {layers} layers**", "", *(figure(ratio(totals[k], backend, *EAGER)) for k in kinds)])
        means = [mean_ratios(record, backend, *k, *EAGER) for k in kinds]
        rows.append(["geometric mean", "", *(figure(mean) for mean, _ in means)])
        rows.append(["the same at the limits", "", *(figure(best) for _, best in means)])
        headings = ["shape", "×", *(f"{dtype}, {mode}" for dtype, mode in kinds)]
        wrong = f"\n\nWrong, so not timed: {'; '.join(record['failures'])}." if record["failures"] else ""
        parts.append(
            f"**{card.name}**{where(card, record)}; {link(card, 'sepconv')}.\n\n{table(headings, rows)}{wrong}"
        )
    return "\n\n".join(parts) or "Nothing has been measured yet."


def xception(cards: list[Card]) -> str:
    """Whole networks: steps a second, and Xception's over Inception V3's beside the paper's."""
    parts = []
    for card in cards:
        record = card.get("xception")
        if not record:
            continue
        ours = [name for name in record["networks"] if name not in (PLAIN, INCEPTION)]
        rows = []
        for dtype, mode, way in runs(record):
            speed = speeds(record, dtype, mode, way)

            def over(a: str, b: str, speed: dict[str, float] = speed) -> Optional[float]:
                return speed[a] / speed[b] if a in speed and b in speed else None

            steps = [f"{speed[name]:.2f}" if name in speed else "" for name in record["networks"]]
            gains = [figure(over(name, PLAIN)) for name in ours]
            known = [over(name, INCEPTION) for name in (PLAIN, *ours)]
            rows.append([f"{mode}, {dtype}, {way}", *steps, *gains, *("" if v is None else f"{v:.2f}" for v in known)])
        short = [name.removeprefix("Xception, ") for name in (PLAIN, *ours)]
        headings = [
            "", *(f"{name}, steps/s" for name in record["networks"]), *(f"{name} / PyTorch" for name in short[1:]),
            *(f"{name} / Inception" for name in short),
        ]  # fmt: skip
        paper = record["paper"]
        parts.append(
            f"**{card.name}**{where(card, record)}; {link(card, 'xception')}. The paper has {paper['Xception']} / "
            f"{paper['Inception V3']} = {paper['ratio']:.2f} in training.\n\n{table(headings, rows)}"
        )
    return "\n\n".join(parts) or "Whole networks have not been measured yet."


def memory(cards: list[Card]) -> str:
    """What a training step of one middle-flow block keeps and at most holds."""
    rows = []
    for card in cards:
        for dtype, result in card.get("memory").get("results", {}).items():
            row = [card.name, f"{dtype}, batch {result['batch']}"]
            for what in ("kept", "peak"):
                row += [f"{1e-6 * result['pytorch'][what]:.1f}", f"{1e-6 * result['xsep'][what]:.1f}"]
            rows.append(row)
    if not rows:
        return "Memory has not been measured yet."
    headings = ["", "", "PyTorch keeps, MB", "xsep keeps", "PyTorch's peak, MB", "xsep's peak"]
    return table(headings, rows)


def blocks(cards: list[Card], digests: dict[str, str]) -> dict[str, str]:
    return {
        "verified": " ".join(verification(cards, digests)),
        "sepconv": sepconv(cards),
        "xception": xception(cards),
        "memory": memory(cards),
    }


def rendered(readme: str, cards: list[Card], digests: dict[str, str]) -> str:
    """The README with its generated parts as the results have them; raises KeyError for a marker nobody knows."""
    contents = blocks(cards, digests)

    def fill(match: Any) -> str:
        return f"{match[1]}{contents[match[2]]}{match[3]}"

    return BLOCK.sub(fill, readme)
