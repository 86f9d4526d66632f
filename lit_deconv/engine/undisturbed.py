"""Runs a model for a picture so that nothing notices: flags, random numbers, modes are as before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from lit_deconv.engine.configuration import modules_of, tensors_of
from lit_deconv.engine.precision import exact


@contextmanager
def undisturbed(model: nn.Module, *, autocast: bool = False) -> Iterator[None]:
    """Eval mode module by module, random states kept, no inference mode, exact arithmetic.

    Inside, autocast is off unless asked for, compiled modules run as their Python code, nothing is
    rounded to TF32, and on CUDA convolutions are deterministic.

    Args:
        model: Its modules' ``training`` flags are put back one by one, also after an exception.
        autocast: Leave the caller's autocast as it is.
    """
    flags = [(module, module.training) for module in modules_of(model)]
    devices = {tensor.device for tensor in tensors_of(model)}
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(randomness_kept(devices))
        stack.enter_context(_uncompiled())
        if not autocast:
            for kind in {"cpu", *(d.type for d in devices)} - {"meta"}:
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(exact())
        try:
            for module, training in flags:
                if training:
                    module.training = False  # not eval(): users override train() with side effects
            yield
        finally:
            for module, training in flags:
                if module.training != training:
                    module.training = training


def randomness_kept(devices: Iterable[torch.device]) -> AbstractContextManager[None]:
    """Random numbers drawn inside leave no trace, neither on the CPU nor on these devices."""
    cuda = {device.index or 0 for device in devices if device.type == "cuda"}
    return torch.random.fork_rng(devices=sorted(cuda))


def _uncompiled() -> AbstractContextManager[Any]:
    set_stance = getattr(torch.compiler, "set_stance", None)
    return set_stance("force_eager") if set_stance else nullcontext()
