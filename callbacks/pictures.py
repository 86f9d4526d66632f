"""All pictures of one validation: for each layer its figures, or why it has none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lit_deconv import Deconvnet
from lit_deconv.render import Evolution, Row, Strongest
from lit_deconv.top import Examples, LayerTop, TopActivations, tolerance

from .beside import Beside, Ours
from .blocks import Share, blocks, joined, joined_examples, on_cpu
from .drawing import ProbedModule, Reconstructed, feature_map, strongest_unit_of_each
from .health import Health, health, table
from .history import History
from .peers import PeerError
from .probe import Probe
from .stages import Stages
from .strongest import Collection

__all__ = ["OF_STRONGEST", "LayerPictures", "Wanted", "draw", "model_of", "reconstructed"]


OF_STRONGEST = ("grid", "evolution", "strongest_beside_captum")
"""Figures of the strongest units over all images."""


@dataclass(frozen=True)
class Wanted:
    """What is to be drawn.

    Args:
        figures: Names of figures, of those that `DeconvCallback` lists.
        compare: Captum's attributions, by class name.
        images: So many probe images are compared, and so many channels' strongest units.
        probe: So many of the kept images are the probe.
    """

    figures: frozenset[str]
    compare: Sequence[str]
    images: int
    probe: int


@dataclass
class LayerPictures:
    """What the figures of one layer take; every tensor is on the CPU.

    Args:
        layer: Its name.
        channels: For `render.figure2`.
        evolution: For `render.figure4`; empty outside `fit`.
        rows: For `render.side_by_side`; empty where nothing is compared.
        strongest_rows: The same for the strongest units of a few channels over all images.
        agreements: Means over the compared images, by name.
        health: How its channels fare; None where that is not known.
        table: The channels' numbers in Markdown.
        ranked: On how many images the strongest units were looked for.
        doubtful: How many units are left out, as their activation came out different.
        is_moved: Whether windows at the border were moved into the image.
        errors: Why something is missing.
        sources: Over which images figures 2 and 4 are, and which are compared, in words.
    """

    layer: str
    channels: Sequence[Strongest] = ()
    evolution: Sequence[Evolution] = ()
    rows: Sequence[Row] = ()
    strongest_rows: Sequence[Row] = ()
    agreements: Mapping[str, float] = field(default_factory=dict)
    health: Health | None = None
    table: str = ""
    ranked: int = 0
    doubtful: int = 0
    is_moved: bool = False
    errors: list[Exception] = field(default_factory=list)
    sources: tuple[str, str] = ("", "")


class _Ending(nn.Module):
    """A model whose output is a layer of its own, so that the way to it can be explained."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.output = model, nn.Identity()

    def forward(self, images: Tensor) -> object:
        """Calls the model."""
        return self.output(self.model(images))


