"""Xception: its names and numbers, and feature-by-feature equality with one written in plain PyTorch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xsep.models import xception
from xsep.models.xception import MaxPool
from xsep.modules import FusedSeparableConv2d

from .plain_xception import gradients_of_these_choices, outputs, tensorflow_pool, timm_keys, timm_name, twins, watch

ULPS = 8


def assert_features_as_good(ours: Any, plain: Any, x: Tensor) -> None:
    """Each module's output against float64: at most twice plain PyTorch's error, plus a few ulp."""
    with torch.no_grad():
        got, own = outputs(ours, x), plain(x)
        truth = copy.deepcopy(plain).double()(x.double())
    assert got.keys() == own.keys() and len(got) == 16
    for name, t in truth.items():
        assert got[name].shape == t.shape, name
        bound = 2 * (own[name] - t).abs().max() + ULPS * torch.finfo(x.dtype).eps * t.abs().max()
        error = (got[name] - t).abs().max()
        assert error <= bound, f"{name}: {error:.3g} > {bound:.3g}"


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    torch.manual_seed(11)
    return twins()


def test_parameter_count_and_buffers() -> None:
    model = xception()
    assert sum(p.numel() for p in model.parameters()) == 22_855_952
    buffers = [b.numel() for name, b in model.named_buffers() if not name.endswith("num_batches_tracked")]
    assert sum(buffers) == 54_528
    assert sum(isinstance(m, FusedSeparableConv2d) for m in model.modules()) == 34


def test_keys_are_those_of_timm() -> None:
    keys = list(xception(num_classes=3).state_dict())
    assert sorted(keys) == sorted(timm_keys())
    assert {k for k in keys if k.startswith("block1.rep")} >= {"block1.rep.0.conv1.weight", "block1.rep.4.bias"}


def test_layers_are_the_ten_shapes_of_the_paper() -> None:
    seen: dict[tuple[int, int, int], int] = {}
    model = xception().eval()

    def count(conv: FusedSeparableConv2d, args: Any, y: Tensor) -> None:
        key = (conv.in_channels, conv.out_channels, y.shape[-1])
        seen[key] = seen.get(key, 0) + 1

    for conv, _ in model.separable_layers():
        conv.register_forward_hook(count)
        for child in conv.convs:
            child.register_forward_hook(lambda m, args, y: pytest.fail(f"{m} ran by itself"))
    with torch.no_grad():
        model(torch.randn(1, 3, 299, 299))
    assert seen == {
        (64, 128, 147): 1, (128, 128, 147): 1, (128, 256, 74): 1, (256, 256, 74): 1, (256, 728, 37): 1,
        (728, 728, 37): 1, (728, 728, 19): 25, (728, 1024, 19): 1, (1024, 1536, 10): 1, (1536, 2048, 10): 1,
    }  # fmt: skip


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("size", [(71, 71), (73, 90)], ids=["71", "73x90"])
def test_features_in_float32(pair: tuple[Any, Any], size: tuple[int, int], channels_last: bool) -> None:
    ours, plain = pair
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(2, 3, *size).contiguous(memory_format=layout)
    assert_features_as_good(copy.deepcopy(ours).to(memory_format=layout), plain, x)


@pytest.mark.parametrize(
    "in_chans, pool, batch", [(1, "same", 1), (4, "torch", 2)], ids=["gray-same-batch1", "four-torch-batch2"]
)
def test_features_in_float64(in_chans: int, pool: str, batch: int) -> None:
    ours, plain = twins(in_chans=in_chans, pool=pool)
    ours, plain = ours.double(), plain.double()
    x = torch.randn(batch, in_chans, 73, 71, dtype=torch.float64)
    with torch.no_grad():
        got, expected = outputs(ours, x), plain(x)
    for name, t in expected.items():
        assert (got[name] - t).abs().max() <= 1e-12 * t.abs().max(), name


def test_full_size_with_keras_padding() -> None:
    """At 299 px the pool that goes from 74 to 37 is the one where the paddings part."""
    ours, plain = twins(pool="same")
    assert_features_as_good(ours, plain, torch.randn(1, 3, 299, 299).contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize("size", [(74, 74), (19, 37), (10, 7)], ids=["74", "19x37", "10x7"])
def test_same_pool_is_tensorflows(size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size) - 5
    same = MaxPool("same")(x)
    assert torch.equal(same, tensorflow_pool(x))
    assert same.shape[2:] == MaxPool("torch")(x).shape[2:] == tuple((n + 1) // 2 for n in size)
    assert torch.equal(same, MaxPool("torch")(x)) == all(n % 2 == 1 for n in size)


@pytest.mark.parametrize("pool", ["torch", "same"])
def test_gradients_in_training_float64(pool: str) -> None:
    ours, plain = twins(pool=pool)
    ours, plain = ours.double().train(), plain.double().train()
    x = torch.randn(2, 3, 73, 71, dtype=torch.float64)
    target = torch.tensor([1, 3])
    F.cross_entropy(ours(x), target).backward()
    F.cross_entropy(plain(x)["logits"], target).backward()
    named = dict(ours.named_parameters())
    compared = 0
    for key, p in plain.named_parameters():
        got, expected = named[timm_name(key.removeprefix("parts."))].grad, p.grad
        assert got is not None and expected is not None
        assert (got - expected).norm() <= 1e-10 * expected.norm() + 1e-15, key
        compared += 1
    assert compared == len(named)
    state = ours.state_dict()
    for key, buffer in plain.named_buffers():
        torch.testing.assert_close(state[timm_name(key.removeprefix("parts."))], buffer, rtol=1e-12, atol=1e-12)


def test_gradients_in_float32(pair: tuple[Any, Any]) -> None:
    """Each parameter's gradient, its error relative to its own size, against float64."""
    ours, plain = (copy.deepcopy(m) for m in pair)
    x = torch.randn(2, 3, 79, 71)
    dy = torch.randn(2, 5)
    seen, plain.seen = watch(ours), {}
    ours(x).backward(dy)
    plain(x)["logits"].backward(dy)
    truths = [gradients_of_these_choices(pair[1], s, x, dy) for s in (seen, plain.seen)]
    named = dict(ours.named_parameters())
    for (key, own), truth, theirs in zip(plain.named_parameters(), *truths, strict=True):
        got = named[timm_name(key.removeprefix("parts."))].grad
        assert got is not None and own.grad is not None
        error, allowed = (got - truth).norm() / truth.norm(), 2 * (own.grad - theirs).norm() / theirs.norm()
        assert error <= allowed + ULPS * torch.finfo(torch.float32).eps, f"{key}: {error:.3g} > {allowed:.3g}"


