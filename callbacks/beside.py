"""Captum beside ours: the rows of the comparison, with agreement, or why there is none."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from captum.attr import NeuronAttribution  # type: ignore[import-untyped]
from torch import Tensor, nn

from lit_deconv.compare import agreement, attribution_class, captum_attribution, unit_selector
from lit_deconv.render import Panel, Row, shift_boxes

from .drawing import Reconstructed

__all__ = ["Beside", "Ours", "is_neuron"]

_HOOKED = ("Deconvolution", "NeuronDeconvolution", "GuidedBackprop", "NeuronGuidedBackprop")
"""Those that rely on Captum's hooks on `nn.ReLU`, and are wrong where these are."""


@dataclass(frozen=True)
class Ours:
    """What is ours in the comparison of one layer.

    Args:
        layer: The layer's module.
        units: The strongest unit of each compared image, reconstructed.
        whole: The whole layer's reconstruction [M, C, H, W], on the CPU; None: the units alone are
            compared, in their fields.
        faults: Why Captum's hooks are wrong between this layer and the image; empty where not.
    """

    layer: nn.Module
    units: Reconstructed
    whole: Tensor | None
    faults: tuple[str, ...] = ()


@dataclass
class Beside:
    """Sets Captum's attributions beside ours, layer by layer.

    Args:
        names: Captum's classes.
        model: What runs, as a function of the images alone.
        images: The compared images [M, C, H, W].
        classes: Predicted class of each image [M]; None: there are no class logits.
        no_class: Why there are none; empty where there are.
        faults: Why Captum's hooks are wrong somewhere between the logits and the image.
    """

    names: Sequence[str]
    model: nn.Module
    images: Tensor
    classes: Tensor | None
    no_class: str = ""
    faults: tuple[str, ...] = ()
    _of_class: dict[str, Tensor] = field(default_factory=dict)

    def rows(self, ours: Ours) -> tuple[list[Row], dict[str, float]]:
        """The rows for `render.side_by_side`, and the mean agreements by name."""
        images = self.images.cpu()
        height, width = images.shape[-2:]
        single = ours.units.whole(height, width)
        boxes = ours.units.inside(height, width).tolist()
        shown = shift_boxes(ours.units.boxes, height, width)
        scalars: dict[str, float] = {}
        columns = []
        for name in self.names:
            panels, numbers = self._column(name, ours, single, boxes)
            columns.append(panels)
            scalars.update(numbers)
        rows = []
        for index, image in enumerate(images):
            first = Panel("input", image, "outlined: field of the unit", True, boxes[index])
            compared = [column[index] for column in columns]
            if ours.whole is None:
                parts = [
                    Panel("image patch", image, is_photograph=True),
                    Panel("single unit", single[index]),
                    *compared,
                ]
                panels = [first, *(_cut(part, shown[index].tolist()) for part in parts)]
            else:
                panels = [
                    first,
                    Panel("whole layer", ours.whole[index]),
                    Panel("single unit", single[index], box=boxes[index]),
                    *compared,
                ]
            what = "strongest of" if ours.whole is None else f"probe image {index}: unit of"
            rows.append(Row(f"{what} {self._label(index, ours.units)}", panels))
        return rows, scalars

    def _label(self, index: int, units: Reconstructed) -> str:
        _, channel, row, column = units.units[index].tolist()
        predicted = "" if self.classes is None else f"; predicted class {int(self.classes[index])}"
        return (
            f"channel {channel} at row {row}, column {column}, "
            f"activation {float(units.values[index]):.3g}{predicted}"
        )

    def _column(
        self, name: str, ours: Ours, single: Tensor, boxes: Sequence[Sequence[int]]
    ) -> tuple[list[Panel], dict[str, float]]:
        title = f"Captum {name}" + (" x activation" if is_neuron(name) else "")
        if not is_neuron(name) and self.classes is None:
            return [Panel(title, None, self.no_class) for _ in boxes], {}
        pictures = self._pictures(name, ours)
        faults = ours.faults if is_neuron(name) else self.faults
        if name in _HOOKED and faults:
            note = f"no agreement: Captum is wrong here, {'; '.join(faults)}"
            return [Panel(title, picture, note) for picture in pictures], {}
        mine, against = single, "single unit"
        # outside the unit's field both are zero, which is no agreement
        fields: Sequence[Sequence[int | None]] = boxes
        if not is_neuron(name) and ours.whole is not None:
            mine, against = ours.whole, "whole layer"
            fields = [(0, 0, None, None)] * len(boxes)
        panels, numbers = [], []
        for index, picture in enumerate(pictures):
            top, left, bottom, right = fields[index]
            cut = (slice(None), slice(top, bottom), slice(left, right))
            agreed = agreement(mine[index][cut], picture[cut])
            numbers.append((agreed.cosine, agreed.rank))
            panels.append(Panel(title, picture, f"with the {against}: {agreed}"))
        cosine, rank = torch.tensor(numbers, dtype=torch.float64).nanmean(0).tolist()
        means = {f"cosine_{name}": cosine, f"rank_{name}": rank}
        return panels, {key: mean for key, mean in means.items() if math.isfinite(mean)}

    def _pictures(self, name: str, ours: Ours) -> Tensor:
        if is_neuron(name):
            selector = unit_selector(ours.units.units[:, 1:])
            pictures = captum_attribution(
                name, self.model, self.images, layer=ours.layer, selector=selector
            ).cpu()
            # its seed is 1, ours the activation
            return pictures * ours.units.values.to(pictures.dtype).view(-1, 1, 1, 1)
        if "layer" in inspect.signature(attribution_class(name).__init__).parameters:
            return captum_attribution(
                name, self.model, self.images, target=self._target(), layer=ours.layer
            ).cpu()
        if name not in self._of_class:
            self._of_class[name] = captum_attribution(
                name, self.model, self.images, target=self._target()
            ).cpu()
        return self._of_class[name]

    def _target(self) -> Tensor | None:
        return None if self.classes is None else self.classes.to(self.images.device)


def _cut(panel: Panel, box: Sequence[int]) -> Panel:
    if panel.image is None:
        return panel
    top, left, bottom, right = box
    return replace(panel, image=panel.image[:, top:bottom, left:right])


def is_neuron(name: str) -> bool:
    """Whether Captum's class of that name attributes a unit, not the model's output."""
    return issubclass(attribution_class(name), NeuronAttribution)
