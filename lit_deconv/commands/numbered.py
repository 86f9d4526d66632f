"""Images by number, from files or a LightningDataModule: looked at once, and the winners once more."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lit_deconv.commands.pictures import UNREADABLE, View
from lit_deconv.top import images_of

FEW = 512
"""So many images are read without starting processes for it."""
PROCESSES = 8
"""At most so many processes read, unless the user says otherwise."""


class Batch(NamedTuple):
    """Some images.

    Attributes:
        numbers: Which they are.
        values: [N, C, H, W], as they are stored; None: none of them could be read.
        unreadable: Why an image could not be read, by number.
    """

    numbers: list[int]
    values: Tensor | None
    unreadable: dict[int, str]


@dataclass(frozen=True)
class Source:
    """Where images come from.

    Args:
        dataset: Read by number.
        collate: Makes [N, C, H, W] of some of its items, as they are stored.
        images: Makes of that what the model takes.
        names: What each is called.
        view: How they are normalised, for figures.
        about: What the index says of them.
    """

    dataset: Dataset[Any]
    collate: Callable[[Sequence[Any]], Tensor]
    images: Callable[[Tensor], Tensor]
    names: Sequence[str]
    view: View
    about: str

    def loader(self, numbers: Tensor, batch_size: int, workers: int | None) -> DataLoader[Any]:
        """Reads some of the images, in this order.

        Args:
            numbers: int64 [M].
            batch_size: Images together.
            workers: Processes that read; None: as many as there are cores, none for a few images.
        """
        if workers is None:
            workers = min(PROCESSES, os.cpu_count() or 1) if len(numbers) > FEW else 0
        return DataLoader(
            _Numbered(self.dataset, numbers),
            batch_size=batch_size,
            num_workers=workers,
            collate_fn=_Collated(self.collate),
        )


def of_files(paths: Sequence[Path], view: View) -> Source:
    """Pictures from files; stored as the bytes of their pixels."""
    names = [str(path) for path in paths]
    return Source(_Files(names, view), _stacked, view.normalised, names, view, "files")


def of_loader(loader: object, view: View, name: str) -> Source:
    """The images of a user's loader, in the order of its data set, whatever its sampler says.

    Args:
        loader: What a data module returned.
        view: How they are normalised.
        name: Of the data module, for messages.

    Raises:
        ValueError: It cannot be read by number.
    """
    if isinstance(loader, (list, tuple)) and loader:
        loader = loader[0]
    dataset = getattr(loader, "dataset", None)
    if not isinstance(loader, DataLoader) or isinstance(dataset, IterableDataset):
        raise ValueError(
            f"{name} gives {type(dataset or loader).__name__}, whose images cannot be read by number; "
            "give a DataLoader over a map-style data set, or use DeconvCallback in Trainer.validate"
        )
    count = len(dataset)  # type: ignore[arg-type]
    if not count:
        raise ValueError(f"{name} has no image")
    return Source(
        loader.dataset,
        _Found(loader.collate_fn),
        _as_it_is,
        _names(dataset, count),
        view,
        name,
    )


@dataclass(frozen=True)
class _Files(Dataset[Tensor]):
    paths: Sequence[str]
    view: View

    def __getitem__(self, number: int) -> Tensor:
        with Image.open(self.paths[number]) as picture:
            return self.view.pixels(picture)

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True)
class _Numbered(Dataset[tuple[int, Any, str]]):
    """Items with their numbers; what cannot be read is told, not raised."""

    dataset: Dataset[Any]
    numbers: Tensor

    def __getitem__(self, row: int) -> tuple[int, Any, str]:
        number = int(self.numbers[row])
        try:
            return number, self.dataset[number], ""
        except UNREADABLE as error:
            return number, None, " ".join(str(error).split()) or type(error).__name__

    def __len__(self) -> int:
        return len(self.numbers)


@dataclass(frozen=True)
class _Collated:
    collate: Callable[[Sequence[Any]], Tensor]

    def __call__(self, rows: Sequence[tuple[int, Any, str]]) -> Batch:
        whole = [(number, item) for number, item, why in rows if not why]
        values = self.collate([item for _, item in whole]) if whole else None
        return Batch([number for number, _ in whole], values, {n: why for n, _, why in rows if why})


@dataclass(frozen=True)
class _Found:
    """The images in what a user's loader makes of items."""

    collate: Callable[[list[Any]], Any]

    def __call__(self, items: Sequence[Any]) -> Tensor:
        return images_of(self.collate(list(items)))


@dataclass(frozen=True)
class _Names(Sequence[str]):
    """The files of an ImageFolder, else the numbers, without a list of a million strings."""

    samples: Sequence[Any]
    length: int

    def __getitem__(self, number: Any) -> Any:
        return str(self.samples[number][0]) if self.samples else f"image {number}"

    def __len__(self) -> int:
        return self.length


def _names(dataset: object, length: int) -> Sequence[str]:
    samples = getattr(dataset, "samples", None)
    if isinstance(samples, Sequence) and len(samples) == length:
        first = samples[0]
        if isinstance(first, tuple) and isinstance(first[0], (str, Path)):
            return _Names(samples, length)
    return _Names((), length)


def _stacked(items: Sequence[Any]) -> Tensor:
    return torch.stack(list(items))


def _as_it_is(values: Tensor) -> Tensor:
    return values
