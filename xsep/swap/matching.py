"""Which convolutions follow each other as a separable one, proved by the dataflow of the modules around them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import NamedTuple, Optional, Union

import torch
from torch import fx, nn

from ..modules import FusedSeparableConv2d, not_a_pair_reasons
from .activations import Activation, activation_of
from .chain import DROPOUTS, Link
from .dataflow import Dataflow, Trace, has_forward, why_closed
from .folding import Norm, modules_of_norm

#: Activations cheap enough to apply once for each tap that loads the value.
_PROLOGUES = ("relu", "relu6", "leaky_relu")


#: Calls that change no tensor: what asking for a shape leaves in a trace.
_HARMLESS = (getattr, torch._assert, "size", "dim")


class Part(NamedTuple):
    """A member that is no convolution: a norm, an activation, or both in one module."""

    module: nn.Module
    norm: Optional[Norm]
    activation: Optional[Activation]


@dataclass
class Match:
    """A separable convolution seen in a host's forward."""

    host: nn.Module
    arity: int
    conv_dw: nn.Conv2d
    conv_pw: nn.Conv2d
    before: Optional[Part] = None
    private: bool = False  # whether nothing but ``before`` sees its input
    between: list[Part] = field(default_factory=list)
    after: list[Part] = field(default_factory=list)
    # Modules that only hand the value on, if only in eval mode, by the number of the member before them.
    passed: dict[int, list[nn.Module]] = field(default_factory=dict)
    may_grow: bool = False  # its input or output is the host's: the module around the host may show more

    @property
    def members(self) -> tuple[nn.Module, ...]:
        before = () if self.before is None else (self.before.module,)
        between = tuple(p.module for p in self.between)
        return (*before, self.conv_dw, *between, self.conv_pw, *(p.module for p in self.after))


class Tree:
    """Names and parents of a model's modules."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names = {m: name for name, m in model.named_modules()}
        self.parents: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
        for holder in model.modules():
            for name, child in holder._modules.items():
                if child is not None:
                    self.parents.setdefault(child, []).append((holder, name))

    def ancestors(self, module: nn.Module) -> list[nn.Module]:
        """From the parent up to the model, as long as there is one parent only."""
        found = []
        while len(self.parents.get(module, ())) == 1:
            module = self.parents[module][0][0]
            found.append(module)
        return found

    def path(self, host: nn.Module, module: nn.Module) -> list[Link]:
        """The steps from the host down to a module; none where a module on the way stands at several places."""
        steps: list[Link] = []
        while module is not host:
            if len(self.parents.get(module, ())) != 1:
                return []
            holder, name = self.parents[module][0]
            steps.append(Link(holder, name, module))
            module = holder
        return steps[::-1]

    def described(self, module: nn.Module) -> str:
        name = self.names[module]
        return f"{name} ({type(module).__name__})" if name else f"the model ({type(module).__name__})"


def depthwise_candidates(model: nn.Module) -> list[nn.Conv2d]:
    """Convolutions that are depthwise by their groups, or look so, but for those a fused layer already holds."""
    held = {part for m in model.modules() if isinstance(m, FusedSeparableConv2d) for part in m.modules()}
    return [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups == m.in_channels and m not in held]


def find(tree: Tree, flow: Dataflow, conv_dw: nn.Conv2d, fold_bn: bool) -> Union[Match, str]:
    """The separable convolution that begins with ``conv_dw``, in the smallest host that shows it whole; or why none."""
    if conv_dw.in_channels == 1:
        return "has one input channel: an ordinary convolution that only looks depthwise"
    if len(tree.parents.get(conv_dw, ())) > 1:
        others = ", ".join(f"{tree.names[h]}.{n}".lstrip(".") for h, n in tree.parents[conv_dw])
        return f"is one module at several places ({others})"
    best: Union[Match, str] = "is not called by the forward of any module around it"
    for host in tree.ancestors(conv_dw):
        if not has_forward(host):
            continue
        found = _in_host(tree, flow, host, conv_dw, fold_bn)
        if isinstance(found, Match):
            if isinstance(best, Match):
                found_more = _own_parts_only(found, best)
                best = found_more if len(found_more.members) > len(best.members) else best
            else:
                best = found
            if not found.may_grow:
                break
        elif isinstance(best, Match):
            break
        else:
            best = found.reason or best
            if found.final:
                break
    return best


def _own_parts_only(larger: Match, smaller: Match) -> Match:
    """The larger host's match with those parts more than the smaller's that are the larger host's own children.

    A part that stands deeper, in another block, is not worth a host above both: such a host is often the model
    itself, whose children people take out and call one by one.
    """
    own = {*smaller.members, *larger.host.children()}
    before = larger.before if larger.before is not None and larger.before.module in own else None
    after = list(takewhile(lambda part: part.module in own, larger.after))
    passed = larger.passed
    if before is None and larger.before is not None:
        passed = {i - 1: modules for i, modules in passed.items()}
    return replace(larger, before=before, after=after, passed=passed)


class _No(NamedTuple):
    """Why a host shows no separable convolution, and whether that rules out the modules around the host too."""

    reason: Optional[str]
    final: bool = True


def _in_host(tree: Tree, flow: Dataflow, host: nn.Module, conv_dw: nn.Conv2d, fold_bn: bool) -> Union[Match, _No]:
    """What the host's forward shows in both modes: the same members, or it does not count."""
    traces = flow.of(host)
    if isinstance(traces, str):
        return _No(f"{tree.described(host)} cannot be traced: {traces}", host in flow.closed)
    evaluated, trained = (_follow(tree, trace, flow.closed, conv_dw, fold_bn) for trace in traces)
    if isinstance(evaluated, _No):
        return evaluated
    if isinstance(trained, _No):
        return trained._replace(reason=f"in training mode, {trained.reason or 'it is not called'}")
    if evaluated.members != trained.members:
        return _No("training and eval mode take different ways")
    return evaluated


