"""Linear maps that only place, pick or add up values: their adjoint is the one that autograd has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lit_deconv.engine.errors import refusal
from lit_deconv.engine.registry import reverse_rule
from lit_deconv.engine.rules._shared import refuse_samples
from lit_deconv.engine.signal import Signal
from lit_deconv.engine.tape import Op, Options, Value, with_tensors


def adjoint(op: Op, signal: Signal, name: str) -> Iterator[tuple[Any, Signal]]:
    """The adjoint of an op that is linear in one argument, whatever its other arguments are.

    Args:
        op: The recorded op; what it kept are its other arguments.
        signal: At its output.
        name: The argument that it is linear in.
    """
    rest = {key: _rows(signal, op, argument) for key, argument in op.kept.items()}

    def back(values: Tensor) -> Tensor:
        with torch.enable_grad():
            zeros = values.new_zeros(len(values), *op[name].shape[1:], requires_grad=True)
            mapped = getattr(torch.ops.aten, op.name)(**{name: zeros}, **rest)
            (found,) = torch.autograd.grad(mapped, zeros, values)
        return found

    yield op[name], signal.map(back)


def _rows(signal: Signal, op: Op, argument: Any) -> Any:
    """An argument that holds something for each image, as one row a seed."""
    output = op.outputs[0]
    per_image = (
        isinstance(argument, Tensor)
        and output is not None
        and argument.ndim == len(output.shape)
        and argument.shape[0] == output.shape[0]
    )
    return signal.of(argument) if per_image else argument


def _keep_others(op: Op, tensors: Mapping[str, Any], result: Any, options: Options) -> Any:
    linear_in = "input" if "input" in tensors else "self"
    return {
        key: with_tensors(Tensor.clone, argument)
        for key, argument in tensors.items()
        if key != linear_in
    }


def _keep_along(op: Op, tensors: Mapping[str, Any], result: Any, options: Options) -> Any:
    named = (op.arguments.get(name) for name in ("dims", "dim", "dimension"))
    dims: Any = next(argument for argument in named if argument is not None)
    refuse_samples(op, [dims] if isinstance(dims, int) else dims, len(op["self"].shape))
    return _keep_others(op, tensors, result, options)


@reverse_rule("cumsum", "unfold", "rot90", before=_keep_along)
def along_dimension(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """Running sums, sliding windows of one dimension, quarter turns."""
    yield from adjoint(op, signal, "self")


@reverse_rule("gather", of=("self", "index"), before=_keep_along)
def gather(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """Adds each value to where it was picked, by each image's own index."""
    yield from adjoint(op, signal, "self")


@reverse_rule("im2col", "col2im", before=_keep_others)
def patches(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """``F.unfold`` and ``F.fold``: patches to columns and back, where they overlap they add."""
    yield from adjoint(op, signal, "self")


def _keep_repeats(op: Op, tensors: Mapping[str, Any], result: Any, options: Options) -> Any:
    if len(op["repeats"]) != len(op["self"].shape) or op["repeats"][0] != 1:
        raise refusal(op, "repeats the images")
    return _keep_others(op, tensors, result, options)


@reverse_rule("repeat", before=_keep_repeats)
def repeat(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """Adds up the copies."""
    yield from adjoint(op, signal, "self")


_MASKS = (torch.bool, torch.uint8)


def _keep_indices(op: Op, tensors: Mapping[str, Any], result: Any, options: Options) -> Any:
    indices = tensors["indices"]
    # Indices that are not side by side put their dimension in front of that of the images.
    places = [dim for dim, index in enumerate(indices) if index is not None]
    if places[0] == 0 or places != list(range(places[0], places[-1] + 1)):
        raise refusal(op, "picks among the images")
    masks = [index for index in indices if index is not None and index.dtype in _MASKS]
    if masks and any(isinstance(index, Value) for index in op["indices"]):
        raise refusal(op, "picks as many values as a mask made from the input says")
    return _keep_others(op, tensors, result, options)


@reverse_rule("index", of=("self", "indices"), before=_keep_indices)
def index(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """``x[:, indices]``: adds each value to where it was picked."""
    yield from adjoint(op, signal, "self")


@reverse_rule(
    "max_unpool2d", "max_unpool3d", of=("self", "indices"), before=_keep_others, kind="switches"
)
def max_unpool(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """Unpooling in the model itself (SegNet): each value back from its switch."""
    indices = _rows(signal, op, op.kept["indices"])
    shape = op["self"].shape

    def back(values: Tensor) -> Tensor:
        flat = values.flatten(2).gather(2, indices.flatten(2).expand(len(values), -1, -1))
        return flat.reshape(len(values), *shape[1:])

    yield op["self"], signal.map(back)


def _keep_grid(op: Op, tensors: Mapping[str, Any], result: Any, options: Options) -> Any:
    if options.gates == "gradient" and isinstance(op["grid"], Value):
        raise refusal(op, "has a derivative by its grid in autograd alone")
    return _keep_others(op, tensors, result, options)


def _grid_kind(op: Op) -> str:
    return "gate" if isinstance(op["grid"], Value) else "adjoint"


@reverse_rule(
    "grid_sampler_2d", "grid_sampler_3d", "grid_sampler", of=("input", "grid"), before=_keep_grid,
    kind=_grid_kind,
)  # fmt: skip
def grid_sample(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """Spreads each sample over the pixels it was read from; the grid is a constant, like a gate."""
    yield from adjoint(op, signal, "input")
