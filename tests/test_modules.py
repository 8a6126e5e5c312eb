"""The layer: the arithmetic of two nn.Conv2d, their parameters, and every way nn.Module lets one be handled."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import xsep
from xsep.modules import FusedSeparableConv2d, not_a_pair_reasons

ULPS = 8


def layer(**kwargs: Any) -> Any:
    """Seven channels to five, odd on purpose."""
    arguments: dict[str, Any] = dict(in_channels=7, out_channels=5, kernel_size=3, padding=1)
    return FusedSeparableConv2d(**{**arguments, **kwargs})


def picture(*shape: int, **kwargs: Any) -> Tensor:
    return torch.randn(*(shape or (2, 7, 11, 13)), **kwargs)


def results(run: Any, x: Tensor, parameters: list[Tensor], dy: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = run(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *parameters], dy)]


def assert_as_good(ours: Any, theirs: Any, x: Tensor) -> None:
    """Output and all gradients against float64: at most twice PyTorch's own error, plus a few ulp.

    ``theirs(module, x)`` is the plain composition on ours' children, so that one function serves both precisions.
    """
    dy = torch.randn_like(ours(x))
    wide = copy.deepcopy(ours).double()
    truth = results(lambda v: theirs(wide, v), x.double(), list(wide.parameters()), dy.double())
    own = results(lambda v: theirs(ours, v), x, list(ours.parameters()), dy)
    got = results(ours, x, list(ours.parameters()), dy)
    names = ["y", "dx", *(f"d{name}" for name, _ in ours.named_parameters())]
    assert len(names) == len(truth)
    for name, g, o, t in zip(names, got, own, truth, strict=True):
        bound = 2 * (o - t).abs().max() + ULPS * torch.finfo(x.dtype).eps * t.abs().max()
        assert (g - t).abs().max() <= bound, f"{name}: {(g - t).abs().max():.3g} > {bound:.3g}"


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param(dict(kernel_size=(5, 3), padding=(2, 1), bias=False), id="rectangular-no-bias"),
        pytest.param(dict(stride=2), id="stride-2"),
        pytest.param(dict(stride=(1, 2), dilation=(2, 1), padding=(2, 1)), id="uneven-stride-dilation"),
        pytest.param(dict(padding="valid"), id="valid"),
        pytest.param(dict(padding="same", kernel_size=4), id="same-even-filter"),
        pytest.param(dict(depth_multiplier=3), id="multiplier-3"),
    ],
)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
def test_equals_two_convolutions(options: dict[str, Any], channels_last: bool) -> None:
    arguments = {"kernel_size": 3, "padding": 1, "bias": True, "depth_multiplier": 1, **options}
    ours = layer(**arguments)
    multiplier, bias = arguments.pop("depth_multiplier"), arguments.pop("bias")
    theirs = nn.Sequential(
        nn.Conv2d(7, 7 * multiplier, groups=7, bias=False, **arguments), nn.Conv2d(7 * multiplier, 5, 1, bias=bias)
    )

    def two(module: Any, x: Tensor) -> Tensor:
        parts = [p.reshape(q.shape) for p, q in zip(module.parameters(), theirs.parameters(), strict=True)]
        names = [name for name, _ in theirs.named_parameters()]
        return torch.func.functional_call(theirs, dict(zip(names, parts, strict=True)), x)

    x = picture()
    if channels_last:
        x, ours = x.contiguous(memory_format=torch.channels_last), ours.to(memory_format=torch.channels_last)
    assert_as_good(ours, two, x)
    assert ours(x).stride() == theirs.to(x)(x).stride() or not channels_last
    assert ours(x).is_contiguous(memory_format=torch.channels_last) or not channels_last


@pytest.mark.parametrize("size", [(10, 13), (11, 12)], ids=["even-odd", "odd-even"])
def test_same_padding_with_stride_pads_at_the_far_end(size: tuple[int, int]) -> None:
    ours = layer(padding="same", stride=2)
    x = picture(2, 7, *size)

    def two(module: Any, v: Tensor) -> Tensor:
        height, width = size
        v = F.pad(v, (width % 2, 1, height % 2, 1))
        return module.conv_pw(F.conv2d(v, module.conv_dw.weight, stride=2, groups=7))

    assert ours(x).shape[2:] == ((size[0] + 1) // 2, (size[1] + 1) // 2)
    assert_as_good(ours, two, x)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("stride", [1, 2])
def test_same_padding_in_jit_trace(stride: int) -> None:
    """Sizes are tensors there."""
    ours = layer(padding="same", stride=stride)
    traced = torch.jit.trace(ours, picture())
    x = torch.cat([picture(), picture()])
    torch.testing.assert_close(traced(x), ours(x))


def test_explicit_padding_is_left_right_top_bottom() -> None:
    ours = layer(padding=(3, 0, 1, 2))
    assert_as_good(
        ours,
        lambda m, v: m.conv_pw(F.conv2d(F.pad(v, (3, 0, 1, 2)), m.conv_dw.weight, groups=7)),
        picture(),
    )


def test_four_ints_that_are_symmetric_are_the_pair_of_the_child() -> None:
    ours = layer(padding=(2, 2, 1, 1))
    assert ours.padding == (1, 2) == ours.conv_dw.padding


def test_activations_stand_where_they_are_said_to() -> None:
    ours = layer(prologue_activation="silu", middle_activation="leaky_relu", middle_alpha=0.3)
    x = picture()
    while ours.conv_dw(F.silu(x)).abs().min() < 1e-5:
        x = picture()  # within rounding of the kink either slope would be right; of 20 pictures one has such a value
    assert_as_good(ours, lambda m, v: m.conv_pw(F.leaky_relu(m.conv_dw(F.silu(v)), 0.3)), x)


def test_depthwise_bias_is_added_before_the_middle_activation() -> None:
    ours = FusedSeparableConv2d.from_convs(
        nn.Conv2d(7, 14, 3, padding=1, groups=7), nn.Conv2d(14, 5, 1), middle_activation="hardswish"
    )
    assert_as_good(ours, lambda m, v: m.conv_pw(F.hardswish(m.conv_dw(v))), picture())


def test_forward_takes_prologue_epilogue_and_residual() -> None:
    ours = layer(prologue_activation="relu")
    scale, shift, out_scale, out_shift = torch.randn(7), torch.randn(7), torch.randn(5), torch.randn(5)
    residual = torch.randn(2, 5, 11, 13)
    x = picture()
    y = ours(
        x,
        prologue=xsep.ChannelAffine(scale, shift),
        epilogue=xsep.ChannelAffine(out_scale, out_shift, "relu6"),
        residual=residual,
    )
    wide = copy.deepcopy(ours).double()

    def plain(m: Any, dtype: torch.dtype) -> Tensor:
        def column(v: Tensor) -> Tensor:
            return v.to(dtype)[:, None, None]

        v = m.conv_pw(m.conv_dw(F.relu(x.to(dtype) * column(scale) + column(shift))))
        return F.relu6(v * column(out_scale) + column(out_shift) + residual.to(dtype))

    truth = plain(wide, torch.float64)
    own = (plain(ours, torch.float32) - truth).abs().max()
    assert (y - truth).abs().max() <= 2 * own + ULPS * torch.finfo(torch.float32).eps * truth.abs().max()


def test_two_prologue_activations_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'silu'.*prologue_activation='relu'"):
        layer(prologue_activation="relu")(picture(), prologue=xsep.ChannelAffine(activation="silu"))


def test_children_are_initialised_as_pytorch_would() -> None:
    torch.manual_seed(3)
    ours = layer(depth_multiplier=2)
    torch.manual_seed(3)
    dw, pw = nn.Conv2d(7, 14, 3, groups=7, bias=False), nn.Conv2d(14, 5, 1)
    assert torch.equal(ours.conv_dw.weight, dw.weight)
    assert torch.equal(ours.conv_pw.weight, pw.weight)
    assert pw.bias is not None and torch.equal(ours.conv_pw.bias, pw.bias)
    before = ours.conv_dw.weight.clone()
    ours.reset_parameters()
    assert not torch.equal(ours.conv_dw.weight, before)


def test_state_dict_keys_and_other_names() -> None:
    assert list(layer().state_dict()) == ["conv_dw.weight", "conv_pw.weight", "conv_pw.bias"]
    for names in (("conv1", "pointwise"), ("0", "1"), ("depthwise", "project")):
        named = layer(child_names=names)
        assert list(named.state_dict()) == [f"{names[0]}.weight", f"{names[1]}.weight", f"{names[1]}.bias"]
        assert named(picture()).shape == (2, 5, 11, 13)
        assert named.convs == (named.get_submodule(names[0]), named.get_submodule(names[1]))


@pytest.mark.parametrize(
    "names", [
        ("a", "a"), ("forward", "b"), ("", "b"), ("a.b", "c"), ("convs", "b"), ("a", "stride"), ("a",), ("a", 5),
        "ab", {"a": 1, "b": 2}, 5, None,
    ], ids=str,
)  # fmt: skip
def test_impossible_child_names_are_refused(names: Any) -> None:
    with pytest.raises(ValueError, match="child_names"):
        layer(child_names=names)


def test_from_convs_shares_the_very_same_modules() -> None:
    pair: Any = nn.Sequential(nn.Conv2d(7, 14, (3, 5), (2, 1), (1, 2), groups=7), nn.Conv2d(14, 5, 1)).eval()
    ours = FusedSeparableConv2d.from_convs(pair[0], pair[1], child_names=("0", "1"))
    assert ours.convs == (pair[0], pair[1])
    assert not ours.training
    assert list(ours.state_dict()) == list(pair.state_dict())
    assert_as_good(ours, lambda m, v: m.get_submodule("1")(m.get_submodule("0")(v)), picture())
    with torch.no_grad():
        pair[0].weight.mul_(2)
    x = picture()
    torch.testing.assert_close(ours(x), pair(x), rtol=1e-5, atol=1e-5)


class OwnForward(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class OwnConvForward(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Any) -> Tensor:
        return super()._conv_forward(x, weight - weight.mean(), bias)


class MerelyNamed(nn.Conv2d):
    pass


def hooked(conv: nn.Conv2d) -> nn.Conv2d:
    conv.register_forward_hook(lambda module, args, output: output * 2)
    return conv


def dw(**kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(**{**dict(in_channels=6, out_channels=6, kernel_size=3, groups=6), **kwargs})


@pytest.mark.parametrize(
    "conv_dw, conv_pw, why",
    [
        pytest.param(dw(groups=3), nn.Conv2d(6, 5, 1), "conv_dw has groups=3", id="groups"),
        pytest.param(dw(), nn.Conv2d(6, 5, 3), r"conv_pw has kernel_size=\(3, 3\)", id="pointwise-3x3"),
        pytest.param(dw(), nn.Conv2d(6, 5, 1, stride=2), r"conv_pw has stride=\(2, 2\)", id="pointwise-stride"),
        pytest.param(dw(), nn.Conv2d(6, 5, 1, padding=1), r"conv_pw has padding=\(1, 1\)", id="pointwise-padding"),
        pytest.param(dw(), nn.Conv2d(6, 6, 1, groups=2), "conv_pw has groups=2", id="pointwise-groups"),
        pytest.param(dw(), nn.Conv2d(8, 5, 1), "conv_pw takes 8 channels, but conv_dw gives 6", id="channels"),
        pytest.param(dw(padding_mode="reflect", padding=1), nn.Conv2d(6, 5, 1), "padding_mode='reflect'", id="reflect"),
        pytest.param(dw(), nn.Linear(6, 5), "conv_pw is a Linear", id="linear"),
        pytest.param(OwnForward(6, 6, 3, groups=6), nn.Conv2d(6, 5, 1), "OwnForward with a forward", id="own-forward"),
        pytest.param(dw(), OwnConvForward(6, 5, 1), "OwnConvForward with a forward", id="own-conv-forward"),
        pytest.param(hooked(dw()), nn.Conv2d(6, 5, 1), "conv_dw has hooks", id="hooked"),
        pytest.param(dw(dtype=torch.float64), nn.Conv2d(6, 5, 1), "float64", id="dtypes"),
        pytest.param(dw(), nn.Conv2d(6, 5, 1, device="meta"), "meta", id="devices"),
    ],
)
def test_from_convs_says_why_not(conv_dw: Any, conv_pw: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        FusedSeparableConv2d.from_convs(conv_dw, conv_pw)


def test_from_convs_gives_all_reasons_and_takes_a_subclass_without_a_forward() -> None:
    reasons = not_a_pair_reasons(dw(groups=2), nn.Conv2d(8, 5, 3, stride=2, padding=1))
    assert len(reasons) == 5
    assert not_a_pair_reasons(MerelyNamed(6, 6, 3, groups=6), nn.Conv2d(6, 5, 1)) == []


@pytest.mark.parametrize(
    "options, why",
    [
        pytest.param(dict(padding_mode="circular"), "circular", id="padding_mode"),
        pytest.param(dict(padding="full"), "full", id="padding-word"),
        pytest.param(dict(padding=-1), "padding", id="padding-negative"),
        pytest.param(dict(padding=(1, 2, 3)), "padding", id="padding-three"),
        pytest.param(dict(padding=(0, -1, 0, 0)), "padding", id="padding-four-negative"),
        pytest.param(dict(stride=0), "stride", id="stride"),
        pytest.param(dict(dilation=0), "dilation", id="dilation"),
        pytest.param(dict(kernel_size=0), "kernel_size", id="kernel"),
        pytest.param(dict(in_channels=0), "in_channels", id="in_channels"),
        pytest.param(dict(out_channels=0), "out_channels", id="out_channels"),
        pytest.param(dict(depth_multiplier=0), "depth_multiplier", id="multiplier"),
        pytest.param(dict(in_channels="8"), "in_channels must be an int, got '8'", id="in_channels-text"),
        pytest.param(dict(in_channels=8.0), "in_channels must be an int, got 8.0", id="in_channels-float"),
        pytest.param(dict(in_channels=True), "in_channels must be an int, got True", id="in_channels-bool"),
        pytest.param(dict(out_channels=8.0), "out_channels must be an int, got 8.0", id="out_channels-float"),
        pytest.param(dict(out_channels=None), "out_channels must be an int, got None", id="out_channels-none"),
        pytest.param(dict(depth_multiplier=1.5), "depth_multiplier must be an int, got 1.5", id="multiplier-float"),
        pytest.param(dict(stride=True), "stride must be an int or a pair of ints, got True", id="stride-bool"),
        pytest.param(dict(stride=np.int64(0)), "stride must be at least 1", id="stride-numpy"),
        pytest.param(dict(kernel_size=np.float32(3)), "kernel_size must be an int or a pair", id="kernel-numpy-float"),
        pytest.param(dict(middle_activation="mish"), "middle_activation.*mish", id="middle"),
        pytest.param(dict(prologue_activation="identity"), "prologue_activation.*identity", id="prologue"),
        pytest.param(dict(middle_activation="relu", middle_alpha=0.1), "middle_alpha", id="alpha-of-relu"),
        pytest.param(dict(prologue_alpha=0.1), "prologue_alpha", id="alpha-of-nothing"),
        pytest.param(
            dict(middle_activation="elu", middle_alpha="foo"), "middle_alpha must be a finite real number, got 'foo'",
            id="alpha-word",
        ),
        pytest.param(dict(middle_activation="elu", middle_alpha="1"), "middle_alpha must be .*'1'", id="alpha-text"),
        pytest.param(
            dict(prologue_activation="leaky_relu", prologue_alpha=float("nan")), "prologue_alpha must be .* got nan",
            id="alpha-nan",
        ),
        pytest.param(dict(backend="metal"), "backend.*metal", id="backend"),
    ],
)  # fmt: skip
def test_constructor_names_what_cannot_be_meant(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        layer(**options)


def test_from_convs_refuses_an_alpha_that_is_no_number() -> None:
    with pytest.raises(ValueError, match="middle_alpha must be a finite real number, got inf"):
        FusedSeparableConv2d.from_convs(dw(), nn.Conv2d(6, 5, 1), middle_activation="elu", middle_alpha=float("inf"))


@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*")
@pytest.mark.parametrize("way", ["constructor", "from_convs"])
def test_numbers_of_numpy_are_taken_as_conv2d_takes_them(way: str) -> None:
    """And kept as Python's, which the compiler takes too."""
    one, two, three = np.int64(1), np.int32(2), np.uint8(3)
    options: dict[str, Any] = dict(middle_activation="elu", middle_alpha=np.float32(0.25))
    if way == "constructor":
        ours: Any = FusedSeparableConv2d(
            np.int64(7), np.int64(5), three, two, (one, two, one, one), one, depth_multiplier=two, **options
        )
        padding: Any = (1, 2, 1, 1)
    else:
        conv_dw = nn.Conv2d(7, 14, (3, 3), two, one, one, groups=7)
        ours, padding = FusedSeparableConv2d.from_convs(conv_dw, nn.Conv2d(14, 5, 1), **options), (1, 1)
    plain: Any = FusedSeparableConv2d(
        7, 5, 3, 2, padding, 1, depth_multiplier=2, middle_activation="elu", middle_alpha=0.25
    )
    if way == "from_convs":
        plain.conv_dw.bias = nn.Parameter(torch.empty(14))
    plain.load_state_dict(ours.state_dict())
    assert ours.extra_repr() == plain.extra_repr() and "int64" not in ours.extra_repr()
    x = picture()
    assert torch.equal(ours(x), plain(x))
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), plain(x), rtol=1e-5, atol=1e-6)


