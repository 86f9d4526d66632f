"""Where pictures go: one PNG encoding, and a sink for each kind of logger.

Loggers are known by the names of their classes, so that nothing here imports a logger's package.
"""

from __future__ import annotations

import inspect
import io
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from torch import Tensor

from lit_deconv.render.pixels import to_pil


def encode_png(image: Tensor) -> bytes:
    """Encodes uint8 [3, H, W] as PNG at level 1: faster than the usual 6, little larger."""
    buffer = io.BytesIO()
    to_pil(image).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


@dataclass(frozen=True)
class Picture:
    """An encoded picture on its way to the loggers.

    Args:
        tag: Such as "deconv/features.3/grid"; TensorBoard groups cards by its first segment.
        png: The encoded bytes.
        height: H in pixels.
        width: W in pixels.
        step: The step Lightning gives the scalars of the same moment.
        caption: Shown by loggers that know captions.
    """

    tag: str
    png: bytes
    height: int
    width: int
    step: int
    caption: str = ""

    def to_pil(self) -> Image.Image:
        """The picture decoded, for loggers that encode by themselves."""
        return Image.open(io.BytesIO(self.png))


class Sink(Protocol):
    """Writes to one logger. All calls come from one thread at a time."""

    def image(self, picture: Picture) -> None:
        """Writes a picture."""

    def text(self, tag: str, markdown: str, step: int) -> None:
        """Writes Markdown, such as a table."""

    def flush(self) -> None:
        """Brings what was written to where it is read."""


SinkFactory = Callable[[Any], Sink]

_REGISTRY: list[tuple[str, SinkFactory]] = []


def sink(*names: str) -> Callable[[SinkFactory], SinkFactory]:
    """Registers what writes to a logger's class and its subclasses; the latest registered wins.

    Args:
        names: Public names of logger classes, such as "lightning.pytorch.loggers.WandbLogger". The
            module may be any package above the class, and `pytorch_lightning` is the same as
            `lightning.pytorch`.

    Returns:
        A decorator for a class or function that takes the logger and gives a :class:`Sink`.

    Examples:
        >>> @sink("mylab.loggers.MyLogger")
        ... class MySink(FileSink):
        ...     def __init__(self, logger):
        ...         super().__init__(logger.folder)
    """

    def register(factory: SinkFactory) -> SinkFactory:
        _REGISTRY[:0] = [(_canonical(name), factory) for name in names]
        return factory

    return register


def sink_for(logger: object) -> Sink | None:
    """The sink for a logger, found by its class and then its bases; None: it takes no images."""
    for cls in type(logger).__mro__:
        path = _canonical(f"{cls.__module__}.{cls.__qualname__}")
        for registered, factory in _REGISTRY:
            package, _, name = registered.rpartition(".")
            if path.startswith(f"{package}.") and path.endswith(f".{name}"):
                return factory(logger)
    return None


def sinks_for(loggers: Sequence[object], folder: str | Path) -> tuple[list[Sink], str]:
    """A sink for each logger that takes images, else files.

    Args:
        loggers: Such as `trainer.loggers`; may be empty.
        folder: Where PNG files go when none of them takes images.

    Returns:
        The sinks, and a sentence for the user where there is something to say, else "".
    """
    found = [each for each in map(sink_for, loggers) if each is not None]
    if found:
        return found, ""
    names = ", ".join(type(logger).__name__ for logger in loggers)
    why = f"{names} takes no images" if names else "the trainer has no logger"
    return [FileSink(folder)], f"Pictures go to {folder} as PNG files: {why}."


def _canonical(name: str) -> str:
    """One spelling for the two package names that Lightning is published under."""
    name = re.sub(r"^pytorch_lightning(?=\.|$)", "lightning.pytorch", name)
    return re.sub(r"^lightning_fabric(?=\.|$)", "lightning.fabric", name)


def _real(make: Callable[[Any, Any], Sink]) -> SinkFactory:
    """A sink for loggers whose `.experiment` is a dummy off rank zero, where images are dropped."""

    def build(logger: Any) -> Sink:
        experiment = logger.experiment
        dummy = sink_for(experiment)
        return dummy if dummy is not None else make(logger, experiment)

    return build


