"""The two functions users call: find the separable convolutions of a model and let them run as one; undo it."""

from __future__ import annotations

from typing import Optional

from torch import nn

from .activations import Activation
from .chain import DROPOUTS, Chain, Length, Link, Stage, hooked, is_derived, restore
from .dataflow import Dataflow
from .folding import FoldedNorm
from .matching import Match, Part, Tree, depthwise_candidates, drop_claimed_ends, find
from .report import Missed, Swapped, SwapReport


def swap_separable_convs(model: nn.Module, fold_bn: bool = False, report: bool = True) -> SwapReport:
    """Lets every depthwise convolution that is followed by its pointwise one run with it as one op.

    The model is changed in place and keeps its modules, parameters, buffers, ``state_dict`` keys and hooks; outputs
    and gradients stay the same up to rounding. A pair is found by the dataflow of the module around it (torch.fx), in
    an ``nn.Sequential``, under whatever names in a module of its own, or in the model's own forward; where a module
    cannot be traced, the pairs inside its other parts are still found. Activation modules between the two, before
    them and behind them run with them: torch.nn's, and any whose forward is no more than one of those functions. A
    dropout on the way is passed in eval mode or where its p is 0. Whatever only looks like such a pair is left alone,
    and the report says why.

    Args:
        model: any module. A model that was swapped before is first put back, so the last call decides.
        fold_bn: whether a batch norm between the two, or behind them, runs with them in eval mode, as scale and shift
            from its running statistics. Nothing is written into the weights. In training mode the batch norm stands
            where it stood; a pair without one between still runs as one op, and of a pair with one between only the
            depthwise convolution is xsep's. The scale and shift are kept from call to call where no gradient is
            wanted, and made anew when a parameter or buffer changes; a change in place through ``.data``, which no
            version counter sees, is noticed at the next ``train()`` or ``eval()``.
        report: whether to print the report.

    Returns:
        The report: ``swapped``, ``missed`` with a reason each, and readable by ``print``; its ``len`` is the number of
        pairs that were swapped.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        RuntimeError: a model that was swapped before cannot be put back; see :func:`unswap`.

    A pair steps back to its two convolutions, by itself and in every call, where its middle value could be seen: a
    hook on one of its modules or on a module around one, a member called from elsewhere or replaced by another
    module. So it does where the module that was traced is called with keywords, or with arguments that have defaults.
    Attributes other than ``training`` that decide which way a forward takes are read once, here.

    The modules' classes become subclasses of what they were, so what asks for an exact class (eager quantization,
    ``torch.jit.script``) wants :func:`unswap` first. Two convolutions of a pair must not be sharded apart.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    unswap(model)
    tree, flow, result = Tree(model), Dataflow(), SwapReport()
    matches = []
    for conv_dw in depthwise_candidates(model):
        found = find(tree, flow, conv_dw, fold_bn)
        if isinstance(found, str):
            result.missed.append(Missed(tree.names[conv_dw], found))
        else:
            matches.append(found)
    for match in drop_claimed_ends(matches):
        chain = _chain(tree, match)
        tap = hooked(m for modules in chain.watched[chain.dw : chain.pw] for m in modules)
        if tap is not None:
            what = f"{tree.described(tap)} has hooks, which would see the value between the two convolutions"
            result.missed.append(Missed(tree.names[match.conv_dw], what))
            continue
        chain.install()
        names = tuple(tree.names[m] for m in match.members)
        result.swapped.append(
            Swapped(tree.names[match.host], tree.names[match.conv_dw], tree.names[match.conv_pw], names)
        )
    if report:
        print(result)
    return result


def unswap(model: nn.Module) -> int:
    """Undoes :func:`swap_separable_convs`: every module has the class it had.

    Args:
        model: the model, or a part of one: pairs that have a module in it are undone.

    Returns:
        How many pairs were undone.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        RuntimeError: a module's class was changed once more after the swap, by a parametrization for example.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    chains: dict[Chain, None] = {}
    for module in model.modules():
        state = vars(module)
        chains.update(dict.fromkeys(state.get("_xsep_chains", ())))
        if state.get("_xsep_chain") is not None:
            chains[state["_xsep_chain"]] = None
    for chain in chains:
        chain.remove()
    for module in model.modules():
        if is_derived(module):
            restore(module)  # a copy of a member, or a slice of a Sequential, which has no chain
    return len(chains)


def _chain(tree: Tree, match: Match) -> Chain:
    members = match.members
    dw, pw = members.index(match.conv_dw), members.index(match.conv_pw)
    links: dict[Link, None] = {}
    passed = [match.passed.get(i, []) for i in range(len(members) - 1)]
    for part in (*members, *(m for between in passed for m in between)):
        for module in part.modules():  # a norm may hold its activation
            links.update(dict.fromkeys(tree.path(match.host, module)))
    watched = tuple(_watched(tree, match, i) for i in range(len(members) - 1))
    around = dict.fromkeys(m for modules in watched for m in modules if isinstance(m, (nn.Sequential, nn.ModuleList)))
    lengths = tuple(Length(m, len(m)) for m in around)
    dropouts = tuple(tuple(m for m in between if isinstance(m, DROPOUTS)) for between in passed)
    after = [Stage()]
    for part in match.after:
        after.append(_with(after[-1], part, None))
    middle = Stage()
    for part in match.between:
        middle = _with(middle, part, match.conv_dw)
    prologue: Optional[Activation] = None if match.before is None else match.before.activation
    return Chain(
        match.host, match.arity, members, dw, pw, prologue, match.private, middle, tuple(after), tuple(links), lengths,
        watched, dropouts,
    )  # fmt: skip


def _with(stage: Stage, part: Part, conv: Optional[nn.Conv2d]) -> Stage:
    """The stage with one more part; ``conv``'s bias goes into a norm's shift."""
    norm = stage.norm if part.norm is None else FoldedNorm(part.norm, conv)
    return Stage(norm, stage.activation if part.activation is None else part.activation)


def _watched(tree: Tree, match: Match, i: int) -> tuple[nn.Module, ...]:
    """Where a hook would show the value between members i and i + 1: on them, between them, on what holds one alone."""
    one, other = match.members[i], match.members[i + 1]
    around_one = {step.holder for step in tree.path(match.host, one)}
    around_other = {step.holder for step in tree.path(match.host, other)}
    seen = dict.fromkeys([*one.modules(), *other.modules(), *match.passed.get(i, ())])
    seen.update(dict.fromkeys(m for m in tree.names if m in around_one ^ around_other))
    return tuple(seen)
