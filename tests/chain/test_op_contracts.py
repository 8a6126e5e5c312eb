"""opcheck on each of the chain's ops, what they refuse, and who is chosen to run them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd.profiler import profile
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._python_dispatch import TorchDispatchMode

from tests.chain.support import last, same
from tests.chain.test_backward_ops import CASES, Case
from xsep.backends import chain_cuda
from xsep.backends.chain import ChainBackend, Load, RawGradient, Shortcut
from xsep.backends.chain_cuda import CUDA_CHAIN
from xsep.backends.chain_triton import TRITON_CHAIN
from xsep.backends.cuda import DeviceFacts
from xsep.ops.inside import skip_autograd
from xsep.ops.training import bn_finalize, bn_pool_add, calls, forward, registry, selection, sep_backward, sep_fprop
from xsep.problem import RELU, Geometry

OPS: Any = torch.ops.xsep
F32 = torch.float32


def images(*shape: int) -> torch.Tensor:
    return last(*shape, dtype=F32)


def layer_arguments(name: str) -> tuple[Any, ...]:
    case = Case(F32, *CASES[name])
    dr, w_pw, w_dw, x, load, geometry, shortcut, operands, centres = case.arguments().values()
    short, activated = (None, False) if shortcut is None else shortcut
    pads = list(dr.pads) if dr.taps is not None else []
    return (dr.du, dr.taps, dr.r, dr.coef, pads, w_pw, w_dw, x, *load, list(geometry), short, activated, operands,
            centres)  # fmt: skip


def wgrad_arguments() -> tuple[Any, ...]:
    du, taps, r, coef, pads, _, w_dw, x, vec, code, alpha, geometry = layer_arguments("pool-same")[:12]
    return du, taps, r, coef, pads, x, vec, code, alpha, w_dw, geometry


def sep_arguments(residual: bool, statistics: bool) -> tuple[Any, ...]:
    x, t = images(2, 5, 6, 7), images(2, 5, 6, 7)
    return (x, torch.randn(2, 5), RELU, 0.0, t if residual else None, torch.randn(5, 1, 3, 3),
            torch.randn(4, 5, 1, 1), list(same()), statistics)  # fmt: skip


def finalize_arguments(running: bool) -> tuple[Any, ...]:
    c = torch.zeros(4)
    batches = torch.tensor(3) if running else None
    return (*calls.statistics(images(2, 4, 6, 6)), c + 1, None, c if running else None, c + 1 if running else None,
            batches, 0.1, 1e-5)  # fmt: skip


CONTRACTS: dict[str, tuple[str, Callable[[], tuple[Any, ...]]]] = {
    "sep_fprop": ("chain_sep_fprop", lambda: sep_arguments(False, True)),
    "sep_fprop-residual": ("chain_sep_fprop", lambda: sep_arguments(True, False)),
    "pw_fprop": ("chain_pw_fprop", lambda: (images(2, 5, 6, 6), None, RELU, 0.0, torch.randn(3, 5, 1, 1), True)),
    "statistics": ("chain_statistics", lambda: (images(3, 5, 9, 7),)),
    "bn_finalize": ("chain_bn_finalize", lambda: finalize_arguments(False)),
    "bn_finalize-running": ("chain_bn_finalize", lambda: finalize_arguments(True)),
    "bn_backward_finalize": ("chain_bn_backward_finalize", lambda: (
        torch.randn(2, 4), torch.randn(4), torch.rand(4), torch.randn(4), torch.tensor(9.0).double(), True)),
    "sep_wgrad_pw": ("chain_sep_wgrad_pw", wgrad_arguments),
    "sep_dgrad": ("chain_sep_dgrad", lambda: layer_arguments("half-shortcut")),
    "sep_backward": ("chain_sep_backward", lambda: (*layer_arguments("pool-torch"), [True, True, True])),
    "sep_backward-some": ("chain_sep_backward", lambda: (*layer_arguments("entry"), [False, True, False])),
    "pw_backward": ("chain_pw_backward", lambda: (
        images(2, 4, 5, 5), images(2, 4, 5, 5), torch.randn(3, 4), torch.randn(4, 3, 1, 1), images(2, 3, 5, 5), None,
        RELU, 0.0)),
    "bn_pool_add": ("chain_bn_pool_add", lambda: (
        images(2, 4, 6, 5), torch.randn(2, 4), images(2, 4, 3, 3), torch.randn(2, 4), [0, 1])),
    "bn_relu_gap": ("chain_bn_relu_gap", lambda: (images(2, 4, 6, 5), torch.randn(2, 4))),
    "bn_relu_gap_backward": ("chain_bn_relu_gap_backward", lambda: (
        torch.randn(2, 4), images(2, 4, 6, 5), torch.randn(2, 4), torch.randn(4), torch.ones(2, 4), torch.ones(2, 4))),
    "apply": ("chain_apply", lambda: (images(2, 4, 6, 5), None, RELU, 0.0, images(2, 4, 6, 5))),
    "apply-nothing": ("chain_apply", lambda: (images(2, 4, 6, 5), None, 0, 0.0, None)),
    "apply_backward": ("chain_apply_backward", lambda: (
        images(2, 4, 6, 5), images(2, 4, 6, 5), None, 0, 0.0, None, [images(2, 4, 6, 5)], torch.randn(2, 4))),
    "bn_dgrad": ("chain_bn_dgrad", lambda: (images(2, 4, 6, 5), images(2, 4, 6, 5), torch.randn(3, 4))),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["aten", "cpu"])
@pytest.mark.parametrize("name", CONTRACTS)
def test_opcheck(name: str, backend: str) -> None:
    op, arguments = CONTRACTS[name]
    torch.library.opcheck(getattr(OPS, op).default, (*arguments(), backend))


def test_every_op_is_checked() -> None:
    registered = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if "xsep::chain_" in name}
    assert registered == {op for op, _ in CONTRACTS.values()}


def copied(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in arguments)


@pytest.mark.parametrize("backend", ["aten", "cpu"])
@pytest.mark.parametrize("name", CONTRACTS)
def test_past_the_dispatcher_an_op_gives_the_same(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    straight_calls: list[str] = []

    def noted() -> Any:
        straight_calls.append(name)
        return skip_autograd()

    monkeypatch.setattr(registry, "skip_autograd", noted)
    op, make = CONTRACTS[name]
    arguments = make()
    asked, straight = copied(arguments), copied(arguments)
    expected = getattr(OPS, op)(*asked, backend)
    with torch.no_grad(), profile() as seen:
        getattr(registry.OPS, op)(*copied(arguments), backend)
    assert f"xsep::{op}" in {event.name for event in seen.function_events}, "a profiler is shown the op"
    assert not straight_calls
    versions = [a._version for a in straight if isinstance(a, torch.Tensor)]
    with torch.no_grad():
        found = getattr(registry.OPS, op)(*straight, backend)
    assert straight_calls == [name]
    single = isinstance(expected, torch.Tensor)
    for got, want in zip((found,) if single else found, (expected,) if single else expected, strict=True):
        assert torch.equal(got, want) and got.stride() == want.stride() and got.dtype == want.dtype
    changed = [a._version for a in straight if isinstance(a, torch.Tensor)] != versions
    assert changed == (name == "bn_finalize-running"), "whoever saved a running statistic is told"
    for got, want in zip(straight, asked, strict=True):
        if isinstance(got, torch.Tensor):
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


class Seen(TorchDispatchMode):
    """Notes each op that is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def test_who_watches_sees_the_op() -> None:
    x = images(2, 5, 6, 6)
    with torch.no_grad(), Seen() as seen:
        calls.statistics(x)
    assert seen.names[0] == "xsep::chain_statistics"
    with torch.no_grad(), FakeTensorMode() as mode:
        assert calls.statistics(mode.from_tensor(x))[0].shape == (1, 3, 5)
    x.requires_grad_()
    assert calls.apply(x, Load()).requires_grad, "where gradients are recorded PyTorch says that the op has none"


