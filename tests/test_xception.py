"""Xception: its names and numbers, and feature-by-feature equality with one written in plain PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Optional

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xsep.models import xception
from xsep.models.xception import MaxPool
from xsep.modules import FusedSeparableConv2d

ULPS = 8


def tensorflow_pool(x: Tensor) -> Tensor:
    """3x3, stride 2, SAME: an even size is padded at the far end only, an odd one at both."""
    pads = [side for size in (x.shape[3], x.shape[2]) for side in ((0, 1) if size % 2 == 0 else (1, 1))]
    return F.max_pool2d(F.pad(x, pads, value=-torch.inf), 3, 2)


class PlainXception(nn.Module):
    """From the paper's table, in nn.Conv2d, ReLU and MaxPool; modules are called as in the author's own code."""

    #: module number -> output channels of its separable convolutions, and whether a ReLU precedes the first
    TABLE: ClassVar[dict[int, tuple[tuple[int, ...], bool]]] = {
        2: ((128, 128), False),
        3: ((256, 256), True),
        4: ((728, 728), True),
        **{k: ((728, 728, 728), True) for k in range(5, 13)},
        13: ((728, 1024), True),
    }

    def __init__(self, num_classes: int, in_chans: int, pool: str) -> None:
        super().__init__()
        self.pool = pool
        self.seen: Optional[dict[str, Tensor]] = None
        self.choices: dict[str, Tensor] = {}
        self.parts = nn.ModuleDict()
        self._conv("block1_conv1", nn.Conv2d(in_chans, 32, 3, stride=2, bias=False))
        self._conv("block1_conv2", nn.Conv2d(32, 64, 3, bias=False))
        c = 64
        for k, (widths, _) in self.TABLE.items():
            if k in (2, 3, 4, 13):
                self._conv(f"block{k}_residual", nn.Conv2d(c, widths[-1], 1, stride=2, bias=False))
            for j, width in enumerate(widths, 1):
                self._separable(f"block{k}_sepconv{j}", c, width)
                c = width
        self._separable("block14_sepconv1", 1024, 1536)
        self._separable("block14_sepconv2", 1536, 2048)
        self.parts["predictions"] = nn.Linear(2048, num_classes)

    def _conv(self, name: str, conv: Any) -> None:
        self.parts[name] = conv
        width: Any = conv[-1].out_channels if hasattr(conv, "append") else conv.out_channels
        self.parts[f"{name}_bn"] = nn.BatchNorm2d(width)

    def _separable(self, name: str, c_in: int, c_out: int) -> None:
        depthwise = nn.Conv2d(c_in, c_in, 3, padding=1, groups=c_in, bias=False)
        self._conv(name, nn.Sequential(depthwise, nn.Conv2d(c_in, c_out, 1, bias=False)))

    def _run(self, name: str, x: Tensor) -> Tensor:
        return self.parts[f"{name}_bn"](self.parts[name](x))

    def _note(self, name: str, x: Tensor) -> None:
        if self.seen is not None:
            self.seen[name] = x.detach()

    def _relu(self, name: str, x: Tensor) -> Tensor:
        self._note(name, x)
        return x * self.choices[name] if self.choices else torch.relu(x)

    def _pool(self, name: str, x: Tensor) -> Tensor:
        self._note(name, x)
        if self.choices:
            index = self.choices[name]
            return x.flatten(2).gather(2, index.flatten(2)).view(index.shape)
        return F.max_pool2d(x, 3, 2, 1) if self.pool == "torch" else tensorflow_pool(x)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """The outputs of all fourteen modules, and the logits.

        ``seen``, where it is a dictionary, then holds what each ReLU and pool was given. Where there are ``choices``,
        each takes those of its name and not its own.
        """
        outputs = {}
        for j in (1, 2):
            x = self._relu(f"block1_conv{j}", self._run(f"block1_conv{j}", x))
        outputs["block1"] = x
        for k, (widths, relu_first) in self.TABLE.items():
            y = x
            for j in range(1, len(widths) + 1):
                name = f"block{k}_sepconv{j}"
                y = self._run(name, self._relu(name, y) if relu_first or j > 1 else y)
            x = self._pool(f"block{k}_pool", y) + self._run(f"block{k}_residual", x) if k in (2, 3, 4, 13) else y + x
            outputs[f"block{k}"] = x
        for j in (1, 2):
            name = f"block14_sepconv{j}"
            x = self._relu(name, self._run(name, x))
            outputs[name] = x
        outputs["logits"] = self.parts["predictions"](x.mean((2, 3)))
        return outputs


def timm_name(plain: str) -> str:
    """Keras-style module name -> timm's, by the published rule."""
    name, *rest = plain.split(".")
    bn = name.endswith("_bn")
    name = name.removesuffix("_bn")
    leaf = rest[-1]
    if name == "predictions":
        return f"fc.{leaf}"
    number, kind = int(name.split("_")[0].removeprefix("block")), name.split("_")[1]
    depthwise_or_not = {"0": ".conv1", "1": ".pointwise"}.get(rest[0], "")
    if number == 1:
        return f"{'bn' if bn else 'conv'}{kind[-1]}.{leaf}"
    if number == 14:
        return f"{'bn' if bn else 'conv'}{int(kind[-1]) + 2}{depthwise_or_not}.{leaf}"
    if kind == "residual":
        return f"block{number - 1}.{'skipbn' if bn else 'skip'}.{leaf}"
    index = 3 * (int(kind[-1]) - 1) + (0 if number == 2 else 1) + (1 if bn else 0)
    return f"block{number - 1}.rep.{index}{depthwise_or_not}.{leaf}"


