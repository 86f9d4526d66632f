"""What a validation's loaders give, batch by batch, and which images of the data set that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from lit_deconv.top import batch_indices

__all__ = ["Given", "Order"]


@dataclass(frozen=True)
class Given:
    """One batch.

    Args:
        batch: As the step gets it.
        indices: Data index of each item, or that another process counts it; None: nobody knows.
        identify: Whether the indices tell images apart: those of several loaders do not.
    """

    batch: Any = None
    indices: Sequence[int] | None = None
    identify: bool = True

    def numbers(self, images: Tensor) -> bool:
        """Whether the indices are those of these images: the batch holds them as they are."""
        if self.indices is None or not self.identify or len(images) != len(self.indices):
            return False
        return any(leaf is images for leaf in pytree.tree_leaves(self.batch))


class Order:
    """The order in which loaders go through their data, as far as it is known beforehand.

    Args:
        loaders: Of one validation, as the Trainer holds them.
    """

    def __init__(self, loaders: Any = None) -> None:
        self._orders = [
            batch_indices(each) if isinstance(each, DataLoader) else None
            for each in pytree.tree_leaves(loaders)
        ]

    def given(self, batch: Any, dataloader_idx: int) -> Given:
        """The next batch of a loader."""
        order = self._orders[dataloader_idx] if dataloader_idx < len(self._orders) else None
        indices = next(order, None) if order is not None else None
        return Given(batch, indices, len(self._orders) == 1)
