"""The operators called directly: each schema has an implementation, and each refuses what it cannot take in words."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any, Optional

import pytest
import torch
from torch import Tensor

from tests.chain.support import last
from xsep.backends.cuda import DeviceFacts

from . import emulated, emulated_ops
from .emulated_ops import EmulatedOps

pytestmark = pytest.mark.skipif(emulated.missing_tools() is not None, reason=str(emulated.missing_tools()))

N, C, C_OUT, H, W = 2, 8, 16, 5, 6
SAME = [1, 1, 1, 1, 1, 1, 1, 1]


def image(c: int = C, h: int = H, w: int = W) -> Tensor:
    return last(N, c, h, w, dtype=torch.bfloat16)


def draw(name: str) -> Any:
    """An argument of any operator, by its name in the schema: of a bfloat16 layer of C -> C_OUT, 3 x 3, stride 1."""
    if name in ("scale_p", "shift_p", "scale_m", "shift_m", "centre", "gamma", "beta", "running_mean", "running_var",
                "invstd"):  # fmt: skip
        return torch.rand(C)
    if name in ("scale_e", "shift_e", "bias"):
        return torch.rand(C_OUT)
    vectors = {"vec": (2, C), "vec_s": (2, C), "coef": (3, C), "centres": (3, C), "positive": (N, C), "total": (N, C)}
    if name in vectors:
        return torch.rand(vectors[name])
    everything: dict[str, Callable[[], Any]] = {
        "w_dw": lambda: torch.randn(C, 1, 3, 3).bfloat16(), "w_pw": lambda: torch.randn(C_OUT, C, 1, 1).bfloat16(),
        "g": lambda: torch.randn(N, C).bfloat16(), "mean": lambda: torch.rand(C), "sums": lambda: torch.rand(2, C),
        "count": lambda: torch.tensor(60.0, dtype=torch.float64), "batches": lambda: torch.tensor(3),
        "partials": lambda: torch.rand(1, 3, C), "counts": lambda: torch.tensor([60], dtype=torch.int32),
        "taps": lambda: torch.full((N, C, 3, 3), 4).byte().contiguous(memory_format=torch.channels_last),
        "s": lambda: image(C, 3, 3), "geometry": lambda: list(SAME), "activations": lambda: [1, 0],
        "alphas": lambda: [0.0, 0.0], "wanted": lambda: [1, 1, 1, 1], "pads": lambda: [1, 1], "activation": lambda: 1,
        "alpha": lambda: 0.0, "momentum": lambda: 0.1, "eps": lambda: 1e-5, "statistics": lambda: True,
        "allow_tf32": lambda: False, "before_mask": lambda: False, "batch": lambda: True,
        "cumulative": lambda: False,
    }  # fmt: skip
    return everything[name]() if name in everything else image()


#: What differs from that.
OTHERWISE: dict[str, dict[str, Callable[[], Any]]] = {
    "cuda_depthwise_fprop": {"scale_e": lambda: torch.rand(C), "shift_e": lambda: torch.rand(C)},
    "cuda_depthwise_fprop_residual": {"scale_e": lambda: torch.rand(C), "shift_e": lambda: torch.rand(C)},
    "cuda_depthwise_fprop_chain": {"scale_e": lambda: torch.rand(C), "shift_e": lambda: torch.rand(C)},
    "cuda_separable_fprop": {
        "residual": lambda: image(C_OUT), "activations": lambda: [1, 0, 1], "alphas": lambda: [0.0, 0.0, 0.0],
    },
    "cuda_separable_wgrad": {"dy": lambda: image(C_OUT)},
    "cuda_separable_bprop": {"dy": lambda: image(C_OUT), "wanted": lambda: [1, 1, 1, 1, 1]},
    "cuda_chain_statistics": {"counts": lambda: torch.zeros(1, dtype=torch.int32)},
    "cuda_chain_raw_gradient": {"du": lambda: image(C, 3, 3)},
    "cuda_chain_depthwise_bprop": {"partials": lambda: torch.rand(2, 12, C)},
    "cuda_chain_sum_partials": {"partials": lambda: torch.rand(7, 12, C), "sums": lambda: 3},
    "cuda_chain_wgrad": {
        "du": lambda: image(C_OUT), "r": lambda: image(C_OUT), "coef": lambda: torch.rand(3, C_OUT),
    },
    "cuda_chain_fused_backward": {
        "du": lambda: image(C_OUT, 3, 3), "r": lambda: image(C_OUT), "coef": lambda: torch.rand(3, C_OUT),
        "taps": lambda: torch.full((N, C_OUT, 3, 3), 4).byte().contiguous(memory_format=torch.channels_last),
    },
}  # fmt: skip
OPS = [
    *("cuda_depthwise_fprop", "cuda_depthwise_fprop_residual", "cuda_depthwise_fprop_chain", "cuda_depthwise_bprop"),
    *("cuda_separable_fprop", "cuda_separable_wgrad", "cuda_separable_bprop", "cuda_separable_fprop_chain"),
    "cuda_chain_raw_gradient",
    "cuda_chain_statistics",
    *("cuda_chain_apply", "cuda_chain_input_gradient", "cuda_chain_depthwise_bprop", "cuda_chain_sum_partials"),
    *("cuda_chain_bn_pool_add", "cuda_chain_bn_finalize", "cuda_chain_bn_backward_finalize", "cuda_chain_bn_relu_gap"),
    *("cuda_chain_bn_relu_gap_backward", "cuda_chain_fused_backward", "cuda_chain_wgrad"),
]
each_op = pytest.mark.parametrize("op", OPS)


@pytest.fixture(autouse=True)
def card(operators: EmulatedOps) -> Iterator[None]:
    """One on which the layer's backward is one pass, and nothing stays the current device."""
    operators.on(DeviceFacts(3, 227 * 1024, 0))
    yield
    assert operators.lib.emulate_current_device() == 0


