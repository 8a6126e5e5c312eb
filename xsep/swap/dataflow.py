"""What a module's forward does with the values of its children, seen by running it on symbols."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple, Optional, Union

from torch import fx, nn

from ..modules import FusedSeparableConv2d


class Trace(NamedTuple):
    """One forward, in one mode."""

    root: nn.Module
    arity: int  # how many arguments the forward was given
    calls: dict[nn.Module, list[fx.Node]]  # of modules that stand as one node
    inside: dict[nn.Module, nn.Module]  # module -> the module around it that stands as one node

    def module(self, node: fx.Node) -> nn.Module:
        """The module that a call_module node calls."""
        return self.root.get_submodule(str(node.target))


class Dataflow:
    """Traces of modules in training and in eval mode, each made once.

    A module is opened, so that the calls inside it are seen, where it holds a Conv2d; one that cannot be traced then
    stands as one node, like every other module.
    """

    def __init__(self) -> None:
        self.closed: dict[nn.Module, str] = {}  # modules that could not be opened, and why
        self._traces: dict[nn.Module, Union[str, tuple[Trace, Trace]]] = {}

    def of(self, host: nn.Module) -> Union[str, tuple[Trace, Trace]]:
        """The traces of a module's forward in eval and in training mode, or why there are none."""
        if host not in self._traces:
            self._traces[host] = self._trace(host)
        return self._traces[host]

    def _trace(self, host: nn.Module) -> Union[str, tuple[Trace, Trace]]:
        if host in self.closed:
            return self.closed[host]
        names = _required_arguments(host)
        if isinstance(names, str):
            return names
        modes = [(m, m.training) for m in host.modules()]
        try:
            traces = []
            for mode in (False, True):
                for module, _ in modes:
                    module.training = mode
                traces.append(self._trace_once(host, names))
        except Exception as error:  # a forward may fail on a symbol in any way
            self.closed[host] = _first_line(error)
            return self.closed[host]
        finally:
            for module, mode in modes:
                module.training = mode
        return traces[0], traces[1]

    def _trace_once(self, host: nn.Module, names: list[str]) -> Trace:
        while True:
            known = len(self.closed)
            tracer = _Tracer(names, self.closed)
            graph = tracer.trace(host)
            if len(self.closed) == known:
                break
            # The attempt to open a module has left nodes behind: once more, with that module closed.
        calls: dict[nn.Module, list[fx.Node]] = {}
        inside: dict[nn.Module, nn.Module] = {}
        for node in graph.nodes:
            if node.op == "call_module":
                module = host.get_submodule(str(node.target))
                calls.setdefault(module, []).append(node)
                inside.update((part, module) for part in module.modules() if part is not module)
        return Trace(host, len(names), calls, inside)


class _Tracer(fx.Tracer):
    def __init__(self, arguments: list[str], closed: dict[nn.Module, str]) -> None:
        super().__init__()
        self.arguments = arguments
        self.closed = closed

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self.closed or not _can_open(m)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Symbols for the arguments that have no default; the others keep theirs, so ``is None`` means what it says."""
        symbols = [self.create_proxy("placeholder", name, (), {}) for name in self.arguments]
        return root_fn, [self.root, *symbols]

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.is_leaf_module(m, ""):
            try:
                # Not through m(...), which would run the user's hooks on symbols.
                return m.forward(*args, **kwargs)
            except Exception as error:  # as above
                self.closed[m] = _first_line(error)
        return super().call_module(m, forward, args, kwargs)


def why_closed(closed: dict[nn.Module, str], module: nn.Module) -> str:
    """Why a module with convolutions in it stands as one node."""
    return closed.get(module, "its forward was replaced on the instance")


def _can_open(module: nn.Module) -> bool:
    if isinstance(module, (nn.Conv2d, FusedSeparableConv2d)) or "forward" in vars(module):
        return False
    return any(isinstance(part, nn.Conv2d) for part in module.modules())


def _required_arguments(host: nn.Module) -> Union[str, list[str]]:
    """The names of the forward's arguments that have no default, or why it is not traced."""
    if "forward" in vars(host):
        return "its forward was replaced on the instance"
    names = []
    for parameter in list(inspect.signature(type(host).forward).parameters.values())[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            return f"its forward takes *{parameter.name}"
        if parameter.default is parameter.empty:
            if parameter.kind is parameter.KEYWORD_ONLY:
                return f"its forward requires the keyword {parameter.name}"
            names.append(parameter.name)
    return names


def has_forward(module: nn.Module) -> bool:
    """Not an nn.ModuleList or another mere container."""
    return "forward" in vars(module) or type(module).forward is not nn.Module.forward


def _first_line(error: Exception) -> str:
    text: Optional[str] = next(iter(str(error).splitlines()), None)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