def test_folding_changes_rounding_only(pair: tuple[Any, Any]) -> None:
    model = copy.deepcopy(pair[0])
    ran: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda m, args, y, name=name: ran.append(name))
    x = torch.randn(2, 3, 73, 75)
    with torch.no_grad():
        before = outputs(model, x)
        assert len(ran) == 40
        ran.clear()
        assert model.fold_batchnorm() is model
        after = outputs(model, x)
        assert ran == ["bn1", "bn2", "block1.skipbn", "block2.skipbn", "block3.skipbn", "block12.skipbn"]
        for name, y in before.items():
            # What block14_sepconv1 names is the input of the last layer: folded or not, after its ReLU.
            assert (after[name] - y).abs().max() <= 1e-5 * y.abs().max(), name
        assert any(not torch.equal(after[name], before[name]) for name in before)
        model.unfold_batchnorm()
        for name, y in outputs(model, x).items():
            assert torch.equal(y, before[name])


def test_folding_is_dropped_by_train_and_by_loading(pair: tuple[Any, Any]) -> None:
    model, other = copy.deepcopy(pair[0]), twins()[0]
    x = torch.randn(1, 3, 71, 71)
    keys = list(model.state_dict())

    def folded() -> int:
        return sum(bn.folded_scale is not None for _, bn in model.separable_layers())

    with torch.no_grad():
        model.fold_batchnorm()
        assert folded() == 34 and list(model.state_dict()) == keys
        assert folded() == 34 and model.eval() is model
        twin = copy.deepcopy(model)
        assert torch.equal(twin(x), model(x))
        model.load_state_dict(other.state_dict())
        assert folded() == 0
        torch.testing.assert_close(model(x), other(x), rtol=0, atol=0)
        model.fold_batchnorm().block4.load_state_dict(pair[0].block4.state_dict())
        assert folded() == 31
        model.fold_batchnorm().train()
        assert folded() == 0
    with pytest.raises(RuntimeError, match="eval"):
        model.fold_batchnorm()


