"""The rule that every kernel is held to: planted errors break it, honest results do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from xsep import testing
from xsep.testing import Case, Inputs, Results, Truth

TYPES = (torch.float32, torch.bfloat16, torch.float16)
XCEPTION = Case(n=2, c_in=37, h=11, w=13, c_out=41, activations=("relu", None, None))
CASES = {
    "xception": XCEPTION,
    "wide": Case(n=1, c_in=1024, h=5, w=5, c_out=1536, activations=("relu", None, None)),
    "batchnorm": replace(
        XCEPTION, bias=True, vectors=("scale_p", "shift_p", "scale_e", "shift_e"), activations=("silu", None, "gelu")
    ),
    "depthwise": Case(op="depthwise", n=2, c_in=19, multiplier=2, h=11, w=13, stride=(2, 2), bias=True),
}


@cache
def honest(name: str, dtype: torch.dtype) -> tuple[Case, Inputs, Results, Truth, Results]:
    case = replace(CASES[name], dtype=dtype)
    inputs = testing.make_inputs(case)
    ours = testing.run_xsep(case, inputs, "aten")
    return case, inputs, ours, testing.run_truth(case, inputs), testing.run_pytorch(case, inputs)


def scaled(t: Tensor) -> Tensor:
    return t * 1.02


def scaled_more(t: Tensor) -> Tensor:
    return t * 1.05


def channel_swapped(t: Tensor) -> Tensor:
    order = list(range(t.shape[1 if t.dim() == 4 and t.shape[1] > 1 else 0]))
    order[0], order[1] = order[1], order[0]
    return t[:, order] if t.dim() == 4 and t.shape[1] > 1 else t[order]


def border_pixel_wrong(t: Tensor) -> Tensor:
    out = t.clone()
    out[-1, :, -1, -1] = t[-1, :, -1, -2]
    return out


def one_element_wrong(t: Tensor) -> Tensor:
    """Off by as much as the results are large, by their root mean square."""
    out = t.clone().contiguous()
    out.view(-1)[t.numel() // 2] += t.float().square().mean().sqrt()
    return out


def unwritten(t: Tensor) -> Tensor:
    out = t.clone().contiguous()
    out.view(-1)[-1] = torch.nan
    return out


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_honest_results_pass(name: str, dtype: torch.dtype) -> None:
    _, _, ours, truth, pytorch = honest(name, dtype)
    assert testing.violations(ours, truth, pytorch, dtype) == []


@pytest.mark.parametrize("fault", [scaled, channel_swapped, border_pixel_wrong, one_element_wrong, unwritten])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_a_wrong_result_is_found(name: str, dtype: torch.dtype, fault: Callable[[Tensor], Tensor]) -> None:
    """In y and in each gradient, one at a time."""
    _, _, ours, truth, pytorch = honest(name, dtype)
    for result, value in ours.items():
        if fault is border_pixel_wrong and result not in ("y", "dx"):
            continue
        if fault is scaled and name == "batchnorm" and dtype is torch.bfloat16:
            fault = scaled_more  # eight roundings come near to two per cent of sums that nearly cancel
        found = testing.violations({**ours, result: fault(value)}, truth, pytorch, dtype)
        assert found and all(sentence.startswith(f"{result}:") for sentence in found), f"{result} was let through"


def _with_tap_dropped(w: Tensor) -> Tensor:
    w = w.clone()
    w[:, :, 1, 2] = 0
    return w


def _with_one_channels_tap_dropped(w: Tensor) -> Tensor:
    w = w.clone()
    w[3, :, 0, 0] = 0
    return w


@pytest.mark.parametrize(
    "tensor, change",
    [
        pytest.param("w_pw", scaled, id="w_pw-scaled"),
        pytest.param("w_dw", scaled, id="w_dw-scaled"),
        pytest.param("w_dw", _with_tap_dropped, id="tap-dropped"),
        pytest.param("w_dw", _with_one_channels_tap_dropped, id="tap-of-one-channel-dropped"),
        pytest.param("w_pw", channel_swapped, id="channel-swapped"),
    ],
)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", ["xception", "wide"])
def test_a_kernel_that_reads_its_weights_wrongly_is_found(
    name: str, dtype: torch.dtype, tensor: str, change: Callable[[Tensor], Tensor]
) -> None:
    case, inputs, _, truth, pytorch = honest(name, dtype)
    weights = {tensor: change(inputs.tensors[tensor].detach()).requires_grad_()}
    wrong = testing.run_xsep(case, Inputs({**inputs.tensors, **weights}, inputs.dy, inputs.options), "aten")
    found = testing.violations(wrong, truth, pytorch, dtype)
    assert found
    if change is not _with_one_channels_tap_dropped:
        assert any(sentence.startswith("y:") for sentence in found), found


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_an_activation_in_the_epilogue_does_not_blunt_the_rule_for_y(dtype: torch.dtype) -> None:
    case = replace(XCEPTION, dtype=dtype, activations=("relu", "relu6", "relu"))
    inputs = testing.make_inputs(case)
    ours, truth = testing.run_xsep(case, inputs, "aten"), testing.run_truth(case, inputs)
    pytorch = testing.run_pytorch(case, inputs)
    assert testing.violations(ours, truth, pytorch, dtype) == []
    assert testing.violations({**ours, "y": border_pixel_wrong(ours["y"])}, truth, pytorch, dtype)
    assert testing.violations({**ours, "dx": -ours["dx"]}, truth, pytorch, dtype)


def test_a_value_beside_a_jump_may_fall_on_either_side() -> None:
    """u is 1 - (1 + 2^-9), which bfloat16 cannot tell from 0; relu's gradient there is 0 or all of dy."""
    case = Case(op="depthwise", n=1, c_in=2, h=1, w=1, filter=(1, 1), padding=(0,) * 4, dtype=torch.bfloat16,
                vectors=("shift_e",), activations=(None, None, "relu"), wide_vectors=True)  # fmt: skip
    inputs = testing.make_inputs(case)
    with torch.no_grad():
        inputs.tensors["x"].copy_(torch.tensor([1.0, 3.0])[None, :, None, None])
        inputs.tensors["w_dw"].fill_(1)
        inputs.tensors["shift_e"].copy_(torch.tensor([-1 - 2**-9, 0.0]))
        inputs.dy.fill_(1)
    truth, pytorch = testing.run_truth(case, inputs), testing.run_pytorch(case, inputs)
    assert truth.results["dx"].flatten().tolist() == [0, 1]
    for side in (0.0, 1.0):
        other = {**truth.results, "dx": torch.tensor([side, 1.0])[None, :, None, None]}
        assert testing.violations(other, truth, pytorch, case.dtype) == []
    wrong = {**truth.results, "dx": torch.tensor([0.0, -2.0])[None, :, None, None]}
    assert testing.violations(wrong, truth, pytorch, case.dtype)


def test_the_reproducer_is_the_case() -> None:
    case = replace(CASES["batchnorm"], dtype=torch.float16, padding_form="same", wanted=("x", "bias"), seed=7)
    line = case.reproducer("cpu")
    assert "\n" not in line
    seen: list[tuple[Case, str]] = []
    exec(line.replace("from xsep.testing import Case, check", "from xsep.testing import Case"),
         {"check": lambda *args: seen.append(args)})  # fmt: skip
    assert seen == [(case, "cpu")]
