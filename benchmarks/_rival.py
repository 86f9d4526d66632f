"""Captum's side: each way to ask its NeuronDeconvolution for what lit-deconv is asked for."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from captum.attr import NeuronDeconvolution  # type: ignore[import-untyped]
from torch import Tensor, nn

for message in ("Setting backward hooks on ReLU", "Input Tensor 0 did not already require"):
    warnings.filterwarnings("ignore", message=message)


@dataclass(frozen=True)
class Form:
    """One way to call Captum.

    Attributes:
        name: For the table.
        run: Does it for some units or images.
    """

    name: str
    run: Callable[[], Tensor]


class Rival:
    """Captum's NeuronDeconvolution of one layer.

    It starts each unit with 1 in place of the activation; nobody is charged for that product.

    Args:
        model: The model, or what is left of it when it is cut off behind the layer.
        layer: Dotted name.
    """

    def __init__(self, model: nn.Module, layer: str) -> None:
        self.captum = NeuronDeconvolution(model, model.get_submodule(layer))

    def unit_by_unit(self, images: Tensor, units: Tensor) -> Tensor:
        """One call a unit, [U, C, H, W]."""
        found = []
        for sample, *unit in units.tolist():
            found.append(self.captum.attribute(images[sample : sample + 1], tuple(unit)))
        return torch.cat(found)

    def in_batches(self, images: Tensor, units: Tensor, size: int) -> Tensor:
        """One call a batch of units, each with its own copy of its image, [U, C, H, W]."""
        found = []
        for part in units.split(size):
            sample, channel, row, column = part.unbind(1)
            rows = torch.arange(len(part), device=images.device)

            def chosen(
                output: Tensor, at: tuple[Tensor, ...] = (rows, channel, row, column)
            ) -> Tensor:
                return output[at]

            found.append(self.captum.attribute(images[sample], chosen))
        return torch.cat(found)

    def map(self, images: Tensor, channel: int) -> Tensor:
        """One feature map with its own activations: the gradient of half its sum of squares is it."""
        return self.captum.attribute(
            images, lambda output: 0.5 * (output[:, channel] ** 2).flatten(1).sum(1)
        )

    def layer(self, images: Tensor, size: int) -> Tensor:
        """The whole layer with its own activations, some images at a time."""
        parts = [
            self.captum.attribute(part, lambda output: 0.5 * (output**2).flatten(1).sum(1))
            for part in images.split(size)
        ]
        return torch.cat(parts)

    def best_for_units(self, images: Tensor, units: Tensor, sizes: Sequence[int]) -> Form:
        """The fastest way to ask for single units, tried on a few of them."""
        forms = [Form("1", partial(self.unit_by_unit, images, units))]
        forms += [Form(str(n), partial(self.in_batches, images, units, n)) for n in sizes]
        few = units[:4]
        seconds = [_seconds(partial(self.unit_by_unit, images, few)) / len(few)]
        for size in sizes:
            many = units[:size]
            took = _seconds(partial(self.in_batches, images, many, len(many)))
            seconds.append(took / len(many))
        return forms[seconds.index(min(seconds))]


# A run that takes longer than this many seconds is not warmed up: it would change little.
_LONG = 2.0


def _seconds(run: Callable[[], Tensor]) -> float:
    first = _once(run)
    return first if first > _LONG else _once(run)


def _once(run: Callable[[], Tensor]) -> float:
    # With one thread CPU time, which other processes hardly change.
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_initialized()
    clock = time.process_time if alone else time.perf_counter
    started = clock()
    run().flatten()[0].item()
    return clock() - started
