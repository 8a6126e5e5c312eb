"""A chain: modules that run as one op while the module around them, their host, runs its forward.

How the two convolutions stay two modules and yet run as one. A module that held both could not stand at both their
names, so nothing is moved: every module of a chain keeps its place, its parameters, its buffers and its hooks, and
only its class becomes a subclass of what it was (as :mod:`torch.nn.utils.parametrize` does it). While the host's
forward runs, the pointwise convolution calls the fused op, and the other members hand on what they are given. Called
from anywhere else, each member does what it always did. So ``state_dict``, ``named_modules``, optimisers, ``deepcopy``,
``pickle``, ``to()`` and DistributedDataParallel see the model they knew, and a tap, a slice or a direct call of a
member gets the true value. The host is a subclass of its own class, too, whose forward asks each chain whether it may
run in this call.

A chain steps back, and its members run one by one, where the middle value could be seen or is not defined by vectors:
a hook on a member or on a module around one, a member or what lay between two of them replaced by another module, a
batch norm or a dropout in training mode, arguments of the host other than those it was traced with.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Iterable
from typing import Any, NamedTuple, Optional, Union

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from ..arguments import ChannelAffine
from ..functional import depthwise_conv2d, separable_conv2d
from ..modules import has_hooks
from .activations import Activation
from .folding import FoldedNorm

Span = tuple[int, int]
#: What hands a value on unless it is in training mode.
DROPOUTS = (nn.Dropout, nn.Dropout2d)


class Stage(NamedTuple):
    """Norm and activation after one of the convolutions."""

    norm: Optional[FoldedNorm] = None
    activation: Optional[Activation] = None

    def affine(self, bias: Optional[Tensor] = None) -> Optional[ChannelAffine]:
        """As the op takes it; ``bias`` is the convolution's, where there is no norm that took it in."""
        name, alpha = (None, None) if self.activation is None else self.activation
        if self.norm is not None:
            scale, shift = self.norm.vectors()
            return ChannelAffine(scale, shift, name, alpha)
        if bias is None and name is None:
            return None
        return ChannelAffine(None, bias, name, alpha)

    def is_ready(self) -> bool:
        """Whether vectors say what it does now: not while a norm takes the statistics of the batch."""
        return self.norm is None or not (self.norm.norm.training or self.norm.norm.running_var is None)

    def is_fit_for_backward(self) -> bool:
        """Whether an epilogue saves no more than the modules would.

        Only relu's backward is from its output in PyTorch too: another activation's output may be changed in place
        by what follows, and silu, gelu and hardswish would cost one more GEMM for the pre-activation.
        """
        return self.activation is None or self.activation[0] == "relu"


class Link(NamedTuple):
    """``holder``'s child ``name``, which must stay ``child``."""

    holder: nn.Module
    name: str
    child: nn.Module


class Length(NamedTuple):
    """A container whose modules are called in turn, so that one more would be called among the members."""

    holder: Union[nn.Sequential, nn.ModuleList]
    modules: int


