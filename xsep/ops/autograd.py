"""Gradients of the ops, three ways in: compiled or traced code calls the op with its registered autograd; plain eager
a ctx-style Function around it (25 us a call against 150); functorch transforms a setup_context Function, which is the
only form they accept. The backward is an op too, and its own backward is plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..activations import output_determines_gradient
from ..problem import IDENTITY, Problem
from .definitions import DEPTHWISE, LIBRARY, SEPARABLE, Args, ConvOp
from .inside import skip_autograd, unwatched


def y_is_needed(activations: Sequence[int], alphas: Sequence[float]) -> bool:
    """Whether the backward takes the epilogue's gradient from y."""
    code = activations[-1]
    return code != IDENTITY and output_determines_gradient(code, alphas[-1])


class Differentiable:
    """One op with its autograd registered, and the call that picks the cheapest way in."""

    def __init__(self, op: ConvOp) -> None:
        self.op = op
        self.eager = _eager_function(self)
        self.backward_function = _functorch_backward(op)
        self.function = _functorch_function(self)
        torch.library.register_autograd(
            f"xsep::{op.name}", self.backward, setup_context=self.setup_context, lib=LIBRARY
        )
        torch.library.register_autograd(
            f"xsep::{op.name}_backward",
            lambda ctx, *grads: _double_backward(op, ctx, grads),
            setup_context=lambda ctx, inputs, output: _save_backward(op, ctx, inputs),
            lib=LIBRARY,
        )

    def __call__(self, args: Args, backend: str, problem: Problem) -> Tensor:
        """y of args, whose problem it is."""
        if forward_ad._current_level >= 0:
            _refuse_tangents(self.op, args)
        if torch._C._are_functorch_transforms_active():
            return self.function.apply(*args, backend)
        if torch.is_grad_enabled():
            tensors: tuple[Any, ...] = args[: self.op.tensors]
            for t in tensors:
                if t is not None and t.requires_grad:
                    left = self.op.left_to_pytorch(args, backend, problem) if unwatched(tensors) else None
                    return self.eager.apply(*args, backend, problem) if left is None else left
        return self.below_autograd(args, backend, problem)

    def traced(self, args: Args, backend: str) -> Tensor:
        """y where the call is being traced: the op itself is what goes into the graph."""
        return self.op.forward_op(*args, backend)

    def below_autograd(self, args: Args, backend: str, problem: Problem) -> Tensor:
        """y without a gradient: straight to the kernel where nobody can be watching the op, which saves 80 us."""
        if unwatched(args[: self.op.tensors]):
            with skip_autograd():
                return self.op.forward(args, backend, problem)
        with torch._C._AutoDispatchBelowAutograd():
            return self.op.forward_op(*args, backend)

    def eager_backward(self, dy: Tensor, y: Optional[Tensor], *inputs: Any) -> Sequence[Optional[Tensor]]:
        """The backward op on its schema's arguments and their problem: as directly, where none differentiates it."""
        *flat, backend, problem, wanted = inputs
        if torch.is_grad_enabled() or not unwatched((dy, y, *flat[: self.op.tensors])):
            return self.op.backward_op(dy, y, *flat, backend, wanted)
        with skip_autograd():
            return self.op.backward(dy, y, self.op.args(*flat), backend, problem, wanted)

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        op = self.op
        _, activations, alphas, *_ = inputs[op.tensors :]
        tensors: list[Optional[Tensor]] = list(inputs[: op.tensors])
        keep_y = y_is_needed(activations, alphas)
        if op.residual is not None and (keep_y or activations[-1] == IDENTITY):
            # Only a recomputed pre-activation looks at the residual again.
            tensors[op.residual] = None
        ctx.present = [t is not None for t in inputs[: op.tensors]]
        ctx.rest = inputs[op.tensors :]
        ctx.save_for_backward(*tensors, output if keep_y else None)

    def backward(self, ctx: Any, dy: Tensor) -> tuple[Optional[Tensor], ...]:
        return self._gradients(ctx, dy, self.op.backward_op)

    def backward_of_eager(self, ctx: Any, dy: Tensor) -> tuple[Optional[Tensor], ...]:
        return self._gradients(ctx, dy, self.eager_backward)

    def functorch_backward(self, ctx: Any, dy: Tensor) -> tuple[Optional[Tensor], ...]:
        return self._gradients(ctx, dy, self.backward_function.apply)

    def _gradients(self, ctx: Any, dy: Tensor, backward: Any) -> tuple[Optional[Tensor], ...]:
        op = self.op
        *tensors, y = ctx.saved_tensors
        wanted = [bool(p and n) for p, n in zip(ctx.present, ctx.needs_input_grad)]
        activations = ctx.rest[1]
        direct = op.residual is not None and wanted[op.residual] and activations[-1] == IDENTITY
        if op.residual is not None and wanted[op.residual]:
            if direct:
                wanted[op.residual] = False
            elif tensors[op.residual] is None:
                # The gradient has dy's shape and type; the values of the residual are not looked at.
                tensors[op.residual] = dy
        gradients: list[Optional[Tensor]] = [None] * op.tensors
        if any(wanted):
            results = backward(dy, y, *tensors, *ctx.rest, wanted)
            gradients = [g if want else None for g, want in zip(results, wanted)]
        if direct and op.residual is not None:
            gradients[op.residual] = dy
        return (*gradients, *[None] * len(ctx.rest))


