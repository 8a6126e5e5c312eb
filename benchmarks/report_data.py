"""What `make report` reads: every card's folder below benchmarks/results, and what can be said of it in words."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from statistics import geometric_mean
from typing import Any, Optional

import common

RESULTS = common.HERE / "results"
FILES = ("record", "sepconv", "xception", "memory", "cuda", "triton", "chain")
BASELINES = ("nchw", "channels_last", "compiled nchw", "compiled channels_last")
GPU_BACKENDS = ("cuda", "triton")
#: As bench_xception names them.
PLAIN, INCEPTION = "Xception, PyTorch", "Inception V3"


@dataclass
class Card:
    """One folder of results."""

    folder: str
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        for content in self.files.values():
            environment = content.get("environment", {})
            if found := content.get("card") or environment.get("device"):
                return str(found) if self.is_gpu else machine_of(environment)
        return self.folder

    @property
    def is_gpu(self) -> bool:
        return any("capability" in content.get("environment", {}) for content in self.files.values())

    def get(self, name: str) -> dict[str, Any]:
        return self.files.get(name, {})


def load(results: Path = RESULTS) -> list[Card]:
    """All cards, GPUs first; raises BenchmarkError for a file that cannot be read."""
    cards = []
    for folder in sorted(p for p in results.glob("*") if p.is_dir()):
        card = Card(folder.name)
        for name in FILES:
            path = folder / f"{name}.json"
            if path.exists():
                try:
                    card.files[name] = json.loads(path.read_text())
                except ValueError as error:
                    raise common.BenchmarkError(f"{folder.name}/{path.name} cannot be read: {error}") from None
        if card.files:
            cards.append(card)
    return sorted(cards, key=lambda card: (not card.is_gpu, card.folder))


def backend_shown(rows: list[dict[str, Any]]) -> Optional[str]:
    """The backend that stands for xsep in one figure a shape: auto, what users get, where it was timed."""
    names = [name.removeprefix("xsep ") for row in rows for name in row["times"] if name.startswith("xsep ")]
    return "auto" if "auto" in names else next(iter(names), None)


def rows_of(sepconv: dict[str, Any], dtype: str, mode: str) -> list[dict[str, Any]]:
    return [r for r in sepconv["results"] if (r["dtype"], r["mode"]) == (dtype, mode)]


def panels(sepconv: dict[str, Any]) -> list[tuple[str, str]]:
    """Types and modes that were measured, in their order."""
    return list(dict.fromkeys((r["dtype"], r["mode"]) for r in sepconv.get("results", [])))


def ratio(times: dict[str, Any], backend: str, *baselines: str) -> Optional[float]:
    """PyTorch's time over xsep's, against the best of the baselines that were timed; above 1 xsep is faster."""
    ours = times.get(f"xsep {backend}")
    known = [times[name]["us"] for name in baselines if name in times]
    return min(known) / ours["us"] if ours and known else None


def mean_ratios(
    record: dict[str, Any], backend: str, dtype: str, mode: str, *baselines: str
) -> tuple[Optional[float], Optional[float]]:
    """Geometric means over the shapes: what :func:`ratio` is, and what it would be at the floor of every shape."""
    reached, best = [], []
    for row in rows_of(record, dtype, mode):
        gain = ratio(row["times"], backend, *baselines)
        if gain:
            reached.append(gain)
            best.append(gain * row["times"][f"xsep {backend}"]["us"] / row["floor_us"])
    return (geometric_mean(reached), geometric_mean(best)) if reached else (None, None)


def runs(xception: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Type, mode and way of every group of networks that were timed together."""
    return list(dict.fromkeys((r["dtype"], r["mode"], r["way"]) for r in xception["results"]))


def speeds(xception: dict[str, Any], dtype: str, mode: str, way: str) -> dict[str, float]:
    """Steps a second by network."""
    rows = [r for r in xception["results"] if (r["dtype"], r["mode"], r["way"]) == (dtype, mode, way)]
    return {r["network"]: r["steps_per_second"] for r in rows}


def machine_of(environment: dict[str, Any]) -> str:
    """A CPU in words, with the vectors that it has."""
    return common.with_vectors(environment["device"], environment["torch_cpu_capability"])


def setting(record: dict[str, Any]) -> str:
    """On what a result was taken, in words."""
    where = record["environment"]
    if record.get("device_type") == "cuda" or "capability" in where:
        machine = f"{where['device']}, CUDA {where.get('cuda')}, cuDNN {where.get('cudnn')}"
    else:
        machine = f"{machine_of(where)}, {where['cores']} cores, {where['threads']} threads"
    batch = f", batch {record['batch']} at {record['size']} px" if "size" in record else ""
    quick = " (--quick)" if record.get("quick") else ""
    figure = f", {record['figure']}{quick}" if "figure" in record else ""
    pictures = record.get("photographs") or []
    made_up = ", pictures made up (no photographs there)" if pictures and pictures[0].startswith("synthetic") else ""
    return f"{machine}, PyTorch {where['torch']}{batch}{figure}{made_up}, {where['date'][:10]}"


def verification(cards: list[Card], digests: dict[str, str]) -> list[str]:
    """What cards have verified, in sentences: never more than their records say about the sources at hand."""
    gpus = [card for card in cards if card.is_gpu and card.get("record")]
    if not gpus:
        return ["No card has verified or measured the GPU kernels yet."]
    said = []
    for card in gpus:
        verified = card.get("record").get("verified", {})
        for backend in GPU_BACKENDS:
            proof = verified.get(backend)
            if proof is None:
                phase = card.get("record").get("phases", {}).get(f"tests-{backend}", {})
                why = f" ({phase['status']}: {phase['summary']})" if phase else ""
                said.append(f"{card.name} has not verified the {backend} kernels{why}.")
                continue
            when = f"on {proof['date'][:10]} by {proof['tests']} tests, digest {proof['digest'][:12]}"
            if proof["digest"] == digests[backend]:
                said.append(f"{card.name} verified the {backend} kernels {when}: they are the ones shipped here.")
            else:
                said.append(
                    f"{card.name} verified older {backend} kernels {when}; the ones shipped here (digest "
                    f"{digests[backend][:12]}) are newer, and no card has verified them."
                )
    return said
