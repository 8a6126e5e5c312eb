"""What the programs print with: rich where it is installed, else the same words in plain lines."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Optional

try:
    import rich.console
    import rich.progress
    import rich.table

    RICH = True
except ImportError:
    RICH = False

_MARKUP = re.compile(r"\[(?:/|/?(?:red|green|yellow|bold|dim))\]")


class PlainTable:
    """The part of rich's Table that the programs use."""

    def __init__(self, title: str = "", **ignored: Any) -> None:
        self.title = title
        self.columns: list[tuple[str, bool]] = []
        self.rows: list[Optional[list[str]]] = []

    def add_column(self, heading: str, justify: str = "left", **ignored: Any) -> None:
        self.columns.append((heading, justify == "right"))

    def add_row(self, *cells: str) -> None:
        filled = [_MARKUP.sub("", cell) for cell in cells]
        self.rows.append(filled + [""] * (len(self.columns) - len(filled)))

    def add_section(self) -> None:
        self.rows.append(None)

    def __str__(self) -> str:
        head = [heading for heading, _ in self.columns]
        lines = [head, *(row for row in self.rows if row is not None)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]

        def text(line: list[str]) -> str:
            cells = (c.rjust(w) if right else c.ljust(w) for c, w, (_, right) in zip(line, widths, self.columns))
            return "  ".join(cells).rstrip()

        rule = "-" * (sum(widths) + 2 * len(widths) - 2)
        body = [rule if row is None else text(row) for row in self.rows]
        return "\n".join([self.title, text(head), rule, *body, ""])


class PlainConsole:
    def print(self, what: Any = "", markup: bool = True, **ignored: Any) -> None:
        text = str(what)
        print(_MARKUP.sub("", text) if markup and isinstance(what, str) else text, flush=True)


def console() -> Any:
    """Something with ``print``, as wide as the terminal, or 140 columns in a file."""
    return rich.console.Console(width=None if sys.stdout.isatty() else 140) if RICH else PlainConsole()


def table(title: str = "") -> Any:
    """Something with add_column, add_row and add_section, for a console to print."""
    if not RICH:
        return PlainTable(title)
    return rich.table.Table(title=title, title_justify="left", caption_justify="left")


@contextmanager
def progress(console: Any, total: int) -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """A bar: one function says what is being done, the other that a step of ``total`` is over."""
    if not RICH:
        yield lambda words: None, lambda: None
        return
    bar = rich.progress
    columns = (bar.TextColumn("{task.description}"), bar.BarColumn(), bar.MofNCompleteColumn(), bar.TimeElapsedColumn())
    with bar.Progress(*columns, console=console, transient=True) as shown:
        task = shown.add_task("", total=total)
        yield lambda words: shown.update(task, description=words), lambda: shown.advance(task)


def print_json(value: Any) -> None:
    """JSON on standard output, infinite times as null."""
    print(json.dumps(_finite(value), indent=1))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
