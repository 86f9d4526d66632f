"""The one pass of `lit-deconv top` over the data: a validation of Lightning's, which may be stopped."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from lit_deconv.attr import Deconvnet
from lit_deconv.commands.job import progress
from lit_deconv.commands.numbered import Batch, Source
from lit_deconv.commands.strongest import look
from lit_deconv.commands.unfinished import Unfinished
from lit_deconv.engine.local import Layout
from lit_deconv.top import NOT_COUNTED, Collector, TopActivations, estimate

SAVE_SECONDS = 20.0
"""At most so much work is lost when a run is killed; one that is interrupted loses none."""


def collector_of(
    layouts: Mapping[str, Layout], k: int, channels: Mapping[str, Sequence[int]], device: Any
) -> Collector:
    """A collector without patches: the images that win are read once more."""
    numbers = sum(
        each.numbers for each in estimate(layouts, k, channels, max_bytes=sys.maxsize).values()
    )
    return Collector(layouts, k, channels, torch.float32, device, max_bytes=numbers)


class Looking(LightningModule):
    """Shows the images to a collector. Each process of a run takes its share, none is seen twice.

    Args:
        net: The layers.
        layouts: Of them.
        channels: By layer.
        k: Units a channel.
        source: The images.
        unfinished: Where what was counted is kept.
        batch_size: Images in one forward pass.
        workers: Processes that read, None: chosen.
    """

    def __init__(
        self,
        net: Deconvnet,
        layouts: Mapping[str, Layout],
        channels: Mapping[str, Sequence[int]],
        k: int,
        source: Source,
        unfinished: Unfinished,
        batch_size: int,
        workers: int | None,
    ) -> None:
        super().__init__()
        self.model = net.model  # so that Lightning moves it
        self.net, self.layouts, self.channels, self.k = net, layouts, channels, k
        self.source, self.unfinished = source, unfinished
        self.batch_size, self.workers = batch_size, workers
        self.top: TopActivations | None = None
        self.unreadable: dict[int, str] = {}
        """Why images could not be read, of all processes."""
        self.images = 0
        """How many could, of all processes."""
        self.seconds: dict[str, float] = {}
        """By stage of this run; what was stopped before is not in it."""

    def setup(self, stage: str) -> None:
        """Gathers what stopped runs left."""
        if self.trainer.is_global_zero:
            self.unfinished.gather()
        self.trainer.strategy.barrier()
        self._before, _, _ = self.unfinished.load()
        left = (~self._before).nonzero().squeeze(1)
        self._own = left[self.global_rank :: self.trainer.world_size]
        self._unreadable: dict[int, str] = {}

    def val_dataloader(self) -> DataLoader[Any]:
        """This process's share of what is left."""
        # one that is not counted, where nothing is left: all processes have to come to the end
        share = self._own if len(self._own) else torch.tensor([0])
        return self.source.loader(share, self.batch_size, self.workers)

    def on_validation_start(self) -> None:
        """Begins."""
        self._collector = collector_of(self.layouts, self.k, self.channels, self.device)
        self._done = 0, self._collector.states()
        self._saved = time.monotonic()
        total, done = len(self._before), int(self._before.sum())
        self._bar = progress(total=total, initial=done, desc="looking", unit="image")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Looks at some images."""
        numbers = batch.numbers if len(self._own) else [NOT_COUNTED] * len(batch.numbers)
        if batch.values is not None:
            look(self.net, self._collector, numbers, self.source.images(batch.values))
        for number, why in batch.unreadable.items() if len(self._own) else ():
            self._unreadable[number] = why
            print(f"skipped {self.source.names[number]}: {why}", file=sys.stderr)
        # one assignment: whenever the run is stopped, the number of batches and what was counted agree
        self._done = batch_idx + 1, self._collector.states()
        self._bar.update((len(numbers) + len(batch.unreadable)) * self.trainer.world_size)
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self.keep()

    def keep(self) -> None:
        """Writes down what this process has counted."""
        batches, states = self._done
        own = self._own[: batches * self.batch_size]
        counted = torch.zeros_like(self._before)
        counted[own] = True
        unreadable = {n: why for n, why in self._unreadable.items() if counted[n]}
        self.unfinished.save(self.global_rank, counted, unreadable, states)
        self._saved = time.monotonic()

    def on_validation_end(self) -> None:
        """Takes together what all processes, and those before them, have counted."""
        self._bar.close()
        self.keep()
        self.trainer.strategy.barrier()
        counted, self.unreadable, (states,) = self.unfinished.load()
        self._collector.take_over(states)
        self.top = self._collector.compute()
        self.images = int(counted.sum()) - len(self.unreadable)


class KeepWhenStopped(Callback):
    """What was counted before an interruption is kept, and the user told of it."""

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Keeps it."""
        assert isinstance(pl_module, Looking)
        if pl_module.top is not None or not hasattr(pl_module, "_bar"):
            return
        pl_module._bar.close()
        pl_module.keep()
        if trainer.is_global_zero:
            counted, _, _ = pl_module.unfinished.load()
            print(
                f"stopped after {int(counted.sum())} of {len(counted)} images; the same command goes "
                "on from there",
                file=sys.stderr,
            )
