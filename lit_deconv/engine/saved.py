"""Keeps what autograd saved, and what the model owns, from what a forward pass writes in place."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lit_deconv.engine.configuration import tensors_of


class SavedValues(saved_tensors_hooks):
    """While it is on, tensors saved for backward are copied when they are about to be overwritten.

    A model for inference may overwrite what backward needs; plain autograd refuses that.
    """

    def __init__(self) -> None:
        self._slots: defaultdict[int, WeakSet[_Slot]] = defaultdict(WeakSet)
        super().__init__(self._pack, lambda slot: slot.tensor)

    def _pack(self, tensor: Tensor) -> _Slot:
        slot = _Slot(tensor.detach())
        self._slots[memory(tensor)].add(slot)
        return slot

    def before_write(self, tensor: Tensor) -> None:
        """Copies what was saved in the memory of a tensor that is about to be overwritten."""
        for slot in self._slots.pop(memory(tensor), ()):
            slot.tensor = slot.tensor.clone()


class _Slot:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@contextmanager
def state_kept(model: nn.Module | None, saved: SavedValues) -> Iterator[Callable[[Tensor], None]]:
    """Puts back what the forward pass wrote to parameters and buffers.

    Args:
        model: The owner of parameters and buffers; None where there is nothing to keep.
        saved: Told before anything is put back.

    Yields:
        A function to be called with each tensor that is about to be overwritten.
    """
    modules = list(model.modules()) if model is not None else []
    owned = tensors_of(model) if model is not None else []
    owners = {memory(tensor): tensor for tensor in owned}
    registered = [(module, dict(module._buffers)) for module in modules]
    written: list[tuple[Tensor, Tensor]] = []

    def before_write(tensor: Tensor) -> None:
        owner = owners.pop(memory(tensor), None)
        if owner is not None:
            written.append((owner, owner.detach().clone()))

    try:
        yield before_write
    finally:
        with torch.no_grad():
            for owner, value in written:
                saved.before_write(owner)
                if not owner.is_leaf:
                    owner.detach_()
                owner.copy_(value)
        for module, buffers in registered:
            module._buffers.update(buffers)


@contextmanager
def backward_hooks_off(model: nn.Module | None) -> Iterator[None]:
    """The users' backward hooks wait for gradients: they neither see nor change a signal."""
    modules = list(model.modules()) if model is not None else []
    kept = [(module, module._backward_hooks, module._backward_pre_hooks) for module in modules]
    for module in modules:
        module._backward_hooks, module._backward_pre_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for module, hooks, pre_hooks in kept:
            module._backward_hooks, module._backward_pre_hooks = hooks, pre_hooks


def memory(tensor: Tensor) -> int:
    """Names the memory that a tensor lives in, while it lives."""
    return tensor.untyped_storage().data_ptr()
