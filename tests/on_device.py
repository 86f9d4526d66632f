"""Runs tests written for a CPU on another device: what they make is moved there as it is made.

    python -m pytest --device cuda [--tf32] tests/engine tests/test_attr.py ...
    LIT_DECONV_TEST_DEVICE=cuda python -m pytest tests/callbacks

Whatever lit-deconv, Captum or Lightning make stays where they put it, so that a tensor they forgot
on the CPU meets those of the device, and the test fails. Numbers are drawn on the CPU: they are
those of the ordinary run.
"""

from __future__ import annotations

import os
import pathlib
import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

# Where tests that name a device themselves look it up.
VARIABLE = "LIT_DECONV_TEST_DEVICE"

_ROOT = pathlib.Path(__file__).parents[1]
_ENGINE = str(_ROOT / "lit_deconv" / "engine")
_TORCH = str(pathlib.Path(torch.__file__).parent)
# Who makes what is meant to be on the device: tests, benchmarks, and models of examples.
_MOVED = tuple(
    str(folder)
    for folder in (
        _ROOT / "tests",
        _ROOT / "benchmarks",
        _ROOT / "lit_deconv" / "examples",
        pathlib.Path(torchvision.__file__).parent,
    )
)
_DRAWS = {
    getattr(Tensor, name)
    for name in ("normal_", "uniform_", "random_", "bernoulli_", "exponential_", "log_normal_")
}


class OnDevice(TorchFunctionMode):
    """What tests make without naming a device is moved to this one.

    Args:
        device: Where to.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = torch.device(device)
        self.factories = _device_constructors()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in self.factories and kwargs.get("device") is None and _asked_by_tests():
            return self._moved(func(*args, **kwargs))
        if func in _DRAWS and args[0].device.type == self.device.type and _asked_by_tests():
            return self._drawn(func, args, kwargs)
        return func(*args, **kwargs)

    def _moved(self, made: Any) -> Any:
        if not isinstance(made, Tensor) or made.device.type != "cpu" or made.is_sparse:
            return made
        moved = made.detach().to(self.device)
        return moved.requires_grad_() if made.requires_grad else moved

    def _drawn(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        target: Tensor = args[0]
        with torch.no_grad():
            drawn = func(torch.empty(target.shape, dtype=target.dtype), *args[1:], **kwargs)
            return target.copy_(drawn)


def _asked_by_tests() -> bool:
    """Whether the innermost caller outside torch is one whose tensors are meant for the device.

    Function modes, and what lit-deconv calls in one, hand on what others ask for.
    """
    frame: FrameType | None = sys._getframe(1)
    asking = ""
    while frame is not None:
        file = frame.f_code.co_filename
        if frame.f_code.co_name == "__torch_function__":
            asking = ""
        elif not asking and file != __file__ and not file.startswith(_TORCH):
            asking = file
        if asking and not file.startswith(_ENGINE):
            break
        frame = frame.f_back
    return asking.startswith((*_MOVED, "<"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the engine's tests run: cpu or cuda")
    parser.addoption("--tf32", action="store_true", help="let the caller's CUDA round to TF32")


def pytest_configure(config: pytest.Config) -> None:
    device, tf32 = config.getoption("--device"), config.getoption("--tf32")
    if device == "cpu":
        return
    os.environ[VARIABLE] = device
    # Captum, and what the tests compute themselves, are as exact as they are on a CPU.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    mode = OnDevice(device)
    mode.__enter__()  # from here on, for what modules make when they are imported
    config.add_cleanup(lambda: mode.__exit__(None, None, None))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--device") != "cpu":
        for item in items:
            if item.get_closest_marker("cpu"):
                item.add_marker(pytest.mark.skip(reason="asks which form a CPU takes"))
