"""Where Captum's Deconvolution goes wrong: its answer, ours and the reference side by side.

The reference is the model with each rectifier written as an explicit autograd Function, in float64.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import captum.attr  # type: ignore[import-untyped]
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_deconv import Deconvnet, Deconvolution, NeuronDeconvolution
from lit_deconv.engine.errors import DeconvError

DEVICE = os.environ.get("LIT_DECONV_TEST_DEVICE", "cpu")

pytestmark = pytest.mark.filterwarnings("ignore")

UNIT = (1, 2, 3)
IN_EACH_IMAGE = (slice(None), 1, 2, 3)
Activation = Callable[[Tensor], Tensor]


class Rectify(torch.autograd.Function):
    """The definition: the value of the rectifier, the positive part of the signal."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *signal: Tensor) -> tuple[Tensor, None]:
        return signal[0] * (signal[0] > 0), None


class Net(nn.Module):
    """Two convolutions with batch norm, dropout and an activation between them."""

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.drop, self.last = nn.Dropout(0.3), nn.Conv2d(8, 4, 3, padding=1)
        self.activation = activation
        self.failing = False
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.activation(self.norm(self.first(x))))
        if self.failing:
            raise KeyError("from the model")
        z: Tensor = self.last(y)
        return z


def images() -> Tensor:
    return torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def reference(activation: Activation, rectifies: bool = True) -> Tensor:
    """The gradient of one unit, of the deconvnet or (the plain one) of the model as it is."""

    def value(x: Tensor) -> Tensor:
        return Rectify.apply(x, activation(x.detach().clone())) if rectifies else activation(x)

    leaf = images().requires_grad_()
    (gradient,) = torch.autograd.grad(Net(value)(leaf)[IN_EACH_IMAGE].sum(), leaf)
    return gradient


def error(given: Tensor, expected: Tensor) -> float:
    return ((given - expected).norm() / expected.norm()).item()


def with_seed_one(layer: Tensor) -> Tensor:
    """A selector of the unit whose seed is 1, as Captum's is, and not the activation."""
    unit = layer[IN_EACH_IMAGE]
    return 1 + unit - unit.detach()


ACTIVATIONS: dict[str, Activation] = {
    "F.relu": F.relu,
    "torch.relu": torch.relu,
    "x.relu()": lambda x: x.relu(),
    "F.relu_": F.relu_,
    "clamp": lambda x: x.clamp(min=0),
    "where": lambda x: torch.where(x > 0, x, 0),
    "ReLU6": nn.ReLU6(),
    "LeakyReLU": nn.LeakyReLU(0.1),
    "PReLU": nn.PReLU(8).double(),
    "ELU": nn.ELU(),
    "GELU": nn.GELU(),
    "SiLU": nn.SiLU(),
    "Hardswish": nn.Hardswish(),
    "Threshold": nn.Threshold(0, 0),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_captum_is_silently_the_plain_gradient(name: str) -> None:
    activation = ACTIVATIONS[name]
    net, expected, plain = Net(activation), reference(activation), reference(activation, False)
    theirs = captum.attr.NeuronDeconvolution(net, net.last).attribute(images(), UNIT)
    assert error(theirs, plain) < 1e-12
    assert error(theirs, expected) > 0.1
    whole = captum.attr.Deconvolution(net).attribute(images(), UNIT)
    assert error(whole, plain) < 1e-12

    assert error(NeuronDeconvolution(net, net.last).attribute(images(), UNIT), expected) < 1e-12
    assert error(Deconvolution(net).attribute(images(), UNIT), expected) < 1e-12
    for path in ("rules", "autograd"):
        given = Deconvnet(net, "last", path=path).attribute(images(), with_seed_one)
        assert error(given, expected) < 1e-12
    assert any(
        "plain gradient" in fault
        for fault in Deconvnet(net, "last").explain(images()).captum_faults
    )


@pytest.mark.parametrize("form", ["traced", "scripted"])
def test_captum_is_the_plain_gradient_of_traced_and_scripted_models(form: str) -> None:
    model = Net(nn.ReLU())
    made: Any = (
        torch.jit.trace(model, images())
        if form == "traced"
        else torch.jit.script(nn.Sequential(model.first, model.norm, nn.ReLU(), model.last).eval())
    )
    theirs = captum.attr.Deconvolution(made).attribute(images(), UNIT)
    assert error(theirs, reference(F.relu, False)) < 1e-12
    assert error(theirs, reference(F.relu)) > 0.1
    with pytest.raises(DeconvError, match="scripted or traced"):
        Deconvolution(made).attribute(images(), UNIT)
    with pytest.raises(DeconvError, match="scripted or traced"):
        Deconvnet(made, "first" if form == "traced" else "0")
    assert error(Deconvolution(model).attribute(images(), UNIT), reference(F.relu)) < 1e-12


def test_captum_changes_batch_norm_and_random_numbers_in_train_mode() -> None:
    for attribution, touches in ((captum.attr.Deconvolution, True), (Deconvolution, False)):
        net = Net(nn.ReLU()).train()
        state = torch.cuda.get_rng_state if DEVICE == "cuda" else torch.get_rng_state
        mean, random = net.norm.running_mean, state()
        assert mean is not None
        before = mean.clone()
        attribution(net).attribute(images(), UNIT)
        assert torch.equal(mean, before) != touches
        assert torch.equal(state(), random) != touches
    net = Net(nn.ReLU()).train()
    given = Deconvnet(net, "last").attribute(images(), with_seed_one)
    assert error(given, reference(F.relu)) < 1e-12
    assert torch.equal(net.norm.running_mean, torch.zeros(8))  # type: ignore[arg-type]


def test_captum_raises_in_inference_mode() -> None:
    net, expected = Net(nn.ReLU()), reference(F.relu)
    with torch.inference_mode():
        x = images() * 1
        with pytest.raises(RuntimeError):
            captum.attr.Deconvolution(net).attribute(x, UNIT)
        assert error(Deconvolution(net).attribute(x, UNIT), expected) < 1e-12
        assert error(NeuronDeconvolution(net, net.last).attribute(x, UNIT), expected) < 1e-12


def test_captum_on_a_model_that_has_been_compiled_and_run() -> None:
    net, expected = Net(nn.ReLU()), reference(F.relu)
    compiled: Any = torch.compile(net, backend="eager")
    leaf = images().requires_grad_()
    compiled(leaf).sum().backward()
    try:
        theirs = captum.attr.Deconvolution(compiled).attribute(images(), UNIT)
        assert error(theirs, reference(F.relu, False)) < 1e-12
        with pytest.raises((RuntimeError, AssertionError, IndexError, KeyError)):
            captum.attr.NeuronDeconvolution(compiled, net.last).attribute(images(), UNIT)
        assert error(Deconvolution(compiled).attribute(images(), UNIT), expected) < 1e-12
        neuron = NeuronDeconvolution(compiled, net.last)
        assert error(neuron.attribute(images(), UNIT), expected) < 1e-12
    finally:
        torch._dynamo.reset()


def test_captum_leaves_inputs_requiring_gradients_after_an_exception() -> None:
    net = Net(nn.ReLU())
    net.failing = True
    for attribution, touches in ((captum.attr.Deconvolution, True), (Deconvolution, False)):
        x = images()
        with pytest.raises(KeyError, match="from the model"):
            attribution(net).attribute(x, UNIT)
        assert x.requires_grad == touches
