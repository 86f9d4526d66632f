"""Ops that only move values about: their adjoint moves the signal back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lit_deconv.engine.errors import refusal
from lit_deconv.engine.registry import reverse_rule
from lit_deconv.engine.rules._shared import (
    output,
    positive_dim,
    refuse_samples,
    working_dtype,
)
from lit_deconv.engine.signal import Signal
from lit_deconv.engine.tape import Op, Options, Value


def _like(op: Op, values: Tensor) -> Tensor:
    """Zeros shaped like the op's argument, one row a seed."""
    return values.new_zeros(values.shape[0], *op["self"].shape[1:])


@reverse_rule(
    "view", "_unsafe_view", "_reshape_alias", "unsqueeze", "squeeze", "view_as", kind="view"
)
def view(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """The same values in the argument's shape."""
    if op["self"].shape[0] != output(op).shape[0]:
        raise refusal(op, "folds the dimension of images into another")
    shape = op["self"].shape[1:]
    yield op["self"], signal.map(lambda values: values.reshape(values.shape[0], *shape))


@reverse_rule("permute", kind="view")
def permute(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """The inverse permutation."""
    dims = [positive_dim(dim, signal.values.ndim) for dim in op["dims"]]
    if dims[0] != 0:
        raise refusal(op, "moves the dimension of images")
    inverse = [dims.index(dim) for dim in range(len(dims))]
    yield op["self"], signal.map(lambda values: values.permute(inverse))


@reverse_rule("transpose", kind="view")
def transpose(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """The same transposition."""
    dims = refuse_samples(op, [op["dim0"], op["dim1"]], signal.values.ndim)
    yield op["self"], signal.map(lambda values: values.transpose(*dims))


@reverse_rule("expand", kind="view")
def expand(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """Sums over the copies."""
    parent, ndim = op["self"].shape, signal.values.ndim
    if len(parent) != ndim:
        raise refusal(op, "puts a dimension in front of the images")
    dims = [d for d in range(1, ndim) if parent[d] == 1 and output(op).shape[d] != 1]
    yield (
        op["self"],
        signal.map(lambda values: values.sum(dims, keepdim=True) if dims else values),
    )


@reverse_rule("select", kind="view")
def select(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """Back to the index it was taken from, zero elsewhere."""
    (dim,) = refuse_samples(op, [op["dim"]], len(op["self"].shape))

    def back(values: Tensor) -> Tensor:
        whole = _like(op, values)
        whole.select(dim, op["index"]).copy_(values)
        return whole

    yield op["self"], signal.map(back)


def _along_channels(op: Op) -> bool:
    return positive_dim(op["dim"], len(op["self"].shape)) == 1 and len(op["self"].shape) > 2


def _back_to_slice(
    op: Op, values: Tensor, dim: int, start: int, stop: int, step: int = 1
) -> Tensor:
    sizes = list(values.shape)
    sizes[dim] = op["self"].shape[dim]
    whole = values.new_zeros(sizes)
    index: list[slice] = [slice(None)] * dim + [slice(start, stop, step)]
    whole[tuple(index)] = values
    return whole


@reverse_rule("slice", windows=_along_channels, kind="view")
def slice_(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """Back to the slice, zero elsewhere."""
    dim = positive_dim(op["dim"], len(op["self"].shape))
    start, stop, step = slice(op["start"], op["end"], op["step"]).indices(op["self"].shape[dim])
    if dim == 0:
        if (start, stop, step) != (0, op["self"].shape[0], 1):
            raise refusal(op, "takes some of the images")
        yield op["self"], signal
    else:
        yield op["self"], signal.map(lambda v: _back_to_slice(op, v, dim, start, stop, step))


@reverse_rule("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk",
              "unsafe_split_with_sizes", windows=_along_channels, kind="view")  # fmt: skip
def split(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """Each part back to its place. Called once per part that has a signal."""
    (dim,) = refuse_samples(op, [op["dim"]], len(op["self"].shape))
    lengths = [part.shape[dim] for part in op.outputs if part is not None]
    start = sum(lengths[: signal.output])
    stop = start + lengths[signal.output]
    yield op["self"], signal.map(lambda v: _back_to_slice(op, v, dim, start, stop))


@reverse_rule("unbind", kind="view")
def unbind(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """Each part back to its index."""
    (dim,) = refuse_samples(op, [op["dim"]], len(op["self"].shape))
    index = signal.output
    yield (
        op["self"],
        signal.map(lambda v: _back_to_slice(op, v.unsqueeze(dim), dim, index, index + 1)),
    )


def _joins_channels(op: Op) -> bool:
    return positive_dim(op["dim"], len(output(op).shape)) == 1 and len(output(op).shape) > 2


@reverse_rule("cat", of="tensors", windows=_joins_channels)
def cat(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """Splits."""
    (dim,) = refuse_samples(op, [op["dim"]], len(output(op).shape))
    start = 0
    for tensor in op["tensors"]:
        if tuple(tensor.shape) == (0,):
            continue  # PyTorch ignores empty 1-D tensors in a cat
        length = tensor.shape[dim]
        if isinstance(tensor, Value):
            yield tensor, signal.carrying(signal.values.narrow(dim, start, length))
        start += length


@reverse_rule("stack", of="tensors")
def stack(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """Unbinds."""
    (dim,) = refuse_samples(op, [op["dim"]], len(output(op).shape))
    for index, tensor in enumerate(op["tensors"]):
        if isinstance(tensor, Value):
            yield tensor, signal.carrying(signal.values.select(dim, index))


def _keep_index(op: Op, tensors: Mapping[str, Any], result: Any, options: Options) -> Any:
    return tensors["index"].clone()


@reverse_rule("index_select", of=("self",), after=_keep_index)
def index_select(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """Adds each row to where it was taken from."""
    (dim,) = refuse_samples(op, [op["dim"]], len(op["self"].shape))
    yield op["self"], signal.map(lambda v: _like(op, v).index_add_(dim, op.kept, v))


@reverse_rule("flip", kind="view")
def flip(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """Flips back."""
    dims = refuse_samples(op, op["dims"], signal.values.ndim)
    yield op["self"], signal.map(lambda values: values.flip(dims))


@reverse_rule("roll", kind="view")
def roll(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """Rolls back."""
    if not op["dims"]:
        raise refusal(op, "rolls across images")
    dims = refuse_samples(op, op["dims"], signal.values.ndim)
    yield op["self"], signal.map(lambda values: values.roll([-s for s in op["shifts"]], dims))


@reverse_rule("pixel_shuffle", kind="view")
def pixel_shuffle(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """Unshuffles."""
    factor = op["upscale_factor"]

    def back(values: Tensor) -> Tensor:
        # Not F.pixel_unshuffle, which leaves the shape as it is where there are no seeds.
        apart = values.unflatten(-1, (-1, factor)).unflatten(-3, (-1, factor))
        return apart.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)

    yield op["self"], signal.map(back)


@reverse_rule("pixel_unshuffle", kind="view")
def pixel_unshuffle(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """Shuffles."""
    factor = op["downscale_factor"]

    def back(values: Tensor) -> Tensor:
        apart = values.unflatten(1, (-1, factor, factor))
        return apart.permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3)

    yield op["self"], signal.map(back)


@reverse_rule("channel_shuffle", "native_channel_shuffle", kind="view")
def channel_shuffle(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """The inverse shuffle."""
    groups = op["groups"]

    def back(values: Tensor) -> Tensor:
        rows, channels, *spatial = values.shape
        apart = values.reshape(rows, channels // groups, groups, *spatial)
        return apart.transpose(1, 2).reshape(values.shape)

    yield op["self"], signal.map(back)


# ---- sums over dimensions ---------------------------------------------------------------------


def _reduced(op: Op) -> list[int]:
    ndim = len(op["self"].shape)
    dims = op.arguments.get("dim")
    return refuse_samples(op, dims if dims else list(range(ndim)), ndim)


def _spread(op: Op, signal: Signal, divisor: int, dims: list[int]) -> Signal:
    parent = op["self"]

    def back(values: Tensor) -> Tensor:
        if not op.arguments.get("keepdim"):
            for dim in sorted(dims):
                values = values.unsqueeze(dim)
        return (values / divisor).expand(values.shape[0], *parent.shape[1:])

    return signal.map(back)


@reverse_rule("mean")
def mean(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """Spreads evenly."""
    dims = _reduced(op)
    count = math.prod(op["self"].shape[dim] for dim in dims)
    yield op["self"], _spread(op, signal, count, dims)


@reverse_rule("sum")
def sum_(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """Copies to every summand."""
    yield op["self"], _spread(op, signal, 1, _reduced(op))


def _keep_extreme(op: Op, tensors: Mapping[str, Any], result: Any, options: Options) -> Any:
    dims = _reduced(op)
    extreme = torch.amax if op.name == "amax" else torch.amin
    hits = (tensors["self"] == extreme(tensors["self"], dims, True)).to(working_dtype(result))
    return (hits / hits.sum(dims, keepdim=True)).to(result.dtype)


@reverse_rule("amax", "amin", after=_keep_extreme)
def amax(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """To the largest (smallest) value; shared evenly among ties, as in autograd."""
    spread = _spread(op, signal, 1, _reduced(op))
    yield op["self"], spread.map(lambda values: values * signal.of(op.kept))
