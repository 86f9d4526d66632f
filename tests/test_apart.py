"""Images that do not matter to one another go through the model a few at a time; others stay together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from lit_deconv import Deconvnet, forward
from lit_deconv.engine import local
from lit_deconv.engine.errors import UnsupportedOp


class Net(nn.Module):
    """A residual net with a pool."""

    def __init__(self, between: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.relu, self.pool = nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        self.conv2, self.conv3 = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.between = between

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        x = self.pool(self.relu(self.norm(self.conv1(x)))) * scale
        x = self.relu(self.conv2(x) + x)
        return self.conv3(x if self.between is None else self.between(x))


@pytest.fixture(autouse=True)
def _few_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for two images of 6 x 14 x 15 numbers at a time."""
    monkeypatch.setattr(forward, "_SMALL", 0)
    monkeypatch.setattr(local, "_TOGETHER_BYTES_ON_CPU", 2 * 6 * 14 * 15 * 8)
    monkeypatch.setattr(local, "_TOGETHER_BYTES_ELSEWHERE", 2 * 6 * 14 * 15 * 8)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(7, 3, 14, 15, generator=torch.Generator().manual_seed(1)).double()


def units_of(images: Tensor, count: int = 40) -> Tensor:
    limits = torch.tensor([len(images), 8, 7, 8])
    random = torch.rand(count, 4, generator=torch.Generator().manual_seed(2))
    return (random * limits).long()


def runs_of(net: Net, call: Callable[[Deconvnet], Any], **options: Any) -> list[int]:
    """How many images each run of the model is given, once the model is known."""
    given: list[int] = []

    def note(module: nn.Module, images: Any) -> None:
        if module is net:
            given.append(len(images[0]))

    deconvnet = Deconvnet(net, "conv3", **options)
    call(deconvnet)
    # Not a hook of the model's own: with one, images stay together.
    handle = nn.modules.module.register_module_forward_pre_hook(note)
    call(deconvnet)
    handle.remove()
    return given


CALLS: dict[str, Callable[[Deconvnet, Tensor], Any]] = {
    "layer": lambda net, x: net.attribute(x),
    "channel": lambda net, x: net.attribute(x, 3),
    "unit": lambda net, x: net.attribute(x, (2, 4, 5)),
    "maps": lambda net, x: net.maps(x, [5, 0, 5]),
    "units": lambda net, x: net.reconstruct(x, units_of(x, 400)),
    "patches": lambda net, x: net.reconstruct(x, units_of(x, 400), crop=True),
}


