"""Masks that are the sign of an activation: with them users write a ReLU by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lit_deconv.engine.calls import Call, is_zero, same_map
from lit_deconv.engine.gates import KEEPS_VALUES

_SIGNS = {
    **dict.fromkeys(("gt", "ge", "greater", "greater_equal"), True),
    **dict.fromkeys(("lt", "le", "less", "less_equal"), False),
}
_COPIES = KEEPS_VALUES | {"detach", "bool", "byte", "char", "short", "int", "long"}
_NEGATIONS = frozenset({"invert", "logical_not", "bitwise_not"})


@dataclass(frozen=True)
class _Sign:
    version: int
    source: Tensor
    source_version: int
    positive: bool


class Masks:
    """Remembers which tensors say where an activation is positive, or where it is negative."""

    def __init__(self) -> None:
        self._signs: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def follow(self, call: Call, result: Any) -> None:
        """Notes what a call returned, where that is a comparison with 0, or a copy of one."""
        source = call.first
        if call.name in ("where", "nonzero") and isinstance(result, tuple):
            sign = self._signs.get(source) if isinstance(source, Tensor) else None
            if sign is not None and sign.version == source._version:
                for index in result:
                    self._signs[index] = replace(sign, version=index._version)
            return
        if call.in_place or not isinstance(source, Tensor) or not isinstance(result, Tensor):
            return
        if call.name in _SIGNS:
            if is_zero(call.argument(1, "other")):
                positive = _SIGNS[call.name]
                self._signs[result] = _Sign(result._version, source, source._version, positive)
        elif call.name in _COPIES or call.name in _NEGATIONS:
            sign = self._signs.get(source)
            if sign is not None and sign.version == source._version:
                positive = sign.positive != (call.name in _NEGATIONS)
                self._signs[result] = _Sign(
                    result._version, sign.source, sign.source_version, positive
                )

    def rectified(self, call: Call, depends: Callable[[Any], bool]) -> Tensor | None:
        """The x of x * (x > 0) and of every other way to put 0 where x is negative, else None.

        Args:
            call: Any call.
            depends: Whether an argument depends on the input: what happens to be 0 then is no bound.
        """
        first = call.first
        if call.name in ("mul", "multiply"):
            second = call.argument(1, "other")
            for mask, x in ((second, first), (first, second)):
                if self._is_sign(mask, x, True):
                    return x
        elif call.name == "where":
            condition, kept, other = _where(call)
            for x, filled, positive in ((kept, other, True), (other, kept, False)):
                if self._is_sign(condition, x, positive):
                    return x if is_zero(filled) and not depends(filled) else None
        elif call.name in ("masked_fill", "masked_scatter", "setitem", "index_put"):
            mask = call.argument(1, "mask", call.kwargs.get("indices"))
            value = call.argument(2, "value", call.kwargs.get("source", call.kwargs.get("values")))
            masks = mask if isinstance(mask, (tuple, list)) else [mask]
            everywhere = len(masks) in (1, first.dim()) and all(
                self._is_sign(part, first, False) for part in masks
            )
            if everywhere and is_zero(value):
                return first
        return None

    def _is_sign(self, mask: Any, x: Any, positive: bool) -> bool:
        sign = self._signs.get(mask) if isinstance(mask, Tensor) else None
        return (
            sign is not None
            and same_map(sign.source, x)
            and sign.positive == positive
            and sign.version == mask._version
            and sign.source_version == x._version
        )


def _where(call: Call) -> tuple[Any, Any, Any]:
    if call.func is Tensor.where:
        condition, other = call.argument(1, "condition"), call.argument(2, "other")
        return condition, call.first, other
    condition = call.argument(0, "condition")
    return condition, call.argument(1, "input"), call.argument(2, "other")
