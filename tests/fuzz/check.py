"""Compares lit-deconv with a network's reference, and names every disagreement."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from unittest import mock

import torch
from captum.attr import NeuronDeconvolution  # type: ignore[import-untyped]
from torch import Tensor, nn

import lit_deconv
from lit_deconv import Deconvnet, forward
from lit_deconv.engine import local
from lit_deconv.engine.errors import DeconvError, LayerError, UnsupportedOp
from lit_deconv.engine.rules import convolution, layout, pooling, rounded

from . import reference
from .generator import Network, generate

TOLERANCE = 1e-9
PATHS: tuple[Literal["rules", "autograd", "auto"], ...] = ("rules", "autograd", "auto")


@dataclass
class Outcome:
    """What a network's comparisons gave.

    Args:
        seed: the network's.
        errors: largest relative error of each comparison.
        refusals: by path, why it refused.
        failures: each disagreement, in words.
        path: what ``auto`` took, or refused.
    """

    seed: int
    errors: dict[str, float] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    path: str = ""

    def compare(self, name: str, given: Tensor, expected: Tensor) -> None:
        """Notes the relative error, and a failure where it exceeds the tolerance."""
        error = relative_error(given, expected)
        self.errors[name] = max(error, self.errors.get(name, 0.0))
        if not error <= TOLERANCE:
            self.failures.append(f"{name}: relative error {error:.1e}")

    def require(self, condition: bool, failure: str) -> None:
        """Notes a failure unless the condition holds."""
        if not condition:
            self.failures.append(failure)


def relative_error(given: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest absolute value that was expected.

    What is expected to cancel is rounding alone: it counts by its absolute size.
    """
    if given.shape != expected.shape:
        return float("inf")
    difference = (given.detach() - expected.detach()).abs().max().item()
    scale = expected.detach().abs().max().item()
    error = difference / max(scale, 1e-3)
    return error if error == error else float("inf")


def check(seed: int, device: str = "cpu") -> Outcome:
    """All comparisons on the network of a seed; an exception is a failure too."""
    try:
        return check_network(generate(seed), device)
    except Exception as error:
        return Outcome(
            seed, failures=[f"exception: {type(error).__name__}: {error}"], path="exception"
        )


def one_thread() -> None:
    """Maps this small are no work for several threads."""
    torch.set_num_threads(1)


def check_network(network: Network, device: str = "cpu") -> Outcome:
    """All comparisons on one network."""
    outcome = Outcome(network.seed)
    rng = random.Random(network.seed + 2)
    model, images = network.model().to(device), network.inputs().to(device)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    leaf = images.clone().requires_grad_()
    taps: dict[str, Tensor] = {}
    scores = network.reference_function()(leaf, {k: v.clone() for k, v in state.items()}, taps)
    with torch.no_grad():
        outcome.compare("forward", _evaluated(model, images), scores)
    layer = taps[network.layer]
    unit = tuple(rng.randrange(n) for n in layer.shape[1:])
    units = torch.tensor([[rng.randrange(n) for n in layer.shape] for _ in range(3)])

    masks = [torch.zeros_like(layer) for _ in range(2 + len(units))]
    masks[0].fill_(1)
    masks[1][every_image(unit)] = 1
    for mask, position in zip(masks[2:], units.tolist(), strict=True):
        mask[tuple(position)] = 1
    try:
        whole, single, *rest = (
            reference.walk(layer, layer.detach() * mask, leaf) for mask in masks
        )
        by_unit = torch.stack([r[u] for r, u in zip(rest, units[:, 0], strict=True)])
    except reference.AmbiguousProductError:
        _check_refusals(outcome, network, model, images)
        _check_untouched(outcome, network, model, images, state)
        return outcome

    for path in PATHS:
        net = _deconvnet(network, model, path=path)
        try:
            given = net.attribute(images)
        except DeconvError as error:
            outcome.refusals[path] = str(error)
            if path != "rules" and network.trainable:
                outcome.failures.append(f"{path} refused: {error}")
            continue
        except Exception as error:
            outcome.failures.append(f"{path}: {type(error).__name__}: {error}")
            continue
        outcome.compare(f"whole/{path}", given, whole)
        patches, boxes = net.reconstruct(images, units, crop=True)
        outcome.compare(f"crop/{path}", uncropped(patches, boxes, images.shape[2:]), by_unit)
        if path == "auto":  # it takes one of the other two, and those are asked the rest
            outcome.compare("activations", net.activations(images), layer)
            _check_apart(outcome, net, images, units)
            continue
        given = net.attribute(images, neuron_selector=unit)
        outcome.compare(f"unit/{path}", given, single)
        outcome.compare(f"units/{path}", net.reconstruct(images, units, via="images"), by_unit)
        if path == "rules":
            _check_by_tiles(outcome, net, images, units, whole, by_unit)
            _check_patches(outcome, net, images, units, by_unit)
    outcome.path = _path_taken(network, model, images, outcome)
    if len(network.layers) > 1:
        _check_several(outcome, network, model, images, taps, leaf)
    _check_calls(outcome, network, model, images, taps, leaf)
    _check_captum(outcome, network, model, images, whole)
    _check_drop_in(outcome, network, model, images, whole)
    _check_untouched(outcome, network, model, images, state)
    return outcome


