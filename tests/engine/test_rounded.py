"""The model's own convolutions where they may be rounded otherwise: where, how far off, and where not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from lit_deconv import Deconvnet, forward
from lit_deconv.engine import record
from lit_deconv.engine.local import local_way
from lit_deconv.engine.registry import RULES
from lit_deconv.engine.rules import rounded
from lit_deconv.engine.rules.rounded import convolved
from lit_deconv.engine.rules.shared_work import of_whole_maps, shared_work
from lit_deconv.engine.rules.tiles import by_tiles

CONVOLUTION = torch.ops.aten.convolution.default


# So many that whole images go through the model.
UNITS = torch.cartesian_prod(*map(torch.arange, (6, 32, 3, 3)))[::3]


class Net(nn.Module):
    """Two convolutions in front of the pool, three behind it, one of these on a branch."""

    def __init__(self, between: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 24, 3, padding=1)
        self.norm, self.relu = nn.BatchNorm2d(24), nn.ReLU()
        self.pool: nn.Module = nn.MaxPool2d(2)
        self.conv3, self.conv4 = nn.Conv2d(24, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.shortcut = nn.Conv2d(24, 32, 1, bias=False)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.norm(self.conv2(self.conv1(x)))))
        x = self.relu(self.conv3(x) + self.shortcut(x))
        return self.conv4(x if self.between is None else self.between(x))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(6, 3, 14, 15, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _whatever_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "_SMALL", 0)


def _forced(taken: bool) -> Any:
    """Tiles, or none, wherever the model's own convolution may run by them."""
    pay = mock.Mock(side_effect=lambda *_: taken and of_whole_maps())
    return mock.patch.object(rounded, "tiles_pay_forward", pay)


def _layers_rounded(net: nn.Module, call: Callable[[], Any]) -> set[str]:
    """Whose convolutions may be rounded otherwise in a call."""
    names = {id(weight): name.removesuffix(".weight") for name, weight in net.named_parameters()}
    seen: set[str] = set()

    def noted(convolution: Any, arguments: Any) -> Tensor:
        seen.add(names[id(arguments["weight"])])
        return convolved(convolution, arguments)

    rule = replace(RULES["convolution"], run_rounded=noted)
    with mock.patch.dict(RULES, {"convolution": rule}):
        call()
    return seen


