"""What keeps an extra forward unnoticed by training: everything it may move is put back."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import nn

from lit_deconv.engine.undisturbed import undisturbed

__all__ = ["depth", "isolated"]

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
)


_depth = 0


def depth() -> int:
    """How many `isolated` are open: what was put on outside is not to see what runs inside."""
    return _depth


@contextlib.contextmanager
def isolated(module: nn.Module) -> Iterator[None]:
    """Run what is inside in eval mode and leave no trace of it, also after an exception.

    Train flags (of each module), buffers, `requires_grad` and `.grad` of the parameters, hooks and
    the random states of Python, numpy and torch (CPU and the module's devices) are as before.
    Inside, gradients are on, inference mode and autocast are off, and compiled modules run as
    their Python code: nothing is compiled, and no compiled graph is dropped. Another callback's
    hooks, still on the model, take what runs inside for no batch of validation.

    Args:
        module: The whole model. Modules outside it are not guarded.
    """
    global _depth
    restore = [_hooks(module), _parameters(module), _buffers(module), *_random_states(module)]
    _depth += 1
    try:
        with undisturbed(module), torch.enable_grad(), warnings.catch_warnings():
            # the engine's own hooks are global for a moment; compiled parts run as Python code
            warnings.filterwarnings("ignore", message="Using `torch.compile.*global hooks")
            yield
    finally:
        _depth -= 1
        for put_back in restore:
            put_back()


def _hooks(module: nn.Module) -> Callable[[], None]:
    # Captum leaves its hooks on the model when the backward raises
    before = [
        (hooks, set(hooks))
        for each in module.modules()
        for name in _HOOKS
        if (hooks := getattr(each, name, None)) is not None
    ]

    def put_back() -> None:
        for hooks, keys in before:
            for key in [key for key in hooks if key not in keys]:
                del hooks[key]

    return put_back


def _parameters(module: nn.Module) -> Callable[[], None]:
    before = [(p, p.requires_grad, p.grad) for p in module.parameters()]

    def put_back() -> None:
        for parameter, requires_grad, grad in before:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
            if parameter.grad is not grad:
                parameter.grad = grad

    return put_back


def _buffers(module: nn.Module) -> Callable[[], None]:
    before = [(b, b.detach().clone()) for b in module.buffers() if not b.is_meta]

    def put_back() -> None:
        # always: batch norm writes its statistics without raising the tensor's version
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)

    return put_back


def _random_states(module: nn.Module) -> list[Callable[[], None]]:
    # torch's own, on the CPU and on CUDA, are the engine's to keep; these are what it leaves
    python, numbers = random.getstate(), np.random.get_state()
    put_back: list[Callable[[], None]] = [
        lambda: random.setstate(python),
        lambda: np.random.set_state(numbers),
    ]
    for device in {tensor.device for tensor in (*module.parameters(), *module.buffers())}:
        if device.type not in ("cpu", "cuda", "meta"):
            api = torch.get_device_module(device)
            if hasattr(api, "get_rng_state"):
                state = api.get_rng_state()
                put_back.append(partial(api.set_rng_state, state))
    return put_back
