"""What is projected down, as a user writes it: strongest units, a layer, a feature map, a unit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_deconv.engine.local import Layout

LAYER = "whole layer"
"""Name of the column that shows X' = C^T Y."""

UNIT = "deconvnet, unit"
"""Name of the column that shows single units."""


@dataclass(frozen=True)
class Shown:
    """Reconstructions of one layer, one on each of M pictures, on the CPU.

    Args:
        labels: The line above each row.
        images: [M, C, H, W].
        ours: [M, C, H, W], the reconstructions on the whole picture.
        boxes: int64 [M, 4], the part of each field that lies in the picture.
        activations: [M], of the unit, else the largest of what is kept.
        channels: Of each; None: the whole layer.
        name: Of our column.
        positions: int64 [M, 3], channel and position of each unit; None: `select` says what.
        select: What of the layer's output is kept, where it is no unit.
    """

    labels: Sequence[str]
    images: Tensor
    ours: Tensor
    boxes: Tensor
    activations: Tensor
    channels: Sequence[int | None]
    name: str
    positions: Tensor | None = None
    select: Callable[[Tensor], Tensor] | None = None

    @property
    def selector(self) -> Callable[[Tensor], Tensor]:
        """What Captum's neuron forms are asked for; a map by half its energy, whose gradient it is."""
        if self.positions is not None:
            from lit_deconv.compare import unit_selector  # brings Captum, which takes a second

            return unit_selector(self.positions)
        select = self.select or (lambda output: output)
        return lambda output: 0.5 * select(output).flatten(1).square().sum(1)

    @property
    def factor(self) -> Tensor:
        """[M], what Captum's result is multiplied with to start where ours does."""
        is_unit = self.positions is not None
        return self.activations if is_unit else torch.ones_like(self.activations)

    def part(self, rows: slice) -> Shown:
        """Some of them."""
        return Shown(
            self.labels[rows],
            self.images[rows],
            self.ours[rows],
            self.boxes[rows],
            self.activations[rows],
            self.channels[rows],
            self.name,
            None if self.positions is None else self.positions[rows],
            self.select,
        )


@dataclass(frozen=True)
class Seed:
    """What is projected down.

    Args:
        kind: "strongest", "layer", "map" or "unit".
        at: (channel,) of a map, (channel, row, column) of a unit, else empty.
    """

    kind: str
    at: tuple[int, ...] = ()

    @classmethod
    def of(cls, text: str) -> Seed:
        """What a user wrote.

        Raises:
            ValueError: None of the four.
        """
        if text in ("strongest", "layer"):
            return cls(text)
        parts = [part.strip() for part in text.split(",")]
        if len(parts) in (1, 3) and all(part.isdecimal() for part in parts):
            return cls("map" if len(parts) == 1 else "unit", tuple(map(int, parts)))
        raise ValueError(
            f"--seed {text!r}: expected strongest, layer, the number of a feature map (12), or a unit "
            "as channel,row,column (12,5,7)"
        )

    @property
    def column(self) -> str:
        """What figures call our column."""
        names = {"layer": LAYER, "map": f"feature map {self.at[0] if self.at else ''}"}
        return names.get(self.kind, UNIT)

    def check(self, layouts: Mapping[str, Layout]) -> None:
        """Whether it lies inside the layers.

        Raises:
            ValueError: It does not.
        """
        for name, layout in layouts.items():
            extents = (layout.channels, *layout.map_size)
            if len(self.at) == 3 and len(extents) != 3:
                raise ValueError(f"layer {name!r} gives {list(extents)}, no feature maps [C, H, W]")
            if any(at >= extent for at, extent in zip(self.at, extents, strict=False)):
                given = ",".join(map(str, self.at))
                raise ValueError(
                    f"--seed {given} lies outside layer {name!r}, which gives {list(extents)} "
                    "(channels, rows, columns)"
                )

    def reached(self, activations: Tensor) -> Tensor:
        """The largest activation that is kept, [N], of a layer's output [N, C, H, W]."""
        for at in self.at:
            activations = activations.select(1, at)
        return activations.reshape(len(activations), -1).amax(1).cpu()

    def select(self, output: Tensor) -> Tensor:
        """What is kept of a layer's output, for a layer or a map."""
        return output[:, self.at[0]] if self.at else output


def channels_of(text: str, layer: str, layout: Layout) -> list[int]:
    """The channels that `--channels` means for a layer.

    Args:
        text: "all"; a number, so many evenly spaced ones; or a list, "3,7" or "3," for one alone.
        layer: Name of the layer.
        layout: How many it has.

    Raises:
        ValueError: It cannot be.
    """
    count = layout.channels
    if text == "all":
        return list(range(count))
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() for part in parts):
        raise ValueError(
            f"--channels {text!r}: expected how many (16), which (3,7,12, or 3, for one), or all"
        )
    numbers = list(dict.fromkeys(map(int, parts)))
    if "," not in text:
        wanted = min(numbers[0], count)
        if not wanted:
            raise ValueError("--channels 0: expected at least one")
        return [index * count // wanted for index in range(wanted)]
    if max(numbers) >= count:
        raise ValueError(
            f"--channels {text}: layer {layer!r} has no channel {max(numbers)}; it has 0 to {count - 1}"
        )
    return numbers


def inside(boxes: Tensor, height: int, width: int) -> Tensor:
    """The part of each box [U, 4] that lies in the image."""
    return torch.minimum(boxes.clamp(min=0), boxes.new_tensor([height, width, height, width]))
