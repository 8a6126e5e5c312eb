"""What the tests that draw their problems share: the same ones in every run of CI, others and many more each night."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Optional

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.conftest import NIGHTLY


def batch_norm(r: Random, channels: int) -> nn.BatchNorm2d:
    """With options as networks have them, and weights and statistics that matter."""
    bn = nn.BatchNorm2d(
        channels, eps=r.choice([1e-5, 1e-3]), momentum=r.choice([0.1, 0.1, 0.3, None]), affine=r.random() < 0.85,
        track_running_stats=r.random() < 0.9,
    )  # fmt: skip
    if bn.affine:
        nn.init.normal_(bn.weight)
        nn.init.normal_(bn.bias)
    if bn.running_mean is not None and bn.running_var is not None:
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.5, 2)
    return bn


def examples(usual: int, nightly: int) -> settings:
    """That many, smaller ones looked for where one fails."""
    return settings(
        max_examples=nightly if NIGHTLY else usual,
        derandomize=not NIGHTLY,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
        phases=[Phase.generate, Phase.shrink],
    )


def hold_seeds(hold: Callable[[int], bool], how: settings, share: float) -> None:
    """``hold(seed)`` of each seed, which says whether there was something to compare: of more than so many there is."""
    compared = []

    @how
    @given(st.integers(0, 2**32 - 1))
    def any_seed(seed: int) -> None:
        compared.append(hold(seed))

    any_seed()
    assert sum(compared) > share * len(compared)


def hold_same(expected: Optional[dict[str, Tensor]], got: Optional[dict[str, Tensor]], where: str) -> bool:
    """Whether there is something to compare; the same in float64 then, up to rounding, of every name.

    None stands for a call that raised: where the expected one did, or gave no finite numbers, anything is right.
    """
    if expected is None or not all(bool(t.isfinite().all()) for t in expected.values()):
        return False
    assert got is not None, f"only ours raised; {where}"
    assert expected.keys() == got.keys(), f"{expected.keys() ^ got.keys()}; {where}"
    size = max(float(t.abs().max()) for t in expected.values())
    for name, t in expected.items():
        error = float((t - got[name]).abs().max())
        assert error <= 1e-9 * max(size, 1.0), f"{name}: off by {error:.3g}; {where}"
    return True
