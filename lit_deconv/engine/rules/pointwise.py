"""Sums, constant shifts, copies and everything else that hands the signal on as it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lit_deconv.engine.errors import refusal
from lit_deconv.engine.registry import reverse_rule
from lit_deconv.engine.rules._shared import output, unbroadcast
from lit_deconv.engine.signal import Signal
from lit_deconv.engine.tape import Op, Value


def _not_broadcast(op: Op) -> bool:
    shape = output(op).shape
    return all(
        not isinstance(op[name], Value) or op[name].shape == shape for name in ("self", "other")
    )


@reverse_rule("add", of=("self", "other"), windows=_not_broadcast, one_hot=_not_broadcast)
def add(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """Copies to both summands, alpha times to the second."""
    yield from _sum(op, signal, 1, op["alpha"])


@reverse_rule(
    "sub", "subtract", of=("self", "other"), windows=_not_broadcast, one_hot=_not_broadcast
)
def subtract(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """The signal to the first, minus alpha times it to the second."""
    yield from _sum(op, signal, 1, -op["alpha"])


@reverse_rule("rsub", of=("self", "other"), windows=_not_broadcast, one_hot=_not_broadcast)
def reverse_subtract(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """Other - alpha * self."""
    yield from _sum(op, signal, -op["alpha"], 1)


def _sum(op: Op, signal: Signal, *factors: Any) -> Iterator[tuple[Any, Signal]]:
    for name, factor in zip(("self", "other"), factors, strict=True):
        if isinstance(op[name], Value) and not op[name].constant:
            values = signal.values if factor == 1 else signal.values * factor
            yield op[name], signal.carrying(unbroadcast(op, values, op[name]))


@reverse_rule("neg", windows=True, one_hot=True)
def negate(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """-signal."""
    yield op["self"], signal.map(lambda values: -values)


@reverse_rule(
    "clone", "alias", "contiguous", "lift_fresh", "positive",
    windows=True, one_hot=True, kind="copy",
)  # fmt: skip
def identity(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """The signal as it is."""
    yield op["self"], signal


@reverse_rule("_to_copy", windows=True, one_hot=True, kind="copy")
def to_copy(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """The signal in the dtype its argument had."""
    yield op["self"], signal.map(lambda values: values.to(op["self"].dtype))


@reverse_rule("copy", of=("self", "src"), kind="copy")
def copy(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """What was overwritten gets nothing, what was copied in gets the signal."""
    if isinstance(op["src"], Value):
        values = signal.values.to(op["src"].dtype)
        yield op["src"], signal.map(lambda _: unbroadcast(op, values, op["src"]))


@reverse_rule("fill", "zero", windows=True, one_hot=True, kind="constant")
def overwritten(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """A constant was written over the activation: nothing flows back."""
    if isinstance(op.arguments.get("value"), Value):
        raise refusal(op, "fills with an activation")
    yield from ()


@reverse_rule("detach", windows=True, one_hot=True, kind="stop")
def detach(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """Detached on purpose: the signal stops, as the gradient does."""
    yield from ()


@reverse_rule("local_response_norm", of="input", windows=True, one_hot=True, kind="pass-through")
def local_response_norm(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """Contrast normalisation is passed through unchanged (Zeiler & Fergus, 2.1)."""
    yield op["input"], signal


def _evaluating(op: Op) -> bool:
    return not op.arguments.get("train", op.arguments.get("training"))


@reverse_rule(
    "dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout",
    of=("input", "self"), windows=True, one_hot=True, kind="copy",
)  # fmt: skip
def dropout(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """The identity, as in eval mode."""
    if not _evaluating(op):
        raise refusal(
            op, "draws a random mask even in eval mode (pass training=self.training to it)"
        )
    yield op.arguments["input" if "input" in op.arguments else "self"], signal