def schema(op: str) -> Any:
    return getattr(emulated_ops.library().ops, op).default._schema


def arguments(op: str) -> dict[str, Any]:
    torch.manual_seed(0)
    own = OTHERWISE.get(op, {})
    return {a.name: own[a.name]() if a.name in own else draw(a.name) for a in schema(op).arguments}


def call(op: str, given: dict[str, Any]) -> Any:
    return getattr(torch.ops.xsep, op)(*given.values())


def tensors(op: str) -> list[str]:
    return [name for name, value in arguments(op).items() if isinstance(value, Tensor)]


def test_these_are_all_operators_on_tensors(operators: EmulatedOps) -> None:
    assert {"cuda_probe", "cuda_architectures", "cuda_device_facts", *OPS} == set(operators.names)


@each_op
def test_results_are_written_and_what_the_schema_says(op: str) -> None:
    """All of them, from memory that starts as NaN; no argument changes but those that are marked."""
    given = arguments(op)
    before = {name: value.clone() if isinstance(value, Tensor) else value for name, value in given.items()}
    found = call(op, given)
    found = () if found is None else found if isinstance(found, tuple) else (found,)
    assert len(found) == len(schema(op).returns)
    assert not any(bool(t.double().isnan().any()) for t in found)
    for argument in schema(op).arguments:
        if isinstance(given[argument.name], Tensor):
            same = torch.equal(given[argument.name], before[argument.name])
            assert same != (argument.alias_info is not None and argument.alias_info.is_write), argument.name


#: Optional tensors that are not missed alone, and what is said.
TOGETHER = {
    ("cuda_chain_bn_finalize", "running_mean"): "running statistics come together",
    ("cuda_chain_bn_finalize", "running_var"): "running statistics come together",
    ("cuda_chain_fused_backward", "taps"): r"du must be \[2, 16, 5, 6\]",
    ("cuda_chain_raw_gradient", "taps"): r"du must be \[2, 8, 5, 6\]",
    **{(op, "operand_1"): "operand_2 needs operand_1" for op in OPS},
    **{(op, "operand_2"): "centres must be contiguous, with 16 elements" for op in OPS},
    **{(op, "centres"): "operands need centres" for op in OPS},
}


@each_op
def test_every_optional_tensor_may_be_missing(op: str) -> None:
    optional = [a.name for a in schema(op).arguments if str(a.type) == "Optional[Tensor]"]
    for name in optional:
        given = {**arguments(op), name: None}
        if (op, name) in TOGETHER:
            with pytest.raises(RuntimeError, match=TOGETHER[op, name]):
                call(op, given)
        else:
            call(op, given)
    if not op.endswith(("raw_gradient", "fused_backward")):
        call(op, {name: None if name in optional else value for name, value in arguments(op).items()})