def test_folded_model_can_be_moved_to_another_type(pair: tuple[Any, Any]) -> None:
    model = copy.deepcopy(pair[0]).double()
    x = torch.randn(1, 3, 71, 71, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        folded = copy.deepcopy(model).fold_batchnorm()
        assert (folded(x) - expected).abs().max() <= 1e-12 * expected.abs().max()
        half = copy.deepcopy(model).bfloat16()
        unfolded = half(x.bfloat16())
        y = half.fold_batchnorm()(x.bfloat16())
        assert y.dtype == torch.bfloat16 and bool(y.isfinite().all())
        assert (y - expected).norm() <= 2 * (unfolded - expected).norm() + 1e-2 * expected.norm()


def test_features_heads_and_options(pair: tuple[Any, Any]) -> None:
    model = pair[0]
    x = torch.randn(2, 3, 71, 100)
    with torch.no_grad():
        maps = model.features(x)
        assert [tuple(f.shape) for f in maps] == [
            (2, 64, 33, 47), (2, 128, 17, 24), (2, 256, 9, 12), (2, 728, 5, 6), (2, 2048, 3, 3),
        ]  # fmt: skip
        known = outputs(model, x)
        for got, name in zip(maps, ("block1", "block2", "block3", "block12", "block14_sepconv2"), strict=True):
            assert torch.equal(got, known[name])
        assert torch.equal(model.forward_head(maps[-1]), known["logits"]) and known["logits"].shape == (2, 5)
        pooled = model.forward_head(maps[-1], pre_logits=True)
        torch.testing.assert_close(pooled, maps[-1].mean((2, 3)))
        headless = xception(num_classes=0)
        missing = headless.load_state_dict(model.state_dict(), strict=False)
        assert missing.missing_keys == [] and missing.unexpected_keys == ["fc.weight", "fc.bias"]
        torch.testing.assert_close(headless.eval()(x), pooled)


def test_drop_rate_acts_in_training_only() -> None:
    model = xception(num_classes=0, drop_rate=0.5)
    x = torch.ones(1, 2048, 3, 3)
    dropped = model.train().forward_head(x)
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(model.eval().forward_head(x), torch.ones(1, 2048))


def test_bn_eps_reaches_every_batchnorm() -> None:
    eps = {m.eps for m in xception(bn_eps=1e-3).modules() if isinstance(m, nn.BatchNorm2d)}
    assert eps == {1e-3}


@pytest.mark.parametrize(
    "x, why",
    [
        pytest.param(torch.zeros(1, 3, 70, 299), "70x299", id="70-high"),
        pytest.param(torch.zeros(1, 3, 71, 70), "71x70", id="70-wide"),
        pytest.param(torch.zeros(1, 1, 71, 71), r"\[N, 3, H, W\]", id="channels"),
        pytest.param(torch.zeros(3, 71, 71), r"\[3, 71, 71\]", id="unbatched"),
    ],
)
def test_unfit_pictures_are_refused(pair: tuple[Any, Any], x: Tensor, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        pair[0](x)


@pytest.mark.parametrize(
    "options, why",
    [
        (dict(num_classes=-1), "num_classes"),
        (dict(in_chans=0), "in_chans"),
        (dict(drop_rate=1.0), "drop_rate"),
        (dict(bn_eps=0.0), "bn_eps"),
        (dict(pool_padding="valid"), "pool_padding.*valid"),
        (dict(backend="metal"), "backend.*metal"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_unknown_options_are_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        xception(**options)


def test_traces_into_one_graph(pair: tuple[Any, Any]) -> None:
    model = copy.deepcopy(pair[0])
    x = torch.randn(2, 3, 71, 71)
    with torch.no_grad():
        for folded in (False, True):
            if folded:
                model.fold_batchnorm()
            torch._dynamo.reset()
            compiled = torch.compile(model, fullgraph=True, backend="eager")
            expected = model(x)
            assert (compiled(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