def _follow(
    tree: Tree, trace: Trace, closed: dict[nn.Module, str], conv_dw: nn.Conv2d, fold_bn: bool
) -> Union[Match, _No]:
    """From conv_dw's call along its output, as far as it stays a separable convolution."""
    if conv_dw in trace.inside:
        around = trace.inside[conv_dw]
        return _No(f"{tree.described(around)} cannot be traced: {why_closed(closed, around)}")
    calls = trace.calls.get(conv_dw, [])
    if not calls:
        return _No(None, False)
    if len(calls) > 1:
        return _No(f"is called {len(calls)} times by {tree.described(trace.root)}")
    if len(calls[0].args) != 1 or calls[0].kwargs:
        return _No("is not called with one positional argument")
    start = calls[0]
    before, private = _before(tree, trace, start)
    offset = 0 if before is None else 1
    passed: dict[int, list[nn.Module]] = {}
    between = _stretch(tree, trace, start, fold_bn, offset, passed)
    if isinstance(between.next, str):
        return _No(between.next)
    if between.next is None:
        return _No("no pointwise convolution takes its output, which the model returns", False)
    conv_pw = trace.module(between.next)
    reasons = not_a_pair_reasons(conv_dw, conv_pw)
    if not reasons:
        reasons = _surgery_reasons(tree, trace, conv_dw) + _surgery_reasons(tree, trace, conv_pw)
    if reasons:
        return _No(f"with {tree.described(conv_pw)}: {'; '.join(reasons)}")
    assert isinstance(conv_pw, nn.Conv2d)
    foreign = _foreign_between(trace, start, between.next)
    if foreign is not None:
        return _No(f"{_describe_node(tree, trace, foreign)} runs between it and {tree.described(conv_pw)}")
    last = offset + 1 + len(between.parts)
    after = _stretch(tree, trace, between.next, fold_bn, last, passed)
    source = start.args[0]
    may_grow = after.next is None or (isinstance(source, fx.Node) and source.op == "placeholder")
    return Match(
        trace.root, trace.arity, conv_dw, conv_pw, before, private, between.parts, after.parts, passed, may_grow
    )


class _Stretch(NamedTuple):
    """Norm and activation behind a convolution, and what comes then."""

    parts: list[Part]
    next: Union[fx.Node, str, None]  # a convolution's node; why there is none; None: the value is returned


def _stretch(
    tree: Tree, trace: Trace, node: fx.Node, fold_bn: bool, last: int, passed: dict[int, list[nn.Module]]
) -> _Stretch:
    parts: list[Part] = []
    while True:
        if len(node.users) != 1:
            by = ", ".join(sorted(_describe_node(tree, trace, n) for n in node.users))
            what = f"is used {len(node.users)} times: by {by}" if node.users else "is not used"
            return _Stretch(parts, f"the value after {_describe_node(tree, trace, node)} {what}")
        user = next(iter(node.users))
        if user.op == "output":
            return _Stretch(parts, None)
        if user.op != "call_module" or user.args != (node,) or user.kwargs:
            return _Stretch(
                parts,
                f"the value after {_describe_node(tree, trace, node)} goes into {_describe_node(tree, trace, user)}, "
                "which is no module that could be fused",
            )
        module = trace.module(user)
        if isinstance(module, nn.Conv2d):
            return _Stretch(parts, user)
        if type(module) in (nn.Identity, *DROPOUTS):
            passed.setdefault(last, []).append(module)
        else:
            part = _part(tree, trace, module, parts, fold_bn)
            if isinstance(part, str):
                return _Stretch(parts, part)
            parts.append(part)
            last += 1
        node = user


