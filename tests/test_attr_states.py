"""Deconvnet in every state a caller may be in: the same picture, and nothing is noticed."""

# Modules and options are chosen by name here, which types cannot follow.
# mypy: disable-error-code="arg-type, assignment, operator"

from __future__ import annotations

import gc
import os
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from lit_deconv import Deconvnet
from lit_deconv.engine.errors import ChannelsError

DEVICE = os.environ.get("LIT_DECONV_TEST_DEVICE", "cpu")

Untouched = Callable[..., AbstractContextManager[None]]
PATHS = ("auto", "autograd")


class Net(nn.Module):
    """Batch norm, dropout, an in-place and a functional rectifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.conv2 = nn.Conv2d(4, 5, 3, stride=2)
        self.fc = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.relu(self.norm(self.conv1(x))))
        return self.fc(F.relu(self.conv2(x)).mean((2, 3)))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    net = Net()
    nn.init.uniform_(net.norm.running_var, 0.5, 2)
    return net


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 3, 11, 9)


UNITS = torch.tensor([[1, 2, 0, 3], [0, 4, 4, 0], [1, 2, 2, 2]])


def pictures(model: nn.Module, x: Tensor, layer: str = "conv2", **options: Any) -> list[Tensor]:
    """Everything that Deconvnet gives."""
    deconvnet = Deconvnet(model, layer, **options)
    patches, boxes = deconvnet.reconstruct(x, UNITS, crop=True)
    return [
        deconvnet.attribute(x), deconvnet.attribute(x, 1), deconvnet.attribute(x, (1, 2, 2)),
        deconvnet.reconstruct(x, UNITS), deconvnet.activations(x), patches, boxes,
    ]  # fmt: skip


@pytest.fixture
def expected(net: Net, x: Tensor) -> dict[str, list[Tensor]]:
    """By path, from a copy in eval mode, in no special state; crops differ between the paths."""
    net.eval()
    found = {path: pictures(net, x, path=path) for path in PATHS}
    for one, other in zip(found["auto"][:5], found["autograd"][:5], strict=True):
        assert near(one, other)
    net.train()
    return found


def near(given: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    assert given.shape == expected.shape
    assert given.dtype == expected.dtype
    return bool((given - expected).abs().max() <= tolerance * expected.abs().max())


def all_near(given: list[Tensor], expected: list[Tensor]) -> bool:
    return all(near(one, other) for one, other in zip(given, expected, strict=True))


STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "plain": nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast-bf16": lambda: torch.autocast(DEVICE, torch.bfloat16),
    "autocast-fp16": lambda: torch.autocast(DEVICE, torch.float16),
    "enable_grad": torch.enable_grad,
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True, check_nan=False),
    "deterministic": lambda: _deterministic(),
}


def _deterministic() -> AbstractContextManager[Any]:
    from contextlib import contextmanager

    @contextmanager
    def on() -> Iterator[None]:
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)

    return on()


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("state", STATES)
def test_the_state_of_the_caller(
    net: Net,
    x: Tensor,
    expected: dict[str, list[Tensor]],
    untouched: Untouched,
    state: str,
    path: str,
) -> None:
    """In train mode, with one part in eval: flags differ by module and stay as they are."""
    net.conv1.eval()
    with STATES[state](), untouched(net, x):
        given = pictures(net, x, path=path)
    assert all_near(given, expected[path])
    assert not any(picture.requires_grad for picture in given)


@pytest.mark.parametrize("path", PATHS)
def test_inference_tensors(
    net: Net, x: Tensor, expected: dict[str, list[Tensor]], untouched: Untouched, path: str
) -> None:
    with torch.inference_mode():
        image = x.clone()
    assert image.is_inference()
    for mode in (nullcontext, torch.inference_mode):
        with mode(), untouched(net, image):
            assert all_near(pictures(net, image, path=path), expected[path])


@pytest.mark.parametrize("path", PATHS)
def test_frozen_parameters_and_inputs_that_require_grad(
    net: Net, x: Tensor, expected: dict[str, list[Tensor]], untouched: Untouched, path: str
) -> None:
    net.conv1.requires_grad_(False)
    net.fc.weight.grad = torch.ones_like(net.fc.weight)
    x.requires_grad_()
    with untouched(net, x):
        assert all_near(pictures(net, x, path=path), expected[path])
    derived = x * 1
    with untouched(net, derived.detach()):
        assert all_near(pictures(net, derived, path=path), expected[path])


@pytest.mark.parametrize("path", PATHS)
def test_channels_last(
    net: Net, x: Tensor, expected: dict[str, list[Tensor]], untouched: Untouched, path: str
) -> None:
    net = net.to(memory_format=torch.channels_last)
    image = x.to(memory_format=torch.channels_last)
    with untouched(net, image):
        assert all_near(pictures(net, image, path=path), expected[path])
    assert all_near(pictures(net, image.expand_as(image), path=path), expected[path])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.bfloat16, 6e-2), (torch.float16, 8e-3)]
)
def test_the_dtype_of_the_weights(
    net: Net, x: Tensor, untouched: Untouched, dtype: torch.dtype, tolerance: float, path: str
) -> None:
    """A chain without switches: rounding moves no maximum."""
    net = net.to(dtype)
    image = x.to(dtype)
    with untouched(net, image):
        given = pictures(net, image, path=path)
    exact = pictures(net.double(), image.double(), path=path)
    for one, other in zip(given[:6], exact, strict=False):
        assert one.dtype == dtype
        assert near(one.double(), other, tolerance)


@pytest.mark.parametrize("path", PATHS)
def test_autocast_when_asked_for(
    net: Net, x: Tensor, expected: dict[str, list[Tensor]], path: str
) -> None:
    with torch.autocast(DEVICE, torch.bfloat16):
        deconvnet = Deconvnet(net, "conv2", path=path, autocast=True)
        activation = deconvnet.activations(x)
        given = deconvnet.attribute(x)
    assert activation.dtype == torch.bfloat16
    assert given.dtype == torch.float32
    assert near(given, expected[path][0], 6e-2)
    assert not near(given, expected[path][0], 1e-6)  # it is bf16 indeed


# ---- wrappers -----------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("when", ["before", "after", "inside"])
def test_torch_compile(
    net: Net,
    x: Tensor,
    expected: dict[str, list[Tensor]],
    untouched: Untouched,
    when: str,
    path: str,
) -> None:
    torch._dynamo.reset()
    if when == "inside":
        net.conv2.compile(backend="eager")
        model: nn.Module = net
    else:
        model = torch.compile(net, backend="eager")
    if when != "before":
        with torch.no_grad():
            net.eval()
            model(x)
            net.train()
    with untouched(net, x):
        assert all_near(pictures(model, x, path=path), expected[path])
    counters = torch._dynamo.utils.counters
    graphs = counters["stats"]["unique_graphs"]
    with torch.no_grad():
        net.eval()
        scores = model(x)
        assert torch.allclose(scores, net(x), atol=1e-6)
    if when != "before":
        assert counters["stats"]["unique_graphs"] == graphs  # nothing was compiled anew


@pytest.mark.parametrize("path", PATHS)
def test_data_parallel_is_unwrapped(
    net: Net, x: Tensor, expected: dict[str, list[Tensor]], untouched: Untouched, path: str
) -> None:
    model = nn.DataParallel(net)
    with untouched(model, x):
        assert all_near(pictures(model, x, path=path), expected[path])


# ---- what a forward may do to itself ------------------------------------------------------


class Writing(nn.Module):
    """Writes to its own buffers and weights in eval mode, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 4, 3), nn.ReLU()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.mean.mul_(0.9).add_(0.1 * x.detach().mean((0, 2, 3)))
        x = self.relu(self.conv(x))
        self.seen.copy_(x.detach().amax((0, 2, 3)))
        torch.rand(2)
        random.random()
        return x