def timm_keys() -> Iterator[str]:
    """Every key of timm's legacy_xception, as a rule."""

    def bn(name: str) -> Iterator[str]:
        for leaf in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            yield f"{name}.{leaf}"

    def sepconv(name: str) -> Iterator[str]:
        yield f"{name}.conv1.weight"
        yield f"{name}.pointwise.weight"

    for i in (1, 2):
        yield f"conv{i}.weight"
        yield from bn(f"bn{i}")
    for i in range(1, 13):
        first = (0, 3) if i == 1 else (1, 4) if i in (2, 3, 12) else (1, 4, 7)
        for index in first:
            yield from sepconv(f"block{i}.rep.{index}")
            yield from bn(f"block{i}.rep.{index + 1}")
        if i in (1, 2, 3, 12):
            yield f"block{i}.skip.weight"
            yield from bn(f"block{i}.skipbn")
    for i in (3, 4):
        yield from sepconv(f"conv{i}")
        yield from bn(f"bn{i}")
    yield from ("fc.weight", "fc.bias")


def randomize(model: nn.Module) -> None:
    """BatchNorms as training might leave them: nothing at its initial 0 or 1."""
    batchnorms: list[Any] = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for bn in batchnorms:
        for tensor, low, high in (
            (bn.weight, 0.5, 1.2), (bn.bias, -0.3, 0.3), (bn.running_mean, -0.3, 0.3), (bn.running_var, 0.5, 2.0),
        ):  # fmt: skip
            nn.init.uniform_(tensor, low, high)


def twins(num_classes: int = 5, in_chans: int = 3, pool: str = "torch") -> tuple[Any, Any]:
    """The same weights in both."""
    ours = xception(num_classes=num_classes, in_chans=in_chans, pool_padding=pool)
    randomize(ours)
    plain = PlainXception(num_classes, in_chans, pool)
    state = ours.state_dict()
    plain.load_state_dict({k: state[timm_name(k.removeprefix("parts."))] for k in plain.state_dict()})
    return ours.eval(), plain.eval()


def outputs(model: Any, x: Tensor) -> dict[str, Tensor]:
    """As PlainXception gives them, by hooks."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, y: Tensor) -> None:
            found[name] = y

        return hook

    handles = [getattr(model, f"block{k - 1}").register_forward_hook(keep(f"block{k}")) for k in range(2, 14)]
    handles.append(model.block1.register_forward_pre_hook(lambda module, args: found.update(block1=args[0])))
    handles.append(model.conv4.register_forward_pre_hook(lambda module, args: found.update(block14_sepconv1=args[0])))
    found["block14_sepconv2"] = model.forward_features(x)
    for handle in handles:
        handle.remove()
    found["logits"] = model.forward_head(found["block14_sepconv2"])
    return found


def watch(model: Any) -> dict[str, Tensor]:
    """PlainXception's ``seen`` of the model's next run."""
    seen: dict[str, Tensor] = {}

    def given(module: nn.Module, name: str) -> None:
        module.register_forward_pre_hook(lambda m, args: seen.update({name: args[0].detach()}))

    def made(module: nn.Module, name: str) -> None:
        module.register_forward_hook(lambda m, args, y: seen.update({name: y.detach()}))

    for module, name in ((model.bn1, "1_conv1"), (model.bn2, "1_conv2"), (model.bn3, "14_sepconv1"),
                         (model.bn4, "14_sepconv2")):  # fmt: skip
        made(module, f"block{name}")
    for k in range(2, 14):
        block = getattr(model, f"block{k - 1}")
        for j, (conv, _) in enumerate(block.pairs(), 1):
            if conv.prologue_activation is not None:
                given(conv, f"block{k}_sepconv{j}")
        if isinstance(block.pool, MaxPool):
            given(block.pool, f"block{k}_pool")
    return seen


def choices_of(seen: dict[str, Tensor]) -> dict[str, Tensor]:
    """Which values each ReLU lets pass, and which each pool takes."""
    return {
        name: F.max_pool2d(u, 3, 2, 1, return_indices=True)[1] if name.endswith("pool") else u > 0
        for name, u in seen.items()
    }


def gradients_of_these_choices(plain: Any, seen: dict[str, Tensor], x: Tensor, dy: Tensor) -> list[Tensor]:
    """In float64, of the very function that a run in float32 computed.

    Of some million values a few lie within float32's rounding of a ReLU's kink or of another one in a pool's window.
    On which side each of them falls is open, and moves whole gradients; that they lie so near is checked.
    """
    wide = copy.deepcopy(plain).double()
    wide.seen, wide.choices = {}, choices_of(seen)
    wide(x.double())["logits"].backward(dy.double())
    assert wide.seen.keys() == seen.keys() and len(seen) == 4 + 31 + 4
    for name, u in wide.seen.items():
        chosen = wide.choices[name]
        if name.endswith("pool"):
            lost = F.max_pool2d(u, 3, 2, 1) - u.flatten(2).gather(2, chosen.flatten(2)).view(chosen.shape)
        else:
            lost = u * ((u > 0).double() - chosen.double())
        assert lost.abs().max() <= 1e-5 * u.abs().max(), name
    return [p.grad for p in wide.parameters()]


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
