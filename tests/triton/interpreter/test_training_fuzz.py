"""A chained layer on problems that hypothesis draws, in Triton's interpreter: few of them, and small."""

from __future__ import annotations

import pytest
from hypothesis import given

from tests.chain.test_fuzz import Layer, hold_layer, layers
from tests.fuzzing import examples


@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp16"])
def test_any_layer(kind: str) -> None:
    @examples(3, 50)
    @given(layers(kind, elements=2000, most_stride=2))
    def any_layer(case: Layer) -> None:
        hold_layer(case, "triton")

    any_layer()