def _refuse_tangents(op: ConvOp, args: Args) -> None:
    """Forward mode would be dropped in silence where nothing requires a gradient."""
    tensors: tuple[Any, ...] = args[: op.tensors]
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise _no_forward_mode(op)


def _no_forward_mode(op: ConvOp) -> NotImplementedError:
    return NotImplementedError(f"{op.name} has no forward-mode derivative; use reverse mode")


def _eager_function(d: Differentiable) -> Any:
    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Tensor:
            *flat, backend, problem = inputs
            args = d.op.args(*flat)
            y = d.below_autograd(args, backend, problem)
            d.setup_context(ctx, inputs, y)
            return y

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return d.backward_of_eager(ctx, grads[0])

    return Eager


def _functorch_function(d: Differentiable) -> Any:
    class Functorch(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs: Any) -> Tensor:
            return d.op.forward_op(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            d.setup_context(ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return d.functorch_backward(ctx, grads[0])

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            raise _no_forward_mode(d.op)

    return Functorch


def _functorch_backward(op: ConvOp) -> Any:
    class FunctorchBackward(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs: Any) -> Any:
            return op.backward_op(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            _save_backward(op, ctx, inputs)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return _double_backward(op, ctx, grads)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            raise _no_forward_mode(op)

    return FunctorchBackward


def _save_backward(op: ConvOp, ctx: Any, inputs: tuple[Any, ...]) -> None:
    """inputs: dy, y, the forward's arguments, backend, wanted."""
    ctx.save_for_backward(*inputs[: 2 + op.tensors])
    ctx.rest = inputs[2 + op.tensors :]


def _double_backward(op: ConvOp, ctx: Any, grads: tuple[Tensor, ...]) -> tuple[Optional[Tensor], ...]:
    """Gradient of the backward op for dy, y and the forward's tensors, by differentiating the plain composition."""
    saved = ctx.saved_tensors
    geometry, activations, alphas, _, wanted = ctx.rest
    present = [i for i, t in enumerate(saved) if t is not None]
    outputs = [i for i, want in enumerate(wanted) if want]

    def plain(*tensors: Tensor) -> tuple[Tensor, ...]:
        full: list[Any] = [None] * len(saved)
        for i, t in zip(present, tensors):
            full[i] = t
        dy, y, *rest = full
        gradients = op.plain_backward(dy, op.args(*rest, geometry, activations, alphas), y, wanted)
        return tuple(g for i in outputs if (g := gradients[i]) is not None)

    vjp: Any = torch.func.vjp(plain, *[saved[i] for i in present])[1]
    results = vjp(tuple(grads[i] for i in outputs))
    full_results: list[Optional[Tensor]] = [None] * len(saved)
    for i, g in zip(present, results):
        full_results[i] = g
    return (*full_results, *[None] * len(ctx.rest))


def _register_vmap(op: ConvOp) -> None:
    def forward_rule(info: Any, in_dims: Any, *inputs: Any) -> tuple[Tensor, int]:
        tensors, dims = list(inputs[: op.tensors]), in_dims[: op.tensors]
        foldable = all(t is None or (d is not None) == (i in op.batched) for i, (t, d) in enumerate(zip(tensors, dims)))
        if not foldable:
            return _loop(op.forward_op, info.batch_size, in_dims, inputs), 0
        batches = tensors[0].movedim(dims[0], 0).shape[:2]
        for i in op.batched:
            if tensors[i] is not None:
                tensors[i] = tensors[i].movedim(dims[i], 0).flatten(0, 1)
        return op.forward_op(*tensors, *inputs[op.tensors :]).unflatten(0, batches), 0

    def backward_rule(info: Any, in_dims: Any, *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        # Weight gradients sum over the batch, so a batch of backwards is a loop, not one larger batch.
        return _loop(op.backward_op, info.batch_size, in_dims, inputs), (0,) * op.tensors

    torch.library.register_vmap(f"xsep::{op.name}", forward_rule, lib=LIBRARY)
    torch.library.register_vmap(f"xsep::{op.name}_backward", backward_rule, lib=LIBRARY)


def _loop(f: Any, size: int, in_dims: Any, inputs: tuple[Any, ...]) -> Any:
    results = []
    for i in range(size):
        one = [v.select(d, i) if isinstance(v, Tensor) and d is not None else v for v, d in zip(inputs, in_dims)]
        results.append(f(*one))
    if isinstance(results[0], Tensor):
        return torch.stack(results)
    return tuple(torch.stack(column) for column in zip(*results))


_register_vmap(SEPARABLE)
_register_vmap(DEPTHWISE)
separable = Differentiable(SEPARABLE)
depthwise = Differentiable(DEPTHWISE)