def _part(tree: Tree, trace: Trace, module: nn.Module, parts: list[Part], fold_bn: bool) -> Union[Part, str]:
    """A norm or activation as the next part after those there are, or why it cannot be one."""
    name = tree.described(module)
    reasons = _surgery_reasons(tree, trace, module)
    if reasons:
        return f"{name} {'; '.join(reasons)}"
    activated = any(p.activation is not None for p in parts)
    if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
        if not fold_bn:
            return f"{name} stands between: fold_bn=True folds it in eval mode"
        if parts:
            return f"{name} stands behind {tree.described(parts[-1].module)}, where it cannot be folded"
        applied = modules_of_norm(module)
        if isinstance(applied, str):
            return f"{name} {applied}"
        activation = activation_of(applied[0]) if len(applied) == 1 else None
        if applied and activation is None:
            return f"{name} applies {' and '.join(type(m).__name__ for m in applied)}, which cannot be fused"
        return Part(module, module, activation)
    activation = activation_of(module)
    if activation is None:
        return f"{name} stands between, which is neither a batch norm nor a known activation"
    if activated:
        return f"{name} is a second activation"
    return Part(module, None, activation)


def _before(tree: Tree, trace: Trace, start: fx.Node) -> tuple[Optional[Part], bool]:
    """The activation module that feeds the depthwise convolution and nothing else, and whether its input is its own."""
    node = start.args[0]
    if not isinstance(node, fx.Node) or node.op != "call_module" or len(node.users) != 1:
        return None, False
    module = trace.module(node)
    activation = activation_of(module)
    if activation is None or activation[0] not in _PROLOGUES or len(node.args) != 1 or node.kwargs:
        return None, False
    source = node.args[0]
    private = isinstance(source, fx.Node) and source.op == "call_module" and len(source.users) == 1
    if isinstance(source, fx.Node) and private:
        private = isinstance(trace.module(source), (nn.Conv2d, nn.BatchNorm2d, nn.SyncBatchNorm))
    # In place, it changes a value that others may see.
    if getattr(module, "inplace", False) and not private:
        return None, False
    if _surgery_reasons(tree, trace, module) or _foreign_between(trace, node, start) is not None:
        return None, False
    return Part(module, None, activation), private


def _foreign_between(trace: Trace, first: fx.Node, last: fx.Node) -> Optional[fx.Node]:
    """What runs after ``first`` and before ``last`` without leading from one to the other.

    As one, they read their input when ``last`` runs, so nothing may run in between that could change it in place.
    """
    way, node = {first}, first
    while node is not last:
        node = next(iter(node.users))
        way.add(node)
    node = first
    while node is not last:
        node = node.next
        harmless = node.op == "get_attr" or node.target in _HARMLESS
        if node not in way and not harmless:
            return node
    return None


def _surgery_reasons(tree: Tree, trace: Trace, module: nn.Module) -> list[str]:
    """Why a module cannot change its behaviour within one call of the host, whatever it computes."""
    if not tree.path(trace.root, module):
        return ["is one module at several places, or a module around it is"]
    if len(trace.calls.get(module, ())) != 1 or module in trace.inside:
        return ["is called more than once"]
    if hasattr(module, "parametrizations"):
        return ["has a parametrization"]
    if any(h for m in module.modules() for h in (m._forward_hooks, m._forward_pre_hooks)):
        return ["has hooks, which would see another value"]
    return []


def _describe_node(tree: Tree, trace: Trace, node: fx.Node) -> str:
    if node.op == "call_module":
        return tree.described(trace.module(node))
    if node.op == "call_function":
        return f"the function {getattr(node.target, '__name__', node.target)}"
    if node.op == "call_method":
        return f"the method {node.target}"
    return "the output" if node.op == "output" else node.name


def drop_claimed_ends(matches: list[Match]) -> list[Match]:
    """An activation between two pairs belongs to the later one's prologue, which can run it in either mode."""
    prologues = {m.before.module for m in matches if m.before is not None}
    kept = []
    for m in matches:
        after = m.after
        for i, part in enumerate(after):
            if part.module in prologues:
                after = after[:i]
                break
        kept.append(replace(m, after=after))
    return kept
