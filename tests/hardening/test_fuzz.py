"""The whole contract of both ops at once, on problems that hypothesis draws and makes smaller.

The same cases in every run of CI; other ones, and many more, each night (XSEP_NIGHTLY=1). A failure says in one line
how to see it again: paste that line into Python.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from tests.fuzzing import examples
from xsep import testing
from xsep.problem import is_channels_last
from xsep.testing import LAYOUTS, NAMES, VECTORS, Case

#: A case of so many elements takes about ten milliseconds, its float64 truth included.
ELEMENTS = 20_000
HOW = examples(250, 4000)
TENSORS = ("x", "w_dw", "w_pw", "bias", "residual", *VECTORS)

sizes = st.sampled_from([1, 2, 3, 5, 6, 7, 8, 9, 11, 13, 16, 17, 19, 24, 29])
channels = st.one_of(st.integers(1, 20), st.sampled_from([24, 31, 32, 33, 37, 48, 63, 64, 65, 67, 80, 96, 129]))
alphas = st.sampled_from([None, 0.3, 1.0, 0.0, -0.2])
side = st.integers(0, 5)


@st.composite
def problems(draw: Any, dtype: torch.dtype) -> Case:
    op = draw(st.sampled_from(["separable", "depthwise"]))
    r, s = draw(st.one_of(st.sampled_from([(3, 3), (5, 5), (7, 7)]), st.tuples(st.integers(1, 7), st.integers(1, 7))))
    form = draw(st.one_of(st.none(), st.sampled_from(["same", "valid"]), side, st.tuples(side, side)))
    case = Case(
        op=op,
        n=draw(st.sampled_from([1, 2, 3, 0])),
        c_in=draw(channels),
        h=draw(sizes),
        w=draw(sizes),
        multiplier=draw(st.sampled_from([1, 1, 2, 3])),
        c_out=draw(channels) if op == "separable" else 1,
        filter=(r, s),
        stride=draw(st.one_of(st.just((1, 1)), st.tuples(st.integers(1, 4), st.integers(1, 4)))),
        padding=draw(st.tuples(side, side, side, side)) if form is None else (0, 0, 0, 0),
        padding_form=form,
        dilation=draw(st.one_of(st.just((1, 1)), st.tuples(st.integers(1, 4), st.integers(1, 4)))),
        bias=draw(st.booleans()),
        residual=draw(st.booleans()) and op == "separable",
        vectors=tuple(v for v in VECTORS if draw(st.booleans())),
        activations=draw(st.tuples(*[st.sampled_from(NAMES)] * 3)),
        alpha=draw(alphas),
        dtype=dtype,
        wide_vectors=dtype in (torch.float16, torch.bfloat16) and draw(st.booleans()),
        layout=draw(st.sampled_from(LAYOUTS)),
        weights_layout=draw(st.sampled_from(LAYOUTS[:5])),
        dy_layout=draw(st.sampled_from(LAYOUTS)),
        wanted=draw(st.one_of(st.none(), st.frozensets(st.sampled_from(TENSORS)).map(lambda w: tuple(sorted(w))))),
        seed=draw(st.integers(0, 999)),
    )
    p, q = case.output_size
    assume(p > 0 and q > 0)
    assume(case.n * case.c_in * case.multiplier * max(case.h * case.w, p * q) <= ELEMENTS)
    return case


def hold(case: Case, backend: str) -> None:
    """The rule; the strides PyTorch's convolutions would give; inputs left as they were; the same when called again."""
    inputs = testing.make_inputs(case)
    before = {name: t.detach().clone() for name, t in inputs.tensors.items()}
    ours = testing.run_xsep(case, inputs, backend)
    found = testing.violations(ours, testing.run_truth(case, inputs), testing.run_pytorch(case, inputs), case.dtype)
    second = testing.run_xsep(case, inputs, backend)
    found += [f"{name} does not repeat" for name, t in ours.items() if not same(t, second[name])]
    found += [f"{name} was changed" for name, t in inputs.tensors.items() if not same(t, before[name])]
    filters = [inputs.tensors[name] for name in ("x", "w_dw", "w_pw") if name in inputs.tensors]
    last = any(is_channels_last(t) for t in filters)
    memory_format = torch.channels_last if last else torch.contiguous_format
    found += [
        f"{name} has strides {t.stride()}"
        for name, t in ours.items()
        if name in ("y", "dx") and not t.is_contiguous(memory_format=memory_format)
    ]
    assert not found, f"{'; '.join(found)}\nagain: {case.reproducer(backend)}"


def same(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_any_problem(dtype: torch.dtype, backend: str) -> None:
    if dtype is torch.float64 and backend == "cpu":
        pytest.skip("the cpu backend refuses float64: test_dispatch.py")

    @HOW
    @given(problems(dtype))
    def any_problem(case: Case) -> None:
        hold(case, backend)

    any_problem()


def test_a_failure_says_how_to_see_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = testing.run_xsep

    def one_element_off(case: Case, inputs: testing.Inputs, backend: str) -> testing.Results:
        results = honest(case, inputs, backend)
        results["y"].view(-1)[-1] += 0.5
        return results

    monkeypatch.setattr(testing, "run_xsep", one_element_off)
    case = Case(c_in=3, c_out=2, layout="contiguous", padding_form="same", dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match=r"(?s)y: error .*again: import torch; .*check\(Case\(c_in=3, .*'aten'\)"):
        hold(case, "aten")
