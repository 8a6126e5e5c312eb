"""What inference keeps of pointwise weights is never what they were before a change."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import xsep
from xsep import extension
from xsep.backends import packed_weights

assert extension.load_cpu().reason is None


def layer(dtype: torch.dtype = torch.float32) -> xsep.FusedSeparableConv2d:
    made = xsep.FusedSeparableConv2d(263, 261, 3, padding=1, dtype=dtype, backend="cpu").eval()
    assert made.conv_pw.weight.numel() >= packed_weights.FEWEST
    return made


def truth(made: xsep.FusedSeparableConv2d, x: Tensor) -> Tensor:
    return made.conv_pw(made.conv_dw(x))


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5) if a.dtype == torch.float32 else torch.allclose(a, b, 2e-2, 2e-2)


def in_place(made: xsep.FusedSeparableConv2d) -> None:
    made.conv_pw.weight.mul_(-1.5)


def one_element(made: xsep.FusedSeparableConv2d) -> None:
    made.conv_pw.weight[260, 262, 0, 0] += 9.0


def through_data(made: xsep.FusedSeparableConv2d) -> None:
    made.conv_pw.weight.data.mul_(-1.5)


def data_swap(made: xsep.FusedSeparableConv2d) -> None:
    made.conv_pw.weight.data = torch.randn_like(made.conv_pw.weight)


def new_parameter(made: xsep.FusedSeparableConv2d) -> None:
    made.conv_pw.weight = nn.Parameter(torch.randn_like(made.conv_pw.weight))


def loaded(made: xsep.FusedSeparableConv2d) -> None:
    made.load_state_dict(layer().state_dict())


def through_numpy(made: xsep.FusedSeparableConv2d) -> None:
    made.conv_pw.weight.detach().numpy()[3] *= -2


def rows_exchanged(made: xsep.FusedSeparableConv2d) -> None:
    weight = made.conv_pw.weight
    weight[[0, 1]] = weight[[1, 0]].clone()


def optimizer(made: xsep.FusedSeparableConv2d) -> None:
    with torch.enable_grad():
        made(torch.randn(1, 263, 5, 5)).square().sum().backward()
    torch.optim.SGD(made.parameters(), 0.1).step()


CHANGES = [
    in_place, one_element, through_data, data_swap, new_parameter, loaded, through_numpy, rows_exchanged, optimizer,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@torch.no_grad()
def test_a_changed_weight_is_packed_anew(change: Callable[[xsep.FusedSeparableConv2d], None]) -> None:
    made, x = layer(), torch.randn(1, 263, 7, 9)
    before = made(x)
    assert close(before, truth(made, x)) and packed_weights.held(made.conv_pw.weight)
    change(made)
    after = made(x)
    assert close(after, truth(made, x))
    assert not close(after, before), "the change changed nothing, so this proves nothing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_kept_weights_give_the_same_bits(dtype: torch.dtype) -> None:
    made, x = layer(dtype), torch.randn(1, 263, 7, 9).to(dtype)
    first = made(x)
    assert packed_weights.held(made.conv_pw.weight) >= made.conv_pw.weight.numel() * made.conv_pw.weight.element_size()
    assert torch.equal(made(x), first)
    assert torch.equal(made.train()(x), first), "packed anew"


@torch.no_grad()
def test_another_type_is_packed_anew() -> None:
    made, x = layer(), torch.randn(1, 263, 7, 9)
    made(x)
    made.to(torch.bfloat16)
    assert close(made(x.bfloat16()), truth(made, x.bfloat16()))


def test_training_and_gradients_keep_nothing() -> None:
    made, x = layer(), torch.randn(1, 263, 7, 9)
    made(x)
    assert not packed_weights.held(made.conv_pw.weight)
    with torch.no_grad():
        made.train()(x)
    assert not packed_weights.held(made.conv_pw.weight)


@torch.no_grad()
def test_nothing_outlives_the_layer_nor_travels_with_it() -> None:
    made, x = layer(), torch.randn(1, 263, 7, 9)
    made(x)
    assert len(pickle.dumps(made)) < 1.2 * 4 * sum(p.numel() for p in made.parameters())
    assert not packed_weights.held(copy.deepcopy(made).conv_pw.weight)
    count = len(packed_weights._kept)
    del made
    assert len(packed_weights._kept) == count - 1


@torch.no_grad()
def test_memory_comes_back_when_asked_for() -> None:
    made, x = layer(), torch.randn(1, 263, 7, 9)
    first = made(x)
    xsep.forget_packed_weights()
    assert not packed_weights.held(made.conv_pw.weight)
    assert torch.equal(made(x), first)


def test_checksum_sees_every_word_and_their_order() -> None:
    data = torch.randn(1000, 3)
    checksum = torch.ops.xsep.cpu_checksum
    seen = {checksum(data)}
    for i in range(0, data.numel(), 7):
        changed = data.clone()
        changed.view(-1).view(torch.int32)[i] ^= 1
        seen.add(checksum(changed))
    seen.add(checksum(data.flip(0)))
    assert len(seen) == 2 + len(range(0, data.numel(), 7))
    assert checksum(data.clone()) == checksum(data) == checksum(data.t().contiguous().t())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [(256, 256), (1024, 256), (728, 728), (31, 1)], ids=str)
@pytest.mark.parametrize("constant", [False, True])
def test_checksum_sees_what_changes_all_words_alike(dtype: torch.dtype, size: tuple[int, int], constant: bool) -> None:
    """Doubled, halved or negated: the same bits change in every word, and sums of such changes like to cancel."""
    data = (torch.full(size, 0.75) if constant else torch.randn(size)).to(dtype)
    rows = torch.arange(size[0])[:, None] % 2 == 0
    changed = [
        data, -data, 2 * data, 4 * data, data / 2, data / 65536, torch.where(rows, data, -data), torch.zeros_like(data),
        data.roll(64) if not constant else data + 1, torch.where(rows, data, 2 * data), data.flip(0) + data,
    ]  # fmt: skip
    bits = {t.view(torch.int16 if dtype.itemsize == 2 else torch.int32).numpy().tobytes() for t in changed}
    assert len({torch.ops.xsep.cpu_checksum(t) for t in changed}) == len(bits) >= 9


@pytest.mark.parametrize("factor", [-1.0, 2.0, 0.5])
def test_scaled_in_place_past_the_version_counter(factor: float) -> None:
    layer = xsep.FusedSeparableConv2d(256, 256, 3, padding=1, bias=False).eval()
    x = torch.randn(1, 256, 5, 5)
    with torch.no_grad():
        before = layer(x)
        layer.conv_pw.weight.data.mul_(factor)
        assert torch.equal(layer(x), factor * before)
    xsep.forget_packed_weights()