class Chain:
    """Members in the order they are called, and how many of them may run as one in a call of the host.

    Args:
        host: the module in whose forward the members are known to follow each other.
        arity: how many tensors the host's forward was traced with.
        members: the activation of a prologue, if any; the depthwise convolution; norm and activation between, if any;
            the pointwise convolution; norm and activation after it, if any.
        dw, pw: positions of the two convolutions.
        prologue: what the member before the depthwise convolution applies.
        private: whether nothing but that member sees its input. Else the input, which the op would save where the
            member saved its output, may be changed in place later, so a call that records gradients goes without.
        middle: what stands between.
        after: ``after[i]`` is what the i members behind the pointwise convolution do together.
        links: every step from the host down to the members and into them, and to what hands a value on between them.
        lengths: containers of some of the members.
        watched: ``watched[i]`` are the modules on which a hook would show the value between members i and i + 1.
        dropouts: ``dropouts[i]`` are those between members i and i + 1.
    """

    def __init__(
        self,
        host: nn.Module,
        arity: int,
        members: tuple[nn.Module, ...],
        dw: int,
        pw: int,
        prologue: Optional[Activation],
        private: bool,
        middle: Stage,
        after: tuple[Stage, ...],
        links: tuple[Link, ...],
        lengths: tuple[Length, ...],
        watched: tuple[tuple[nn.Module, ...], ...],
        dropouts: tuple[tuple[Any, ...], ...],
    ) -> None:
        self.host, self.arity, self.members, self.dw, self.pw = host, arity, members, dw, pw
        self.prologue, self.private, self.middle, self.after = prologue, private, middle, after
        self.links, self.lengths, self.watched, self.dropouts = links, lengths, watched, dropouts
        # Per thread, which members are absorbed in the call of the host that is under way.
        self.spans: dict[int, Span] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "spans": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> Optional[Chain]:
        """With its host, or not at all: a member that is copied alone is an ordinary module again."""
        if id(self.host) not in memo:
            return None
        twin = Chain.__new__(Chain)
        memo[id(self)] = twin
        vars(twin).update(copy.deepcopy(self.__getstate__(), memo))
        return twin

    def span(self, host: nn.Module, arguments: tuple[Any, ...]) -> Optional[Span]:
        """Members from .. to may run as one now; (0, 0) where each must run alone, None where nothing is known."""
        # A replica for nn.DataParallel is another module that shares the chain, not the parameters.
        if host is not self.host or len(arguments) != self.arity:
            return None
        for argument in arguments:
            if not isinstance(argument, Tensor):
                return None
        for holder, name, child in self.links:
            if holder._modules.get(name) is not child:
                return None
        for container, modules in self.lengths:
            if len(container._modules) != modules:
                return None
        if not self.middle.is_ready() or _global_forward_hooks or _global_forward_pre_hooks:
            return 0, 0
        for i in range(self.dw, self.pw):
            if self._is_shown(i):
                return 0, 0
        first = self.dw
        if first > 0 and (self.private or not torch.is_grad_enabled()) and not self._is_shown(0):
            first = 0
        last = self.pw
        for i in range(1, len(self.after)):
            stage = self.after[i]
            if self._is_shown(last) or not stage.is_ready():
                break
            if torch.is_grad_enabled() and not stage.is_fit_for_backward():
                break
            last += 1
        return first, last + 1

    def _is_shown(self, i: int) -> bool:
        """Whether the value between members i and i + 1 must be there: a hook sees it, or a dropout changes it."""
        return hooked(self.watched[i]) is not None or any(d.training and d.p > 0 for d in self.dropouts[i])

    def enter(self, key: int, host: nn.Module, arguments: tuple[Any, ...]) -> Optional[Span]:
        """Begins a call of the host; returns what ``leave`` must be given."""
        outer = self.spans.pop(key, None)
        span = self.span(host, arguments)
        if span is not None:
            self.spans[key] = span
        return outer

    def leave(self, key: int, outer: Optional[Span]) -> None:
        self.spans.pop(key, None)
        if outer is not None:
            self.spans[key] = outer

    def run(self, x: Tensor, span: Span) -> Tensor:
        """What the members of the span do to x [N, C_in, H, W], or [C_in, H, W] as nn.Conv2d takes it."""
        if x.dim() == 3:
            return self.run(x[None], span)[0]
        dw: Any = self.members[self.dw]
        pw: Any = self.members[self.pw]
        prologue = None
        if span[0] < self.dw and self.prologue is not None:
            prologue = ChannelAffine(None, None, *self.prologue)
        return separable_conv2d(
            x, dw.weight, pw.weight, pw.bias, stride=dw.stride, padding=dw.padding, dilation=dw.dilation,
            prologue=prologue, middle=self.middle.affine(dw.bias), epilogue=self.after[span[1] - 1 - self.pw].affine(),
        )  # fmt: skip

    def forget(self) -> None:
        """Drops kept vectors."""
        for stage in (self.middle, *self.after):
            if stage.norm is not None:
                stage.norm.forget()

    def install(self) -> None:
        for position, member in enumerate(self.members):
            kind = {self.dw: "depthwise", self.pw: "pointwise"}.get(position, "member")
            member.__class__ = derived(type(member), kind)
            vars(member).update(_xsep_chain=self, _xsep_position=position)
        if not is_derived(self.host):
            self.host.__class__ = derived(type(self.host), "host")
        vars(self.host).setdefault("_xsep_chains", []).append(self)

    def remove(self) -> None:
        """Gives every member, and the host when this was its last chain, the class it had.

        Raises:
            RuntimeError: a class was changed once more since; nothing is undone then.
        """
        for module in (*self.members, self.host):
            if not is_derived(module):
                raise RuntimeError(
                    f"a {type(module).__name__} of a swapped convolution got another class after the swap "
                    "(a parametrization?): undo that first, then call unswap"
                )
        for member in self.members:
            restore(member)
        chains = vars(self.host)["_xsep_chains"]
        chains.remove(self)
        if not chains:
            restore(self.host)