def test_extra_repr_reads_like_conv2d() -> None:
    text = repr(layer(padding="same", stride=2, depth_multiplier=2, bias=False, middle_activation="relu"))
    assert text.startswith(
        "FusedSeparableConv2d(\n  7, 5, kernel_size=(3, 3), stride=(2, 2), padding='same', depth_multiplier=2, "
        "bias=False, middle_activation='relu'\n"
    )
    assert "padding" not in FusedSeparableConv2d(7, 5, 3).extra_repr()


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save", "state_dict"])
def test_copies_compute_the_same_and_are_apart(way: str) -> None:
    ours = layer(middle_activation="elu", child_names=("a", "b"), padding=(0, 1, 1, 0))
    x = picture()
    expected = ours(x).detach()
    if way == "deepcopy":
        twin = copy.deepcopy(ours)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(ours))
    elif way == "save":
        file = io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = layer(middle_activation="elu", child_names=("a", "b"), padding=(0, 1, 1, 0))
        assert not torch.equal(twin(x), expected)
        twin.load_state_dict(ours.state_dict())
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        next(twin.parameters()).add_(1)
    assert torch.equal(ours(x), expected)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_parametrised_weights_are_read_at_every_forward() -> None:
    ours = layer(bias=False)
    x = picture()
    before = ours(x)
    parametrize.register_parametrization(ours.conv_dw, "weight", Doubled())
    torch.testing.assert_close(ours(x), 2 * before, rtol=1e-5, atol=1e-6)
    ours(x).sum().backward()
    assert ours.conv_dw.parametrizations.weight.original.grad is not None
    rebuilt = FusedSeparableConv2d.from_convs(ours.conv_dw, ours.conv_pw)
    torch.testing.assert_close(rebuilt(x), ours(x))


@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*")
def test_compiles_without_a_graph_break() -> None:
    ours = layer(prologue_activation="relu", child_names=("conv1", "pointwise"))
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 5):
        x = picture(batch, 7, 9, 8)
        dy = torch.randn(batch, 5, 9, 8)
        plain = results(ours, x, list(ours.parameters()), dy)
        for got, expected in zip(results(compiled, x, list(ours.parameters()), dy), plain, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_meta_device_and_half_types() -> None:
    ours = layer(device="meta", dtype=torch.bfloat16)
    assert ours(torch.empty(3, 7, 8, 8, device="meta", dtype=torch.bfloat16)).shape == (3, 5, 8, 8)
    real = ours.to_empty(device="cpu")
    real.reset_parameters()
    assert real(picture(dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_autocast_casts_as_conv2d_does() -> None:
    ours = layer()
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(picture())
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert ours.conv_dw.weight.grad is not None and ours.conv_dw.weight.grad.dtype == torch.float32


def test_an_unbatched_picture_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="x must be"):
        layer()(torch.randn(7, 9, 9))
