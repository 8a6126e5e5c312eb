"""Renders benchmarks/results/ into one HTML page and the README's tables."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Optional

import common
import report_data
import report_readme

from xsep.tuning import digest

ROOT = common.HERE.parent

DESCRIPTION = """\
Writes build/report.html, one page with everything in it (speed-up on each shape against each of PyTorch's ways, share
of the floor, roofline, memory, whole networks; losses in red), and the parts of README.md that stand between
<!-- results:NAME --> and <!-- /results -->. --check writes nothing, and ends with 1 where the README is out of date."""


def main(argv: Optional[list[str]] = None) -> int:
    parser = common.Parser("report", description=DESCRIPTION, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare the README with the results")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "report.html", help="the page")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=report_data.RESULTS)
    args = parser.parse_args(argv)
    cards, digests = report_data.load(args.results), digest.all_sources()
    try:
        before = args.readme.read_text()
    except OSError as error:
        raise common.BenchmarkError(f"{args.readme.name} cannot be read: {error.strerror}") from None
    after = report_readme.rendered(before, cards, digests)
    if args.check:
        print("the README is up to date" if after == before else "the README is out of date: run `make report`")
        return 0 if after == before else 1
    if common.chart_module("matplotlib") is None:
        raise common.BenchmarkError("matplotlib, which draws the plots, is not installed")
    import gpu_record
    import report_html

    for folder in sorted(p for p in args.results.glob("*") if p.is_dir()):
        for made in gpu_record.draw_missing(folder):
            print(f"drawn: {made}")
    common.prepare_out(args.out.parent)
    with common.whole_files(args.out.parent) as temporary:
        temporary(args.out.name).write_text(report_html.page(cards, digests))
    with common.whole_files(args.readme.parent) as temporary:
        temporary(args.readme.name).write_text(after)
    print(f"written: {args.out} and {args.readme}")
    return 0


if __name__ == "__main__":
    raise SystemExit(common.run("report", main))
