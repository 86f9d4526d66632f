"""The autograd walk: which layer, which call of it, which units."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_deconv.engine.autograd import record_autograd
from lit_deconv.engine.errors import LayerError
from lit_deconv.engine.mixing import rounds

from .explicit import Net, images, recorded, rect, reference

# ---- layers and units -----------------------------------------------------------------------------


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.unused = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)
        self.constant = nn.Linear(2, 2)
        self.pair = Pair()
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        self.constant(torch.ones(2, 2, dtype=x.dtype))
        return self.pair(self.conv(torch.relu(self.conv(x))))[1]


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + 1, x * 2


def test_which_call_of_a_layer_is_meant() -> None:
    net, x = Twice(), images()
    first, second = (recorded(net, x, "conv", call=call) for call in (None, -1))
    assert first.calls == second.calls == {"conv": 2}
    torch.testing.assert_close(first.outputs["conv"], net.conv(x).detach())
    torch.testing.assert_close(second.outputs["conv"], net.conv(torch.relu(net.conv(x))).detach())
    assert recorded(net, x, "conv", call=0, stop_early=True).calls == {"conv": 1}


def test_of_several_tensors_the_first_is_the_layers_output() -> None:
    net, x = Twice(), images()
    recording = recorded(net, x, "pair")
    torch.testing.assert_close(recording.outputs["pair"], net(x).detach() / 2 + 1)
    chosen = recorded(net, x, "pair", choose=lambda layer, output: output[1])
    torch.testing.assert_close(chosen.outputs["pair"], net(x).detach())


@pytest.mark.parametrize(
    ("layer", "options", "message"),
    [
        ("unused", {}, "did not run"),
        ("constant", {}, "does not depend on the input"),
        ("conv", {"call": 2}, "ran 2 times"),
    ],
)
def test_a_layer_that_cannot_be_reconstructed(
    layer: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(LayerError, match=message):
        recorded(Twice(), images(), layer, **options)


def test_a_seed_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(1, 4\)"):
        recorded(Net(torch.relu), images()).walk("last", torch.zeros(1, 4))


def test_several_inputs_and_one_that_the_layer_does_not_see() -> None:
    net, x = Net(torch.relu), images()
    index = torch.tensor([1, 0])
    recording = record_autograd(
        lambda a, b, i: net(a[i]) + b.mean(), (x, x + 1, index), {"last": net.last}
    )
    signal, unseen, integer = recording.walk("last", recording.outputs["last"])
    torch.testing.assert_close(signal, reference(rect))
    assert torch.equal(unseen, torch.zeros_like(x))
    assert torch.equal(integer, torch.zeros_like(index))


def test_many_units_from_one_forward() -> None:
    net, x = Net(torch.relu), images()
    recording = recorded(net, x)
    activation = recording.outputs["last"]
    units = torch.tensor([[0, 1, 2, 3], [1, 0, 0, 0], [0, 3, 5, 5], [0, 1, 2, 3]])
    seeds = torch.zeros(4, *activation.shape[1:], dtype=activation.dtype)
    for seed, unit in zip(seeds, units, strict=True):
        seed[tuple(unit[1:])] = activation[tuple(unit)]
    (found,) = recording.walk_units("last", units[:, 0], seeds)
    for result, unit, seed in zip(found, units, seeds, strict=True):
        alone = torch.zeros_like(activation)
        alone[unit[0]] = seed
        torch.testing.assert_close(result, recording.walk("last", alone)[0][unit[0]])
    assert recording.walk_units("last", units[:0, 0], seeds[:0])[0].shape == (0, 3, 6, 6)


def test_rounds_hold_each_sample_once_and_are_few() -> None:
    groups = [group.tolist() for group in rounds(torch.tensor([0, 1, 0, 0, 2, 1]))]
    assert groups == [[0, 1, 4], [2, 5], [3]]