GOOD: dict[str, Any] = dict(
    x=images(2, 5, 6, 6), vec=None, residual=None, activation=RELU, alpha=0.0, w_dw=torch.randn(5, 1, 3, 3),
    w_pw=torch.randn(4, 5, 1, 1), geometry=same(),
)  # fmt: skip


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(x=torch.zeros(5, 6, 6)), r"x must be a floating point \[N, C, H, W\], got \[5, 6, 6\]"),
        (dict(x=torch.zeros(2, 5, 6, 6, dtype=torch.int32)), "int32"),
        (dict(w_dw=torch.zeros(10, 1, 3, 3)), r"w_dw must be \[5, 1, R, S\]"),
        (dict(w_dw=torch.zeros(5, 1, 3, 3).half()), "float16"),
        (dict(w_pw=torch.zeros(4, 6, 1, 1)), r"w_pw must be \[C_out, 5, 1, 1\]"),
        (dict(vec=torch.zeros(2, 4)), r"vec must be \[2, 5\]"),
        (dict(activation=99), "activation must be a code"),
        (dict(residual=torch.zeros(2, 5, 6, 6), geometry=Geometry(2, 2, 1, 1, 1, 1, 1, 1)), "needs stride 1"),
        (dict(residual=torch.zeros(2, 5, 6, 5)), r"residual must be \[2, 5, 6, 6\]"),
        (dict(geometry=Geometry(1, 1, 0, 0, 0, 0, 4, 4)), "smaller than the filter"),
    ],
    ids=["rank", "type", "multiplier", "half_filter", "pointwise", "vec", "code", "stride", "residual", "size"],
)
def test_forward_refusals(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sep_fprop(**{**GOOD, **change})


def test_backward_refusals() -> None:
    x, w_dw, w_pw, coef = images(2, 5, 6, 6), torch.randn(5, 1, 3, 3), torch.randn(4, 5, 1, 1), torch.randn(3, 4)
    r = images(2, 4, 6, 6)
    good: dict[str, Any] = dict(dr=RawGradient(r, r, coef), w_pw=w_pw, w_dw=w_dw, x=x, load=Load(), geometry=same())
    pooled = torch.zeros(2, 4, 3, 3)
    changes: list[tuple[dict[str, Any], str]] = [
        (dict(dr=RawGradient(pooled, r, coef)), r"du must be \[2, 4, 6, 6\]"),
        (dict(dr=RawGradient(r, pooled, coef)), r"r must be \[2, C, 6, 6\]"),
        (dict(dr=RawGradient(r, r, coef[:2])), r"coef must be \[3, 4\]"),
        (dict(dr=RawGradient(r, r, coef, torch.zeros(2, 4, 6, 6).byte())), "beside an index"),
        (dict(dr=RawGradient(pooled, r, coef, pooled)), "uint8"),
        (dict(dr=RawGradient(pooled, r, coef, pooled.byte(), (2, 0))), "pads must be two numbers, 0 or 1"),
        (dict(shortcut=Shortcut(torch.zeros(2, 5, 4, 4), False)), r"shortcut must be \[2, 5, 6, 6\] or \[2, 5, 3, 3\]"),
        (dict(operands=[x], centres=None), "centres must be there"),
        (dict(operands=[x], centres=torch.zeros(3, 5)), r"centres must be \[2, 5\]"),
        (dict(operands=[x, x, x], centres=torch.zeros(4, 5)), "at most 2"),
    ]
    for change, words in changes:
        with pytest.raises(ValueError, match=words):
            sep_backward(**{**good, **change})


def test_finalize_and_pool_refusals() -> None:
    partials, counts = calls.statistics(images(2, 4, 6, 6))
    with pytest.raises(ValueError, match="batches"):
        bn_finalize(partials, counts, momentum=None)
    with pytest.raises(ValueError, match=r"batches must be one int64, got \[1\] torch.int64"):
        bn_finalize(partials, counts, batches=torch.tensor([3]))
    with pytest.raises(ValueError, match="come together"):
        bn_finalize(partials, counts, running_mean=torch.zeros(4))
    with pytest.raises(ValueError, match=r"gamma must be \[4\]"):
        bn_finalize(partials, counts, torch.ones(5))
    with pytest.raises(ValueError, match=r"partials must be \[T, 3, C\]"):
        bn_finalize(partials, counts[:0])
    vec = torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"s must be \[2, 4, 3, 3\]"):
        bn_pool_add(images(2, 4, 6, 6), vec, images(2, 4, 2, 2), vec, (1, 1))


