"""The deconvnet by its definition, for the second form of each network; imports torch alone.

A generated reference is straight-line code without in-place operations, in which every rectifier,
gate and contrast normalisation is one of the functions below.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


class AmbiguousProductError(Exception):
    """The signal reached a product of two activations of which neither or both are gates."""


class Rectifier(Function):
    """Any activation forward; backward it rectifies the signal (paper, section 2.1)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        return activation(x)

    @staticmethod
    def backward(ctx: Any, signal: Tensor) -> tuple[Tensor, None]:
        return signal.clamp(min=0), None


class Unchanged(Function):
    """Any function forward; the identity backward (contrast normalisation)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return function(x)

    @staticmethod
    def backward(ctx: Any, signal: Tensor) -> tuple[Tensor, None]:
        return signal, None


class Product(Function):
    """A product without a gate: nothing says which way the signal goes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        return x * y

    @staticmethod
    def backward(ctx: Any, signal: Tensor) -> tuple[Tensor, Tensor]:
        raise AmbiguousProductError


def rectify(x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """``activation(x)`` whose backward is that of a rectifier."""
    return Rectifier.apply(x, activation)


def unchanged(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """``function(x)`` whose backward is the identity."""
    return Unchanged.apply(x, function)


def gate(x: Tensor, factor: Tensor) -> Tensor:
    """``x * factor`` with the factor kept as a constant."""
    return x * factor.detach()


def ambiguous(x: Tensor, y: Tensor) -> Tensor:
    """``x * y`` that refuses the signal."""
    return Product.apply(x, y)


def product(x: Tensor, y: Tensor) -> Tensor:
    """``x * y`` by the product rule."""
    return x * y


class Standardised(Function):
    """A normalisation forward; backward its scale, as if the statistics were constants."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor], groups: int, weight: Tensor
    ) -> Tensor:
        apart = x.reshape(len(x), groups, -1) if groups else x.movedim(1, -1)
        deviation = (apart.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        ctx.scale = (torch.ones_like(apart) / deviation).reshape(apart.shape)
        ctx.scale = ctx.scale.reshape(x.shape) if groups else ctx.scale.movedim(-1, 1)
        ctx.scale = ctx.scale * weight.reshape(-1, *[1] * (x.ndim - 2))
        return function(x)

    @staticmethod
    def backward(ctx: Any, signal: Tensor) -> tuple[Tensor, None, None, None]:
        return signal * ctx.scale, None, None, None


def normalised(
    x: Tensor, function: Callable[[Tensor], Tensor], groups: int, weight: Tensor
) -> Tensor:
    """``function(x)`` with frozen statistics, over groups of channels (0: of each place)."""
    return Standardised.apply(x, function, groups, weight)


def differentiated(
    x: Tensor, function: Callable[[Tensor], Tensor], groups: int, weight: Tensor
) -> Tensor:
    """``function(x)`` with the gradient of its statistics."""
    return function(x)


CONSTANT = {"gate": gate, "ambiguous": ambiguous, "normalised": normalised}
GRADIENT = {"gate": product, "ambiguous": product, "normalised": differentiated}
"""What the functions of a reference mean, by the choice of gates."""


def walk(layer: Tensor, seed: Tensor, inputs: Tensor) -> Tensor:
    """The seed's reconstruction: the signal at the inputs when the layer's output gets the seed.

    Args:
        layer: the reference's value of the layer's output [N, C, H, W], with its graph.
        seed: the same shape.
        inputs: the leaf [N, C, H, W] it was computed from.

    Raises:
        AmbiguousProductError: the signal meets a product without a gate.
    """
    (signal,) = torch.autograd.grad(layer, inputs, seed, retain_graph=True)
    return signal