class Constrained(nn.Module):
    """Holds its filters to a largest norm whenever it runs, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 4, 3), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.conv.weight.copy_(torch.renorm(self.conv.weight, 2, 0, 0.05))
        return self.relu(self.conv(x))


@pytest.mark.parametrize("path", PATHS)
def test_buffers_that_the_forward_writes_are_put_back(
    untouched: Untouched, x: Tensor, path: str
) -> None:
    torch.manual_seed(0)
    model = Writing()
    state = random.getstate()
    with untouched(model, x):
        random.setstate(state)
        given = Deconvnet(model, "relu", path=path).attribute(x)
        random.setstate(state)  # Python's own generator is the model's business
    with torch.no_grad():
        y = model.relu(model.conv(x))
        assert near(given, F.conv_transpose2d(y, model.conv.weight), 1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_weights_that_the_forward_writes_are_those_of_the_picture(
    untouched: Untouched, x: Tensor, path: str
) -> None:
    torch.manual_seed(0)
    model = Constrained()
    with untouched(model, x):
        deconvnet = Deconvnet(model, "relu", path=path)
        given = deconvnet.attribute(x)
        units = deconvnet.reconstruct(x, UNITS[:1], via="images")
        assert near(deconvnet.reconstruct(x, UNITS[:1]), units)
    with torch.no_grad():
        weight = torch.renorm(model.conv.weight, 2, 0, 0.05)
        y = F.conv2d(x, weight, model.conv.bias).relu()
        assert near(given, F.conv_transpose2d(y, weight), 1e-5)


def test_a_model_that_is_changed_between_two_calls(net: Net, x: Tensor) -> None:
    """One Deconvnet over a whole training: weights move, layers are exchanged, parts are frozen."""
    net.eval()
    deconvnet = Deconvnet(net, "conv2")
    one_unit = UNITS[:1]
    deconvnet.reconstruct(x, one_unit)
    with torch.no_grad():
        net.conv1.weight.mul_(-0.5)
    changes: list[Callable[[], Any]] = [
        lambda: None,
        lambda: setattr(net, "relu", nn.Identity()),
        lambda: setattr(net, "conv1", nn.Conv2d(3, 4, 5, padding=2)),
        lambda: setattr(net, "norm", nn.Identity()),
    ]
    for change in changes:
        change()
        for via in ("patches", "images"):
            given = deconvnet.reconstruct(x, one_unit, via=via)
            assert near(given, Deconvnet(net, "conv2").reconstruct(x, one_unit, via="images"))


class Switched(nn.Module):
    """What it runs depends on attributes, its own and those of a configuration."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 5, 3, padding=1)
        self.deep, self.options, self.stages = True, SimpleNamespace(scale=1.0), [1]
        self.activation = F.relu
        self.shift, self.itself = torch.zeros(2), [self.options]
        self.itself.append(self.itself)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.first(x)) + self.shift.sum()
        if self.deep:
            x = self.activation(self.second(x)) * self.options.scale
        return self.last(x * sum(self.stages))


