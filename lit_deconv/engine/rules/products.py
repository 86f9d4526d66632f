"""Products: with a constant, with a gate, of one x with its own sigmoid, and by linear maps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lit_deconv.engine.errors import AmbiguousProduct, refusal
from lit_deconv.engine.registry import reverse_rule
from lit_deconv.engine.rules._shared import (
    VIEWS,
    constant_for,
    output,
    per_channel,
    same_map,
    unbroadcast,
)
from lit_deconv.engine.rules.rectifiers import BY_MASK, is_mask, is_sign_mask, rectified
from lit_deconv.engine.signal import Signal
from lit_deconv.engine.tape import Op, Options, Value

GATE_MAKERS = {"sigmoid", "hardsigmoid", "softmax", "_softmax"}


def made_by(value: Value) -> Op:
    """The op that made a value, looking through views and copies."""
    op = value.op
    while op.name in VIEWS and isinstance(op.arguments.get("self"), Value):
        op = op["self"].op
    return op


def is_gate(value: Value, product: torch.Size) -> bool:
    """Whether a factor is a gate: made by sigmoid, hardsigmoid or softmax, or broadcast over H and W.

    Args:
        value: The factor.
        product: Shape of the product, [N, C, *map].
    """
    if made_by(value).name in GATE_MAKERS:
        return True
    if len(value.shape) != len(product) or all(size == 1 for size in product[2:]):
        return False
    op = value.op
    while op.name in VIEWS - {"repeat"} and isinstance(op.arguments.get("self"), Value):
        if op.name == "expand" and len(op["self"].shape) == len(product):
            value = op["self"]
        op = op["self"].op
    return all(size == 1 for size in value.shape[2:])


def _is_silu(gate: Value, other: Value) -> bool:
    return gate.op.name == "sigmoid" and same_map(gate.op["self"], other)


def _is_activation(argument: Any) -> bool:
    return isinstance(argument, Value) and not argument.constant


def _keep_factors(
    op: Op, tensors: Mapping[str, Any], result: Any, options: Options
) -> dict[str, Any]:
    """What each argument's signal is multiplied with: argument name -> factor, or "rectify"."""
    x, y = op["self"], op["other"]
    for name, factor, mask in (("self", x, y), ("other", y, x)):
        if is_sign_mask(mask, factor, True):
            return {name: "rectify"}
    if not (_is_activation(x) and _is_activation(y)):
        # The constant may be made from the input all the same (a mask, something detached): copy it.
        copy = {
            name: tensors[name].clone() if isinstance(op[name], Value) else op[name]
            for name in ("self", "other")
        }
        return {
            name: copy[other]
            for name, other in (("self", "other"), ("other", "self"))
            if _is_activation(op[name])
        }
    if _is_silu(x, y):
        return {"other": "rectify"}
    if _is_silu(y, x):
        return {"self": "rectify"}
    if options.gates == "gradient":
        return {"self": tensors["other"].clone(), "other": tensors["self"].clone()}
    shape = torch.broadcast_shapes(tensors["self"].shape, tensors["other"].shape)
    gates = is_gate(x, shape), is_gate(y, shape)
    if gates == (True, False):
        return {"other": tensors["self"].clone()}
    if gates == (False, True):
        return {"self": tensors["other"].clone()}
    return {"ambiguous": "both" if all(gates) else "neither"}


def _windowed(op: Op) -> bool:
    if "ambiguous" in op.kept:
        return False
    return all(
        isinstance(factor, str) or per_channel(factor, op) for factor in op.kept.values()
    ) and all(
        not isinstance(op[name], Value) or op[name].shape == output(op).shape for name in op.kept
    )


def _product_kind(op: Op) -> str:
    if "rectify" in [factor for factor in op.kept.values() if isinstance(factor, str)]:
        return "rectifier"
    if is_mask(op["self"]) or is_mask(op["other"]):
        return BY_MASK
    gated = _is_activation(op["self"]) and _is_activation(op["other"])
    return ("product rule" if len(op.kept) == 2 else "gate") if gated else "adjoint"


@reverse_rule(
    "mul", "multiply", of=("self", "other"), before=_keep_factors, windows=_windowed,
    kind=_product_kind,
)  # fmt: skip
def multiply(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """The signal times the other factor, which is a constant or a gate; R(signal) for x * sigmoid(x).

    Raises:
        AmbiguousProduct: Neither or both of two activations are gates.
    """
    if "ambiguous" in op.kept:
        raise AmbiguousProduct(
            f"{op.where} multiplies two activations of shapes {list(op['self'].shape)} and "
            f"{list(op['other'].shape)}, and {op.kept['ambiguous']} of them is a gate (made by sigmoid, "
            f"hardsigmoid or softmax, or broadcast over the map), so the signal has no one way back; "
            f"pass gates='gradient' for the product rule"
        )
    for name, factor in op.kept.items():
        if isinstance(factor, str):
            yield op[name], rectified(signal)
        else:
            values = signal.values * constant_for(op, signal, factor)
            yield op[name], signal.carrying(unbroadcast(op, values, op[name]))


def _keep_gate_half(op: Op, tensors: Mapping[str, Any], result: Any, options: Options) -> Any:
    if options.gates == "gradient":
        raise refusal(op, "has a product rule in autograd alone")
    return torch.sigmoid(tensors["self"].chunk(2, op["dim"])[1])


@reverse_rule("glu", after=_keep_gate_half, kind="gate")
def gated_linear_unit(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """A * sigmoid(b): the signal times the gate for a, nothing for b."""
    values = signal.values * signal.of(op.kept)
    yield op["self"], signal.map(lambda _: torch.cat([values, torch.zeros_like(values)], op["dim"]))


def _divides_map_evenly(op: Op) -> bool:
    return per_channel(op["other"], op) and op["self"].shape == output(op).shape


@reverse_rule("div", "divide", "true_divide", windows=_divides_map_evenly)
def divide(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """The signal divided by the constant divisor."""
    if op.arguments.get("rounding_mode"):
        raise refusal(op, "rounds, which has no gradient")
    values = signal.values / constant_for(op, signal, op["other"])
    yield op["self"], signal.map(lambda _: unbroadcast(op, values, op["self"]))


# ---- linear maps -----------------------------------------------------------------------------


@reverse_rule("linear", of="input")
def linear(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """W^T signal, along the last dimension."""
    yield op["input"], signal.map(lambda values: values @ op["weight"].to(values.dtype))


@reverse_rule("addmm", of="mat1")
def addmm(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """Bias + alpha * x W: alpha * signal W^T."""
    weight: Tensor = op["mat2"]
    yield op["mat1"], signal.map(lambda values: op["alpha"] * (values @ weight.T))


@reverse_rule("mm", "matmul", "bmm", of=("self", "other", "mat2"))
def matmul(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """X W: signal W^T; W x: W^T signal, for a constant W."""
    name = "mat2" if "mat2" in op.arguments else "other"
    x, y = op["self"], op[name]
    if isinstance(x, Value) and isinstance(y, Value):
        raise refusal(op, "multiplies two activations")
    if isinstance(x, Value):
        if y.ndim != 2 or len(x.shape) < 2:
            raise refusal(
                op, f"multiplies by a constant of shape {list(y.shape)}, expected a matrix"
            )
        yield x, signal.map(lambda values: values @ y.T.to(values.dtype))
    else:
        if x.ndim != 2 or len(y.shape) < 3:
            raise refusal(op, f"multiplies by a constant of shape {list(x.shape)} from the left")
        yield y, signal.map(lambda values: x.T.to(values.dtype) @ values)
