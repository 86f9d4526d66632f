"""The reverse pass: from a seed at a layer back to the pixels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lit_deconv.engine.errors import AmbiguousProduct, UnsupportedOp, refusal
from lit_deconv.engine.rules.layout import by_map
from lit_deconv.engine.signal import Signal, Span, added
from lit_deconv.engine.tape import Op, Tape, Value, leaves

# A window with this share of its map's area costs more to place and clip than it saves.
FULL_FROM = 0.9


def walk(
    tape: Tape,
    target: Value,
    seed: Signal,
    full_from: float = FULL_FROM,
    supported: Iterable[Value] = (),
) -> list[Signal | None]:
    """Sends seeds from ``target`` back to the inputs, op by op (Zeiler & Fergus, section 2.1).

    Args:
        tape: The recorded forward pass.
        target: Where the seeds sit.
        seed: One row a seed, shaped like the target or a window of it.
        full_from: Share of its map's area from which a window is put on the full map.
        supported: Outputs of ops that are known to have rules which can honour them.

    Returns:
        The signal at each of the tape's inputs, None where none arrived.

    Raises:
        UnsupportedOp: An op on the way has no rule, or one that cannot honour it.
        AmbiguousProduct: A product of two activations has no one way back.
    """
    parts = [Part(len(seed.values))]
    ((_, arrived),) = _walk_on(
        tape, len(tape.ops), {target: seed}, parts, {}, full_from, set(supported)
    )
    return arrived


class Part(NamedTuple):
    """Seeds that stay together all the way.

    Attributes:
        seeds: How many.
        span: Bounds of their positions, where known, see ``Window``.
    """

    seeds: int
    span: Span = None


def walk_in_parts(
    tape: Tape,
    target: Value,
    seed: Signal,
    parts: Sequence[Part],
    room: Mapping[Op, int],
) -> Iterator[tuple[int, list[Signal | None]]]:
    """The same with all seeds together as far as there is room for them, and in parts from there on.

    Near the layer, where windows are small, many seeds share one call of a convolution; near the
    image a few fill the cache.

    Args:
        tape: The recorded forward pass.
        target: Where the seeds sit.
        seed: One row a seed.
        parts: All of the seeds, in order.
        room: How many seeds may pass an op together; as many as there are where it says nothing.

    Yields:
        The number of seeds of a part, or of several, and what arrived of them at the inputs.
    """
    return _walk_on(tape, len(tape.ops), {target: seed}, parts, room, FULL_FROM, set())


def _walk_on(
    tape: Tape,
    behind: int,
    signals: dict[Value, Signal],
    parts: Sequence[Part],
    room: Mapping[Op, int],
    full_from: float,
    supported: set[Value],
) -> Iterator[tuple[int, list[Signal | None]]]:
    """From the ops before number ``behind`` back; adds to what is known to be ``supported``."""
    for number in reversed(range(behind)):
        op = tape.ops[number]
        for index, output in enumerate(op.outputs):
            if output is None or output not in signals or op.name == "input":
                continue
            if len(parts) > 1 and count_of(parts) > room.get(op, math.inf):
                for some, own in _split(signals, _grouped(parts, room[op])):
                    yield from _walk_on(tape, number + 1, own, some, room, full_from, supported)
                return
            if output not in supported:
                why = why_unsupported(op, output, tape.samples)
                if why:
                    raise refusal(op, why)
                supported.add(output)
            _reverse(op, index, signals, full_from)
    arrived = [signals.get(value) for value in tape.inputs]
    yield (
        count_of(parts),
        [
            signal and signal.dense(value.shape[1])
            for signal, value in zip(arrived, tape.inputs, strict=True)
        ],
    )


def _reverse(op: Op, index: int, signals: dict[Value, Signal], full_from: float) -> None:
    """Takes the signal at an op's output to its arguments, and lets go of it."""
    assert op.rule is not None
    output = op.outputs[index]
    assert output is not None
    signal = _as_taken(op, signals.pop(output), index, full_from)
    contributions = list(op.rule.reverse(op, signal))
    for parent, contribution in contributions:
        if not isinstance(parent, Value) or parent.constant:
            continue
        if len(contributions) > 1:  # which may all hold the same values
            contribution = contribution.replaced(owned=False)
        if parent in signals:
            contribution = _sum(signals[parent], contribution, parent)
        signals[parent] = contribution


def count_of(parts: Sequence[Part]) -> int:
    """How many seeds there are in several parts."""
    return sum(part.seeds for part in parts)


def _grouped(parts: Sequence[Part], most: int) -> list[list[Part]]:
    """Neighbouring parts together, as many as there is room for, at least one."""
    groups: list[list[Part]] = [[]]
    for part in parts:
        if groups[-1] and count_of(groups[-1]) + part.seeds > most:
            groups.append([])
        groups[-1].append(part)
    return groups


