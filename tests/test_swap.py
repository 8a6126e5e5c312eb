"""The swap: same outputs, gradients, keys and modules, however the pair is written; and undone without a trace."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xsep.swap import folding, swap_separable_convs, unswap
from xsep.swap.folding import FoldedNorm

from .swap_patterns import (
    PATTERNS,
    AlignedSeparable,
    CountedOps,
    InvertedResidual,
    SeparableNamed,
    XceptionBlock,
    assert_same_results,
    build,
    depthwise,
    fused_calls,
    picture,
    pointwise,
)


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    """By the test's name: a value within float32's rounding of a kink would make two right gradients differ."""
    torch.manual_seed(sum(request.node.name.encode()))


def swapped(model: nn.Module, fold_bn: bool = True) -> nn.Module:
    """The model, after a swap that found something."""
    assert len(swap_separable_convs(model, fold_bn, report=False)) > 0
    return model


@pytest.mark.parametrize("fold_bn", [False, True], ids=["keep-bn", "fold-bn"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_finds_each_pattern_and_what_runs_with_it(pattern: str, fold_bn: bool) -> None:
    make, kept, folded = PATTERNS[pattern]
    model = build(make).eval()
    report = swap_separable_convs(model, fold_bn, report=False)
    expected = folded if fold_bn else kept
    assert ["+".join(s.members) for s in report.swapped] == expected
    assert len(report) == len(expected)
    assert [m.reason for m in report.missed if "fold_bn=True" not in m.reason] == []
    with torch.no_grad():
        assert fused_calls(model, picture()) == len(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("fold_bn", [False, True], ids=["keep-bn", "fold-bn"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_same_output_and_gradients(pattern: str, fold_bn: bool, train: bool, dtype: torch.dtype) -> None:
    truth = build(PATTERNS[pattern][0]).train(train).to(dtype)
    model = copy.deepcopy(truth)
    swap_separable_convs(model, fold_bn, report=False)
    x = picture(dtype=dtype)
    relative = 1e-5 if dtype == torch.float32 else 1e-12
    for layout in (torch.contiguous_format, torch.channels_last):
        assert_same_results(model, truth, x.to(memory_format=layout), relative)
    with torch.no_grad():  # takes more into the fused op than a call that records gradients
        y, expected = model(x), truth(x)
    assert (y - expected).abs().max() <= relative * expected.abs().max()
    for (name, ours), (other, theirs) in zip(model.state_dict().items(), truth.state_dict().items(), strict=True):
        assert name == other
        torch.testing.assert_close(ours, theirs, rtol=relative, atol=relative)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_keys_parameters_modules_and_mode_stay(pattern: str) -> None:
    model = build(PATTERNS[pattern][0]).eval()
    keys, parameters = list(model.state_dict()), dict(model.named_parameters())
    buffers, modules = dict(model.named_buffers()), dict(model.named_modules())
    swapped(model)
    assert list(model.state_dict()) == keys
    for before, now in (
        (parameters, dict(model.named_parameters())),
        (buffers, dict(model.named_buffers())),
        (modules, dict(model.named_modules())),
    ):
        assert list(before) == list(now)
        assert all(now[name] is thing for name, thing in before.items())
    assert not any(m.training for m in model.modules())
    assert all(isinstance(now, type(modules[name])) for name, now in model.named_modules())


def test_loads_and_gives_state_strictly() -> None:
    model, other = build(XceptionBlock).eval(), build(XceptionBlock).eval()
    swapped(model)
    x = picture()
    with torch.no_grad():
        before = model(x)
        model.load_state_dict(other.state_dict(), strict=True)
        assert not torch.allclose(model(x), before, rtol=1e-2)
        torch.testing.assert_close(model(x), other(x), rtol=1e-5, atol=1e-5)
        third = build(XceptionBlock).eval()
        third.load_state_dict(model.state_dict(), strict=True)
        torch.testing.assert_close(third(x), other(x))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_unswap_leaves_no_trace(pattern: str) -> None:
    model = build(PATTERNS[pattern][0]).eval()
    classes = [type(m) for m in model.modules()]
    attributes = [set(vars(m)) for m in model.modules()]
    text = repr(model)
    count = len(swap_separable_convs(model, True, report=False))
    assert repr(model) != text
    assert unswap(model) == count
    assert [type(m) for m in model.modules()] == classes
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert repr(model) == text
    assert unswap(model) == 0


def test_the_last_swap_decides() -> None:
    model = build(XceptionBlock).eval()
    first = swap_separable_convs(model, fold_bn=True, report=False)
    second = swap_separable_convs(model, fold_bn=False, report=False)
    assert [len(s.members) for s in first.swapped] == [4, 4]
    assert [len(s.members) for s in second.swapped] == [3, 3]
    assert unswap(model) == 2


def test_unswap_of_a_part() -> None:
    model = build(lambda: nn.Sequential(SeparableNamed(5, 5), SeparableNamed(5, 3)))
    swapped(model)
    assert unswap(model[0]) == 1  # type: ignore[index]
    assert fused_calls(model, picture()) == 1


def duplicate(model: nn.Module, way: str) -> Any:
    if way == "deepcopy":
        return copy.deepcopy(model)
    if way == "pickle":
        return pickle.loads(pickle.dumps(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save"])
@pytest.mark.parametrize("pattern", ["xception-block", "inverted-residual", "norm-and-activation-in-one"])
def test_copies_are_swapped_models_of_their_own(pattern: str, way: str) -> None:
    model = swapped(build(PATTERNS[pattern][0]).eval())
    x = picture()
    with torch.no_grad():
        expected = model(x)
        twin = duplicate(model, way)
        assert fused_calls(twin, x) == fused_calls(model, x) > 0
        assert torch.equal(twin(x), expected)
        for p in twin.parameters():
            p.add_(0.5)
        assert not torch.allclose(twin(x), expected)
        assert torch.equal(model(x), expected)
    assert unswap(twin) > 0
    assert fused_calls(model, x) > 0


def test_a_member_copied_or_called_alone_is_what_it_was() -> None:
    model = build(lambda: nn.Sequential(depthwise(5), nn.ReLU(), pointwise(5, 3)))
    x = picture()
    z, y = model[0](x), model(x)  # type: ignore[index]
    swapped(model)
    for conv in (model[0], copy.deepcopy(model[0])):  # type: ignore[index]
        assert torch.equal(conv(x), z)
    assert torch.equal(model[:2](x), z.relu())  # type: ignore[index]
    assert torch.equal(nn.Sequential(*list(model.children())[:2])(x), z.relu())
    torch.testing.assert_close(model[2](z.relu()), y)  # type: ignore[index]
    v = x
    for module in model:  # type: ignore[attr-defined]
        v = module(v)
    torch.testing.assert_close(v, y)
    assert unswap(copy.deepcopy(model[:2])) == 0  # type: ignore[index]


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_follows_to_another_type(kind: torch.dtype) -> None:
    truth = build(lambda: AlignedSeparable(5, 6, nn.ReLU)).eval()
    model = swapped(copy.deepcopy(truth))
    x = picture()
    with torch.no_grad():
        model(x)  # so that vectors of the old type are there to be kept
        wide = copy.deepcopy(truth).double()(x.double())
        model, truth = model.to(kind), truth.to(kind)
        ours, theirs = model(x.to(kind)), truth(x.to(kind))
        assert ours.dtype == kind
        assert fused_calls(model, x.to(kind)) == 1
        bound = 2 * (theirs.double() - wide).abs().max() + 8 * torch.finfo(kind).eps * wide.abs().max()
        assert (ours.double() - wide).abs().max() <= bound


def test_under_autocast() -> None:
    truth = build(lambda: AlignedSeparable(5, 6, nn.ReLU)).eval()
    model = swapped(copy.deepcopy(truth))
    x = picture()
    with torch.no_grad():
        wide = copy.deepcopy(truth).double()(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = model(x), truth(x)
        assert ours.dtype == theirs.dtype
        bound = 2 * (theirs.double() - wide).abs().max() + 8 * torch.finfo(torch.bfloat16).eps * wide.abs().max()
        assert (ours.double() - wide).abs().max() <= bound


@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*")
@pytest.mark.parametrize("pattern", ["sequential-activation", "xception-block", "inverted-residual"])
def test_compiles_without_a_graph_break(pattern: str) -> None:
    torch._dynamo.reset()
    truth = build(PATTERNS[pattern][0])
    model = swapped(copy.deepcopy(truth))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for train in (False, True):
        model.train(train)
        truth.train(train)
        assert_same_results(compiled, truth, picture(), 1e-5)
        assert_same_results(compiled, truth, picture(3), 1e-5)


def test_exports_with_the_parameters_names() -> None:
    model = swapped(build(XceptionBlock).eval())
    x = picture()
    program = torch.export.export(model, (x,))
    assert set(program.state_dict) == set(model.state_dict())
    assert sum("separable_conv2d" in str(n.target) for n in program.graph.nodes) == 2
    torch.testing.assert_close(program.module()(x), model(x))


def test_arguments_keep_their_names() -> None:
    """Whoever exports with dynamic shapes names them; whoever traces wants one symbol for each."""
    truth = build(lambda: SeparableNamed(5, 6)).eval()
    model = swapped(copy.deepcopy(truth))
    assert inspect.signature(model.forward) == inspect.signature(truth.forward)
    batch = {"x": {0: torch.export.Dim("batch", min=2)}}
    program = torch.export.export(model, (picture(),), dynamic_shapes=batch)
    more = torch.cat([picture(), picture()])
    for traced in (program.module(), torch.fx.symbolic_trace(model)):
        torch.testing.assert_close(traced(more), truth(more), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_other_tracers_see_the_same_function() -> None:
    model = swapped(build(lambda: nn.Sequential(AlignedSeparable(5, 6, nn.ReLU), nn.Conv2d(6, 3, 1))).eval())
    x, other = picture(), picture()
    with torch.no_grad():
        expected = model(other)
        for traced in (torch.fx.symbolic_trace(model), torch.jit.trace(model, x)):
            torch.testing.assert_close(traced(other), expected, rtol=1e-5, atol=1e-5)
        model[0].bn_dw.weight.mul_(2)  # type: ignore[index]
        torch.testing.assert_close(traced(other), model(other), rtol=1e-5, atol=1e-5)


def test_functional_call_and_functorch() -> None:
    truth = build(lambda: AlignedSeparable(5, 6, nn.SiLU)).eval().double()
    model = swapped(copy.deepcopy(truth))
    x = picture(dtype=torch.float64)
    with torch.no_grad():
        model(x)
    other = {name: torch.rand_like(p) + 0.5 for name, p in model.named_parameters()}
    buffers = {name: torch.rand_like(b) + 0.5 for name, b in model.named_buffers() if b.is_floating_point()}

    def loss(m: nn.Module, p: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(m, {**p, **buffers}, (x,)).square().sum()

    ours, theirs = (torch.func.grad(lambda p, m=m: loss(m, p))(other) for m in (model, truth))
    for name, g in theirs.items():
        torch.testing.assert_close(ours[name], g, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(loss(model, other), loss(truth, other), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("gradients", [False, True], ids=["no-grad", "grad"])
def test_an_ensemble_under_vmap(gradients: bool) -> None:
    """Each of its parameters is a plain tensor by its type there, without memory of its own."""
    models = [build(lambda: AlignedSeparable(5, 6, nn.SiLU)).eval().double() for _ in range(3)]
    x = picture(dtype=torch.float64)
    expected = torch.stack([model(x).detach() for model in models])
    for model in models:
        swapped(model)
        with torch.no_grad():
            model(x)  # keeps vectors, which are not to be used below
    parameters, buffers = torch.func.stack_module_state(models)

    def call(p: dict[str, Tensor], b: dict[str, Tensor]) -> Any:
        return torch.func.functional_call(models[0], (p, b), (x,))

    with torch.set_grad_enabled(gradients):
        torch.testing.assert_close(torch.vmap(call)(parameters, buffers), expected, rtol=1e-10, atol=1e-10)


def test_trains_under_ddp(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        truth = build(lambda: InvertedResidual(5, 9, 5)).train()
        model = nn.parallel.DistributedDataParallel(swapped(copy.deepcopy(truth)))
        x = picture()
        for train in (True, False):
            model.train(train)
            truth.train(train)
            model.zero_grad()
            truth.zero_grad()
            model(x).square().sum().backward()
            truth(x).square().sum().backward()
            for ours, theirs in zip(model.parameters(), truth.parameters(), strict=True):
                assert ours.grad is not None and theirs.grad is not None
                assert (ours.grad - theirs.grad).abs().max() <= 1e-5 * theirs.grad.abs().max() + 1e-6
    finally:
        torch.distributed.destroy_process_group()


def test_a_shallow_copy_does_not_use_the_originals_parameters() -> None:
    """As nn.DataParallel makes replicas: shallow copies of every module, with other tensors in them."""
    model = swapped(build(lambda: nn.Sequential(depthwise(5), pointwise(5, 3))))
    replicas = [m._replicate_for_data_parallel() for m in model.modules()]
    host, dw, pw = replicas
    host._modules.update({"0": dw, "1": pw})
    dw.weight, pw.weight = torch.randn(5, 1, 3, 3), torch.randn(3, 5, 1, 1)
    dw.bias = pw.bias = None
    x = picture()
    expected = torch.conv2d(torch.conv2d(x, dw.weight, padding=1, groups=5), pw.weight)
    torch.testing.assert_close(host(x), expected)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_under_activation_checkpointing(reentrant: bool) -> None:
    truth = build(lambda: AlignedSeparable(5, 6, nn.SiLU)).eval()
    model = swapped(copy.deepcopy(truth))
    x = picture().requires_grad_()
    grads = []
    for m in (model, truth):
        y = checkpoint(m, x, use_reentrant=reentrant)
        y.square().sum().backward()
        grads.append([p.grad for p in m.parameters()])
    for ours, theirs in zip(*grads, strict=True):
        assert ours is not None and theirs is not None
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_threads_do_not_disturb_each_other() -> None:
    model = swapped(build(XceptionBlock).eval())
    xs = [picture() for _ in range(4)]
    with torch.no_grad():
        expected = [model(x) for x in xs]
    wrong: list[int] = []

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(20):
                if not torch.equal(model(xs[i]), expected[i]):
                    wrong.append(i)
                model.rep[1].conv1(xs[i])  # type: ignore[index, union-attr]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(xs))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []


class Pause(nn.Module):
    """Waits while its input passes through, so many seconds at most; by itself none, which a trace of it fails at."""

    def __init__(self) -> None:
        super().__init__()
        self.reached, self.go_on, self.seconds = threading.Event(), threading.Event(), 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.reached.set()
        assert self.go_on.wait(self.seconds)
        return x


def test_a_call_under_way_in_one_thread_does_not_change_members_in_another() -> None:
    pause = Pause()
    model = swapped(nn.Sequential(depthwise(5), pointwise(5, 3), pause))
    pause.reached.clear()  # by the swap's own trace
    pause.seconds = 60.0
    x = picture()
    thread = threading.Thread(target=model, args=(x,))
    thread.start()
    try:
        assert pause.reached.wait(60)
        z = torch.conv2d(x, model[0].weight, padding=1, groups=5)  # type: ignore[index]
        assert torch.equal(model[0](x), z)  # type: ignore[index]
    finally:
        pause.go_on.set()
        thread.join()


def test_an_exception_within_the_host_leaves_the_members_ordinary() -> None:
    model = swapped(build(lambda: nn.Sequential(depthwise(5), pointwise(5, 3), nn.Linear(4, 4))))
    x = picture()
    with pytest.raises(RuntimeError):
        model(x)
    z = torch.conv2d(x, model[0].weight, padding=1, groups=5)  # type: ignore[index]
    assert torch.equal(model[0](x), z)  # type: ignore[index]


def test_in_training_the_batch_norm_keeps_its_place() -> None:
    model = swapped(build(lambda: AlignedSeparable(5, 6, nn.ReLU)).train())
    before = {name: b.clone() for name, b in model.named_buffers()}
    with CountedOps() as ops:
        model(picture())
    assert (ops.count("separable_conv2d"), ops.count("depthwise_conv2d")) == (0, 1)
    assert all(not torch.equal(b, before[name]) for name, b in model.named_buffers())
    model.bn_dw.eval()  # type: ignore[union-attr]
    assert fused_calls(model, picture()) == 1  # a frozen norm between is vectors, the training one behind stays


@pytest.mark.parametrize(
    "change",
    ["in-place", "load", "optimizer", "data-then-eval", "replaced", "double-and-back", "statistics", "eps"],
)
def test_kept_vectors_follow_every_change(change: str) -> None:
    model = build(lambda: AlignedSeparable(5, 6, nn.ReLU)).eval()
    truth = copy.deepcopy(model)
    swapped(model)
    x = picture()
    with torch.no_grad():
        before = model(x)
        assert torch.equal(model(x), before)
    other = build(lambda: AlignedSeparable(5, 6, nn.ReLU))
    for m in (model, truth):
        norm: Any = m.bn_dw
        with torch.no_grad():
            if change == "in-place":
                norm.weight.mul_(2)
            elif change == "load":
                m.load_state_dict(other.state_dict())
            elif change == "optimizer":
                norm.bias.grad = torch.ones(5)
                torch.optim.SGD([norm.bias], lr=0.5).step()
            elif change == "data-then-eval":
                norm.weight.data.mul_(2)
                m.eval()
            elif change == "replaced":
                norm.weight = nn.Parameter(other.bn_dw.weight.detach().clone())  # type: ignore[union-attr, operator]
            elif change == "double-and-back":
                m.double()
                norm.running_mean.add_(1)
                m.float()
            elif change == "statistics":
                m.train()(x + 3)
                m.eval()
            else:
                norm.eps = 0.5
    with torch.no_grad():
        assert not torch.allclose(model(x), before, rtol=1e-2)
        torch.testing.assert_close(model(x), truth(x), rtol=1e-5, atol=1e-5)


def test_a_cuda_graph_makes_its_own_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on reading the memory that it was captured with, which kept vectors give back when the norm changes."""
    folded = FoldedNorm(nn.BatchNorm2d(5).eval())
    with torch.no_grad():
        kept = folded.vectors()
        assert folded.vectors() is kept
        monkeypatch.setattr(folding, "_are_captured", lambda tensors: True)
        made = folded.vectors()
        assert made is not kept and folded.kept is not None and folded.kept[1] is kept
        assert all(torch.equal(a, b) for a, b in zip(made, kept))