def hooked(modules: Iterable[nn.Module]) -> Optional[nn.Module]:
    """The first module with a hook."""
    for m in modules:
        if has_hooks(m):
            return m
    return None


def is_derived(module: nn.Module) -> bool:
    """Whether the module's class is one that a swap gave it."""
    return "_xsep_base" in vars(type(module))


def restore(module: nn.Module) -> None:
    """The class a swapped module had before."""
    module.__class__ = vars(type(module))["_xsep_base"]
    for name in ("_xsep_chain", "_xsep_position", "_xsep_chains"):
        vars(module).pop(name, None)


def _key() -> int:
    """The thread, for an eager call; compiled code is traced by one."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _rebuild(base: type, kind: str) -> nn.Module:
    cls = derived(base, kind)
    return cls.__new__(cls)


_DERIVED: dict[tuple[type, str], type[nn.Module]] = {}


def derived(base: type, kind: str) -> type[nn.Module]:
    """The subclass of ``base`` for a host, a depthwise or pointwise convolution, or another member."""
    if (base, kind) not in _DERIVED:
        body = {"host": _host_body, "depthwise": _depthwise_body, "pointwise": _pointwise_body, "member": _member_body}
        namespace = {
            "_xsep_base": base, "_xsep_chain": None, "_xsep_chains": (), "_xsep_position": 0,
            "__module__": base.__module__, "__doc__": base.__doc__,
            "__reduce_ex__": lambda self, protocol: _reduce(self, base, kind, protocol), **body[kind](base),
        }  # fmt: skip
        _DERIVED[base, kind] = type(f"Fused{base.__name__}", (base,), namespace)
    return _DERIVED[base, kind]


def _reduce(module: nn.Module, base: Any, kind: str, protocol: int) -> tuple[Any, ...]:
    """A derived class has no name to import it by: the copy is made from the base's, which has."""
    made: Any = base.__reduce_ex__(module, max(protocol, 2))
    return (_rebuild, (base, kind), *made[2:])


def _host_body(base: Any) -> dict[str, Any]:
    @functools.wraps(base.forward)  # exporters and tracers ask for the names of its arguments
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs:
            return base.forward(self, *args, **kwargs)
        key = _key()
        chains = self._xsep_chains
        outer = [chain.enter(key, self, args) for chain in chains]
        try:
            return base.forward(self, *args)
        finally:
            for chain, span in zip(chains, outer):
                chain.leave(key, span)

    return {"forward": forward}


def _member_body(base: Any) -> dict[str, Any]:
    def forward(self: Any, input: Tensor) -> Tensor:
        if self._xsep_chain is not None:
            span = self._xsep_chain.spans.get(_key())
            if span is not None and span[0] <= self._xsep_position < span[1]:
                return input
        return base.forward(self, input)

    def train(self: Any, mode: bool = True) -> Any:
        if self._xsep_chain is not None:
            self._xsep_chain.forget()
        return base.train(self, mode)

    return {"forward": forward, "train": train}


def _depthwise_body(base: Any) -> dict[str, Any]:
    def forward(self: Any, input: Tensor) -> Tensor:
        if self._xsep_chain is not None:
            span = self._xsep_chain.spans.get(_key())
            if span is not None and span[0] <= self._xsep_position < span[1]:
                return input
            if span is not None and input.dim() == 4:
                return depthwise_conv2d(
                    input, self.weight, self.bias, stride=self.stride, padding=self.padding, dilation=self.dilation
                )
        return base.forward(self, input)

    return {"forward": forward}


def _pointwise_body(base: Any) -> dict[str, Any]:
    def forward(self: Any, input: Tensor) -> Tensor:
        if self._xsep_chain is not None:
            span = self._xsep_chain.spans.get(_key())
            if span is not None and span[0] <= self._xsep_position < span[1]:
                return self._xsep_chain.run(input, span)
        return base.forward(self, input)

    return {"forward": forward}
