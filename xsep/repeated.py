"""A call of either op that was checked once is made again by C++, checks, dispatch and autograd included.

Python's part of a call takes 30 us where caches are warm, which they are not behind a matrix product: forward and
backward of 728 channels on 19x19 pixels took 6.8 ms through Python and 5.8 ms this way (two pictures in bfloat16, two
threads of an AMD EPYC). And a GPU waits for whoever asks it late. So ``csrc/eager/repeated.cpp`` keeps what the checks
of a call came to, and who comes back with the same shapes and options passes by all that. Python takes every call that
is out of the ordinary, and all of them where the module was not built.
"""

from __future__ import annotations

from typing import Any, Optional, Union

import torch
from torch import Tensor

from . import dispatch, extension
from .arguments import ChannelAffine
from .backends.aten import ATEN, is_bare
from .backends.packed_weights import find
from .problem import IDENTITY, DepthwiseArgs, Problem, SeparableArgs


def _first_of_all(*call: Any) -> Any:
    """Stands in for the C++ function until a tensor is seen of a device that it knows."""
    global again
    if not isinstance(call[0], Tensor) or call[0].device.type not in ("cpu", "cuda"):
        return None
    module = extension.repeated()
    if module is None:
        again = _never
    else:
        module.prepare(ChannelAffine, find)
        again = module.again
    return again(*call)


def _never(*call: Any) -> Any:
    return None


#: y, given ``separable_conv2d``'s arguments in its order, or ``depthwise_conv2d``'s in its own; None where the call is
#: not for C++; NotImplemented where it is to be checked and then given to :func:`first`.
again = _first_of_all


def first(
    call: tuple[Any, ...], args: Union[SeparableArgs, DepthwiseArgs], problem: Problem, name: str
) -> Optional[Tensor]:
    """Remembers a call that :data:`again` does not know yet, and makes it.

    Args:
        call: the arguments of :data:`again`.
        args: the same, checked.
        problem: theirs.
        name: the backend asked for.

    Returns:
        y, or None where Python has to make the call.

    Raises:
        RuntimeError: as :func:`xsep.dispatch.select`.
    """
    module = extension.repeated()
    assert module is not None  # who else said that it does not know the call
    forward, left = dispatch.select(problem, name), dispatch.choice(problem, name).left
    training_step = dispatch.choice(problem, name, "backward")
    backward = training_step.backend
    makers = {"cpu": module.Maker.CPU, "cuda": module.Maker.CUDA}
    maker = training = module.Maker.PYTHON
    # The settings by which a GPU multiplies float32 may change from call to call.
    settled = problem.device == "cpu" or problem.dtype != torch.float32
    if forward is ATEN and is_bare(args):
        maker = module.Maker.CONVOLUTIONS
    elif settled and forward.is_one_call(args):
        maker = makers[forward.name]
    if settled and (forward is backward or left) and backward.is_one_call(args) and backward.is_one_backward(args):
        training = makers[backward.name]
    elif backward is ATEN and is_bare(args) and _may_keep(args, training_step.left):
        training = module.Maker.CONVOLUTIONS  # and PyTorch's own gradients
    activations, alphas = args.activations, args.alphas
    if isinstance(args, DepthwiseArgs):  # nothing stands in the middle
        activations, alphas = [activations[0], IDENTITY, activations[1]], [alphas[0], 0.0, alphas[1]]
    module.remember(call, args.geometry, activations, alphas, problem.channels_last, maker, training)
    y: Optional[Tensor] = again(*call)
    return y


def _may_keep(args: Union[SeparableArgs, DepthwiseArgs], left: bool) -> bool:
    """Whether PyTorch may keep for its own gradients what it wants to."""
    if isinstance(args, DepthwiseArgs):  # the same as the op
        return args.x.dtype != torch.bfloat16  # of which ATEN mends the weights' gradient
    return left  # z as well, which nobody asked it for: making so few channels again costs more than keeping them