def every_image(place: Sequence[slice | int]) -> tuple[slice | int, ...]:
    """The index of one place in each image, or of one window in each channel."""
    return (slice(None), *place)


def uncropped(patches: Tensor, boxes: Tensor, size: Sequence[int]) -> Tensor:
    """Puts patches [U, C, *field] back into images of zeros [U, C, *map] at their boxes."""
    images = patches.new_zeros(*patches.shape[:2], *size)
    for image, patch, box in zip(images, patches, boxes.tolist(), strict=True):
        edges = list(zip(box[: len(size)], box[len(size) :], strict=True))
        inside = tuple(slice(max(first, 0), max(last, 0)) for first, last in edges)
        under = image[every_image(inside)]
        shown = tuple(
            slice(max(-first, 0), max(-first, 0) + extent)
            for (first, _), extent in zip(edges, under.shape[1:], strict=True)
        )
        under.copy_(patch[every_image(shown)])
    return images


def _deconvnet(network: Network, model: nn.Module, layer: Any = None, **options: Any) -> Deconvnet:
    return Deconvnet(model, layer or network.layer, gates=network.gates, **options)


def _check_patches(
    outcome: Outcome, net: Deconvnet, images: Tensor, units: Tensor, by_unit: Tensor
) -> None:
    """Units computed from the patches under them, where that can be done."""
    try:
        given = net.reconstruct(images, units, via="patches")
        patches, boxes = net.reconstruct(images, units, crop=True, via="patches")
    except UnsupportedOp as error:
        outcome.require("patches" in str(error), f"patches refused: {error}")
        return
    outcome.compare("units/patches", given, by_unit)
    outcome.compare("crop/patches", uncropped(patches, boxes, images.shape[2:]), by_unit)


def _check_by_tiles(
    outcome: Outcome, net: Deconvnet, images: Tensor, units: Tensor, whole: Tensor, by_unit: Tensor
) -> None:
    """3x3 convolutions by tiles, products to few channels, and filters turned round, wherever they can be."""
    with (
        mock.patch.object(convolution, "tiles_pay", _wherever_it_can),
        mock.patch.multiple(convolution, _PRODUCTS_FROM=0, _PRODUCTS_FROM_PIXELS=0),
        mock.patch.object(convolution, "fast_in_channels_last", return_value=True),
    ):
        outcome.compare("whole/by tiles", net.attribute(images), whole)
        patches, boxes = net.reconstruct(images, units, crop=True)
    outcome.compare("crop/by tiles", uncropped(patches, boxes, images.shape[2:]), by_unit)


def _wherever_it_can(values: Tensor, weight: Tensor, here: Any) -> bool:
    return weight.shape[2:] == (3, 3) and values.device.type == "cpu"


def _check_apart(outcome: Outcome, net: Deconvnet, images: Tensor, units: Tensor) -> None:
    """Twice as many images, through the model all together and a few at a time."""
    many = torch.cat([images, images])
    try:
        _evaluated(net.model, many)
    except RuntimeError:
        return  # the network is made for its number of images
    whole = net.attribute(many)
    by_unit = net.reconstruct(many, units, via="images")
    with (
        mock.patch.object(forward, "_SMALL", 0),
        mock.patch.object(local, "_TOGETHER_BYTES_ON_CPU", 1),
        mock.patch.object(local, "_TOGETHER_BYTES_ELSEWHERE", 1),
    ):
        outcome.compare("whole/apart", net.attribute(many), whole)
        patches, boxes = net.reconstruct(many, units, crop=True)
        for name, taken in {"channels_last": False, "tiles": True}.items():
            forced: dict[str, Any] = {
                "_NARROW": 0,
                "tiles_pay_forward": lambda *_, taken=taken: taken,
            }
            with (
                mock.patch.object(layout, "_FAST_IN_CHANNELS_LAST", (torch.float64,)),
                mock.patch.object(pooling, "_SIDE_BY_SIDE", 1),
                mock.patch.multiple(rounded, **forced),
            ):
                outcome.compare(f"whole/forward by {name}", net.attribute(many), whole)
    outcome.compare("crop/apart", uncropped(patches, boxes, images.shape[2:]), by_unit)


def _check_calls(
    outcome: Outcome,
    network: Network,
    model: nn.Module,
    images: Tensor,
    taps: dict[str, Tensor],
    leaf: Tensor,
) -> None:
    """A layer that runs more than once: its first and its last call."""
    for name, calls in network.repeated[:1]:
        try:
            _deconvnet(network, model, name).attribute(images)
            outcome.failures.append(f"{name} runs {calls} times and no call was asked for")
        except LayerError:
            pass
        for call in (0, -1):
            tap = taps[f"{name}@{call % calls}"]
            if not tap.requires_grad:
                continue
            try:
                expected = reference.walk(tap, tap.detach(), leaf)
            except reference.AmbiguousProductError:
                continue
            for path in PATHS:
                net = _deconvnet(network, model, name, path=path, call=call)
                try:
                    given = net.attribute(images)
                except DeconvError as error:
                    if path != "rules" and network.trainable:
                        outcome.failures.append(f"call {call}/{path} refused: {error}")
                    continue
                outcome.compare(f"call {call}/{path}", given, expected)


