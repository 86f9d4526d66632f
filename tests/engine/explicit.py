"""Explicit Functions that rectify the signal: the definition that the autograd walk is held to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lit_deconv.engine.autograd import AutogradRecording, record_autograd

Body = Callable[[Tensor], Tensor]


class Rectify(torch.autograd.Function):
    """The definition: any forward value, a backward that rectifies the signal and nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *signal: Tensor) -> tuple[Tensor, None]:
        return signal[0] * (signal[0] > 0), None


def rect(x: Tensor, function: Body = torch.relu) -> Tensor:
    return Rectify.apply(x, function(x.detach().clone()))


class Net(nn.Module):
    """Two convolutions with something between them."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.body = body
        self.last = nn.Conv2d(8, 4, 3, padding=1)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(self.first(x)))


def images() -> Tensor:
    return torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def recorded(net: nn.Module, x: Tensor, layer: str = "last", **options: Any) -> AutogradRecording:
    layers = {layer: net.get_submodule(layer)}
    return record_autograd(net, (x,), layers, model=net, **options)


def ours(body: Body, **options: Any) -> Tensor:
    with torch.no_grad():
        recording = recorded(Net(body), images(), **options)
    return recording.walk("last", recording.outputs["last"])[0]


def reference(body: Body) -> Tensor:
    net, x = Net(body), images().requires_grad_()
    out = net(x)
    return torch.autograd.grad(out, x, out.detach())[0]


def agree(given: Body, expected: Body, **options: Any) -> None:
    torch.testing.assert_close(ours(given, **options), reference(expected), rtol=1e-12, atol=1e-12)
