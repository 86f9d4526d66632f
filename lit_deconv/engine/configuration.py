"""What a model runs, apart from the values of its weights: by it a kept plan is known to be current."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Set
from dataclasses import is_dataclass
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

_TENSORS_AND_PARTS = frozenset({"_parameters", "_buffers", "_modules"})
_EXACT = frozenset({bool, int, str, bytes, type(None)})
_PLAIN = (bool, int, float, complex, str, bytes, type(None))


def configuration(model: nn.Module) -> Hashable:
    """A model's parts, with their flags, sizes, hooks and other attributes that are no tensors.

    Args:
        model: Any model.

    Returns:
        A key that differs where an attribute or a part was exchanged since. What the forward reads
        elsewhere, such as a global variable, is not in it.
    """
    return tuple(
        (id(module), type(module), _attributes(vars(module))) for module in model.modules()
    )


def tensors_of(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers, in half the time of the model's own iterators."""
    return [
        tensor
        for module in model.modules()
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None
    ]


def _attributes(found: Mapping[str, Any]) -> Hashable:
    return tuple(
        (name, _key(value))
        for name, value in found.items()
        if name not in _TENSORS_AND_PARTS and not (isinstance(value, dict) and not value)
    )


def _key(value: Any, depth: int = 4) -> Hashable:
    """The value of what is plain or holds it, nothing of tensors, the identity of everything else."""
    if type(value) in _EXACT:
        return type(value), value  # 1 and True apart
    if isinstance(value, Tensor):
        return Tensor  # as with weights, its identity is looked at where a plan reads it
    if isinstance(value, _PLAIN):
        return type(value), repr(value)  # NaN is itself, and 0.0 is not -0.0
    if not depth:
        return id(value)
    if isinstance(value, (list, tuple)):
        return type(value), tuple(_key(item, depth - 1) for item in value)
    if isinstance(value, Set):
        return type(value), frozenset(_key(item, depth - 1) for item in value)
    if isinstance(value, Mapping):
        return type(value), _fields(value, depth)
    holds_fields = is_dataclass(value) and not isinstance(value, type)
    if (holds_fields or isinstance(value, SimpleNamespace)) and hasattr(value, "__dict__"):
        return id(value), _fields(vars(value), depth)
    return id(value)


def _fields(found: Mapping[Any, Any], depth: int) -> Hashable:
    return tuple((_key(name, 1), _key(item, depth - 1)) for name, item in found.items())
