"""Which factor of a product of two activations is a gate: the one that is kept as a constant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lit_deconv.engine.calls import Place, same_map

_SIGMOID = frozenset({"sigmoid", "special_expit"})
GATE_MAKERS = frozenset({"sigmoid", "hardsigmoid", "softmax", "special_expit"})
# Ops through which a gate stays a gate: they move or repeat its values and change none.
KEEPS_VALUES = frozenset(
    {"clone", "contiguous", "to", "type_as", "float", "double", "half", "bfloat16", "dropout"}
)
MOVES_VALUES = frozenset(
    {
        "view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "ravel",
        "expand", "expand_as", "broadcast_to", "repeat", "tile", "squeeze", "unsqueeze",
        "permute", "transpose", "t", "swapaxes", "swapdims", "movedim", "moveaxis",
        "narrow", "select", "getitem", "chunk", "split", "split_with_sizes",
        "tensor_split", "unbind", "as_strided",
    }
)  # fmt: skip


@dataclass(frozen=True)
class _Mark:
    version: int
    source: Tensor | None
    source_version: int


class Gates:
    """Remembers which tensors a gate function made, and out of what."""

    def __init__(self) -> None:
        self._marks: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def follow(self, name: str, source: object, version: int, results: Sequence[Tensor]) -> None:
        """Marks what one call returned.

        Args:
            name: The function's name, without the underscore of an in-place form.
            source: Its first argument.
            version: That argument's version before the call.
            results: The tensors that it returned.
        """
        if not isinstance(source, Tensor):
            return
        if name in GATE_MAKERS:
            for made in results:
                origin = source if name in _SIGMOID and made is not source else None
                self._marks[made] = _Mark(made._version, origin, version)
        elif name in KEEPS_VALUES or name in MOVES_VALUES:
            mark = self._marks.get(source)
            if mark is None or mark.version != version:
                return
            origin = mark.source if name in KEEPS_VALUES else None
            for made in results:
                self._marks[made] = _Mark(made._version, origin, mark.source_version)

    def made(self, tensor: Tensor) -> bool:
        """Whether sigmoid, hardsigmoid or softmax made this tensor, views of it included."""
        mark = self._marks.get(tensor)
        return mark is not None and mark.version == tensor._version

    def gated_by_itself(self, first: Tensor, second: Tensor) -> Tensor | None:
        """The x of x * sigmoid(x), None for any other product."""
        for gate, other in ((second, first), (first, second)):
            mark = self._marks.get(gate)
            if (
                mark is not None
                and self.made(gate)
                and mark.source is not None
                and same_map(mark.source, other)
                and mark.source_version == other._version
            ):
                return other
        return None

    def choose(self, factors: Mapping[Place, Tensor], elementwise: bool) -> list[Place] | None:
        """The places of the gates among the factors, when all factors but one are gates.

        Args:
            factors: The activations that are multiplied, at least two.
            elementwise: Whether the product broadcasts; a matrix product does not.

        Returns:
            The places, or None where more or fewer than one factor is left for the signal.
        """
        gates = {place for place, factor in factors.items() if self.made(factor)}
        if elementwise and len(factors) == 2:
            (first, x), (second, y) = factors.items()
            gates |= {first} if broadcast_over_map(x, y) else set()
            gates |= {second} if broadcast_over_map(y, x) else set()
        return list(gates) if len(gates) == len(factors) - 1 else None


def broadcast_over_map(factor: Tensor, other: Tensor) -> bool:
    """Whether a factor [N, C, 1, 1], possibly expanded already, meets a larger map [N, C, H, W]."""
    full = torch.broadcast_shapes(factor.shape, other.shape)
    missing = len(full) - factor.dim()
    sizes = (1,) * missing + tuple(factor.shape)
    strides = (0,) * missing + factor.stride()
    spatial = range(2, len(full))
    return any(full[d] > 1 for d in spatial) and all(
        sizes[d] == 1 or strides[d] == 0 for d in spatial
    )
