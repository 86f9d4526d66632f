"""What is read off an op's schema, and what is found out of a recording once, hold for the next call."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_deconv import Deconvnet
from lit_deconv.engine import RULES, UnsupportedOp, reverse_rule
from lit_deconv.engine.overload import overload_of


@pytest.fixture(scope="module")
def own() -> Iterator[Any]:
    """Ops of the user's."""
    library = torch.library.Library("overloads", "DEF")
    library.define("of_dict(Dict(str, Tensor) maps) -> Tensor")
    library.define("of_any(Any maps) -> Tensor")
    library.define("scaled(Tensor x, Tensor by, int[2] steps=[1, 2]) -> Tensor")
    library.impl("of_dict", lambda maps: 2 * maps["a"], "CompositeExplicitAutograd")
    library.impl("of_any", lambda maps: 2 * maps["a"], "CompositeExplicitAutograd")
    library.impl("scaled", lambda x, by, steps=(): x * by, "CompositeImplicitAutograd")
    yield torch.ops.overloads
    RULES.pop("overloads::scaled", None)


class Net(nn.Module):
    """An op of the user's between two rectifiers."""

    def __init__(self, op: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.relu, self.op = nn.Conv2d(3, 4, 3), nn.ReLU(), op
        self.by = torch.ones(())

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.op(self, self.conv(x).relu()))


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["of_dict", "of_any"])
def test_maps_in_a_dict_are_seen(name: str, own: Any, images: Tensor) -> None:
    net = Net(lambda _, x: x + getattr(own, name)({"a": x}))
    with pytest.raises(UnsupportedOp, match=name):
        Deconvnet(net, "relu", path="rules").attribute(images)


def test_a_rule_of_the_users_may_refuse_by_a_value(own: Any, images: Tensor) -> None:
    @reverse_rule("overloads::scaled", of="x")
    def scaled(op: Any, signal: Any) -> Iterator[Any]:
        if op["by"] < 0:
            raise UnsupportedOp("turns the sign")
        yield op["x"], signal.map(lambda values: values * op["by"])

    net = Net(lambda self, x: own.scaled(x, self.by))
    deconvnet = Deconvnet(net, "relu")
    for by in (1.0, -1.0, 2.0):
        net.by.fill_(by)
        assert torch.equal(deconvnet.attribute(images), Deconvnet(net, "relu").attribute(images))


def test_a_default_is_not_shared_between_calls(own: Any, images: Tensor) -> None:
    seen = []

    @reverse_rule("overloads::scaled", of="x")
    def scaled(op: Any, signal: Any) -> Iterator[Any]:
        seen.append(list(op["steps"]))
        op["steps"].append(3)
        yield op["x"], signal

    deconvnet = Deconvnet(Net(lambda self, x: own.scaled(x, self.by)), "relu", path="rules")
    for _ in range(2):
        deconvnet.attribute(images)
    assert seen == [[1, 2], [1, 2]]


def test_it_can_be_pickled_after_it_was_used(images: Tensor) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2))
    deconvnet = Deconvnet(net, "1")
    units = torch.tensor([[0, 1, 2, 2]])
    found = deconvnet.attribute(images), deconvnet.reconstruct(images, units)
    other = pickle.loads(pickle.dumps(deconvnet))
    assert torch.equal(other.attribute(images), found[0])
    assert torch.equal(other.reconstruct(images, units), found[1])


def test_what_a_schema_says() -> None:
    clamp = overload_of(torch.ops.aten.clamp_.Tensor)
    assert (clamp.name, clamp.holding, clamp.written) == (
        "clamp",
        ("self", "min", "max"),
        ("self",),
    )
    assert clamp.out_of_place is torch.ops.aten.clamp.Tensor
    index = overload_of(torch.ops.aten.index.Tensor)
    assert (index.holding, index.written) == (("self", "indices"), ())
    convolution = overload_of(torch.ops.aten.convolution.default)
    assert convolution.holding == ("input", "weight", "bias")
    assert not convolution.composite
    assert overload_of(torch.ops.aten.conv2d.default).composite
    assert overload_of(torch.ops.aten.upsample_nearest2d.vec).shorthand
