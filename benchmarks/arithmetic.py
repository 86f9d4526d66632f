"""F, operations: those done over those needed, their rate over the machine's best, where the time goes.

    python -m benchmarks.arithmetic [--quick] [--threads N] [--device cuda] [--only vgg16]

Needed: forward, in each image the union of what its units see of each map (or all of it), and of
the layer itself the units alone; back, each unit's window in each map, clipped to it, and of the
layer the one channel that is not zero. Done: what PyTorch's counter sees of one warm call. Both count
multiplications and additions of convolutions, which is all that is large here; a 3x3 one by tiles, as
the engine does it on CPUs for many channels, does 4/9 of what is counted as needed.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks._cases import CASES, Case, build, images_of, strongest_units
from benchmarks._measure import Table, geometric_mean, interleaved, number, parsed, parser
from lit_deconv import Deconvnet
from lit_deconv.engine import Op, Tape, Value, record, undisturbed
from lit_deconv.engine.patches import Extent, plan
from lit_deconv.engine.walk import on_path


def needed(model: nn.Module, layer: str, images: Tensor, units: Tensor) -> tuple[int, int]:
    """Operations that the units take, forward and back.

    Args:
        model: The model.
        layer: Dotted name of the layer.
        images: [N, C, H, W].
        units: int64 [U, 4].
    """
    tape = _tape(model, layer, images[:1])
    target = tape.layers[layer]
    extents = plan(tape, target).extents
    forward = back = 0
    last = True
    for op, value in on_path(tape, target):
        if op.name != "convolution":
            continue
        per_place = 2 * op["weight"].numel()
        sides = _clipped(extents[value], value, units)
        areas = (sides[:, :, 1] - sides[:, :, 0]).prod(1)
        if last and _carries_one_channel(tape, op, target):
            forward += len(units) * per_place // len(op["weight"])
            back += len(units) * per_place // len(op["weight"])
            last = False
            continue
        last = False
        forward += per_place * _union(sides, units[:, 0], value)
        back += per_place * int(areas.sum())
    return forward, back


def _tape(model: nn.Module, layer: str, images: Tensor) -> Tape:
    with undisturbed(model), torch.no_grad():
        return record(model, (images,), {layer: model.get_submodule(layer)}, model=model)


def _carries_one_channel(tape: Tape, op: Op, target: Value) -> bool:
    """Whether this convolution makes the layer's own channels, with nothing but pointwise ops between."""
    between = itertools.takewhile(lambda pair: pair[0] is not op, on_path(tape, target))
    return all(step.name in ("relu", "batch_norm", "native_batch_norm") for step, _ in between)


def _clipped(extent: Extent, value: Value, units: Tensor) -> Tensor:
    """First and last + 1 of each unit's window, int64 [U, D, 2]."""
    sides = []
    for dim, whole in enumerate(value.map_size):
        first = units[:, 2 + dim] * extent.stride[dim] + extent.start[dim]
        sides.append(torch.stack([first, first + extent.size[dim]], 1).clamp(0, whole))
    return torch.stack(sides, 1)


def _union(sides: Tensor, samples: Tensor, value: Value) -> int:
    """Places of a map that at least one unit of an image sees, over all images."""
    seen = torch.zeros(int(samples.max()) + 1, *value.map_size, dtype=torch.bool)
    for sample, ((top, bottom), (left, right)) in zip(
        samples.tolist(), sides.tolist(), strict=True
    ):
        seen[sample, top:bottom, left:right] = True
    return int(seen.sum())


def done(net: Deconvnet, images: Tensor, units: Tensor) -> int:
    """Operations of one call, by PyTorch's counter."""
    in_place = {torch.ops.aten.baddbmm_: _operations}  # which the counter does not know
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        net.reconstruct(images, units, crop=True)
    return counter.get_total_flops()


def _operations(_: Any, one: torch.Size, other: torch.Size, **options: Any) -> int:
    """Of a batch of products of matrices, by their shapes."""
    return 2 * one.numel() * other[-1]


