"""Captum's attributions beside ours: one row for each reconstruction, agreement or why there is none."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from captum.attr import NeuronAttribution  # type: ignore[import-untyped]
from torch import Tensor, nn

from lit_deconv.attr import Deconvnet
from lit_deconv.commands.seeds import LAYER, Shown
from lit_deconv.compare import agreement, attribution_class, captum_attribution
from lit_deconv.render import Panel, Row

HOOKED = ("Deconvolution", "NeuronDeconvolution", "GuidedBackprop", "NeuronGuidedBackprop")
"""Those that rely on Captum's hooks on `nn.ReLU`, and are wrong where these are."""


@dataclass
class Beside:
    """Sets Captum's attributions beside ours.

    Args:
        names: Captum's classes.
        model: Takes images.
        device: Where it is.
        options: Arguments for a class, by its name.
        at_once: Pictures that go through the model together.
    """

    names: Sequence[str]
    model: nn.Module
    device: torch.device
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    at_once: int = 8

    def rows(self, net: Deconvnet, layer: str, shown: Shown) -> list[Row]:
        """The rows for `render.side_by_side`."""
        chunks = [
            self._rows(net, layer, shown.part(slice(start, start + self.at_once)))
            for start in range(0, len(shown.images), self.at_once)
        ]
        return [row for rows in chunks for row in rows]

    def _rows(self, net: Deconvnet, layer: str, shown: Shown) -> list[Row]:
        boxes = shown.boxes.tolist()
        height, width = shown.images.shape[2:]
        whole = [0, 0, height, width]
        outlined = [None if box == whole else box for box in boxes]
        columns = [
            [
                Panel("input", image, "outlined: field of the unit" if box else "", True, box)
                for image, box in zip(shown.images, outlined, strict=True)
            ],
            [
                Panel(shown.name, image, box=box)
                for image, box in zip(shown.ours, outlined, strict=True)
            ],
        ]
        images = shown.images.to(self.device)
        layer_map = shown.ours
        if shown.name != LAYER and any(not is_neuron(name) for name in self.names):
            layer_map = net.attribute(images)[layer].cpu()
            columns.append([Panel(LAYER, image) for image in layer_map])
        classes, no_class = self._classes(images)
        for name in self.names:
            against = shown.ours if is_neuron(name) else layer_map
            try:
                columns.append(
                    self._column(name, net, layer, shown, images, against, classes, no_class)
                )
            except Exception as error:  # one method that fails does not keep the others out
                why = " ".join(f"{name} failed: {type(error).__name__}: {error}".split())
                print(why, file=sys.stderr)
                columns.append([Panel(self._title(name, shown), None, why[:200]) for _ in boxes])
        return [
            Row(label, list(panels))
            for label, panels in zip(shown.labels, zip(*columns, strict=True), strict=True)
        ]

    def _column(
        self,
        name: str,
        net: Deconvnet,
        layer: str,
        shown: Shown,
        images: Tensor,
        against: Tensor,
        classes: Tensor | None,
        no_class: str,
    ) -> list[Panel]:
        title = self._title(name, shown)
        neuron = is_neuron(name)
        if not neuron and classes is None:
            return [Panel(title, None, no_class) for _ in images]
        asked: dict[str, Any] = {"selector": shown.selector} if neuron else {"target": classes}
        if neuron or "layer" in inspect.signature(attribution_class(name).__init__).parameters:
            asked["layer"] = net.layers[layer]
        found = captum_attribution(
            name, self.model, images, **asked, **self.options.get(name, {})
        ).cpu()
        if neuron:
            found = found * shown.factor.to(found.dtype).view(-1, 1, 1, 1)
        faults = self._faults(net, layer, images, neuron) if name in HOOKED else ()
        if faults:
            more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
            note = f"no agreement: Captum is not the deconvnet here, {faults[0]}{more}"
            return [Panel(title, picture, note) for picture in found]
        panels = []
        column = "unit" if neuron else LAYER
        for index, (picture, box) in enumerate(zip(found, shown.boxes.tolist(), strict=True)):
            # outside the unit's field both are zero, which is no agreement
            top, left, bottom, right = box if neuron else (0, 0, *picture.shape[1:])
            cut = (slice(None), slice(top, bottom), slice(left, right))
            agreed = agreement(against[index][cut], picture[cut])
            of = f"class {int(classes[index])}; " if not neuron and classes is not None else ""
            panels.append(Panel(title, picture, f"{of}with the {column}: {agreed}"))
        return panels

    def _title(self, name: str, shown: Shown) -> str:
        times = " x activation" if is_neuron(name) and shown.positions is not None else ""
        return f"Captum {name}{times}"

    def _classes(self, images: Tensor) -> tuple[Tensor | None, str]:
        if all(is_neuron(name) for name in self.names):
            return None, ""
        with torch.no_grad():
            output = self.model(images)
        if not isinstance(output, Tensor):
            return None, f"no class: the model gives a {type(output).__name__}, no logits"
        if output.ndim != 2 or len(output) != len(images) or output.shape[1] < 2:
            return None, f"no class: the model gives {list(output.shape)}, no logits [N, classes]"
        return output.argmax(1), ""

    def _faults(self, net: Deconvnet, layer: str, images: Tensor, neuron: bool) -> tuple[str, ...]:
        if neuron:
            return net.explain(images[:1])[layer].captum_faults
        return Deconvnet(_Ending(self.model), "output").explain(images[:1]).captum_faults


class _Ending(nn.Module):
    """A model whose output is a layer of its own, so that the way to it can be explained."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.output = model, nn.Identity()

    def forward(self, images: Tensor) -> object:
        """Calls the model."""
        return self.output(self.model(images))


def is_neuron(name: str) -> bool:
    """Whether Captum's class of that name attributes a unit, not the model's output."""
    return issubclass(attribution_class(name), NeuronAttribution)
