"""Collects the strongest units of a model's layers over a data set, outside Lightning."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from lit_deconv.attr import Deconvnet, Path
from lit_deconv.engine.undisturbed import undisturbed
from lit_deconv.top.collector import Collector
from lit_deconv.top.identity import batch_indices, several_processes
from lit_deconv.top.memory import MAX_BYTES, Channels
from lit_deconv.top.result import Images, TopActivations
from lit_deconv.top.sources import DatasetImages, ImagesOf, SpilledImages, images_of


def collect_top(
    model: nn.Module,
    loader: Iterable[Any],
    layers: str | nn.Module | Sequence[str | nn.Module],
    k: int = 9,
    channels: Channels = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    *,
    max_bytes: int = MAX_BYTES,
    find_images: ImagesOf = images_of,
    path: Path = "auto",
    autocast: bool = False,
) -> TopActivations:
    """The k strongest units of each channel over a data set, one an image (figure 2 of the paper).

    The model runs once over the data, in eval mode, and is left as it was. In a distributed run
    every process calls this with its part of the data.

    Args:
        model: Takes a batch of images.
        loader: Gives batches: a ``DataLoader``, or anything that can be looped over.
        layers: Names, globs or modules.
        k: Units a channel.
        channels: Which channels: the same for every layer, or by layer; all by default.
        device: Where to run; by default where the model is. The model is put back afterwards.
        progress: Show a progress bar on stderr, and what is kept.
        max_bytes: Bound of what is kept in memory. Where patches would pass it, images are read
            once more where the loader's order is known, else spilled to disk.
        find_images: Finds the images in a batch.
        path: How the units will be reconstructed, see ``Deconvnet``; with "autograd" whole images
            are kept.
        autocast: Run under the caller's autocast instead of in the weights' own precision.

    Returns:
        The units by layer.

    Raises:
        ValueError: The loader gave no batch, or a batch without images.
    """
    net = Deconvnet(model, layers, path=path, autocast=autocast)
    home = next((p.device for p in net.model.parameters()), torch.device("cpu"))
    where = torch.device(device) if device is not None else home
    collector: Collector | None = None
    images_again: Images | None = None
    order = batch_indices(loader) if isinstance(loader, DataLoader) else None
    with ExitStack() as stack:
        stack.enter_context(undisturbed(net.model, autocast=autocast))
        stack.enter_context(torch.no_grad())
        if where != home:
            net.model.to(where)
            stack.callback(net.model.to, home)
        for batch in tqdm(
            loader, "strongest units", disable=not progress, file=sys.stderr, unit="batch"
        ):
            images = find_images(batch).to(where)
            indices = next(order) if order is not None else None
            if collector is None:
                collector = _collector(net, images, k, channels, max_bytes)
                for name, module in net.layers.items():
                    stack.callback(
                        module.register_forward_hook(_seeing(net, collector, name)).remove
                    )
                images_again = _source(collector, loader, order is not None, find_images, where)
                if progress:
                    tqdm.write(collector.summary(), file=sys.stderr)
            collector.begin(images, indices)
            net.model(images)
            batch_images = collector.batch
            collector.end()
            if isinstance(images_again, SpilledImages):
                images_again.update(*batch_images, collector.winners().tolist())
    if collector is None:
        raise ValueError("the loader gave no batch; check its length and drop_last")
    return collector.compute(images_again)


def _collector(
    net: Deconvnet, images: Tensor, k: int, channels: Channels, max_bytes: int
) -> Collector:
    return Collector(
        net.layouts(images),
        k,
        channels,
        images.dtype,
        images.device,
        max_bytes,
        torch.distributed.get_rank() if several_processes() else 0,
    )


def _source(
    collector: Collector,
    loader: Iterable[Any],
    is_known: bool,
    find_images: ImagesOf,
    device: torch.device,
) -> Images | None:
    if is_known and isinstance(loader, DataLoader):
        return DatasetImages(loader, find_images, device)
    return None if collector.keeps_every_patch else SpilledImages(device)


def _seeing(net: Deconvnet, collector: Collector, name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        collector.see(name, net.feature_map(name, output))

    return hook
