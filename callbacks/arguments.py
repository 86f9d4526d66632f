"""The arguments of `DeconvCallback`, checked: what cannot work is refused before the first step."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lit_deconv.compare import attribution_class

__all__ = [
    "FIGURES",
    "checked_channels",
    "checked_compare",
    "checked_count",
    "checked_figures",
    "checked_key",
    "checked_layers",
    "checked_module",
    "checked_norm",
    "checked_on_error",
    "checked_probe",
    "checked_shown",
    "checked_tag",
]

FIGURES = (
    "grid",
    "evolution",
    "filters",
    "strongest_beside_captum",
    "beside_captum",
    "channels",
    "numbers",
)
"""What can be logged."""

Layers = str | nn.Module | Sequence[str | nn.Module] | None


def checked_count(name: str, value: object) -> int:
    """A whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise MisconfigurationException(
            f"DeconvCallback({name}={value!r}): expected a whole number of at least 1"
        )
    return int(value)


def checked_layers(layers: Layers) -> Layers:
    """None, or at least one name or module."""
    entries = [layers] if isinstance(layers, str | nn.Module) else layers
    if entries is None:
        return None
    if not isinstance(entries, Sequence) or not entries:
        raise MisconfigurationException(
            f"DeconvCallback(layers={layers!r}): expected a name, a glob such as 'features.*', a "
            "module, or a list of these; leave it out to have layers chosen"
        )
    for entry in entries:
        if not isinstance(entry, str | nn.Module) or entry == "":
            raise MisconfigurationException(
                f"DeconvCallback(layers=...): {entry!r} is neither a name, a glob nor a module"
            )
    return layers


def checked_module(module: object) -> str | None:
    """A dotted name, or None."""
    if module is None or isinstance(module, str):
        return module
    raise MisconfigurationException(
        f"DeconvCallback(module={module!r}): expected the dotted name of the module that takes the "
        "images, or None"
    )


def checked_key(key: object) -> int | str | None:
    """A position, a keyword or a dict key, or None."""
    if key is None or isinstance(key, str) or type(key) is int:
        return key
    raise MisconfigurationException(
        f"DeconvCallback(input_key={key!r}): expected a position, a keyword or a dict key of the "
        "images among the module's arguments, or None"
    )


def checked_channels(channels: object) -> int | list[int] | Literal["all"]:
    """How many channels, which, or all."""
    if channels == "all":
        return "all"
    if isinstance(channels, int):
        return checked_count("channels", channels)
    chosen = list(channels) if isinstance(channels, Sequence) else []
    wrong = [c for c in chosen if isinstance(c, bool) or not isinstance(c, int) or c < 0]
    if isinstance(channels, str) or not chosen or wrong or len(set(chosen)) < len(chosen):
        raise MisconfigurationException(
            f"DeconvCallback(channels={channels!r}): expected how many (16), a list of different "
            "channel numbers from 0 ([0, 5, 12]), or 'all'"
        )
    return chosen


def checked_figures(figures: Sequence[str]) -> frozenset[str]:
    """Names of what is logged."""
    names = _names("log", figures)
    unknown = [name for name in names if name not in FIGURES]
    if unknown or not names:
        raise MisconfigurationException(
            f"DeconvCallback(log={list(names)!r}): expected at least one of {', '.join(FIGURES)}"
        )
    return frozenset(names)


def checked_compare(compare: Sequence[str]) -> tuple[str, ...]:
    """Names of Captum's attributions to the input."""
    names = _names("compare", compare)
    for name in names:
        try:
            attribution_class(name)
        except ValueError as error:
            raise MisconfigurationException(f"DeconvCallback(compare=...): {error}") from error
    return names


def checked_probe(probe: int | Tensor | str) -> int | Tensor:
    """How many images of the validation, or the user's own."""
    if isinstance(probe, str | Path):
        try:
            images = torch.load(probe, map_location="cpu", weights_only=True)
        except Exception as error:
            raise MisconfigurationException(
                f"DeconvCallback(probe={str(probe)!r}): no file that torch.save wrote of one "
                f"tensor of images ({type(error).__name__}: {error})"
            ) from error
    elif isinstance(probe, Tensor):
        images = probe.detach().clone()
    else:
        return checked_count("probe", probe)
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
        given = (
            f"{images.dtype} {list(images.shape)}"
            if isinstance(images, Tensor)
            else type(images).__name__
        )
        raise MisconfigurationException(
            f"DeconvCallback(probe=...): got {given}, expected floating-point images "
            "[N, C, H, W] as the model takes them, normalised"
        )
    if not images.numel():
        raise MisconfigurationException(
            f"DeconvCallback(probe=...): {list(images.shape)} holds no image"
        )
    return images


def checked_norm(
    mean: float | Sequence[float] | None, std: float | Sequence[float] | None
) -> tuple[list[float], list[float]] | None:
    """What normalisation subtracted and divided by; None where neither is given."""
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        raise MisconfigurationException(
            f"DeconvCallback(mean={mean!r}, std={std!r}): give both, or neither"
        )
    means, stds = _floats("mean", mean), _floats("std", std)
    if len(means) != len(stds) and 1 not in (len(means), len(stds)):
        raise MisconfigurationException(
            f"DeconvCallback: mean has {len(means)} values and std has {len(stds)}; give one each, "
            "or one per input channel"
        )
    if not all(value > 0 for value in stds):
        raise MisconfigurationException(f"DeconvCallback(std={std!r}): expected positive values")
    return means, stds


def checked_shown(channels: int | Sequence[int] | None) -> int | tuple[int, int, int] | None:
    """One input channel, three, or the usual choice."""
    if channels is None or (type(channels) is int and channels >= 0):
        return channels
    if isinstance(channels, Sequence) and len(channels) == 3:
        red, green, blue = channels
        if all(type(c) is int and c >= 0 for c in channels):
            return red, green, blue
    raise MisconfigurationException(
        f"DeconvCallback(show_channels={channels!r}): expected the number of one input channel, or "
        "a list of three"
    )


def checked_tag(tag: str) -> str:
    """First part of the names in the log."""
    if not isinstance(tag, str) or not tag.strip("/ "):
        raise MisconfigurationException(f"DeconvCallback(tag={tag!r}): expected a name")
    return tag.strip("/ ")


def checked_on_error(on_error: Literal["warn", "raise"]) -> Literal["warn", "raise"]:
    """What happens to a failure."""
    if on_error not in ("warn", "raise"):
        raise MisconfigurationException(
            f"DeconvCallback(on_error={on_error!r}): expected 'warn' or 'raise'"
        )
    return on_error


def _names(argument: str, names: object) -> tuple[str, ...]:
    found = [names] if isinstance(names, str) else names
    if isinstance(found, list | tuple | set | frozenset):
        every = tuple(found)
        if all(isinstance(name, str) for name in every) and len(set(every)) == len(every):
            return every
    raise MisconfigurationException(
        f"DeconvCallback({argument}={names!r}): expected a list of different names"
    )


def _floats(name: str, value: object) -> list[float]:
    try:
        found = [float(v) for v in torch.as_tensor(value, dtype=torch.float64).flatten()]
    except (TypeError, ValueError, RuntimeError) as error:
        raise MisconfigurationException(
            f"DeconvCallback({name}={value!r}): expected a number, or one per input channel"
        ) from error
    if not found or not all(torch.isfinite(torch.tensor(found))):
        raise MisconfigurationException(
            f"DeconvCallback({name}={value!r}): expected finite numbers, one or one per channel"
        )
    return found
