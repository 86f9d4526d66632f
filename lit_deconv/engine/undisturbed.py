"""Runs a model for a picture so that nothing notices: flags, random numbers, modes are as before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn


@contextmanager
def undisturbed(model: nn.Module, *, autocast: bool = False) -> Iterator[None]:
    """Eval mode module by module, random states kept, no inference mode, exact arithmetic.

    Inside, autocast is off unless asked for, compiled modules run as their Python code, and on CUDA
    convolutions are deterministic and do not round to TF32: two runs give the same picture.

    Args:
        model: Its modules' ``training`` flags are put back one by one, also after an exception.
        autocast: Leave the caller's autocast as it is.
    """
    flags = [(module, module.training) for module in model.modules()]
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    cuda = sorted({device.index or 0 for device in devices if device.type == "cuda"})
    matmul_tf32 = torch.backends.cuda.matmul.allow_tf32 if cuda else False
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        stack.enter_context(_uncompiled())
        if not autocast:
            for kind in {"cpu", *(d.type for d in devices)} - {"meta"}:
                stack.enter_context(torch.autocast(kind, enabled=False))
        if cuda:
            stack.enter_context(
                torch.backends.cudnn.flags(
                    enabled=torch.backends.cudnn.enabled,
                    benchmark=False,
                    deterministic=True,
                    allow_tf32=False,
                )
            )
            torch.backends.cuda.matmul.allow_tf32 = False
        try:
            for module, _ in flags:
                module.training = False  # not eval(): users override train() with side effects
            yield
        finally:
            for module, training in flags:
                module.training = training
            if cuda:
                torch.backends.cuda.matmul.allow_tf32 = matmul_tf32


def _uncompiled() -> AbstractContextManager[Any]:
    set_stance = getattr(torch.compiler, "set_stance", None)
    return set_stance("force_eager") if set_stance else nullcontext()