def strided(t: Tensor) -> Optional[Tensor]:
    other = torch.stack([t, t], -1).select(-1, 0)
    return None if other.is_contiguous() else other


def of_another_type(t: Tensor) -> Tensor:
    others = {torch.float64: torch.float32, torch.int32: torch.int64, torch.int64: torch.int32}
    return t.to(others.get(t.dtype, torch.float64))


CHANGES: dict[str, Callable[[Tensor], Optional[Tensor]]] = {
    "elsewhere": lambda t: t.to("meta"), "type": of_another_type, "strided": strided,
    "shape": lambda t: t.flatten()[:-1], "empty": lambda t: t[:0] if t.dim() > 0 else None,
}  # fmt: skip


OF_WHICH_THE_SIZES_COUNT = {("cuda_chain_sum_partials", "w_dw", change) for change in ("type", "strided")}


@each_op
@pytest.mark.parametrize("change", CHANGES)
def test_a_wrong_tensor_is_refused_by_name(operators: EmulatedOps, op: str, change: str) -> None:
    for name in tensors(op):
        given = arguments(op)
        other = CHANGES[change](given[name])
        if other is None or (op, name, change) in OF_WHICH_THE_SIZES_COUNT:
            continue
        with pytest.raises(RuntimeError) as caught:
            call(op, {**given, name: other})
        words = str(caught.value)
        if "no tensor may be empty" not in words and "must have the type of x" not in words:
            assert f"{name} must be" in words, f"{name}: {words}"
        assert operators.lib.emulate_current_device() == 0


@each_op
def test_images_in_nchw_are_refused(op: str) -> None:
    for name in tensors(op):
        given = arguments(op)
        if given[name].dim() == 4 and given[name].shape[1] > 1 and given[name].shape[2] > 1:
            with pytest.raises(RuntimeError, match=f"{name} must be contiguous in channels_last"):
                call(op, {**given, name: given[name].contiguous()})


#: Argument, value, words.
WRONG: list[tuple[str, Any, str]] = [
    ("geometry", SAME[1:], "geometry must hold 8 numbers, not 7"),
    ("geometry", [0, *SAME[1:]], "stride and dilation must be positive"),
    ("geometry", [*SAME[:7], -1], "stride and dilation must be positive"),
    ("geometry", [1, 1, -1, *SAME[3:]], "padding is -1, and must be 0"),
    ("geometry", [1, 1, 2**40, *SAME[3:]], "is 10995116"),
    ("geometry", [*SAME[:6], 9, 1], "the filter does not fit into the padded input"),
    ("activation", 99, "activation code 99 is not known"),
    ("activation", -1, "activation code -1 is not known"),
    ("activations", [1], "activations and alphas"),
    ("activations", [99, 0, 0], "activation"),
    ("alphas", [], "activations and alphas"),
    ("wanted", [1, 1, 1], "wanted must hold [45] flags"),
    ("pads", [1], "pads must hold 2 numbers"),
    ("pads", [1, 2], "pads must be 0 or 1"),
    ("pads", [-1, 1], "the padding above is -1, and must be 0"),
]


@pytest.mark.parametrize("argument, value, words", WRONG, ids=lambda v: str(v).replace(" ", ""))
def test_wrong_numbers_are_refused(argument: str, value: Any, words: str) -> None:
    having = [op for op in OPS if argument in {a.name for a in schema(op).arguments}]
    assert having
    for op in having:
        with pytest.raises(RuntimeError, match=words):
            call(op, {**arguments(op), argument: value})


