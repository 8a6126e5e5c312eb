"""What Triton's interpreter gets wrong, put right for the tests.

Up to Triton 3.9: a bfloat16 ``dot`` multiplies the bit patterns, a cast to bfloat16 truncates, and scalars are arrays
of one element, which NumPy 2.4 no longer turns into loop bounds. ``test_fixes`` shows that they are still needed; when
it fails, the interpreter has been repaired and the fix can go. Triton 3.9 takes masks of one bit alone, but makes
integers of a comparison of scalars when it is spread over a block. A ``dot`` in TF32 multiplies all of float32, where
a tensor core drops the low 13 bits.

Two more cost time only. ``erf`` is called element by element, which takes most of the time of a test with gelu. And the
language is looked through for what to replace by the interpreter's at every call of a function within a kernel, though
the kernel's launch has done so, which takes half of the time of most others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton.ir import INPUT_PRECISION
from triton.runtime import interpreter

Handle = interpreter.TensorHandle
Builder = interpreter.InterpreterBuilder

original_cast: Callable[..., Any] = Builder.cast_impl
original_dot: Callable[..., Any] = Builder.create_dot
_original_splat: Callable[..., Any] = Builder.create_splat
_original_patch: Callable[..., Any] = interpreter._patch_lang_tensor
_original_patch_lang: Callable[..., Any] = interpreter._patch_lang

#: Names of the modules that the launch under way has patched.
_patched: set[str] = set()


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns (uint16) -> float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 bit patterns, rounded to nearest even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def truncate(values: np.ndarray) -> np.ndarray:
    """float32 as a tensor core reads it for a product in TF32."""
    return (np.ascontiguousarray(values).view(np.uint32) & 0xFFFFE000).view(np.float32)


def cast_impl(self: Any, source: Any, target: Any) -> Any:
    old, new = source.dtype.scalar, target.scalar
    if old == tl.bfloat16 and new != tl.bfloat16:
        wide = Handle(widen(source.data), tl.float32)
        return wide if new == tl.float32 else original_cast(self, wide, target)
    if new == tl.bfloat16 and old != tl.bfloat16:
        return Handle(narrow(source.data.astype(np.float32)), tl.bfloat16)
    return original_cast(self, source, target)


def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
    if tl.bfloat16 in (a.dtype.scalar, b.dtype.scalar):
        left, right = (widen(t.data) if t.dtype.scalar == tl.bfloat16 else t.data for t in (a, b))
        return Handle(np.matmul(left, right, dtype=np.float32) + d.data, d.dtype.scalar)
    if a.dtype.scalar == tl.float32 and rest[0] == INPUT_PRECISION.TF32:
        a, b = (Handle(truncate(t.data), tl.float32) for t in (a, b))
    return original_dot(self, a, b, d, *rest)


def create_splat(self: Any, kind: Any, arg: Any) -> Any:
    made = _original_splat(self, kind, arg)
    return Handle(made.data.astype(arg.data.dtype), made.dtype)


def create_erf(self: Any, arg: Any) -> Any:
    return Handle(torch.erf(torch.from_numpy(np.ascontiguousarray(arg.data))).numpy(), arg.dtype.scalar)


def _patch_lang_tensor(tensor: Any, scope: Any) -> None:
    _original_patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


class PatchScope(interpreter._LangPatchScope):
    def restore(self) -> None:
        super().restore()
        _patched.clear()


def _patch_lang(function: Any) -> Any:
    """Patches the language's modules that a function sees, each once a launch."""
    modules = {m.__name__ for m in function.__globals__.values() if m is tl or m is tl.core}
    if modules <= _patched:
        return PatchScope()
    _patched.update(modules)
    return _original_patch_lang(function)


def install() -> None:
    Builder.cast_impl = cast_impl
    Builder.create_dot = create_dot
    Builder.create_splat = create_splat
    Builder.create_erf = create_erf
    interpreter._patch_lang_tensor = _patch_lang_tensor
    interpreter._patch_lang = _patch_lang
    interpreter._LangPatchScope = PatchScope