def test_vectors_kept_in_inference_mode_serve_a_backward() -> None:
    model = swapped(build(lambda: AlignedSeparable(5, 6, nn.ReLU)).eval()).requires_grad_(False)
    x = picture()
    with torch.inference_mode():
        model(x)
    x.requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None and x.grad.abs().max() > 0


def test_takes_a_picture_without_a_batch() -> None:
    truth = build(lambda: nn.Sequential(depthwise(5), nn.ReLU(), pointwise(5, 3)))
    model = swapped(copy.deepcopy(truth))
    x = picture()[0]
    assert fused_calls(model, x) == 1
    torch.testing.assert_close(model(x), truth(x))


def test_synchronised_batch_norm_is_folded() -> None:
    truth = build(lambda: AlignedSeparable(5, 6)).eval()
    model = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(truth))
    swapped(model)
    with torch.no_grad():
        torch.testing.assert_close(model(picture_ := picture()), truth(picture_), rtol=1e-5, atol=1e-5)


def test_prints_its_report_unless_told_not_to(capsys: pytest.CaptureFixture[str]) -> None:
    model = build(lambda: nn.Sequential(XceptionBlock(), AlignedSeparable(7, 3)))
    report = swap_separable_convs(model)
    assert capsys.readouterr().out == f"{report}\n"
    assert str(report) == (
        "2 separable convolutions swapped\n"
        "  0.rep.0 + 0.rep.1.conv1 + 0.rep.1.pointwise\n"
        "  0.rep.3 + 0.rep.4.conv1 + 0.rep.4.pointwise\n"
        "1 depthwise convolution left alone\n"
        "  1.conv_dw: 1.bn_dw (BatchNorm2d) stands between: fold_bn=True folds it in eval mode"
    )
    swap_separable_convs(model, report=False)
    assert capsys.readouterr().out == ""
    assert [s.host for s in report.swapped] == ["0.rep", "0.rep"]
    assert (report.swapped[0].conv_dw, report.swapped[0].conv_pw) == ("0.rep.1.conv1", "0.rep.1.pointwise")


def test_a_model_with_nothing_to_swap_is_told_so() -> None:
    report = swap_separable_convs(nn.Sequential(nn.Conv2d(3, 4, 3)), report=False)
    assert str(report) == (
        "0 separable convolutions swapped: the model has no nn.Conv2d whose groups are its input channels"
    )
    assert report and len(report) == 0


@pytest.mark.parametrize("function", [swap_separable_convs, unswap])
def test_refuses_what_is_no_module(function: Any) -> None:
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got str"):
        function("resnet50")
