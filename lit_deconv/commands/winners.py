"""The images that have a strongest unit: each read once more, and kept on disk until all is drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor


class Winners:
    """Images on disk, by number.

    Args:
        path: The file.
        numbers: int64 [D], sorted.
        images: Makes of what is stored what the model takes.
    """

    def __init__(self, path: Path, numbers: Tensor, images: Callable[[Tensor], Tensor]) -> None:
        self.path, self.numbers, self.images = path, numbers, images

    def make(self, example: Tensor) -> None:
        """Make room for all of them.

        Args:
            example: [1, C, H, W], as it is stored.
        """
        shape = (len(self.numbers), *example.shape[1:])
        open_memmap(self.path, "w+", example.numpy().dtype, shape).flush()

    def write(self, numbers: Sequence[int], values: Tensor) -> None:
        """Keep some of them.

        Args:
            numbers: Which.
            values: [N, C, H, W], as they are stored.
        """
        stored = open_memmap(self.path, "r+")
        stored[self._rows(numbers)] = values.numpy()

    def __call__(self, numbers: Sequence[int]) -> Tensor:
        """Images [M, C, H, W] as the model takes them."""
        stored = np.load(self.path, mmap_mode="r")
        return self.images(torch.from_numpy(stored[self._rows(numbers)]))

    def _rows(self, numbers: Sequence[int]) -> np.ndarray:
        rows: np.ndarray = torch.searchsorted(self.numbers, torch.tensor(numbers)).numpy()
        return rows
