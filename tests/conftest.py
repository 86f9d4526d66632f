"""What tests of models share: a check that nothing notices a reconstruction."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

pytest_plugins = ["on_device"]

_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Small maps on many threads are slow, and sums then depend on the machine."""
    torch.set_num_threads(1)


def _state_of(model: nn.Module) -> dict[str, Any]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "names": [name for name, _ in model.named_modules()],
        "training": [module.training for module in model.modules()],
        "hooks": [len(getattr(m, kind)) for m in model.modules() for kind in _HOOKS],
        "tensors": {name: (id(t), t.data_ptr()) for name, t in tensors.items()},
        "values": {name: t.detach().clone() for name, t in tensors.items()},
        "requires_grad": {name: t.requires_grad for name, t in tensors.items()},
        "gradients": {
            name: None if t.grad is None else t.grad.clone() for name, t in tensors.items()
        },
        "global hooks": [len(getattr(nn.modules.module, kind)) for kind in _GLOBAL_HOOKS],
        "random": (
            torch.random.get_rng_state(),
            torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
            random.getstate(),
        ),
        "modes": (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.is_autocast_enabled("cuda"),
            torch.backends.cudnn.allow_tf32,
            torch.backends.cudnn.deterministic,
            torch.backends.cudnn.benchmark,
            torch.backends.cuda.matmul.allow_tf32,
            torch.overrides._len_torch_function_stack(),
            torch.utils._python_dispatch._len_torch_dispatch_stack(),
            torch.autograd.Function.__dict__["apply"],
        ),
    }


def _same(before: Any, after: Any) -> bool:
    if isinstance(before, torch.Tensor):
        return isinstance(after, torch.Tensor) and torch.equal(
            before.nan_to_num(7.0), after.nan_to_num(7.0)
        )
    if isinstance(before, dict):
        return before.keys() == after.keys() and all(_same(before[k], after[k]) for k in before)
    if isinstance(before, (tuple, list)):
        return len(before) == len(after) and all(map(_same, before, after))
    return bool(before == after)


@pytest.fixture
def untouched() -> Callable[..., Any]:
    """A context that asserts that a model, its inputs and global state are left as found."""

    @contextmanager
    def check(model: nn.Module, *inputs: torch.Tensor) -> Iterator[None]:
        images = [(image, image.detach().clone(), image.requires_grad) for image in inputs]
        before = _state_of(model)
        try:
            yield
        finally:
            after = _state_of(model)
            for name, value in before.items():
                assert _same(value, after[name]), f"{name} changed"
            for image, values, requires_grad in images:
                assert _same(values, image.detach()), "the images changed"
                assert image.requires_grad == requires_grad
                assert image.is_inference() or image.grad is None

    return check
