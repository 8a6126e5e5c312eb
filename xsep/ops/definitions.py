"""Schemas, kernels and fakes of the two ops and of their backwards.

Inside an op the batch size is known at last, so the backend is chosen here, not in traced Python.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional, Union

import torch
from torch import Tensor

from ..backends.aten import ATEN
from ..backends.base import Backend, Gradients
from ..dispatch import choice, select
from ..problem import (
    DEPTHWISE_TENSORS,
    SEPARABLE_TENSORS,
    DepthwiseArgs,
    Problem,
    SeparableArgs,
    depthwise_problem,
    separable_problem,
)
from .inside import inside_op
from .layout import conform, conform_gradients, fake_forward, fake_gradients

Args = Union[SeparableArgs, DepthwiseArgs]

_SEPARABLE = (
    "Tensor x, Tensor w_dw, Tensor w_pw, Tensor? bias, Tensor? residual, Tensor? scale_p, Tensor? shift_p, "
    "Tensor? scale_m, Tensor? shift_m, Tensor? scale_e, Tensor? shift_e, "
    "SymInt[] geometry, int[] activations, float[] alphas, str backend"
)
_DEPTHWISE = (
    "Tensor x, Tensor w_dw, Tensor? bias, Tensor? scale_p, Tensor? shift_p, Tensor? scale_e, Tensor? shift_e, "
    "SymInt[] geometry, int[] activations, float[] alphas, str backend"
)

LIBRARY = torch.library.Library("xsep", "DEF")


@dataclass(frozen=True)  # no NamedTuple: PyTorch 2.10 cannot compile a call of what one of its properties returns
class ConvOp:
    """One differentiable convolution op and what the autograd code needs to know of it."""

    name: str
    args: Callable[..., Any]  # the argument tuple of the problem
    tensors: int  # leading tensor arguments, so gradients
    weights: tuple[int, ...]  # which of them are filters
    residual: Optional[int]  # which of them is added to y, and so has dy itself as gradient where nothing follows
    batched: tuple[int, ...]  # which of them have a batch dimension
    problem: Callable[[Any], Problem]
    run: Callable[[Backend, Any], Tensor]
    run_backward: Callable[[Backend, Tensor, Any, Optional[Tensor], list[bool]], Gradients]

    def forward(self, args: Args, backend: str, problem: Problem) -> Tensor:
        """The op itself."""
        with inside_op():
            y = self.run(select(problem, backend), args)
        return conform(y, problem.memory_format)

    def left_to_pytorch(self, args: Args, backend: str, problem: Problem) -> Optional[Tensor]:
        """y in PyTorch's own differentiable operations, if a training step is known to be faster that way, else None.
        They keep what they want to: of so few channels, making it again costs more than keeping it."""
        if not choice(problem, backend, "backward").left:
            return None
        select(problem, backend)  # for who is recording
        with inside_op():
            return conform(self.run(ATEN, args), problem.memory_format)

    def backward(
        self, dy: Tensor, y: Optional[Tensor], args: Args, backend: str, problem: Problem, wanted: list[bool]
    ) -> list[Optional[Tensor]]:
        """The backward op itself, but None where the op gives an empty tensor."""
        tensors: tuple[Any, ...] = args[: self.tensors]
        with inside_op():
            gradients = self.run_backward(select(problem, backend, "backward"), dy, args, y, wanted)
        return conform_gradients(gradients, tensors, self.weights, wanted, problem.memory_format, dy)

    @property
    def forward_op(self) -> Any:
        return getattr(torch.ops.xsep, self.name).default

    @property
    def backward_op(self) -> Any:
        return getattr(torch.ops.xsep, self.name + "_backward").default

    def plain_backward(self, dy: Tensor, args: Args, y: Optional[Tensor], wanted: list[bool]) -> Gradients:
        """The backward in differentiable PyTorch operations: what the double backward differentiates."""
        gradients = self.run_backward(ATEN, dy, args, y, wanted)
        tensors: tuple[Any, ...] = args[: self.tensors]
        return tuple(g if g is None or t is None else g.to(t.dtype) for g, t in zip(gradients, tensors))


SEPARABLE = ConvOp(
    "separable_conv2d", SeparableArgs, SEPARABLE_TENSORS, (1, 2), 4, (0, 4), separable_problem,
    lambda backend, a: backend.separable_forward(a),
    lambda backend, dy, a, y, wanted: backend.separable_backward(dy, a, y, wanted),
)  # fmt: skip
DEPTHWISE = ConvOp(
    "depthwise_conv2d", DepthwiseArgs, DEPTHWISE_TENSORS, (1,), None, (0,), depthwise_problem,
    lambda backend, a: backend.depthwise_forward(a),
    lambda backend, dy, a, y, wanted: backend.depthwise_backward(dy, a, y, wanted),
)  # fmt: skip


def _define(op: ConvOp, schema: str) -> None:
    tags = (torch.Tag.pt2_compliant_tag,)
    gradients = ", ".join(["Tensor"] * op.tensors)
    LIBRARY.define(f"{op.name}({schema}) -> Tensor", tags=tags)
    LIBRARY.define(f"{op.name}_backward(Tensor dy, Tensor? y, {schema}, bool[] wanted) -> ({gradients})", tags=tags)

    def forward(*flat: Any) -> Tensor:
        args = op.args(*flat[:-1])
        return op.forward(args, flat[-1], op.problem(args))

    def backward(dy: Tensor, y: Optional[Tensor], *flat: Any) -> tuple[Tensor, ...]:
        args = op.args(*flat[:-2])
        gradients = op.backward(dy, y, args, flat[-2], op.problem(args), flat[-1])
        return tuple(dy.new_empty((0,)) if g is None else g for g in gradients)

    def forward_fake(*flat: Any) -> Tensor:
        return fake_forward(flat[0], [flat[i] for i in op.weights], op.args(*flat[:-1]).geometry)

    def backward_fake(dy: Tensor, y: Optional[Tensor], *flat: Any) -> tuple[Tensor, ...]:
        return fake_gradients(flat[: op.tensors], [flat[i] for i in op.weights], flat[-1])

    LIBRARY.impl(op.name, forward, "CompositeExplicitAutograd")
    LIBRARY.impl(op.name + "_backward", backward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"xsep::{op.name}", forward_fake, lib=LIBRARY)
    torch.library.register_fake(f"xsep::{op.name}_backward", backward_fake, lib=LIBRARY)


_define(SEPARABLE, _SEPARABLE)
_define(DEPTHWISE, _DEPTHWISE)
