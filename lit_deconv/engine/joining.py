"""Recordings of some images each as one of all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lit_deconv.engine.recording import OnTape, Recorded, Recording
from lit_deconv.engine.rules.pooling import Switches
from lit_deconv.engine.tape import Op, Tape, Value

# Bytes that recordings may hold together: on a CPU they are to take no more than a forward does.
_HELD_ON_CPU, _HELD_ELSEWHERE = 4 << 20, 1 << 30
# The same for whole layers, where that is up to such a share of the largest map on the way, and a run was
# of fewer images than share their filters well enough.
_LAYERS_ON_CPU, _SMALL_SHARE, _SHARE_WELL = 64 << 20, 0.5, 8


def joined(
    recorded: Iterable[Recorded], images: tuple[Tensor, ...], most: int | None = None
) -> Iterator[Recorded]:
    """Neighbouring recordings that tell nothing but their images apart, as one.

    What a walk shares, such as its margins, calls and filters, is shared by more units then, while each
    forward pass was of a few images.

    Args:
        recorded: Which images, these images, and their recording, in order. They are not to be used
            any further.
        images: All images, each [N, ...].
        most: Bytes of activations, switches and masks that one recording may hold, unless one alone
            does; if not given, what suits the device.

    Yields:
        The same.
    """
    if most is None:
        most = _HELD_ON_CPU if images[0].device.type == "cpu" else _HELD_ELSEWHERE
    return _in_groups(recorded, images, lambda _: most)


def joined_for_layers(
    recorded: Iterable[Recorded], images: tuple[Tensor, ...]
) -> Iterator[Recorded]:
    """The same for whole layers: on a CPU, where they are so small that little has to wait for the others.

    Filters that are read for each small map take as long as what is made of it.
    """
    if images[0].device.type != "cpu":
        return iter(recorded)

    def most(recording: Recording) -> int:
        if not isinstance(recording, OnTape) or recording.tape.samples >= _SHARE_WELL:
            return 0
        values = [value for op in recording.tape.ops for value in op.outputs if value is not None]
        largest = max(value.shape.numel() * value.dtype.itemsize for value in values)
        return _LAYERS_ON_CPU if _held(recording) <= _SMALL_SHARE * largest else 0

    return _in_groups(recorded, images, most)


def _in_groups(
    recorded: Iterable[Recorded],
    images: tuple[Tensor, ...],
    most: Callable[[Recording], int],
) -> Iterator[Recorded]:
    group: list[Recorded] = []
    held = 0
    for each in recorded:
        own = _held(each[2])
        if group and (held + own > most(group[0][2]) or not _alike(group[0][2], each[2])):
            yield _as_one(group, images)
            held = 0
        group.append(each)
        held += own
        del each  # which is the group's now
    if group:
        yield _as_one(group, images)


def _held(recording: Recording) -> int:
    tensors = list(recording.activations.values())
    if isinstance(recording, OnTape):
        tensors += [_rows(op) for op in recording.tape.ops if op.kept is not None and _by_row(op)]
    return sum(tensor.nbytes for tensor in tensors)


def _as_one(group: list[Recorded], images: tuple[Tensor, ...]) -> Recorded:
    """One recording of a group's images: the first one's calls, with the rows of all.

    The group is emptied, for what it holds by row is held by the one from there on.
    """
    if len(group) == 1:
        return group.pop()
    where = slice(group[0][0].start, group[-1][0].stop)
    some = tuple(image[where] for image in images)
    tapes = [each.tape for _, _, each in group if isinstance(each, OnTape)]
    group.clear()
    tape = tapes[0]
    for op, *same in zip(*(tape.ops for tape in tapes), strict=True):
        if op.kept is not None:
            rows = torch.cat([_rows(each) for each in (op, *same)])
            op.kept = replace(op.kept, codes=rows) if isinstance(op.kept, Switches) else rows
    for name in tape.activations:
        tape.activations[name] = torch.cat([each.activations[name] for each in tapes])
    return where, some, OnTape(tape, some, len(tapes))


def _alike(one: Recording, other: Recording) -> bool:
    if not isinstance(one, OnTape) or not isinstance(other, OnTape):
        return False
    return _same_ops(one.tape, other.tape)


def _same_ops(one: Tape, other: Tape) -> bool:
    """Whether two tapes are of the same calls, and what is kept of each is kept image by image."""
    same: dict[Value | None, Value | None] = {None: None}
    if len(one.ops) != len(other.ops):
        return False
    for a, b in zip(one.ops, other.ops, strict=True):
        calls = a.name == b.name and a.func == b.func and a.rule is b.rule
        if not calls or len(a.outputs) != len(b.outputs) or not (_by_row(a) and _by_row(b)):
            return False
        if type(a.kept) is not type(b.kept) or not _same(a.arguments, b.arguments, same):
            return False
        if a.kept is not None and _rows(a).shape[1:] != _rows(b).shape[1:]:
            return False
        same |= zip(a.outputs, b.outputs, strict=True)
    return all(same.get(value) is other.layers[name] for name, value in one.layers.items())


def _same(one: Any, other: Any, values: Mapping[Value | None, Value | None]) -> bool:
    """Whether two calls were given the same: one value for another, any other tensor itself."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Value):
        return values.get(one) is other
    if isinstance(one, Tensor):
        return one is other
    if isinstance(one, dict):
        return one.keys() == other.keys() and _same(
            list(one.values()), list(other.values()), values
        )
    if isinstance(one, (list, tuple)):
        pairs = zip(one, other, strict=False)
        return len(one) == len(other) and all(_same(a, b, values) for a, b in pairs)
    return bool(one == other)


def _by_row(op: Op) -> bool:
    """Whether a row an image is all that is kept of an op: nothing, switches, or a number a number."""
    if op.kept is None:
        return True
    if op.rule is None or not op.rule.is_ours:
        return False
    if isinstance(op.kept, Switches):
        return op.kept.window is None
    return isinstance(op.kept, Tensor) and any(
        value is not None and value.shape == op.kept.shape for value in (*op.outputs, *op.parents)
    )


def _rows(op: Op) -> Tensor:
    return op.kept.codes if isinstance(op.kept, Switches) else op.kept
