"""One validation after another on one model: what is watched, drawn, hung and counted."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lit_deconv.layers import named_layers
from lit_deconv.top import TopActivations
from lit_deconv.writer import Failure

from .blocks import Share
from .failures import EVERY_LAYER, OWN_PROBE, SOME_IMAGES, Failures
from .gallery import Gallery
from .history import History
from .isolation import isolated
from .order import Given
from .peers import PeerError, Peers
from .pictures import OF_STRONGEST, LayerPictures, Wanted, draw, model_of, reconstructed
from .probe import Probe, spread
from .stages import Stages
from .strongest import NOTHING, Collection
from .watch import Watch

__all__ = ["Moment", "Session"]


class Moment:
    """When and of which weights a picture is.

    Args:
        epoch: Epoch of the weights.
        step: The step that Lightning gives the scalars of this validation.
        note: What titles must say of the weights; may be empty.
        fitting: Whether this is an epoch of a run that trains.
    """

    def __init__(self, epoch: int, step: int, note: str = "", fitting: bool = True) -> None:
        self.epoch, self.step, self.note, self.fitting = epoch, step, note, fitting


class Session:
    """Draws validations of one model, with one probe all the while.

    Args:
        model: The LightningModule.
        watch: Finds out what runs, and keeps the probe.
        images: The user's own probe images; None: those that the watch keeps.
        source: Where probe images come from, for titles: "validation".
        wanted: What is to be drawn.
        tag: First part of the names in the log.
        history: The layers' strongest units in earlier epochs.
        failures: Where failures go.
        gallery: Opens the gallery, or gives the open one.
        peers: The processes of the run; the first one draws.
    """

    def __init__(
        self,
        model: nn.Module,
        watch: Watch,
        images: Tensor | None,
        source: str,
        wanted: Wanted,
        tag: str,
        history: History,
        failures: Failures,
        gallery: Callable[[], Gallery],
        peers: Peers | None = None,
    ) -> None:
        self.model = model
        self.watch = watch
        self.images = images
        self.source = source
        self.wanted = wanted
        self.tag = tag
        self.history = history
        self.peers = peers or Peers()
        self.failures = failures
        self.gallery = gallery
        self.drawn = False
        self.scalars: dict[str, float] = {}
        """Of the last drawing, by full name."""
        self.stages = Stages()
        """Of the last validation."""
        self._seconds = 0.0
        self._failed = False

    def begin(self, batches: float) -> None:
        """A validation of so many batches begins; infinity: nobody knows how many."""
        self.drawn, self.scalars, self._seconds, self.stages = False, {}, 0.0, Stages()
        self._failed = False
        with self._work():
            self.watch.begin(batches)

    def before(self, batch_idx: int, dataloader_idx: int = 0, given: Given | None = None) -> None:
        """A batch begins; of what a loader gave more may be known."""
        with self._work(self._lost):
            self.watch.before(batch_idx, dataloader_idx, given)

    def after(
        self, step: Callable[..., Any], batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """A batch ended."""
        with self._work(self._lost):
            self.watch.after(step, batch, batch_idx, dataloader_idx)

    def draw(self, moment: Moment) -> None:
        """Draws every layer; what fails is left out."""
        self.drawn = True
        collection = self.watch.collection
        # a process without a batch has nothing to say; None is said by one that failed
        share = None if self._failed and collection is None else NOTHING
        with self._work():
            if collection is not None and (kept := self._kept()) is not None:
                if not self.watch.ranks:
                    # while batches ran nothing could be seen, or what was seen is of other weights
                    collection.begin()
                    with self.stages.counted("collect"), isolated(self.model):
                        collection.run(kept)
                share = None  # should the next fail
                share = collection.share()
        # every process comes by here, whatever happened to it, and learns whether all can go on
        shares = self.peers.all(share)
        if None in shares:
            if share is not None:
                self.failures.add(EVERY_LAYER, PeerError("another process failed"))
            return
        if collection is None:
            self.peers.at_zero({})
            if self.peers.rank == 0 and any(each["states"] for each in shares if each):
                self.failures.add(EVERY_LAYER, PeerError("the first process saw no batch"))
            return
        top: TopActivations | None = None
        found: dict[str, Share | str] = {}
        with self._work(), self.stages.counted("collect"):
            collection.merge(shares)
            top = collection.compute()
        if top is not None and self.wanted.figures & set(OF_STRONGEST):
            with self._work(), isolated(self.model):
                found = reconstructed(collection, top, self.stages)
        everyone = self.peers.at_zero(found)
        with self._work():
            if top is not None and self.peers.rank == 0 and (kept := self._kept()) is not None:
                with isolated(self.model):
                    self._draw(kept, collection, top, [each for each in everyone if each], moment)
            elif top is not None:
                for name, error in collection.failed.items():
                    self.failures.add(name, error)
        self.stages.add("collect", collection.seconds)
        self.scalars[f"{self.tag}/seconds"] = self._seconds

    def _draw(
        self,
        kept: Probe,
        collection: Collection,
        top: TopActivations,
        everyone: Sequence[Mapping[str, Share | str]],
        moment: Moment,
    ) -> None:
        watch = self.watch
        # no more than one validation's pictures wait, so that they take no more memory than that
        self._late(self.gallery().finish())
        probe = self._probe(kept)
        history = self.history if moment.fitting else None
        for pictures in draw(
            collection,
            top,
            everyone,
            probe,
            self.wanted,
            watch.reads_on,
            history,
            moment.epoch,
            self.stages,
        ):
            for error in pictures.errors:
                self.failures.add(pictures.layer, error)
            with self.failures.noted(pictures.layer):
                self._count(pictures)
                pictures.sources = self._sources(pictures, probe)
                note = self._note(pictures, moment)
                self._late(self.gallery().hang(pictures, self.tag, moment.step, moment.epoch, note))
        self._draw_filters(probe.images.shape[1], moment)

    def _draw_filters(self, inputs: int, moment: Moment) -> None:
        if "filters" not in self.wanted.figures:
            return
        found = first_filters(self.watch.module, named_layers(self.model), inputs)
        if found is not None:
            name, weight = found
            with self.failures.noted(name):
                self._late(
                    self.gallery().hang_filters(
                        name, weight, self.tag, moment.step, moment.epoch, moment.note
                    )
                )

    def _late(self, failures: Sequence[Failure]) -> None:
        for failure in failures:
            self.failures.add(failure.tag, failure.error)

    def _count(self, pictures: LayerPictures) -> None:
        name = f"{self.tag}/{pictures.layer}"
        if "numbers" not in self.wanted.figures:
            return
        for number, value in pictures.agreements.items():
            self.scalars[f"{name}/{number}"] = value
        if pictures.health is not None:
            for number, value in pictures.health.scalars().items():
                # of a compiled model, or without a validation, a few images alone are seen
                few = "_on_probe" if number == "never_fires" and not self.watch.ranks else ""
                self.scalars[f"{name}/{number}{few}"] = value

    def _note(self, pictures: LayerPictures, moment: Moment) -> str:
        compiled = "The compiled model's Python code was run for them." if self.compiled else ""
        return " ".join(filter(None, [compiled, moment.note, _doubt(pictures.doubtful)]))

    def _sources(self, pictures: LayerPictures, probe: Probe) -> tuple[str, str]:
        own = "images given as probe=" if self.images is not None else f"{self.source} images"
        few = "" if self.watch.ranks else " kept"
        over = f"Strongest over {pictures.ranked}{few} {self.source} images."
        if pictures.is_moved:
            over += " Windows that reach past the image are moved into it."
        return over, f"The same {len(probe)} {own} all run long."

    def _kept(self) -> Probe | None:
        """The images that the watch keeps, where the model is now."""
        kept = self.watch.probe
        device = next((parameter.device for parameter in self.model.parameters()), None)
        return kept if kept is None or device is None else kept.to(device)

    def _probe(self, kept: Probe) -> Probe:
        if self.images is not None:
            with self.failures.noted(OWN_PROBE):
                return self._own(self.images, kept)
            self.images = None  # those that the watch keeps take their place
        return kept.take(spread(len(kept), self.wanted.probe))

    def _own(self, images: Tensor, kept: Probe) -> Probe:
        probe = kept.with_images(images.to(kept.images))
        given, expected = (list(each.shape[1:]) for each in (images, kept.images))
        if given != expected and self.watch.collection is not None:
            try:
                with torch.no_grad():
                    model_of(self.watch.collection.module, probe)(probe.images)
            except Exception as error:
                raise ValueError(
                    f"they are {given} and the model, which is given {expected} in {self.source}, "
                    f"does not take them ({type(error).__name__}: {error}); give images of that size"
                ) from error
        return probe

    @property
    def _lost(self) -> str:
        """What there is no picture of when a batch fails."""
        return EVERY_LAYER if self.watch.collection is None else SOME_IMAGES

    @property
    def compiled(self) -> bool:
        """Whether the model runs as a compiled graph."""
        return self.watch.compiled

    @contextmanager
    def _work(self, what: str = EVERY_LAYER) -> Any:
        start = time.perf_counter()
        try:
            yield
        except Exception as error:
            self._failed = True
            self.failures.add(what, error)
        finally:
            self._seconds += time.perf_counter() - start


def first_filters(
    module: nn.Module, layers: Mapping[str, nn.Module], inputs: int
) -> tuple[str, Tensor] | None:
    """The first convolution that takes the images, and a copy of its filters [F, C, h, w].

    Args:
        module: The module that runs on the images.
        layers: All modules by name.
        inputs: How many channels the images have.
    """
    held = set(module.modules())
    for name, each in layers.items():
        if each in held and isinstance(each, nn.Conv2d) and each.in_channels == inputs:
            return name, each.weight.detach().float().cpu().clone()
    return None


def _doubt(units: int) -> str:
    if not units:
        return ""
    return (
        f"Not what validation saw: {units} units came out with other activations and are left out; "
        "weights or images have changed, or units see more than their receptive field."
    )
