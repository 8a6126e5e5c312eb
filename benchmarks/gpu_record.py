"""The record that gpu_check keeps of a card, and the one way results of several runs come together in a file."""

from __future__ import annotations

import copy
import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import common

FORMAT = 1
#: What a phase may end as. Only ``passed`` is done: all else is tried again by the next call.
STATUSES = ("passed", "failed", "refused", "unfinished", "left out")


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def read_json(path: Path) -> tuple[dict[str, Any], str]:
    """A JSON object, and a sentence where the file is there but is none; {} then, as where it is missing."""
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError("it holds no JSON object")
        return found, ""
    except FileNotFoundError:
        return {}, ""
    except (OSError, ValueError) as error:
        return {}, f"{path.name} cannot be read and is begun anew: {error}"


def write_json(out: Path, name: str, content: dict[str, Any]) -> None:
    """Whole or not at all; raises BenchmarkError."""
    with common.whole_files(out) as temporary:
        common.write_json(temporary(name), content)


def load(path: Path, card: str) -> tuple[dict[str, Any], str]:
    """The record of a card, or an empty one; and a sentence where a file had to be put aside."""
    found, why = read_json(path)
    fits = found.get("format") == FORMAT and isinstance(found.get("phases"), dict)
    if found and not fits:
        why = f"{path.name} is of another format and is begun anew"
    elif found and found.get("card") != card:
        why = f"{path.name} is of {found.get('card')!r}, not of {card!r}, and is begun anew"
        fits = False
    return (found if fits else {"format": FORMAT, "card": card, "phases": {}, "verified": {}}), why


def row_key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(k) for k in ("dtype", "mode", "shape", "network", "way"))


def same_run(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two results may stand in one file: the same card, versions, kernels, batch and pictures."""
    environments = [r.get("environment", {}) for r in (a, b)]
    return all(environments[0].get(f) == environments[1].get(f) for f in ("device", "torch", "digests")) and all(
        a.get(k) == b.get(k) for k in ("benchmark", "batch", "size", "photographs", "compile_mode")
    )


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The new results, with those of the old ones that the new ones have not; the new alone where they do not fit.

    Rows are told apart by type, mode, shape, network and way; within a row of both, times are told apart by name. What
    is computed from the rows is computed anew.
    """
    if not old or not same_run(old, new):
        return new
    both = copy.deepcopy(new)
    rows = {row_key(row): row for row in both.get("results", [])}
    for row in old.get("results", []):
        mine = rows.get(row_key(row))
        if mine is None:
            both["results"].append(copy.deepcopy(row))
        elif "shape" in row:
            mine["times"] = {**row["times"], **mine["times"]}
    both["limits"] = {**old.get("limits", {}), **new.get("limits", {})}
    for name in ("failures", "notes"):
        both[name] = list(dict.fromkeys([*old.get(name, []), *new.get(name, [])]))
    if both.get("benchmark") == "sepconv":
        _recompute_sepconv(both)
    elif both.get("benchmark") == "xception":
        for name in ("shares", "counted"):
            keys = {row_key(row) for row in both.get(name, [])}
            if name in both:
                both[name] += [row for row in old.get(name, []) if row_key(row) not in keys]
        import bench_xception

        both["ratios"] = bench_xception.ratios(both["results"])
    return both


def merged_tables(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A new table, with what of the old one it has not; alone where they are of other sources or cards."""
    if any(old.get(k) != new.get(k) for k in ("format", "card", "architecture", "versions", "digests")):
        return new
    return {**new, **{kind: {**old.get(kind, {}), **new[kind]} for kind in ("entries", "probes")}}


def _recompute_sepconv(record: dict[str, Any]) -> None:
    import bench_sepconv

    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in sorted(record["results"], key=lambda r: (-r["height_width"], r["c_in"], r["c_out"])):
        names = [name.removeprefix("xsep ") for name in row["times"] if name.startswith("xsep ")]
        row["ratios"] = {name: bench_sepconv.ratios(row["times"], name) for name in names}
        groups.setdefault((row["dtype"], row["mode"]), []).append(row)
    kinds = list(dict.fromkeys(dtype for dtype, _ in groups))
    groups = dict(sorted(groups.items(), key=lambda g: (kinds.index(g[0][0]), bench_sepconv.MODES.index(g[0][1]))))
    record["results"] = [row for rows in groups.values() for row in rows]
    record["totals"] = [
        {"dtype": dtype, "mode": mode, "times": bench_sepconv.total(rows)} for (dtype, mode), rows in groups.items()
    ]


#: Which module draws what is in a file.
CHARTS = {
    "sepconv": "chart", "xception": "xception_chart", "layers": "layers_chart", "depthwise": "layers_chart"
}  # fmt: skip


def merge_file(source: Path, out: Path) -> None:
    """Brings one program's JSON into the folder's file of the same name, and draws it where matplotlib is there."""
    new, _ = read_json(source)
    if not new:
        return
    old, _ = read_json(out / source.name)
    name = source.stem
    if name in CHARTS:
        common.write_results(out, name, merged(old, new), CHARTS[name])
        if common.chart_module(CHARTS[name]) is None:
            (out / f"{name}.png").unlink(missing_ok=True)  # an older one would be of other figures
    else:
        write_json(out, source.name, (merged_tables if name == "table" else merged)(old, new))


def draw_missing(out: Path) -> list[str]:
    """Draws what was measured where matplotlib was missing; the names of the new files."""
    made = []
    for name, module in CHARTS.items():
        record, _ = read_json(out / f"{name}.json")
        if record and not (out / f"{name}.png").exists():
            common.write_results(out, name, record, module)
            made.append(f"{out.name}/{name}.png")
    return made
