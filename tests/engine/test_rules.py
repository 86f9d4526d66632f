"""Each rule against its slow definition, over every form in which its op is written."""

# Modules and options are chosen by name here, which types cannot follow.
# mypy: disable-error-code="arg-type, func-returns-value, misc"

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lit_deconv import Deconvnet
from lit_deconv.engine import UnsupportedOp, record, walk
from lit_deconv.engine.signal import Signal

from . import linear_cases, nonlinear_cases, shape_cases
from .definition import (
    Case,
    all_units,
    assert_close,
    built,
    jacobians,
    one_hot,
    quietly,
    seeded_with,
    transposed,
)

CASES = [*linear_cases.CASES, *shape_cases.CASES, *nonlinear_cases.CASES]
RECTIFIERS = nonlinear_cases.RECTIFIERS

by_name = pytest.mark.parametrize("case", CASES, ids=str)
rectifiers = pytest.mark.parametrize("name", RECTIFIERS)


@by_name
def test_a_rule_is_the_transposed_jacobian(case: Case) -> None:
    """A random signal in the whole layer, and every unit alone as a window: U is not N."""
    model, x, function = built(case)
    jacobian = quietly(lambda: jacobians(function, x))
    net = Deconvnet(model, "0", path="rules" if case.path == "rules" else "auto")
    activation = net.activations(x)
    signal = torch.randn_like(activation)
    expected = transposed(jacobian, signal, x)
    assert expected.abs().sum() > 0
    assert_close(net.attribute(x, seeded_with(signal)), expected, case.tolerance)
    assert_close(net.attribute(x), transposed(jacobian, activation, x), case.tolerance)

    units = all_units(activation.shape)
    seeds = one_hot(units, activation).flatten(1)
    matrices = jacobian.reshape(len(x), -1, x[0].numel())[units[:, 0]]
    alone = torch.einsum("uoi,uo->ui", matrices, seeds).view(-1, *x.shape[1:])
    for via in ("images", "patches"):
        given = in_units(net, x, units, via)
        if given is not None:
            assert_close(given, alone, case.tolerance)
    assert Deconvnet(model, "0").explain(x).path == case.path


@pytest.mark.parametrize("case", [case for case in CASES if case.path == "rules"], ids=str)
def test_no_seeds_keep_their_shape(case: Case) -> None:
    """How a model is asked, before any signal is walked, whether rules can take it."""
    model, x, _ = built(case)
    layers = {"0": model.get_submodule("0")}
    tape = quietly(lambda: record(model, [x], layers, model=model))
    target = tape.layers["0"]
    none = Signal(x.new_empty(0, *target.shape[1:]), torch.empty(0, dtype=torch.int64))
    (found,) = walk(tape, target, none)
    assert found is not None
    assert found.full(x.shape[2:]).values.shape == (0, *x.shape[1:])


def in_units(net: Deconvnet, x: Tensor, units: Tensor, via: str) -> Tensor | None:
    """Reconstructions of units one way or the other, None where patches cannot be used."""
    try:
        return quietly(lambda: net.reconstruct(x, units, via=via))
    except UnsupportedOp as error:
        if via == "images" or "patches" not in str(error):
            raise
        return None


@rectifiers
@pytest.mark.parametrize("path", ["rules", "autograd"])
def test_rectifiers_rectify_the_signal(name: str, path: str) -> None:
    model, x, _ = built(Case(name, RECTIFIERS[name]))
    net = Deconvnet(model, "0", path=path)
    activation = net.activations(x)
    signal = torch.randn_like(activation)
    assert_close(net.attribute(x, seeded_with(signal)), signal.relu())
    units = all_units(activation.shape)[::7]
    assert_close(net.reconstruct(x, units), one_hot(units, activation).relu())
    found = Deconvnet(model, "0").explain(x)
    assert found.path == "rules"
    assert "rectifier" in [row.why for row in found.rows]


@rectifiers
def test_rectifiers_stay_within_the_window(name: str) -> None:
    """Between two convolutions a rectifier meets a window of several places."""
    torch.manual_seed(1)
    first, last = (torch.nn.Conv2d(*size, 3, padding=1).double() for size in ((2, 4), (4, 3)))
    model = torch.nn.Sequential(first, *built(Case(name, RECTIFIERS[name]))[0], last)
    x = torch.randn(2, 2, 7, 6, dtype=torch.float64)
    net = Deconvnet(model, "2", path="rules")
    activation = net.activations(x)
    units = all_units(activation.shape)[::5]
    signal = one_hot(units, activation)
    for conv in (last, first):
        signal = torch.nn.functional.conv_transpose2d(signal, conv.weight.detach(), padding=1)
        signal = signal.relu() if conv is last else signal
    assert_close(net.reconstruct(x, units, via="images"), signal)
    by_patches = in_units(net, x, units, "patches")
    assert by_patches is None or assert_close(by_patches, signal) is None


def test_units_may_repeat_come_in_any_order_and_be_none() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(3, 2))
    x = torch.randn(3, 2, 11, 11)
    net = Deconvnet(model, "2", path="rules")
    units = torch.tensor([[2, 1, 0, 3], [0, 0, 1, 1], [2, 1, 0, 3], [2, 2, 3, 3], [1, 0, 0, 0]])
    alone = torch.cat([net.reconstruct(x, unit[None]) for unit in units])
    assert_close(net.reconstruct(x, units), alone, 1e-6)
    assert torch.equal(alone[0], alone[2])
    assert net.reconstruct(x, units[:0]).shape == (0, 2, 11, 11)
    patches, boxes = net.reconstruct(x, units[:0], crop=True)
    assert patches.shape == (0, 2, 5, 5)
    assert boxes.shape == (0, 4)


