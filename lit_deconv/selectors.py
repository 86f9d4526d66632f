"""What a user may ask for: checks of inputs and units, and the seed that a selector means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lit_deconv.engine.errors import InputError, SelectorError
from lit_deconv.engine.signal import Signal

Selector: TypeAlias = "int | slice | tuple[int | slice, ...] | Callable[[Tensor], Tensor] | None"


def checked_inputs(inputs: Any) -> tuple[Tensor, ...]:
    """Inputs as a tuple.

    Raises:
        InputError: They are no floating-point tensors with at least one image.
    """
    images = inputs if isinstance(inputs, tuple) else (inputs,)
    if not images:
        raise InputError("an empty tuple of inputs was given, expected at least one tensor")
    for image in images:
        if not isinstance(image, Tensor):
            raise InputError(f"inputs hold a {type(image).__name__}, expected a tensor of images")
        if not image.is_floating_point():
            raise InputError(
                f"inputs are {image.dtype}, expected floating point: convert and normalise them as in "
                f"training, for example images.float() / 255"
            )
        if image.layout is not torch.strided or image.is_meta:
            raise InputError(
                f"inputs are {image.layout} on {image.device}, expected dense tensors that hold pixels"
            )
        if image.ndim < 2 or image.shape[0] == 0:
            raise InputError(
                f"inputs have shape {list(image.shape)}, expected [N, C, H, W] with at least one image"
            )
    return images


def checked_units(name: str, units: Any, shape: torch.Size, device: torch.device) -> Tensor:
    """Units as int64 on the device.

    Args:
        name: The layer, for messages.
        units: What the user gave.
        shape: Shape of the layer's output, [N, C, *map].
        device: Where the units are needed.

    Raises:
        SelectorError: They are no units of this layer.
    """
    width = len(shape)
    if not isinstance(units, Tensor) or units.ndim != 2 or units.shape[1] != width:
        got = list(units.shape) if isinstance(units, Tensor) else type(units).__name__
        raise SelectorError(
            f"units for layer {name!r} are {got}, expected int64 [U, {width}]: sample, channel and "
            f"{width - 2} positions, since its output has shape {list(shape)}"
        )
    if units.is_floating_point() or units.dtype == torch.bool:
        raise SelectorError(f"units are {units.dtype}, expected whole numbers")
    units = units.to(device, torch.int64)
    limits = units.new_tensor(shape)
    outside = (units < 0) | (units >= limits)
    if bool(outside.any()):
        raise SelectorError(
            f"unit {units[outside.any(1)][0].tolist()} lies outside layer {name!r}, whose output has shape "
            f"{list(shape)} (sample, channel, position)"
        )
    return units


def checked_channels(name: str, channels: Any, activation: Tensor) -> Tensor:
    """Channels of a layer as int64 on its device.

    Raises:
        SelectorError: The layer has no such channel.
    """
    chosen = torch.as_tensor(channels, device=activation.device).flatten()
    if chosen.numel() and (chosen.is_floating_point() or chosen.dtype == torch.bool):
        raise SelectorError(
            f"channels of layer {name!r} are {chosen.dtype}, expected whole numbers"
        )
    chosen, count = chosen.to(torch.int64), activation.shape[1]
    if chosen.numel() and not -count <= int(chosen.min()) <= int(chosen.max()) < count:
        raise SelectorError(
            f"channels {chosen.tolist()} are not all among the {count} of layer {name!r}"
        )
    return chosen % count


def seed_of(name: str, activation: Tensor, selector: Selector) -> Signal:
    """The activations that are kept, zero elsewhere; for a callable its value times its gradient.

    Args:
        name: The layer, for messages.
        activation: Its output, [N, C, *map].
        selector: See ``Deconvnet.attribute``.

    Returns:
        A full-map signal, one row an image.

    Raises:
        SelectorError: The selector does not fit the layer's output.
    """
    if selector is None:
        return Signal(activation)
    if callable(selector):
        return Signal(_seed_of_function(name, activation, selector))
    index = selector if isinstance(selector, tuple) else (selector,)
    if len(index) >= activation.ndim:
        raise SelectorError(
            f"neuron_selector {selector!r} has {len(index)} entries; the output of layer {name!r} has "
            f"{activation.ndim - 1} dimensions behind the images: {list(activation.shape[1:])}"
        )
    for entry, size in zip(index, activation.shape[1:], strict=False):
        if isinstance(entry, bool) or not isinstance(entry, (int, slice)):
            raise SelectorError(
                f"neuron_selector {selector!r} holds a {type(entry).__name__}, expected ints and slices"
            )
        if isinstance(entry, int) and not -size <= entry < size:
            raise SelectorError(
                f"neuron_selector {selector!r} lies outside layer {name!r}, whose output has shape "
                f"{list(activation.shape[1:])} behind the images"
            )
    if len(index) == 1 and isinstance(index[0], int) and activation.ndim > 2:
        channel = index[0] % activation.shape[1]
        return Signal(
            activation[:, channel : channel + 1],
            channel=torch.full((len(activation),), channel, device=activation.device),
        )
    seed = torch.zeros_like(activation)
    kept = (slice(None), *index)
    seed[kept] = activation[kept]
    return Signal(seed)


def _seed_of_function(name: str, activation: Tensor, function: Callable[..., Tensor]) -> Tensor:
    with torch.enable_grad():
        leaf = activation.detach().clone().requires_grad_()
        scalars = function(leaf)
        if not isinstance(scalars, Tensor) or scalars.numel() != len(leaf):
            got = list(scalars.shape) if isinstance(scalars, Tensor) else type(scalars).__name__
            raise SelectorError(
                f"the neuron_selector function returned {got} for layer {name!r}, expected one scalar "
                f"for each of the {len(leaf)} images"
            )
        gradient = None
        if scalars.requires_grad:
            (gradient,) = torch.autograd.grad(scalars.sum(), leaf, allow_unused=True)
    if gradient is None:
        raise SelectorError(
            f"the neuron_selector function returned what does not depend on the output of layer "
            f"{name!r}; compute its scalars from its argument, without detaching it"
        )
    return gradient * scalars.detach().reshape(-1, *[1] * (activation.ndim - 1))
