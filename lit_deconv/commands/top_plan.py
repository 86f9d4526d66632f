"""What is known of a run of `lit-deconv top` before the first image is looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule
from torch import Tensor

from lit_deconv.attr import Deconvnet
from lit_deconv.commands.cost import RAW, Cost, cost_of
from lit_deconv.commands.job import described, fitting
from lit_deconv.commands.models import Loaded, imported, load, normalisation_of, takes_channels
from lit_deconv.commands.numbered import Source, of_files, of_loader
from lit_deconv.commands.observing import chosen_layers
from lit_deconv.commands.pictures import UNREADABLE, find_pictures, view_of
from lit_deconv.commands.seeds import channels_of
from lit_deconv.engine.local import Layout

SPLITS = {"val": "validate", "train": "fit", "test": "test", "predict": "predict"}
"""What a data module is set up for, by split."""

REPORT_CHANNELS = 2000
"""A page with more would be too large for a browser."""


@dataclass(frozen=True)
class Plan:
    """What is known before the first image is looked at.

    Args:
        loaded: The model, on the CPU.
        source: The images.
        net: The layers.
        layouts: Of them.
        channels: By layer.
        example: [1, C, H, W], an image as it is stored.
        note: What every figure says.
        cost: What it will take.
        about: What the index says of each layer.
    """

    loaded: Loaded
    source: Source
    net: Deconvnet
    layouts: Mapping[str, Layout]
    channels: Mapping[str, Sequence[int]]
    example: Tensor
    note: str
    cost: Cost
    about: Mapping[str, Mapping[str, Any]]


def check(options: Namespace) -> None:
    """What can be told without loading anything is told first.

    Raises:
        ValueError: An option that cannot be.
    """
    if options.raw not in RAW:
        raise ValueError(f"--raw {options.raw!r}: expected {', '.join(RAW)}")
    if options.split not in SPLITS:
        raise ValueError(f"--split {options.split!r}: expected {', '.join(SPLITS)}")
    if not options.images and options.datamodule is None:
        raise ValueError("no images: name files or folders, or a --datamodule that has them")


def planned(options: Namespace) -> Plan:
    """Load the model, find the images, choose the layers and reckon the cost.

    Raises:
        ValueError: They do not go together.
    """
    paths = find_pictures(options.images) if options.images else []
    loaded = load(Namespace({**vars(options), "device": "cpu"}))  # each process moves it to its own
    presets = dict(loaded.presets)
    datamodule = None
    if options.datamodule is not None:
        datamodule = imported(options.datamodule, ".", "--datamodule")
        if not paths:
            datamodule = _data_module(datamodule, options)
        presets.update(normalisation_of(datamodule))
    channels = takes_channels(loaded.model)
    if paths:
        source = of_files(paths, view_of(options, presets, channels, paths))
    else:
        presets.setdefault("size", 1)  # the data module sees to it
        view = view_of(options, presets, channels, (), any_channels=True)
        loader = _loader(datamodule, options)
        source = of_loader(loader, view, f"{options.datamodule} ({options.split})")
    example = _example(source)
    image = source.images(example)
    if image.ndim != 4:
        raise ValueError(
            f"{source.about} gives {list(image.shape[1:])} for one image, expected [C, H, W]"
        )
    height, width = image.shape[2:]
    source = replace(source, view=replace(source.view, size=(height, width)))
    blank = torch.zeros_like(image)
    with fitting(loaded.name, blank.shape):
        net = Deconvnet(loaded.model, chosen_layers(loaded.model, blank, options.layers))
        layouts = net.layouts(blank)
        about = described(net, layouts, blank)
    for name, layout in layouts.items():
        if len(layout.map_size) != 2:
            raise ValueError(f"layer {name!r} gives no feature maps [C, H, W]; choose another")
    chosen = {n: channels_of(options.channels, n, layout) for n, layout in layouts.items()}
    count = sum(map(len, chosen.values()))
    if options.report and count > REPORT_CHANNELS:
        raise ValueError(
            f"--report: one page with {count} channels is too large for a browser (at most "
            f"{REPORT_CHANNELS}); name fewer --channels or --layers, or use the figures and the log"
        )
    bytes_each = example[0].numel() * example.element_size()
    total = len(source.names)
    cost = cost_of(layouts, chosen, options.top_k, total, bytes_each, options.raw)
    note = " ".join(filter(None, [f"Model: {loaded.name}.", loaded.note, source.view.note]))
    return Plan(loaded, source, net, layouts, chosen, example, note, cost, about)


def _data_module(cls: Any, options: Namespace) -> LightningDataModule:
    if not (isinstance(cls, type) and issubclass(cls, LightningDataModule)):
        raise ValueError(f"--datamodule {options.datamodule!r} is no LightningDataModule")
    try:
        return cls(**options.datamodule_args)
    except TypeError as error:
        raise ValueError(
            f"cannot build {options.datamodule}: {error}; its arguments go into --datamodule-args"
        ) from error


def _loader(datamodule: Any, options: Namespace) -> object:
    datamodule.prepare_data()
    datamodule.setup(SPLITS[options.split])
    return getattr(datamodule, f"{options.split}_dataloader")()


def _example(source: Source) -> Tensor:
    """The first image that can be read, [1, C, H, W], as it is stored."""
    why = ""
    for number in range(len(source.names)):
        try:
            return source.collate([source.dataset[number]])
        except UNREADABLE as error:
            why = why or f"{source.names[number]}: {error}"
    raise ValueError(f"none of the images could be read ({why})")