CHAINS: dict[str, Callable[[], list[torch.nn.Module]]] = {
    "conv-conv": lambda: [torch.nn.Conv2d(2, 4, 3, 2, 1), torch.nn.Conv2d(4, 3, 3, 1, 2)],
    "conv-pool-conv": lambda: [
        torch.nn.Conv2d(2, 4, 3, padding=1),
        torch.nn.MaxPool2d(3, 2, 1),
        torch.nn.Conv2d(4, 3, 3, padding=2, dilation=2),
    ],
    "pool-pool-ceil": lambda: [
        torch.nn.Conv2d(2, 4, 3, padding=1),
        torch.nn.MaxPool2d(3, 2, ceil_mode=True),
        torch.nn.MaxPool2d(2, 1, dilation=2),
    ],
    "pad-conv-norm-relu": lambda: [
        torch.nn.ZeroPad2d((2, 0, 1, 3)),
        torch.nn.Conv2d(2, 4, 2, 2),
        torch.nn.BatchNorm2d(4),
        torch.nn.ReLU(inplace=True),
        torch.nn.Conv2d(4, 4, 3, padding=1, groups=2),
    ],
    "pool-over-padding": lambda: [
        torch.nn.Conv2d(2, 4, 3, padding=3),
        torch.nn.MaxPool2d(3, 1, 1),
        torch.nn.MaxPool2d(2, 2, 1),
        torch.nn.Conv2d(4, 2, 2),
    ],
    "transposed": lambda: [
        torch.nn.Conv2d(2, 4, 3, 2),
        torch.nn.ConvTranspose2d(4, 4, 3, 2, 1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(4, 3, 3, padding=1),
    ],
    "average": lambda: [
        torch.nn.Conv2d(2, 4, 3),
        torch.nn.AvgPool2d(2, ceil_mode=True),
        torch.nn.Conv2d(4, 3, 3, padding=1),
    ],
    "branches": lambda: [
        torch.nn.Conv2d(2, 4, 3, padding=1),
        Branches(
            [
                torch.nn.Conv2d(4, 4, 3, padding=1),
                torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 5, padding=2)),
                torch.nn.MaxPool2d(3, 1, 1),
            ]
        ),
        torch.nn.Conv2d(12, 2, 3, 2),
    ],
    "shortcut": lambda: [
        torch.nn.Conv2d(2, 4, 3, 2, 1),
        Shortcut(torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.ReLU()),
        torch.nn.Conv2d(4, 4, 1, 2),
    ],
}


class Branches(torch.nn.ModuleList):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self], 1)


class Shortcut(torch.nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + 2 * super().forward(x)


@pytest.mark.parametrize("name", CHAINS)
def test_a_window_equals_the_full_map(name: str) -> None:
    """Each unit, border units included, by reconstruct (a window) and by its tuple (a map)."""
    torch.manual_seed(3)
    model = torch.nn.Sequential(*CHAINS[name]()).double().eval()
    last = str(len(model) - 1)
    x = torch.randn(2, 2, 12, 11, dtype=torch.float64)
    net = Deconvnet(model, last, path="rules")
    units = all_units(net.activations(x).shape)
    by_patches = in_units(net, x, units, "patches")
    assert (by_patches is None) == (name in ("transposed", "average"))
    windows = net.reconstruct(x, units, via="images")
    if by_patches is not None:
        assert_close(by_patches, windows)
        patches, boxes = net.reconstruct(x, units, crop=True, via="patches")
        for image, box, given in zip(windows, boxes.tolist(), patches, strict=True):
            assert_close(placed(given[None], torch.tensor([box]), x)[0], image)
    patches, boxes = net.reconstruct(x, units, crop=True, via="images")
    for unit in all_units((1, *net.activations(x).shape[1:]))[:, 1:]:
        full = net.attribute(x, tuple(unit.tolist()))
        rows = (units[:, 1:] == unit).all(1).nonzero()[:, 0]
        assert_close(windows[rows], full)
        assert_close(placed(patches[rows], boxes[rows], x), full)


def placed(patches: Tensor, boxes: Tensor, x: Tensor) -> Tensor:
    """Patches on the empty image; what lies past it has to be zero."""
    margin = 40
    canvas = x.new_zeros(len(patches), x.shape[1], *(size + 2 * margin for size in x.shape[2:]))
    edges = boxes.tolist()
    for image, patch, (top, left, bottom, right) in zip(canvas, patches, edges, strict=True):
        image[:, top + margin : bottom + margin, left + margin : right + margin] = patch
    inside = canvas[:, :, margin:-margin, margin:-margin]
    assert inside.count_nonzero() == canvas.count_nonzero()
    return inside


def test_switches_of_a_map_that_lies_channels_last_in_memory() -> None:
    torch.manual_seed(4)
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3), torch.nn.MaxPool2d(3, 2)).double()
    x = torch.randn(2, 2, 11, 10, dtype=torch.float64)
    expected = Deconvnet(model, "1", path="rules").attribute(x)
    given = Deconvnet(model, "1", path="rules").attribute(x.to(memory_format=torch.channels_last))
    assert_close(given, expected)
    moved = torch.nn.Sequential(model[0], Moved(), model[1])
    assert_close(Deconvnet(moved, "2", path="rules").attribute(x), expected)


class Moved(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x.movedim(1, -1) * 1).movedim(-1, 1)
