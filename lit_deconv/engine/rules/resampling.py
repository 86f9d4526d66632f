"""Padding, interpolation and average pooling: linear maps that act on each dimension alone.

Such an op is a matrix per dimension. The matrix is what the op itself does to the identity, so the
adjoint needs no second set of conventions for borders, corners and rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_deconv.engine.errors import refusal
from lit_deconv.engine.registry import reverse_rule
from lit_deconv.engine.rules._shared import output, working_dtype
from lit_deconv.engine.signal import Signal
from lit_deconv.engine.tape import Op


def transposed_along(values: Tensor, matrices: Sequence[Tensor | None]) -> Tensor:
    """Applies the transpose of one matrix along each trailing dimension.

    Args:
        values: [U, C, *out].
        matrices: One [in, out] a trailing dimension, None for those left as they are.

    Returns:
        [U, C, *in].
    """
    first = values.ndim - len(matrices)
    for dim, matrix in enumerate(matrices, start=first):
        if matrix is not None:
            values = (values.movedim(dim, -1) @ matrix.T.to(values.dtype)).movedim(-1, dim)
    return values


def matrices_of(op: Op, like: Tensor) -> list[Tensor]:
    """One matrix [in, out] a spatial dimension: what a separable op does to the identity there.

    Args:
        op: A recorded op of this file, other than constant padding.
        like: For dtype and device.
    """
    along = _ALONG[op.name]
    return [
        along(op, dim, torch.eye(length, dtype=working_dtype(like), device=like.device)[:, None])[
            :, 0
        ]
        for dim, length in enumerate(op["self"].shape[2:])
    ]


# Per op name a function of the op, a spatial dimension and the identity [in, 1, in], giving what the
# op makes of it along that dimension, [in, 1, out].
_ALONG: dict[str, Callable[[Op, int, Tensor], Tensor]] = {}


def separable(*names: str) -> Callable[[Callable[[Op, int, Tensor], Tensor]], None]:
    """Registers ops that are one matrix per dimension; their adjoint is its transpose."""

    def register(along: Callable[[Op, int, Tensor], Tensor]) -> None:
        _ALONG.update(dict.fromkeys(names, along))

        @reverse_rule(*names)
        def transposed(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
            matrices = matrices_of(op, signal.values)
            yield op["self"], signal.map(lambda values: transposed_along(values, matrices))

    return register


# ---- padding ----------------------------------------------------------------------------------


def padding_per_dim(op: Op) -> list[tuple[int, int]]:
    """(before, after) for each dimension behind the samples, channels first."""
    pad = list(op["pad"] if "pad" in op.arguments else op["padding"])
    ndim = len(op["self"].shape)
    pairs = [(pad[2 * i], pad[2 * i + 1]) for i in range(len(pad) // 2)]
    pairs += [(0, 0)] * (ndim - len(pairs))
    pairs.reverse()
    if pairs[0] != (0, 0):
        raise refusal(op, "pads the dimension of images")
    return pairs[1:]


def _map_only(op: Op) -> bool:
    return len(op["self"].shape) > 2


@reverse_rule("constant_pad_nd", windows=_map_only, kind="view")
def constant_pad(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """Crops; a window moves, and what of it lies in the padding goes."""
    (before, after), *spatial = padding_per_dim(op)
    values = signal.values
    if before or after:
        values = F.pad(values, [0, 0] * len(spatial) + [-before, -after])
    if signal.window is not None:
        ones = [1] * len(spatial)
        window = signal.window.moved(ones, [-start for start, _ in spatial])
        moved = Signal(values, signal.sample, window).trimmed(op["self"].map_size)
        yield op["self"], moved.clipped(op["self"].map_size)
        return
    negative = [-side for pair in reversed(spatial) for side in pair]
    yield op["self"], signal.map(lambda _: F.pad(values, negative))


@separable(
    "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d",
    "replication_pad2d", "replication_pad3d", "_pad_circular",
)  # fmt: skip
def pad_by_copies(op: Op, dim: int, eye: Tensor) -> Tensor:
    """Each copy goes back to where it was copied from."""
    mode = {"refle": "reflect", "repli": "replicate"}.get(op.name[:5], "circular")
    return F.pad(eye, padding_per_dim(op)[1 + dim], mode=mode)


# ---- interpolation ----------------------------------------------------------------------------


def _scale(op: Op, dim: int, spatial: int) -> float | None:
    if spatial == 1:
        return op.arguments.get("scales")
    names = ("scales_d", "scales_h", "scales_w")[-spatial:]
    return op.arguments.get(names[dim])


@separable(
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact1d",
    "_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "upsample_linear1d",
    "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d", "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
)  # fmt: skip
def interpolate(op: Op, dim: int, eye: Tensor) -> Tensor:
    """The op itself, on a map that is a single row."""
    # PyTorch's antialiasing mistakes a map of width 1 for channels_last: the row lies along the last.
    spatial = len(output(op).shape) - 2
    before = [1] * (spatial - 1)
    shape, size = [*before, eye.shape[-1]], [*before, output(op).shape[2 + dim]]
    corners = () if "nearest" in op.name else (op["align_corners"],)
    scales = [*[None] * (spatial - 1), _scale(op, dim, spatial)]
    function = getattr(torch.ops.aten, op.name).default
    return function(eye.reshape(len(eye), 1, *shape), size, *corners, *scales).flatten(2)


# ---- average pooling --------------------------------------------------------------------------


@separable(
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "_adaptive_avg_pool2d",
    "_adaptive_avg_pool3d",
)  # fmt: skip
def adaptive_average_pool(op: Op, dim: int, eye: Tensor) -> Tensor:
    """Each output spread over its cell."""
    return F.adaptive_avg_pool1d(eye, output(op).shape[2 + dim])


@separable("avg_pool1d", "avg_pool2d", "avg_pool3d")
def average_pool(op: Op, dim: int, eye: Tensor) -> Tensor:
    """Each output spread over its window."""
    spatial = len(output(op).shape) - 2
    kernel = per_dim(op["kernel_size"], spatial)[dim]
    stride = per_dim(op["stride"] or op["kernel_size"], spatial)[dim]
    padding = per_dim(op["padding"], spatial)[dim]
    divisor = op.arguments.get("divisor_override")
    pooled = F.avg_pool1d(
        eye,
        kernel,
        stride,
        padding,
        op["ceil_mode"],
        op["count_include_pad"] or divisor is not None,
    )
    if divisor is None:
        return pooled
    # A divisor of the user's own replaces the window's area; it counts once, in the first dimension.
    covered = (pooled > 0).to(eye.dtype)
    return covered / divisor if dim == 0 else covered


def per_dim(argument: int | Sequence[int], spatial: int) -> list[int]:
    """A size argument with one number for each spatial dimension."""
    values = [argument] if isinstance(argument, int) else list(argument)
    return values * spatial if len(values) == 1 else values
