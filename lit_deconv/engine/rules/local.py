"""Smooth pointwise ops that are no rectifiers: the signal times the local derivative."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lit_deconv.engine.errors import refusal
from lit_deconv.engine.registry import reverse_rule
from lit_deconv.engine.rules._shared import refuse_samples
from lit_deconv.engine.signal import Signal
from lit_deconv.engine.tape import Op, Options, Value

# Derivative by the op's argument x (and its other arguments), one a name.
_DERIVATIVE: dict[str, Callable[[Tensor, Op], Tensor]] = {
    "tanh": lambda x, op: 1 - x.tanh() ** 2,
    "sigmoid": lambda x, op: x.sigmoid() * (1 - x.sigmoid()),
    "hardsigmoid": lambda x, op: ((x > -3) & (x < 3)) / 6,
    "log_sigmoid": lambda x, op: torch.sigmoid(-x),
    "abs": lambda x, op: x.sgn(),
    "exp": lambda x, op: x.exp(),
    "log": lambda x, op: x.reciprocal(),
    "log1p": lambda x, op: (1 + x).reciprocal(),
    "sqrt": lambda x, op: 0.5 * x.rsqrt(),
    "rsqrt": lambda x, op: -0.5 * x.rsqrt() ** 3,
    "reciprocal": lambda x, op: -(x.reciprocal() ** 2),
    "square": lambda x, op: 2 * x,
    "sin": lambda x, op: x.cos(),
    "cos": lambda x, op: -x.sin(),
    "erf": lambda x, op: torch.exp(-x * x) * (2 / torch.pi**0.5),
    "hardshrink": lambda x, op: (x.abs() > op["lambd"]).to(x.dtype),
    "softshrink": lambda x, op: (x.abs() > op["lambd"]).to(x.dtype),
    "pow": lambda x, op: _power(x, op["exponent"]),
}


def _power(x: Tensor, exponent: Any) -> Tensor:
    zero = torch.as_tensor(exponent, device=x.device) == 0
    return torch.where(zero, 0, exponent * x ** (exponent - 1))  # else not a number at x = 0


def _keep_derivative(op: Op, tensors: Mapping[str, Any], result: Any, options: Options) -> Any:
    if not isinstance(tensors["self"], Tensor) or isinstance(op.arguments.get("exponent"), Value):
        raise refusal(op, "raises to the power of an activation, which is left to autograd")
    return _DERIVATIVE[op.name](tensors["self"], op).to(tensors["self"].dtype)


@reverse_rule(*_DERIVATIVE, before=_keep_derivative, kind="local gradient")
def pointwise(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """Signal * f'(x)."""
    yield op["self"], signal.map(lambda values: values * signal.of(op.kept))


def _keep_result(op: Op, tensors: Mapping[str, Any], result: Any, options: Options) -> Any:
    return result.clone()


@reverse_rule("_softmax", after=_keep_result, kind="local gradient")
def softmax(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """S * (signal - <signal, s>), s the softmax."""
    (dim,) = refuse_samples(op, [op["dim"]], signal.values.ndim)
    s = signal.of(op.kept)
    yield op["self"], signal.map(lambda v: s * (v - (v * s).sum(dim, keepdim=True)))
