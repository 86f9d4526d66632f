"""Recordings of a few images each, joined to one, against one recording of all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from lit_deconv import Deconvnet
from lit_deconv.engine import RULES, reverse_rule
from lit_deconv.engine.joining import joined, joined_for_layers
from lit_deconv.engine.recording import Recorded
from lit_deconv.forward import Forward

PLENTY = 1 << 30


class Fresh(nn.Module):
    """Adds what is made anew in each run."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.ones(1, x.shape[1], 1, 1, dtype=x.dtype)


class Named(nn.Module):
    """An op of its own by the number of images."""

    def __init__(self, few: int) -> None:
        super().__init__()
        self.few = few

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) if len(x) > self.few else torch.nn.functional.leaky_relu(x, 0.0)


def _net(*between: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(3, 2, 1), *between,
        nn.Conv2d(6, 8, 3, padding=1), nn.ReLU6(), nn.MaxPool2d(2), nn.Conv2d(8, 5, 3), nn.ReLU(),
    )  # fmt: skip
    return net.double().eval()


def _images(count: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(count, 3, 18, 20, dtype=torch.float64)


def _units(net: Deconvnet, images: Tensor, count: int) -> Tensor:
    torch.manual_seed(2)
    shape = net.activations(images).shape
    units = torch.stack([torch.randint(extent, (count,)) for extent in shape], 1)
    units[: len(images), 0] = torch.arange(len(images))  # an image without a unit is not recorded
    return units


def _recorded(net: nn.Sequential, images: Tensor, sizes: list[int]) -> Iterator[Recorded]:
    last = net[len(net) - 1]
    forward = Forward(
        net, {"last": last}, "rules", None, Deconvnet(net, last)._forward.options, None
    )
    start = 0
    with torch.no_grad():
        for some in images.split(sizes):
            yield slice(start, start + len(some)), (some,), forward.recorded((some,), ())
            start += len(some)


def _in_runs(
    monkeypatch: pytest.MonkeyPatch, sizes: list[int], join: Callable[..., Any] = joined
) -> list[int]:
    """Makes images run in runs of these sizes; returns how many are walked at a time."""
    walked: list[int] = []

    def apart(self: Forward, images: Any, extra: Any, to_join: bool = False) -> Iterator[Recorded]:
        start = 0
        for some in images[0].split(sizes):
            yield slice(start, start + len(some)), (some,), self.recorded((some,), extra)
            start += len(some)

    def noted(recorded: Any, images: Any) -> Iterator[Recorded]:
        for each in join(recorded, images):
            walked.append(len(each[1][0]))
            yield each

    monkeypatch.setattr(Forward, "recorded_apart", apart)
    monkeypatch.setattr(f"lit_deconv.attr.{join.__name__}", noted)
    return walked


@pytest.mark.parametrize("sizes", [[3, 3, 3], [4, 3, 2], [1, 8], [9]])
@pytest.mark.parametrize("crop", [False, True])
def test_the_same_as_one_recording(
    monkeypatch: pytest.MonkeyPatch, sizes: list[int], crop: bool
) -> None:
    net = Deconvnet(_net(), "8")
    images = _images(9)
    units = _units(net, images, 50)
    expected = net.reconstruct(images, units, crop=crop, via="images")
    walked = _in_runs(monkeypatch, sizes)
    monkeypatch.setattr(net, "_by_patches", lambda *_: {})
    assert_close(net.reconstruct(images, units, crop=crop), expected)
    assert walked == [9]


@pytest.mark.parametrize(
    ("layer", "sizes", "joint"),
    [
        ("8", [3, 3, 3], [9]),
        ("8", [4, 3, 2], [9]),
        ("0", [3, 3, 3], [3, 3, 3]),  # as large as any map
        ("8", [8, 8], [8, 8]),  # share their filters as they are
        ("8", [8, 4], [8, 4]),
    ],
)
@pytest.mark.parametrize("bytes_together", [1, 60_000, PLENTY])
def test_whole_layers_are_the_same(
    monkeypatch: pytest.MonkeyPatch,
    layer: str,
    sizes: list[int],
    joint: list[int],
    bytes_together: int,
) -> None:
    net = Deconvnet(_net(), layer)
    images = _images(sum(sizes))
    expected = net.attribute(images), net.attribute(images, (2, 1, 1))
    walked = _in_runs(monkeypatch, sizes, joined_for_layers)
    monkeypatch.setattr("lit_deconv.engine.recording._CHUNK_BYTES", {"cpu": bytes_together})
    assert_close((net.attribute(images), net.attribute(images, (2, 1, 1))), expected)
    assert walked == joint * 2


@pytest.mark.parametrize("between", [Fresh, lambda: Named(3)])
def test_what_differs_by_run_stays_apart(
    monkeypatch: pytest.MonkeyPatch, between: Callable[[], nn.Module]
) -> None:
    net = Deconvnet(_net(between()), "9")
    images = _images(7)
    units = _units(net, images, 30)
    expected = net.reconstruct(images, units, via="images")
    walked = _in_runs(monkeypatch, [4, 3])
    monkeypatch.setattr(net, "_by_patches", lambda *_: {})
    assert_close(net.reconstruct(images, units), expected)
    assert walked == [4, 3]


def test_what_a_rule_of_the_users_keeps_stays_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def share(op: Any, tensors: Any, result: Any, options: Any) -> Tensor:
        return result / len(result)  # of the shape of the result, but not row by row

    monkeypatch.setitem(RULES, "relu", RULES["relu"])

    @reverse_rule("relu", after=share)
    def relu(op: Any, signal: Any) -> Iterator[Any]:
        yield op["self"], signal.map(lambda values: values.clamp(min=0))

    walked = _in_runs(monkeypatch, [2, 2])
    net = Deconvnet(_net(), "8")
    images = _images(4)
    monkeypatch.setattr(net, "_by_patches", lambda *_: {})
    net.reconstruct(images, _units(net, images, 5))
    assert walked == [2, 2]


def test_weights_that_changed_in_between_stay_apart() -> None:
    net, images = _net(), _images(4)
    one, other = list(_recorded(net, images, [2, 2]))
    net[0].weight = nn.Parameter(next(net.parameters()).detach().clone())
    (changed,) = _recorded(net, images[2:], [2])
    assert len(list(joined([one, (other[0], *changed[1:])], (images,), PLENTY))) == 2


def test_no_more_is_held_than_asked_for() -> None:
    net, images = _net(), _images(9)
    (one,) = joined(_recorded(net, images, [3] * 3), (images,), PLENTY)
    held = sum(tensor.numel() * tensor.element_size() for tensor in one[2].activations.values())
    sizes = [
        [len(each[1][0]) for each in joined(_recorded(net, images, [3] * 3), (images,), most)]
        for most in (0, held, 100 * held)
    ]
    assert sizes[0] == [3, 3, 3]
    assert sizes[-1] == [9]
    assert len(sizes[1]) > 1


def test_places_are_those_of_all_images() -> None:
    net, images = _net(), _images(7)
    found = list(joined(_recorded(net, images, [2, 3, 2]), (images,), PLENTY))
    (where, (some,), recording) = found[0]
    assert len(found) == 1
    assert (where.start, where.stop) == (0, 7)
    assert some.data_ptr() == images.data_ptr()
    assert_close(recording.activations["last"], net(images).detach())