class _Drawing:
    """One validation's pictures, layer by layer.

    Args:
        collection: The layers, and their strongest units.
        top: These units.
        probe: What is compared.
        wanted: What is to be drawn.
        reads_on: Name of the module that reads the output, which then is no logits; else empty.
        stages: Where seconds are counted.
    """

    def __init__(
        self,
        collection: Collection,
        top: TopActivations,
        probe: Probe,
        wanted: Wanted,
        reads_on: str,
        stages: Stages,
    ) -> None:
        self.collection, self.top, self.wanted = collection, top, wanted
        self.probe, self.reads_on, self.stages = probe, reads_on, stages
        self.model = model_of(collection.module, probe)
        self._beside: Beside | None = None
        self._faults: dict[str, tuple[str, ...]] = {}

    def strongest(
        self,
        pictures: LayerPictures,
        parts: Sequence[Share],
        history: History | None,
        epoch: int,
    ) -> None:
        """Figures 2 and 4."""
        name = pictures.layer
        top, found = self.top[name], joined([part.found for part in parts])
        pictures.doubtful = found.doubtful
        pictures.is_moved = bool((top.windows != top.boxes)[top.exists].any())
        pictures.channels = blocks(top, found) if "grid" in self.wanted.figures else ()
        if history is not None and "evolution" in self.wanted.figures:
            history.add(name, epoch, top, found)
            pictures.evolution = history.rows(name)

    def strongest_compared(self, pictures: LayerPictures, parts: Sequence[Share]) -> None:
        """A few channels' strongest units beside Captum."""
        if not self.wanted.compare or "strongest_beside_captum" not in self.wanted.figures:
            return
        examples = joined_examples([part.examples for part in parts])
        if examples is None:
            return  # no room for them, which the collection's summary says
        with self.stages.counted("captum"):
            self._strongest_rows(pictures, examples)

    def _strongest_rows(self, pictures: LayerPictures, examples: Examples) -> None:
        name, plain = pictures.layer, self.probe.is_plain
        layer, top = self.collection.layers[name], self.top[name]
        device = self.probe.images.device
        images = examples.images.to(self.probe.images)
        count = torch.arange(len(images), device=device)
        where = [examples.channels.to(device), *examples.positions.to(device).unbind(1)]
        units = torch.stack([count, *where], 1)
        beside = self._new_beside(self.probe.with_images(images))
        net = self.collection.nets[name] if plain else Deconvnet(beside.model, layer)
        activations = feature_map(net.activations(beside.images))
        found = Reconstructed.of(net, beside.images, activations, units, plain)
        recorded = examples.values.double()
        allowed = tolerance(top.recorded)
        room = allowed * recorded.abs() + 1e-2 * allowed * float(top.largest.abs().max())
        # weights may have changed since, or other arguments of the module matter
        off = ((found.values - recorded).abs() > room).tolist()
        ours = Ours(layer, found, None, self._faults_of(name, net, beside.images))
        rows, _ = beside.rows(ours)
        pictures.strongest_rows = [row for row, is_off in zip(rows, off, strict=True) if not is_off]

    def _new_beside(self, compared: Probe) -> Beside:
        model, compare = model_of(self.collection.module, compared), self.wanted.compare
        with torch.no_grad():
            output = model(compared.images)
        no_class = _why_no_class(output, len(compared), self.reads_on)
        if no_class:
            return Beside(compare, model, compared.images, None, no_class)
        ending = Deconvnet(_Ending(model), "output")
        faults = self._faults_of("", ending, compared.images)
        return Beside(compare, model, compared.images, output.argmax(1).cpu(), faults=faults)

    def _faults_of(self, layer: str, net: Deconvnet, images: Tensor) -> tuple[str, ...]:
        """Why Captum is wrong up to a layer, or up to the logits: of the model, not of the images."""
        if layer not in self._faults:
            # one image is enough, where the others' arguments allow it
            few = images[:1] if self.probe.is_plain else images
            self._faults[layer] = net.explain(few).captum_faults
        return self._faults[layer]

    def compared(self, pictures: LayerPictures) -> None:
        """Side by side with Captum, and how the channels fare."""
        wants_rows = bool(self.wanted.compare) and "beside_captum" in self.wanted.figures
        wants_health = bool(self.wanted.figures & {"channels", "numbers"})
        if not (wants_rows or wants_health):
            return
        name, plain = pictures.layer, self.probe.is_plain
        layer = self.collection.layers[name]
        with self.stages.counted("probe"):
            net = self.collection.nets[name] if plain else Deconvnet(self.model, layer)
            activations = feature_map(net.activations(self.probe.images))
            if wants_health and name in self.top:
                self._health(pictures, self.top[name], activations)
        if wants_rows:
            with self.stages.counted("captum"):
                self._rows(pictures, net, activations)

    def _health(self, pictures: LayerPictures, top: LayerTop, activations: Tensor) -> None:
        pictures.health = health(top, activations)
        if "channels" in self.wanted.figures:
            pictures.table = table(top, pictures.health)

    def _rows(self, pictures: LayerPictures, net: Deconvnet, activations: Tensor) -> None:
        name, plain = pictures.layer, self.probe.is_plain
        layer = self.collection.layers[name]
        if self._beside is None:
            compared = self.probe.take(list(range(min(self.wanted.images, len(self.probe)))))
            self._beside = self._new_beside(compared)
        beside = self._beside
        channels = torch.tensor(self.collection.channels[name], device=activations.device)
        units = strongest_unit_of_each(activations[: len(beside.images)], channels)
        net_beside = net if plain else Deconvnet(beside.model, layer)
        ours = Ours(
            layer,
            # arguments that belong to single images take the probe as a whole
            Reconstructed.of(
                net, beside.images if plain else self.probe.images, activations, units, plain
            ),
            net_beside.attribute(beside.images).cpu(),
            self._faults_of(name, net_beside, beside.images),
        )
        pictures.rows, pictures.agreements = beside.rows(ours)


