"""Which units of a batch autograd may walk together: those whose images do not see one another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from lit_deconv.engine.errors import UnsupportedOp

# Takes a seed at the layer back to each input, [N, ...].
Walk: TypeAlias = Callable[[Tensor], tuple[Tensor, ...]]


class Mixing:
    """Whether a model keeps its images apart on the way to a layer, asked of autograd's graph.

    Args:
        layer: The layer's output, [M, ...]; mostly M = N.
        images: The number of images N of each input.
    """

    def __init__(self, layer: Tensor, images: Sequence[int]) -> None:
        self.layer, self.images = layer, images
        self._mixed: bool | None = None

    def rounds(self, walk: Walk, samples: Tensor) -> Iterator[Tensor]:
        """Groups units that may be walked at the same time: a single one where images are mixed.

        Args:
            walk: The way back, on which the question is put. Not held: it holds the whole graph.
            samples: The sample that each unit belongs to, [U].

        Yields:
            Positions in ``samples``.

        Raises:
            UnsupportedOp: The image of a unit is another one than the number of its sample says.
        """
        if self._mixed is None:
            self._mixed = self._are_mixed(walk)
        if not self._mixed:
            return rounds(samples)
        for sample in samples.unique().tolist():
            self._refuse_another_image(walk, sample)
        return iter(torch.arange(len(samples), device=samples.device).split(1))

    def _are_mixed(self, walk: Walk) -> bool:
        """Whether a signal that starts at one image can arrive at another one.

        Two images differ in some bit of their numbers, so two walks a bit tell every pair apart.
        """
        if set(self.images) != {len(self.layer)}:
            return True
        number = torch.arange(len(self.layer))
        return any(
            bool(self._reached_from(walk, seeded)[~seeded].any())
            for bit in range((len(number) - 1).bit_length())
            for seeded in ((number >> bit) % 2 == 0, (number >> bit) % 2 == 1)
        )

    def _reached_from(self, walk: Walk, seeded: Tensor) -> Tensor:
        """The images [N], bool, at which a signal arrives from some samples of the layer, bool [M].

        What is not a number stays that on every way back, also where a rectifier or a cancellation
        would leave nothing of a number.
        """
        seed = torch.zeros_like(self.layer)
        seed[seeded.to(seed.device)] = torch.nan
        with torch.autograd.set_detect_anomaly(False):
            signals = walk(seed)
        arrived = [signal.isnan().flatten(1).any(1).cpu() for signal in signals]
        count = max(self.images)  # an input with one sample belongs to all images
        return torch.stack([a if len(a) == count else a.any().expand(count) for a in arrived]).any(
            0
        )

    def _refuse_another_image(self, walk: Walk, sample: int) -> None:
        reached = self._reached_from(walk, torch.arange(len(self.layer)) == sample)
        if sample >= len(reached) or not reached[sample]:
            raise UnsupportedOp(
                f"sample {sample} of the layer (of {len(self.layer)}) does not come from image {sample} "
                f"(of {len(reached)}): the model puts its images in another order; use attribute(), "
                f"which gives all images at once"
            )


def rounds(samples: Tensor) -> Iterator[Tensor]:
    """Groups units so that no group holds two of one sample, in as few groups as that takes.

    Args:
        samples: The sample that each unit belongs to, [U].

    Yields:
        Positions in ``samples``.
    """
    seen: dict[int, int] = {}
    groups: list[list[int]] = []
    for unit, sample in enumerate(samples.tolist()):
        group = seen.get(sample, 0)
        seen[sample] = group + 1
        if group == len(groups):
            groups.append([])
        groups[group].append(unit)
    for group_units in groups:
        yield torch.tensor(group_units, device=samples.device)
