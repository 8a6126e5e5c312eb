"""Peak memory of one training step of one middle-flow block of Xception: xsep beside PyTorch's two convolutions."""

from __future__ import annotations

import argparse
import copy
import os
from pathlib import Path
from typing import Any, Optional

import common
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xsep.cli import screen
from xsep.models import xception

# The profiler else logs its start and its stop.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

DESCRIPTION = """\
Runs forward and backward of block 4 (three times ReLU, separable convolution, BatchNorm; identity residual) in
training mode, once with xsep's op and once with the same parameters through PyTorch's two convolutions, on the
activations that real photographs produce at that depth of an Xception with seeded random weights.

PyTorch keeps each of the three middle tensors z (depthwise output, N x 728 x 19 x 19) from forward to backward; xsep
recomputes it, and keeps neither it nor the ReLU's copy of the input. Reported: bytes kept from forward to backward,
and the peak of everything allocated during the step, above what was there before (on a CPU from the profiler's record
of every allocation and release, on a GPU from the caching allocator).

Writes memory.json into --out."""


class TwoConvolutions(nn.Module):
    """The same separable convolution, its own children called one after the other as a PyTorch user would."""

    def __init__(self, fused: Any) -> None:
        super().__init__()
        self.conv_dw, self.conv_pw = fused.convs
        self.relu = fused.prologue_activation == "relu"

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_pw(self.conv_dw(F.relu(x) if self.relu else x))


def plain_block(block: Any) -> nn.Module:
    """A copy of the block in plain PyTorch layers."""
    plain = copy.deepcopy(block)
    for name, module in list(plain.rep.items()):
        if hasattr(module, "convs"):
            plain.rep[name] = TwoConvolutions(module)
    return plain


def kept_bytes(block: nn.Module, x: Tensor) -> int:
    """Bytes of the distinct storages that forward keeps for backward, without x and the parameters."""
    known = {t.untyped_storage().data_ptr() for t in (x, *block.parameters(), *block.buffers())}
    sizes: dict[int, int] = {}
    held: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
            held.append(t)  # so that no address is used twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = block(x)
    del y
    return sum(sizes.values())


def train_step(block: nn.Module, x: Tensor, dy: Tensor) -> None:
    block.zero_grad(set_to_none=True)
    block(x).backward(dy)


def peak_bytes(block: nn.Module, x: Tensor, dy: Tensor) -> int:
    """The most that was allocated at any moment of one step, above what was allocated when it began."""
    train_step(block, x, dy)
    block.zero_grad(set_to_none=True)
    x.grad = None
    if x.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        train_step(block, x, dy)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        train_step(block, x, dy)
    recorded = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(recorded, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def compare(
    batch: int, dtype: torch.dtype, device: torch.device, photographs: list[Tensor], size: int
) -> dict[str, Any]:
    """Bytes, ours and PyTorch's, for a batch of [batch, 3, size, size] pictures; backend as dispatched."""
    torch.manual_seed(0)
    model = xception(num_classes=0).to(device).train()
    ours: Any = model.get_submodule("block4")
    reached: list[Tensor] = []
    hook = ours.register_forward_pre_hook(lambda module, args: reached.append(args[0]))
    with torch.no_grad():
        model.features(common.photograph_batch(photographs, batch, size).to(device))
    hook.remove()
    ours.to(dtype=dtype).to(memory_format=torch.channels_last)
    x = reached[0].to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    dy = torch.randn_like(x)
    record: dict[str, Any] = {"batch": batch, "shape": list(x.shape), "z_bytes": x.numel() * x.element_size()}
    for name, block in (("pytorch", plain_block(ours)), ("xsep", ours)):
        with common.noting_backends() as takes:
            kept = kept_bytes(block, x)
        record[name] = {"kept": kept, "peak": peak_bytes(block, x, dy), "takes": takes}
    return record


def parse(argv: Optional[list[str]]) -> argparse.Namespace:
    parser = common.Parser("bench_memory", description=DESCRIPTION, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--batch", type=int, help="pictures (default: 64 on a GPU, 8 on a CPU)")
    add("--device", help="cpu, cuda or cuda:N; the default is the GPU where there is one")
    add("--dtype", nargs="+", choices=list(common.DTYPES), default=["float32"], metavar="TYPE",
        help=f"{', '.join(common.DTYPES)} (default: float32)")  # fmt: skip
    add("--image", metavar="PATH", help="another picture instead of scikit-learn's two photographs")
    add("--out", type=Path, help="directory for the results (default: benchmarks/results/<cpu or card>/)")
    args = parser.parse_args(argv)
    if args.batch is not None and args.batch < 1:
        parser.error(f"argument --batch: must be at least 1, got {args.batch}")
    return args


def main(argv: Optional[list[str]] = None) -> int:
    args = parse(argv)
    device = common.choose_device(args.device)
    names, photographs = common.load_photographs(args.image)
    out = args.out or common.default_out(device)
    common.prepare_out(out)
    batch = args.batch or (64 if device.type == "cuda" else 8)
    record: dict[str, Any] = {
        "benchmark": "memory", "photographs": names, "environment": common.environment(device), "results": {},
    }  # fmt: skip
    table = screen.table(f"One training step of one middle-flow block, batch {batch}, MB")
    for heading in ("type", "", "PyTorch", "xsep", "less by", "in z tensors"):
        table.add_column(heading, justify="right" if heading not in ("type", "") else "left")
    for kind in args.dtype:
        result = compare(batch, common.DTYPES[kind], device, photographs, 299)
        record["results"][kind] = result
        for what, label in (("kept", "kept for backward"), ("peak", "peak of the step")):
            theirs, ours = result["pytorch"][what], result["xsep"][what]
            less = theirs - ours
            table.add_row(kind, label, *(f"{1e-6 * v:.1f}" for v in (theirs, ours, less)),
                          f"{less / result['z_bytes']:.2f} z")  # fmt: skip
    with common.whole_files(out) as temporary:
        common.write_json(temporary("memory.json"), record)
    console = screen.console()
    console.print(table)
    for kind, result in record["results"].items():
        console.print(f"{kind}: xsep's layers ran on {', '.join(dict.fromkeys(result['xsep']['takes'].values()))}")
    console.print(f"written: {out / 'memory.json'}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(common.run("bench_memory", main))