def _evaluated(model: nn.Module, images: Tensor) -> Tensor:
    training = model.training
    output: Tensor = model.eval()(images.clone())
    model.train(training)
    return output


def _path_taken(network: Network, model: nn.Module, images: Tensor, outcome: Outcome) -> str:
    if "auto" in outcome.refusals:
        return "refused"
    return str(_deconvnet(network, model).explain(images).path)


def _refuses(walk: Callable[[], object]) -> str | None:
    try:
        walk()
    except DeconvError as error:
        return str(error)
    return None


def _check_refusals(outcome: Outcome, network: Network, model: nn.Module, images: Tensor) -> None:
    """An ambiguous product is on the way: every path has to say so."""
    outcome.path = "refused"
    for path in PATHS:
        net = _deconvnet(network, model, path=path)
        refusal = _refuses(lambda net=net: net.attribute(images))  # type: ignore[misc]
        outcome.require(refusal is not None, f"{path}: an ambiguous product was not refused")
        outcome.refusals[path] = refusal or ""


def _check_several(
    outcome: Outcome,
    network: Network,
    model: nn.Module,
    images: Tensor,
    taps: dict[str, Tensor],
    leaf: Tensor,
) -> None:
    """Two layers in one forward."""
    names = list(network.layers[:2])
    try:
        expected = [reference.walk(taps[name], taps[name].detach(), leaf) for name in names]
    except reference.AmbiguousProductError:
        return
    try:
        given = _deconvnet(network, model, names).attribute(images)
    except DeconvError as error:
        if network.trainable:
            outcome.failures.append(f"two layers refused: {error}")
        return
    except Exception as error:
        outcome.failures.append(f"two layers: {type(error).__name__}: {error}")
        return
    for name, value in zip(names, expected, strict=True):
        outcome.compare("two layers", given[name], value)


def _check_captum(
    outcome: Outcome, network: Network, model: nn.Module, images: Tensor, whole: Tensor
) -> None:
    """Captum is right where ``explain()`` finds no fault in it, and on plain networks it finds none."""
    faults = _deconvnet(network, model).explain(images).captum_faults
    if network.captum_right:
        wrong = [fault for fault in faults if not fault.startswith("not checked")]
        outcome.require(not wrong, f"a fault of Captum's that is none: {wrong}")
    if faults:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        captum = NeuronDeconvolution(model.eval(), model.get_submodule(network.layer))
        try:
            given = captum.attribute(images.clone(), _half_of_squares)
        except Exception as error:
            # What overwrites a value that autograd has saved stops Captum, and not in silence.
            if network.trainable:
                outcome.failures.append(f"captum: {type(error).__name__}: {error}")
            return
        finally:
            model.train(network.train_mode)
    outcome.compare("captum", given, whole)


def _check_drop_in(
    outcome: Outcome, network: Network, model: nn.Module, images: Tensor, whole: Tensor
) -> None:
    """Our class in Captum's place, which keeps the gradient of gates and of contrast normalisation."""
    kept = (
        "unchanged(",
        *(f"{name}(" for name in reference.CONSTANT if network.gates == "constant"),
    )
    if any(name in network.reference for name in kept):
        return
    drop_in = lit_deconv.NeuronDeconvolution(model.eval(), model.get_submodule(network.layer))
    try:
        given = drop_in.attribute(images.clone(), _half_of_squares)
    except Exception as error:
        if network.trainable:
            outcome.failures.append(f"drop-in: {type(error).__name__}: {error}")
        return
    finally:
        model.train(network.train_mode)
    outcome.compare("drop-in", given, whole)


def _half_of_squares(layer: Tensor) -> Tensor:
    """A scalar an image whose gradient is the layer itself: the seed of a whole layer."""
    return 0.5 * layer.square().flatten(1).sum(1)


def _check_untouched(
    outcome: Outcome,
    network: Network,
    model: nn.Module,
    images: Tensor,
    state: dict[str, Tensor],
) -> None:
    """Model, flags, hooks and images are as they were."""
    outcome.require(torch.equal(images.cpu(), network.inputs()), "the images have changed")
    now = model.state_dict()
    same = all(torch.equal(now[name], tensor) for name, tensor in state.items())
    outcome.require(same, "the model's state has changed")
    flags = {module.training for module in model.modules()}
    outcome.require(flags == {network.train_mode}, "train and eval flags have changed")
    hooks = any(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
        for module in model.modules()
    )
    outcome.require(not hooks, "hooks are left on the model")
    outcome.require(all(p.grad is None for p in model.parameters()), "gradients are left behind")
