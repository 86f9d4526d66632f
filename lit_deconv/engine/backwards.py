"""Autograd Functions: true values forwards, the deconvnet's reverse rule backwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from lit_deconv.engine.errors import AmbiguousProduct


class Rectified(Function):
    """The value of a rectifier; its backward rectifies the signal (Zeiler & Fergus 2014, 2.1)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        """The value."""
        return _own(activation(x))

    @staticmethod
    def backward(ctx: Any, *signal: Tensor) -> tuple[Tensor, None]:
        """The reverse rule."""
        return F.relu(signal[0]), None


class Passed(Function):
    """The value of a normalisation; its backward hands the signal through unchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """The value."""
        return _own(function(x))

    @staticmethod
    def backward(ctx: Any, *signal: Tensor) -> tuple[Tensor, None]:
        """The reverse rule."""
        return signal[0], None


class Scaled(Function):
    """The value of a normalisation; its backward is that of an affine map with fixed statistics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor], scale: Tensor) -> Tensor:
        """The value."""
        ctx.save_for_backward(scale)
        return _own(function(x))

    @staticmethod
    def backward(ctx: Any, *signal: Tensor) -> tuple[Tensor, None, None]:
        """The reverse rule."""
        (scale,) = ctx.saved_tensors
        return signal[0] * scale, None, None


class Local(Function):
    """A function with its plain gradient, closed to the mode: no product inside it is looked at."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """The value."""
        with torch.enable_grad():
            ctx.x = x.detach().clone().requires_grad_()
            ctx.y = function(ctx.x)
        return ctx.y.detach()

    @staticmethod
    def backward(ctx: Any, *signal: Tensor) -> tuple[Tensor, None]:
        """The reverse rule."""
        (gradient,) = torch.autograd.grad(ctx.y, ctx.x, signal[0], retain_graph=True)
        return gradient, None


class Ambiguous(Function):
    """A product that the signal cannot pass; off its way, the product does no harm."""

    @staticmethod
    def forward(ctx: Any, message: str, product: Callable[[], Tensor], *factors: Tensor) -> Tensor:
        """The value."""
        ctx.message = message
        return product()

    @staticmethod
    def backward(ctx: Any, *signal: Tensor) -> Any:
        """The reverse rule."""
        raise AmbiguousProduct(ctx.message)


def _own(value: Tensor) -> Tensor:
    """A value that the model may overwrite: autograd forbids that of a view made in a Function."""
    return value.clone() if value._is_view() else value
