"""``xsep.autotune``: measures every backend on the problems a model runs, and keeps what it finds."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timezone
from typing import Any, NamedTuple, Union

import torch
from torch import nn

from . import dispatch
from .measuring import QUICK, Effort, measure
from .problem import Problem
from .tuning import findings
from .tuning.findings import Finding


class Tuned(NamedTuple):
    """What :func:`tune` found out, and how."""

    found: dict[Problem, Finding]
    known: frozenset[Problem]  # those of them that were not measured: the cache knew them
    kept: bool  # whether all that was measured is in the cache's file now


@contextlib.contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Puts back the modes, the buffers and the random state that running a model changes."""
    modes = {module: module.training for module in model.modules()}
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    with torch.random.fork_rng(enabled=True):
        try:
            yield
        finally:
            for module, training in modes.items():
                module.training = training
            with torch.no_grad():
                for name, buffer in model.named_buffers():
                    if name in buffers and buffer.shape == buffers[name].shape:
                        buffer.copy_(buffers[name])


def problems_of(model: nn.Module, inputs: tuple[Any, ...]) -> list[Problem]:
    """The distinct problems that a model's forward runs, in training and in eval mode; the model stays as it was."""
    with _left_as_it_was(model), dispatch.recording() as seen, dispatch.recording_chains() as chained:
        model.train()
        with torch.enable_grad():
            model(*inputs)
        model.eval()
        with torch.no_grad():
            model(*inputs)
    return [*seen, *(layer.as_chain_layer() for layer in chained)]


def measured(problem: Problem, effort: Effort = QUICK) -> Finding:
    """Times of every way of running a problem of an op, or a layer of the training chain, that is right."""
    if problem.op == "chain":
        from .chain import measuring as chain  # with much that nobody needs to import xsep

        return chain.measure(problem._replace(op="separable"), effort)
    return measure(problem, effort)


def autotune(
    what: Union[nn.Module, Problem, Iterable[Problem]],
    input: Any = None,
    *,
    quiet: bool = False,
    again: bool = False,
    effort: Effort = QUICK,
) -> dict[Problem, Finding]:
    """Measures which backend is fastest on each problem that a model runs; from then on ``auto`` takes it.

    Each problem (shapes, type, layout, batch size) is measured apart, forward and backward apart. A backend is timed
    only where its results pass the project's rule against float64; ``aten``, which is PyTorch's own convolutions, is
    always among the candidates, in both memory layouts. Layers of a training chain on a GPU are measured as such, in
    each way that the CUDA kernels can go over their backward. The findings are kept in a file below
    ``$XDG_CACHE_HOME/xsep`` (``~/.cache/xsep``) that is valid for this card, PyTorch, Triton, xsep and sources of the
    backends; later processes use it without measuring. Calling a model never measures. What ``torch.compile`` has
    traced of a chain expects the choices of then: autotune first.

    Args:
        what: a model, or a :class:`xsep.problem.Problem`, or several.
        input: what the model is called with: a tensor, or a tuple of arguments. Its batch size is the one tuned for.
        quiet: print nothing.
        again: measure what the cache already knows, too.
        effort: repetitions.

    Returns:
        By problem: microseconds by direction and way, and why each other backend was left out.

    Raises:
        TypeError: a model without an input, or something that is neither a model nor problems.
        ValueError: the model runs none of xsep's ops.

    Warns:
        RuntimeWarning: the cache cannot be read or written; the findings then last as long as this process.
    """
    if isinstance(what, nn.Module):
        if input is None:
            raise TypeError("input is missing: a model's problems are found by calling it")
        problems = problems_of(what, input if isinstance(input, tuple) else (input,))
        if not problems:
            raise ValueError("the model runs none of xsep's ops: xsep.swap_separable_convs puts them in")
    else:
        problems = [what] if isinstance(what, Problem) else list(what)
        wrong = next((p for p in problems if not isinstance(p, Problem)), None)
        if wrong is not None:
            raise TypeError(f"autotune takes a model or problems, not {type(wrong).__name__}")
    return tune(problems, quiet, again, effort).found


def tune(problems: list[Problem], quiet: bool = False, again: bool = False, effort: Effort = QUICK) -> Tuned:
    """:func:`autotune` of problems, which also says what was known before and whether the rest could be kept."""
    results: dict[Problem, Finding] = {}
    before: set[Problem] = set()
    kept = True
    with _progress(len(problems), quiet) as report:
        for problem in problems:
            card = dispatch.card_of(problem.device, dispatch.place(problem.device))
            known = None if again else findings.cached(card).entries.get(findings.problem_key(problem))
            if known is not None:
                before.add(problem)
            else:
                if min(problem.output_size) <= 0 or problem.n == 0:
                    continue
                known = measured(problem, effort)
                date = datetime.now(timezone.utc).isoformat(timespec="seconds")
                kept &= findings.remember(card, {findings.problem_key(problem): known}, date) is not None
            results[problem] = known
            report(sentence(problem, known, problem in before))
    dispatch.forget_choices()
    return Tuned(results, frozenset(before), kept)


def sentence(problem: Problem, finding: Finding, known: bool = False) -> str:
    """One line: the fastest in each direction, against PyTorch in the same layout, and whether it was known before."""
    parts = []
    for direction, times in finding.times.items():
        # A name with a comma is PyTorch's other memory layout, or in the chain a way like any other.
        best = finding.best(direction, [name for name in times if problem.op == "chain" or "," not in name])
        if best is not None:
            speed, plain = times["aten"] / times[best], "the plain chain's" if problem.op == "chain" else "PyTorch's"
            parts.append(f"{direction} {best} {times[best]:.0f} us, {speed:.2f} times {plain} speed")
    return f"{problem}: {'known before: ' if known else ''}{'; '.join(parts)}"


@contextlib.contextmanager
def _progress(total: int, quiet: bool) -> Iterator[Callable[[str], None]]:
    """A bar with rich on a terminal, plain lines elsewhere, nothing where it is to be quiet."""
    done = 0

    def line(words: str) -> None:
        nonlocal done
        done += 1
        if not quiet:
            print(f"[{done}/{total}] {words}", file=sys.stderr, flush=True)

    bar: Any = None
    if not quiet and sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            from rich.console import Console
            from rich.progress import Progress

            bar = Progress(console=Console(stderr=True), transient=True)
    if bar is None:
        yield line
        return
    with bar:
        task = bar.add_task("measuring", total=total)

        def advance(words: str) -> None:
            bar.console.print(words, markup=False, highlight=False)
            bar.advance(task)

        yield advance
