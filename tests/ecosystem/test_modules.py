"""The layer under torch.func, FX, parametrisations, meta devices, memory formats, autocast and a gradient scaler."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, stack_module_state, vmap
from torch.nn.utils import parametrizations

import xsep

from .models import Network, network, pictures


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_gradients_of_each_sample() -> None:
    """vmap over grad, as in differential privacy."""
    model = network().eval()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())
    x = pictures(3)

    def loss(weights: dict[str, Tensor], picture: Tensor) -> Tensor:
        return functional_call(model, (weights, buffers), (picture[None],)).square().sum()

    together = vmap(grad(loss), in_dims=(None, 0))(weights, x)
    for i in range(3):
        leaves = list(model.parameters())
        alone = torch.autograd.grad(model(x[i : i + 1]).square().sum(), leaves)
        for (name, _), g in zip(model.named_parameters(), alone):
            torch.testing.assert_close(together[name][i], g, rtol=1e-3, atol=1e-3)


def test_an_ensemble_of_models_runs_as_one() -> None:
    models = [xsep.FusedSeparableConv2d(5, 4, 3, padding=1, middle_activation="relu") for _ in range(3)]
    weights, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")
    x = pictures(2)
    y = vmap(lambda w, b: functional_call(base, (w, b), (x,)))(weights, buffers)
    close(y, torch.stack([m(x) for m in models]))


def test_jacobian_and_grad_of_a_grad() -> None:
    layer = xsep.FusedSeparableConv2d(2, 3, 3, padding=1, middle_activation="silu").double()
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64)
    expected = torch.autograd.functional.jacobian(layer, x)
    torch.testing.assert_close(jacrev(layer)(x), expected)
    norm = grad(lambda v: grad(lambda u: layer(u).square().sum())(v).square().sum())
    leaf = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(layer(leaf).square().sum(), leaf, create_graph=True)
    torch.testing.assert_close(norm(x), torch.autograd.grad(dx.square().sum(), leaf)[0])


def test_symbolic_trace_copies_and_pickles() -> None:
    model = nn.Sequential(network()).eval()  # a root whose forward has no annotations, which FX cannot pickle
    traced = torch.fx.symbolic_trace(model)
    assert sum(node.target is xsep.separable_conv2d for node in traced.graph.nodes) == 3
    x = pictures(2)
    for twin in (traced, copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))):
        close(twin(x), model(x))


@pytest.mark.parametrize("way", ["weight_norm", "spectral_norm", "orthogonal"])
def test_parametrisations_train(way: str) -> None:
    """PyTorch's own parametrisations on a child: values and gradients of the tensors beneath."""
    layer: Any = xsep.FusedSeparableConv2d(5, 8, 3, padding=1).eval()
    twin: Any = copy.deepcopy(layer)
    for each in (layer, twin):
        torch.manual_seed(3)
        getattr(parametrizations, way)(each.conv_pw, "weight")
    x = pictures(2)
    y, expected = layer(x), twin.conv_pw(twin.conv_dw(x))
    close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert len(list(layer.parameters())) == len(list(twin.parameters())) >= 3
    for p, q in zip(layer.parameters(), twin.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-3)


def test_a_model_made_on_meta_takes_its_weights_later() -> None:
    source = network().eval()
    with torch.device("meta"):
        empty, assigned = Network(), Network()
    assert all(p.is_meta for p in empty.parameters())
    assert empty(torch.empty(2, 5, 12, 13, device="meta")).shape == source(pictures(2)).shape
    filled = empty.to_empty(device="cpu").eval()
    filled.load_state_dict(source.state_dict())
    assigned.load_state_dict(source.state_dict(), assign=True)
    x = pictures(2)
    for model in (filled, assigned.eval()):
        assert torch.equal(model(x), source(x))


def test_memory_format_goes_through_the_model() -> None:
    model: Any = network().eval()
    x = pictures(2)
    expected = model(x)
    assert expected.is_contiguous()
    model.to(memory_format=torch.channels_last)
    assert model.first.conv_pw.weight.is_contiguous(memory_format=torch.channels_last)
    y = model(x.to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    close(y, expected)
    close(model.to(memory_format=torch.contiguous_format)(x), expected)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_and_gradient_scaler_train(kind: torch.dtype) -> None:
    """The same steps in float32 and scaled in 16 bits; an overflow skips its step and lowers the scale."""
    plain, mixed = network(), network()
    steps = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (plain, mixed)]
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    losses: list[list[float]] = [[], []]
    torch.manual_seed(1)
    data = [pictures(4) for _ in range(5)]
    for x in data:
        loss = plain(x).square().mean()
        steps[0].zero_grad()
        loss.backward()
        steps[0].step()
        losses[0].append(loss.item())
        with torch.autocast("cpu", dtype=kind):
            y = mixed(x)
        assert y.dtype is kind
        loss = y.float().square().mean()
        steps[1].zero_grad()
        scaler.scale(loss).backward()
        scaler.step(steps[1])
        scaler.update()
        losses[1].append(loss.item())
    assert scaler.get_scale() == 256.0
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=0.03, atol=0.0)
    before = [p.detach().clone() for p in mixed.parameters()]
    with torch.autocast("cpu", dtype=kind):
        y = mixed(data[0])
    steps[1].zero_grad()
    scaler.scale(y.float().sum() * torch.inf).backward()
    scaler.step(steps[1])
    scaler.update()
    assert scaler.get_scale() < 256.0
    assert all(torch.equal(p, q) for p, q in zip(before, mixed.parameters()))


def test_to_dtype_and_back() -> None:
    model = network().eval()
    x = pictures(2)
    expected = model(x)
    wide: nn.Module = copy.deepcopy(model).double()
    close(wide(x.double()).float(), expected)
    assert model.bfloat16()(x.bfloat16()).dtype is torch.bfloat16
