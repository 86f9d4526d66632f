"""The registry of what networks are made of: each construct writes both forms of itself."""

from __future__ import annotations

from collections.abc import Callable

from .writer import Variable, Writer

Construct = Callable[[Writer], Variable | None]
CONSTRUCTS: dict[str, tuple[float, Construct, bool, bool]] = {}
"""By name: how often, what, whether Captum is right on it, whether on maps of any dimensions."""


def construct(
    weight: float, *, plain: bool = False, anywhere: bool = False
) -> Callable[[Construct], Construct]:
    """Registers a construct; it returns None where it finds no input that suits it.

    Args:
        weight: how often it occurs.
        plain: whether Captum is right on it.
        anywhere: whether it works on signals and volumes too, not on images alone.
    """

    def register(function: Construct) -> Construct:
        CONSTRUCTS[function.__name__] = (weight, function, plain, anywhere)
        return function

    return register


def same_map(x: Variable) -> Callable[[Variable], bool]:
    return lambda v: v.shape[1:] == x.shape[1:]


def same_shape(x: Variable) -> Callable[[Variable], bool]:
    return lambda v: v.shape == x.shape and v is not x
