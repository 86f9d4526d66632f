"""Images of the strongest units, read once more: from the data set, or from where they were spilled."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

ImagesOf = Callable[[Any], Tensor]
"""Finds the images [N, C, H, W] in a batch."""


def images_of(batch: Any) -> Tensor:
    """The first batch of floating-point images in what a loader gives: a tensor, a tuple, a dict.

    Raises:
        ValueError: There is none.
    """
    found = _first(batch)
    if found is None:
        raise ValueError(
            f"found no floating-point images [N, C, H, W] in a batch of type "
            f"{type(batch).__name__}; say where they are with find_images="
        )
    return found


class DatasetImages:
    """Reads images of map-style data by index.

    Args:
        loader: Its data set and the way it makes batches.
        images_of: Finds the images in a batch.
        device: Where the images are needed.
    """

    def __init__(
        self, loader: DataLoader[Any], images_of: ImagesOf, device: torch.device | str
    ) -> None:
        self.loader = loader
        self.images_of = images_of
        self.device = device

    def __call__(self, identities: Sequence[int]) -> Tensor:
        """Images [M, C, H, W] by data index."""
        items = [self.loader.dataset[index] for index in identities]
        return self.images_of(self.loader.collate_fn(items)).to(self.device)


class SpilledImages:
    """Keeps images on disk, each once, in a folder that goes when nobody holds this any more.

    Args:
        device: Where the images are needed.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = device
        self._folder = Path(tempfile.mkdtemp(prefix="lit_deconv_"))
        # A TemporaryDirectory would warn when it goes with its holder, which is what is meant here.
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._held: set[int] = set()

    def update(self, images: Tensor, identity: Tensor, wanted: Sequence[int]) -> None:
        """Writes those images of a batch that are wanted, deletes those that no longer are.

        Args:
            images: [N, C, H, W].
            identity: int64 [N].
            wanted: Identities of all images to hold.
        """
        asked = set(wanted)
        for gone in self._held - asked:
            self._file(gone).unlink()
        self._held &= asked
        for row, image in enumerate(identity.tolist()):
            if image in asked and image not in self._held:
                torch.save(images[row].cpu().clone(), self._file(image))
                self._held.add(image)

    def __call__(self, identities: Sequence[int]) -> Tensor:
        """Images [M, C, H, W] by identity."""
        files = [self._file(image) for image in identities]
        return torch.stack([torch.load(file, weights_only=True) for file in files]).to(self.device)

    def __len__(self) -> int:
        return len(self._held)

    def _file(self, identity: int) -> Path:
        return self._folder / f"{identity}.pt"


def _first(batch: Any) -> Tensor | None:
    if isinstance(batch, Tensor):
        return batch if batch.ndim >= 3 and batch.is_floating_point() else None
    entries: Sequence[Any] = ()
    if isinstance(batch, Mapping):
        entries = list(batch.values())
    elif isinstance(batch, Sequence) and not isinstance(batch, str):
        entries = batch
    return next((found for entry in entries if (found := _first(entry)) is not None), None)