def reconstructed(
    collection: Collection, top: TopActivations, stages: Stages
) -> dict[str, Share | str]:
    """What this process holds of the layers' strongest units, in pixels; or why it has none.

    For use inside `isolated`.
    """
    found: dict[str, Share | str] = {}
    with stages.counted("reconstruct"):
        for name in top:
            try:
                found[name] = on_cpu(collection.reconstruct(top, name), top[name].examples)
            except (
                Exception
            ) as error:  # one layer's failure is told, and costs no other its pictures
                found[name] = f"{type(error).__name__}: {error}"
                collection.failed[name] = error
    return found


def draw(
    collection: Collection,
    top: TopActivations,
    everyone: Sequence[Mapping[str, Share | str]],
    probe: Probe,
    wanted: Wanted,
    reads_on: str,
    history: History | None,
    epoch: int,
    stages: Stages,
) -> Iterator[LayerPictures]:
    """Draw layer by layer; one that fails does not keep the others from being drawn.

    For use inside `isolated`.

    Args:
        collection: The chosen layers.
        top: Their strongest units.
        everyone: What each process holds of them, in pixels; empty where that is not wanted.
        probe: The probe images.
        wanted: What is to be drawn.
        reads_on: Name of the module that reads the output, which then is no logits; else empty.
        history: What the layers' strongest units were before; None: that is not drawn.
        epoch: Epoch of the weights.
        stages: Where seconds are counted.
    """
    drawing = _Drawing(collection, top, probe, wanted, reads_on, stages)
    for name in collection.layers:
        pictures = LayerPictures(name)
        if name in collection.failed:
            pictures.errors.append(collection.failed[name])
        else:
            pictures.ranked = top[name].images
            try:
                if parts := _shares([each[name] for each in everyone]):
                    drawing.strongest(pictures, parts, history, epoch)
                    drawing.strongest_compared(pictures, parts)
            except Exception as error:
                pictures.errors.append(error)
        if name in collection.nets:
            try:
                drawing.compared(pictures)
            except Exception as error:
                pictures.errors.append(error)
        yield pictures


def _shares(parts: Sequence[Share | str]) -> list[Share]:
    failed = [part for part in parts if isinstance(part, str)]
    if failed:
        raise PeerError(f"in another process: {failed[0]}")
    return [part for part in parts if isinstance(part, Share)]


def model_of(module: nn.Module, probe: Probe) -> nn.Module:
    """The module as a function of images alone."""
    return module if probe.is_plain else ProbedModule(module, probe)


def _why_no_class(output: object, images: int, reads_on: str) -> str:
    if reads_on:
        return f"no class comparison: the output is no logits, {reads_on} reads it"
    if not isinstance(output, Tensor):
        return f"no class comparison: the model gives a {type(output).__name__}, no logits"
    if output.ndim != 2 or len(output) != images or output.shape[1] < 2:
        return f"no class comparison: the model gives {list(output.shape)}, no logits [N, classes]"
    return ""
