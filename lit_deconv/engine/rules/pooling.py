"""Max-pooling: unpool to the switches of that forward pass (Zeiler & Fergus, 2.1)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_deconv.engine.errors import refusal
from lit_deconv.engine.registry import reverse_rule
from lit_deconv.engine.rules._shared import refuse_samples
from lit_deconv.engine.rules.layout import (
    by_map,
    channels_last,
    fast_in_channels_last,
    transposed,
)
from lit_deconv.engine.rules.resampling import per_dim
from lit_deconv.engine.signal import Signal, Window, flat_grid
from lit_deconv.engine.tape import Op, Options

# Numbers that are worked on at a time on a CPU: they fit its cache.
_CACHED = 1 << 18

# Feature maps that the kernel for channels_last takes side by side, at least.
_SIDE_BY_SIDE = 16


@dataclass(frozen=True)
class Switches:
    """Where in its window each pooled value came from.

    Attributes:
        codes: [N, C, *map], uint8 where the kernel has at most 255 places: the number of the place
            in the kernel, row-major. One byte a switch, an eighth of PyTorch's indices.
        kernel: Kernel size per dimension.
        stride: Stride per dimension.
        padding: Padding per dimension.
        dilation: Dilation per dimension.
        overlap: "add" (the adjoint) or "place" for windows that share a switch.
        window: Where the codes lie, when they were recorded on patches ([U, C, *window]); None when
            they cover the whole map of each image.
    """

    codes: Tensor
    kernel: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    overlap: str = "add"
    window: Window | None = None

    @property
    def disjoint(self) -> bool:
        """Whether no two windows share a pixel."""
        return all(
            (kernel - 1) * dilation < stride
            for kernel, dilation, stride in zip(
                self.kernel, self.dilation, self.stride, strict=True
            )
        )

    def covered(self, size: Sequence[int]) -> list[int]:
        """Extent of all pixels under a block of ``size`` pooled values."""
        return [
            (extent - 1) * stride + (kernel - 1) * dilation + 1
            for extent, stride, kernel, dilation in zip(
                size, self.stride, self.kernel, self.dilation, strict=True
            )
        ]

    def past_padding(self, size: Sequence[int], map_size: Sequence[int]) -> bool:
        """Whether a block of ``size`` pooled values reaches behind the map and its padding."""
        return any(
            extent > whole + 2 * padding
            for extent, whole, padding in zip(
                self.covered(size), map_size, self.padding, strict=True
            )
        )


def switch_codes(
    indices: Tensor,
    map_size: Sequence[int],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    """PyTorch's indices into the map as places in the kernel.

    Args:
        indices: int64 [N, C, *pooled], flat positions in a map of ``map_size``.
        map_size: Sizes of the map that was pooled.
        kernel: Per dimension, as are the next three.
        stride: Step of the windows.
        padding: What was put in front of the map.
        dilation: Step inside a window.
    """
    dtype = torch.uint8 if math.prod(kernel) <= 255 else torch.int32
    spatial, device = len(kernel), indices.device
    lines = [
        math.prod(map_size[dim + 1 :]) for dim in range(spatial)
    ]  # flat steps of each dimension
    places = itertools.product(*(range(extent) for extent in kernel))
    steps = [_dot(place, dilation, lines) for place in places]
    if len(set(steps)) == len(steps):
        # The flat distance from the window's first pixel names the place: one look-up a switch.
        table = torch.zeros(max(steps) + 1, dtype=dtype, device=device)
        numbers = torch.arange(len(steps), dtype=dtype, device=device)
        table.scatter_(
            0, flat_grid(kernel, dilation, [0] * spatial, lines, device).flatten(), numbers
        )
        begin = [-side for side in padding]
        first = flat_grid(indices.shape[2:], stride, begin, lines, device)
        codes = torch.empty(indices.shape, dtype=dtype, device=device)
        pixels = spatial == 2 and indices.is_contiguous(memory_format=torch.channels_last)
        pixels = pixels and not indices.is_contiguous()
        for some, found in zip(
            indices.split(_few(indices)), codes.split(_few(indices)), strict=True
        ):
            distance = some - first
            if pixels:  # a few bytes are turned faster than the indices
                at_pixels = distance.permute(0, 2, 3, 1).flatten(1, 2)
                numbered = table.index_select(0, at_pixels.reshape(-1)).view(at_pixels.shape)
                found.flatten(2).copy_(transposed(numbered))
            else:
                found.copy_(table.index_select(0, distance.reshape(-1)).view(some.shape))
        return codes
    place = torch.zeros_like(indices)
    rest, per_step = indices, 1
    for dim in reversed(range(spatial)):
        coordinate = rest % map_size[dim]
        rest = rest.div(map_size[dim], rounding_mode="floor")
        origin = torch.arange(indices.shape[2 + dim], device=indices.device) * stride[dim]
        origin = (origin - padding[dim]).view([-1 if d == dim else 1 for d in range(spatial)])
        step = (coordinate - origin).div_(dilation[dim], rounding_mode="floor")
        step.clamp_(0, kernel[dim] - 1)  # where a window has no place in the map
        place.add_(step, alpha=per_step)
        per_step *= kernel[dim]
    return place.to(dtype).contiguous()


def _few(indices: Tensor) -> int:
    """How many images at a time: what is made on the way of a few fits a CPU's cache."""
    if indices.device.type != "cpu" or indices.numel() == 0:
        return max(1, len(indices))
    return max(1, _CACHED // indices[0].numel())


def _dot(*factors: Sequence[int]) -> int:
    return sum(math.prod(step) for step in zip(*factors, strict=True))


def _keep_switches(op: Op, tensors: Mapping[str, Any], result: Any, options: Options) -> Switches:
    indices = result[1]
    spatial = int(op.name[8])
    if tensors["self"].ndim != spatial + 2:
        raise refusal(op, "pools a tensor without a dimension of images")
    kernel = per_dim(op["kernel_size"], spatial)
    stride = per_dim(op["stride"] or op["kernel_size"], spatial)
    padding, dilation = per_dim(op["padding"], spatial), per_dim(op["dilation"], spatial)
    grid = kernel, stride, padding, dilation
    return Switches(switch_codes(indices, tensors["self"].shape[2:], *grid), *grid, options.overlap)


def pooled(pool: Callable[..., Any], arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Max-pooling with indices, on a CPU by its kernel for channels_last, the only vectorised one.

    Each map is pooled by itself, so any of them may lie side by side as channels.

    Args:
        pool: The aten op.
        arguments: Its arguments by name.

    Returns:
        What the op returns, to the bit.
    """
    maps: Tensor = arguments["self"]
    size = maps.shape[2:]
    if not _turning_pays(pool, maps) or size.numel() > torch.iinfo(torch.int32).max:
        return pool(**arguments)
    flat = maps.reshape(-1, size.numel())
    found: list[Tensor] = []
    start = 0
    # Transposed as matrices, which is fast.
    for some in flat.split(max(_SIDE_BY_SIDE, _CACHED // size.numel())):
        count = len(some)
        channels = transposed(some).view(1, *size, count).permute(0, 3, 1, 2)
        try:
            parts = pool(**{**arguments, "self": channels})
        except RuntimeError:
            return pool(**arguments)  # fails, too, and names the sizes that the model gave
        if not found:
            found = [part.new_empty(len(flat), *part.shape[2:]) for part in parts]
        for whole, part in zip(found, parts, strict=True):
            pixels = part.permute(0, 2, 3, 1).reshape(-1, count)
            if pixels.dtype == torch.int64:
                pixels = pixels.int()  # which is turned faster
            whole[start : start + count].flatten(1).copy_(transposed(pixels))
        start += count
    values, indices = (whole.unflatten(0, maps.shape[:2]) for whole in found)
    return values, indices


def pooled_channels_last(
    pool: Callable[..., Any], arguments: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """The same, left in ``channels_last`` where the convolutions behind have fast kernels for that."""
    maps: Tensor = arguments["self"]
    fast = fast_in_channels_last(maps) and _turning_pays(pool, maps)
    if not fast or maps.shape[1] < _SIDE_BY_SIDE:
        return pooled(pool, arguments)
    return pool(**{**arguments, "self": channels_last(maps)})


def _turning_pays(pool: Callable[..., Any], maps: Tensor) -> bool:
    plain = maps.device.type == "cpu" and maps.dtype in (torch.float32, torch.float64)
    of_images = pool is torch.ops.aten.max_pool2d_with_indices.default and maps.ndim == 4
    return plain and of_images and maps.is_contiguous() and maps.numel() > 0


@reverse_rule(
    "max_pool2d_with_indices", "max_pool3d_with_indices", "max_pool1d_with_indices",
    after=_keep_switches, run=pooled, run_laid=pooled_channels_last, windows=True, one_hot=True,
    kind="switches",
)  # fmt: skip
def max_pool(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """Each value to its switch; where windows overlap and share one, values add (or are placed)."""
    switches: Switches = op.kept
    map_size = op["self"].map_size
    here, codes = signal.map_by_map(switches.codes)
    if signal.window is None:
        codes = here.of(codes)
        yield op["self"], signal.anew(unpool(signal.values, codes, switches, map_size))
        return
    within = switches.window
    codes = here.of_window(codes) if within is None else _under(here, codes, within)
    unpooled = unpool(signal.values, codes, switches)
    window = signal.window.moved(switches.stride, [-side for side in switches.padding])
    yield op["self"], signal.anew(unpooled).replaced(window=window).trimmed(map_size)


def _under(signal: Signal, codes: Tensor, window: Window) -> Tensor:
    """The codes of a signal's window out of those of a larger one."""
    assert signal.window is not None
    codes = signal.of(codes)
    for dim, (first, start, extent) in enumerate(
        zip(signal.window.shift, window.shift, signal.values.shape[2:], strict=True), start=2
    ):
        codes = codes.narrow(dim, first - start, extent)
    return codes


def unpool(
    values: Tensor, codes: Tensor, switches: Switches, map_size: Sequence[int] | None = None
) -> Tensor:
    """Max-unpooling to the places that the codes name.

    Args:
        values: [U, C, *map].
        codes: The switches of the same places.
        switches: The geometry of the pool.
        map_size: Of the map that was pooled, where ``values`` are all that came of it.

    Returns:
        [U, C, *map_size]; without it [U, C, *canvas], all pixels that the windows cover, from the first
        window's first pixel on.
    """
    gathers = values.device.type in ("cpu", "cuda")  # PyTorch's kernel adds in a fixed order there
    if not gathers or values.ndim != 4 or switches.overlap != "add":
        canvas = _unpool_by_comparison(values, codes, switches)
    elif map_size is None or _steps_over(switches.dilation, map_size):
        canvas = _unpool_by_index(values, codes, switches)
    else:
        return _unpool_by_index(values, codes, switches, map_size)
    # The canvas starts in the padding, and ends where the last window does.
    return canvas if map_size is None else _cut(canvas, switches.padding, map_size)


def _steps_over(dilation: Sequence[int], map_size: Sequence[int]) -> bool:
    """Whether a window may have no place in the map at all: then its code names one in the padding."""
    return any(step > extent for step, extent in zip(dilation, map_size, strict=True))


def _unpool_by_comparison(values: Tensor, codes: Tensor, switches: Switches) -> Tensor:
    """One pass per place in the kernel: no scatter, so the same on every device and run."""
    canvas = values.new_zeros(*values.shape[:2], *switches.covered(values.shape[2:]))
    places = list(enumerate(itertools.product(*(range(kernel) for kernel in switches.kernel))))
    for code, place in reversed(places):
        along = [
            slice(step * dilation, step * dilation + (extent - 1) * stride + 1, stride)
            for step, dilation, extent, stride in zip(
                place, switches.dilation, values.shape[2:], switches.stride, strict=True
            )
        ]
        index = (slice(None), slice(None), *along)
        target = canvas[index]
        hit = codes == code
        if switches.disjoint:
            target.copy_(torch.where(hit, values, 0))
        elif switches.overlap == "place":
            target.copy_(torch.where(hit, values, target))
        else:
            target.add_(torch.where(hit, values, 0))
    return canvas


def _unpool_by_index(
    values: Tensor, codes: Tensor, switches: Switches, map_size: Sequence[int] | None = None
) -> Tensor:
    """One pass by PyTorch's own kernel, which gathers: to the bit the same in every run."""
    size, padding, ceil_mode = values.shape[2:], [0, 0], False
    if map_size is None:
        map_size = switches.covered(size)
    else:
        padding, ceil_mode = switches.padding, switches.past_padding(size, map_size)
    frame = values.new_empty(1).expand(*values.shape[:2], *map_size)
    if values.numel() == 0:
        return values.new_zeros(frame.shape)
    lines, device = [map_size[1], 1], values.device
    origin = flat_grid(size, switches.stride, [-side for side in padding], lines, device)
    steps = flat_grid(switches.kernel, switches.dilation, [0, 0], lines, device).flatten()
    codes = codes.expand(values.shape)
    index = steps.index_select(0, codes.reshape(-1).to(torch.int32)).view(codes.shape).add_(origin)
    # Of contiguous values: on CUDA others are scattered, in any order.
    return torch.ops.aten.max_pool2d_with_indices_backward(
        by_map(values), frame, switches.kernel, switches.stride, padding, switches.dilation,
        ceil_mode, index,
    )  # fmt: skip


def _cut(canvas: Tensor, start: Sequence[int], size: Sequence[int]) -> Tensor:
    """A map out of a canvas that may reach past it, or end before it does."""
    for dim, (begin, length) in enumerate(zip(start, size, strict=True), start=2):
        missing = begin + length - canvas.shape[dim]
        if missing > 0:
            canvas = torch.nn.functional.pad(
                canvas, [0, 0] * (canvas.ndim - 1 - dim) + [0, missing]
            )
        canvas = canvas.narrow(dim, begin, length)
    return canvas


def _keep_flat_indices(op: Op, tensors: Mapping[str, Any], result: Any, options: Options) -> Tensor:
    return result[1].clone()


@reverse_rule(
    "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d", "fractional_max_pool2d",
    "fractional_max_pool3d", after=_keep_flat_indices, kind="switches",
)  # fmt: skip
def irregular_max_pool(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """The same for pools whose windows are not on a grid."""
    map_size = op["self"].map_size
    indices = signal.of(op.kept).flatten(2)

    def back(values: Tensor) -> Tensor:
        flat = values.new_zeros(*values.shape[:2], map_size.numel())
        flat.scatter_add_(2, indices.expand(values.shape[0], -1, -1), values.flatten(2))
        return flat.unflatten(2, map_size)

    yield op["self"], signal.map(back)


def _keep_winner(op: Op, tensors: Mapping[str, Any], result: Any, options: Options) -> Any:
    if op.arguments.get("dim") is None:
        raise refusal(op, "takes one maximum over all images")
    return result[1].clone()


@reverse_rule("max", "min", after=_keep_winner, kind="switches")
def max_along(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """Maximum along one dimension: to the winner."""
    (dim,) = refuse_samples(op, [op["dim"]], len(op["self"].shape))
    shape = op["self"].shape[1:]
    winner = signal.of(op.kept)

    def back(values: Tensor) -> Tensor:
        index = winner.expand(values.shape[0], *winner.shape[1:])
        if not op["keepdim"]:
            values, index = values.unsqueeze(dim), index.unsqueeze(dim)
        return values.new_zeros(values.shape[0], *shape).scatter_(dim, index, values)

    yield op["self"], signal.map(back)