SWITCHES: dict[str, Callable[[Switched], Any]] = {
    "flag": lambda net: setattr(net, "deep", False),
    "configuration": lambda net: setattr(net.options, "scale", -2.0),
    "list": lambda net: net.stages.append(-3),
    "function": lambda net: setattr(net, "activation", lambda x: F.relu(-x)),
    "dilation": lambda net: setattr(net.second, "dilation", (2, 1)),
    "hook": lambda net: net.second.register_forward_hook(lambda part, args, out: -2 * out),
    "tensor": lambda net: setattr(net, "shift", torch.ones(2)),
    "forward": lambda net: setattr(net.second, "forward", lambda x: x * -2),
}


@pytest.mark.parametrize("via", ["patches", "images"])
@pytest.mark.parametrize("switch", SWITCHES)
def test_a_model_that_is_switched_between_two_calls(switch: str, via: Any) -> None:
    """The way through the model that is kept is that of the model as it is now."""
    model, x = Switched().eval(), torch.randn(2, 3, 24, 24)
    deconvnet, units = Deconvnet(model, "last"), torch.tensor([[1, 2, 12, 12]])
    before = deconvnet.reconstruct(x, units, via=via)
    SWITCHES[switch](model)
    given = deconvnet.reconstruct(x, units, via=via)
    assert near(given, Deconvnet(model, "last", path="autograd").reconstruct(x, units))
    assert not near(given, before, 1e-2)


