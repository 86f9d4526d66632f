"""What the rules of one call share: what they make of the weights, and a place to work in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lit_deconv.engine.tape import Op

# Bytes that are kept from one op to the next.
_ROOM = 32 << 20


class _Shared:
    def __init__(self, whole_maps: bool) -> None:
        self.whole_maps = whole_maps
        self.filters = (
            WeakTensorKeyDictionary()
        )  # by weight: its version, and by transform what came of it
        self.constants: WeakKeyDictionary[Op, Tensor] = WeakKeyDictionary()
        self.room = torch.empty(0)


_shared: ContextVar[_Shared | None] = ContextVar("shared", default=None)


@contextmanager
def shared_work(whole_maps: bool = False) -> Iterator[None]:
    """Within it each weight is transformed once, and what is made on the way has one place in memory.

    The transformed weights are kept until its end, 16/9 of those of the 3x3 filters that are used, for each
    way that they are used.

    Args:
        whole_maps: Whether whole maps go back, and filters are transformed for them in any case: then
            the model's own forward may use them, too.
    """
    token = _shared.set(_Shared(whole_maps))
    try:
        yield
    finally:
        _shared.reset(token)


def is_shared() -> bool:
    """Whether there is anything to share with."""
    return _shared.get() is not None


def of_whole_maps() -> bool:
    """Whether it is known that whole maps go back."""
    shared = _shared.get()
    return shared is not None and shared.whole_maps


def transformed_once(weight: Tensor, transform: Callable[[Tensor], Tensor]) -> Tensor:
    """What is made of a weight, again only where it was written to since."""
    shared = _shared.get()
    if shared is None or weight.is_inference():
        return transform(weight)
    version, made = shared.filters.get(weight, (None, {}))
    if version != weight._version:
        version, made = shared.filters[weight] = weight._version, {}
    if transform not in made:
        made[transform] = transform(weight)
    found: Tensor = made[transform]
    return found


def constant_of(op: Op, make: Callable[[], Tensor]) -> Tensor:
    """What a recorded op does to every signal alike, made once.

    Args:
        op: The op, whose weights no rule writes to.
        make: Makes it.
    """
    shared = _shared.get()
    if shared is None:
        return make()
    found = shared.constants.get(op)
    if found is None:
        found = shared.constants[op] = make()
    return found


def room(like: Tensor, *shapes: Sequence[int]) -> list[Tensor]:
    """Tensors of these shapes, which nobody reads any more once others are asked for.

    The allocator may ask the system for a large block each time, which takes longer, page by page,
    than to write there.
    """
    sizes = [math.prod(shape) for shape in shapes]
    shared = _shared.get()
    room = like.new_empty(0) if shared is None else shared.room
    if room.dtype != like.dtype or len(room) < sum(sizes):
        room = like.new_empty(sum(sizes))
        if shared is not None and room.nbytes <= _ROOM:
            shared.room = room
    parts = room[: sum(sizes)].split_with_sizes(sizes)
    return [part.view(*shape) for part, shape in zip(parts, shapes, strict=True)]
