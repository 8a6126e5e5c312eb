"""What a norm module does, said as the vectors that the op takes."""

from __future__ import annotations

from typing import Any, Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

Norm = Union[nn.BatchNorm2d, nn.SyncBatchNorm]

#: The forwards of modules whose eval mode is F.batch_norm with running statistics and nothing else.
_NORM_FORWARDS = (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward)


def modules_of_norm(norm: Norm) -> Union[tuple[nn.Module, ...], str]:
    """What a batch norm module applies after normalising, in eval mode: modules; or why it cannot be folded."""
    if norm.running_mean is None or norm.running_var is None:
        return "has no running statistics"
    if "forward" not in vars(norm):
        if type(norm).forward in _NORM_FORWARDS:
            return ()
        applied = _traced_norm(norm)
        if applied is not None:
            return tuple(m for m in applied if type(m) is not nn.Identity)
    return "has a forward of its own, which is not seen to be batch norm and then modules"


def _traced_norm(norm: Norm) -> Optional[tuple[nn.Module, ...]]:
    """The modules that a subclass with a forward of its own applies after normalising, where that is all it adds.

    Found by tracing that forward in eval mode: one ``F.batch_norm`` of the input with the module's own
    statistics, weights and eps, then only modules. None where the forward is anything else.
    """
    modes = [(m, m.training) for m in norm.modules()]
    norm.eval()
    try:
        graph = fx.Tracer().trace(norm)
    except Exception:  # any forward may fail on a symbolic input in its own way
        return None
    finally:
        for module, training in modes:
            module.training = training
    calls = [n for n in graph.nodes if n.op == "call_function" and n.target is F.batch_norm]
    if len(calls) != 1 or not _normalises_with_own_statistics(norm, calls[0]):
        return None
    if any(n.op == "call_method" and str(n.target).endswith("_") for n in graph.nodes):
        return None
    node = calls[0]
    applied: list[nn.Module] = []
    while len(node.users) == 1:
        node = next(iter(node.users))
        if node.op == "output":
            return tuple(applied)
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            return None
        applied.append(norm.get_submodule(str(node.target)))
    return None


def _normalises_with_own_statistics(norm: Norm, call: fx.Node) -> bool:
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    given = {**dict(zip(names, call.args)), **call.kwargs}
    x = given.get("input")
    if not isinstance(x, fx.Node) or x.op != "placeholder":
        return False
    for name in ("running_mean", "running_var", "weight", "bias"):
        v = given.get(name)
        own = isinstance(v, fx.Node) and v.op == "get_attr" and v.target == name
        if not own and not (v is None and getattr(norm, name) is None):
            return False
    return given.get("training", False) is False and bool(given.get("eps", 1e-5) == norm.eps)


class FoldedNorm:
    """Scale and shift that do what ``norm(v + bias)`` does to v, with the norm's running statistics.

    Float32 at least, and differentiable in the norm's weight and bias and in ``conv``'s bias. Where no gradient is
    wanted the two vectors are kept until one of the tensors they come from changes. A change that PyTorch's version
    counters do not see (through ``.data``, in place) is noticed at the next ``train()`` or ``eval()``.

    Args:
        norm: a batch norm with running statistics.
        conv: the convolution before it, where its bias is to be folded too.
    """

    def __init__(self, norm: Norm, conv: Optional[nn.Conv2d] = None) -> None:
        self.norm = norm
        self.conv = conv
        self.kept: Optional[tuple[list[Any], tuple[Tensor, Tensor]]] = None

    def __getstate__(self) -> dict[str, Any]:
        return {"norm": self.norm, "conv": self.conv, "kept": None}

    def forget(self) -> None:
        self.kept = None

    def vectors(self) -> tuple[Tensor, Tensor]:
        """(scale, shift), each [C]."""
        norm = self.norm
        bias = None if self.conv is None else self.conv.bias
        tensors = (norm.running_mean, norm.running_var, norm.weight, norm.bias, bias)
        if torch.compiler.is_compiling() or not _may_keep(tensors) or _are_captured(tensors):
            return self._compute(*tensors)
        stamp = [(t, t._version, t.data_ptr(), norm.eps) for t in tensors if t is not None]
        if self.kept is not None and _same(self.kept[0], stamp):
            return self.kept[1]
        # Kept vectors may be saved for a later backward, which inference tensors cannot be.
        with torch.inference_mode(False), torch.no_grad():
            vectors = self._compute(*tensors)
        if type(vectors[0]) is Tensor:
            self.kept = (stamp, vectors)
        return vectors

    def _compute(self, mean: Any, var: Any, weight: Any, bias: Any, conv_bias: Any) -> tuple[Tensor, Tensor]:
        scale = (_wide(var) + self.norm.eps).rsqrt()
        if weight is not None:
            scale = scale * weight
        centre = _wide(mean) if conv_bias is None else _wide(mean) - conv_bias
        shift = -centre * scale
        return scale, (shift if bias is None else shift + bias)


def _wide(t: Tensor) -> Tensor:
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def _may_keep(tensors: tuple[Optional[Tensor], ...]) -> bool:
    # What vmap and the like wrap are plain tensors by their type, and have no memory.
    if torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return False
    grad = torch.is_grad_enabled()
    for t in tensors:
        if t is not None and ((grad and t.requires_grad) or t.is_inference() or type(t) not in (Tensor, nn.Parameter)):
            return False
    return True


def _are_captured(tensors: tuple[Optional[Tensor], ...]) -> bool:
    """Whether a CUDA graph is being made: it would go on reading vectors that are no longer kept."""
    return any(t is not None and t.is_cuda for t in tensors) and torch.cuda.is_current_stream_capturing()


def _same(old: list[Any], new: list[Any]) -> bool:
    return len(old) == len(new) and all(a[0] is b[0] and a[1:] == b[1:] for a, b in zip(old, new))