class Turning(nn.Module):
    """Does to its maps between two rectifiers what its attributes say."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.behind = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU()
        self.dim = 2
        self.register_buffer("threshold", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        x = torch.where(x > self.threshold, x, torch.zeros_like(x))
        return self.relu(self.behind(x.roll(1, self.dim)))


def test_what_rules_took_once_is_looked_at_again_where_it_is_something_else() -> None:
    torch.manual_seed(0)
    model, x = Turning().to(DEVICE).eval(), torch.randn(2, 3, 6, 6, device=DEVICE)
    kept = Deconvnet(model, "relu")
    for change in ({}, {"dim": 3}, {"threshold": 0.3}, {"dim": 0}, {"dim": 2}):
        for name, value in change.items():
            if name == "threshold":
                model.threshold.fill_(value)
            else:
                setattr(model, name, value)
        anew = Deconvnet(model, "relu").attribute(x)
        assert torch.equal(kept.attribute(x), anew), change
        # Twice, for what was found out is kept.
        assert torch.equal(kept.attribute(x), anew), change
        assert torch.allclose(
            Deconvnet(model, "relu", path="autograd").attribute(x), anew, atol=1e-6
        )


@pytest.mark.parametrize("via", ["auto", "images"])
def test_pruned_and_reparametrised_weights(via: Any) -> None:
    model, x = Switched().eval(), torch.randn(2, 3, 24, 24)
    prune.l1_unstructured(model.second, "weight", 0.4)
    parametrizations.weight_norm(model.first)
    deconvnet, units = Deconvnet(model, "last"), torch.tensor([[1, 2, 12, 12]])
    for _ in range(2):
        given = deconvnet.reconstruct(x, units, via=via)
        assert near(given, Deconvnet(model, "last", path="autograd").reconstruct(x, units))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(-1.3)


def test_a_model_for_one_batch_size_only(untouched: Untouched) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu = nn.Conv2d(3, 4, 3), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.conv(x.view(2, 3, 11, 9)))

    torch.manual_seed(0)
    model, image = Fixed(), torch.randn(2, 3, 11, 9)
    with untouched(model, image):
        given = Deconvnet(model, "relu").reconstruct(image, UNITS[::2])
    assert given.shape == (2, 3, 11, 9)


@pytest.mark.parametrize("via", ["auto", "patches", "images"])
def test_a_model_that_treats_a_single_image_otherwise(via: Any) -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.last(-y if len(x) == 1 else F.relu(y))

    torch.manual_seed(0)
    model, images = Single(), torch.randn(3, 3, 16, 16)
    units = torch.tensor([[0, 1, 2, 3]])
    net, autograd = Deconvnet(model, "last"), Deconvnet(model, "last", path="autograd")
    for x in (images, images[:1], images):
        assert near(net.reconstruct(x, units, via=via), autograd.reconstruct(x, units))


def test_the_inputs_may_be_written_by_the_model(untouched: Untouched, x: Tensor) -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 2, 3))
    for path in PATHS:
        with untouched(model, x):
            given = Deconvnet(model, "1", path=path).attribute(x)
        assert (given >= 0).all()
        assert given.any()


def test_a_model_that_holds_an_object_with_slots() -> None:
    @dataclass(slots=True)
    class Sizes:
        side: int = 3

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    model.sizes = Sizes()
    units = torch.tensor([[0, 1, 2, 2]])
    assert Deconvnet(model, "1").reconstruct(torch.randn(1, 3, 8, 8), units).shape == (1, 3, 8, 8)


@pytest.mark.parametrize("path", ["auto", "autograd"])
def test_images_with_another_number_of_channels(path: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    with pytest.raises(ChannelsError, match=r"shape \[2, 1, 8, 8\].*3 channels.*give images"):
        Deconvnet(model, "1", path=path).attribute(torch.randn(2, 1, 8, 8))


@pytest.mark.filterwarnings("ignore:.*reduce_op")
@pytest.mark.parametrize("path", ["rules", "autograd"])
def test_what_was_recorded_waits_for_no_garbage_collection(path: Any) -> None:
    """On a GPU nobody collects for want of its memory."""
    layers = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 3, 3)
    model, x = nn.Sequential(*layers).eval(), torch.randn(2, 3, 12, 12)
    units = torch.tensor([[0, 1, 1, 1], [1, 2, 0, 2]])

    def tensors() -> int:
        return sum(isinstance(each, Tensor) for each in gc.get_objects())

    deconvnet = Deconvnet(model, "3", path=path)
    calls: list[Callable[[], Any]] = [
        lambda: deconvnet.attribute(x),
        lambda: deconvnet.reconstruct(x, units, via="images"),
        lambda: deconvnet.reconstruct(x, units, crop=True),
        lambda: deconvnet.maps(x, [0, 1]),
        lambda: deconvnet.explain(x),
    ]
    for call in calls:
        call()
        gc.collect()
        gc.disable()
        try:
            before = tensors()
            call()
            assert tensors() == before
        finally:
            gc.enable()
