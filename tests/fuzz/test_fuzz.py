"""A hundred random networks against the definition, and tests that such a comparison can fail."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from . import reference
from .check import check, relative_error, uncropped
from .constructs import CONSTRUCTS
from .convolutions import CONVOLUTIONS
from .gates import ATTENTION
from .generator import Network, generate
from .rectifiers import RECTIFIERS

EXPECTED = {
    *CONSTRUCTS,
    *(f"rectifier:{name}" for name in RECTIFIERS),
    *(f"{name}:{form.kind}" for name in ("relu",) for form in RECTIFIERS[name].forms),
    *(f"form:{form.kind}" for rectifier in RECTIFIERS.values() for form in rectifier.forms),
    *(f"convolution:{kind}" for kind in CONVOLUTIONS),
    *(f"attention:{kind}" for kind in ATTENTION),
    *(f"local gradient:{name}" for name in ("tanh", "sigmoid", "hardsigmoid", "softmax", "clamp")),
    *(f"padding:{mode}" for mode in ("constant", "reflect", "replicate", "circular")),
    *(f"normalisation:{kind}" for kind in ("group", "instance", "layer", "channels last")),
    *(f"{kind}:{d}-D" for kind in ("convolution", "max pool", "avg pool") for d in (1, 3)),
    *(f"interpolation:{mode}" for mode in ("nearest", "bilinear")),
    *(f"adaptive pool:{kind}" for kind in ("avg", "max")),
    *(f"squeeze-and-excite:{name}" for name in ("torch.sigmoid", "F.hardsigmoid", "F.relu")),
    "max-pool:overlapping",
    "max-pool:apart",
    "max-pool:ceil=True",
    "max-pool:padding=1",
    "gate in place",
    "in place, returned tensor ignored",
    "one rectifier module in several places",
    "linear head",
    "sum",
    "subtraction",
}


@pytest.mark.parametrize("start", range(0, 100, 10))
def test_ten_networks_agree_with_the_definition(start: int) -> None:
    failing = [outcome for outcome in map(check, range(start, start + 10)) if outcome.failures]
    if failing:
        found = "\n".join(f"seed {o.seed}: {failure}" for o in failing for failure in o.failures)
        pytest.fail(f"{found}\n\n{generate(failing[0].seed)}", pytrace=False)


def test_a_seed_always_gives_the_same_network() -> None:
    for seed in range(20):
        first, second = generate(seed), generate(seed)
        assert str(first) == str(second)
        assert first.layers == second.layers
        assert torch.equal(first.inputs(), second.inputs())
        states = (network.model().state_dict().values() for network in (first, second))
        assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    assert len({generate(seed).source for seed in range(20)}) == 20


def test_every_construct_occurs_among_the_first_networks() -> None:
    occurring = frozenset().union(*(generate(seed).constructs for seed in range(200)))
    assert not EXPECTED - occurring


def test_the_reference_imports_torch_alone() -> None:
    tree = ast.parse(Path(reference.__file__).read_text())
    modules = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    modules |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert modules <= {"__future__", "collections.abc", "typing"} | {
        m for m in modules if m and m.split(".")[0] == "torch"
    }


def test_both_forms_compute_the_same_at_every_layer() -> None:
    for seed in range(100):
        network = generate(seed)
        _, user = _user_layers(network)
        taps = _reference_layers(network)[1]
        for name in network.layers:
            assert relative_error(user[name], taps[name]) < 1e-12, (seed, name)


def test_most_references_differ_from_the_plain_gradient() -> None:
    correcting = differing = 0
    for seed in range(60):
        network = generate(seed)
        if not network.trainable:
            continue
        until_layer = network.reference.split(f'taps["{network.layer}"]')[0]
        correcting += "rectify(" in until_layer
        leaf, taps = _reference_layers(network)
        images, user = _user_layers(network)
        try:
            expected = _walk(taps[network.layer], leaf)
        except reference.AmbiguousProductError:
            continue
        differing += relative_error(_walk(user[network.layer], images), expected) > 1e-3
    assert differing > correcting / 2 > 10


def test_networks_that_may_be_trained_have_every_gradient() -> None:
    untrainable = 0
    for seed in range(100):
        network = generate(seed)
        model = network.model().eval()
        output = model(network.inputs().requires_grad_())
        try:
            output.sum().backward()
        except RuntimeError:
            assert not network.trainable, seed
            untrainable += 1
    assert untrainable < 10


def _plain(ctx: Any, signal: Tensor) -> tuple[Tensor, None]:
    return signal, None


def _reversed_sign(ctx: Any, signal: Tensor) -> tuple[Tensor, None]:
    return signal.clamp(max=0), None


@pytest.mark.parametrize("backward", [_plain, _reversed_sign])
def test_a_wrong_rectifier_is_noticed(
    monkeypatch: pytest.MonkeyPatch, backward: Callable[..., Any]
) -> None:
    monkeypatch.setattr(reference.Rectifier, "backward", staticmethod(backward))
    noticed = [outcome for outcome in map(check, range(20)) if outcome.failures]
    for path in ("rules", "autograd", "auto"):
        assert any(f.startswith(f"whole/{path}") for outcome in noticed for f in outcome.failures)
    assert len(noticed) > 5


def test_a_gate_that_lets_the_signal_through_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(reference.CONSTANT, "gate", reference.product)
    gated = [
        seed
        for seed in range(60)
        if "gate(" in generate(seed).reference and generate(seed).gates == "constant"
    ]
    assert any(check(seed).failures for seed in gated[:12])


def test_ambiguous_products_are_refused() -> None:
    seeds = [seed for seed in range(1000) if "ambiguous(" in generate(seed).reference]
    refused = [outcome for outcome in map(check, seeds) if outcome.path == "refused"]
    assert len(refused) >= 3
    assert not any(outcome.failures for outcome in refused)
    assert all(set(outcome.refusals) == {"rules", "autograd", "auto"} for outcome in refused)


def test_patches_go_back_to_their_boxes() -> None:
    patches = torch.arange(18.0).view(2, 1, 3, 3)
    boxes = torch.tensor([[-1, 2, 2, 5], [1, 0, 4, 3]])
    images = uncropped(patches, boxes, (4, 4))
    assert images[0, 0].tolist() == [[0, 0, 3, 4], [0, 0, 6, 7], [0] * 4, [0] * 4]
    assert torch.equal(images[1, 0, 1:, :3], patches[1, 0])


def _user_layers(network: Network) -> tuple[Tensor, dict[str, Tensor]]:
    """The user's form run with hooks: images that require grad, and each layer's output."""
    model, images = network.model().eval(), network.inputs().requires_grad_()
    outputs: dict[str, Tensor] = {}
    for name in network.layers:

        def hook(_: object, __: object, output: Tensor, name: str = name) -> None:
            outputs[name] = output.clone()

        model.get_submodule(name).register_forward_hook(hook)
    model(images)
    return images, outputs


def _reference_layers(network: Network) -> tuple[Tensor, dict[str, Tensor]]:
    leaf: Tensor = network.inputs().requires_grad_()
    taps: dict[str, Tensor] = {}
    network.reference_function()(leaf, dict(network.model().state_dict()), taps)
    return leaf, taps


def _walk(layer: Tensor, leaf: Tensor) -> Tensor:
    return reference.walk(layer, layer.detach(), leaf)


def test_what_cancels_counts_by_its_absolute_size() -> None:
    nothing = torch.zeros(3)
    assert relative_error(nothing + 1e-16, nothing + 2e-16) < 1e-12
    assert relative_error(nothing + 1e-3, nothing + 2e-3) == pytest.approx(0.5)
    assert relative_error(nothing, nothing + 1e-6) > 1e-4
