"""What the benchmarks share: real pictures, honest timing, a record of the machine, and files written whole."""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import importlib
import json
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NoReturn, Optional

import torch
from torch import Tensor

import xsep
from xsep import dispatch
from xsep.backends.pointwise import tf32_allowed
from xsep.cli.info import reasons
from xsep.measuring import Flush
from xsep.tuning import digest, findings
from xsep.tuning.device import cpu_name

HERE = Path(__file__).resolve().parent

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

#: What stands in for photographs where scikit-learn, which brings some, is not installed.
SYNTHETIC = ["synthetic 1 (scikit-learn, which brings photographs, is not installed)", "synthetic 2"]

#: The exit code of a program that stopped because its time was over; what it wrote stands.
LATE = 3

Times = dict[str, Any]


class BenchmarkError(Exception):
    """Something the user can mend, said in one sentence; the program ends with exit code 2."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def run(prog: str, main: Callable[[], int]) -> int:
    """``main``'s exit code; a :class:`BenchmarkError` becomes one sentence and 2."""
    try:
        return main()
    except BenchmarkError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2


def choose_device(name: Optional[str]) -> torch.device:
    """The device asked for, or the GPU where there is one; raises BenchmarkError where it cannot be used."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.ones(1, device=device).add_(1)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BenchmarkError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


# Pictures


def default_backends(device: torch.device) -> list[str]:
    """``auto``, and on a GPU each of its backends that can run here, whether or not auto takes it."""
    gpus = findings.VERIFIED_BY_CARDS if device.type == "cuda" else ()
    return ["auto", *(name for name in gpus if not reasons(name))]


def load_photographs(path: Optional[str]) -> tuple[list[str], list[Tensor]]:
    """Names and pixels [3, H, W] in 0..255 of the picture at ``path``, or of scikit-learn's two photographs; where it
    is not installed, two pictures made up like photographs, which the record names as such."""
    if path is None:
        try:
            from sklearn.datasets import load_sample_image
        except ImportError:
            return SYNTHETIC, [synthetic_photograph(seed) for seed in range(len(SYNTHETIC))]
        names = ["china.jpg", "flower.jpg"]
        arrays = [load_sample_image(name) for name in names]
        return names, [torch.from_numpy(a.copy()).permute(2, 0, 1).float() for a in arrays]
    try:
        import numpy
        from PIL import Image

        with Image.open(path) as image:
            array = numpy.array(image.convert("RGB"))
    except ImportError:
        raise BenchmarkError("Pillow, which reads pictures, is not installed") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BenchmarkError(f"the picture {path!r} cannot be read: {error}") from None
    return [Path(path).name], [torch.from_numpy(array).permute(2, 0, 1).float()]


def synthetic_photograph(seed: int) -> Tensor:
    """[3, 427, 640] in 0..255, the same for a seed: areas of one colour, light falling off, and noise whose amplitude
    goes with 1 / frequency, as in photographs of nature (Field 1987, J. Opt. Soc. Am. A 4, 2379)."""
    g = torch.Generator().manual_seed(seed)
    h, w, areas = 427, 640, 40
    rows, cols = torch.meshgrid(torch.linspace(0, 1, h), torch.linspace(0, 1.5, w), indexing="ij")
    seeds, colours = torch.rand(areas, 2, generator=g) * torch.tensor([1.0, 1.5]), torch.rand(areas, 3, generator=g)
    distance = (rows[..., None] - seeds[:, 0]).square() + (cols[..., None] - seeds[:, 1]).square()
    flat = colours[distance.argmin(-1)].permute(2, 0, 1)
    frequency = (torch.fft.fftfreq(h)[:, None].square() + torch.fft.rfftfreq(w).square()).sqrt()
    spectrum = torch.randn(3, h, w // 2 + 1, 2, generator=g) / frequency.clamp_min(1 / w)[..., None]
    noise = torch.fft.irfft2(torch.view_as_complex(spectrum), s=(h, w))
    light = 1 - 0.4 * (rows - 0.5).square() - 0.2 * cols
    return (255 * (0.15 + 0.7 * flat * light + 0.12 * noise / noise.std())).clamp(0, 255).round()


def photograph_batch(photographs: list[Tensor], batch: int, size: int) -> Tensor:
    """[batch, 3, size, size] in -1..1: crops along the pictures' diagonals, no two the same where there is room.

    A picture smaller than the crop is repeated. The scale is Xception's preprocessing, x / 127.5 - 1.
    """
    rounds = -(-batch // len(photographs))
    crops = []
    for i in range(batch):
        picture = photographs[i % len(photographs)]
        repeats = [-(-size // n) for n in picture.shape[1:]]
        picture = picture.repeat(1, *repeats)
        where = (i // len(photographs)) / max(rounds - 1, 1)
        top, left = (int(where * (n - size)) for n in picture.shape[1:])
        crops.append(picture[:, top : top + size, left : left + size])
    return torch.stack(crops) / 127.5 - 1


# Timing


def summary(seconds: list[float], figure: str) -> Times:
    """Microseconds: ``us`` is the one to quote ("min" or "median"), beside the spread and the count."""
    us = sorted(1e6 * s for s in seconds)

    def quantile(q: float) -> float:
        return us[min(int(q * len(us)), len(us) - 1)]

    times = {"min": us[0], "median": statistics.median(us), "p20": quantile(0.2), "p80": quantile(0.8)}
    return {"us": times[figure], **times, "samples": len(us)}


def time_on_cpu(calls: dict[str, Callable[[], Any]], rounds: int, seconds: float) -> dict[str, Times]:
    """Minimum of interleaved repetitions: every round calls each once, so that a slow moment strikes all alike.

    At least ``rounds`` rounds, and more until ``seconds`` have passed or there are ten times as many.
    """
    for call in calls.values():
        call()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    done = 0
    while done < rounds or (done < 10 * rounds and time.perf_counter() - start < seconds):
        for name, call in calls.items():
            before = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - before)
        done += 1
    return {name: summary(samples, "min") for name, samples in taken.items()}


#: Half of all medians within this of their minimum, as a machine gives them that has nothing else to do: of the records
#: here they are 1.02 to 1.07 of it.
QUIET = 1.2


def busy_note(times: Iterable[Times]) -> list[str]:
    """A sentence where times taken on a CPU say that it had other work; their minima are then not what it can do."""
    spreads = sorted(t["median"] / t["min"] for t in times)
    spread = spreads[len(spreads) // 2] if spreads else 1.0
    if spread <= QUIET:
        return []
    return [
        f"the machine was busy: half of the medians are over {spread:.2f} times their minimum, so no ratio here is to "
        "be relied on; on a quiet machine that is under 1.1"
    ]


def time_on_gpu(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Times]:
    """CUDA-event medians, interleaved; ``us`` with L2 flushed before each call, and the same warm under ``warm``.

    A warm call follows an untimed run of itself.
    """
    flush = Flush(calls.values())
    Event = torch.cuda.Event
    events: dict[tuple[str, bool], list[tuple[Any, Any]]] = {(n, w): [] for n in calls for w in (False, True)}
    for _ in range(rounds):
        for (name, warm), pairs in events.items():
            start, end = Event(enable_timing=True), Event(enable_timing=True)
            flush()
            if warm:
                calls[name]()
            start.record()
            calls[name]()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
    seconds = {key: [1e-3 * a.elapsed_time(b) for a, b in pairs] for key, pairs in events.items()}
    return {
        name: {**summary(seconds[name, False], "median"), "warm": summary(seconds[name, True], "median")}
        for name in calls
    }


@contextlib.contextmanager
def noting_backends() -> Iterator[dict[str, str]]:
    """Which backends ``auto`` takes for what runs meanwhile, by direction, filled in at the end."""
    taken: dict[str, str] = {}
    with dispatch.recording() as seen:
        yield taken
    with contextlib.suppress(RuntimeError):  # XSEP_BACKEND names one that cannot run, as whoever ran it was told
        for direction in findings.DIRECTIONS if seen else ():
            taken[direction] = ", ".join(sorted({dispatch.choice(p, "auto", direction).backend.name for p in seen}))


def measure_limits(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """(bytes/s, FLOP/s) of this device, measured: a copy far larger than its caches, and one large matrix product.

    The product is float32's where a CPU multiplies that faster: it is then what 16-bit values are converted for.
    """
    gpu = device.type == "cuda"
    if not gpu and dtype is not torch.float32:
        small = {str(t): torch.randn(192, 192).to(t) for t in (dtype, torch.float32)}
        tried = time_on_cpu({name: functools.partial(torch.mm, m, m) for name, m in small.items()}, 10, 0.0)
        dtype = dtype if tried[str(dtype)]["us"] < tried["torch.float32"]["us"] else torch.float32
    source = torch.ones(2**30 if gpu else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    n = 8192 if gpu else 1536
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    calls = {"copy": lambda: target.copy_(source), "gemm": lambda: torch.mm(a, b)}
    with products_like_convolutions():
        times = time_on_gpu(calls, 10) if gpu else time_on_cpu(calls, 30, 0.0)  # as often as what is held against it
    return 2e6 * source.numel() / times["copy"]["us"], 2e6 * n**3 / times["gemm"]["us"]


@contextlib.contextmanager
def products_like_convolutions() -> Iterator[None]:
    """Has PyTorch multiply float32 matrices on a GPU in the precision of its convolutions: by default they may use TF32
    and products may not, and it is convolutions that are held against the product."""
    matmul: Any = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if tf32_allowed() else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


# The machine


def cpu_features() -> list[str]:
    """Those instruction sets of this CPU that a kernel here may choose by."""
    known = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16")
    with contextlib.suppress(OSError):
        found = re.search(r"^flags\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return [flag for flag in known if flag in found[1].split()]
    return []


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def default_out(device: torch.device) -> Path:
    """benchmarks/results/<cpu and its vectors, or card>/"""
    name = device_name(device)
    if device.type == "cpu":
        name = with_vectors(name, torch.backends.cpu.get_cpu_capability())
    return HERE / "results" / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def with_vectors(cpu: str, capability: str) -> str:
    """One model name may stand for chips that differ in nothing more than in this: "AMD EPYC (AVX2)"."""
    return f"{cpu} ({capability})"


def source_digest() -> str:
    """sha256 over the names and contents of the sources: the imported package, and csrc/ where it lies beside."""
    package = Path(xsep.__file__).resolve().parent
    roots = {"xsep": package, "csrc": HERE.parent / "csrc"}
    whole = hashlib.sha256()
    for label, root in roots.items():
        for file in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".cpp", ".cu", ".cuh", ".h")):
            whole.update(f"{label}/{file.relative_to(root).as_posix()}\0".encode())
            whole.update(file.read_bytes() + b"\0")
    return whole.hexdigest()


def environment(device: torch.device) -> dict[str, Any]:
    """What a figure depends on."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    record: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(device),
        "cpu": cpu_name(),
        "cores": affinity,
        "threads": torch.get_num_threads(),
        "cpu_features": cpu_features(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "xsep": xsep.__version__,
        "source_digest": source_digest(),
        "digests": digest.all_sources(),
        "system": f"{platform.system()} {platform.machine()}",
        "settings": {k: v for k, v in os.environ.items() if k.startswith("XSEP_") or k == "ONEDNN_MAX_CPU_ISA"},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        record.update(
            capability=f"{properties.major}.{properties.minor}",
            cuda=torch.version.cuda,
            cudnn=torch.backends.cudnn.version(),
            gpu_memory_bytes=properties.total_memory,
        )
    return record


# Files


def prepare_out(out: Path) -> None:
    """Makes the directory and proves that a file can be written into it; raises BenchmarkError."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise BenchmarkError(f"nothing can be written into {str(out)!r}: {error.strerror}") from None


@contextlib.contextmanager
def whole_files(out: Path) -> Iterator[Callable[[str], Path]]:
    """Gives temporary paths for file names in ``out``; all get their names at the end, or, on an error, none does."""
    pending: dict[Path, Path] = {}

    def temporary(name: str) -> Path:
        path = out / f".{os.getpid()}.{name}"
        pending[path] = out / name
        return path

    try:
        yield temporary
        for path, final in pending.items():
            os.replace(path, final)
    except OSError as error:
        raise BenchmarkError(f"nothing can be written into {str(out)!r}: {error.strerror}") from None
    finally:
        for path in pending:
            path.unlink(missing_ok=True)


def chart_module(name: str) -> Optional[Any]:
    """The module that draws, or None where matplotlib is missing: `make report` draws from the JSON later."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def write_results(out: Path, name: str, record: dict[str, Any], chart: str) -> str:
    """Writes name.json and, where matplotlib is there, name.png by ``chart.draw``; says which, for people.

    The figures first: a chart that cannot be drawn must not cost what was measured.
    """
    drawer = chart_module(chart)
    with whole_files(out) as temporary:
        write_json(temporary(f"{name}.json"), record)
    if drawer is None:
        return f"{out / name}.json; no chart, because matplotlib is not installed"
    with whole_files(out) as temporary:
        drawer.draw(record, temporary(f"{name}.png"))
    return f"{out / name}.json and {out / name}.png"


def write_json(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=1) + "\n")