class FileSink:
    """Writes `folder/tag/step.png` and `folder/tag/step.md`."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def image(self, picture: Picture) -> None:
        """Writes the PNG as it is."""
        self._path(picture.tag, picture.step, "png").write_bytes(picture.png)

    def text(self, tag: str, markdown: str, step: int) -> None:
        """Writes the Markdown as it is."""
        self._path(tag, step, "md").write_text(markdown, encoding="utf-8")

    def flush(self) -> None:
        """Files are whole once written."""

    def _path(self, tag: str, step: int, suffix: str) -> Path:
        # a layer's name may hold anything; no part of a tag may leave the folder
        parts = [re.sub(r"[^\w.\-]+", "_", part) for part in tag.split("/")]
        folder = self.folder.joinpath(*(part for part in parts if part.strip(".")))
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{step:08d}.{suffix}"


@sink(
    "lightning.pytorch.loggers.logger.DummyLogger",
    "lightning.fabric.loggers.logger._DummyExperiment",
)
class NullSink:
    """Drops everything: a logger that logs nothing, as in `fast_dev_run` and off rank zero."""

    def __init__(self, logger: object = None) -> None:
        pass

    def image(self, picture: Picture) -> None:
        """Drops it."""

    def text(self, tag: str, markdown: str, step: int) -> None:
        """Drops it."""

    def flush(self) -> None:
        """Has nothing to bring."""


class TensorBoardSink:
    """Writes to a `SummaryWriter`: the encoded bytes as they are, the caption as description."""

    def __init__(self, experiment: Any) -> None:
        self.experiment = experiment

    def image(self, picture: Picture) -> None:
        """Writes an Image summary."""
        from tensorboard.compat.proto.summary_pb2 import (
            Summary,
            SummaryMetadata,
        )

        image = Summary.Image(
            height=picture.height,
            width=picture.width,
            colorspace=3,
            encoded_image_string=picture.png,
        )
        # without a plugin's name TensorBoard's readers warn of each tag
        plugin = SummaryMetadata.PluginData(plugin_name="images")
        about = SummaryMetadata(summary_description=picture.caption, plugin_data=plugin)
        value = Summary.Value(tag=picture.tag, image=image, metadata=about)
        # the public add_image would decode and encode again
        self.experiment._get_file_writer().add_summary(Summary(value=[value]), picture.step)

    def text(self, tag: str, markdown: str, step: int) -> None:
        """Writes to the text tab, which renders Markdown tables."""
        self.experiment.add_text(tag, markdown, step)

    def flush(self) -> None:
        """Brings the event file up to date."""
        self.experiment.flush()


class WandbSink:
    """Writes through `WandbLogger`, which keeps its own step."""

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def image(self, picture: Picture) -> None:
        """Logs a one-image panel under the tag."""
        self.logger.log_image(
            picture.tag, [picture.to_pil()], step=picture.step, caption=[picture.caption]
        )

    def text(self, tag: str, markdown: str, step: int) -> None:
        """Logs a table of one cell."""
        self.logger.log_text(tag, columns=["markdown"], data=[[markdown]], step=step)

    def flush(self) -> None:
        """W&B sends by itself."""


class MLFlowSink:
    """Writes artifacts of the run; MLflow shows those with a key and a step as a slider."""

    def __init__(self, logger: Any, experiment: Any) -> None:
        self.client, self.run = experiment, logger.run_id

    def image(self, picture: Picture) -> None:
        """Logs the image under the tag as key; before MLflow 2.13, as a file."""
        if "key" in inspect.signature(self.client.log_image).parameters:
            self.client.log_image(
                self.run, picture.to_pil(), key=picture.tag, step=picture.step, synchronous=True
            )
            return
        with tempfile.TemporaryDirectory() as folder:
            FileSink(folder).image(picture)
            self.client.log_artifacts(self.run, folder)

    def text(self, tag: str, markdown: str, step: int) -> None:
        """Logs a Markdown file."""
        self.client.log_text(self.run, markdown, f"{tag}/{step:08d}.md")

    def flush(self) -> None:
        """Artifacts are whole once logged."""


class CometSink:
    """Writes to a Comet experiment, offline or not."""

    def __init__(self, experiment: Any) -> None:
        self.experiment = experiment

    def image(self, picture: Picture) -> None:
        """Logs the image under the tag."""
        self.experiment.log_image(picture.to_pil(), name=picture.tag, step=picture.step)

    def text(self, tag: str, markdown: str, step: int) -> None:
        """Logs the Markdown with its tag as metadata."""
        self.experiment.log_text(markdown, step=step, metadata={"tag": tag})

    def flush(self) -> None:
        """Comet sends by itself."""


sink(
    "lightning.pytorch.loggers.TensorBoardLogger",
    "lightning.fabric.loggers.TensorBoardLogger",
)(_real(lambda logger, experiment: TensorBoardSink(experiment)))
sink("lightning.pytorch.loggers.WandbLogger")(_real(lambda logger, experiment: WandbSink(logger)))
sink("lightning.pytorch.loggers.MLFlowLogger")(_real(MLFlowSink))
sink("lightning.pytorch.loggers.CometLogger")(
    _real(lambda logger, experiment: CometSink(experiment))
)
