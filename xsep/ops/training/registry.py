"""How the chain's ops are registered and called, and the tensors that their fakes make."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Optional, Union

import torch
from torch import Tensor

from ...backends.chain import wide
from ..definitions import LIBRARY
from ..inside import inside_op, skip_autograd, unwatched
from ..layout import conform

Outputs = tuple[Tensor, ...]

#: How an image is read, in the schemas.
LOAD = "Tensor x, Tensor? vec, int activation, float alpha"


#: What calls each op, by its name: straight where no gradient is recorded and nobody can be watching, since the
#: dispatcher takes longer than the op does.
OPS: Any = SimpleNamespace()


def define(name: str, schema: str, outputs: int, run: Callable[..., Outputs], fake: Callable[..., Outputs]) -> None:
    def call(*arguments: Any) -> Any:
        with inside_op():
            found = run(*arguments)
        return found if outputs > 1 else found[0]

    def fake_call(*arguments: Any) -> Any:
        found = fake(*arguments)
        return found if outputs > 1 else found[0]

    results = ", ".join(["Tensor"] * outputs)
    result = f"({results})" if outputs > 1 else results
    LIBRARY.define(f"{name}({schema}, str backend) -> {result}", tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, call, "CompositeExplicitAutograd")
    torch.library.register_fake(f"xsep::{name}", fake_call, lib=LIBRARY)
    registered = getattr(torch.ops.xsep, name).default

    def op(*arguments: Any) -> Any:
        # A compiler cannot trace the other questions.
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or not unwatched(arguments):
            return registered(*arguments)
        with skip_autograd():
            return call(*arguments)

    setattr(OPS, name, op)


def images(like: Tensor, n: int, c: int, h: int, w: int, dtype: Optional[torch.dtype] = None) -> Tensor:
    return torch.empty(
        (n, c, h, w), dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last
    )  # fmt: skip


def vectors(like: Tensor, *shape: Union[int, torch.SymInt], dtype: Optional[torch.dtype] = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or wide(like.dtype), device=like.device)


def nothing(like: Tensor) -> Tensor:
    return like.new_empty((0,))


def nhwc(t: Tensor) -> Tensor:
    return conform(t, torch.channels_last)


def own(t: Tensor, *inputs: Optional[Tensor]) -> Tensor:
    """Never an input itself: an op's result must be its own memory."""
    start = t.untyped_storage().data_ptr()
    return t.clone() if any(i is not None and i.untyped_storage().data_ptr() == start for i in inputs) else t


def fake_statistics(r: Tensor, tiles: Union[int, torch.SymInt]) -> Outputs:
    return vectors(r, tiles, 3, r.shape[1]), torch.empty((tiles,), dtype=torch.int32, device=r.device)
