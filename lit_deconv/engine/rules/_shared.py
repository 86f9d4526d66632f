"""What several families of rules need: refusals, broadcasting, and constants that differ per image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lit_deconv.engine.errors import refusal
from lit_deconv.engine.signal import Signal
from lit_deconv.engine.tape import Op, Value

# Ops that move or repeat values and change none.
VIEWS = {
    "view", "reshape", "_unsafe_view", "_reshape_alias", "expand", "repeat", "unsqueeze", "squeeze",
    "permute", "transpose", "slice", "select", "split", "split_with_sizes", "chunk", "unbind", "clone",
    "alias", "detach", "_to_copy", "contiguous", "flatten", "narrow", "unflatten",
}  # fmt: skip


def same_map(one: Any, other: Any) -> bool:
    """Whether two values are one, or taken from one in the same way, as equal slices are."""
    one, other = _undetached(one), _undetached(other)
    if not (isinstance(one, Value) and isinstance(other, Value)):
        return one is other or not (
            isinstance(one, Tensor) or isinstance(other, Tensor) or one != other
        )
    if one is other:
        return True
    return (
        one.op.name == other.op.name
        and one.op.name in VIEWS
        and one.op.outputs.index(one) == other.op.outputs.index(other)
        and all(
            same_map(argument, other.op.arguments.get(name))
            for name, argument in one.op.arguments.items()
        )
    )


def _undetached(value: Any) -> Any:
    while isinstance(value, Value) and value.op.name in ("detach", "alias") and not value.op.fault:
        value = value.op["self"]
    return value


def output(op: Op) -> Value:
    """The first value an op returned."""
    value = op.outputs[0]
    assert value is not None
    return value


def unbroadcast(op: Op, values: Tensor, parent: Value) -> Tensor:
    """Sums a signal over the dimensions along which its parent was broadcast.

    Args:
        op: The op, for the message.
        values: [U, ...], shaped like the op's output.
        parent: [N, ...] with sizes of 1 where it was broadcast.
    """
    if len(parent.shape) != values.ndim:
        raise refusal(op, f"broadcasts a tensor of shape {list(parent.shape)} over new dimensions")
    dims = [
        dim
        for dim in range(1, values.ndim)
        if parent.shape[dim] == 1 and output(op).shape[dim] != 1
    ]
    return values.sum(dims, keepdim=True) if dims else values


def constant_for(op: Op, signal: Signal, constant: Any) -> Any:
    """A constant operand as it meets the signal: rows per seed where it differs per image."""
    if not isinstance(constant, Tensor) or constant.ndim < len(output(op).shape):
        return constant
    return signal.of(constant) if constant.shape[0] > 1 else constant


def per_channel(constant: Any, op: Op) -> bool:
    """Whether a constant operand is the same all over the map, so that a window needs no lookup."""
    if not isinstance(constant, Tensor) or constant.ndim == 0:
        return True
    spatial = len(output(op).shape) - 2
    shape = [1] * (spatial + 2 - constant.ndim) + list(constant.shape)
    return all(size == 1 for size in shape[2:]) and shape[0] == 1


def positive_dim(dim: int, ndim: int) -> int:
    """A dimension counted from the front."""
    return dim + ndim if dim < 0 else dim


def refuse_samples(op: Op, dims: Sequence[int], ndim: int) -> list[int]:
    """Dimensions counted from the front.

    Raises:
        UnsupportedOp: One of them is the dimension of images, whose signals must not mix.
    """
    positive = [positive_dim(dim, ndim) for dim in dims]
    if 0 in positive:
        raise refusal(op, "works along the dimension of images")
    return positive


def working_dtype(values: Tensor) -> torch.dtype:
    """The dtype in which scales are computed: the signal's, at least float32."""
    return torch.promote_types(values.dtype, torch.float32)