@pytest.mark.parametrize("padding", [0, 1, 2, (0, 2)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_tiles_forward_are_pytorchs_convolution(padding: Any, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    images = torch.randn(3, 5, 7, 8, dtype=torch.float64).contiguous(memory_format=layout)
    weight = torch.randn(4, 5, 3, 3, dtype=torch.float64)
    expected = nn.functional.conv2d(images, weight, padding=padding)
    sides = padding if isinstance(padding, tuple) else (padding, padding)
    here = [(2 - side, extent + side) for side, extent in zip(sides, (7, 8), strict=True)]
    given = by_tiles(images, weight, here, forward=True)
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-12)


CASES: dict[str, dict[str, Any]] = {
    "3x3": {},
    "wide padding": {"padding": 3},
    "strided": {"stride": 2, "padding": 1},
    "dilated": {"dilation": 2},
    "5x5 without bias": {"kernel_size": 5, "bias": False},
    "1x1": {"kernel_size": 1},
    "grouped": {"groups": 4},
    "of few channels": {"in_channels": 4},
}


@pytest.mark.cpu
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("taken", [True, False])
def test_a_convolution_but_for_rounding(case: str, taken: bool) -> None:
    torch.manual_seed(0)
    options = {"in_channels": 20, "out_channels": 24, "kernel_size": 3, **CASES[case]}
    conv, images = nn.Conv2d(**options), torch.randn(5, options["in_channels"], 9, 8)
    arguments = {
        "input": images, "weight": conv.weight, "bias": conv.bias, "stride": conv.stride,
        "padding": conv.padding, "dilation": conv.dilation, "transposed": False,
        "output_padding": [0, 0], "groups": conv.groups,
    }  # fmt: skip
    tiled = mock.patch.object(rounded, "by_tiles", wraps=by_tiles)
    with torch.no_grad(), _forced(taken), tiled as called, shared_work(whole_maps=True):
        given, expected = convolved(CONVOLUTION, arguments), conv(images)
    exact = conv.double()(images.double())
    assert (given - exact).abs().max() < 1e-6 * exact.abs().max()
    assert called.called == (taken and case == "3x3")
    if case in ("grouped", "of few channels"):
        assert torch.equal(given, expected)
    else:
        assert given.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("extent", "filters", "as_pytorch_lays_it"),
    [(3, torch.contiguous_format, True), (9, torch.contiguous_format, False),
     (3, torch.channels_last, False)],
)  # fmt: skip
def test_filters_larger_than_the_maps_are_not_copied(
    extent: int, filters: torch.memory_format, as_pytorch_lays_it: bool
) -> None:
    torch.manual_seed(0)
    conv, images = nn.Conv2d(20, 24, 3, padding=1), torch.randn(5, 20, extent, extent)
    conv = conv.to(memory_format=filters)
    arguments = {
        "input": images.contiguous(memory_format=torch.channels_last), "weight": conv.weight,
        "bias": conv.bias, "stride": [1], "padding": [1], "dilation": [1], "transposed": False,
        "output_padding": [0], "groups": 1,
    }  # fmt: skip
    with torch.no_grad():
        given, expected = convolved(CONVOLUTION, arguments), conv(images)
    assert (given - expected).abs().max() < 1e-6 * expected.abs().max()
    assert given.is_contiguous() == as_pytorch_lays_it


def test_where_autograd_looks_on_it_is_pytorchs_own() -> None:
    conv, images = nn.Conv2d(20, 24, 3), torch.randn(5, 20, 9, 8)
    own = mock.Mock()
    convolved(own, {
        "input": images, "weight": conv.weight, "bias": None, "groups": 1, "transposed": False,
    })  # fmt: skip
    assert own.call_args.kwargs["input"] is images


def test_what_lies_behind_the_last_switch_is_rounded(net: Net, images: Tensor) -> None:
    deconvnet = Deconvnet(net, "conv4")
    assert _layers_rounded(net, lambda: deconvnet.attribute(images)) == {
        "conv3", "shortcut", "conv4",
    }  # fmt: skip
    in_front = Deconvnet(net, "conv2")
    assert _layers_rounded(net, lambda: in_front.attribute(images)) == {"conv1", "conv2"}
    both = Deconvnet(net, ["conv2", "conv4"])
    assert _layers_rounded(net, lambda: both.attribute(images)) == {"conv3", "shortcut", "conv4"}
    for call in (
        lambda: deconvnet.attribute(images[:3]),  # too few to know the way by others
        lambda: deconvnet.activations(images),
    ):
        assert not _layers_rounded(net, call)


@pytest.mark.cpu
def test_what_the_last_switches_give_is_left_as_it_lies(net: Net, images: Tensor) -> None:
    net.pool = nn.Sequential(nn.MaxPool2d(2, stride=1), nn.MaxPool2d(2))
    lies_as_usual = []

    def noted(pool: Any, arguments: Any, own: Callable[..., Any]) -> Any:
        values, indices = own(pool, arguments)
        lies_as_usual.append(values.is_contiguous())
        return values, indices

    rule = RULES["max_pool2d_with_indices"]
    assert rule.run
    assert rule.run_laid
    watched = replace(
        rule, run=partial(noted, own=rule.run), run_laid=partial(noted, own=rule.run_laid)
    )
    deconvnet = Deconvnet(net, "conv4")
    deconvnet.attribute(images)  # which looks at few images first
    with mock.patch.dict(RULES, {"max_pool2d_with_indices": watched}):
        deconvnet.attribute(images)
        runs = len(lies_as_usual) // 2
        assert runs
        assert lies_as_usual == [True, False] * runs
        deconvnet.activations(images)
    assert lies_as_usual[2 * runs :] == [True, True]


@pytest.mark.parametrize(
    "between",
    [
        lambda x: x.clamp(-0.5, 0.5),
        lambda x: x.view(len(x), 2, 16, *x.shape[2:]).transpose(1, 2).reshape(x.shape),
        lambda x: x * torch.sigmoid(x),
        lambda x: torch.ops.aten.alias(x).view(x.shape),
    ],
    ids=["clamp", "channel shuffle", "gate", "view"],
)
def test_ops_that_need_the_values_or_their_layout(
    between: Callable[[Tensor], Tensor], images: Tensor
) -> None:
    net = Net(between).eval()
    tape = record(net, (images,), {"conv4": net.conv4}, model=net)
    assert tape.ops[local_way(tape, tape.layers["conv4"]).exact].module in ("conv4", "")
    net.between = None
    tape = record(net, (images,), {"conv4": net.conv4}, model=net)
    last = tape.ops[local_way(tape, tape.layers["conv4"]).exact - 1]
    assert last.name == "max_pool2d_with_indices"


@pytest.mark.parametrize("by", ["number", "weights", "buffers", "maps"])
def test_a_model_that_chooses_by_how_its_maps_lie(by: str, images: Tensor) -> None:
    torch.manual_seed(0)
    model = Net().eval()
    other = nn.Conv2d(24, 24, 3, padding=1)

    def between(x: Tensor) -> Tensor:
        if by == "number":
            return nn.functional.leaky_relu(x - 0.5, 0.1 if x.is_contiguous() else 0.9)
        if by == "buffers":
            weight = model.get_buffer("one" if x.is_contiguous() else "two")
            return torch.conv2d(x, weight, padding=1)
        if by == "maps":
            one, two = model.conv2(x), other(x)
            return nn.functional.relu(one if x.is_contiguous() else two)
        conv = model.conv2 if x.is_contiguous() else other
        return torch.conv2d(x, conv.weight, conv.bias, padding=1)

    for name, conv in (("one", model.conv2), ("two", other)):
        model.register_buffer(name, conv.weight.detach().clone())
    model.pool = nn.Sequential(nn.MaxPool2d(2), _Function(between))
    given = Deconvnet(model, "conv4").attribute(images)
    model.double()
    other.double()
    expected = Deconvnet(model, "conv4").attribute(images.double())
    assert (given - expected).abs().max() < 2e-6 * expected.abs().max()


class _Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _of_few_values(net: Net, images: Tensor) -> tuple[Net, Tensor]:
    """Few different values: windows hold equal ones, and what rounding makes of them decides."""
    for weight in net.parameters():
        weight.data = (weight.data * 10).round().clamp(-1, 1) / 10
    return net, (images * 5).round().clamp(-2, 2).div(10)


@pytest.mark.parametrize(
    "more",
    [
        lambda x: nn.functional.max_pool2d(x, 2),
        lambda x: x.view(len(x), -1).view(x.shape),
        lambda x: x * float(x.is_contiguous()),
    ],
    ids=["pool", "view", "layout"],
)
def test_many_images_that_are_taken_otherwise_than_few(
    more: Callable[[Tensor], Tensor], net: Net, images: Tensor
) -> None:
    net, images = _of_few_values(net, images)
    net.between = lambda x: more(x) if len(x) > 3 else x
    deconvnet = Deconvnet(net, "conv4", path="rules")
    with _forced(True):
        given = [deconvnet.attribute(images) for _ in range(2)]
    with mock.patch.object(forward.Forward, "_manner", return_value=None):
        expected = deconvnet.attribute(images)
    for found in given:
        assert torch.equal(found, expected)
    assert not _layers_rounded(net, lambda: deconvnet.attribute(images))


def test_a_bound_that_has_become_one(net: Net, images: Tensor) -> None:
    """A clamp at zero is a rectifier, elsewhere it needs the values."""
    low = torch.zeros(())
    net.register_buffer("low", low)
    net.between = lambda x: x.clamp(min=low)
    deconvnet = Deconvnet(net, "conv4")
    assert "conv3" in _layers_rounded(net, lambda: deconvnet.attribute(images))
    low.add_(0.25)
    with _forced(True):
        given = deconvnet.attribute(images)
    assert torch.equal(given, Deconvnet(net, "conv4").attribute(images))


@pytest.mark.cpu
def test_a_model_that_asserts_how_its_maps_lie(net: Net, images: Tensor) -> None:
    def checked(x: Tensor) -> Tensor:
        assert x.is_contiguous()
        return x

    net.between = checked
    deconvnet = Deconvnet(net, "conv4")
    assert torch.isfinite(deconvnet.attribute(images)).all()
    assert not _layers_rounded(net, lambda: deconvnet.attribute(images))


@pytest.mark.parametrize("taken", [True, False])
@pytest.mark.parametrize("what", ["layer", "maps", "units"])
def test_pixels_are_those_of_the_exact_forward(
    net: Net, images: Tensor, what: str, taken: bool
) -> None:
    calls: dict[str, Callable[[Deconvnet, Tensor], Tensor]] = {
        "layer": lambda net, x: net.attribute(x),
        "maps": lambda net, x: net.maps(x, [5, 0]),
        "units": lambda net, x: net.reconstruct(x, UNITS),
    }
    deconvnet = Deconvnet(net, "conv4")
    with _forced(taken):
        given = calls[what](deconvnet, images)
        assert torch.equal(deconvnet.activations(images), net(images))
    assert given.is_contiguous()
    net.double()
    expected = calls[what](Deconvnet(net, "conv4"), images.double())
    assert (given - expected).abs().max() < 2e-6 * expected.abs().max()


@pytest.mark.cpu
def test_tiles_go_forward_only_where_whole_maps_go_back(net: Net, images: Tensor) -> None:
    deconvnet = Deconvnet(net, "conv4")
    units = _layers_rounded(net, lambda: deconvnet.reconstruct(images, UNITS))
    assert units == {"conv3", "shortcut", "conv4"}
    with _forced(True), mock.patch.object(rounded, "by_tiles", wraps=by_tiles) as tiled:
        deconvnet.reconstruct(images, UNITS)
        assert not any(call.kwargs for call in tiled.call_args_list)
        deconvnet.attribute(images)
        assert [call.kwargs for call in tiled.call_args_list].count({"forward": True}) == 2