def best_rate(device: str) -> float:
    """The best rate at which this machine convolves, operations a second, over a few large shapes."""
    best = 0.0
    for channels, side, kernel, layout in itertools.product(
        (64, 128, 256, 512), (14, 28, 56), (3,), (torch.contiguous_format, torch.channels_last)
    ):
        count = max(1, 2**22 // (channels * side**2))
        images = torch.randn(count, channels, side, side, device=device)
        images = images.contiguous(memory_format=layout)
        weight = torch.randn(channels, channels, kernel, kernel, device=device)
        weight = weight.contiguous(memory_format=layout)
        operations = 2 * weight.numel() * count * side**2
        times = interleaved(
            {"": partial(F.conv2d, images, weight, padding=1)},
            3,
            device,
        )
        best = max(best, operations / min(times[""].wall))
    return best


# What PyTorch calls its ops, by what they are to a reconstruction. The first that fits counts.
_KINDS = {
    "convolution": ("mkldnn_convolution", "convolution", "conv_", "slow_conv", "thnn", "cudnn",
                    "addmm", "bmm", "mm"),
    "pooling": ("max_pool",),
    "gathers": ("index", "gather", "scatter", "where", "arange"),
    "copies": ("copy_", "cat", "clone", "constant_pad", "fill_", "contiguous", "zero_", "shuffle"),
    "Python": ("select", "empty", "slice", "view", "resize"),  # what a call costs, no work
    "pointwise": ("relu", "mul", "add", "sub", "div", "batch_norm", "clamp", "remainder", "eq", "ge",
                  "lt", "le", "gt", "bitwise", "max", "floor", "threshold"),
}  # fmt: skip


def where_the_time_goes(net: Deconvnet, images: Tensor, units: Tensor, seconds: float) -> str:
    """Shares of the time of one call by kind of op; the rest is Python and PyTorch's calls.

    On CUDA shares of the ``seconds`` that a call takes unprofiled; the device waits for the rest.
    """
    on_cpu = images.device.type == "cpu"
    activities = [ProfilerActivity.CPU] + ([] if on_cpu else [ProfilerActivity.CUDA])
    with (
        profile(activities=activities) as profiler,
        torch.profiler.record_function("call"),
    ):
        net.reconstruct(images, units, crop=True)[0].flatten()[0].item()
    events = profiler.key_averages()
    spent = [e.self_cpu_time_total if on_cpu else _on_device(e) for e in events]
    total = sum(spent) if on_cpu else seconds * 1e6
    rest = "Python" if on_cpu else "device idle"
    shares = dict.fromkeys([*_KINDS, rest], 0.0)
    for event, microseconds in zip(events, spent, strict=True):
        name = event.key.removeprefix("aten::")
        kinds = (kind for kind, parts in _KINDS.items() if any(part in name for part in parts))
        shares[next(kinds, rest)] += microseconds / total
    if not on_cpu:
        shares[rest] = max(0.0, 1 - sum(spent) / total)
    largest = sorted(shares.items(), key=lambda item: -item[1])
    return ", ".join(f"{kind} {share:.0%}" for kind, share in largest if share >= 0.05)


def _on_device(event: Any) -> float:
    """Microseconds of an op's kernels; the kernels' own rows would count them twice."""
    is_op = event.key.startswith("aten::")
    return event.self_device_time_total if is_op else 0.0


def measure(cases: Sequence[Case], repetitions: int, device: str) -> str:
    """The table."""
    best = best_rate(device)
    table = Table(
        "model:", "layer:", "needed forward, GFLOP", "needed back", "done", "done / needed",
        "ms", "GFLOP/s", "of the best", "time goes to:",
    )  # fmt: skip
    over, rates = [], []
    for case in cases:
        model, images = build(case.model).to(device), images_of(case.size).to(device)
        units = strongest_units(model, case.layer, images)
        net = Deconvnet(model, case.layer)
        forward, back = needed(model, case.layer, images, units)
        net.reconstruct(images, units, crop=True)
        operations = done(net, images, units)
        times = interleaved(
            {"ours": partial(net.reconstruct, images, units, crop=True)},
            repetitions,
            device,
        )  # fmt: skip
        seconds = times["ours"].seconds
        over.append(operations / (forward + back))
        rates.append(operations / seconds / best)
        table.row(
            case.model, case.layer, number(forward / 1e9), number(back / 1e9),
            number(operations / 1e9), number(over[-1]), number(1e3 * seconds),
            number(operations / seconds / 1e9), f"{rates[-1]:.0%}",
            where_the_time_goes(net, images, units, seconds),
        )  # fmt: skip
    return (
        f"{table}\n\nThe machine's best convolution: {number(best / 1e9)} GFLOP/s. Geometric means: done "
        f"over needed {number(geometric_mean(over))}, rate over the best "
        f"{geometric_mean(rates):.0%}. The products with which the first filters start a unit are no "
        f"convolutions to the counter, and Winograd's tiles do fewer operations than are counted as needed."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    asked = parsed(parser(__doc__), arguments)
    cases = [case for case in CASES if asked.only in str(case)]
    if asked.quick and not asked.only:
        cases = [case for case in cases if case.model in ("alexnet", "cifar")]
    print(measure(cases, asked.repetitions, asked.device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