@pytest.mark.parametrize("what", CALLS)
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_the_same_as_together(
    what: str, count: int, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, some = Net().eval().double(), images[:count]
    apart = CALLS[what](Deconvnet(net, "conv3"), some)
    given = runs_of(net, lambda deconvnet: CALLS[what](deconvnet, some))
    assert given == {1: [1], 2: [2], 3: [3], 7: [3, 2, 2]}[count]
    monkeypatch.setattr(forward, "_SMALL", 1 << 30)
    together = CALLS[what](Deconvnet(net, "conv3"), some)
    for one, other in zip(
        apart if isinstance(apart, tuple) else [apart],
        together if isinstance(together, tuple) else [together],
        strict=True,
    ):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.cpu
def test_a_run_takes_about_a_quarter_of_what_all_would(
    images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "_TOGETHER_BYTES_ON_CPU", 1 << 30)
    net, many = Net().eval().double(), images.repeat(3, 1, 1, 1)
    # All of them together are next to nothing.
    assert runs_of(net, lambda deconvnet: deconvnet.attribute(many)) == [21]
    monkeypatch.setattr(local, "_TOGETHER_BYTES_AT_LEAST", 0)
    assert runs_of(net, lambda deconvnet: deconvnet.attribute(many)) == [6, 5, 5, 5]


def test_several_layers_and_units_of_few_images(images: Tensor) -> None:
    net = Net().eval().double()
    deconvnet = Deconvnet(net, ["conv2", "conv3"])
    units = units_of(images, 300)
    few = units[units[:, 0] > 4]
    chosen = {"conv2": few.clamp(max=5), "conv3": units[:0]}
    found = deconvnet.reconstruct(images, chosen)
    assert found["conv3"].shape == (0, 3, 14, 15)
    expected = Deconvnet(net, "conv2").reconstruct(images, chosen["conv2"], via="images")
    assert torch.allclose(found["conv2"], expected, rtol=1e-12, atol=1e-12)


def test_images_without_a_unit_do_not_run(images: Tensor) -> None:
    net = Net().eval().double()
    units = units_of(images, 300)
    some = units[(units[:, 0] == 1) | (units[:, 0] > 4)]
    expected = Deconvnet(net, "conv3").reconstruct(images, some, via="images")
    found = Deconvnet(net, "conv3").reconstruct(images, some)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
    assert runs_of(net, lambda deconvnet: deconvnet.reconstruct(images, some)) == [3]


@pytest.mark.parametrize("image", [0, 6])
def test_a_single_image_does_not_run_alone(image: int, images: Tensor) -> None:
    net = Net(lambda x: x if len(x) > 1 else 2 * x).eval().double()
    units = units_of(images, 60)
    units[:, 0] = image
    expected = Deconvnet(net, "conv3").reconstruct(images, units, via="images")
    assert_close(Deconvnet(net, "conv3").reconstruct(images, units), expected)
    assert runs_of(net, lambda deconvnet: deconvnet.reconstruct(images, units)) == [2]


def test_what_takes_fewer_operations_is_counted_by_layer(images: Tensor) -> None:
    """A patch takes a share of one image, so what counts is the number of units on each image."""
    net = Net().eval().double()
    deconvnet = Deconvnet(net, ["conv2", "conv3"])
    many, few = units_of(images, 300), units_of(images, 3)
    few_of_one, many_of_one = few.clone(), units_of(images, 15)
    few_of_one[:, 0] = many_of_one[:, 0] = 2
    for conv2, conv3, runs in (
        (few, few, []),
        (many, few, [3, 2, 2]),
        (few, many, [3, 2, 2]),
        (few_of_one, few_of_one, []),
        (few, many_of_one, [2]),
        (many_of_one, few, [2]),
    ):
        units = {"conv2": conv2.clamp(max=conv2.new_tensor([6, 5, 6, 7])), "conv3": conv3}
        given: list[int] = []
        deconvnet.reconstruct(images, units)
        handle = nn.modules.module.register_module_forward_pre_hook(
            lambda module, inputs, given=given: (
                given.append(len(inputs[0])) if module is net else None
            )
        )
        found = deconvnet.reconstruct(images, units)
        handle.remove()
        assert given == runs
        expected = deconvnet.reconstruct(images, units, via="images")
        for name in units:
            assert_close(found[name], expected[name])


STAYS: dict[str, tuple[Net, dict[str, Any], Callable[[Deconvnet, Tensor], Any]]] = {
    "callable selector": (
        Net(), {}, lambda net, x: net.attribute(x, lambda y: y[range(len(x)), range(len(x)), 0, 0])
    ),
    "asked for": (Net(), {}, lambda net, x: net.reconstruct(x, units_of(x), via="images")),
    "further arguments": (Net(), {}, lambda net, x: net.attribute(x, additional_forward_args=2.0)),
    "autograd": (Net(), {"path": "autograd"}, lambda net, x: net.attribute(x)),
    "mean over images": (
        Net(lambda x: x - x.mean(0, keepdim=True)), {}, lambda net, x: net.attribute(x)
    ),
    "mean over detached images": (
        Net(lambda x: x - x.detach().mean(0, keepdim=True)), {}, lambda net, x: net.attribute(x)
    ),
    "one constant an image": (
        Net(lambda x: x + torch.arange(7.0).double().view(-1, 1, 1, 1)), {},
        lambda net, x: net.attribute(x),
    ),
    "the number of images": (Net(lambda x: x / len(x)), {}, lambda net, x: net.attribute(x)),
    "weights from the number of images": (
        Net(lambda x: nn.functional.conv2d(x, x.new_full((6, 6, 1, 1), len(x)))), {},
        lambda net, x: net.attribute(x),
    ),
    "random numbers": (
        Net(lambda x: nn.functional.dropout2d(x, training=True)), {},
        lambda net, x: net.attribute(x),
    ),
    "looks at the whole map": (
        Net(lambda x: x * x.mean((2, 3), keepdim=True)), {}, lambda net, x: net.attribute(x)
    ),
}  # fmt: skip


@pytest.mark.parametrize("why", STAYS)
def test_what_stays_together(why: str, images: Tensor) -> None:
    net, options, call = STAYS[why]
    given = runs_of(net.eval().double(), lambda deconvnet: call(deconvnet, images), **options)
    assert set(given) <= {7, 2}  # two of them may be looked at beforehand
    assert given.count(7) >= 1
    assert sum(given) - 7 * given.count(7) <= 2


class Counting(nn.Module):
    """Divides by a buffer to which it adds the number of images."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(len(x))
        return x / self.seen


FOLLOWS_THE_NUMBER: dict[str, Callable[[Tensor], Tensor]] = {
    "number": lambda x: x / len(x),
    "tensor": lambda x: x * torch.tensor(1.0 / len(x)),
    "weights": lambda x: nn.functional.conv2d(x, x.new_full((6, 6, 1, 1), len(x))),
    "buffer": Counting(),
}


@pytest.mark.parametrize("what", FOLLOWS_THE_NUMBER)
def test_units_of_a_model_that_follows_the_number_of_images(what: str, images: Tensor) -> None:
    net = Net(FOLLOWS_THE_NUMBER[what]).eval().double()
    deconvnet, whole = (Deconvnet(net, "conv3", path=path) for path in ("auto", "autograd"))
    # Two images show nothing that holds for more.
    for some in (images[:2], images, images):
        units = units_of(some, 4)
        assert_close(deconvnet.reconstruct(some, units), whole.reconstruct(some, units))
    with pytest.raises(UnsupportedOp, match="number of images"):
        deconvnet.reconstruct(images, units_of(images, 4), via="patches")


def test_units_of_a_model_that_draws_random_numbers_are_not_of_patches(images: Tensor) -> None:
    net = Net(lambda x: x * torch.rand(())).eval().double()
    for some in (images[:2], images):
        with pytest.raises(UnsupportedOp, match="random numbers"):
            Deconvnet(net, "conv3").reconstruct(some, units_of(some, 4), via="patches")


class Chunked(Net):
    """Takes many images by chunks, which two or three do not show."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        x = self.pool(self.relu(self.norm(self.conv1(x))))
        if len(x) > 4:
            return self.conv3(torch.cat([self.conv2(chunk) for chunk in x.split(4)]))
        return self.conv3(self.conv2(x))


def test_many_images_of_another_kind_go_by_autograd(
    images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "_TOGETHER_BYTES_ON_CPU", 1 << 30)
    net = Chunked().eval().double()
    expected = Deconvnet(net, "conv3", path="autograd").attribute(images)
    assert torch.allclose(Deconvnet(net, "conv3").attribute(images), expected, atol=1e-12)


@pytest.mark.parametrize("what", ["layer", "units", "patches"])
def test_what_rules_refuse_goes_by_autograd(what: str, images: Tensor) -> None:
    net = Net(lambda x: torch.div(x, 2, rounding_mode="floor")).eval().double()
    found, expected = (
        CALLS[what](Deconvnet(net, "conv3", path=path), images) for path in ("auto", "autograd")
    )
    assert_close(found, expected)


def test_activations_come_from_one_run(images: Tensor) -> None:
    net = Net().eval().double()
    assert runs_of(net, lambda deconvnet: deconvnet.activations(images)) == [7]
    assert torch.equal(Deconvnet(net, "conv3").activations(images), net(images))


def test_a_model_with_hooks_of_its_user_runs_once(images: Tensor) -> None:
    net, seen = Net().eval().double(), []
    net.conv1.register_forward_hook(lambda _, inputs, output: seen.append(len(output)))
    Deconvnet(net, "conv3").attribute(images)
    assert seen == [7]


def test_a_model_that_counts_its_runs_is_not_looked_at_each_time(images: Tensor) -> None:
    class Counting(Net):
        runs = 0

        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            self.runs += 1
            return super().forward(x, scale)

    given = runs_of(Counting().eval().double(), lambda deconvnet: deconvnet.attribute(images))
    assert given == [7]


@pytest.mark.parametrize("small", [0, 1 << 30])
def test_random_numbers_are_those_of_one_run(
    small: int, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Tensor] = []

    def scaled(x: Tensor) -> Tensor:
        drawn.append(torch.rand(()))
        return x * drawn[-1]

    net = Net(scaled).eval().double()
    monkeypatch.setattr(forward, "_SMALL", small)
    torch.manual_seed(3)
    Deconvnet(net, "conv3").attribute(images)
    torch.manual_seed(3)
    assert drawn[-1] == torch.rand(())


def test_results_are_no_inference_tensors(images: Tensor) -> None:
    deconvnet = Deconvnet(Net().eval().double(), "conv3")
    with torch.inference_mode():
        assert not deconvnet.attribute(images).is_inference()
        assert not deconvnet.maps(images, [1]).is_inference()


@pytest.mark.parametrize("what", ["layer", "maps", "units"])
def test_what_is_not_finite_is_said_once_to_the_caller(what: str, images: Tensor) -> None:
    images[0, 0, 3, 3] = images[6, 0, 3, 3] = float("nan")
    with pytest.warns(UserWarning, match="not finite") as warned:
        CALLS[what](Deconvnet(Net().eval().double(), "conv3"), images)
    assert [warning.filename for warning in warned] == [__file__]
