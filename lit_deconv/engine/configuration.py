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
    # In one loop with few calls: it stands in front of every reconstruction, the smallest of which
    # take milliseconds.
    found: list[Any] = []
    for module in modules_of(model):
        found += (id(module), type(module))
        for name, value in vars(module).items():
            kind = type(value)
            if kind in _EXACT:
                found += (name, kind, value)  # 1 and True apart
            elif isinstance(value, dict):
                if value and name not in _TENSORS_AND_PARTS:
                    found += (name, _key(value))
            elif kind is tuple and _EXACT.issuperset(map(type, value)):
                found += (name, tuple(map(type, value)), value)
            elif name not in _TENSORS_AND_PARTS:
                found += (name, _key(value))
    return tuple(found)


def modules_of(model: nn.Module) -> list[nn.Module]:
    """The model and its parts, each once, in less time than the model's own iterator takes."""
    found: dict[int, nn.Module] = {}
    waiting: list[nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if module is not None and id(module) not in found:
            found[id(module)] = module
            waiting += module._modules.values()
    return list(found.values())


def tensors_of(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers, in less time than the model's own iterators take."""
    return [
        tensor
        for module in modules_of(model)
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None
    ]


def _key(value: Any, depth: int = 4) -> Hashable:
    """The value of what is plain or holds it, nothing of tensors, the identity of everything else."""
    if type(value) in _EXACT:
        return type(value), value
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
