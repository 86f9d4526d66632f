"""A few images as the module that runs was given them, with whatever else it was given."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["Probe", "find_images", "joined", "spread"]


@dataclass(frozen=True)
class Probe:
    """Some images as a module was given them, with its other arguments.

    Args:
        leaves: The arguments' leaves. Tensors with one entry per image hold these images' entries.
        spec: How the leaves make up `(args, kwargs)`.
        image: Index of the leaf that holds the images [N, C, H, W].
        batched: Indices of the leaves that have one entry per image, the images among them.
    """

    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec
    image: int
    batched: tuple[int, ...]

    @property
    def images(self) -> Tensor:
        """The images [N, C, H, W]."""
        images: Tensor = self.leaves[self.image]
        return images

    @property
    def is_plain(self) -> bool:
        """Whether the module takes the images alone."""
        return len(self.leaves) == 1 and self.spec == pytree.tree_structure(((0,), {}))

    def __len__(self) -> int:
        return len(self.images)

    def arguments(self, images: Tensor | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The module's arguments, with other images of the same number in their place."""
        leaves = list(self.leaves)
        if images is not None:
            leaves[self.image] = images
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return args, kwargs

    def take(self, rows: list[int]) -> Probe:
        """The given images alone, as copies that are no inference tensors."""
        with torch.inference_mode(False), torch.no_grad():
            leaves = tuple(
                _take(leaf, rows if index in self.batched else None)
                for index, leaf in enumerate(self.leaves)
            )
        return replace(self, leaves=leaves)

    def to(self, device: torch.device) -> Probe:
        """The same on another device."""
        moved = (leaf.to(device) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves)
        return replace(self, leaves=tuple(moved))

    def with_images(self, images: Tensor) -> Probe:
        """Other images [M, C, H, W]; the other arguments are those of the first image."""
        leaves = list(self.take([0] * len(images)).leaves)
        leaves[self.image] = images
        return replace(self, leaves=tuple(leaves))


def find_images(
    args: tuple[Any, ...], kwargs: dict[str, Any], key: int | str | None
) -> Probe | None:
    """The first batch of images among a call's arguments, one container deep.

    Args:
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        key: Position, keyword or key of a dict that holds it; None: the first one.

    Returns:
        The images [N, C, H, W] of floating-point numbers, with the other arguments; None without.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    if key is None:
        places: list[Any] = [*args, *kwargs.values()]
        places += [entry for place in places for entry in _entries(place)]
    elif isinstance(key, int):
        places = [args[key]] if -len(args) <= key < len(args) else []
        places += [entry for place in places for entry in _entries(place)]
    else:
        places = [held[key] for held in (kwargs, *args) if isinstance(held, dict) and key in held]
    for place in places:
        if _is_images(place):
            image = next(index for index, leaf in enumerate(leaves) if leaf is place)
            batched = [i for i, leaf in enumerate(leaves) if _has_length(leaf, len(place))]
            return Probe(tuple(leaves), spec, image, tuple(batched))
    return None


def joined(probes: list[Probe]) -> Probe:
    """One probe of all images that have the first one's shape and arguments."""
    first = probes[0]
    same = [p for p in probes if p.spec == first.spec and p.image == first.image]
    same = [p for p in same if p.images.shape[1:] == first.images.shape[1:]]
    leaves = list(first.leaves)
    for index in first.batched:
        leaf, parts = first.leaves[index], [probe.leaves[index] for probe in same]
        if all(part.shape[1:] == leaf.shape[1:] for part in parts):
            leaves[index] = torch.cat([part.to(leaf.device) for part in parts])
    return replace(first, leaves=tuple(leaves))


def spread(count: int, size: int) -> list[int]:
    """At most so many evenly spaced indices below a count, the first always among them."""
    size = min(count, size)
    return [index * count // size for index in range(size)]


def _is_images(value: Any) -> bool:
    images = isinstance(value, Tensor) and value.ndim == 4 and value.is_floating_point()
    return images and len(value) > 0


def _has_length(value: Any, length: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == length


def _entries(place: Any) -> list[Any]:
    if isinstance(place, dict):
        return list(place.values())
    return list(place) if isinstance(place, list | tuple) else []


def _take(leaf: Any, rows: list[int] | None) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    if not rows:
        return leaf.detach().clone() if rows is None else leaf[:0].detach().clone()
    # slices, not an index tensor: that would be a copy to the device
    return torch.cat([leaf[row : row + 1].detach() for row in rows])
