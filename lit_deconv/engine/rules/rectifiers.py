"""Rectifiers: each rectifies the signal, none gates it by the forward sign (Zeiler & Fergus, 2.1)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lit_deconv.engine.errors import refusal
from lit_deconv.engine.registry import reverse_rule
from lit_deconv.engine.rules._shared import constant_for, same_map, unbroadcast
from lit_deconv.engine.signal import Signal
from lit_deconv.engine.tape import Op, Options, Value


def rectified(signal: Signal) -> Signal:
    """The positive part of the signal."""
    rectify = torch.relu_ if signal.owned else torch.relu
    return signal.anew(rectify(signal.values))


@reverse_rule(
    "relu", "relu6", "leaky_relu", "prelu", "_prelu_kernel", "rrelu", "rrelu_with_noise", "elu",
    "selu", "celu", "gelu", "silu", "mish", "softplus", "hardswish",
    windows=True, one_hot=True, kind="rectifier",
)  # fmt: skip
def rectifier(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """R(signal)."""
    yield op["self"], rectified(signal)


# ---- clamps: rectifiers when the lower bound is 0, else their local gradient ----------------


def _bounds(op: Op) -> tuple[Any, Any]:
    names = {"clamp": ("min", "max"), "clamp_min": ("min", ""), "clamp_max": ("", "max")}
    low, high = names.get(op.name, ("min_val", "max_val"))
    return op.arguments.get(low), op.arguments.get(high)


def _has_lower_bound_zero(op: Op) -> bool:
    if op.name == "threshold":
        return op["threshold"] == 0 and op["value"] == 0
    low, _ = _bounds(op)
    return low is not None and _is_zero(low)


def _keep_passed(op: Op, tensors: Mapping[str, Any], result: Any, options: Options) -> Any:
    if _has_lower_bound_zero(op):
        return None
    x = tensors["self"]
    if op.name == "threshold":
        return x > op["threshold"]
    low, high = _bounds(op)
    if isinstance(low, Value) or isinstance(high, Value):
        raise refusal(op, "has a bound that depends on the input")
    passed = torch.ones_like(x, dtype=torch.bool)
    strict = op.name == "hardtanh"  # PyTorch's own convention at the bounds
    if low is not None:
        passed &= (x > low) if strict else (x >= low)
    if high is not None:
        passed &= (x < high) if strict else (x <= high)
    return passed


def is_rectifying_clamp(op: Op) -> bool:
    """Whether a recorded clamp-like op has the lower bound 0: a number, or a tensor of zeros."""
    return op.kept is None


def _clamp_kind(op: Op) -> str:
    return "rectifier" if is_rectifying_clamp(op) else "local gradient"


@reverse_rule(
    "clamp", "clamp_min", "clamp_max", "hardtanh", "threshold",
    before=_keep_passed, windows=is_rectifying_clamp, kind=_clamp_kind,
)  # fmt: skip
def clamp(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """R(signal) for a lower bound of 0; otherwise the signal where the clamp let its input through."""
    if is_rectifying_clamp(op):
        yield op["self"], rectified(signal)
    else:
        yield op["self"], signal.map(lambda values: values * signal.of(op.kept))


# ---- relu written with a mask or maximum -----------------------------------------------------

BY_MASK = "gated by a mask made from the input"
_COPIES = {"_to_copy", "clone", "contiguous", "alias", "detach"}
_NEGATIONS = {"logical_not", "bitwise_not"}
_SIGNS = {"gt": True, "ge": True, "lt": False, "le": False}


def _is_zero(constant: Any) -> bool:
    if isinstance(constant, Tensor):
        return not bool(constant.any())
    return not isinstance(constant, Value) and constant == 0


def is_mask(constant: Any) -> bool:
    """Whether a constant is a mask that was made from the input, copied to numbers or not."""
    made = _compared(constant)[0].outputs[0] if isinstance(constant, Value) else None
    return made is not None and made.dtype == torch.bool


def is_sign_mask(mask: Any, x: Any, positive: bool) -> bool:
    """Whether a mask is x > 0 or x >= 0, or, where it is not to be ``positive``, x < 0 or x <= 0."""
    if not isinstance(mask, Value) or not isinstance(x, Value):
        return False
    op, negated = _compared(mask)
    sign = _SIGNS.get(op.name)
    if sign is None or not same_map(op["self"], x) or not _is_zero(op["other"]):
        return False
    return sign == (positive != negated)


def _compared(mask: Value) -> tuple[Op, bool]:
    """The op that made a mask, looking through copies, and whether it was negated since."""
    op, negated = mask.op, False
    while op.name in _COPIES | _NEGATIONS and isinstance(op.arguments.get("self"), Value):
        negated ^= op.name in _NEGATIONS
        op = op["self"].op
    return op, negated


def _keep_condition(op: Op, tensors: Mapping[str, Any], result: Any, options: Options) -> Any:
    condition, x, y = op["condition"], op["self"], op["other"]
    if is_sign_mask(condition, x, True) and _is_zero(y):
        return "self"
    if is_sign_mask(condition, y, False) and _is_zero(x):
        return "other"
    return tensors["condition"].clone()


def _where_kind(op: Op) -> str:
    if isinstance(op.kept, str):
        return "rectifier"
    return BY_MASK if is_mask(op["condition"]) else "local gradient"


@reverse_rule("where", of=("condition", "self", "other"), after=_keep_condition, kind=_where_kind)
def where(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """Rectify for the positive part of x; otherwise each side gets the signal where it was chosen."""
    if isinstance(op.kept, str):
        yield op[op.kept], rectified(signal)
        return
    condition = constant_for(op, signal, op.kept)
    for name, chosen in (("self", condition), ("other", ~condition)):
        if isinstance(op[name], Value):
            values = torch.where(chosen, signal.values, 0)
            yield op[name], signal.carrying(unbroadcast(op, values, op[name]))


def _keep_mask(op: Op, tensors: Mapping[str, Any], result: Any, options: Options) -> Any:
    if isinstance(op["value"], Value):
        raise refusal(op, "fills with an activation")
    if is_sign_mask(op["mask"], op["self"], False) and _is_zero(op["value"]):
        return "self"
    return tensors["mask"].clone()


def _fill_kind(op: Op) -> str:
    if isinstance(op.kept, str):
        return "rectifier"
    return BY_MASK if is_mask(op["mask"]) else "adjoint"


@reverse_rule("masked_fill", of=("self", "mask"), before=_keep_mask, kind=_fill_kind)
def masked_fill(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """Rectify where what is negative is filled with 0; otherwise nothing where a constant went."""
    if isinstance(op.kept, str):
        yield op["self"], rectified(signal)
        return
    mask = constant_for(op, signal, op.kept)
    values = signal.values.masked_fill(mask, 0)
    yield op["self"], signal.carrying(unbroadcast(op, values, op["self"]))


def _keep_assigned(op: Op, tensors: Mapping[str, Any], result: Any, options: Options) -> Any:
    indices = op["indices"]
    if len(indices) == 1 and is_sign_mask(indices[0], op["self"], False) and _is_zero(op["values"]):
        return "self"
    masked = any(is_mask(index) for index in indices)
    raise refusal(op, BY_MASK if masked else "assigns by index, which is left to autograd")


@reverse_rule("index_put", of=("self", "indices"), before=_keep_assigned, kind="rectifier")
def index_put(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """R(signal) for ``x[x < 0] = 0``."""
    yield op["self"], rectified(signal)


def _keep_larger(op: Op, tensors: Mapping[str, Any], result: Any, options: Options) -> Any:
    for name, other in (("self", "other"), ("other", "self")):
        if not isinstance(op[other], Value) and op.name == "maximum" and _is_zero(op[other]):
            return name
    x, y = tensors["self"], tensors["other"]
    first = (x > y) if op.name == "maximum" else (x < y)
    dtype = torch.promote_types(x.dtype, y.dtype)
    # Where both are equal autograd gives each a half.
    return first.to(dtype) + 0.5 * (x == y).to(dtype)


def _larger_kind(op: Op) -> str:
    return "rectifier" if isinstance(op.kept, str) else "local gradient"


@reverse_rule("maximum", "minimum", of=("self", "other"), before=_keep_larger, kind=_larger_kind)
def maximum(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """R(signal) for max(x, 0); otherwise each side gets the signal where it was the larger one."""
    if isinstance(op.kept, str):
        yield op[op.kept], rectified(signal)
        return
    share = signal.of(op.kept)
    for name, part in (("self", share), ("other", 1 - share)):
        if isinstance(op[name], Value):
            if len(op[name].shape) != signal.values.ndim:
                raise refusal(op, "compares maps of different rank")
            values = signal.values * part
            yield op[name], signal.carrying(unbroadcast(op, values, op[name]))
