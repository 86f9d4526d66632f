from __future__ import annotations

from collections import Counter
from typing import cast

import pytest
import torch
import torchvision
from torch import Tensor, nn

from lit_deconv.layers import (
    Observation,
    UnknownLayerError,
    automatic,
    kind_of,
    named_layers,
    resolve,
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), nn.ReLU()
        )
        self.classifier = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def observed(model: nn.Module, x: Tensor) -> list[Observation]:
    calls: Counter[str] = Counter()
    seen: list[tuple[str, nn.Module, tuple[int, ...]]] = []
    removals = []
    for name, module in named_layers(model).items():

        def note(module: nn.Module, _: object, out: object, name: str = name) -> None:
            calls[name] += 1
            seen.append((name, module, tuple(out.shape) if isinstance(out, Tensor) else ()))

        removals.append(module.register_forward_hook(note))
    with torch.no_grad():
        model.eval()(x)
    for removal in removals:
        removal.remove()
    return [Observation(n, kind_of(m), shape, calls[n]) for n, m, shape in seen]


def test_exact_names_modules_and_order() -> None:
    net = Net()
    found = resolve(net, ["features.3", net.features[0], "features"])
    assert list(found) == ["features.3", "features.0", "features"]
    assert found["features.0"] is net.features[0]
    assert resolve(net, None) == {}


def test_a_star_stays_within_a_segment_and_two_cross_them() -> None:
    model = torchvision.models.resnet18(weights=None)
    assert list(resolve(model, "layer1.*")) == ["layer1.0", "layer1.1"]
    assert list(resolve(model, "layer?.0.conv1")) == [f"layer{i}.0.conv1" for i in range(1, 5)]
    assert "layer4.1.conv2" in resolve(model, "**.conv2")
    assert list(resolve(Net(), "features.*")) == [f"features.{i}" for i in range(5)]


@pytest.mark.parametrize(
    ("entry", "nearest"),
    [("feature.3", "features.3"), ("conv2", "layer1.0.conv2"), ("layer9.*", "layer4.1")],
)
def test_an_unknown_layer_names_the_nearest(entry: str, nearest: str) -> None:
    model = Net() if entry.startswith("feature") else torchvision.models.resnet18(weights=None)
    with pytest.raises(UnknownLayerError, match=nearest.replace(".", r"\.")) as error:
        resolve(model, entry)
    assert repr(entry) in str(error.value)


def test_a_module_of_another_model_and_a_number_are_refused() -> None:
    with pytest.raises(UnknownLayerError, match="Conv2d is no module of this Net"):
        resolve(Net(), nn.Conv2d(1, 1, 1))
    with pytest.raises(TypeError, match=r"got 3 \(int\)"):
        resolve(Net(), [3])  # type: ignore[list-item]


def test_names_see_through_compile_and_data_parallel() -> None:
    net = Net()
    compiled = cast(nn.Module, torch.compile(net, backend="eager"))
    assert resolve(compiled, "features.0")["features.0"] is net.features[0]
    holder = nn.Module()
    holder.net = compiled
    assert resolve(holder, "net.features.0")["net.features.0"] is net.features[0]
    assert resolve(holder, compiled)["net"] is net
    parallel = nn.DataParallel(net)
    assert resolve(parallel, "features.*")["features.0"] is net.features[0]


def test_a_module_under_two_names_is_found_under_both() -> None:
    holder = nn.Module()
    holder.first = holder.second = nn.Conv2d(1, 1, 1)
    assert list(named_layers(holder)) == ["first", "second"]


EXPECTED = {
    "alexnet": ["features.1", "features.4", "features.11"],
    "vgg11_bn": ["features.2", "features.6", "features.13", "features.20", "features.27"],
    "resnet18": ["relu", "layer1", "layer2", "layer3", "layer4"],
    "resnet50": ["relu", "layer1", "layer2", "layer3", "layer4"],
    "squeezenet1_1": [
        "features.1",
        "features.4.expand3x3_activation",
        "features.7.expand3x3_activation",
        "classifier.2",
    ],
    "mobilenet_v3_small": [
        "features.0.2",
        "features.2.block.0.2",
        "features.4.block.0.2",
        "features.9.block.0.2",
        "features.12.2",
    ],
    "regnet_y_400mf": [
        "stem.2",
        "trunk_output.block1",
        "trunk_output.block2.block2-2.activation",
        "trunk_output.block3.block3-5.activation",
        "trunk_output.block4.block4-5.activation",
    ],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_automatic_choice_on_known_networks(name: str) -> None:
    model = torchvision.models.get_model(name, weights=None)
    assert automatic(observed(model, torch.zeros(1, 3, 128, 128))) == EXPECTED[name]


def stage(kind: str, *sizes: int, calls: int = 1) -> list[Observation]:
    return [
        Observation(f"{kind}{size}", kind, (2, 4, size, size), calls)  # type: ignore[arg-type]
        for size in sizes
    ]


def test_a_module_called_twice_is_passed_over() -> None:
    reused = [*stage("conv", 16), *stage("activation", 16, calls=2), *stage("pool", 8)]
    assert automatic(reused) == ["conv16"]


def test_at_most_so_many_evenly_spaced() -> None:
    many = stage("activation", 128, 64, 32, 16, 8, 4, 2)
    many += stage("conv", 128, 64, 32, 16, 8, 4, 2)
    many.sort(key=lambda o: -o.shape[2])
    assert automatic(many) == [f"activation{s}" for s in (128, 32, 16, 8, 2)]
    assert automatic(many, limit=1) == ["activation2"]
    assert automatic(many, limit=2) == ["activation128", "activation2"]


def test_an_encoder_is_chosen_before_its_decoder() -> None:
    names = []
    for index, size in enumerate([64, 32, 16, 32, 64]):
        names.append(Observation(f"conv{index}", "conv", (1, 2, size, size)))
        names.append(Observation(f"act{index}", "activation", (1, 2, size, size)))
    assert automatic(names) == ["act0", "act1", "act2"]


def test_squeeze_gates_and_transposed_activations_are_no_stage() -> None:
    seen = [
        Observation("conv", "conv", (1, 8, 16, 16)),
        Observation("act", "activation", (1, 8, 16, 16)),
        Observation("squeeze", "pool", (1, 8, 1, 1)),
        Observation("gate", "activation", (1, 8, 1, 1)),
        Observation("permuted", "activation", (1, 16, 16, 8)),
        Observation("conv2", "conv", (1, 8, 16, 16)),
    ]
    assert automatic(seen) == ["act"]


def test_nothing_to_choose() -> None:
    assert automatic([]) == []
    assert automatic([Observation("fc", "other", (2, 10))]) == []