def test_who_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(dtype: torch.dtype, name: str = "auto") -> str:
        return selection.select_for(torch.device("cpu"), dtype, name).name

    monkeypatch.delenv("XSEP_BACKEND", raising=False)
    assert chosen(torch.float32) == chosen(torch.bfloat16) == "cpu" and chosen(torch.float64) == "aten"
    assert chosen(torch.float32, "aten") == "aten"
    with pytest.raises(RuntimeError, match="not float64"):
        chosen(torch.float64, "cpu")
    with pytest.raises(RuntimeError, match="run on NVIDIA GPUs, and the tensors are on cpu"):
        chosen(torch.float32, "cuda")
    with pytest.raises(ValueError, match="no backend of the training chain is called 'metal'"):
        selection.chain_backend("metal")
    monkeypatch.setenv("XSEP_BACKEND", "aten")
    assert chosen(torch.float32) == "aten"


@pytest.mark.parametrize("backend", [CUDA_CHAIN, TRITON_CHAIN], ids=lambda b: b.name)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_batch_that_is_a_symbol(dynamic: bool, backend: ChainBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's plans are no functions of a symbol: how many tiles there are is then known when the kernel has run."""
    monkeypatch.setattr(forward, "select", lambda problem, name: backend)
    monkeypatch.setattr(chain_cuda, "device_facts", lambda index: DeviceFacts(132, 227 * 1024, 60 << 20))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    sizes = [DimDynamic.DYNAMIC if dynamic else DimDynamic.STATIC, *[DimDynamic.STATIC] * 3]
    mode = FakeTensorMode(shape_env=ShapeEnv())
    x = mode.from_tensor(
        torch.randn(4, 64, 30, 30).to(memory_format=torch.channels_last),
        symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes),
    )
    with mode:
        w_dw, w_pw = torch.randn(64, 1, 3, 3), torch.randn(128, 64, 1, 1)
        r, partials, counts, _ = torch.ops.xsep.chain_sep_fprop(
            x, None, 0, 0.0, None, w_dw, w_pw, [1] * 8, True, backend.name
        )
    assert isinstance(r.shape[0], torch.SymInt) == dynamic and isinstance(partials.shape[0], torch.SymInt) == dynamic
    assert r.shape[1:] == (128, 30, 30) and partials.shape[1:] == (3, 128) and counts.dim() == 1
