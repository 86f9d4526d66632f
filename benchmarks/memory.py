"""E, peak memory of 576 units over 32 images, as a multiple of a plain forward of these images.

    python -m benchmarks.memory [--quick] [--threads N] [--device cuda] [--only vgg16]

Each side has a process of its own: the peak of its resident memory above what it held before the
call, less what the call returns. Model, images and PyTorch's libraries, each page of their files, are
there before. The first call's peak holds the code, too, that the library behind PyTorch's convolutions
makes for each size it meets and keeps; a later call's, before which freed memory is handed back to the
system, does not. How glibc's heap comes to lie differs from process to process: the table has medians.
On CUDA PyTorch counts what it allots, so there both are that peak.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import mmap
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from benchmarks._cases import CASES, Case, build, images_of, strongest_units
from benchmarks._measure import Table, fewer, geometric_mean, number, parsed, parser, spread
from benchmarks._rival import Rival
from lit_deconv import Deconvnet

SIDES = ("forward", "ours", "Captum")
# Seconds that the processes of a row may take.
_BUDGET = 90.0
_LIBRARIES = ("libtorch_cpu.so", "libtorch_python.so", "libc10.so")


class Peaks(NamedTuple):
    """Bytes above the baseline, of the first call and of a later one."""

    first: int
    later: int


def peaks(case: Case, side: str, units: pathlib.Path, threads: int | None, device: str) -> Peaks:
    """Bytes above the baseline, on a CPU measured in a fresh process."""
    if device != "cpu":
        return measured_here(case, side, torch.load(units), device)
    command = [sys.executable, "-m", "benchmarks.memory", "--child", side, "--units", str(units)]
    command += ["--only", str(case)] + (["--threads", str(threads)] if threads else [])
    root = pathlib.Path(__file__).parents[1]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=root)
    return Peaks(*json.loads(found.stdout.splitlines()[-1]))


def measured_here(case: Case, side: str, units: Tensor, device: str = "cpu") -> Peaks:
    """What ``peaks`` returns, in this process."""
    model, images = build(case.model).to(device), images_of(case.size).to(device)
    net, rival = Deconvnet(model, case.layer), Rival(model, case.layer)
    run: Callable[[], Any] = {
        "forward": lambda: _forward(model, images),
        "ours": lambda: net.reconstruct(images, units, crop=True),
        "Captum": lambda: rival.in_batches(images, units[:32], 32),
    }[side]
    if device == "cpu":
        _load_libraries()
    return Peaks(_above(run, device), _above(run, device))


def _above(run: Callable[[], Any], device: str) -> int:
    """The peak of one call above what there was before, less what it returns."""
    gc.collect()
    if device == "cpu":
        ctypes.CDLL(None).malloc_trim(0)  # what is free goes back to the system
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _status("VmRSS")
        result = run()
        above = _status("VmHWM") - before
    else:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        above = torch.cuda.max_memory_allocated() - before
    return above - sum(leaf.nbytes for leaf in tree_leaves(result) if isinstance(leaf, Tensor))


def _load_libraries() -> None:
    """Whatever is loaded and built on first use is no cost of any side."""
    tiny = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), nn.ReLU()
    )
    images, units = torch.randn(2, 3, 12, 12), torch.tensor([[0, 1, 1, 1], [1, 0, 0, 2]])
    for via in ("images", "patches"):
        Deconvnet(tiny, "4").reconstruct(images, units, crop=True, via=via)
    Rival(tiny, "4").in_batches(images, units, 2)
    for mapping in pathlib.Path("/proc/self/maps").read_text().splitlines():
        addresses, permissions, *_, path = mapping.split()
        if pathlib.Path(path).name in _LIBRARIES and permissions.startswith("r"):
            first, stop = (int(address, 16) for address in addresses.split("-"))
            for page in range(first, stop, mmap.PAGESIZE):
                ctypes.string_at(page, 1)


def _forward(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images)


def _status(field: str) -> int:
    """Bytes, from this process's status."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise LookupError(f"/proc/self/status has no {field}; this benchmark needs Linux")


def medians(
    case: Case, units: pathlib.Path, threads: int | None, device: str, repetitions: int
) -> tuple[dict[str, Peaks], str]:
    """Of each side, in turn, as often as takes up to ``_BUDGET``; the spread of ours in first calls."""
    found: dict[str, list[Peaks]] = {side: [] for side in SIDES}
    started = time.perf_counter()
    for repetition in range(repetitions):
        for side in SIDES:
            found[side].append(peaks(case, side, units, threads, device))
        taken = time.perf_counter() - started
        if taken * (repetition + 2) / (repetition + 1) > _BUDGET:
            break
    typical = {
        side: Peaks(*(int(statistics.median(column)) for column in zip(*each, strict=True)))
        for side, each in found.items()
    }
    return typical, spread([each.first for each in found["ours"]])


def table(cases: Sequence[Case], repetitions: int, threads: int | None, device: str) -> str:
    """The table."""
    shown = Table(
        "model:", "layer:", "plain forward, MB", "ours, MB", "spread", "ours / forward",
        "Captum, 32 units a call, MB", "Captum / forward", "later: forward", "ours",
        "ours / forward", "Captum",
    )  # fmt: skip
    ratios, later_ratios = [], []
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            units = pathlib.Path(folder) / "units.pt"
            model, images = build(case.model).to(device), images_of(case.size).to(device)
            torch.save(strongest_units(model, case.layer, images), units)
            del model, images
            sides, ours_spread = medians(case, units, threads, device, repetitions)
        forward, ours, captum = (sides[side].first for side in SIDES)
        later = [sides[side].later for side in SIDES]
        ratios.append(ours / forward)
        later_ratios.append(later[1] / later[0])
        shown.row(
            case.model, case.layer, number(forward / 2**20), number(ours / 2**20),
            ours_spread, number(ours / forward), number(captum / 2**20), number(captum / forward),
            number(later[0] / 2**20), number(later[1] / 2**20), number(later[1] / later[0]),
            number(later[2] / 2**20),
        )  # fmt: skip
    return (
        f"{shown}\n\nLargest {number(max(ratios))}, geometric mean {number(geometric_mean(ratios))}; "
        f"of a later call {number(max(later_ratios))} and {number(geometric_mean(later_ratios))}. "
        f"576 units over 32 images, `crop=True`; the returned tensors are left out on all sides. "
        f"Medians of up to {repetitions} processes a side ({fewer(_BUDGET)}); spread is largest minus "
        f"smallest over the median."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    described = parser(__doc__)
    described.add_argument("--child", choices=SIDES, help=argparse.SUPPRESS)
    described.add_argument("--units", type=pathlib.Path, help=argparse.SUPPRESS)
    asked = parsed(described, arguments)
    cases = [case for case in CASES if asked.only in str(case)]
    if asked.child:
        print(json.dumps(measured_here(cases[0], asked.child, torch.load(asked.units))))
        return 0
    if asked.quick and not asked.only:
        cases = [case for case in cases if case.model in ("alexnet", "cifar")]
    # A device has no processes of their own, and counts the same each time.
    repetitions = asked.repetitions if asked.device == "cpu" else 1
    print(table(cases, repetitions, asked.threads, asked.device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
