"""The layer: a depthwise and a pointwise convolution that run as one op."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn

from .arguments import BACKEND_NAMES, ChannelAffine, Padding, Pair, finite, pair, sides, whole
from .backends.packed_weights import kept
from .functional import separable_conv2d
from .problem import ACTIVATIONS, DEFAULT_ALPHA

CHILD_NAMES = ("conv_dw", "conv_pw")


class FusedSeparableConv2d(nn.Module):
    """A depthwise convolution followed by a pointwise one, as one op whose middle tensor is never kept.

    It stands where ``nn.Sequential(nn.Conv2d(C_in, C_mid, k, groups=C_in), nn.Conv2d(C_mid, C_out, 1))`` stood, with
    the same parameters under the same names: two plain ``nn.Conv2d`` children hold them, initialised as PyTorch does.
    On a CPU, in eval mode and without gradients, the layer keeps its pointwise weights packed as the kernel reads
    them, as large again as they are, while their values stay the same, which a checksum tells;
    :func:`xsep.forget_packed_weights` gives that memory back.

    The children are holders, they are not called: forward hooks put on them do not run, and a reparametrisation must
    be one of :mod:`torch.nn.utils.parametrize` (the older hook-based ones would not be seen).

    ``bias=True`` is the pointwise bias. The depthwise convolution has none, because a per-channel constant between two
    linear maps is only another bias of the second, ``w_pw @ b``. Where an activation stands between them it would not
    be redundant: :meth:`from_convs` takes a depthwise convolution with a bias, and adds it before that activation.

    Args:
        in_channels: C_in, channels of the input.
        out_channels: C_out, channels of the output.
        kernel_size: depthwise filter, R = S or (R, S).
        stride: of the depthwise convolution, an int or (vertical, horizontal).
        padding: an int, (vertical, horizontal), explicit (left, right, top, bottom), ``"valid"``, or ``"same"``
            (TensorFlow's rule, at any stride). Pads with zeros after the prologue. Where ``nn.Conv2d`` has no such
            padding the depthwise child says 0: the layer's own attribute rules.
        dilation: of the depthwise convolution, an int or (vertical, horizontal).
        bias: whether the pointwise convolution has a bias.
        padding_mode: only ``"zeros"``.
        device: where the parameters are made.
        dtype: of the parameters.
        depth_multiplier: C_mid = C_in * depth_multiplier.
        middle_activation: applied between the two convolutions; None, relu, relu6, silu, hardswish, gelu, gelu_tanh,
            elu or leaky_relu.
        prologue_activation: applied to the input; likewise.
        middle_alpha: alpha of an elu (default 1.0), slope of a leaky_relu (default 0.01) in the middle.
        prologue_alpha: likewise, in the prologue.
        backend: which backend runs the op; None for the fastest there is.
        child_names: under which names the depthwise and the pointwise convolution are registered, so that
            ``state_dict`` keys can stay what they were.

    Raises:
        ValueError: an argument cannot be meant; the message names it.
    """

    conv_dw: nn.Conv2d  # under these names unless child_names says otherwise
    conv_pw: nn.Conv2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Padding = 0,
        dilation: Pair = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Optional[Union[torch.device, str]] = None,
        dtype: Optional[torch.dtype] = None,
        *,
        depth_multiplier: int = 1,
        middle_activation: Optional[str] = None,
        prologue_activation: Optional[str] = None,
        middle_alpha: Optional[float] = None,
        prologue_alpha: Optional[float] = None,
        backend: Optional[str] = None,
        child_names: tuple[str, str] = CHILD_NAMES,
    ) -> None:
        super().__init__()
        in_channels, out_channels = whole("in_channels", in_channels, 1), whole("out_channels", out_channels, 1)
        depth_multiplier = whole("depth_multiplier", depth_multiplier, 1)
        if padding_mode != "zeros":
            raise ValueError(f'padding_mode must be "zeros", got {padding_mode!r}')
        stride, dilation = pair("stride", stride, 1), pair("dilation", dilation, 1)
        normal = _normal_padding(padding)
        childs = (normal[0], normal[1]) if isinstance(normal, tuple) and len(normal) == 2 else 0
        conv_dw = nn.Conv2d(
            in_channels, in_channels * depth_multiplier, pair("kernel_size", kernel_size, 1), stride,
            childs, dilation, in_channels, False, device=device, dtype=dtype,
        )  # fmt: skip
        conv_pw = nn.Conv2d(in_channels * depth_multiplier, out_channels, 1, bias=bias, device=device, dtype=dtype)
        self._hold(
            conv_dw, conv_pw, normal,
            ChannelAffine(activation=prologue_activation, alpha=prologue_alpha),
            ChannelAffine(activation=middle_activation, alpha=middle_alpha),
            backend, child_names,
        )  # fmt: skip

    @classmethod
    def from_convs(
        cls,
        conv_dw: nn.Conv2d,
        conv_pw: nn.Conv2d,
        *,
        middle_activation: Optional[str] = None,
        prologue_activation: Optional[str] = None,
        middle_alpha: Optional[float] = None,
        prologue_alpha: Optional[float] = None,
        backend: Optional[str] = None,
        child_names: tuple[str, str] = CHILD_NAMES,
    ) -> FusedSeparableConv2d:
        """The layer around two convolutions that exist: it holds the very same modules, so the same parameters.

        A bias of ``conv_dw`` is added before the middle activation.

        Args:
            conv_dw: depthwise, ``groups == in_channels``, any multiple of that as ``out_channels``.
            conv_pw: pointwise, 1x1, stride 1, no padding, one group.
            middle_activation: as in the constructor, and so are the others.

        Raises:
            ValueError: the two are not such a pair; the message says which of them is not and why.
        """
        reasons = not_a_pair_reasons(conv_dw, conv_pw)
        if reasons:
            raise ValueError(f"not a depthwise convolution followed by a pointwise one: {'; '.join(reasons)}")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._hold(
            conv_dw, conv_pw, _normal_padding(conv_dw.padding),
            ChannelAffine(activation=prologue_activation, alpha=prologue_alpha),
            ChannelAffine(activation=middle_activation, alpha=middle_alpha),
            backend, child_names,
        )  # fmt: skip
        layer.train(conv_dw.training)
        return layer

    def _hold(
        self,
        conv_dw: nn.Conv2d,
        conv_pw: nn.Conv2d,
        padding: Union[str, tuple[int, ...]],
        prologue: ChannelAffine,
        middle: ChannelAffine,
        backend: Optional[str],
        child_names: tuple[str, str],
    ) -> None:
        prologue, middle = _checked_activation("prologue", prologue), _checked_activation("middle", middle)
        if backend is not None and backend not in BACKEND_NAMES:
            raise ValueError(f"backend must be None or one of {', '.join(BACKEND_NAMES)}, got {backend!r}")
        names = tuple(child_names) if isinstance(child_names, Sequence) and not isinstance(child_names, str) else ()
        if len(names) != 2 or names[0] == names[1]:
            raise ValueError(f"child_names must be a tuple or list of two different names, got {child_names!r}")
        self.in_channels = conv_dw.in_channels
        self.out_channels = conv_pw.out_channels
        self.depth_multiplier = conv_dw.out_channels // conv_dw.in_channels
        # An nn.Conv2d made by numpy's ints keeps them, and csrc/eager remembers no call with those.
        self.kernel_size = pair("kernel_size", conv_dw.kernel_size, 1)
        self.stride = pair("stride", conv_dw.stride, 1)
        self.padding = padding
        self.dilation = pair("dilation", conv_dw.dilation, 1)
        self.prologue_activation, self.prologue_alpha = prologue.activation, prologue.alpha
        self.middle_activation, self.middle_alpha = middle.activation, middle.alpha
        self.backend = backend
        self.child_names = (names[0], names[1])
        taken = {*dir(type(self)), *vars(self)}
        for name in names:
            if not isinstance(name, str) or name == "" or "." in name or name in taken:
                raise ValueError(f"child_names: {name!r} cannot name a child of {type(self).__name__}")
        self.add_module(names[0], conv_dw)
        self.add_module(names[1], conv_pw)

    @property
    def convs(self) -> tuple[nn.Conv2d, nn.Conv2d]:
        """The depthwise and the pointwise child, whatever they are called."""
        dw, pw = self.child_names
        return getattr(self, dw), getattr(self, pw)

    def reset_parameters(self) -> None:
        """Initialises both children afresh, as ``nn.Conv2d`` does."""
        for conv in self.convs:
            conv.reset_parameters()

    def forward(
        self,
        x: Tensor,
        *,
        prologue: Optional[ChannelAffine] = None,
        epilogue: Optional[ChannelAffine] = None,
        residual: Optional[Tensor] = None,
    ) -> Tensor:
        """``epilogue(pointwise(middle(depthwise(prologue(x)))) + residual)``, with epilogue's activation last.

        Args:
            x: [N, C_in, H, W]; channels_last is the fast layout.
            prologue: per channel of x; the layer's ``prologue_activation`` follows its scale and shift.
            epilogue: per channel of the output.
            residual: [N, C_out, P, Q], added before the epilogue's activation.

        Returns:
            [N, C_out, P, Q], in the layout PyTorch's two convolutions would choose.

        Raises:
            ValueError: shapes do not fit, or both the layer and ``prologue`` name an activation.
            TypeError: types do not fit.
        """
        conv_dw, conv_pw = self.convs
        if self.prologue_activation is not None:
            if prologue is None:
                prologue = ChannelAffine()
            elif prologue.activation is not None:
                raise ValueError(
                    f"prologue.activation is {prologue.activation!r}, but the layer already applies "
                    f"prologue_activation={self.prologue_activation!r}"
                )
            prologue = prologue._replace(activation=self.prologue_activation, alpha=self.prologue_alpha)
        middle = None
        if conv_dw.bias is not None or self.middle_activation is not None:
            middle = ChannelAffine(None, conv_dw.bias, self.middle_activation, self.middle_alpha)
        weight = conv_pw.weight
        stable = isinstance(weight, nn.Parameter) and not (
            self.training or torch.compiler.is_compiling() or torch.is_grad_enabled()
        )
        with kept(weight) if stable and weight.device.type == "cpu" else nullcontext():
            return separable_conv2d(
                x, conv_dw.weight, weight, conv_pw.bias,
                stride=self.stride, padding=self.padding, dilation=self.dilation,
                prologue=prologue, middle=middle, epilogue=epilogue, residual=residual, backend=self.backend,
            )  # fmt: skip

    def extra_repr(self) -> str:
        conv_dw, conv_pw = self.convs
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"]
        if self.padding not in ((0, 0), "valid"):
            parts.append(f"padding={self.padding!r}")
        if self.dilation != (1, 1):
            parts.append(f"dilation={self.dilation}")
        if self.depth_multiplier != 1:
            parts.append(f"depth_multiplier={self.depth_multiplier}")
        if conv_pw.bias is None:
            parts.append("bias=False")
        if conv_dw.bias is not None:
            parts.append("depthwise_bias=True")
        for name in ("prologue_activation", "prologue_alpha", "middle_activation", "middle_alpha", "backend"):
            value = getattr(self, name)
            if value is not None:
                parts.append(f"{name}={value!r}")
        return ", ".join(parts)


def not_a_pair_reasons(conv_dw: Any, conv_pw: Any) -> list[str]:
    """Why two modules cannot become one :class:`FusedSeparableConv2d`: phrases, or an empty list where they can.

    A convolution is taken only where its forward is ``nn.Conv2d``'s own and nothing hooks into it, for neither a
    subclass's forward nor a hook would run any more. Parametrised weights are fine: they are read at every forward.
    """
    reasons = _foreign_reasons("conv_dw", conv_dw) + _foreign_reasons("conv_pw", conv_pw)
    if reasons:
        return reasons
    for name, conv in (("conv_dw", conv_dw), ("conv_pw", conv_pw)):
        if conv.padding_mode != "zeros":
            reasons.append(f"{name} has padding_mode={conv.padding_mode!r}, only 'zeros' can be fused")
    if conv_dw.groups != conv_dw.in_channels:
        reasons.append(f"conv_dw has groups={conv_dw.groups}, a depthwise one has groups={conv_dw.in_channels}")
    if conv_pw.kernel_size != (1, 1):
        reasons.append(f"conv_pw has kernel_size={conv_pw.kernel_size}, a pointwise one has (1, 1)")
    if conv_pw.stride != (1, 1):
        reasons.append(f"conv_pw has stride={conv_pw.stride}, a pointwise one has (1, 1)")
    if conv_pw.padding not in ((0, 0), "valid", "same"):
        reasons.append(f"conv_pw has padding={conv_pw.padding}, a pointwise one has none")
    if conv_pw.groups != 1:
        reasons.append(f"conv_pw has groups={conv_pw.groups}, a pointwise one has 1")
    if conv_pw.in_channels != conv_dw.out_channels:
        reasons.append(f"conv_pw takes {conv_pw.in_channels} channels, but conv_dw gives {conv_dw.out_channels}")
    if conv_pw.weight.dtype != conv_dw.weight.dtype:
        reasons.append(f"conv_dw is {conv_dw.weight.dtype}, but conv_pw is {conv_pw.weight.dtype}")
    if conv_pw.weight.device != conv_dw.weight.device:
        reasons.append(f"conv_dw is on {conv_dw.weight.device}, but conv_pw on {conv_pw.weight.device}")
    return reasons


def has_hooks(module: nn.Module) -> bool:
    """Whether anybody watches the module itself."""
    m = module
    return bool(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)


def _foreign_reasons(name: str, conv: Any) -> list[str]:
    if not isinstance(conv, nn.Conv2d):
        return [f"{name} is a {type(conv).__name__}, not an nn.Conv2d"]
    own = "forward" in vars(conv) or "_conv_forward" in vars(conv)
    if own or type(conv).forward is not nn.Conv2d.forward or type(conv)._conv_forward is not nn.Conv2d._conv_forward:
        return [f"{name} is a {type(conv).__name__} with a forward of its own"]
    if has_hooks(conv):
        return [f"{name} has hooks, which would no longer run"]
    return []


def _normal_padding(padding: Padding) -> Union[str, tuple[int, ...]]:
    """A pair, four ints or one of the two words."""
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(f'padding must be "same", "valid", an int, a pair or four ints, got {padding!r}')
        return padding
    if not isinstance(padding, Sequence) or len(padding) != 4:
        return pair("padding", padding, 0)
    left, right, top, bottom = sides(padding)
    return (top, left) if (left, top) == (right, bottom) else (left, right, top, bottom)


def _checked_activation(where: str, affine: ChannelAffine) -> ChannelAffine:
    """The same with a float as its alpha, if it has one."""
    names = ACTIVATIONS[1:]
    if affine.activation is not None and affine.activation not in names:
        raise ValueError(f"{where}_activation must be None or one of {', '.join(names)}, got {affine.activation!r}")
    takes_alpha = affine.activation in [ACTIVATIONS[code] for code in DEFAULT_ALPHA]
    if affine.alpha is not None and not takes_alpha:
        raise ValueError(
            f"{where}_alpha belongs to elu and leaky_relu, but {where}_activation is {affine.activation!r}"
        )
    return affine if affine.alpha is None else affine._replace(alpha=finite(f"{where}_alpha", affine.alpha))