#: Operator, what differs, words.
REFUSED: list[tuple[str, dict[str, Callable[[], Any]], str]] = [
    ("cuda_depthwise_fprop", {"w_dw": lambda: torch.randn(12, 1, 3, 3).bfloat16()}, "12 filters for 8 channels"),
    ("cuda_depthwise_fprop", {"w_dw": lambda: torch.randn(C, 1, 0, 3).bfloat16()}, "no tensor may be empty"),
    (
        "cuda_depthwise_fprop",
        {"x": lambda: image(C, 0, W), "geometry": lambda: [1, 1, 1, 1, 3, 3, 1, 1]},
        "no tensor may be empty",
    ),
    (
        "cuda_separable_fprop_chain",
        {"w_dw": lambda: torch.randn(16, 1, 3, 3).bfloat16(), "w_pw": lambda: torch.randn(C_OUT, 16, 1, 1).bfloat16()},
        "no depth multiplier",
    ),
    ("cuda_chain_depthwise_bprop", {"w_dw": lambda: torch.randn(16, 1, 3, 3).bfloat16()}, "has no depth multiplier"),
    ("cuda_chain_fused_backward", {"w_dw": lambda: torch.randn(16, 1, 3, 3).bfloat16()}, "has no depth multiplier"),
    ("cuda_separable_fprop_chain", {"geometry": lambda: [2, 2, *SAME[2:]]}, "an addend needs stride 1"),
    ("cuda_depthwise_bprop", {"centre": lambda: torch.rand(C).bfloat16()}, "centre must be float32"),
    ("cuda_chain_sum_partials", {"sums": lambda: 0}, "1 to 3 sums, not 0"),
    ("cuda_chain_sum_partials", {"sums": lambda: 4}, "1 to 3 sums, not 4"),
    ("cuda_chain_bn_pool_add", {"s": lambda: image(C, 2, 3)}, "s must be of half the height and width of r"),
    (
        "cuda_chain_bn_finalize",
        {"cumulative": lambda: True, "batches": lambda: None},
        "a cumulative average needs batches",
    ),
]


@pytest.mark.parametrize("op, differs, words", REFUSED, ids=[f"{op}-{i}" for i, (op, *_) in enumerate(REFUSED)])
def test_what_cannot_be_meant_is_refused(op: str, differs: dict[str, Callable[[], Any]], words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        call(op, {**arguments(op), **{name: value() for name, value in differs.items()}})


def test_a_layer_that_cannot_be_fused_is_refused(operators: EmulatedOps) -> None:
    operators.on(emulated_ops.H200._replace(shared_bytes=32 * 1024))
    with pytest.raises(RuntimeError, match=r"the planner does not fuse the backward of bfloat16 .*\[2, 8, 5, 6\]"):
        call("cuda_chain_fused_backward", arguments("cuda_chain_fused_backward"))


def complaints(operators: EmulatedOps, op: str) -> list[str]:
    """What is said when each call of CUDA's runtime is refused in turn, launches among them."""
    found: list[str] = []
    while True:
        operators.lib.emulate_refusal(len(found) + 1)
        try:
            call(op, arguments(op))
            return found
        except RuntimeError as error:
            found.append(str(error))
        finally:
            operators.lib.emulate_refusal(0)
        assert operators.lib.emulate_current_device() == 0


@each_op
def test_what_cuda_refuses_is_reported_with_the_whole_problem(operators: EmulatedOps, op: str) -> None:
    call(op, arguments(op))  # the card is known from here on
    found = complaints(operators, op)
    assert found[0].startswith("cudaGetDevice for ") and found[1].startswith("cudaSetDevice for ")
    launches = [words for words in found if not words.startswith(("cudaGetDevice for ", "cudaSetDevice for "))]
    assert launches and all("_kernel: refused, for " in words for words in launches)
    assert all("8" in words.partition(" for ")[2] for words in found), "the channels"


def test_a_card_that_does_not_say_what_it_has(operators: EmulatedOps) -> None:
    operators.on(DeviceFacts(997, 227 * 1024, 0))  # as no other test has
    found = complaints(operators, "cuda_chain_apply")
    assert [words.partition(" ")[0] for words in found[2:5]] == ["cudaDeviceGetAttribute"] * 3 and len(found) == 6


def test_facts_of_a_device_that_is_not_there(operators: EmulatedOps) -> None:
    with pytest.raises(RuntimeError, match="CUDA device 77: invalid device"):
        torch.ops.xsep.cuda_device_facts(77)
    assert torch.ops.xsep.cuda_device_facts(-1) == [3, 227 * 1024, 0]


def test_probe(operators: EmulatedOps) -> None:
    assert torch.ops.xsep.cuda_probe() == 0 and torch.ops.xsep.cuda_architectures() == [900]
    operators.lib.emulate_refusal(1)
    assert torch.ops.xsep.cuda_probe() != 0


def test_the_guard_sees_what_is_written_past_the_ends(operators: EmulatedOps) -> None:
    for place in (-4, 40):
        t = torch.empty(10)
        assert bool(t.isnan().all())
        ctypes.c_float.from_address(t.data_ptr() + place).value = 1.0
        with pytest.raises(AssertionError, match="past the ends"):
            operators.check()
        operators.check()
