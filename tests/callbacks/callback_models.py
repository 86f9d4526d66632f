"""Tiny LightningModules, loaders and readers that the tests of the callback share."""

from __future__ import annotations

import io
import os
import random
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lit_deconv.callbacks import DeconvCallback
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

EPOCHS = 2
BATCHES = 2


def small(**options: Any) -> DeconvCallback:
    """As few pictures as there can be."""
    given: dict[str, Any] = {"channels": 2, "probe": 2, "compare_images": 1, "on_error": "raise"}
    return DeconvCallback(**(given | options))


def tiny_net(channels: int = 3, classes: int = 3, norm: bool = False, p: float = 0.0) -> nn.Module:
    """Two convolutions on 8 x 8 images; layers "1" or "2" and so on are its rectifiers."""
    first: list[nn.Module] = [nn.Conv2d(channels, 4, 3, padding=1)]
    if norm:
        first.append(nn.BatchNorm2d(4))
    return nn.Sequential(
        *first,
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 5, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(p),
        nn.Linear(20, classes),
    )


class LitNet(pl.LightningModule):
    """Calls `self(x)`."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net: Any = net if net is not None else tiny_net()

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def loss(self, batch: Any) -> Tensor:
        images, labels = batch
        return functional.cross_entropy(self(images), labels)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            [p for p in self.parameters() if p.requires_grad], lr=0.1, momentum=0.9
        )


def images_and_labels(count: int = 8, channels: int = 3, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(count, channels, size, size, generator=generator)
    return images, torch.arange(count) % 3


def loader(count: int = 8, channels: int = 3, batch: int = 4, **kwargs: Any) -> DataLoader:
    return DataLoader(TensorDataset(*images_and_labels(count, channels)), batch, **kwargs)


def trainer(folder: Path, *callbacks: pl.Callback, **kwargs: Any) -> pl.Trainer:
    given: dict[str, Any] = {
        "max_epochs": EPOCHS,
        "accelerator": "gpu" if "cuda" in os.environ.get("LIT_DECONV_TEST_DEVICE", "") else "cpu",
        "devices": 1,
        "logger": TensorBoardLogger(folder, name="log", version=0),
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": folder,
        "callbacks": list(callbacks),
    }
    return pl.Trainer(**(given | kwargs))


def seeded() -> None:
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)


def random_states() -> list[Any]:
    numbers: Any = np.random.get_state()
    return [random.getstate(), numbers[1].tolist(), torch.get_rng_state().tolist()]


def recorded(run: Callable[[], Any]) -> tuple[Any, set[str]]:
    """What a function returns, and the texts of the warnings that it gave."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = run()
    return result, {str(warning.message) for warning in caught}


def logged(folder: Path) -> EventAccumulator:
    """The event files under a folder, read with TensorBoard's own reader."""
    (path,) = {file.parent for file in folder.rglob("events.out.tfevents*")}
    events = EventAccumulator(str(path), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    return events


def pictures(folder: Path) -> dict[str, dict[int, Image.Image]]:
    """Decoded pictures by tag and step."""
    events = logged(folder)
    found: dict[str, dict[int, Image.Image]] = {}
    for tag in events.Tags()["images"]:
        for event in events.Images(tag):
            picture = Image.open(io.BytesIO(event.encoded_image_string))
            picture.load()
            found.setdefault(tag, {})[event.step] = picture
    return found


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Scalars by tag and step."""
    events = logged(folder)
    return {
        tag: {event.step: event.value for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
    }


def expected_tags(
    *layers: str, tag: str = "deconv", first: str = "net.0", fitting: bool = True
) -> set[str]:
    """Names of all pictures by default: of the layers, and of the first layer's filters."""
    kinds = (
        "grid",
        "strongest_beside_captum",
        "beside_captum",
        *(["evolution"] if fitting else []),
    )
    return {f"{tag}/{layer}/{kind}" for layer in layers for kind in kinds} | {
        f"{tag}/{first}/filters"
    }


def equal(a: Any, b: Any) -> bool:
    """Whether two nests of tensors and others are equal to the bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def compiled(module: nn.Module, backend: str = "eager") -> Any:
    return torch.compile(module, backend=backend)


def hooks_on(model: nn.Module) -> int:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, name)) for module in model.modules() for name in names)


class Breaking(pl.Callback):
    """From an epoch on, a function of the package raises; after the run it is as it was.

    Args:
        where: Class or module that holds it.
        name: The function's name.
        message: What is raised.
        ranks: In which processes.
        epoch: From which epoch on.
    """

    def __init__(
        self, where: Any, name: str, message: str, ranks: Sequence[int] = (0,), epoch: int = 1
    ) -> None:
        self.where, self.name, self.message = where, name, message
        self.ranks, self.epoch, self.original = ranks, epoch, getattr(where, name)

    def on_train_epoch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.current_epoch == self.epoch and trainer.global_rank in self.ranks:

            def fail(*args: Any, **kwargs: Any) -> Any:
                raise torch.OutOfMemoryError(self.message)

            setattr(self.where, self.name, fail)

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        setattr(self.where, self.name, self.original)

    on_exception = teardown
