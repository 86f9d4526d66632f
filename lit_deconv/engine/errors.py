"""What can go wrong in a reverse pass, one type per kind, all of them ``DeconvError``."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lit_deconv.engine.tape import Op


class DeconvError(Exception):
    """The common base: catches everything that this package raises on purpose."""


class UnsupportedOp(DeconvError, NotImplementedError):
    """An op on the way of the signal that the reverse pass cannot honour."""

    why: str | None = None
    op: Op | None = None


class AmbiguousProduct(DeconvError, ValueError):
    """A product of two activations in which neither or both factors are a gate."""


class LayerError(DeconvError, ValueError):
    """A layer that does not exist, never ran, or does not depend on the input."""


class SelectorError(DeconvError, IndexError):
    """A selector or a unit that lies outside the layer's output."""


class InputError(DeconvError, ValueError):
    """An input that no reconstruction can be made of."""


class ChannelsError(InputError, RuntimeError):
    """Images with another number of channels than the model takes; a RuntimeError, as PyTorch's own."""


def refusal(op: Op, why: str | None) -> UnsupportedOp:
    """The error for an op that rules cannot reverse: op, module, reason and the way out."""
    error = UnsupportedOp(
        f"{op.where} {why}; use the autograd walk (path='autograd' or 'auto'), or register a rule with "
        f"lit_deconv.engine.reverse_rule({op.name!r})"
    )
    error.why, error.op = why, op
    return error