def _split(
    signals: Mapping[Value, Signal], groups: Sequence[list[Part]]
) -> Iterator[tuple[list[Part], dict[Value, Signal]]]:
    start = 0
    for group in groups:
        seeds = slice(start, start + count_of(group))
        span = union(part.span for part in group)
        shared: dict[int, Tensor] = {}  # signals of the same seeds hold the same tensors
        yield (
            group,
            {
                value: signal.rows(seeds, span, value.map_size, shared)
                for value, signal in signals.items()
            },
        )
        start = seeds.stop


def union(spans: Iterable[Span]) -> Span:
    """Bounds that hold all of several; None where one of them is not known."""
    joined: Span = None
    for number, span in enumerate(spans):
        if span is None:
            return None
        if number == 0:
            joined = span
        elif joined is not None:
            joined = tuple(
                (min(a, c), max(b, d)) for (a, b), (c, d) in zip(joined, span, strict=True)
            )
    return joined


def why_unsupported(op: Op, output: Value, samples: int) -> str | None:
    """Why rules cannot reverse an op on the way back, None if they can.

    Args:
        op: The recorded op.
        output: The one of its outputs at which the signal stands.
        samples: Number of images N.
    """
    if op.fault:
        return op.fault
    if op.rule is None:
        return "has no reverse rule"
    taken = [op.arguments[name] for name in op.rule.of if name in op.arguments]
    if sum(type(leaf) is Value for leaf in leaves(taken)) < len(op.parents):
        name = next(
            name
            for name, argument in op.arguments.items()
            if name not in op.rule.of and any(type(leaf) is Value for leaf in leaves([argument]))
        )
        return f"has an argument {name!r} that depends on the input"
    for value in (output, *(parent for parent in op.parents if not parent.constant)):
        if not value.shape or value.shape[0] != samples:
            return f"does not keep the {samples} images apart along the first dimension"
    return None


def refusals(tape: Tape, target: Value) -> list[tuple[Op, str]]:
    """Why rules cannot take a signal from ``target`` to the input: nothing, if they can."""
    found = [(tape.ops[0], fault) for fault in tape.faults]
    for op, output in on_path(tape, target):
        why = why_unsupported(op, output, tape.samples)
        if why:
            found.append((op, why))
    if not found:
        # Some rules see only on the way back that they cannot honour a call: walk no seeds at all.
        nothing = torch.empty(0, *target.shape[1:], dtype=target.dtype, device=tape.device)
        try:
            walk(
                tape, target, Signal(nothing, torch.empty(0, dtype=torch.int64, device=tape.device))
            )
        except UnsupportedOp as error:
            found.append((error.op or tape.ops[0], error.why or str(error)))
        except AmbiguousProduct:
            pass  # autograd has no way back either: the real walk says so
    return found


def on_path(tape: Tape, target: Value) -> list[tuple[Op, Value]]:
    """The ops that a signal from ``target`` passes, last first, each with an output it passes by."""
    reached = {target}
    path = []
    for op in reversed(tape.ops):
        outputs = [output for output in op.outputs if output in reached]
        if op.name != "input" and outputs and outputs[0] is not None:
            path.append((op, outputs[0]))
            reached.update(parent for parent in op.parents if not parent.constant)
    return path


def pixels(signal: Signal | None, image: Tensor, rows: int) -> Tensor:
    """A signal at the input as full images.

    Args:
        signal: What ``walk`` returned for one input.
        image: That input, [N, ...], for shape and dtype.
        rows: Number of seeds.

    Returns:
        [rows, ...]; zero where no signal arrived. Contiguous if the image is.
    """
    if signal is None:
        return image.new_zeros(rows, *image.shape[1:])
    values = signal.full(image.shape[2:]).values.to(image.dtype)
    return by_map(values) if image.is_contiguous() else values


def _as_taken(op: Op, signal: Signal, index: int, full_from: float) -> Signal:
    """The signal as its rule takes it: on the full map if it knows no windows or that is no more."""
    assert op.rule is not None
    output = op.outputs[index]
    assert output is not None
    if signal.window is not None:
        windows = op.rule.windows(op) if callable(op.rule.windows) else op.rule.windows
        window, whole = signal.values.shape[2:].numel(), output.map_size.numel()
        if not windows or window >= full_from * whole:
            signal = signal.full(output.map_size)
    if signal.channel is not None:
        one_hot = op.rule.one_hot(op) if callable(op.rule.one_hot) else op.rule.one_hot
        signal = signal if one_hot else signal.dense(output.shape[1])
    return signal if signal.output == index else signal.replaced(output=index)


def _sum(one: Signal, other: Signal, value: Value) -> Signal:
    if one.channel is not other.channel:
        one, other = one.dense(value.shape[1]), other.dense(value.shape[1])
    return added(one, other, value.map_size)
