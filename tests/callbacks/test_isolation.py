from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from callback_models import compiled, hooks_on, random_states
from lit_deconv.callbacks.isolation import isolated
from torch import Tensor, nn


class Counting(nn.Module):
    """Moves everything that a forward can move."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3)
        self.norm = nn.BatchNorm2d(2)
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        random.random()
        np.random.rand()
        torch.rand(1)
        self.conv.register_forward_hook(lambda *_: None)
        self.conv.weight.requires_grad_(False)
        self.norm.train()
        return self.norm(self.conv(x))


@pytest.mark.parametrize("raises", [False, True])
def test_everything_is_put_back(raises: bool) -> None:
    model = Counting()
    model.norm.eval()
    model.conv(torch.ones(1, 3, 4, 4)).sum().backward()
    kept = model.conv.register_forward_hook(lambda *_: None)
    gradient = model.conv.weight.grad
    states, flags = random_states(), [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def run() -> None:
        with isolated(model):
            model(torch.randn(2, 3, 4, 4))
            model.conv.weight.grad = None
            if raises:
                raise KeyError("inside")

    if raises:
        with pytest.raises(KeyError, match="inside"):
            run()
    else:
        run()
    assert random_states() == states
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.conv.weight.requires_grad
    assert model.conv.weight.grad is gradient
    assert hooks_on(model) == 1
    kept.remove()


def test_gradients_work_under_inference_mode_and_autocast_is_off() -> None:
    model = nn.Conv2d(3, 2, 3)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        image = torch.ones(1, 3, 4, 4)
        with isolated(model):
            assert not model.training
            leaf = image.clone().requires_grad_()
            output = model(leaf)
            (gradient,) = torch.autograd.grad(output.sum(), leaf)
        assert torch.is_inference_mode_enabled()
    assert output.dtype == torch.float32
    assert gradient.shape == image.shape
    assert model.training


def test_compiled_modules_run_as_python_and_keep_their_graph() -> None:
    torch._dynamo.reset()
    inner = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU())
    model = nn.Sequential(compiled(inner))
    model.eval()
    image = torch.ones(1, 3, 4, 4)
    with torch.no_grad():
        model(image)
    torch._dynamo.utils.counters.clear()
    fired = []
    with isolated(model):
        inner[0].register_forward_hook(lambda *_: fired.append(1))
        model(image)
    with torch.no_grad():
        model(image)
    assert fired == [1]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
